# The image of every Ray node: CUDA, our pins, DeepSpeed's native operators built beforehand so that no worker compiles.
#   docker build --build-arg CUDA=13.0.1 -t isthmus:0.1.0 .
# CUDA must be the toolkit of the pinned torch (python -c "import torch; print(torch.version.cuda)"); the build checks it.
ARG CUDA=13.0.1
FROM nvidia/cuda:${CUDA}-devel-ubuntu24.04 AS build
ARG GPU_ARCHITECTURES="8.0;8.6;8.9;9.0;10.0"
ARG DEBIAN_FRONTEND=noninteractive
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install -y --no-install-recommends software-properties-common g++ \
    && add-apt-repository -y ppa:deadsnakes/ppa \
    && apt-get install -y --no-install-recommends python3.11 python3.11-dev python3.11-venv \
    && rm -rf /var/lib/apt/lists/* \
    && python3.11 -m venv /opt/isthmus
ENV PATH=/opt/isthmus/bin:$PATH
COPY constraints.txt /tmp/constraints.txt
RUN pip install --constraint /tmp/constraints.txt torch setuptools wheel ninja packaging py-cpuinfo \
    && python -c "import os, torch; want = torch.version.cuda or 'none'; have = os.environ['CUDA_VERSION']; \
assert have.startswith(want), f'build with --build-arg CUDA={want}.x: the image has CUDA {have}'"
# Training as shipped loads none of DeepSpeed's operators: its optimizer is PyTorch's. These are what a template of one's
# own can ask for (quantized weights, native pinned memory). A build has no GPU, so the accelerator has to be named.
RUN DS_ACCELERATOR=cuda DS_BUILD_QUANTIZER=1 DS_BUILD_PIN_MEMORY=1 TORCH_CUDA_ARCH_LIST="${GPU_ARCHITECTURES}" \
    pip install --constraint /tmp/constraints.txt --no-build-isolation --no-binary deepspeed deepspeed \
    && python -c "from deepspeed.git_version_info import installed_ops as ops; \
missing = [name for name in ('quantizer', 'pin_memory') if not ops[name]]; assert not missing, missing"
COPY . /src
RUN pip install --constraint /tmp/constraints.txt /src

# The wheels of torch bring CUDA's libraries; of the base image only the driver's interface is needed.
FROM nvidia/cuda:${CUDA}-base-ubuntu24.04
ARG DEBIAN_FRONTEND=noninteractive
# wget: KubeRay's probes. g++ and headers: Triton. Ubuntu's images hold a user 1000 already.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install -y --no-install-recommends software-properties-common wget \
    && add-apt-repository -y ppa:deadsnakes/ppa \
    && apt-get install -y --no-install-recommends python3.11 python3.11-dev g++ \
    && rm -rf /var/lib/apt/lists/* \
    && useradd --create-home --uid 10001 ray
COPY --from=build /opt/isthmus /opt/isthmus
ENV PATH=/opt/isthmus/bin:$PATH RAY_AUTH_MODE=token RAY_USAGE_STATS_ENABLED=0 PYTHONUNBUFFERED=1
USER 10001
WORKDIR /home/ray
RUN python -c "import isthmus.cluster.driver, deepspeed, ray" && isthmus --help > /dev/null
