"""Run a function on N gloo ranks in fresh processes, with a time limit."""

import contextlib
import datetime
import os
import random
import socket
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from typing import Any

import torch
import torch.multiprocessing as mp


@dataclass(frozen=True)
class RankResult:
    """What one rank returned, or the traceback with which it ended."""

    value: Any = None
    error: str | None = None


class RanksFailed(AssertionError):
    """At least one rank raised, died or ran past the limit; `results` holds what each one gave."""

    def __init__(self, results: list[RankResult]) -> None:
        self.results = results
        super().__init__("\n".join(f"--- rank {i}\n{r.error}" for i, r in enumerate(results) if r.error))


def run_ranks(function: Callable[..., Any], world_size: int, *args: Any, timeout_seconds: float = 120.0) -> list[Any]:
    """Call `function(rank, world_size, *args)` on every rank of a gloo group and return the values in rank order.

    `function` must be importable (top level of a module). RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT are
    set as torchrun sets them, each rank has one thread, and the process group is torn down at the end.

    Raises:
        RanksFailed: a rank raised, died, or was not done after `timeout_seconds`.
    """
    results = run_ranks_unchecked(function, world_size, *args, timeout_seconds=timeout_seconds)
    if any(result.error for result in results):
        raise RanksFailed(results)
    return [result.value for result in results]


def run_ranks_unchecked(
    function: Callable[..., Any], world_size: int, *args: Any, timeout_seconds: float = 120.0
) -> list[RankResult]:
    """Like `run_ranks`, but return each rank's value or traceback without raising: for tests of failing ranks."""
    context = mp.get_context("spawn")
    port = free_port()
    pipes: list[Connection] = []
    processes = []
    for rank in range(world_size):
        ours, theirs = context.Pipe(duplex=False)
        process = context.Process(
            target=_rank_main, args=(function, rank, world_size, port, theirs, args), daemon=False
        )
        process.start()
        theirs.close()
        pipes.append(ours)
        processes.append(process)
    try:
        return _collect(pipes, processes, time.monotonic() + timeout_seconds, timeout_seconds)
    finally:
        for process in processes:
            process.join(timeout=5)
            if process.is_alive():
                process.kill()
                process.join()


def _collect(pipes: list[Connection], processes: list[Any], deadline: float, limit: float) -> list[RankResult]:
    results: dict[int, RankResult] = {}
    while len(results) < len(pipes):
        pending = [pipe for i, pipe in enumerate(pipes) if i not in results]
        ready = wait(pending, timeout=max(0.0, deadline - time.monotonic()))
        if not ready:
            for i in range(len(pipes)):
                results.setdefault(i, RankResult(error=f"not done after {limit} s"))
        for pipe in ready:
            i = pipes.index(pipe)  # type: ignore[arg-type]
            try:
                results[i] = pipes[i].recv()
            except EOFError:
                processes[i].join(timeout=5)
                results[i] = RankResult(error=f"died with exit code {processes[i].exitcode}")
    return [results[i] for i in range(len(pipes))]


def _rank_main(
    function: Callable[..., Any], rank: int, world_size: int, port: int, pipe: Connection, args: tuple[Any, ...]
) -> None:
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(world_size),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
        DS_ACCELERATOR="cpu",
        OMP_NUM_THREADS="1",
    )
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo", rank=rank, world_size=world_size, timeout=datetime.timedelta(seconds=60)
    )
    try:
        result = RankResult(value=function(rank, world_size, *args))
    except BaseException:  # noqa: BLE001 - whatever ended the rank is what the test wants to see
        result = RankResult(error=traceback.format_exc())
    pipe.send(result)
    pipe.close()
    if torch.distributed.is_initialized():
        if "deepspeed" in sys.modules:
            from isthmus.trainer.engine.deepspeed_workarounds import drain_gloo

            drain_gloo()
        torch.distributed.destroy_process_group()


def free_port() -> int:
    """Return a free port below the range from which the kernel gives ports to others until it is used."""
    while True:
        port = random.SystemRandom().randrange(20000, 32000)
        with socket.socket() as sock, contextlib.suppress(OSError):
            sock.bind(("127.0.0.1", port))
            return port
