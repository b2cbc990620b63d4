#!/usr/bin/env bash
# A short suite on every MindSpore that the package index has from 2.7.0 on, with a row of a table for each.
#   bash scripts/versions.sh                       all; an hour, and 2.5 GB a version
#   bash scripts/versions.sh 2.7.0 2.10.0          these
#   PYTHON=python3.12 bash scripts/versions.sh     on another Python, in a clone without .venv
# Each MindSpore goes into output/versions, before the one of .venv on Python's path; all else is that of .venv.
set -euo pipefail
cd "$(dirname "$0")/.."
source scripts/environment.sh
install_into_venv ".[test]"
python=$(python -c 'import sys; print("%d.%d" % sys.version_info[:2])')

versions=("$@")
if [ $# = 0 ]; then
    mapfile -t versions < <(python -m pip index versions mindspore 2>/dev/null | sed -n 's/^Available versions: //p' |
        tr -d ',' | tr ' ' '\n' | sort -V | awk '$0 ~ /^(2\.([7-9]|[1-9][0-9])|[3-9])\./')
fi
[ "${#versions[@]}" -gt 0 ] || { echo "versions.sh: the package index has no MindSpore for Python $python" >&2; exit 1; }

suite=(tests/parity/test_families.py tests/parity/test_skanet.py tests/test_acceleration.py tests/test_compile_cache.py
    tests/test_onnx.py tests/test_optimizers.py tests/test_schedules.py tests/test_training.py tests/test_wrappers.py)
table=output/versions/table-python$python.md
mkdir -p output/versions
echo "| MindSpore | Python | tests | forward, training step: C++ operators | the same: plain operators |" > "$table"
echo "|---|---|---|---|---|" >> "$table"
for version in "${versions[@]}"; do
    folder="$PWD/output/versions/python$python-$version"
    if [ ! -e "$folder/complete" ]; then
        echo "Installing MindSpore $version ..."
        rm -rf "$folder"
        if ! python -m pip install --quiet --no-deps --target "$folder" "mindspore==$version"; then
            echo "| $version | $python | not to be had for this Python | | |" >> "$table"
            continue
        fi
        touch "$folder/complete"
    fi
    echo "Testing with MindSpore $version ..."
    log="output/versions/python$python-$version.log"
    PYTHONPATH="$folder:$PWD" python -m pytest -q -n 2 --dist loadfile -m "not slow" "${suite[@]}" > "$log" 2>&1 || true
    tests=$(tail -n 1 "$log" | tr -d '=' | sed 's/ in .*//; s/^ *//')
    fast=$(PYTHONPATH="$folder:$PWD" python tests/programs/speed.py 2>> "$log" || echo "error")
    plain=$(PYTHONPATH="$folder:$PWD" MINDSKA_KERNELS=off python tests/programs/speed.py 2>> "$log" || echo "error")
    echo "| $version | $python | $tests | $fast | $plain |" | tee -a "$table"
done
echo
cat "$table"
echo "Times are of skanet_nano, 8 images of 64 pixels, in graph mode. The tests' output: output/versions/*.log"
