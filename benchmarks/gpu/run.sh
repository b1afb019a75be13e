#!/usr/bin/env bash
# On the GPU host, in the repository's root: bash benchmarks/gpu/run.sh [options of `python -m benchmarks.gpu`]
set -u
site=$PWD/.cache/gpu-site
[ -d "$site/deepspeed" ] || {
  python3 -m pip install -q --no-index --no-deps --no-compile --no-cache-dir --upgrade --target "$site" .whl/*.whl || exit 9
  python3 -m zipfile -e .whl/deepspeed.zip "$site" || exit 9
}
export PYTHONPATH=$site:$PWD/src:$PWD DS_ACCELERATOR=cuda
nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv,noheader
python3 -m benchmarks.gpu "$@"
