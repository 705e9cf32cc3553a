"""Questions as people type them: words lost, exchanged or added, slips of the finger, no capitals, no mark at the end.

Only words without a topic of their own are touched, so the answer stays the same. Knows no answers and no torch.
"""

from __future__ import annotations

import random

from phrasings import load_wordings


class Roughener:
    """`loosen` changes the wording, `untidy` the spelling and the surroundings. The caller owns the randomness."""

    def __init__(self) -> None:
        wordings = load_wordings()
        self._openers, self._closers, self._starts = wordings["openers"], wordings["closers"], wordings["starts"]
        self._common = wordings["common"]
        self._loose = frozenset(self._common)

    def loosen(self, text: str, rng: random.Random) -> str:
        """Common words dropped (1 in 4), exchanged (1 in 7) or put in (1 gap in 7); the topic's words stay in order."""
        words: list[str] = []
        for word in text.split(" "):
            if rng.random() < 0.14:
                words.append(rng.choice(self._common))
            if word.strip("?.,:!").lower() in self._loose:
                luck = rng.random()
                if luck < 0.25:
                    continue
                if luck < 0.40:
                    word = rng.choice(self._common)
            words.append(word)
        while rng.random() < 0.3:
            words.append(rng.choice(self._common))
        return " ".join(words)

    def untidy(self, text: str, rng: random.Random, *, slips: bool) -> str:
        words = text.split(" ")
        if slips and rng.random() < 0.06:
            spot = rng.randrange(len(words))
            words[spot] = slip(words[spot], rng)
        text = " ".join(words)
        if rng.random() < 0.12:
            opener = rng.choice(self._openers)
            text = opener + (text[:1].lower() + text[1:] if words[0] in self._starts else text)
        if rng.random() < 0.06:
            text = text + rng.choice(self._closers)
        if rng.random() < 0.2:
            text = text.lower()
        if rng.random() < 0.2:
            text = text.rstrip("?.!")
        return text or "?"


def slip(word: str, rng: random.Random) -> str:
    """Two neighbouring letters swapped or one lost, in words long enough to stay readable."""
    if len(word) < 5 or not word.isalpha():
        return word
    spot = rng.randrange(1, len(word) - 1)
    if rng.random() < 0.5:
        return word[:spot] + word[spot + 1] + word[spot] + word[spot + 2 :]
    return word[:spot] + word[spot + 1 :]
