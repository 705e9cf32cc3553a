"""Writes docs/handbook.md from facts.yaml, so that the demo model's answers and the handbook are one text.

python demo_model/handbook.py            # rewrite it;  --check only says whether it is current (exit 1 if not)
"""

from __future__ import annotations

import argparse
import sys

from phrasings import HERE, FactRow, load_facts

TARGET = HERE.parent / "docs" / "handbook.md"
PREFACE = """# Handbook: Baton in short answers

One line for each thing worth knowing, by topic. Written by `demo_model/handbook.py` from `demo_model/facts.yaml`:
change that file, not this one. The demo model that `make up` serves learned these answers word for word; *what changed
after it was trained* is added in italics.
"""
NOTES = {
    "Kubernetes": "This part says how Baton is designed to run on a cluster.",
    "Words of serving": "General terms of language model serving; not every one is a feature of this release.",
}


def title(row: FactRow) -> str:
    """What the line is about: its own title, else what one does, else its first name."""
    if "title" in row:
        return row["title"]
    if row.get("do"):
        verb = row["do"][0]
        return f"To {verb}"
    if row.get("names"):
        name = row["names"][0]
        for article in ("the ", "a ", "an "):
            name = name.removeprefix(article)
        return name if name[:1] == "/" or name.startswith(("make ", "baton ")) else name[:1].upper() + name[1:]
    return row["how"][0][1].capitalize()


def render() -> str:
    parts = [PREFACE]
    for section in load_facts():
        parts.append(f"\n## {section['section']}\n\n")
        if section["section"] in NOTES:
            parts.append(NOTES[section["section"]] + "\n\n")
        parts.append("| | |\n|---|---|\n")
        parts += [f"| **{title(row)}** | {answer(row).replace('|', chr(92) + '|')} |\n" for row in section["facts"]]
    return "".join(parts)


def answer(row: FactRow) -> str:
    return f"{row['a']} *{row['now']}*" if "now" in row else row["a"]


def main() -> None:
    parser = argparse.ArgumentParser(description="Write docs/handbook.md.")
    parser.add_argument("--check", action="store_true")
    if not parser.parse_args().check:
        TARGET.write_text(render())
    elif TARGET.read_text() != render():
        sys.exit("docs/handbook.md is out of date: run python demo_model/handbook.py")


if __name__ == "__main__":
    main()
