"""Questions the demo model must decline: templates filled with words, known shapes of question about unknown things.

Invariant: no question drawn here is one that the catalogue answers. Knows no tokenizer and no torch.
"""

from __future__ import annotations

import random
import re
from typing import TypedDict, cast

import yaml
from phrasings import HERE, SUM_LIMIT, load_wordings, normalised, sentence

# Groups that lie close to what the model does know are drawn more often, so that the border is learned.
NEAR = {"capitals": 5, "sums": 4, "baton_unknown": 3, "technical": 2}


class Offtopic(TypedDict):
    words: dict[str, list[str]]
    templates: dict[str, list[str]]


class Declined:
    """Questions the model must decline: templates filled with words, known shapes of question about unknown things."""

    def __init__(self, known: frozenset[str]) -> None:
        data = cast("Offtopic", yaml.safe_load((HERE / "offtopic.yaml").read_text()))
        self._words = data["words"]
        self._wordings = load_wordings()
        self._templates = data["templates"]
        self._weights = [NEAR.get(group, 1) for group in data["templates"]]
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
            return rng.choice(self._wordings["term"]).format(x=self._unknown_term(rng))
        template = rng.choice(rng.choices(list(self._templates.values()), self._weights)[0])
        filled = re.sub(r"\{([a-z_]+)\d?\}", lambda m: self._word(m[1], rng), template)
        if kind > 0.94 and filled.endswith("?"):
            return rng.choice(self._wordings["ask"]).format(a=filled[:1].lower() + filled[1:-1])
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
            two, more, four = (rng.randint(*ends) for ends in ((SUM_LIMIT + 1, 99), (SUM_LIMIT + 1, 99), (100, 9999)))
            return str(rng.choice((two, more, four)))
        if kind == "small":
            return str(rng.randint(0, SUM_LIMIT))
        if kind == "year":
            return str(rng.randint(1200, 2030))
        return rng.choice(self._words[kind])

    def _pseudo(self, rng: random.Random) -> str:
        parts = (self._wordings["onsets"], self._wordings["vowels"], self._wordings["codas"])
        word = "".join(rng.choice(part) for _ in range(rng.randint(1, 3)) for part in parts)
        return word.capitalize() if rng.random() < 0.4 else word
