# The image of every Ray node: CUDA, our pins, DeepSpeed's native operators built beforehand so that no worker compiles.
#   docker build --build-arg CUDA=13.0.1 -t isthmus:0.1.0 .
# CUDA must be the toolkit of the pinned torch (python -c "import torch; print(torch.version.cuda)"); the build checks it.
ARG CUDA=13.0.1
FROM nvidia/cuda:${CUDA}-cudnn-devel-ubuntu24.04 AS build
ARG GPU_ARCHITECTURES="8.0;8.6;8.9;9.0"
ENV DEBIAN_FRONTEND=noninteractive PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1
RUN apt-get update \
    && apt-get install -y --no-install-recommends software-properties-common g++ ninja-build \
    && add-apt-repository -y ppa:deadsnakes/ppa \
    && apt-get install -y --no-install-recommends python3.11 python3.11-dev python3.11-venv \
    && rm -rf /var/lib/apt/lists/*
RUN python3.11 -m venv /opt/isthmus
ENV PATH=/opt/isthmus/bin:$PATH
COPY constraints.txt /tmp/constraints.txt
RUN pip install --constraint /tmp/constraints.txt torch setuptools wheel ninja packaging
RUN python -c "import os, torch; want = torch.version.cuda; have = os.environ['CUDA_VERSION']; \
assert have.startswith(want), f'build with --build-arg CUDA={want}.x: the image has CUDA {have}'"
# CPU Adam serves optimizer offload, fused Adam the fp16 path; nothing else of DeepSpeed is compiled.
RUN DS_BUILD_CPU_ADAM=1 DS_BUILD_FUSED_ADAM=1 TORCH_CUDA_ARCH_LIST="${GPU_ARCHITECTURES}" \
    pip install --constraint /tmp/constraints.txt --no-build-isolation --no-binary deepspeed deepspeed
COPY pyproject.toml README.md /src/
COPY model /src/model
COPY data_pipeline /src/data_pipeline
COPY trainer /src/trainer
COPY cluster /src/cluster
COPY ds_configs /src/ds_configs
RUN pip install --constraint /tmp/constraints.txt --editable /src
RUN python -c "from deepspeed.git_version_info import installed_ops as ops; \
missing = [name for name in ('cpu_adam', 'fused_adam') if not ops[name]]; assert not missing, missing"

FROM nvidia/cuda:${CUDA}-cudnn-runtime-ubuntu24.04
RUN apt-get update \
    && apt-get install -y --no-install-recommends software-properties-common wget \
    && add-apt-repository -y ppa:deadsnakes/ppa \
    && apt-get install -y --no-install-recommends python3.11 python3.11-dev g++ \
    && rm -rf /var/lib/apt/lists/* \
    && useradd --create-home --uid 1000 ray
COPY --from=build /opt/isthmus /opt/isthmus
COPY --from=build /src /src
ENV PATH=/opt/isthmus/bin:$PATH RAY_AUTH_MODE=token RAY_USAGE_STATS_ENABLED=0 PYTHONUNBUFFERED=1
USER ray
WORKDIR /home/ray
RUN python -c "import cluster.driver, cluster.kubernetes, deepspeed, ray" && isthmus --help > /dev/null
