"""Kill a worker of a real run with SIGKILL several times and report what each recovery cost, and where the time went.

The run is stage 1 on two workers of an embedded Ray: of recipes/tiny.yaml in a local folder, or of recipes/demo.yaml in
the S3 server of `make demo`, with the inputs that it has left in its cache. `--torch-trainer` lets Ray Train's
TorchTrainer do the same work instead of our driver: the same stage, resumed from the same checkpoints. CPU seconds are
those of all processes from the kill to the first step after it; unlike wall time they depend little on what else runs.

    isthmus assets tiny assets/tiny
    OMP_NUM_THREADS=1 python -m benchmarks.recovery assets/tiny [--kills 3] [--spares 1] [--torch-trainer] [--json FILE]
    OMP_NUM_THREADS=1 python -m benchmarks.recovery .cache/demo --demo
"""

import argparse
import contextlib
import json
import logging
import os
import signal
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil

from benchmarks.group_start import CpuWatch
from isthmus.cluster.config import JobConfig
from isthmus.cluster.driver import run_local
from isthmus.cluster.embedded import embedded_ray
from isthmus.cluster.status import RunStatus, read_status
from isthmus.data_pipeline.store.object_store import ObjectStore, join
from isthmus.demo.local_s3 import LocalS3, local_s3
from isthmus.trainer.config.loading import load_config, parse_yaml, to_yaml
from isthmus.trainer.context import LocalContext
from isthmus.trainer.runs.store import RunStore

RECIPES = Path(__file__).parents[1] / "recipes"
BUCKET = "isthmus-demo"
FIRST_KILL, STEPS_BETWEEN_KILLS = 12, 10
WAIT_SECONDS = 600.0
TASK = "ray::train-1"


@contextlib.contextmanager
def inputs(folder: Path, scratch: str, *, demo: bool) -> Iterator[tuple[Path, list[str]]]:
    """Yield the recipe and the overrides that say where its inputs and its results are."""
    if demo:
        with local_s3(folder / "s3", BUCKET) as server, removed(server, f"s3://{BUCKET}/recovery") as url:
            os.environ.update(server.environment)
            yield RECIPES / "demo.yaml", [f"store.endpoint_url={server.endpoint_url}", f"run.url={url}"]
    else:
        yield (
            RECIPES / "tiny.yaml",
            [
                f"run.url={scratch}",
                f"data.sources.0.manifest={folder}/train",
                f"evaluation.manifest={folder}/held-out",
                f"model.vision.path={folder}/vision",
                f"model.qformer.tokenizer={folder}/bert",
            ],
        )


@contextlib.contextmanager
def removed(server: LocalS3, url: str) -> Iterator[str]:
    """Yield a folder of the server that is empty now and after the block."""
    store = ObjectStore(server.store_config)
    try:
        remove_folder(url, store)
        yield url
    finally:
        remove_folder(url, store)


def remove_folder(url: str, store: ObjectStore) -> None:
    """Delete all objects below `url`."""
    for info in list(store.list(url)):
        store.delete(info.url)


def configure(recipe: Path, places: list[str], spares: int) -> JobConfig:
    """Return stage 1 of a recipe on two workers; it is stopped after the last kill."""
    overrides = [
        "checkpoint.every_steps=5",
        "run.export=false",
        "stage2=null",
        "model.language=null",
        "stage1.steps=100000",
        "logging.every_steps=1",
        "cluster.workers={min: 2, max: 2}",
        f"cluster.spares={spares}",
    ]
    return load_config(recipe, places + overrides, JobConfig)


def wait_for(condition: Callable[[], Any]) -> Any:
    """Return the first true value of `condition()`."""
    deadline = time.monotonic() + WAIT_SECONDS
    while time.monotonic() < deadline:
        if value := condition():
            return value
        time.sleep(0.02)
    raise TimeoutError("the run does not get further")


def kill_workers(config: JobConfig, num_kills: int, found: list[dict[str, Any]]) -> None:
    """Kill rank 1, each time once the run has recovered; note what each kill cost, then stop the run."""
    url, store = join(config.run.url, config.run.name), ObjectStore(config.store)

    def recovered(number: int, step: int) -> RunStatus | None:
        status = read_status(url, store)
        done = status is not None and len(status.restarts) == number and status.step >= step
        ready = done and status is not None and status.spares >= config.cluster.spares
        complete = ready and status is not None and all(restart.recovery_seconds for restart in status.restarts)
        return status if complete else None

    step = FIRST_KILL
    for number in range(num_kills):
        wait_for(lambda number=number, step=step: recovered(number, step))
        victims = [p for p in psutil.Process().children(recursive=True) if (p.cmdline() or [""])[0].startswith(TASK)]
        with CpuWatch() as watch:
            victims[0].send_signal(signal.SIGKILL)
            killed_at = time.time()
            restart = wait_for(lambda number=number: _complete(url, store, number + 1))
        seen = restart.at - killed_at
        found.append(
            {
                "seconds": round(seen + restart.recovery_seconds, 2),
                "cpu_seconds": round(watch.seconds, 1),
                "seen": round(seen, 2),
                "phases": restart.phases,
                "processes": restart.processes,
                "lost_steps": restart.lost_steps,
            }
        )
        step = restart.step + STEPS_BETWEEN_KILLS
    os.kill(os.getpid(), signal.SIGINT)


def _complete(url: str, store: ObjectStore, number: int) -> Any:
    status = read_status(url, store)
    restarts = status.restarts if status else []
    return restarts[-1] if len(restarts) == number and restarts[-1].recovery_seconds else None


def with_our_driver(config: JobConfig, num_kills: int) -> list[dict[str, Any]]:
    """Let our driver run the stage."""
    found: list[dict[str, Any]] = []
    threading.Thread(target=kill_workers, args=(config, num_kills, found), daemon=True).start()
    run_local(config)
    logging.getLogger().handlers.clear()
    return found


class StepContext(LocalContext):
    """RunContext of a Ray Train worker: rank 0 notes when each step begins, every rank its process id."""

    def __init__(self, folder: Path) -> None:
        """Take the rank from the environment that Ray Train has set."""
        super().__init__()
        self._steps = (folder / "steps").open("a") if self.rank.is_main else None
        (folder / f"pid-{self.rank.rank}").write_text(str(os.getpid()))

    def begin_step(self, step: int) -> None:
        """Write a line."""
        if self._steps:
            self._steps.write(f"{time.time()} {step} {os.getpid()}\n")
            self._steps.flush()


def train_in_ray_train(settings: dict[str, Any]) -> None:
    """Train the stage in a Ray Train worker, whose process group exists already."""
    from isthmus.trainer.engine.process_group import process_group
    from isthmus.trainer.trainer import run_stage

    config = JobConfig.model_validate(parse_yaml(settings["config"], "the benchmark"))
    context, store = StepContext(Path(settings["folder"])), ObjectStore(config.store)
    run = RunStore.attach(config, store, settings["token"])
    with process_group(context.rank, config.safety.collective_timeout_seconds):
        run_stage(config, "stage1", context, store, run)


def with_torch_trainer(config: JobConfig, num_kills: int) -> list[dict[str, Any]]:
    """Let TorchTrainer run the stage, with a health check every second and restarts without end."""
    os.environ["RAY_TRAIN_HEALTH_CHECK_INTERVAL_S"] = "1"
    store = ObjectStore(config.store)
    run = RunStore.open(config, store, owner="the benchmark")
    found: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as notes, embedded_ray(config):
        folder = Path(notes)
        from ray.train import FailureConfig, RunConfig, ScalingConfig
        from ray.train.torch import TorchConfig, TorchTrainer

        settings = {"config": to_yaml(config), "folder": str(folder), "token": run.token}
        trainer = TorchTrainer(
            train_in_ray_train,
            train_loop_config=settings,
            torch_config=TorchConfig(backend="gloo"),
            scaling_config=ScalingConfig(num_workers=2, resources_per_worker={"CPU": config.cluster.workers.cpus}),
            run_config=RunConfig(
                name="peer", storage_path=str(folder), failure_config=FailureConfig(max_failures=num_kills)
            ),
        )
        threading.Thread(target=trainer.fit, daemon=True).start()
        step = FIRST_KILL
        for _ in range(num_kills):
            wait_for(lambda step=step: _newest(folder)[1] >= step)
            victim, process = int((folder / "pid-1").read_text()), _newest(folder)[2]
            with CpuWatch() as watch:
                os.kill(victim, signal.SIGKILL)
                killed_at = time.time()
                first = wait_for(lambda process=process: _step_of_another(folder, process))
                done_at = wait_for(lambda first=first: _newest(folder)[1] > first and _newest(folder)[0])
            found.append({"seconds": round(done_at - killed_at, 2), "cpu_seconds": round(watch.seconds, 1)})
            step = int(first) + STEPS_BETWEEN_KILLS
    run.close()
    return found


def _newest(folder: Path) -> tuple[float, int, int]:
    """Return when the newest step began, which it was, and in which process."""
    path = folder / "steps"
    lines = path.read_text().splitlines() if path.exists() else []
    at, step, process = (lines[-1] if lines else "0 -1 0").split()
    return float(at), int(step), int(process)


def _step_of_another(folder: Path, process: int) -> int | None:
    _, step, newest = _newest(folder)
    return step if newest != process else None


def main() -> None:
    """Run, kill, and print one line per recovery."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--demo", action="store_true")
    parser.add_argument("--torch-trainer", action="store_true")
    parser.add_argument("--kills", type=int, default=3)
    parser.add_argument("--spares", type=int, default=1)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    with (
        tempfile.TemporaryDirectory() as scratch,
        inputs(arguments.folder.resolve(), scratch, demo=arguments.demo) as (recipe, places),
    ):
        config = configure(recipe, places, arguments.spares)
        measure = with_torch_trainer if arguments.torch_trainer else with_our_driver
        found = measure(config, arguments.kills)
    for kill in found:
        phases = ", ".join(f"{name} {seconds:.2f}" for name, seconds in kill.get("phases", {}).items())
        print(f"kill to next step {kill['seconds']:.1f} s, {kill['cpu_seconds']:.1f} CPU s", kill.get("processes", ""))
        if phases:
            print(f"  seen {kill['seen']:.2f}, {phases}; {kill['lost_steps']} steps repeated")
    print(f"load average {os.getloadavg()[0]:.1f}")
    if arguments.json:
        arguments.json.write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
