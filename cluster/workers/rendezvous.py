"""The rendezvous of a group: rank 0 opens the port itself and keeps it open, so no other process can take it."""

import datetime
import os
import socket
from typing import Any

CONNECT_SECONDS = 300.0


class Rendezvous:
    """A listening port of rank 0, later served by torch's TCPStore."""

    def __init__(self, host: str) -> None:
        """Listen at a free port of `host`; connections wait until the store is served."""
        self._socket: socket.socket | None = socket.create_server((host, 0), backlog=4096)
        self.address: tuple[str, int] = (host, int(self._socket.getsockname()[1]))
        self._store: Any = None

    def serve(self) -> None:
        """Serve the store at the port, for as long as this process lives."""
        if self._socket is None:
            return
        from torch._C._distributed_c10d import TCPStore  # noqa: PLC0415 - only entries that train load torch

        host, port = self.address
        self._store = TCPStore(
            host,
            port,
            is_master=True,
            wait_for_workers=False,
            master_listen_fd=self._socket.detach(),
            timeout=datetime.timedelta(seconds=CONNECT_SECONDS),
        )
        self._socket = None


def set_environment(rank: int, world_size: int, local_rank: int, address: tuple[str, int]) -> None:
    """Tell torch.distributed where the ranks meet, as torchrun does whose agent serves the store."""
    os.environ.update(
        RANK=str(rank),
        WORLD_SIZE=str(world_size),
        LOCAL_RANK=str(local_rank),
        MASTER_ADDR=address[0],
        MASTER_PORT=str(address[1]),
        TORCHELASTIC_USE_AGENT_STORE="True",
        TORCHELASTIC_RESTART_COUNT="0",
    )
