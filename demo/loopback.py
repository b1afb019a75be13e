"""Ports on this machine's loopback for servers that we start ourselves."""

import contextlib
import socket

HOST = "127.0.0.1"
LOWEST_PORT = 20000
"""Ray takes its workers' ports from below."""


def free_ports(count: int) -> list[int]:
    """Return different ports that were free a moment ago, outside the range of Ray's workers."""
    with contextlib.ExitStack() as stack:
        ports: list[int] = []
        while len(ports) < count:
            held = stack.enter_context(socket.socket())
            held.bind((HOST, 0))
            if held.getsockname()[1] >= LOWEST_PORT:
                ports.append(held.getsockname()[1])
        return ports
