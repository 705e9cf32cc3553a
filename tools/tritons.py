"""Installs the Tritons beside the one of the virtual environment for which kernels are compiled in CI.

One folder each under .venv/tritons, named by version; a process that finds it first on its path (PYTHONPATH) uses it.
tools/tritons/<version>.txt pins each with the hashes of all its builds and no address. About 200 MB each to download.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PINS = ROOT / "tools" / "tritons"
FOLDERS = ROOT / ".venv" / "tritons"


def missing(pins: Path, folders: Path) -> list[Path]:
    """Pins without a folder. A folder gets its name when all is in it, so one that is there is whole."""
    return [pin for pin in sorted(pins.glob("*.txt")) if not (folders / pin.stem).is_dir()]


def install(pin: Path, folders: Path) -> None:
    """Into folders / version. CalledProcessError when the installer fails; it has said why."""
    partial = folders / f"{pin.stem}.partial"
    shutil.rmtree(partial, ignore_errors=True)
    command = [
        str(Path(sys.executable).with_name("uv")), "pip", "install", "--quiet", "--no-deps", "--require-hashes",
        "--python", sys.executable, "--target", str(partial), "--requirement", str(pin),
    ]  # fmt: skip
    subprocess.run(command, check=True)
    partial.rename(folders / pin.stem)


def main() -> int:
    for pin in missing(PINS, FOLDERS):
        print(f"kernels: installing Triton {pin.stem} (about 200 MB)", flush=True)
        try:
            install(pin, FOLDERS)
        except subprocess.CalledProcessError as error:
            print(f"kernels: Triton {pin.stem} could not be installed; see above, then run this again")
            return error.returncode
    return 0


if __name__ == "__main__":
    sys.exit(main())
