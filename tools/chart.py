"""Copies what the chart needs from elsewhere into it: a chart is packed from its own folder only.

`python tools/chart.py` writes charts/baton/files; `--check` writes nothing and ends with 1 when something differs.
"""

from __future__ import annotations

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FILES = ROOT / "charts/baton/files"
SOURCES = {"crds": ROOT / "crds", "profiles": ROOT / "operator/baton_operator/profiles"}


def wanted() -> dict[Path, str]:
    """Every file that has to be there, with its content."""
    return {
        FILES / folder / file.name: file.read_text()
        for folder, source in SOURCES.items()
        for file in sorted(source.glob("*.yaml"))
    }


def present() -> dict[Path, str]:
    return {file: file.read_text() for folder in SOURCES for file in sorted((FILES / folder).glob("*"))}


def main(arguments: list[str]) -> int:
    want, have = wanted(), present()
    if "--check" in arguments:
        wrong = sorted(str(path.relative_to(ROOT)) for path in want | have if want.get(path) != have.get(path))
        if wrong:
            print(f"not as their sources: {', '.join(wrong)}; run python tools/chart.py", file=sys.stderr)
        return int(bool(wrong))
    for path in have.keys() - want.keys():
        path.unlink()
    for path, text in want.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
