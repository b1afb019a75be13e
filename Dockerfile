# The image of every Ray node: Debian 12 with its own Python 3.11 and the pinned packages.
#   docker build -t isthmus:0.1.0 .
# The host brings the GPU driver (NVIDIA Container Toolkit); its version must suit the CUDA of the pinned torch:
#   python -c "import torch; print(torch.version.cuda)"
FROM debian:12-slim
COPY docker/system.sh /tmp/docker/system.sh
RUN /tmp/docker/system.sh
COPY . /tmp/isthmus
RUN /tmp/isthmus/docker/python.sh /tmp/isthmus /opt/isthmus && rm -rf /tmp/isthmus /tmp/docker
ENV PATH=/opt/isthmus/bin:$PATH NVIDIA_VISIBLE_DEVICES=all NVIDIA_DRIVER_CAPABILITIES=compute,utility \
    RAY_AUTH_MODE=token RAY_USAGE_STATS_ENABLED=0 PYTHONUNBUFFERED=1
USER 10001
WORKDIR /home/ray
