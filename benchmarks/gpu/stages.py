"""The stages of the GPU check. Stage 1 and 2 are built as a run builds them: recipe, parts, engine, training step."""

import contextlib
import importlib
import json
import os
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu import hf_stage2, measure, plain_stage1
from benchmarks.gpu.models import batch_of, recipe
from isthmus.data_pipeline.reading.batch import Batch
from isthmus.data_pipeline.store.object_store import ObjectStore
from isthmus.model.text.language_tokenizer import LanguageEncoder
from isthmus.trainer.build import build_parts
from isthmus.trainer.checkpoint.staging import Snapshot
from isthmus.trainer.context import LocalContext
from isthmus.trainer.engine.engine import Engine, build_engine
from isthmus.trainer.engine.process_group import process_group
from isthmus.trainer.estimate.architectures import load_parts
from isthmus.trainer.estimate.hardware import Cluster, find_gpu, gpu_of_device, with_overrides
from isthmus.trainer.estimate.step import estimate_stage
from isthmus.trainer.memory_probe import FlopCount, backward_beside
from isthmus.trainer.monitoring.hardware import peak_flops
from tests.engine_toys import MemoryState

TINY_ROWS = 8
LR = 1e-5
PACKAGES = ("transformers", "deepspeed", "pydantic", "safetensors", "numpy", "boto3", "simplejpeg")
# Products of a step, rows x in x out: the words of BERT with and without padding to a multiple of 64 among them.
GEMMS = {
    "vit qkv": (25700, 1408, 4224), "vit up": (25700, 1408, 6144), "vit down": (25700, 6144, 1408),
    "qformer kv": (25700, 1408, 768), "qformer qkv": (5600, 768, 2304), "qformer up": (5600, 768, 3072),
    "words 30523": (1150, 768, 30523), "words 30592": (1150, 768, 30592), "opt up": (5500, 2560, 10240),
}  # fmt: skip


@dataclass(frozen=True)
class Settings:
    """Where results go and how large the models are."""

    out: Path
    tiny: bool

    @property
    def scratch(self) -> Path:
        """Folder of the models that are made here."""
        return Path(os.environ.get("SCRATCH", ".cache/gpu-scratch")) / ("tiny" if self.tiny else "full")

    def rows(self, name: str) -> int:
        """Return the rows a step of a stage named `..._100`."""
        return TINY_ROWS if self.tiny else int(name.rpartition("_")[2])

    def flags(self) -> list[str]:
        """Return the options that a stage's process needs to have the same settings."""
        return ["--out", str(self.out), *(["--tiny"] if self.tiny else [])]

    def save(self, name: str, found: dict[str, Any]) -> None:
        """Write a stage's figures, also in the middle of it."""
        self.out.mkdir(parents=True, exist_ok=True)
        part = self.out / f"{name}.part"
        part.write_text(json.dumps(found, indent=1, default=str))
        part.replace(self.out / f"{name}.json")

    def forget(self, name: str) -> None:
        """Remove what an earlier run has left of a stage."""
        (self.out / f"{name}.json").unlink(missing_ok=True)

    def read(self, name: str) -> dict[str, Any]:
        """Return a stage's figures so far."""
        path = self.out / f"{name}.json"
        return dict(json.loads(path.read_text())) if path.exists() else {}


@dataclass(frozen=True)
class Stage:
    """One part of the check."""

    run: Callable[[Settings, str], dict[str, Any]]
    limit_seconds: float


def environment(_settings: Settings, _name: str) -> dict[str, Any]:
    """Return versions, the card, and what its matrix products and copies reach."""
    found: dict[str, Any] = {"date": datetime.now(UTC).date().isoformat(), "torch": torch.__version__}
    found |= {"python": sys.version.split()[0], "cuda": torch.version.cuda}
    for name in PACKAGES:
        with contextlib.suppress(PackageNotFoundError):
            found[name] = version(name)
    if not torch.cuda.is_available():
        return found
    found["device"] = torch.cuda.get_device_name(0)
    tensor = partial(torch.randn, device="cuda", dtype=torch.bfloat16)
    large = torch.empty(2 << 30, dtype=torch.uint8, device="cuda")
    found["copy_tb_per_second"] = 2 * large.numel() / _device_seconds(large.clone) / 1e12
    found["gemm_tflop_per_second"] = {}
    for name, (rows, width, out) in {"8192": (8192, 8192, 8192), **GEMMS}.items():
        left, right = tensor(rows, width), tensor(width, out)
        seconds = _device_seconds(partial(torch.matmul, left, right))
        found["gemm_tflop_per_second"][name] = round(2 * rows * width * out / seconds / 1e12, 1)
    return found


def gpu_tests(settings: Settings, _name: str) -> dict[str, Any]:
    """Run the tests that need a GPU."""
    command = [sys.executable, "-m", "pytest", "-m", "gpu", "-q", "-p", "no:cacheprovider", "tests/gpu"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    settings.out.mkdir(parents=True, exist_ok=True)
    (settings.out / "gpu_tests.log").write_text(done.stdout + done.stderr)
    lines = done.stdout.strip().splitlines()
    return {"exit": done.returncode, "result": lines[-1] if lines else "", "log": done.stdout[-3000:]}


def job(settings: Settings, _name: str) -> dict[str, Any]:
    """Train the tiny recipe in bf16 from end to end: both stages, evaluation, export, a caption."""
    assets, runs = Path(".whl/tiny"), settings.scratch / "runs"
    if not assets.exists():
        assets = settings.scratch / "assets"
        _isthmus("assets", "tiny", str(assets))
    paths = {"data.sources.0.manifest": "train", "evaluation.manifest": "held-out", "model.vision.path": "vision",
             "model.qformer.tokenizer": "bert", "model.language.path": "opt"}  # fmt: skip
    overrides = [f"{key}={assets / folder}" for key, folder in paths.items() if key != "data.sources.0.manifest"]
    overrides += [f"data.sources=[{{manifest: {assets / 'train'}}}]", f"run.url={runs}", "run.export=true"]
    began = time.monotonic()
    _isthmus("train", "recipes/tiny.yaml", "--local", "stage1.precision=bf16", "stage2.precision=bf16", *overrides)
    seconds = time.monotonic() - began
    picture = settings.scratch / "picture.png"
    importlib.import_module("PIL.Image").new("RGB", (64, 64), (200, 30, 30)).save(picture)
    caption = _isthmus("caption", str(runs / "tiny"), str(picture))
    return {"seconds": seconds, "caption": caption.strip(), "ended with both stages, evaluation and export": True}


def train_stage(settings: Settings, name: str) -> dict[str, Any]:
    """Measure the training step of stage 1 or 2 at full size, and hold it against `isthmus estimate`."""
    rows, stage = settings.rows(name), name.partition("_")[0]
    with _Trained.open(settings, stage, rows) as trained:
        found: dict[str, Any] = {"build_s": trained.build_seconds}
        steps = (1, 2) if settings.tiny else (4, 10)
        found["time"] = measure.seconds_of(trained.step, *steps)
        found["memory"] = measure.memory()
        settings.save(name, found)
        found["flops_per_step"] = flops = trained.flops()
        peak = peak_flops(trained.engine.device)
        found["speed"] = measure.speed(rows, found["time"]["mean_in_a_row_s"], flops, peak)
        found["losses"] = trained.losses[:3] + trained.losses[-2:]
        found["host_syncs"] = measure.host_syncs(trained.step)
        settings.save(name, found)
        found["kernels"] = measure.kernels(trained.step, settings.scratch / f"{name}.trace.json")
        found |= _beside_the_estimate(settings, stage, rows, found["time"]["mean_in_a_row_s"])
    return found


def restore(settings: Settings, name: str) -> dict[str, Any]:
    """Save and restore the state; continue twice from it: are the bits equal, and what does the copy cost?"""
    deterministic = name == "restore_deterministic"
    overrides = ("safety.same_bits=run",) if deterministic else ()
    with _Trained.open(settings, "stage1", TINY_ROWS if settings.tiny else 64, overrides) as trained:
        found = _snapshot(trained)
        kept = trained.pieces()
        trained.run(2, 4)
        once = trained.pieces()
        results = []
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            for _ in range(2):
                trained.engine.restore(MemoryState([kept]), 2)
                found["restored state is equal"] = _equal(trained.pieces(), kept)
                trained.run(2, 4)
                results.append(trained.pieces())
        found["two continuations are equal"] = _equal(*results)
        found["continuation equals the uninterrupted run"] = _equal(results[0], once)
        found["operators without a deterministic kernel"] = sorted(
            {str(w.message)[:160] for w in seen if "determinis" in str(w.message)}
        )
    return found


def peer_stage1(settings: Settings, name: str) -> dict[str, Any]:
    """Measure stage 1 as the paper describes it, on the same batches."""
    rows = settings.rows(name)
    config = recipe(settings.scratch, rows, tiny=settings.tiny)
    task, encoder = build_parts(config, "stage1", LocalContext().rank, ObjectStore())
    batch = batch_of(0, rows, config.model.vision.image_size_pixels, encoder)
    return _measure_peer(settings, rows, plain_stage1.training_step(task, batch))


def peer_stage2(settings: Settings, name: str) -> dict[str, Any]:
    """Measure stage 2 as transformers computes it, on the same batches."""
    rows = settings.rows(name)
    config = recipe(settings.scratch, rows, tiny=settings.tiny)
    assert config.model.language is not None
    folder = Path(config.model.language.path)
    encoder = LanguageEncoder(folder, config.model.language)
    batch = batch_of(0, rows, config.model.vision.image_size_pixels, encoder)
    step = hf_stage2.training_step(Path(config.model.vision.path), folder, batch, tiny=settings.tiny)
    return _measure_peer(settings, rows, step)


def _measure_peer(settings: Settings, rows: int, step: measure.Step) -> dict[str, Any]:
    steps = (1, 2) if settings.tiny else (4, 10)
    found: dict[str, Any] = {"time": measure.seconds_of(step, *steps), "memory": measure.memory()}
    with FlopCount() as counter:
        step(0)
    peak = peak_flops(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    found["speed"] = measure.speed(rows, found["time"]["mean_in_a_row_s"], counter.flops, peak)
    return found


STAGES: dict[str, Stage] = {
    "env": Stage(environment, 60),
    "gpu_tests": Stage(gpu_tests, 100),
    "stage1_100": Stage(train_stage, 80),
    "stage2_100": Stage(train_stage, 110),
    "job": Stage(job, 120),
    "restore": Stage(restore, 60),
    "plain1_100": Stage(peer_stage1, 60),
    "hf2_100": Stage(peer_stage2, 90),
    "restore_deterministic": Stage(restore, 60),
    "stage1_200": Stage(train_stage, 70),
    "stage2_200": Stage(train_stage, 80),
}
"""Most valuable first; limits in seconds. Their sum is not what a run takes: see `--budget`."""


class _Trained:
    """A stage with its engine and some batches, ready to step."""

    def __init__(self, settings: Settings, stage: Any, rows: int, overrides: tuple[str, ...], stack: ExitStack) -> None:
        began = time.monotonic()
        config = recipe(settings.scratch, rows, tiny=settings.tiny, overrides=overrides)
        context, self.rows = LocalContext(), rows
        limit, deterministic = config.safety.collective_timeout_seconds, config.same_bits != "none"
        stack.enter_context(process_group(context.rank, limit, deterministic=deterministic))
        self.task, self.encoder = build_parts(config, stage, context.rank, ObjectStore())
        self.engine: Engine = build_engine(self.task.model, config.stage(stage), context.rank)
        stack.callback(self.engine.close)
        image_size = config.model.vision.image_size_pixels
        self.batches: list[Batch] = [batch_of(step, rows, image_size, self.encoder) for step in range(4)]
        self.inputs = [self.task.inputs(batch) for batch in self.batches]  # as the prefetch thread makes them
        self.losses: list[tuple[float, bool]] = []
        self.build_seconds = time.monotonic() - began

    @staticmethod
    @contextmanager
    def open(settings: Settings, stage: str, rows: int, overrides: tuple[str, ...] = ()) -> Iterator["_Trained"]:
        with ExitStack() as stack:
            yield _Trained(settings, stage, rows, overrides, stack)

    def step(self, index: int) -> None:
        """Train one step."""
        place = index % len(self.batches)
        output = self.task.train_step(self.batches[place]._replace(step=index), self.inputs[place], self.engine)
        result = self.engine.step(LR)
        self.losses.append((float(output.total), result.applied))

    def run(self, first: int, last: int) -> None:
        """Train steps whose randomness is that of their number."""
        for index in range(first, last):
            self.step(index)

    def flops(self) -> float:
        """Return the floating-point operations that one step executes."""
        parameters = list(self.task.model.trainable_parameters().values())
        with FlopCount() as counter:
            self.task.loss_and_backward(
                self.inputs[1], 1, self.engine.precision, lambda loss: backward_beside(loss, parameters)
            )
        return float(counter.flops)

    def pieces(self) -> list[Any]:
        """Return a copy of this rank's trainable state."""
        return [(f.name, f.kind, f.shape, f.offset, f.data.cpu().clone().numpy()) for f in self.engine.fragments()]


def _snapshot(trained: _Trained) -> dict[str, Any]:
    trained.run(0, 2)
    fragments = trained.engine.fragments()
    began = time.perf_counter()
    snapshot = Snapshot(fragments)
    prepared = time.perf_counter() - began
    fills = []
    for _ in range(3):
        began = time.perf_counter()
        snapshot.fill(fragments)
        fills.append(time.perf_counter() - began)
    snapshot.close()
    gigabytes = sum(fragment.data.numel() for fragment in fragments) * 4 / 1e9
    return {"state_gb": gigabytes, "prepare_s": prepared, "save_blocks_for_s": statistics.median(fills)}


def _equal(ours: list[Any], theirs: list[Any]) -> bool:
    return all((mine[4] == other[4]).all() for mine, other in zip(ours, theirs, strict=True))


def _beside_the_estimate(settings: Settings, stage: Any, rows: int, seconds: float) -> dict[str, Any]:
    """Return what `isthmus estimate` says of this step on this card, and its ratio to what was measured."""
    config = recipe(settings.scratch, rows, tiny=settings.tiny)
    name = torch.cuda.get_device_name(0) if torch.cuda.is_available() else ""
    card, assumptions = with_overrides(gpu_of_device(name) or find_gpu("h100"), {})
    parts, _ = load_parts(config)
    estimate = estimate_stage(config, stage, parts, Cluster(card, 1, 1), assumptions)
    return {
        "estimated_step_s": estimate.step_seconds,
        "estimated_memory_gib": estimate.memory.total / 2**30,
        "estimated_over_measured_step": estimate.step_seconds / seconds,
    }


def _device_seconds(call: Callable[[], Any], repeats: int = 10) -> float:
    for _ in range(3):
        call()
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    for _ in range(repeats):
        call()
    end.record()
    torch.cuda.synchronize()
    return begin.elapsed_time(end) / 1e3 / repeats


def _isthmus(*arguments: str) -> str:
    done = subprocess.run(
        [sys.executable, "-m", "isthmus.cluster.cli.main", *arguments], capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise RuntimeError(f"isthmus {arguments[0]}: exit {done.returncode}: {(done.stderr or done.stdout)[-1500:]}")
    return done.stdout
