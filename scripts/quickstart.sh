#!/usr/bin/env bash
# From a fresh clone to a trained and validated model: handwritten digits, skanet_nano, two processes, a few minutes.
#   bash scripts/quickstart.sh              20 epochs, must reach 98.5 % top-1
#   EPOCHS=4 bash scripts/quickstart.sh     fewer epochs, no bound
set -euo pipefail
cd "$(dirname "$0")/.."
source scripts/environment.sh
install_into_venv ".[quickstart]"

epochs="${EPOCHS:-20}"
data="${DATA_DIR:-data/digits}"
output="${OUTPUT_DIR:-output/quickstart-$epochs}"

[ -d "$data/val" ] || python scripts/prepare_digits.py "$data"
SECONDS=0
mpirun -n 2 --oversubscribe python train.py --config configs/skanet_nano_digits.yaml \
    --data_dir "$data" --ckpt_save_dir "$output" --epoch_size "$epochs" --warmup_epochs $((epochs > 2 ? 2 : epochs - 1))
python validate.py --config configs/skanet_nano_digits.yaml \
    --data_dir "$data" --ckpt_path "$output/skanet_nano_best.ckpt" --result_json "$output/result.json"
echo "Trained and validated in $SECONDS s. Curves: $output/curves.png, every figure: $output/metrics.csv"

if [ "$epochs" -ge 20 ]; then
    python - "$output/result.json" <<'PYTHON'
import json, sys
top1 = json.load(open(sys.argv[1]))["top1"]
sys.exit(0 if top1 >= 98.5 else f"top-1 is {top1:.2f} %; at least 98.5 % was expected")
PYTHON
fi
