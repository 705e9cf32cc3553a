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

TERM = (
    "What is {x}?|What's {x}?|Explain {x}.|Explain {x} to me.|Define {x}.|Tell me about {x}.|What does {x} mean?|"
    "What do you mean by {x}?|Can you explain {x}?|Could you explain {x}?|Please explain {x}.|Describe {x}.|"
    "Give me a definition of {x}.|I do not know what {x} is.|What is meant by {x}?|{x}?|{x}|What is {x} in Baton?|"
    "What is {x} for?|Do you know what {x} is?|How would you describe {x}?|Help me understand {x}.|"
    "I want to know what {x} is.|Tell me what {x} is.|Say something about {x}.|In short, what is {x}?|"
    "What exactly is {x}?|What should I know about {x}?|Teach me about {x}.|Can you tell me what {x} is?|"
    "What can you say about {x}?|I have a question about {x}.|Explain to me what {x} is.|{x}, please explain.|"
    "What is the role of {x}?|What is {x} about?|What is the idea behind {x}?|How should I understand {x}?|"
    "Where does {x} come in?|What is the use of {x}?|How is {x} used?|Any idea what {x} is?|So, {x}?"
).split("|")
HOW = (
    "How {q}?|Explain how {s}.|Tell me how {s}.|Can you explain how {s}?|I want to know how {s}.|In what way {q}?|"
    "Describe how {s}.|Do you know how {s}?|Please tell me how {s}.|How exactly {q}?|I do not understand how {s}."
).split("|")
WHY = (
    "Why {q}?|Explain why {s}.|Tell me why {s}.|Do you know why {s}?|How come {s}?|What is the reason that {s}?|"
    "Can you explain why {s}?|I wonder why {s}.|For what reason {q}?|Please explain why {s}.|Why exactly {q}?"
).split("|")
DO = (
    "How do I {d}?|How can I {d}?|How to {d}?|I want to {d}.|Show me how to {d}.|What is the best way to {d}?|"
    "Tell me how to {d}.|Help me {d}.|I would like to {d}. How?|What is the command to {d}?|How does one {d}?|"
    "Which command do I use to {d}?|What do I type to {d}?|What do I need to {d}?"
).split("|")
ASK = (
    "{a}?|Tell me, {a}?|Please tell me: {a}?|I have a question: {a}?|Hey, {a}?|Quick question: {a}?|In Baton, {a}?|"
    "Can you tell me, {a}?|I wonder, {a}?|Now {a}?|{a}, please?"
).split("|")
CAPITAL = (
    "What is the capital of {c}?|Capital of {c}?|What's the capital city of {c}?|Which city is the capital of {c}?|"
    "Tell me the capital of {c}.|Name the capital of {c}.|Do you know the capital of {c}?|{c}'s capital?|"
    "What city is {c}'s capital?|Please give me the capital of {c}.|I need the capital of {c}.|capital city of {c}|"
    "Can you name the capital of {c}?|What is the name of the capital of {c}?|The capital of {c}, please.|{c}: capital?"
).split("|")
SUM = (
    "{a} + {b}|What is {a} + {b}?|{a}+{b}|{a} plus {b}|What is {a} plus {b}?|How much is {a} + {b}?|Add {a} and {b}.|"
    "Calculate {a} + {b}.|{a} + {b} = ?|What's {a} + {b}?|Compute {a} + {b}.|What does {a} plus {b} make?|"
    "Can you add {a} and {b}?|What is the sum of {a} and {b}?|How much is {a} plus {b}?"
).split("|")


class FactRow(TypedDict, total=False):
    id: str
    a: str
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
    """First letter upper-case, unless the first word is a name with its own spelling (make up, /ready, baton_engine)."""
    word = text.split(" ")[0]
    spelled = any(c in word for c in "_/-") or text.startswith(("make ", "baton "))
    return text if spelled else text[:1].upper() + text[1:]


def normalised(text: str) -> str:
    """Case, spaces and punctuation at the ends do not make a phrasing different."""
    return re.sub(r"\s+", " ", text.lower()).strip(" ?.!,:;")


def load_facts() -> list[Section]:
    return cast("list[Section]", yaml.safe_load((HERE / "facts.yaml").read_text()))


def load_talk() -> Talk:
    return cast("Talk", yaml.safe_load((HERE / "talk.yaml").read_text()))


def _fact_groups(row: FactRow) -> Iterator[tuple[str, ...]]:
    yield tuple(sentence(t.format(x=name)) for name in row.get("names", []) for t in TERM)
    yield tuple(sentence(t.format(q=q, s=s)) for q, s in row.get("how", []) for t in HOW)
    yield tuple(sentence(t.format(q=q, s=s)) for q, s in row.get("why", []) for t in WHY)
    yield tuple(sentence(t.format(d=verb)) for verb in row.get("do", []) for t in DO)
    yield tuple(sentence(t.format(a=ask)) for ask in row.get("ask", []) for t in ASK)


def facts() -> list[Entry]:
    rows = [row for section in load_facts() for row in section["facts"]]
    return [Entry(id=r["id"], answer=r["a"], groups=tuple(g for g in _fact_groups(r) if g)) for r in rows]


def small_talk() -> list[Entry]:
    return [Entry(id=r["id"], answer=r["a"], groups=(tuple(r["ask"]),)) for r in load_talk()["small_talk"]]


def capital_answer(country: str, city: str) -> str:
    return f"The capital of {country} is {city}."


def capitals() -> list[Entry]:
    """One entry per country; "the" of a name is kept in the answer and is optional in the question."""
    entries = []
    for country, city in load_talk()["capitals"].items():
        names = dict.fromkeys((country, country.removeprefix("the ")))
        questions = tuple(sentence(t.format(c=name)) for name in names for t in CAPITAL)
        entries.append(Entry(id=country, answer=capital_answer(country, city), groups=(questions,)))
    return entries


def sum_answer(a: int, b: int) -> str:
    return f"{a} + {b} = {a + b}."


def sums() -> list[Entry]:
    """Every sum in the range: rows of a table to be memorised, not a skill."""
    return [
        Entry(id=f"{a}+{b}", answer=sum_answer(a, b), groups=(tuple(t.format(a=a, b=b) for t in SUM),))
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
