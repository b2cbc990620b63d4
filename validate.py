"""Evaluates a checkpoint on a validation set: `mindska validate`, from a clone.

    python validate.py --config configs/skanet_s.yaml --data_dir DATA --ckpt_path output/skanet_s/skanet_s_best.ckpt
    mpirun -n 8 --bind-to none python validate.py --model skanet_s --data_dir DATA --ckpt_path model_best.pth.tar
    python validate.py --data_dir DATA --ckpt_path A.ckpt B.ckpt C.onnx --result_csv results.csv

The command to read from top to bottom is mindska/commands/validate.py.
"""

from mindska.commands.validate import main

if __name__ == "__main__":
    main(description=__doc__)
