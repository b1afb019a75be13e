"""Stage-1 step of the original BLIP-2 code (salesforce-lavis 1.0.2) against ours, both with dropout.

Full Q-Former, features 257 x 1408, 8 pairs, text padded to 32 with 8 to 16 real tokens, fp32, one thread, random
weights. CPU seconds (user and system) step by step in turn: the original in a process of the peers' environment.

    python -m benchmarks.peers && python -m benchmarks.stage1_original [--rounds 4]
"""

import argparse
import statistics
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from benchmarks import peers
from benchmarks.stage1_speed import make_inputs, step_seconds
from isthmus.model.config import QFormerConfig
from isthmus.model.objectives.stage1 import Stage1Model
from isthmus.model.qformer.qformer import QFormer

LIMIT_SECONDS = 600


@contextmanager
def original_step() -> Iterator[Callable[[], float]]:
    """Yield a function that runs a step of the original and returns its CPU seconds."""
    command = [peers.make_environment(), str(Path(__file__).parent / "original_step.py")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        stdin, stdout = process.stdin, process.stdout
        assert stdin is not None
        assert stdout is not None

        def step() -> float:
            stdin.write("step\n")
            stdin.flush()
            return float(stdout.readline())

        yield step
        stdin.close()
        process.wait(LIMIT_SECONDS)


def main(rounds: int) -> None:
    """Print the comparison; the first step of each is not counted."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model, inputs = Stage1Model(None, QFormer(QFormerConfig(), 1408)).train(), make_inputs()
    with original_step() as original:
        pairs = [(original(), step_seconds("fast", model, inputs)) for _ in range(1 + rounds)][1:]
    theirs, ours = zip(*pairs, strict=True)
    for name, seconds in (("original", theirs), ("ours", ours)):
        print(f"{name} {statistics.median(seconds):.2f} CPU s: " + " ".join(f"{value:.2f}" for value in seconds))
    ratios = [one / other for one, other in pairs]
    print(f"x{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})")


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=4)
    main(parser.parse_args().rounds)
