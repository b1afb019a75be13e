"""The steps of the Dockerfile, executed in a bare Debian 12 root: what the image would hold works."""

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
pytestmark = [
    pytest.mark.integration,
    pytest.mark.slow,
    pytest.mark.skipif(os.getuid() != 0, reason="chroot needs root"),
    pytest.mark.skipif(shutil.which("debootstrap") is None, reason="needs Debian's package debootstrap"),
]


def in_root(root, *command, **environment):
    """Run a command in the root with an environment of its own."""
    path = "/opt/isthmus/bin:/usr/sbin:/usr/bin:/sbin:/bin"
    variables = [f"{key}={value}" for key, value in {"PATH": path, "HOME": "/root", **environment}.items()]
    done = subprocess.run(
        ["chroot", str(root), "/usr/bin/env", "-i", *variables, *command],
        capture_output=True, text=True, timeout=1400, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    return done.stdout


def local_indexes():
    """Folders of this machine that pip is configured to look into; an index keeps its files beside `simple`."""
    shown = subprocess.run(["pip", "config", "list"], capture_output=True, text=True, check=True).stdout
    found = [Path(path) for path in re.findall(r"(?:file://|')(/[\w./-]+)", shown)]
    return {path.parent if path.name == "simple" else path for path in found if path.is_dir()}


@pytest.fixture
def debian(tmp_path):
    """A bare Debian 12 with this machine's name resolution and pip settings; what is mounted is unmounted."""
    root = tmp_path / "root"
    subprocess.run(
        ["debootstrap", "--variant=minbase", "bookworm", str(root)], check=True, capture_output=True, timeout=600
    )
    for path in map(Path, ("/etc/resolv.conf", "/etc/hosts", "/etc/pip.conf", Path.home() / ".config/pip/pip.conf")):
        if path.exists():
            (root / path.relative_to("/")).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(path, root / path.relative_to("/"))
    mounts = [(path, root / path.relative_to("/")) for path in (Path("/proc"), *local_indexes())]
    try:
        for source, target in mounts:
            target.mkdir(parents=True, exist_ok=True)
            subprocess.run(["mount", "--bind", "--read-only", str(source), str(target)], check=True)
        yield root
    finally:
        for _, target in reversed(mounts):
            subprocess.run(["umount", "--lazy", str(target)], check=False)


def copied(ignored: Path, target: Path) -> None:
    """Copy what .dockerignore lets through."""
    names = [line[1:] for line in ignored.read_text().splitlines() if line.startswith("!")]
    for name in names:
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, target / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__", ".*"))
        else:
            shutil.copy(source, target / name)


def test_the_steps_of_the_dockerfile_make_a_working_image(debian):
    steps = re.findall(r"^RUN (\S+)", (ROOT / "Dockerfile").read_text(), re.MULTILINE)
    assert [Path(step).name for step in steps] == ["system.sh", "python.sh"]
    source = debian / "tmp" / "isthmus"
    source.mkdir(parents=True)
    copied(ROOT / ".dockerignore", source)
    pip = {key: value for key, value in os.environ.items() if key.startswith("PIP_")}
    in_root(debian, "/tmp/isthmus/docker/system.sh")
    certificates = debian / "etc/ssl/certs/ca-certificates.crt"
    shutil.copy(
        "/etc/ssl/certs/ca-certificates.crt", certificates
    )  # a registry behind a proxy has a certificate of its own
    in_root(debian, "/tmp/isthmus/docker/python.sh", "/tmp/isthmus", "/opt/isthmus", **pip)
    shutil.rmtree(source)
    assert "RayJob" in in_root(
        debian,
        "isthmus",
        "manifests",
        "/opt/isthmus/lib/python3.11/site-packages/isthmus/recipes/blip2-vitg-opt2.7b.yaml",
    )
    in_root(debian, "su", "ray", "-c", "cd && /opt/isthmus/bin/isthmus assets tiny --train 64 --held-out 8")
