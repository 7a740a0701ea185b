#!/usr/bin/env bash
# What a GPU makes of it, in one command of at most 8 minutes:
#
#     bash configs/gpu_check.sh [FOLDER] [OPTIONS OF gpu_check.py ...]
#
# Runs tests/test_cuda.py and configs/gpu_check.py on this tree as it is, and leaves FOLDER/gpu.json (default: gpu). Takes torch,
# transformers, lightning, torchmetrics and pytest (with xdist and hypothesis); nothing is installed and nothing downloaded.
set -u
here=$(cd "$(dirname "$0")/.." && pwd)
folder=${1:-gpu}
shift || true
mkdir -p "$folder"
export PYTHONPATH=$here/src HF_HUB_OFFLINE=1
# Warnings are no errors here: other versions than those that the project is developed with warn of other things.
timeout 200 python3 -m pytest "$here/tests/test_cuda.py" -n 0 -W default -p no:cacheprovider --rootdir "$here" \
    --junitxml "$folder/tests.xml" > "$folder/tests.log" 2>&1
tail -3 "$folder/tests.log"
timeout 270 python3 "$here/configs/gpu_check.py" --tests "$folder/tests.xml" --output "$folder/gpu.json" "$@"
