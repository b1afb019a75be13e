"""A temporary folder for large files: what a killed process leaves of it, the next process removes."""

import contextlib
import fcntl
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def scratch_folder(prefix: str) -> Iterator[Path]:
    """Yield an empty folder among the system's temporary files; it is removed at the end.

    Args:
        prefix: Its name begins with this. Folders of the same prefix whose process is gone are removed.
    """
    for folder in Path(tempfile.gettempdir()).glob(f"{prefix}*/"):
        with contextlib.suppress(OSError), _locked(folder):  # held by its process, or of another user
            shutil.rmtree(folder)
    new = Path(tempfile.mkdtemp())
    with _locked(new):
        folder = new.rename(new.with_name(f"{prefix}{new.name}"))  # only now: others may look at it
        try:
            yield folder
        finally:
            shutil.rmtree(folder)


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Lock a folder until the block or the process ends.

    Raises:
        OSError: another process holds it.
    """
    descriptor = os.open(folder, os.O_RDONLY | os.O_NOFOLLOW)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    finally:
        os.close(descriptor)
