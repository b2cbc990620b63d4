#!/usr/bin/env bash
# From a fresh clone to a trained and validated model: handwritten digits, two processes, a few minutes.
#   bash scripts/quickstart.sh                        skanet_nano, 20 epochs, must reach 98.5 % top-1
#   bash scripts/quickstart.sh segmentation           scenes of digits, semantic FPN, 8 epochs, must reach 55 % mean IoU
#   bash scripts/quickstart.sh detection              scenes of digits, SSDLite, 7 epochs, must reach 85 % AP50
#   EPOCHS=4 bash scripts/quickstart.sh [TASK]        fewer epochs, no bound
set -euo pipefail
cd "$(dirname "$0")/.."
source scripts/environment.sh
task="${1:-classification}"
extra=quickstart
[ "$task" = detection ] && extra=quickstart,detection
install_into_venv ".[$extra]"

case "$task" in
    classification) recipe=skanet_nano_digits model=skanet_nano epochs=20 score=top1 bound=98.5 name=digits ;;
    segmentation) recipe=semantic_fpn_skanet_nano_digit_scenes model=semantic_fpn_skanet_nano epochs=8 score=mIoU \
        bound=0.55 name=digit_scenes_3000 scenes=3000 ;;
    detection) recipe=ssdlite_skanet_nano_digit_scenes model=ssdlite_skanet_nano epochs=7 score=AP50 bound=0.85 \
        name=digit_scenes_3000 scenes=3000 ;;
    *) echo "quickstart: $task is no task; expected classification, segmentation or detection" >&2; exit 2 ;;
esac
whole=$epochs
epochs="${EPOCHS:-$whole}"
data="${DATA_DIR:-data/$name}"
output="${OUTPUT_DIR:-output/quickstart-$task-$epochs}"

if [ "$task" = classification ]; then
    [ -d "$data/val" ] || python scripts/prepare_digits.py "$data"
else
    [ -d "$data/annotations" ] || python scripts/prepare_digit_scenes.py "$data" --train "${scenes:-400}"
fi
warmup=()
[ "$epochs" -gt 2 ] || warmup=(--warmup_epochs $((epochs - 1)))
SECONDS=0
mpirun -n 2 --oversubscribe python train.py --config "configs/$recipe.yaml" \
    --data_dir "$data" --ckpt_save_dir "$output" --epoch_size "$epochs" "${warmup[@]}"
python validate.py --config "configs/$recipe.yaml" \
    --data_dir "$data" --ckpt_path "$output/${model}_best.ckpt" --result_json "$output/result.json"
echo "Trained and validated in $SECONDS s. Curves: $output/curves.png, every figure: $output/metrics.csv"
if [ "$task" != classification ]; then
    python scripts/predict.py "$data/val2017" --ckpt_path "$output/${model}_best.ckpt" --out "$output/pictures" \
        --format csv > "$output/pictures.csv"
    echo "What it sees in the validation scenes: $output/pictures"
fi

if [ "$epochs" -ge "$whole" ] && [ -n "$bound" ]; then
    python - "$output/result.json" "$score" "$bound" <<'PYTHON'
import json, sys
path, score, bound = sys.argv[1:]
figures = json.load(open(path))
found = figures.get("bbox", figures)[score]
sys.exit(0 if found >= float(bound) else f"{score} is {found:.4g}; at least {bound} was expected")
PYTHON
fi
