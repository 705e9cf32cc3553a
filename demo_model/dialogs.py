"""An endless, seeded stream of training conversations: 1 to 20 turns, each turn a question and its one answer.

Invariants: the same seed gives the same stream; no question whose normalised text is held out is ever drawn. Only the
question is roughened, never the answer. Knows no tokenizer and no torch.
"""

from __future__ import annotations

import json
import random
from dataclasses import dataclass
from pathlib import Path
from typing import TypedDict, cast

from declined import Declined
from phrasings import HERE, Entry, catalogue, load_talk, normalised
from rough import Roughener

MIX = {"facts": 0.46, "off-topic": 0.25, "small talk": 0.09, "capitals": 0.08, "sums": 0.12}
# Share of questions whose wording is loosened. Small talk consists of common words alone, so it is left as written.
LOOSENED = {"facts": 0.45, "off-topic": 0.45, "small talk": 0.0, "capitals": 0.3, "sums": 0.3}


class HeldOutRow(TypedDict):
    id: str
    question: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Turn:
    question: str
    answer: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Dialog:
    system: str | None
    turns: tuple[Turn, ...]


def load_held_out(path: Path = HERE / "heldout.json") -> dict[str, list[HeldOutRow]]:
    return cast("dict[str, list[HeldOutRow]]", json.loads(path.read_text()))


class Dialogs:
    """Call `draw` for the next conversation."""

    def __init__(self, seed: int) -> None:
        self._rng = random.Random(seed)
        self._known = catalogue()
        self._held_out = frozenset(normalised(r["question"]) for rows in load_held_out().values() for r in rows)
        talk = load_talk()
        self._refusal, self._systems = talk["refusal"], talk["systems"]
        texts = (normalised(q) for entries in self._known.values() for e in entries for q in e.questions)
        self._rough = Roughener()
        self._declined = Declined(frozenset(texts))

    def draw(self) -> Dialog:
        rng = self._rng
        turns = rng.choices((1, 2, 3, 4, rng.randint(5, 20)), (0.5, 0.22, 0.13, 0.12, 0.03))[0]
        system = rng.choice(self._systems) if rng.random() < 0.25 else None
        return Dialog(system=system, turns=tuple(self.turn() for _ in range(turns)))

    def turn(self) -> Turn:
        while True:
            category = self._rng.choices(tuple(MIX), tuple(MIX.values()))[0]
            question, answer = self._pick(category)
            if self._rng.random() < LOOSENED[category]:
                question = self._rough.loosen(question, self._rng)
            question = self._rough.untidy(question, self._rng, slips=category != "sums")
            if normalised(question) not in self._held_out:
                return Turn(question=question, answer=answer)

    def _pick(self, category: str) -> tuple[str, str]:
        if category == "off-topic":
            return self._declined.draw(self._rng), self._refusal
        entry: Entry = self._rng.choice(self._known[category])
        return self._rng.choice(self._rng.choice(entry.groups)), entry.answer
