"""Evaluates checkpoints on a validation set: top-1, top-5 and loss over every image exactly once, and each class.

    mindska validate --config skanet_s --data_dir DATA --ckpt_path output/skanet_s/skanet_s_best.ckpt
    mpirun -n 8 --bind-to none mindska validate --model skanet_s --data_dir DATA --ckpt_path model_best.pth.tar
    mindska validate --data_dir DATA --ckpt_path A.ckpt B.ckpt C.onnx --result_csv results.csv

A checkpoint of mindska says itself which model it is, of how many classes, and how images are prepared; only the last
may be set otherwise, in the configuration or on the command line. Files of others (PyTorch, safetensors, Caffe) are
recognised by their content; of a file with averaged weights these are taken. Exported models (.onnx, .mindir) are
evaluated as they are.
"""

from collections.abc import Sequence
from typing import Optional

from mindska.config import check_given, check_results, parse_args
from mindska.distributed import check_environment, distributed
from mindska.errors import clear_errors


def main(arguments: Optional[Sequence[str]] = None, description: Optional[str] = __doc__) -> None:
    config = parse_args(arguments, description or "", command="validate")
    with clear_errors():
        check_given(config, "ckpt_path")
        check_environment()
        check_results(config)

    # Only now, since they load MindSpore, which takes seconds.
    from mindska import builders

    if config.corruptions:
        from mindska.analysis.corruptions import validate
    else:
        from mindska.tasks import validate

    with clear_errors(), distributed(builders.device_target(config)) as world, clear_errors():
        builders.set_up(config, world)
        validate(config, world)
