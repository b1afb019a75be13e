"""The frozen language model, sharded over all ranks by ZeRO-3 while it is loaded.

The skeleton is built without weights; each parameter becomes a partition, and each rank reads the bytes of its own
partition from the safetensors files straight into it. No rank ever holds the whole model, nothing is broadcast.
"""

import ctypes
import logging
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx

from isthmus.data_pipeline.store.object_store import ObjectStore
from isthmus.model.config import LanguageConfig
from isthmus.trainer.context import Rank
from isthmus.trainer.engine.deepspeed_config import frozen_config
from isthmus.trainer.engine.deepspeed_workarounds import load_deepspeed, parameters_on_meta
from isthmus.trainer.frozen.node_cache import WEIGHT_FILES, local_folder
from isthmus.trainer.frozen.range_cache import RangeCache
from isthmus.trainer.frozen.safetensors_index import FrozenWeightsError, TensorEntry, read_entries

if TYPE_CHECKING:
    from isthmus.model.frozen.language import LanguageModel

logger = logging.getLogger(__name__)
PIECE_BYTES = 32 << 20
READ_THREADS = 4
_M_MMAP_THRESHOLD = -3
_MMAP_THRESHOLD_BYTES = 256 << 10


@dataclass(frozen=True)
class LoadReport:
    """What loading cost this rank."""

    bytes_read: int
    bytes_cached: int
    """Of these, how many came from this node's cache."""
    bytes_total: int
    """Bytes of all tensors of the model in its files."""
    seconds: float


def load_frozen_lm(
    config: LanguageConfig,
    folder_url: str,
    store: ObjectStore,
    rank: Rank,
    deepspeed: str | dict[str, Any] = "stage2_zero3",
) -> nn.Module:
    """Build the frozen language model and load this rank's part of it. Collective; needs the process group.

    The result fetches the weights of each of its modules when that module runs, forward and backward. All ranks
    must therefore run the same modules in the same order.

    Args:
        config: Architecture options and storage type.
        folder_url: Hugging Face folder, local or in an object store.
        store: Access to it.
        rank: Place of this process.
        deepspeed: The stage's template, by name, path or content; its section `frozen` holds here.

    Raises:
        FrozenWeightsError: the files are damaged, or a tensor is missing, extra or of another shape.
    """
    language, entries = _skeleton(config, folder_url, store)
    dtype = getattr(torch, config.torch_dtype)
    module, report = shard(language, language.weight_names, entries, store, dtype, frozen_config(deepspeed))
    logger.info(
        "rank %d read %.1f of %.1f MB of %s in %.1f s, %.1f MB of them from this node's cache",
        rank.rank, report.bytes_read / 1e6, report.bytes_total / 1e6, folder_url, report.seconds,
        report.bytes_cached / 1e6,
    )  # fmt: skip
    return module


def check_frozen_lm(config: LanguageConfig, folder_url: str, store: ObjectStore) -> None:
    """Check that the files hold what the architecture needs, reading their headers only.

    Raises:
        FrozenWeightsError, ModelError: as `load_frozen_lm`.
    """
    language, entries = _skeleton(config, folder_url, store)
    _match(language, language.weight_names, entries)


def _skeleton(
    config: LanguageConfig, folder_url: str, store: ObjectStore
) -> tuple["LanguageModel", dict[str, TensorEntry]]:
    """Return the model without contents, and the tensors of its files."""
    from isthmus.model.frozen.language import build_language  # noqa: PLC0415 - imports transformers, which takes seconds

    entries = read_entries(folder_url, store)
    folder = local_folder(folder_url, store, leave_out=WEIGHT_FILES)
    with parameters_on_meta():
        return build_language(config, folder, entries), entries


def shard(
    skeleton: nn.Module,
    weight_names: dict[str, str],
    entries: dict[str, TensorEntry],
    store: ObjectStore,
    dtype: torch.dtype,
    deepspeed: dict[str, Any],
) -> tuple[nn.Module, LoadReport]:
    """Turn every parameter of a skeleton into a ZeRO-3 partition, fill it from its tensor, install the fetching hooks.

    Args:
        skeleton: Module whose parameters have shapes but no contents (`parameters_on_meta`).
        weight_names: Parameter name, as in `named_parameters`, to tensor name; shared parameters once.
        entries: Tensor name to place.
        store: Access to the files.
        dtype: Storage type of the partitions.
        deepspeed: Configuration of the partitions (`frozen_config`).

    Raises:
        FrozenWeightsError: a tensor is missing or of another shape; all are named.
    """
    began = time.monotonic()
    return_freed_memory()
    chosen = _match(skeleton, weight_names, entries)
    _partition(skeleton, deepspeed, _kept_in_fp32(skeleton, dtype), dtype)
    partitions = {name: cast(Any, parameter) for name, parameter in skeleton.named_parameters()}
    jobs = [piece for name, entry in chosen.items() for piece in _pieces(partitions[name], entry)]
    cache = RangeCache(store)
    bytes_read = _fill(jobs, cache)
    for module in skeleton.modules():
        if isinstance(module, nn.Linear):
            _save_no_weights(module)
    engine, *_ = load_deepspeed().initialize(model=skeleton, config=deepspeed, dist_init_required=False)
    # Not a submodule: the engine's hooks go when the engine does, so it must live as long as the model.
    object.__setattr__(skeleton, "partitioning", engine.optimizer)
    object.__setattr__(skeleton, "partitioning_engine", engine)
    skeleton.register_forward_pre_hook(lambda *_: engine.optimizer.release_backward_leftovers(), prepend=True)
    total = sum(entry.num_bytes for entry in chosen.values())
    return skeleton, LoadReport(bytes_read, cache.num_cached_bytes, total, time.monotonic() - began)


def return_freed_memory() -> None:
    """Make glibc return every freed buffer above 256 KiB to the system, as MALLOC_MMAP_THRESHOLD_ does.

    By default it raises this threshold up to 32 MiB as buffers are freed and keeps their memory: gathered ZeRO-3
    weights on the CPU would stay resident.
    """
    if sys.platform == "linux":
        mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
        if mallopt is not None:  # musl has none
            mallopt(_M_MMAP_THRESHOLD, _MMAP_THRESHOLD_BYTES)


def _match(
    skeleton: nn.Module, weight_names: dict[str, str], entries: dict[str, TensorEntry]
) -> dict[str, TensorEntry]:
    """Return the tensor of each parameter, after all shapes have been checked."""
    shapes = {name: tuple(parameter.shape) for name, parameter in skeleton.named_parameters()}
    missing = sorted(name for name in shapes if weight_names.get(name) not in entries)
    if missing:
        raise FrozenWeightsError(
            f"no tensor in the files for {', '.join(missing)}; config.json and weights do not match"
        )
    chosen = {name: entries[weight_names[name]] for name in shapes}
    changed = [
        f"{entry.name} in {entry.url} has shape {entry.shape}, the model needs {shapes[name]}"
        for name, entry in chosen.items()
        if entry.shape != shapes[name]
    ]
    if changed:
        raise FrozenWeightsError("; ".join(changed) + "; config and weights do not match")
    return chosen


def _kept_in_fp32(module: nn.Module, dtype: torch.dtype) -> Callable[[str], bool]:
    """Return which parameters stay fp32 in fp16: those in which the architecture's activations overflow (T5's wo)."""
    kept: set[str] = set()
    if dtype is torch.float16:
        for part in module.modules():
            kept.update(getattr(part, "_keep_in_fp32_modules", None) or ())
    return lambda name: not kept.isdisjoint(name.split("."))


def _partition(skeleton: nn.Module, config: dict[str, Any], kept: Callable[[str], bool], dtype: torch.dtype) -> None:
    """Replace every parameter by an empty ZeRO-3 partition; shared parameters stay shared.

    DeepSpeed's own way allocates each tensor in full and broadcasts it. The contents come from the files, so
    this one takes its conversion, without the broadcast.
    """
    init = load_deepspeed().zero.Init(config_dict_or_path=config)
    made: dict[int, nn.Parameter] = {}
    for prefix, module in skeleton.named_modules():
        for leaf, parameter in list(module._parameters.items()):
            if parameter is None:
                continue
            if id(parameter) not in made:
                wanted = torch.float32 if kept(f"{prefix}.{leaf}") else dtype
                empty = torch.empty(parameter.shape, dtype=wanted, device=init.local_device)
                partition: Any = nn.Parameter(empty, requires_grad=False)
                init._convert_to_deepspeed_param(partition)
                partition.partition()
                partition.ds_secondary_tensor = None  # hpZ makes its second copy from the first fetch
                made[id(parameter)] = partition
            module._parameters[leaf] = made[id(parameter)]


@dataclass(frozen=True)
class _Piece:
    """Consecutive elements of a tensor in a file and where they go."""

    entry: TensorEntry
    first: int
    target: Tensor


def _pieces(parameter: Any, entry: TensorEntry) -> Iterator[_Piece]:
    """Cut this rank's part of a tensor into pieces of bounded size."""
    part = parameter.ds_tensor.ds_numel
    begin = part * dist.get_rank(parameter.ds_process_group)
    length = max(0, min(part, entry.num_elements - begin))
    step = PIECE_BYTES // max(entry.dtype.itemsize, parameter.ds_tensor.element_size())
    with torch.no_grad():
        parameter.ds_tensor[length:].zero_()
    for first in range(0, length, step):
        target = parameter.ds_tensor.detach()[first : min(first + step, length)]
        yield _Piece(entry, begin + first, target)


def _fill(pieces: list[_Piece], cache: RangeCache) -> int:
    """Read all pieces, a few at a time; return the bytes read."""
    if sys.byteorder != "little":
        raise FrozenWeightsError("safetensors files are little-endian and this machine is not")
    with ThreadPoolExecutor(READ_THREADS, thread_name_prefix="frozen") as pool:
        return sum(pool.map(lambda piece: _read(piece, cache), pieces))


def _read(piece: _Piece, cache: RangeCache) -> int:
    """Read one piece into its place, by way of a buffer only where type or device differ."""
    entry, target = piece.entry, piece.target
    in_place = target.dtype == entry.dtype and target.device.type == "cpu"
    buffer = target if in_place else torch.empty(target.numel(), dtype=entry.dtype)
    num_bytes = buffer.numel() * entry.dtype.itemsize
    start = entry.start + piece.first * entry.dtype.itemsize
    view = memoryview(buffer.view(torch.uint8).numpy().data)
    cache.read(entry.url, entry.etag, start, view)
    if not in_place:
        target.copy_(buffer)
    return num_bytes


class _FrozenLinear(torch.autograd.Function):
    """Linear map that keeps only a reference to its weight for backward.

    The ordinary one keeps a view of the gathered weight alive, so forward would end up holding the whole model; and
    its input, which only a weight gradient would need.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(weight)
        return F.linear(x, weight, bias)

    @staticmethod
    def backward(ctx: FunctionCtx, *grads: Any) -> tuple[Tensor, None, None]:
        (grad,) = grads
        (weight,) = ctx.saved_tensors  # type: ignore[attr-defined]
        return grad @ weight.to(grad.dtype), None, None


def _save_no_weights(linear: nn.Linear) -> None:
    def forward(x: Tensor) -> Tensor:
        return cast(Tensor, _FrozenLinear.apply(x, linear.weight, linear.bias))  # type: ignore[no-untyped-call]

    linear.forward = forward  # type: ignore[method-assign, assignment]
