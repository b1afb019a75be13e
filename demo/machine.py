"""The resources of this machine, and how the demo uses them."""

import os
from dataclasses import dataclass

RECIPE, LONG_RECIPE, TINY_RECIPE = "recipes/demo.yaml", "recipes/demo-long.yaml", "recipes/demo-tiny.yaml"
WORKER_COUNTS = (8, 4, 2, 1)
"""World sizes that divide the recipes' eight lanes."""
CPU_WORKERS = 2
"""On CPUs two workers show everything; more cores become threads of theirs."""
CORES_FOR_LONG = 16


@dataclass(frozen=True)
class Machine:
    """What the demo may use."""

    cores: int
    gpus: int
    bf16: bool = False
    """Whether the CPU multiplies in bfloat16; others emulate it, at a quarter of the speed of fp32."""


@dataclass(frozen=True)
class Setup:
    """What is run, and on how much."""

    recipe: str
    workers: int
    threads: int
    """CPU threads of each worker."""
    gpus: int
    """GPUs of each worker: 0 or 1."""
    bf16: bool = False
    """Whether the frozen language model is kept in bfloat16 on CPUs: its gathers and products take half of the time."""

    @property
    def overrides(self) -> list[str]:
        """What the recipe is changed to on the command line."""
        changed = [f"cluster.workers.max={self.workers}", f"cluster.workers.gpus={self.gpus}"]
        if self.gpus:
            return [*changed, "stage1.precision=bf16", "stage2.precision=bf16"]
        return [*changed, "model.language.dtype=bfloat16"] if self.bf16 else changed

    def __str__(self) -> str:
        """Say what was chosen."""
        each = "one GPU" if self.gpus else f"{self.threads} thread{'s' if self.threads > 1 else ''}"
        of_language = ", the language model in bfloat16" if self.bf16 else ""
        return f"{self.recipe} on {self.workers} worker{'s' if self.workers > 1 else ''} with {each} each{of_language}"


def find_machine() -> Machine:
    """Return the cores that this process may use, and the CUDA devices."""
    import torch  # noqa: PLC0415 - a second that a wrong command line need not wait

    bf16 = bool(torch.cpu.get_capabilities().get("avx512_bf16"))
    return Machine(len(os.sched_getaffinity(0)), torch.cuda.device_count(), bf16)


def choose(machine: Machine, recipe: str | None = None) -> Setup:
    """Return the setup for a machine; `recipe` given: that one."""
    if machine.gpus:
        workers = next(count for count in WORKER_COUNTS if count <= machine.gpus)
        return Setup(recipe or LONG_RECIPE, workers, max(1, machine.cores // workers), 1)
    recipe = recipe or (LONG_RECIPE if machine.cores >= CORES_FOR_LONG else RECIPE)
    threads = max(1, machine.cores // CPU_WORKERS)
    return Setup(recipe, CPU_WORKERS, threads, gpus=0, bf16=machine.bf16 and recipe != TINY_RECIPE)
