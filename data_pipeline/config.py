"""Configuration of storage access and of the data pipeline."""

from typing import Annotated, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field


class Config(BaseModel):
    """Base of configurations: immutable, and an unknown key is an error."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)


class StoreConfig(Config):
    """Access to object stores. Credentials are never configured here: the AWS SDK resolves them."""

    endpoint_url: str | None = None
    """Endpoint of an S3-compatible store; None means the AWS SDK's resolution."""
    region: str | None = None
    """Region; None means the AWS SDK's resolution."""
    max_attempts: int = Field(8, gt=0)
    """Tries per request before it fails."""
    stall_timeout_seconds: float = Field(20.0, gt=0)
    """A request that receives no data for this long is aborted and retried."""
    request_timeout_seconds: float | None = Field(None, gt=0)
    """Time limit of a request with all its tries, checked after each try; None means only max_attempts limits it."""
    transfer_threads: int = Field(4, gt=0)
    """Parallel requests for one upload or download of a large object."""


class SourceConfig(Config):
    """One data set of a mixture."""

    manifest: str
    """URL of a manifest written by `isthmus data index`."""
    weight: float = Field(1.0, gt=0)
    """Share of this source in every batch, relative to the other weights."""


class BudgetConfig(Config):
    """How many bad samples a run tolerates before it stops and names the worst shard."""

    max_bad_fraction: float = Field(0.01, ge=0, le=1)
    """Largest fraction of bad samples within the window."""
    window_samples: int = Field(10_000, gt=0)
    """Samples in the sliding window."""
    max_consecutive: int = Field(100, gt=0)
    """Largest number of consecutive bad samples from one source."""


def _current_backend_name(name: object) -> object:
    """Accept the former name, which stored configurations hold."""
    return "process" if name == "inline" else name


class DataConfig(Config):
    """The streaming pipeline from shards to batches."""

    sources: tuple[SourceConfig, ...] = Field(min_length=1)
    """Data sets and their weights."""
    exclude: str | None = None
    """File of samples to exclude from the start of the run, one key per line: `source/shard#key`,
    `SHARD_URL#key`, or the bare key, for which the indexes of all shards are read."""
    lanes: int = Field(gt=0)
    """Parallel sample streams; must divide the global batch, and every world size must divide it. Fixed for a run."""
    shuffle_chunks: int = Field(4, gt=0)
    """Number of chunks of a lane that are shuffled together."""
    crop_scale: tuple[float, float] = (0.5, 1.0)
    """Area range of the random crop, as fractions of the image."""
    flip: bool = True
    """Mirror half of the training images."""
    max_caption_words: int = Field(50, gt=0)
    """Longer captions are truncated."""
    max_image_pixels: int = Field(64_000_000, gt=0)
    """Larger images are bad samples (decompression bombs)."""
    cache_dir: str | None = None
    """Local folder for the chunk cache; None means no disk cache."""
    cache_bytes: int = Field(0, ge=0)
    """Size limit of the chunk cache per node."""
    prefetch_steps: int = Field(2, ge=0)
    """Number of batches to prepare ahead of time."""
    prefetch_bytes: int = Field(1 << 30, gt=0)
    """Limit of prefetched chunk bytes per reader."""
    backend: Annotated[Literal["process", "ray"], BeforeValidator(_current_backend_name)] = "process"
    """process: reader processes of each training worker. ray: reader actors on CPU nodes."""
    readers: int = Field(1, ge=0)
    """Reader processes per training worker (process; 0 reads in the worker itself) or reader actors in total (ray)."""
    reader_resources: dict[str, float] = {}
    """Ray resources that a reader actor requests besides one CPU, such as {"data": 1} to stay on CPU nodes."""
    reader_timeout_seconds: float = Field(240.0, gt=0)
    """A reader that does not respond for this long is replaced. If none is available for this long, the group
    restarts where readers fit. When three readers end at the same samples, the run stops and names them. Keep it below
    safety.collective_timeout_seconds, within which all ranks must take a step."""
    budget: BudgetConfig = BudgetConfig()
    """Tolerance of bad samples."""
