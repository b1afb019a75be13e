"""`isthmus checkpoints ls|verify|prune|cp|diff`: checkpoints in object storage, without a cluster."""

import json
from typing import TYPE_CHECKING, Annotated, Any

import typer

from isthmus.cluster.cli.options import RUN_FOLDER_HELP, JsonOption, RunFolderArg
from isthmus.cluster.errors import ClusterError

if TYPE_CHECKING:
    from isthmus.data_pipeline.store.object_store import ObjectStore
    from isthmus.trainer.checkpoint.reader import SavedCheckpoint

app = typer.Typer(help="Look at, check, copy and delete checkpoints.", no_args_is_help=True)

CheckpointArg = Annotated[str, typer.Argument(help="URL of one checkpoint (.../step-000001200).")]


@app.command()
def ls(run: RunFolderArg, as_json: JsonOption = False) -> None:
    """List committed checkpoints, newest first."""
    from isthmus.trainer.checkpoint.reader import list_checkpoints

    store = _store()
    found = [_described(saved) for folder in _folders(run, store) for saved in list_checkpoints(folder, store)]
    if as_json:
        typer.echo(json.dumps(found, indent=2))
        return
    for item in found:
        metrics = " ".join(f"{name} {value:.4g}" for name, value in item["metrics"].items())
        typer.echo(f"{item['url']}  {item['stage']} step {item['step']}  {item['bytes'] / 1e6:.1f} MB  {metrics}")


@app.command()
def verify(
    run: Annotated[str, typer.Argument(metavar="RUN", help=f"{RUN_FOLDER_HELP[:-1]}, or of one checkpoint.")],
    as_json: JsonOption = False,
) -> None:
    """Read every byte again and compare with the manifest; exit code 2 where something is damaged."""
    from isthmus.trainer.checkpoint.reader import SavedCheckpoint, scan

    store = _store()
    found: dict[str, list[str]] = {}
    if _is_checkpoint(run):
        checkpoints = [SavedCheckpoint.open(run.rstrip("/"), store)]
    else:
        checkpoints = []
        for folder in _folders(run, store):
            intact, damaged = scan(folder, store)
            checkpoints += intact
            found |= {url: [f"{url}: is a damaged manifest"] for url in damaged}
    digests = {}
    for saved in checkpoints:
        found[saved.url] = saved.verify()
        digests[saved.url] = None if found[saved.url] else saved.digest()
    if as_json:
        answer = [{"url": url, "problems": problems, "digest": digests.get(url)} for url, problems in found.items()]
        typer.echo(json.dumps(answer, indent=2))
    else:
        for url, problems in found.items():
            typer.echo(f"{url}  {'DAMAGED' if problems else f'intact  {digests[url]}'}")
            for problem in problems:
                typer.echo(f"  {problem}")
    if any(found.values()):
        raise typer.Exit(2)


@app.command()
def prune(
    run: RunFolderArg,
    keep_last: Annotated[int, typer.Option("--keep-last", min=2, help="Newest checkpoints to keep.")] = 2,
    keep_every_steps: Annotated[int | None, typer.Option(help="Keep those at multiples of this.")] = None,
    keep_best: Annotated[str | None, typer.Option(help="Keep the best by this metric.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say what would be deleted.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Delete checkpoints beyond those to keep, and leftovers; never one in use or handed over to stage 2."""
    from isthmus.trainer.checkpoint.retention import prune as prune_folder
    from isthmus.trainer.config.schema import CheckpointConfig

    store = _store()
    config = CheckpointConfig(keep_last=keep_last, keep_every_steps=keep_every_steps, keep_best=keep_best)
    answer: list[dict[str, Any]] = []
    for folder in _folders(run, store):
        protected = _handed_over(run, folder, store)
        steps, leftovers = prune_folder(folder, store, config, protected=protected, dry_run=dry_run)
        answer.append({"folder": folder, "steps": steps, "leftovers": leftovers, "dry_run": dry_run})
    if as_json:
        typer.echo(json.dumps(answer, indent=2))
        return
    verb = "would delete" if dry_run else "deleted"
    for item in answer:
        steps_text = ", ".join(map(str, item["steps"])) or "none"
        typer.echo(f"{item['folder']}: {verb} checkpoints {steps_text} and {len(item['leftovers'])} leftovers")


@app.command()
def cp(
    checkpoint: CheckpointArg,
    target: Annotated[str, typer.Argument(help="URL of the new folder.")],
    as_json: JsonOption = False,
) -> None:
    """Copy a checkpoint, checked byte by byte on the way; its manifest appears last."""
    from isthmus.trainer.checkpoint.reader import SavedCheckpoint
    from isthmus.trainer.checkpoint.tools import copy_checkpoint

    store = _store()
    saved = SavedCheckpoint.open(checkpoint.rstrip("/"), store)
    with saved.in_use():
        copy_checkpoint(saved, target.rstrip("/"), store)
    answer = {"url": target.rstrip("/"), "bytes": saved.size_bytes}
    typer.echo(json.dumps(answer) if as_json else f"{answer['url']}  {saved.size_bytes / 1e6:.1f} MB")


@app.command()
def diff(first: CheckpointArg, second: CheckpointArg, as_json: JsonOption = False) -> None:
    """Compare two checkpoints tensor by tensor; exit code 1 where they differ."""
    from isthmus.trainer.checkpoint.reader import SavedCheckpoint
    from isthmus.trainer.checkpoint.tools import differences

    store = _store()
    one, two = (SavedCheckpoint.open(url.rstrip("/"), store) for url in (first, second))
    found = differences(one, two)
    if as_json:
        typer.echo(json.dumps(found, indent=2))
    else:
        for item in found:
            where = f"{item['kind']} of {item['name']}" if item["kind"] else item["name"]
            typer.echo(f"{where}: {item['difference']}")
        typer.echo(f"{len(found)} differences" if found else "equal, bit by bit")
    if found:
        raise typer.Exit(1)


def _store() -> "ObjectStore":
    from isthmus.data_pipeline.store.object_store import ObjectStore

    return ObjectStore()


def _described(saved: "SavedCheckpoint") -> dict[str, Any]:
    state = saved.state
    return {
        "url": saved.url,
        "stage": state.stage,
        "step": saved.step,
        "bytes": saved.size_bytes,
        "world_size": saved.manifest.world_size,
        "metrics": state.metrics,
        "versions": state.versions,
    }


def _is_checkpoint(url: str) -> bool:
    from isthmus.trainer.checkpoint.format import step_of

    return step_of(url.rstrip("/").rpartition("/")[2]) is not None


def _folders(run: str, store: "ObjectStore") -> list[str]:
    """Return the folders of checkpoints that a run's folder, or such a folder itself, stands for."""
    from isthmus.data_pipeline.store.object_store import join
    from isthmus.trainer.checkpoint.reader import list_step_dirs

    root = run.rstrip("/")
    candidates = [root, *(join(root, stage, "checkpoints") for stage in ("stage1", "stage2"))]
    found = [url for url in candidates if list_step_dirs(url, store)]
    if not found:
        raise ClusterError(
            f"{root}: holds no checkpoints; give the folder of a run (isthmus runs ls) or of checkpoints"
        )
    return found


def _handed_over(run: str, folder: str, store: "ObjectStore") -> list[int]:
    """Return the steps in a folder that stage 2 began with."""
    from isthmus.trainer.checkpoint.format import step_of
    from isthmus.trainer.errors import TrainerError
    from isthmus.trainer.runs.store import read_run

    root = run.rstrip("/") if folder != run.rstrip("/") else folder.rsplit("/", 2)[0]
    try:
        records = read_run(root, store).get("handoffs", {}).values()
    except TrainerError:  # a folder of checkpoints outside a run
        return []
    steps = [step_of(record["url"].rpartition("/")[2]) for record in records if record["url"].startswith(folder)]
    return [step for step in steps if step is not None]
