"""Page hashes are the identity of KV: equal exactly when everything before and inside the page is equal."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from baton_common.hashing import (
    HASH_BYTES,
    chain_root,
    extend_chain,
    page_hashes,
    salted_root,
    token_bytes,
    tokens_from_bytes,
)

ROOT = chain_root("digest")
tokens = st.lists(st.integers(0, 2**31 - 1), max_size=40)


def test_only_full_pages_have_a_hash() -> None:
    assert page_hashes(ROOT, range(7), 8) == []
    assert len(page_hashes(ROOT, range(17), 8)) == 2
    assert all(len(digest) == HASH_BYTES for digest in page_hashes(ROOT, range(17), 8))


@given(tokens, tokens)
def test_hashes_agree_exactly_on_the_common_full_pages(left: list[int], right: list[int]) -> None:
    ours, theirs = page_hashes(ROOT, left, 4), page_hashes(ROOT, right, 4)
    for index, (a, b) in enumerate(zip(ours, theirs, strict=False)):
        end = 4 * (index + 1)
        assert (a == b) == (left[:end] == right[:end])


@given(tokens, st.integers(0, 10))
def test_a_chain_can_be_extended_page_by_page(values: list[int], cut: int) -> None:
    whole = page_hashes(ROOT, values, 4)
    head = whole[:cut]
    parent = head[-1] if head else ROOT
    rest = values[4 * len(head) : 4 * len(whole)]
    assert head + extend_chain(parent, rest, 4) == whole


def test_extending_by_a_partial_page_is_refused() -> None:
    with pytest.raises(ValueError, match="3 tokens are no whole pages of 4"):
        extend_chain(ROOT, [1, 2, 3], 4)


def test_what_the_kv_depends_on_seeds_the_chain() -> None:
    roots = {
        ROOT,
        chain_root("other"),
        chain_root("digest", weights_epoch=1),
        chain_root("digest", adapter="a"),
        salted_root(ROOT, "tenant"),
        salted_root(ROOT, "tenant2"),
    }
    assert len(roots) == 6
    assert salted_root(ROOT, "") == ROOT


@given(tokens)
def test_tokens_travel_as_little_endian_int32(values: list[int]) -> None:
    raw = token_bytes(values)
    assert raw == b"".join(value.to_bytes(4, "little") for value in values)
    assert tokens_from_bytes(raw) == values


def test_a_torn_token_string_is_refused() -> None:
    with pytest.raises(ValueError, match="multiple"):
        tokens_from_bytes(b"\x01\x02\x03")
