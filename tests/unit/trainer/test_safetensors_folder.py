"""Headers of safetensors files: read like the library reads them, and never trusted."""

import json
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from isthmus.data_pipeline.store.object_store import ObjectStore
from isthmus.trainer.frozen.safetensors_index import INDEX_NAME, FrozenWeightsError, read_entries

pytestmark = pytest.mark.unit


def write(path: Path, header: Any, data: bytes = b"", *, length: int | None = None) -> None:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + data)


def field(begin: int, end: int, shape: list[Any], dtype: str = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


def test_finds_the_bytes_that_the_library_wrote(tmp_path: Path) -> None:
    tensors = {
        "a": torch.randn(3, 5),
        "b": torch.randn(7).to(torch.bfloat16),
        "c": torch.arange(4),
        "empty": torch.zeros(0, 3),
        "scalar": torch.tensor(2.5, dtype=torch.float16),
    }
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    store = ObjectStore()
    entries = read_entries(str(tmp_path), store)
    assert entries.keys() == tensors.keys()
    for name, tensor in tensors.items():
        entry = entries[name]
        assert (entry.dtype, entry.shape) == (tensor.dtype, tuple(tensor.shape))
        if entry.num_bytes:
            data = bytes(store.get_range(entry.url, entry.start, entry.num_bytes))
            assert torch.equal(torch.frombuffer(bytearray(data), dtype=entry.dtype).view(entry.shape), tensor)


def test_reads_the_files_of_an_index_and_no_others(tmp_path: Path) -> None:
    for name in ("one", "two", "stale"):
        save_file({name: torch.zeros(2)}, tmp_path / f"{name}.safetensors")
    weight_map = {"one": "one.safetensors", "two": "two.safetensors"}
    (tmp_path / INDEX_NAME).write_text(json.dumps({"weight_map": weight_map}))
    assert read_entries(str(tmp_path), ObjectStore()).keys() == {"one", "two"}
    (tmp_path / "two.safetensors").unlink()
    with pytest.raises(FrozenWeightsError, match=r"names two\.safetensors"):
        read_entries(str(tmp_path), ObjectStore())


@pytest.mark.parametrize("index", ["[]", "{", '{"weight_map": {}}', '{"weight_map": {"a": "../a.safetensors"}}'])
def test_bad_index_is_refused(tmp_path: Path, index: str) -> None:
    save_file({"a": torch.zeros(2)}, tmp_path / "a.safetensors")
    (tmp_path / INDEX_NAME).write_text(index)
    with pytest.raises(FrozenWeightsError, match=r"index\.json"):
        read_entries(str(tmp_path), ObjectStore())


@pytest.mark.parametrize(
    ("header", "data", "length"),
    [
        (b"", b"", 1 << 62),
        (b"{}", b"", 99),
        (b"not json", b"", None),
        ([1, 2], b"", None),
        ({"a": {}}, b"", None),
        ({"a": field(0, 16, [4])}, bytes(15), None),
        ({"a": field(0, 12, [4])}, bytes(16), None),
        ({"a": field(-16, 0, [4])}, bytes(16), None),
        ({"a": field(0, 16, [-2, -2])}, bytes(16), None),
        ({"a": field(0, 16, [4.0])}, bytes(16), None),
        ({"a": field(0, 16, [4], "F4096")}, bytes(16), None),
        ({"a": field(0, 16, [4]), "b": field(8, 24, [4])}, bytes(24), None),
        ({"a": field(0, 16, [True, 4])}, bytes(16), None),
        (b'{"a":' * 5000, b"", None),
    ],
)
def test_damaged_headers_are_refused_with_the_file(tmp_path: Path, header: Any, data: bytes, length: int) -> None:
    write(tmp_path / "bad.safetensors", header, data, length=length)
    with pytest.raises(FrozenWeightsError, match=r"bad\.safetensors"):
        read_entries(str(tmp_path), ObjectStore())


@settings(max_examples=60, deadline=None)
@given(position=st.integers(0, 200), byte=st.integers(0, 255))
def test_one_changed_header_byte_never_escapes(
    tmp_path_factory: pytest.TempPathFactory, position: int, byte: int
) -> None:
    folder = tmp_path_factory.mktemp("flip")
    save_file({"a": torch.zeros(3, 3), "b": torch.zeros(5)}, folder / "model.safetensors")
    data = bytearray((folder / "model.safetensors").read_bytes())
    data[position % len(data)] = byte
    (folder / "model.safetensors").write_bytes(data)
    try:
        entries = read_entries(str(folder), ObjectStore())
    except FrozenWeightsError:
        return
    assert all(e.start >= 0 and e.start + e.num_bytes <= len(data) for e in entries.values())


def test_same_tensor_in_two_files_is_refused(tmp_path: Path) -> None:
    for name in ("x", "y"):
        save_file({"a": torch.zeros(2)}, tmp_path / f"{name}.safetensors")
    with pytest.raises(FrozenWeightsError, match="tensor a is in"):
        read_entries(str(tmp_path), ObjectStore())


def test_folder_without_weights_says_so(tmp_path: Path) -> None:
    with pytest.raises(FrozenWeightsError, match="no \\*\\.safetensors"):
        read_entries(str(tmp_path), ObjectStore())
