#!/usr/bin/env bash
# What the image needs from Debian 12, and its user. Run as root by the Dockerfile and by tests/integration/test_image.py.
set -euo pipefail
export DEBIAN_FRONTEND=noninteractive
apt-get update -qq
# wget: KubeRay's probes. gcc and the headers: Triton compiles its launchers when torch.compile is used.
apt-get install -y -qq --no-install-recommends ca-certificates wget gcc libc6-dev python3.11 python3.11-dev python3.11-venv
rm -rf /var/lib/apt/lists/*
useradd --create-home --uid 10001 ray
