"""Arguments and options that several commands share, and the object store that they describe."""

from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from isthmus.data_pipeline.config import StoreConfig
    from isthmus.data_pipeline.store.object_store import ObjectStore

ADDRESS_HELP = (
    "Dashboard of the cluster, such as http://HOST:8265 (default: RAY_API_SERVER_ADDRESS, RAY_ADDRESS, else this "
    "machine's)."
)
ENDPOINT_HELP = "Endpoint of an S3-compatible store (default: AWS_ENDPOINT_URL, else AWS)."
RUN_FOLDER_HELP = "URL of a run's folder, or of a stage's checkpoints folder."

RecipeArg = Annotated[str, typer.Argument(metavar="RECIPE", help="Recipe file (YAML).")]
OverridesArg = Annotated[
    list[str] | None, typer.Argument(metavar="[KEY.SUB=VALUE]...", help="Overrides, such as stage1.steps=100.")
]
RunArg = Annotated[str, typer.Argument(metavar="RUN", help="Name of a run on the cluster, or URL of its folder.")]
RunNameArg = Annotated[str, typer.Argument(metavar="RUN", help="Name of a run on the cluster.")]
RunFolderArg = Annotated[str, typer.Argument(metavar="RUN", help=RUN_FOLDER_HELP)]
AllowChangeOption = Annotated[
    list[str] | None, typer.Option("--allow-change", help="Key that may differ from the run's earlier starts.")
]
AddressOption = Annotated[str | None, typer.Option("--address", help=ADDRESS_HELP)]
EndpointOption = Annotated[str | None, typer.Option("--endpoint-url", help=ENDPOINT_HELP)]
RegionOption = Annotated[str | None, typer.Option("--region", help="Region of the store (default: AWS_REGION).")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON.")]
SkipStepsOption = Annotated[
    list[str] | None,
    typer.Option("--skip-steps", metavar="[STAGE:]A-B", help="Skip the samples of these steps, counted from 0."),
]
WatchOption = Annotated[bool, typer.Option("--watch", help="Show the state until the run ends.")]


def store_config(endpoint_url: str | None, region: str | None) -> "StoreConfig":
    """Return how to reach the object store that the options describe."""
    from isthmus.data_pipeline.config import StoreConfig

    return StoreConfig(endpoint_url=endpoint_url, region=region)


def open_store(endpoint_url: str | None, region: str | None) -> "ObjectStore":
    """Return the object store that the options describe."""
    from isthmus.data_pipeline.store.object_store import ObjectStore

    return ObjectStore(store_config(endpoint_url, region))


def open_runner(processes: int, address: str | None) -> "Callable[..., Iterator[Any]]":
    """Return what works on shards: tasks of the Ray cluster at the address, or processes of this machine."""
    if address is None:
        from isthmus.data_pipeline.process_pool import run_in_processes

        return run_in_processes(processes)
    from isthmus.cluster.ray_nodes.ray_map import run_in_ray

    return run_in_ray(address)


def find_run(run: str, address: str | None, endpoint_url: str | None, region: str | None) -> "tuple[str, ObjectStore]":
    """Return the URL of a run's folder and the store that holds it: that of the options, or that of the run's job."""
    from isthmus.cluster.submission.jobs import Jobs
    from isthmus.cluster.submission.run_folder import is_url
    from isthmus.data_pipeline.store.object_store import ObjectStore

    if is_url(run):
        return run.rstrip("/"), open_store(endpoint_url, region)
    job = Jobs(address).latest(run)
    return job.run_url, ObjectStore(job.store)
