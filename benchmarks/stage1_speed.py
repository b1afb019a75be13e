"""Stage-1 step of the full Q-Former: the plain implementation of tests/reference against the product's.

768 x 12, features 257 x 1408, 8 pairs, text padded to 32 with 8 to 16 real tokens, no dropout, fp32, one thread.
CPU seconds (user and system) of both paths on the same weights, step by step in turn, so that what else the machine
does falls on both; FLOPs as torch.utils.flop_counter sees them. Peak memory of each path in a process of its own: there
every large block goes back to the system when it is freed, so the peak is of live memory, gradients included.

Usage: python -m benchmarks.stage1_speed [--rounds 4]
"""

import argparse
import json
import os
import re
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from isthmus.model.config import QFormerConfig
from isthmus.model.objectives.communicator import LocalCommunicator
from isthmus.model.objectives.stage1 import Stage1Model
from isthmus.model.objectives.stage1_batch import Stage1Inputs
from isthmus.model.objectives.step import StepContext
from isthmus.model.qformer.qformer import QFormer
from tests.reference import stage1 as plain

LENGTHS = (14, 16, 8, 16, 9, 11, 8, 16)
PATHS = ("plain", "fast")
TIME_LIMIT_SECONDS = 1800
GIB = 2**30
ROOT = Path(__file__).parents[1]


def make_inputs() -> Stage1Inputs:
    """Return a batch of random pairs."""
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


def _model() -> Stage1Model:
    torch.manual_seed(0)
    qformer = QFormer(QFormerConfig(dropout=0.0), 1408)
    return Stage1Model(None, qformer, choose_negatives=plain.choose_hardest)


def _step(path: str, model: Stage1Model, inputs: Stage1Inputs) -> dict[str, float]:
    model.zero_grad(set_to_none=True)
    if path == "plain":
        parts = plain.losses(model, inputs)
        plain.total(model, parts).backward()
        return {name: float(value.detach()) for name, value in parts._asdict().items()}
    output = model.loss_and_backward(
        inputs, StepContext(LocalCommunicator(), len(LENGTHS), backward=torch.Tensor.backward)
    )
    return {name: float(value) for name, value in output.parts.items()}


def step_seconds(path: str, model: Stage1Model, inputs: Stage1Inputs) -> float:
    """Return the CPU seconds of a step, forward and backward."""
    start = time.process_time()
    _step(path, model, inputs)
    return time.process_time() - start


def measure_work(rounds: int) -> dict[str, dict[str, Any]]:
    """Return losses, FLOPs and CPU seconds of both paths, and under `gradients` how far theirs are apart."""
    models, inputs = {path: _model() for path in PATHS}, make_inputs()
    results: dict[str, dict[str, Any]] = {path: {"seconds": []} for path in PATHS}
    for path, model in models.items():
        with FlopCounterMode(display=False) as counter:
            results[path]["losses"] = _step(path, model, inputs)
        results[path]["flops"] = counter.get_total_flops()
    apart = _apart(*models.values())
    for _ in range(rounds):
        for path, model in models.items():
            results[path]["seconds"].append(step_seconds(path, model, inputs))
            model.zero_grad(set_to_none=True)
    return {**results, "gradients": apart}


def _apart(one: Stage1Model, other: Stage1Model) -> dict[str, float]:
    """Return the largest difference of gradients: absolute, and relative to the tensor's largest entry."""
    first, second = (
        {n: p.grad for n, p in m.trainable_parameters().items() if p.grad is not None} for m in (one, other)
    )
    assert first.keys() == second.keys()
    absolute = {name: float((x - second[name]).abs().max()) for name, x in first.items()}
    # Key biases have no gradient but rounding, so tiny tensors have no relative deviation.
    largest = {name: float(x.abs().max()) for name, x in first.items()}
    relative = max(absolute[name] / largest[name] for name in first if largest[name] > 1e-6)
    return {"absolute": max(absolute.values()), "relative": relative}


def measure_memory(path: str) -> dict[str, int]:
    """Return the peak that a step adds to this process, and what of it are gradients."""
    model, inputs = _model(), make_inputs()
    before = _status_bytes("VmRSS")
    _step(path, model, inputs)
    return {
        "peak_bytes": _status_bytes("VmHWM") - before,
        "gradient_bytes": sum(p.numel() * 4 for p in model.trainable_parameters().values()),
    }


def seconds_in_own_process(path: str) -> float:
    """Return the CPU seconds of a step of one path, the lesser of two, measured in a process of its own."""
    return min(_in_own_process("--seconds", path, {}))


def _in_own_process(option: str, path: str, environment: dict[str, str]) -> Any:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
    command = [sys.executable, "-m", "benchmarks.stage1_speed", option, path]
    done = subprocess.run(
        command, check=True, capture_output=True, text=True, timeout=TIME_LIMIT_SECONDS, env=environment, cwd=ROOT
    )
    return json.loads(done.stdout)


def _print_path(path: str, work: dict[str, Any], memory: dict[str, int]) -> None:
    seconds, flops = min(work["seconds"]), work["flops"] / 1e9
    peak, gradients = memory["peak_bytes"] / GIB, memory["gradient_bytes"] / GIB
    losses = "  ".join(f"{name} {value:.6f}" for name, value in work["losses"].items())
    print(f"{path:5}  {seconds:6.2f} CPU s  {flops:7.0f} GF  {flops / seconds:5.1f} GF/s  peak {peak:.2f} GiB", end="")
    print(f" (gradients {gradients:.2f})  {losses}")
    print("       all steps: " + " ".join(f"{value:.2f}" for value in work["seconds"]))


def main(rounds: int) -> None:
    """Print the comparison."""
    memory = {path: _in_own_process("--memory", path, {"MALLOC_MMAP_THRESHOLD_": "262144"}) for path in PATHS}
    results = measure_work(rounds)
    for path in PATHS:
        _print_path(path, results[path], memory[path])
    plain, fast = results["plain"], results["fast"]
    ratios = sorted(one / other for one, other in zip(plain["seconds"], fast["seconds"], strict=True))
    print(
        f"CPU seconds x{min(plain['seconds']) / min(fast['seconds']):.2f} (least of each; step by step "
        f"{ratios[0]:.2f} to {ratios[-1]:.2f}, median {statistics.median(ratios):.2f})  "
        f"FLOPs x{plain['flops'] / fast['flops']:.2f}  "
        f"peak memory x{memory['fast']['peak_bytes'] / memory['plain']['peak_bytes']:.2f}"
    )
    apart = results["gradients"]
    print(f"gradients differ by at most {apart['absolute']:.1e}, {apart['relative']:.1e} of the tensor's largest entry")


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--memory", choices=PATHS)
    parser.add_argument("--seconds", choices=PATHS)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if arguments.memory:
        print(json.dumps(measure_memory(arguments.memory)))
    elif arguments.seconds:
        print(json.dumps([step_seconds(arguments.seconds, _model(), make_inputs()) for _ in range(2)]))
    else:
        main(arguments.rounds)
