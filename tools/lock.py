"""Writes constraints.txt: every version that any extra may need, on Python 3.11 to 3.13, with hashes and no addresses.

`make lock` keeps the versions that are there and adds what is missing; `make lock UPGRADE=--upgrade` takes the newest.
A lock file of uv's own would record the address of the index it came from, so this is a plain constraints file.

torch and triton keep their version but lose their hashes: PyTorch's index serves other builds of the same version (CPU,
each CUDA, ROCm) than PyPI does, and a hash would refuse exactly the build that fits the machine.
"""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SEVERAL_BUILDS = frozenset({"torch", "triton"})


def without_hashes(text: str, names: frozenset[str]) -> str:
    """The constraints `text` with the hash lines of the packages `names` removed."""
    kept: list[str] = []
    inside = False
    for line in text.splitlines():
        if not line.startswith(" "):
            inside = re.split(r"[=\s]", line, maxsplit=1)[0] in names
            line = line.removesuffix("\\").rstrip() if inside else line
        elif inside:
            continue
        kept.append(line)
    return "\n".join(kept) + "\n"


def main(arguments: list[str]) -> None:
    target = ROOT / "constraints.txt"
    command = [
        str(Path(sys.executable).with_name("uv")), "pip", "compile", "pyproject.toml", "--output-file", target.name,
        "--all-extras", "--universal", "--generate-hashes", "--no-header", "--no-annotate",
        "--no-emit-index-url", "--no-emit-find-links", "--quiet", *arguments,
    ]  # fmt: skip
    subprocess.run(command, cwd=ROOT, check=True)
    target.write_text(without_hashes(target.read_text(), SEVERAL_BUILDS))


if __name__ == "__main__":
    main(sys.argv[1:])
