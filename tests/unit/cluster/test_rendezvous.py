"""Rank 0 opens the port at which the ranks meet and keeps it until it serves their store there."""

import os
import socket
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta

import pytest
from torch.distributed import TCPStore

from isthmus.cluster.workers.rendezvous import Rendezvous

pytestmark = pytest.mark.unit
HOST = "127.0.0.1"
LIMIT = timedelta(seconds=30)
RANK = """
import sys
from isthmus.cluster.workers.rendezvous import Rendezvous, set_environment
rank = int(sys.argv[1])
if rank == 0:
    meeting = Rendezvous("127.0.0.1")
    print(meeting.address[1], flush=True)
    meeting.serve()
set_environment(rank, 2, rank, ("127.0.0.1", meeting.address[1] if rank == 0 else int(sys.argv[2])))
import torch, torch.distributed as dist
dist.init_process_group("gloo")
vector = torch.ones(1) * (rank + 1)
dist.all_reduce(vector)
dist.destroy_process_group()
assert vector.item() == 3.0
"""


def test_nobody_else_gets_the_port_in_between():
    meeting = Rendezvous(HOST)
    with socket.socket() as other, pytest.raises(OSError, match="in use"):
        other.bind(meeting.address)
    meeting.serve()


def test_a_rank_that_is_early_waits_until_rank_0_serves():
    meeting = Rendezvous(HOST)
    with ThreadPoolExecutor(1) as pool:
        early = pool.submit(TCPStore, *meeting.address, is_master=False, timeout=LIMIT)
        meeting.serve()
        early.result().set("key", "value")
    late = TCPStore(*meeting.address, is_master=False, timeout=LIMIT)
    assert late.get("key") == b"value"
    meeting.serve()  # once is enough


def test_two_ranks_meet_as_torch_distributed_finds_it_in_the_environment():
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    first = subprocess.Popen([sys.executable, "-c", RANK, "0"], stdout=subprocess.PIPE, text=True, env=environment)
    try:
        assert first.stdout is not None
        port = first.stdout.readline().strip()
        second = subprocess.run([sys.executable, "-c", RANK, "1", port], env=environment, timeout=120, check=False)
        assert (second.returncode, first.wait(60)) == (0, 0)
    finally:
        first.kill()
