#!/usr/bin/env bash
# On a machine with a package registry, in the repository's root: put what a bare GPU host lacks into .whl/ (22 MB,
# ignored by git). The host has Python 3.12, a CUDA build of torch, transformers, safetensors and filelock, no network.
set -euo pipefail
grep -qx /.whl/ .git/info/exclude 2>/dev/null || echo /.whl/ >>.git/info/exclude
rm -rf .whl && mkdir .whl
packages=(hjson pydantic pydantic-core annotated-types typing-inspection tenacity boto3 botocore jmespath s3transfer
  typing-extensions webdataset braceexpand simplejpeg)
pins=$(for name in "${packages[@]}"; do grep -i "^${name/-/[-_]}==" constraints.txt || echo "$name"; done)
# shellcheck disable=SC2086
python3 -m pip download -q --no-deps --only-binary=:all: --python-version 3.12 --implementation cp \
  --platform manylinux_2_28_x86_64 --platform manylinux_2_17_x86_64 --platform manylinux2014_x86_64 -d .whl $pins
# DeepSpeed is published as source only, and is pure Python where nothing is compiled: the installed one travels.
"${VENV:-.venv}/bin/python" - <<'P'
import importlib.util, pathlib, zipfile
site = pathlib.Path(importlib.util.find_spec("deepspeed").submodule_search_locations[0]).parent
with zipfile.ZipFile(".whl/deepspeed.zip", "w", zipfile.ZIP_DEFLATED) as archive:
    for top in site.glob("deepspeed*"):
        for file in top.rglob("*"):
            if file.is_file() and "__pycache__" not in file.parts:
                archive.write(file, file.relative_to(site))
P
"${VENV:-.venv}/bin/isthmus" assets tiny .whl/tiny >/dev/null
du -sh .whl
