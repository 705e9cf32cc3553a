"""Training phrasings of the demo model: the facts, small talk, capitals and sums it knows, and what it must decline.

Invariants: everything here is deterministic; one question text never has two answers (`catalogue` refuses that); no
held-out question (heldout.json) is produced by it, which tests/demo_model checks. Knows no tokenizer and no torch.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TypedDict, cast

import yaml

HERE = Path(__file__).parent
SUM_LIMIT = 20


class Wordings(TypedDict):
    term: list[str]
    how: list[str]
    why: list[str]
    do: list[str]
    ask: list[str]
    capital: list[str]
    sum: list[str]
    openers: list[str]
    closers: list[str]
    onsets: list[str]
    vowels: list[str]
    codas: list[str]
    starts: list[str]
    common: list[str]


class FactRow(TypedDict, total=False):
    id: str
    title: str
    a: str
    now: str  # what is no longer so, for readers: not trained
    names: list[str]
    how: list[list[str]]
    why: list[list[str]]
    do: list[str]
    ask: list[str]


class Section(TypedDict):
    section: str
    facts: list[FactRow]


class SmallTalkRow(TypedDict):
    id: str
    a: str
    now: str  # what is no longer so, for readers: not trained
    ask: list[str]


class Talk(TypedDict):
    refusal: str
    small_talk: list[SmallTalkRow]
    capitals: dict[str, str]
    systems: list[str]


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """One answer and every training phrasing of its question, grouped by the kind of question."""

    id: str
    answer: str
    groups: tuple[tuple[str, ...], ...]

    @property
    def questions(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(question for group in self.groups for question in group))


def sentence(text: str) -> str:
    """First letter upper-case, unless the first word is a name with its own spelling (make up, /ready, top_p)."""
    word = text.split(" ", maxsplit=1)[0]
    spelled = any(c in word for c in "_/-") or text.startswith(("make ", "baton "))
    return text if spelled else text[:1].upper() + text[1:]


def normalised(text: str) -> str:
    """Case, spaces and punctuation at the ends do not make a phrasing different."""
    return re.sub(r"\s+", " ", text.lower()).strip(" ?.!,:;")


def load_wordings() -> Wordings:
    return cast("Wordings", yaml.safe_load((HERE / "templates.yaml").read_text()))


def load_facts() -> list[Section]:
    return cast("list[Section]", yaml.safe_load((HERE / "facts.yaml").read_text()))


def load_talk() -> Talk:
    return cast("Talk", yaml.safe_load((HERE / "talk.yaml").read_text()))


def _fact_groups(row: FactRow, wordings: Wordings) -> Iterator[tuple[str, ...]]:
    yield tuple(sentence(t.format(x=name)) for name in row.get("names", []) for t in wordings["term"])
    yield tuple(sentence(t.format(q=q, s=s)) for q, s in row.get("how", []) for t in wordings["how"])
    yield tuple(sentence(t.format(q=q, s=s)) for q, s in row.get("why", []) for t in wordings["why"])
    yield tuple(sentence(t.format(d=verb)) for verb in row.get("do", []) for t in wordings["do"])
    yield tuple(sentence(t.format(a=ask)) for ask in row.get("ask", []) for t in wordings["ask"])


def facts() -> list[Entry]:
    wordings = load_wordings()
    rows = [row for section in load_facts() for row in section["facts"]]
    return [Entry(id=r["id"], answer=r["a"], groups=tuple(g for g in _fact_groups(r, wordings) if g)) for r in rows]


def small_talk() -> list[Entry]:
    return [Entry(id=r["id"], answer=r["a"], groups=(tuple(r["ask"]),)) for r in load_talk()["small_talk"]]


def capital_answer(country: str, city: str) -> str:
    return f"The capital of {country} is {city}."


def capitals() -> list[Entry]:
    """One entry per country; "the" of a name is kept in the answer and is optional in the question."""
    entries, templates = [], load_wordings()["capital"]
    for country, city in load_talk()["capitals"].items():
        names = dict.fromkeys((country, country.removeprefix("the ")))
        questions = tuple(sentence(t.format(c=name)) for name in names for t in templates)
        entries.append(Entry(id=country, answer=capital_answer(country, city), groups=(questions,)))
    return entries


def sum_answer(a: int, b: int) -> str:
    return f"{a} + {b} = {a + b}."


def sums() -> list[Entry]:
    """Every sum in the range: rows of a table to be memorised, not a skill."""
    templates = load_wordings()["sum"]
    return [
        Entry(id=f"{a}+{b}", answer=sum_answer(a, b), groups=(tuple(t.format(a=a, b=b) for t in templates),))
        for a in range(SUM_LIMIT + 1)
        for b in range(SUM_LIMIT + 1)
    ]


def catalogue() -> dict[str, list[Entry]]:
    """All that the model knows, by category. Raises ValueError when one question would have two answers."""
    found = {"facts": facts(), "small talk": small_talk(), "capitals": capitals(), "sums": sums()}
    seen: dict[str, str] = {}
    for entries in found.values():
        for entry in entries:
            for question in entry.questions:
                if seen.setdefault(normalised(question) or question, entry.answer) != entry.answer:
                    raise ValueError(f"{question!r} has two answers; change one of the two rows")
    return found
