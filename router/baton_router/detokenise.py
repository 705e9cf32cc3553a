"""Token ids to text, one id at a time.

Promise: the concatenated pieces equal `tokenizer.decode(all ids)`, no piece ends in half a character, and a replacement
character is only emitted once the bytes behind it can no longer become anything else. O(1) per token: the text of an
id is looked up in a table that fills itself, `decode` is only called for ids never seen before.

Three families, told apart by the tokeniser's decoder: byte-level BPE (ids are byte strings), pieces (SentencePiece,
with byte fallback and a leading space that only the first piece loses), and anything else (decoded whole each time).
It does not know requests, stop strings or JSON.
"""

from __future__ import annotations

import codecs
import json
from collections.abc import Sequence
from enum import Enum
from typing import Protocol

from tokenizers import Tokenizer

REPLACEMENT = "\ufffd"
_PIECE_STEPS = frozenset({"Replace", "ByteFallback", "Fuse", "Strip", "Metaspace"})


class Family(Enum):
    BYTES = "bytes"
    PIECES = "pieces"
    WHOLE = "whole"


class Detokeniser(Protocol):
    """Text of one growing sequence."""

    def push(self, token_id: int) -> str:
        """Text that this id settles; may be empty."""

    def flush(self) -> str:
        """What is still held back; the sequence is over."""


class Vocabulary:
    """Tables shared by all sequences of one tokeniser."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        document = json.loads(tokenizer.to_str())
        steps = _decoder_steps(document.get("decoder"))
        if steps == ["ByteLevel"]:
            self.family = Family.BYTES
        elif steps and _PIECE_STEPS.issuperset(steps):
            self.family = Family.PIECES
        else:
            self.family = Family.WHOLE
        self.special_ids = frozenset(item["id"] for item in document.get("added_tokens", ()) if item["special"])
        self._byte_fallback = "ByteFallback" in steps
        self._raw: dict[int, bytes] = {}
        self._pieces: dict[int, str | None] = {}
        self._anchor = self._find_anchor() if self.family is Family.PIECES else None
        if self.family is Family.PIECES and self._anchor is None:
            self.family = Family.WHOLE

    def raw(self, token_id: int) -> bytes:
        """Bytes of one id of a byte-level vocabulary; empty for an unknown id."""
        found = self._raw.get(token_id)
        if found is None:
            token = self.tokenizer.id_to_token(token_id)
            found = self._raw[token_id] = _byte_level_bytes(token) if token else b""
        return found

    def piece(self, token_id: int) -> str | None:
        """Text of one id inside a sequence of a piece vocabulary; None for a byte-fallback id."""
        if token_id in self._pieces:
            return self._pieces[token_id]
        token = self.tokenizer.id_to_token(token_id) or ""
        text = None if self._byte_fallback and _is_byte(token) else self.inside([token_id])
        self._pieces[token_id] = text
        return text

    def inside(self, ids: Sequence[int]) -> str:
        """Text of ids that follow something: a leading space stays."""
        if self._anchor is None:
            return self.start(ids)
        head, head_text = self._anchor
        return self.start([head, *ids])[len(head_text) :]

    def start(self, ids: Sequence[int]) -> str:
        """Text of ids at the start of a sequence."""
        text: str = self.tokenizer.decode(list(ids), skip_special_tokens=False)
        return text

    def token_text(self, token_id: int) -> tuple[str, bytes]:
        """How one id alone is shown in logprobs: text (with replacement characters) and true bytes."""
        if self.family is Family.BYTES:
            raw = self.raw(token_id)
            return raw.decode(errors="replace"), raw
        token = self.tokenizer.id_to_token(token_id) or ""
        if self._byte_fallback and _is_byte(token):
            raw = bytes([int(token[3:5], 16)])
            return raw.decode(errors="replace"), raw
        text = self.inside([token_id])
        return text, text.encode()

    def detokeniser(self, *, skip_special: bool = True, continues: bool = False) -> Detokeniser:
        """A fresh sequence. `continues`: it follows other text, so a leading space is kept."""
        skip = self.special_ids if skip_special else frozenset[int]()
        if self.family is Family.BYTES:
            return _ByteLevel(self, skip)
        if self.family is Family.PIECES:
            return _Pieces(self, skip, continues=continues)
        return _Whole(self, skip)

    def _find_anchor(self) -> tuple[int, str] | None:
        for token_id in range(min(self.tokenizer.get_vocab_size(), 4096)):
            token = self.tokenizer.id_to_token(token_id)
            if token and token.isascii() and token.isalpha() and token_id not in self.special_ids:
                return token_id, self.start([token_id])
        return None


class _ByteLevel:
    """Ids are byte strings: an incremental UTF-8 decoder does all that is needed."""

    def __init__(self, vocabulary: Vocabulary, skip: frozenset[int]) -> None:
        self._raw = vocabulary.raw
        self._skip = skip
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, token_id: int) -> str:
        if token_id in self._skip:
            return ""
        return self._utf8.decode(self._raw(token_id))

    def flush(self) -> str:
        return self._utf8.decode(b"", final=True)


class _Pieces:
    """Each id has a fixed text, except the first one (leading space) and runs of byte-fallback ids.

    A run is valid or invalid as a whole, so it is held back until it ends.
    """

    def __init__(self, vocabulary: Vocabulary, skip: frozenset[int], *, continues: bool) -> None:
        self._vocabulary = vocabulary
        self._skip = skip
        self._run: list[int] = []
        self._started = continues

    def push(self, token_id: int) -> str:
        if token_id in self._skip or self._vocabulary.tokenizer.id_to_token(token_id) is None:
            return ""
        piece = self._vocabulary.piece(token_id)
        if piece is None:
            self._run.append(token_id)
            return ""
        if self._run or not self._started:
            return self._settle([*self._run, token_id])
        return piece

    def flush(self) -> str:
        return self._settle(self._run) if self._run else ""

    def _settle(self, ids: list[int]) -> str:
        self._run = []
        if self._started:
            return self._vocabulary.inside(ids)
        self._started = True
        return self._vocabulary.start(ids)


class _Whole:
    """Decoder of unknown habits: decode everything again, emit what was added and can no longer change."""

    def __init__(self, vocabulary: Vocabulary, skip: frozenset[int]) -> None:
        self._vocabulary = vocabulary
        self._skip = skip
        self._ids: list[int] = []
        self._sent = ""

    def push(self, token_id: int) -> str:
        if token_id in self._skip:
            return ""
        self._ids.append(token_id)
        return self._advance(self._vocabulary.start(self._ids).rstrip(REPLACEMENT))

    def flush(self) -> str:
        return self._advance(self._vocabulary.start(self._ids))

    def _advance(self, text: str) -> str:
        if not text.startswith(self._sent):
            return ""
        added = text[len(self._sent) :]
        self._sent = text
        return added


def _decoder_steps(decoder: dict[str, object] | None) -> list[str]:
    if decoder is None:
        return []
    if decoder["type"] == "Sequence":
        inner = decoder["decoders"]
        assert isinstance(inner, list)
        return [step for part in inner for step in _decoder_steps(part)]
    return [str(decoder["type"])]


def _is_byte(token: str) -> bool:
    return len(token) == 6 and token.startswith("<0x") and token.endswith(">")


def _byte_alphabet() -> dict[str, int]:
    """GPT-2's printable stand-ins for the 256 bytes (openai/gpt-2, encoder.py)."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    table = {chr(byte): byte for byte in printable}
    table.update({chr(256 + index): byte for index, byte in enumerate(others)})
    return table


_ALPHABET = _byte_alphabet()


def _byte_level_bytes(token: str) -> bytes:
    """Added tokens may hold characters outside the alphabet; those stand for themselves."""
    try:
        return bytes([_ALPHABET[char] for char in token])
    except KeyError:
        return token.encode()
