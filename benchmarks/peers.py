"""The environment of the peers from PyPI, apart from the product's, so that they never constrain its pins.

    python -m benchmarks.peers

makes `.cache/peers` from peers.txt, or leaves it where that has not changed, and prints its Python.
"""

import hashlib
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / ".cache" / "peers"
REQUIREMENTS = ROOT / "benchmarks" / "peers.txt"
LIMIT_SECONDS = 1800


def make_environment() -> str:
    """Make the environment if need be; return the path of its Python."""
    python, stamp = FOLDER / "bin" / "python", FOLDER / "stamp"
    wanted = hashlib.sha256(REQUIREMENTS.read_bytes()).hexdigest()
    if stamp.exists() and stamp.read_text() == wanted:
        return str(python)
    subprocess.run([sys.executable, "-m", "venv", "--clear", str(FOLDER)], check=True, timeout=LIMIT_SECONDS)
    # --no-deps: torchvision asks for its own torch, with CUDA; its Python part runs beside the product's.
    pip = [str(python), "-m", "pip", "install", "-qq", "--no-deps", "-r", str(REQUIREMENTS)]
    subprocess.run(pip, check=True, timeout=LIMIT_SECONDS)
    site = next((FOLDER / "lib").glob("python*/site-packages"))
    beside = [path for path in sys.path if path.endswith("site-packages")]  # torch, Pillow and what they need
    (site / "product.pth").write_text("".join(f"{path}\n" for path in beside))
    stamp.write_text(wanted)
    return str(python)


if __name__ == "__main__":
    print(make_environment())
