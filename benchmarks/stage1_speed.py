"""Stage-1 step of the full Q-Former: the plain path against the path that saves work without changing the maths.

768 x 12, features 257 x 1408, 8 pairs, text padded to 32 with 8 to 16 real tokens, no dropout, fp32, one thread.
Each path runs in two processes of its own. One measures CPU seconds (user and system), the lesser of two steps, with
the allocator as it is; and FLOPs as torch.utils.flop_counter sees them in a third step. The other measures peak memory:
there every large block goes back to the system when it is freed, so the peak is of live memory, gradients included.

Usage: python benchmarks/stage1_speed.py
"""

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from model.config import QFormerConfig
from model.exchange import LocalExchange
from model.losses import choose_hardest
from model.qformer import QFormer
from model.savings import PLAIN, Savings
from model.stage1 import Stage1Inputs, Stage1Model

LENGTHS = (14, 16, 8, 16, 9, 11, 8, 16)
PATHS = {"plain": PLAIN, "fast": Savings()}
TIME_LIMIT_SECONDS = 1800
GIB = 2**30


def _inputs() -> Stage1Inputs:
    batch, width = len(LENGTHS), 32
    ids = torch.randint(1000, 30000, (batch, width))
    mask = torch.arange(width) < torch.tensor(LENGTHS)[:, None]
    ids[:, 0] = 101
    return Stage1Inputs(
        input_ids_BT=ids.masked_fill(~mask, 0),
        attention_mask_BT=mask.long(),
        valid_B=torch.ones(batch, dtype=torch.bool),
        rows_B=torch.arange(batch),
        image_BPD=torch.randn(batch, 257, 1408),
    )


def _status_bytes(field: str) -> int:
    match = re.search(rf"{field}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert match
    return int(match.group(1)) * 1024


def measure(path: str, gradients: Path | None) -> dict[str, Any]:
    """Measure the work of one path and write its gradients, or, without a file for them, its memory."""
    torch.manual_seed(0)
    torch.set_num_threads(1)
    qformer = QFormer(QFormerConfig(dropout=0.0), 1408, savings=PATHS[path])
    model = Stage1Model(None, qformer, choose_negatives=choose_hardest)
    inputs = _inputs()

    def step() -> dict[str, float]:
        model.zero_grad(set_to_none=True)
        output = model.loss_and_backward(
            inputs,
            seed=0,
            step=0,
            micro_batch_size=len(LENGTHS),
            exchange=LocalExchange(),
            backward=torch.Tensor.backward,
        )
        return {name: float(value) for name, value in output.parts.items()}

    if gradients is None:
        before = _status_bytes("VmRSS")
        step()
        return {
            "peak_bytes": _status_bytes("VmHWM") - before,
            "gradient_bytes": sum(p.numel() * 4 for p in model.trainable_parameters().values()),
        }
    seconds = []
    for _ in range(2):
        start = time.process_time()
        losses = step()
        seconds.append(time.process_time() - start)
    torch.save({name: p.grad for name, p in model.trainable_parameters().items()}, gradients)
    with FlopCounterMode(display=False) as counter:
        step()
    return {"losses": losses, "cpu_seconds": min(seconds), "flops": counter.get_total_flops()}


def in_own_process(path: str, gradients: Path | None) -> dict[str, Any]:
    """Call `measure` in a process of its own."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, __file__, "--path", path]
    if gradients is None:
        environment["MALLOC_MMAP_THRESHOLD_"] = "262144"
    else:
        command += ["--gradients", str(gradients)]
    done = subprocess.run(
        command, check=True, capture_output=True, text=True, timeout=TIME_LIMIT_SECONDS, env=environment
    )
    result: dict[str, Any] = json.loads(done.stdout)
    return result


def _largest_deviation(one: Path, other: Path) -> tuple[float, float]:
    """Return the largest difference of gradients: absolute, and relative to the tensor's largest entry."""
    first, second = torch.load(one, mmap=True), torch.load(other, mmap=True)
    absolute = {name: float((first[name] - second[name]).abs().max()) for name in first}
    # Key biases have no gradient but rounding, so tiny tensors have no relative deviation.
    largest = {name: float(first[name].abs().max()) for name in first}
    relative = [absolute[name] / largest[name] for name in first if largest[name] > 1e-6]
    return max(absolute.values()), max(relative)


def main() -> None:
    """Print the comparison."""
    with tempfile.TemporaryDirectory() as folder:
        files = {path: Path(folder) / f"{path}.pt" for path in PATHS}
        results = {path: in_own_process(path, file) | in_own_process(path, None) for path, file in files.items()}
        absolute, relative = _largest_deviation(*files.values())
    for path, result in results.items():
        rate = result["flops"] / result["cpu_seconds"] / 1e9
        print(
            f"{path:5}  {result['cpu_seconds']:6.2f} CPU s  {result['flops'] / 1e9:7.0f} GF  {rate:5.1f} GF/s  "
            f"peak {result['peak_bytes'] / GIB:.2f} GiB (gradients {result['gradient_bytes'] / GIB:.2f})  "
            + "  ".join(f"{name} {value:.6f}" for name, value in result["losses"].items())
        )
    plain, fast = results["plain"], results["fast"]
    print(
        f"CPU seconds x{plain['cpu_seconds'] / fast['cpu_seconds']:.2f}  FLOPs x{plain['flops'] / fast['flops']:.2f}  "
        f"peak memory x{fast['peak_bytes'] / plain['peak_bytes']:.2f}"
    )
    print(f"gradients differ by at most {absolute:.1e}, {relative:.1e} of the tensor's largest entry")


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--path", choices=PATHS)
    parser.add_argument("--gradients", type=Path)
    arguments = parser.parse_args()
    if arguments.path:
        print(json.dumps(measure(arguments.path, arguments.gradients)))
    else:
        main()
