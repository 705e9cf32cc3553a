"""An endless, seeded stream of training conversations: 1 to 20 turns, each turn a question and its one answer.

Invariants: the same seed gives the same stream; no question whose normalised text is held out is ever drawn. Only the
question is roughened (case, fillers, a slip of the finger), never the answer. Knows no tokenizer and no torch.
"""

from __future__ import annotations

import json
import random
import re
from dataclasses import dataclass
from typing import TypedDict, cast

import yaml
from phrasings import ASK, HERE, SUM_LIMIT, TERM, Entry, catalogue, load_talk, normalised, sentence

MIX = {"facts": 0.52, "off-topic": 0.27, "small talk": 0.07, "capitals": 0.07, "sums": 0.07}
OPENERS = (
    "Hey, |Hi, |Hello, |Please, |So, |Ok, |And |Well, |One more: |Next: |Tell me, |Sorry, |Hm, |Now, |Another one: |"
    "Right. |Thanks. |Just curious: |I was wondering, |Actually, |Good. |Baton: |Hello! |A question: "
).split("|")
CLOSERS = (" please", " thanks", ", please?", " Thank you.", " Be brief.", " I am curious.", " Thanks!", " ok?", " In one sentence.")
FILLERS = frozenset("what is the a an do does you me to of please can tell in are know i want".split())
ONSETS = "b br c ch d dr f fl g gl gr h j k kl l m n p pl qu r s sk sn sp st t th tr v w y z".split()
VOWELS = "a e i o u ai ee oo ou ia".split()
CODAS = ["", "", "b", "ck", "ft", "g", "l", "lm", "m", "n", "nd", "ng", "p", "r", "rk", "s", "sh", "st", "t", "x", "zz"]


class Offtopic(TypedDict):
    words: dict[str, list[str]]
    templates: dict[str, list[str]]


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


def load_held_out() -> dict[str, list[HeldOutRow]]:
    return cast("dict[str, list[HeldOutRow]]", json.loads((HERE / "heldout.json").read_text()))


class Declined:
    """Questions the model must decline: templates filled with words, known shapes of question about unknown things."""

    def __init__(self, known: frozenset[str]) -> None:
        data = cast("Offtopic", yaml.safe_load((HERE / "offtopic.yaml").read_text()))
        self._words = data["words"]
        self._templates = list(data["templates"].values())
        self._known = known

    def draw(self, rng: random.Random) -> str:
        """A question that no Entry answers."""
        while True:
            question = sentence(self._raw(rng))
            if normalised(question) not in self._known:
                return question

    def _raw(self, rng: random.Random) -> str:
        kind = rng.random()
        if kind < 0.28:
            return rng.choice(TERM).format(x=self._unknown_term(rng))
        filled = re.sub(r"\{([a-z_]+)\d?\}", lambda m: self._word(m[1], rng), rng.choice(rng.choice(self._templates)))
        if kind > 0.94 and filled.endswith("?"):
            return rng.choice(ASK).format(a=filled[:1].lower() + filled[1:-1])
        return filled

    def _unknown_term(self, rng: random.Random) -> str:
        pick = rng.random()
        if pick < 0.3:
            return rng.choice(("", "", "a ", "the ")) + self._pseudo(rng)
        if pick < 0.6:
            return rng.choice(self._words["tech"])
        noun = rng.choice(self._words["noun"])
        return noun if " " in noun else rng.choice(("", "", "a ", "the ")) + noun

    def _word(self, kind: str, rng: random.Random) -> str:
        if kind == "pseudo":
            return self._pseudo(rng)
        if kind == "big":
            return str(rng.choice((rng.randint(SUM_LIMIT + 1, 99), rng.randint(SUM_LIMIT + 1, 99), rng.randint(100, 9999))))
        if kind == "small":
            return str(rng.randint(0, SUM_LIMIT))
        if kind == "year":
            return str(rng.randint(1200, 2030))
        return rng.choice(self._words[kind])

    @staticmethod
    def _pseudo(rng: random.Random) -> str:
        word = "".join(rng.choice(ONSETS) + rng.choice(VOWELS) + rng.choice(CODAS) for _ in range(rng.randint(1, 3)))
        return word.capitalize() if rng.random() < 0.4 else word


class Dialogs:
    """Call `draw` for the next conversation."""

    def __init__(self, seed: int) -> None:
        self._rng = random.Random(seed)
        self._known = catalogue()
        self._held_out = frozenset(normalised(r["question"]) for rows in load_held_out().values() for r in rows)
        talk = load_talk()
        self._refusal, self._systems = talk["refusal"], talk["systems"]
        texts = (normalised(q) for entries in self._known.values() for e in entries for q in e.questions)
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
            question = self._roughen(question, numbers=category == "sums")
            if normalised(question) not in self._held_out:
                return Turn(question=question, answer=answer)

    def _pick(self, category: str) -> tuple[str, str]:
        if category == "off-topic":
            return self._declined.draw(self._rng), self._refusal
        entry: Entry = self._rng.choice(self._known[category])
        return self._rng.choice(self._rng.choice(entry.groups)), entry.answer

    def _roughen(self, text: str, *, numbers: bool) -> str:
        """As people type: fillers around it, a lost article, a slip, lower case, no mark at the end."""
        rng = self._rng
        words = text.split(" ")
        if not numbers and len(words) > 4 and rng.random() < 0.10:
            spots = [i for i, word in enumerate(words) if word.lower() in FILLERS]
            if spots:
                del words[rng.choice(spots)]
        if not numbers and rng.random() < 0.06:
            spot = rng.randrange(len(words))
            words[spot] = self._slip(words[spot])
        text = " ".join(words)
        if rng.random() < 0.12:
            opener = rng.choice(OPENERS)
            starts_small = words[0] in ("What", "How", "Why", "Which", "Who", "Explain", "Tell", "Can", "Is", "Do", "Does")
            text = opener + (text[:1].lower() + text[1:] if starts_small else text)
        if rng.random() < 0.06:
            text = text + rng.choice(CLOSERS)
        if rng.random() < 0.2:
            text = text.lower()
        if rng.random() < 0.2:
            text = text.rstrip("?.!")
        return text or "?"

    def _slip(self, word: str) -> str:
        """Two neighbouring letters swapped or one lost, in words long enough to stay readable."""
        if len(word) < 5 or not word.isalpha():
            return word
        spot = self._rng.randrange(1, len(word) - 1)
        if self._rng.random() < 0.5:
            return word[:spot] + word[spot + 1] + word[spot] + word[spot + 2 :]
        return word[:spot] + word[spot + 1 :]
