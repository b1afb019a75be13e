"""`isthmus checkpoints ls|verify|prune|cp|diff`: checkpoints in object storage, without a cluster."""

import json
from contextlib import closing
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any

import typer

from isthmus.cluster.cli.options import (
    RUN_FOLDER_HELP,
    EndpointOption,
    JsonOption,
    RegionOption,
    RunFolderArg,
    open_store,
    store_config,
)
from isthmus.cluster.cli.output import data_size, duration, print_json, print_rich, table

if TYPE_CHECKING:
    from isthmus.cluster.submission.checkpoint_folders import CheckpointEntry

app = typer.Typer(help="List, verify, compare, copy and delete checkpoints.", no_args_is_help=True)

CheckpointArg = Annotated[str, typer.Argument(help="URL of one checkpoint (.../step-000001200).")]


@app.command()
def ls(
    run: RunFolderArg,
    endpoint_url: EndpointOption = None,
    region: RegionOption = None,
    as_json: JsonOption = False,
) -> None:
    """List committed checkpoints, newest first; * marks the best by the stage's key metric."""
    from isthmus.cluster.submission.checkpoint_folders import list_entries
    from isthmus.cluster.submission.run_folder import fail_fast_store

    entries = list_entries(run, fail_fast_store(store_config(endpoint_url, region)))
    if as_json:
        print_json([asdict(entry) for entry in entries])
        return
    for folder in dict.fromkeys(entry.url.rpartition("/")[0] for entry in entries):
        mine = [entry for entry in entries if entry.url.startswith(f"{folder}/")]
        key = mine[0].key_metric or "metric"
        rows = ((str(e.step), data_size(e.size_bytes), _age(e), str(e.world_size), _metric(e), _mark(e)) for e in mine)
        typer.echo(folder)
        print_rich(table(("  step>", "size>", "age>", "ranks>", f"{key}>", ""), rows))


@app.command()
def verify(
    run: Annotated[str, typer.Argument(metavar="RUN", help=f"{RUN_FOLDER_HELP[:-1]}, or of one checkpoint.")],
    endpoint_url: EndpointOption = None,
    region: RegionOption = None,
    as_json: JsonOption = False,
) -> None:
    """Read every byte and compare it with the manifest; exit code 2 if anything is damaged."""
    from isthmus.cluster.submission.checkpoint_folders import checkpoint_folders
    from isthmus.trainer.checkpoint.reader import SavedCheckpoint, scan

    store = open_store(endpoint_url, region)
    found: dict[str, list[str]] = {}
    if _is_checkpoint(run):
        checkpoints = [SavedCheckpoint.open(run.rstrip("/"), store)]
    else:
        checkpoints = []
        for folder in checkpoint_folders(run, store):
            intact, damaged = scan(folder, store)
            checkpoints += intact
            found |= {url: [f"{url}: the manifest is damaged"] for url in damaged}
    digests = {}
    for saved in checkpoints:
        found[saved.url] = saved.verify()
        digests[saved.url] = None if found[saved.url] else saved.digest()
    if as_json:
        answer = [{"url": url, "problems": problems, "digest": digests.get(url)} for url, problems in found.items()]
        print_json(answer)
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
    keep_last: Annotated[int, typer.Option("--keep-last", min=2, help="Number of newest checkpoints to keep.")] = 2,
    keep_every_steps: Annotated[int | None, typer.Option(help="Keep those at multiples of this.")] = None,
    keep_best: Annotated[str | None, typer.Option(help="Keep the best by this metric.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only print what would be deleted.")] = False,
    endpoint_url: EndpointOption = None,
    region: RegionOption = None,
    as_json: JsonOption = False,
) -> None:
    """Delete old checkpoints and leftovers; never one in use, or the one stage 2 was initialised from."""
    from isthmus.cluster.submission.checkpoint_folders import checkpoint_folders, steps_in_use_by_stage2
    from isthmus.trainer.checkpoint.retention import prune as prune_folder
    from isthmus.trainer.config.schema import CheckpointConfig

    store = open_store(endpoint_url, region)
    config = CheckpointConfig(keep_last=keep_last, keep_every_steps=keep_every_steps, keep_best=keep_best)
    answer: list[dict[str, Any]] = []
    for folder in checkpoint_folders(run, store):
        protected = steps_in_use_by_stage2(folder, store)
        steps, leftovers = prune_folder(folder, store, config, protected=protected, dry_run=dry_run)
        answer.append({"folder": folder, "steps": steps, "leftovers": leftovers, "dry_run": dry_run})
    if as_json:
        print_json(answer)
        return
    verb = "would delete" if dry_run else "deleted"
    for item in answer:
        steps_text = ", ".join(map(str, item["steps"])) or "none"
        typer.echo(f"{item['folder']}: {verb} checkpoints {steps_text} and {len(item['leftovers'])} leftovers")


@app.command()
def rollback(
    checkpoint: CheckpointArg,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only print what would be deleted.")] = False,
    endpoint_url: EndpointOption = None,
    region: RegionOption = None,
    as_json: JsonOption = False,
) -> None:
    """Delete all checkpoints after this one, so that its stage resumes from it; stop the run first."""
    from isthmus.trainer.checkpoint.reader import SavedCheckpoint
    from isthmus.trainer.checkpoint.retention import delete_after

    store = open_store(endpoint_url, region)
    with closing(SavedCheckpoint.open(checkpoint.rstrip("/"), store)) as saved:
        steps = delete_after(saved.url.rpartition("/")[0], store, saved.step, dry_run=dry_run)
    if as_json:
        print_json({"step": saved.step, "deleted": steps, "dry_run": dry_run})
        return
    verb = "would delete" if dry_run else "deleted"
    typer.echo(f"{verb} checkpoints {', '.join(map(str, steps)) or 'none'}; the newest is {saved.url}")


@app.command()
def cp(
    checkpoint: CheckpointArg,
    target: Annotated[str, typer.Argument(help="URL of the new folder.")],
    endpoint_url: EndpointOption = None,
    region: RegionOption = None,
    as_json: JsonOption = False,
) -> None:
    """Copy a checkpoint, verifying every byte; its manifest is written last."""
    from isthmus.trainer.checkpoint.reader import SavedCheckpoint
    from isthmus.trainer.checkpoint.tools import copy_checkpoint

    store = open_store(endpoint_url, region)
    saved = SavedCheckpoint.open(checkpoint.rstrip("/"), store)
    with saved.in_use():
        copy_checkpoint(saved, target.rstrip("/"), store)
    answer = {"url": target.rstrip("/"), "bytes": saved.size_bytes}
    typer.echo(json.dumps(answer) if as_json else f"{answer['url']}  {data_size(saved.size_bytes)}")


@app.command()
def diff(
    first: CheckpointArg,
    second: CheckpointArg,
    endpoint_url: EndpointOption = None,
    region: RegionOption = None,
    as_json: JsonOption = False,
) -> None:
    """Compare two checkpoints tensor by tensor; exit code 1 if they differ."""
    from isthmus.trainer.checkpoint.reader import SavedCheckpoint
    from isthmus.trainer.checkpoint.tools import differences

    store = open_store(endpoint_url, region)
    one, two = (SavedCheckpoint.open(url.rstrip("/"), store) for url in (first, second))
    found = differences(one, two)
    if as_json:
        print_json(found)
    else:
        for item in found:
            where = f"{item['kind']} of {item['name']}" if item["kind"] else item["name"]
            typer.echo(f"{where}: {item['difference']}")
        typer.echo(f"{len(found)} differences" if found else "bitwise equal")
    if found:
        raise typer.Exit(1)


def _is_checkpoint(url: str) -> bool:
    from isthmus.trainer.checkpoint.format import step_of

    return step_of(url.rstrip("/").rpartition("/")[2]) is not None


def _age(entry: "CheckpointEntry") -> str:
    return "" if entry.age_seconds is None else duration(max(0.0, entry.age_seconds))


def _metric(entry: "CheckpointEntry") -> str:
    value = entry.metrics.get(entry.key_metric or "")
    return "" if value is None else f"{value:.4g}"


def _mark(entry: "CheckpointEntry") -> str:
    return "*" if entry.is_best else ""
