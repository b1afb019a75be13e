"""The style limits that ruff does not check: length of files and functions, files per folder, folders per package."""

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

MAX_FILE_LINES = 400
MAX_FUNCTION_LINES = 60
LONG_FUNCTION_LINES, MANY_PARAMETERS = 40, 7
"""Allowed where there is a reason, such as the options of a command; counted."""
MAX_FILES_PER_FOLDER = 14
MAX_FOLDERS_PER_PACKAGE = 8
PACKAGES = ("model", "data_pipeline", "trainer", "bootstrap", "cluster", "demo")
Function = ast.FunctionDef | ast.AsyncFunctionDef
VAGUE_NAMES = ("utils.py", "util.py", "helpers.py", "common.py", "misc.py")


def functions(path: Path) -> list[Function]:
    """Return the functions and methods of a file."""
    tree = ast.parse(path.read_text())
    return [node for node in ast.walk(tree) if isinstance(node, Function)]


def num_lines_of(function: Function) -> int:
    """Return the lines from `def` to the end."""
    return (function.end_lineno or function.lineno) - function.lineno + 1


def num_parameters(function: Function) -> int:
    """Return how many values a caller can give; `self` and `cls` are none."""
    arguments = function.args
    names = [argument.arg for argument in [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs]]
    return len([name for name in names if name not in ("self", "cls")])


def problems_of_file(path: Path) -> Iterator[str]:
    """Yield one line per limit that the file exceeds."""
    text = path.read_text()
    num_lines = len(text.splitlines())
    if num_lines > MAX_FILE_LINES:
        yield f"{path}: {num_lines} lines, at most {MAX_FILE_LINES}"
    if path.name in VAGUE_NAMES:
        yield f"{path}: name the file after what it does"
    for function in functions(path):
        if num_lines_of(function) > MAX_FUNCTION_LINES:
            length = f"{num_lines_of(function)} lines, at most {MAX_FUNCTION_LINES}"
            yield f"{path}:{function.lineno}: {function.name} has {length}"


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
    everything = [function for file in files for function in functions(file)]
    counts = {
        "files": len(files),
        "lines": sum(len(file.read_text().splitlines()) for file in files),
        f"functions over {LONG_FUNCTION_LINES} lines": sum(num_lines_of(f) > LONG_FUNCTION_LINES for f in everything),
        f"functions with over {MANY_PARAMETERS} parameters": sum(
            num_parameters(f) > MANY_PARAMETERS for f in everything
        ),
        "problems": len(found),
    }
    sys.stdout.write(f"style limits: {', '.join(f'{count} {name}' for name, count in counts.items())}\n")
    return 1 if found else 0


if __name__ == "__main__":
    raise SystemExit(main())
