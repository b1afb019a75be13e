"""`make demo`: the whole system on this machine, with real images and real pretrained models.

Packages -> corpus -> shards in S3 -> manifest -> submit -> stage 1 (a worker is killed) -> stage 2 -> evaluation ->
export -> report. Every step is what an operator would type; nothing is special-cased. What is cached is reused, an
interrupted run resumes, and everything that is started is stopped.
"""

import contextlib
import logging
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from rich.console import Console
from rich.panel import Panel
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeRemainingColumn
from rich.text import Text

from isthmus.cluster.config import JobConfig
from isthmus.cluster.errors import EXPECTED_ERRORS, ClusterError
from isthmus.cluster.status import RunState, RunStatus, read_status
from isthmus.data_pipeline.store.object_store import ObjectStore, join
from isthmus.demo.emoji import SPLITS, build_corpus
from isthmus.demo.local_s3 import LocalS3, local_s3
from isthmus.demo.machine import LONG_RECIPE, RECIPE, TINY_RECIPE, Setup, choose, find_machine
from isthmus.demo.models import prepare_models
from isthmus.demo.packages import EVERYTHING, unpack_all
from isthmus.demo.ray_head import RayHead, ray_head
from isthmus.demo.timeline import Timeline, minutes
from isthmus.demo.tiny.generated import generate_corpus, generate_models
from isthmus.demo.watch import RunWatch
from isthmus.trainer.config.loading import load_config

CACHE = Path(".cache/demo")
BUCKET = "isthmus-demo"
PHASES = {
    "packages": "packages with models and pictures",
    "inputs": "pictures and frozen parts",
    "data": "shards and manifests in the object store",
    "ray": "a Ray cluster on this machine",
    "stage1": "the run: stage 1, a killed worker, stage 2, export",
    "stage2": "",
    "evaluation": "evaluation on concepts that training never saw",
    "report": "report",
}
EXPECTED_SECONDS = {
    TINY_RECIPE: (1, 3, 15, 10, 32, 10, 8, 3),
    RECIPE: (60, 70, 25, 15, 320, 330, 25, 5),
    LONG_RECIPE: (60, 70, 25, 15, 1300, 2200, 45, 5),
}
"""Of each phase on two cores of 2026-11. Other machines and recipes are scaled by the pace seen."""
TINY_NOTE = (
    "Generated scenes, a random image encoder and a tiny language model: this shows that everything works, "
    "not what the method learns. `make demo` takes real pictures and pretrained models."
)
FALLBACK_NOTE = """NOT THE REAL DEMO: generated scenes and tiny models instead of real pictures and pretrained ones.
{}
Run `make demo` again when the package can be fetched: it takes the real ones then."""
DISK_GB, TINY_DISK_GB = 15, 1
"""Written by a run, mostly checkpoints: SeaweedFS frees the space of deleted ones late."""
SAMPLES_PER_SHARD = 1000
CHUNK_MB = 0.5
CPUS_BESIDE_WORKERS = 4
"""Logical: a reader, the driver and room for tasks; the machine may have fewer."""
UNSEEN_SAMPLES = "629"
"""All of them; the generated scenes are fewer."""
USER_ERROR, INTERRUPTED = 2, 75

console = Console(highlight=False, soft_wrap=not sys.stdout.isatty())


@dataclass(frozen=True)
class Inputs:
    """What a demo runs on."""

    recipe: str
    corpus: Path
    """Holds one <split>.jsonl per split, and the pictures."""
    models: dict[str, Path]
    """Folders of the frozen parts, by their name in the bucket."""
    data: str
    """Folder of shards and manifests in the bucket."""
    note: str | None = None
    """What a reader has to know where these are not the real ones."""


def main(recipe: str | None = None) -> int:
    """Run the demo; return the exit code."""
    logging.basicConfig(level=logging.WARNING)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C: it stops what it has started
    began = time.monotonic()
    setup = choose(find_machine(), recipe)
    os.environ.setdefault("DS_ACCELERATOR", "cuda" if setup.gpus else "cpu")  # or DeepSpeed warns that it had to look
    console.print(f"[bold]isthmus demo[/]: {setup}; to choose another: make demo RECIPE=...; Ctrl-C stops")
    try:
        return _demo(setup, began)
    except EXPECTED_ERRORS as error:
        console.print(str(error), style="red", markup=False)
        return USER_ERROR
    except KeyboardInterrupt:
        console.print("stopped; `make demo` resumes from the last checkpoint", style="yellow")
        return INTERRUPTED


def _demo(setup: Setup, began: float) -> int:
    from isthmus.demo.report import curve_verdict, write_report  # noqa: PLC0415 - imports torch, not needed to fail early

    _warn_of_a_small_disk(setup.recipe)
    timeline = _timeline(setup.recipe)
    inputs = _prepare(setup.recipe, timeline)
    if inputs.recipe != setup.recipe:
        setup, timeline = replace(setup, recipe=inputs.recipe), _timeline(inputs.recipe)
    with local_s3(CACHE / "s3", BUCKET) as server:
        _enter("data", timeline)
        _upload_models(inputs.models, server)
        _make_data(inputs, server)
        config = _next_run(setup, server)
        run_url = join(config.run.url, config.run.name)
        _enter("ray", timeline)
        with ray_head(setup.workers + CPUS_BESIDE_WORKERS, setup.threads, CACHE / "ray.log") as head:
            _enter("stage1", timeline)
            status = _train(config, setup, server, head, timeline)
        if status.state is not RunState.FINISHED:
            console.print(f"run {config.run.name}: {status.state}: {status.message}", style="red", markup=False)
            return USER_ERROR
        _enter("evaluation", timeline)
        options = ("--stage", "stage1", "--samples", UNSEEN_SAMPLES, "--out", str(CACHE / "unseen"))
        _isthmus(server, "eval", run_url, f"s3://{BUCKET}/{inputs.data}/test_concept", *options)
        _enter("report", timeline)
        report = write_report(config, ObjectStore(server.store_config), CACHE, inputs.note)
        console.print("  " + curve_verdict(config, ObjectStore(server.store_config)), markup=False)
    console.print(f"[bold green]done[/] in {minutes(time.monotonic() - began)}: {report} (open it in a browser)")
    console.print(f"curves: .venv/bin/tensorboard --logdir {CACHE / 'tensorboard'}")
    if inputs.note:
        _warn(inputs.note)
    return 0


def _warn_of_a_small_disk(recipe: str) -> None:
    CACHE.mkdir(parents=True, exist_ok=True)
    free, needed = shutil.disk_usage(CACHE).free / 1e9, TINY_DISK_GB if recipe == TINY_RECIPE else DISK_GB
    if free < needed:
        _warn(f"{CACHE}: {free:.1f} GB of disk are free; a run writes {needed} GB and waits when the disk is full.")


def _timeline(recipe: str) -> Timeline:
    seconds = EXPECTED_SECONDS.get(recipe, EXPECTED_SECONDS[LONG_RECIPE])
    return Timeline(dict(zip(PHASES, seconds, strict=True)))


def _prepare(recipe: str, timeline: Timeline) -> Inputs:
    """Fetch, render and convert what is not cached yet; where a package cannot be fetched, generate a substitute."""
    if recipe == TINY_RECIPE:
        return _generated(TINY_NOTE, timeline)
    _announce("packages", timeline)
    try:
        with _progress("packages", len(EVERYTHING)) as advance:
            folders = unpack_all(EVERYTHING, CACHE / "packages", lambda _: advance(1))
    except ClusterError as error:
        note = FALLBACK_NOTE.format(error)
        _warn(note)
        return _generated(note, timeline)
    corpus = CACHE / "corpus"
    _enter("inputs", timeline, " (cached)" if (corpus / "counts.json").exists() else "")
    with _progress("pictures", None) as advance:
        _print_counts(build_corpus(folders, corpus, advance))
    models = prepare_models(folders, CACHE / "models", lambda name: console.print(f"  converting {name}"))
    return Inputs(recipe, corpus, models, "data")


def _generated(note: str, timeline: Timeline) -> Inputs:
    """Make what needs no package."""
    corpus = CACHE / "generated"
    _enter("inputs", timeline, ": generated scenes, tiny models" + (" (cached)" if corpus.exists() else ""))
    with _progress("pictures", None) as advance:
        _print_counts(generate_corpus(corpus, advance))
    models = generate_models(corpus, CACHE / "models", lambda name: console.print(f"  making {name}"))
    return Inputs(TINY_RECIPE, corpus, models, "generated", note)


def _print_counts(counts: dict[str, int]) -> None:
    console.print("  " + ", ".join(f"{split} {count}" for split, count in counts.items()))


def _warn(note: str) -> None:
    console.print(Panel(Text(note), style="bold yellow"), soft_wrap=False)


def _upload_models(models: dict[str, Path], server: LocalS3) -> None:
    """Put the frozen parts where the workers read their slices from; files that are there already are kept."""
    store = ObjectStore(server.store_config)
    for name, folder in models.items():
        url = f"s3://{BUCKET}/models/{name}"
        there = {info.url: info.size for info in store.list(url)}
        for file in sorted(path for path in folder.rglob("*") if path.is_file()):
            target = join(url, str(file.relative_to(folder)))
            if there.get(target) != file.stat().st_size:
                store.put_file(target, file)


def _make_data(inputs: Inputs, server: LocalS3) -> None:
    """Write shards and manifests; both verbs resume from what is there."""
    for split in SPLITS:
        manifest = f"s3://{BUCKET}/{inputs.data}/{split}"
        shards = f"{manifest}/shards"
        source = str(inputs.corpus / f"{split}.jsonl")
        options = ("--endpoint-url", server.endpoint_url, "--region", server.store_config.region or "")
        _isthmus(server, "data", "ingest", source, shards, "--samples-per-shard", str(SAMPLES_PER_SHARD), *options)
        _isthmus(server, "data", "index", shards, "--out", manifest, "--chunk-mb", str(CHUNK_MB), *options)


def _next_run(setup: Setup, server: LocalS3) -> JobConfig:
    """Return the configuration of the newest unfinished run, or of a new one."""
    store = ObjectStore(server.store_config)
    overrides = [*setup.overrides, f"store.endpoint_url={server.endpoint_url}"]
    base = load_config(setup.recipe, overrides, JobConfig)
    number = 1
    while True:
        name = base.run.name if number == 1 else f"{base.run.name}-{number}"
        status = read_status(join(base.run.url, name), store)
        if status is None or status.state is not RunState.FINISHED:
            if status is not None:
                console.print(f"  run {name} resumes from step {status.committed_step or 0} of {status.stage}")
            return load_config(setup.recipe, [*overrides, f"run.name={name}"], JobConfig)
        number += 1


def _train(config: JobConfig, setup: Setup, server: LocalS3, head: RayHead, timeline: Timeline) -> RunStatus:
    """Submit the run and follow it to its end; Ctrl-C stops it, with a last checkpoint."""
    name = config.run.name
    overrides = [*setup.overrides, f"store.endpoint_url={server.endpoint_url}", f"run.name={name}"]
    watch = RunWatch(config, ObjectStore(server.store_config), head, console, timeline)
    _isthmus(server, "submit", setup.recipe, *overrides, "--address", head.dashboard)
    try:
        return watch.wait()
    except KeyboardInterrupt:
        console.print("  saving a checkpoint, then stopping", style="yellow")
        _isthmus(server, "stop", name, "--address", head.dashboard)
        raise


def _isthmus(server: LocalS3, *arguments: str) -> None:
    """Run a verb as a person would and show the command; the demo ends if it fails."""
    console.print("  $ isthmus " + " ".join(arguments), style="dim", markup=False)
    command = [sys.executable, "-m", "isthmus.cluster.cli.main", *arguments]
    environment = {**os.environ, **server.environment, "AWS_ENDPOINT_URL": server.endpoint_url}
    done = subprocess.run(command, env=environment, check=False)
    if done.returncode:
        raise SystemExit(done.returncode)


def _enter(phase: str, timeline: Timeline, note: str = "") -> None:
    """Begin a phase."""
    timeline.enter(phase)
    _announce(phase, timeline, note)


def _announce(phase: str, timeline: Timeline, note: str = "") -> None:
    """Say what begins, and how long everything still takes."""
    shown = [name for name, text in PHASES.items() if text]
    place = f"{shown.index(phase) + 1}/{len(shown)}"
    left = minutes(timeline.seconds_left())
    console.print(f"[bold cyan]\\[{place}][/] {PHASES[phase]}{note}, [dim]about {left} left[/]")


@contextlib.contextmanager
def _progress(unit: str, total: int | None) -> Iterator[Callable[..., None]]:
    """Yield `advance(done, total)`: a bar on a terminal, silence elsewhere."""
    with Progress(
        f"  {unit}",
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        console=console,
        transient=True,
        disable=not console.is_terminal,
    ) as bar:
        task = bar.add_task(unit, total=total)

        def advance(done: int, known_total: int | None = None) -> None:
            if known_total is None:
                bar.advance(task, done)
            else:
                bar.update(task, completed=done, total=known_total)

        yield advance


if __name__ == "__main__":
    raise SystemExit(main(*sys.argv[1:]))
