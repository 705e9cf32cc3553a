"""Incremental text equals the text of all ids, whatever the tokeniser and however random the ids."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from baton_router.detokenise import REPLACEMENT, Family, Vocabulary

WORDS = ["a", "b", "he", "llo", "wor", "ld", "é", "日", "😀", "\ufffd", "<", ">", "x y"]


def byte_level() -> Tokenizer:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = [("Ġ", "a"), ("h", "e"), ("ð", "Ł"), ("ðŁ", "ĺ")]
    vocab = {piece: index for index, piece in enumerate([*alphabet, *("".join(pair) for pair in merges)])}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return _with_added(tokenizer)


def _piece_vocab() -> dict[str, int]:
    pieces = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", *WORDS, *(f"▁{word}" for word in WORDS)]
    return {piece: index for index, piece in enumerate(pieces)}


def llama2_like() -> Tokenizer:
    tokenizer = Tokenizer(models.BPE(vocab=_piece_vocab(), merges=[], byte_fallback=True, unk_token="<unk>"))
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    tokenizer.decoder = decoders.Sequence(steps)
    return _with_added(tokenizer)


def gemma_like() -> Tokenizer:
    tokenizer = Tokenizer(models.BPE(vocab=_piece_vocab(), merges=[], byte_fallback=True, unk_token="<unk>"))
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    return _with_added(tokenizer)


def metaspace() -> Tokenizer:
    tokenizer = Tokenizer(models.BPE(vocab=_piece_vocab(), merges=[], unk_token="<unk>"))
    tokenizer.decoder = decoders.Metaspace()
    return _with_added(tokenizer)


def word_piece() -> Tokenizer:
    vocab = {piece: index for index, piece in enumerate(["[UNK]", "he", "##llo", "wor", "##ld", ".", ",", "don", "'"])}
    tokenizer = Tokenizer(models.WordPiece(vocab=vocab, unk_token="[UNK]"))
    tokenizer.decoder = decoders.WordPiece(cleanup=False)
    return _with_added(tokenizer)


def no_decoder() -> Tokenizer:
    return _with_added(Tokenizer(models.BPE(vocab=_piece_vocab(), merges=[], unk_token="<unk>")))


def _with_added(tokenizer: Tokenizer) -> Tokenizer:
    tokenizer.add_special_tokens([AddedToken("<|end|>", special=True, normalized=False)])
    tokenizer.add_tokens([AddedToken("<tool call>", special=False, normalized=False)])
    return tokenizer


MAKERS = {
    "byte level": (byte_level, Family.BYTES),
    "llama 2": (llama2_like, Family.PIECES),
    "gemma": (gemma_like, Family.PIECES),
    "metaspace": (metaspace, Family.PIECES),
    "word piece": (word_piece, Family.WHOLE),
    "no decoder": (no_decoder, Family.WHOLE),
}
VOCABULARIES = {name: Vocabulary(make()) for name, (make, _) in MAKERS.items()}


def pieces_of(
    vocabulary: Vocabulary, ids: Sequence[int], *, skip_special: bool = True, continues: bool = False
) -> list[str]:
    detokeniser = vocabulary.detokeniser(skip_special=skip_special, continues=continues)
    return [*(detokeniser.push(token_id) for token_id in ids), detokeniser.flush()]


@pytest.mark.parametrize("name", MAKERS)
def test_each_tokeniser_is_recognised(name: str) -> None:
    assert VOCABULARIES[name].family is MAKERS[name][1]


@pytest.mark.parametrize("skip_special", [True, False])
@pytest.mark.parametrize("name", MAKERS)
@given(data=st.data())
def test_pieces_add_up_to_the_decoded_whole(name: str, skip_special: bool, data: st.DataObject) -> None:
    vocabulary = VOCABULARIES[name]
    size = vocabulary.tokenizer.get_vocab_size()
    ids = data.draw(st.lists(st.integers(0, size + 2), max_size=24))  # a few ids nobody knows, too
    whole = vocabulary.tokenizer.decode(ids, skip_special_tokens=skip_special)
    assert "".join(pieces_of(vocabulary, ids, skip_special=skip_special)) == whole


@pytest.mark.parametrize("name", ["byte level", "llama 2", "gemma"])
@given(text=st.text(alphabet="aé日😀🏽 ", min_size=1, max_size=12))
def test_valid_text_never_shows_a_replacement_character(name: str, text: str) -> None:
    vocabulary = VOCABULARIES[name]
    pieces = pieces_of(vocabulary, spell(vocabulary, text), continues=True)
    assert "".join(pieces) == text
    assert not any(REPLACEMENT in piece for piece in pieces)


def spell(vocabulary: Vocabulary, text: str) -> list[int]:
    """One id per byte."""
    if vocabulary.family is Family.BYTES:
        by_byte = {vocabulary.raw(token_id): token_id for token_id in range(256)}
        return [by_byte[bytes([byte])] for byte in text.encode()]
    return [vocabulary.tokenizer.token_to_id(f"<0x{byte:02X}>") for byte in text.encode()]


def test_an_unfinished_character_shows_only_at_the_end() -> None:
    vocabulary = VOCABULARIES["byte level"]
    ids = spell(vocabulary, "a€")[:-1]
    assert pieces_of(vocabulary, ids) == ["a", "", "", REPLACEMENT]


def test_a_leading_space_is_dropped_at_the_start_of_an_answer_and_kept_in_a_continuation() -> None:
    vocabulary = VOCABULARIES["llama 2"]
    ids = [vocabulary.tokenizer.token_to_id(piece) for piece in ("▁he", "llo", "▁wor", "ld")]
    assert pieces_of(vocabulary, ids) == ["he", "llo", " wor", "ld", ""]
    assert pieces_of(vocabulary, ids, continues=True) == [" he", "llo", " wor", "ld", ""]


def test_single_tokens_have_text_and_true_bytes() -> None:
    vocabulary = VOCABULARIES["byte level"]
    euro = spell(vocabulary, "€")
    assert vocabulary.token_text(euro[0]) == (REPLACEMENT, b"\xe2")
    fallback = VOCABULARIES["llama 2"]
    assert fallback.token_text(fallback.tokenizer.token_to_id("<0xE2>")) == (REPLACEMENT, b"\xe2")
    assert fallback.token_text(fallback.tokenizer.token_to_id("▁he")) == (" he", b" he")
