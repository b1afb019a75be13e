"""The style limits that ruff does not check: length of files and functions, files per folder, folders per package."""

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

MAX_FILE_LINES = 400
MAX_FUNCTION_LINES = 60
MAX_FILES_PER_FOLDER = 14
MAX_FOLDERS_PER_PACKAGE = 8
PACKAGES = ("model", "data_pipeline", "trainer", "bootstrap", "cluster", "demo")
VAGUE_NAMES = ("utils.py", "util.py", "helpers.py", "common.py", "misc.py")


def problems_of_file(path: Path) -> Iterator[str]:
    """Yield one line per limit that the file exceeds."""
    text = path.read_text()
    num_lines = len(text.splitlines())
    if num_lines > MAX_FILE_LINES:
        yield f"{path}: {num_lines} lines, at most {MAX_FILE_LINES}"
    if path.name in VAGUE_NAMES:
        yield f"{path}: name the file after what it does"
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            length = (node.end_lineno or node.lineno) - node.lineno + 1
            if length > MAX_FUNCTION_LINES:
                yield f"{path}:{node.lineno}: {node.name} has {length} lines, at most {MAX_FUNCTION_LINES}"


def problems_of_package(root: Path) -> Iterator[str]:
    """Yield one line per limit that the package's folders exceed; `__init__.py` does not count as a file."""
    folders = {file.parent for file in root.rglob("*.py")} - {root}
    if len(folders) > MAX_FOLDERS_PER_PACKAGE:
        yield f"{root}: {len(folders)} folders, at most {MAX_FOLDERS_PER_PACKAGE}"
    for folder in sorted({root, *folders}):
        num_files = len(set(folder.glob("*.py")) - {folder / "__init__.py"})
        if num_files > MAX_FILES_PER_FOLDER:
            yield f"{folder}: {num_files} files, at most {MAX_FILES_PER_FOLDER}"


def main() -> int:
    """Print every exceeded limit; return 1 when there is one."""
    roots = [Path(package) for package in PACKAGES]
    files = [file for root in roots for file in sorted(root.rglob("*.py"))]
    found = [line for file in files for line in problems_of_file(file)]
    found += [line for root in roots for line in problems_of_package(root)]
    sys.stdout.writelines(f"{line}\n" for line in found)
    sys.stdout.write(f"style limits: {len(files)} files, {len(found)} problems\n")
    return 1 if found else 0


if __name__ == "__main__":
    raise SystemExit(main())
