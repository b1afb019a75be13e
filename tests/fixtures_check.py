"""Compare with the numbers of the original code: `python -m tests.fixtures_check FOLDER...`.

A folder is one fixture, or holds several. Each case is printed with its largest deviation; 1 is returned on a failure.
"""

import logging
import sys
from collections.abc import Iterator
from pathlib import Path

import torch

from tests.fixtures_stage1 import check_stage1, is_stage1
from tests.fixtures_stage2 import check_stage2, is_stage2

KINDS = ((is_stage1, check_stage1), (is_stage2, check_stage2))


def fixtures_in(folder: Path) -> Iterator[Path]:
    """Yield the folders that are fixtures: this one, or those in it."""
    for place in (folder, *(sorted(path for path in folder.iterdir() if path.is_dir()))):
        if any(recognise(place) for recognise, _ in KINDS):
            yield place


def main(arguments: list[str]) -> int:
    """Check every fixture of the folders; return the exit code."""
    logging.getLogger("transformers").setLevel(logging.ERROR)
    torch.set_num_threads(1)
    failures = checked = 0
    for folder in (place for argument in arguments for place in fixtures_in(Path(argument))):
        print(folder)
        for recognise, check in KINDS:
            for found in check(folder) if recognise(folder) else ():
                if isinstance(found, str):
                    print(f"  ----  {found}")
                    continue
                good = found.deviation <= found.allowed
                failures, checked = failures + (not good), checked + 1
                print(
                    f"  {'ok  ' if good else 'FAIL'}  {found.case}: {found.deviation:.1e} (at most {found.allowed:.0e})"
                )
    print(f"{checked} comparisons, {failures} failures" if checked else f"no fixture in {arguments}")
    return 1 if failures or not checked else 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
