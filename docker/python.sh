#!/usr/bin/env bash
# python.sh SOURCE TARGET: a virtual environment in TARGET with isthmus from SOURCE and the pinned versions.
set -euo pipefail
source=$1 target=$2
python3.11 -m venv "$target"
# Training loads none of DeepSpeed's native operators, so nothing is compiled; PyTorch's wheels bring CUDA's libraries.
DS_BUILD_OPS=0 "$target/bin/pip" install --no-cache-dir --disable-pip-version-check -qq --constraint "$source/constraints.txt" "$source"
"$target/bin/python" -c "import isthmus.cluster.driver, deepspeed, ray"
"$target/bin/isthmus" --help >/dev/null
