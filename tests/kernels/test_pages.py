"""The digest of KV blocks: what changes it and what does not; and what the operation refuses to touch."""

from __future__ import annotations

from itertools import permutations
from math import inf, nan

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import assume, given

from baton_kernels import pages
from baton_kernels.capabilities import CPU, Capabilities, named
from baton_kernels.library import Library
from baton_kernels.oracle import Unsupported, choices
from baton_kernels.pages import PagesShape, Part, TorchPages, TritonPages, as_words, payload_digest, shape_of
from baton_kernels.pages.reference import FLOATS, row_keys, word_keys
from baton_kernels.rt.language import INTERPRETED
from baton_kernels.rt.program import InputError

interpreted = [
    pytest.mark.interpret,
    pytest.mark.skipif(not INTERPRETED, reason="runs with TRITON_INTERPRET=1: make kernels"),
]
IMPLEMENTATIONS = ["torch", pytest.param("triton", marks=interpreted)]
PART = Part(layers=(3, 5), heads=(1, 3), tokens=(30, 41))
KV, WORDS = 2, 4
SIZES = PART.shape(KV, WORDS)
CELLS = SIZES[0] * SIZES[1] * SIZES[2] * SIZES[3] * SIZES[4]

cell = st.integers(0, CELLS - 1)
word = st.one_of(st.sampled_from([0, 1, 2**31, 2**32 - 1]), st.integers(0, 2**32 - 1))


def noise(seed: int = 0) -> np.ndarray:
    """A payload of 32-bit words."""
    return np.random.default_rng(seed).integers(0, 2**32, SIZES, dtype=np.uint32)


def zeros() -> np.ndarray:
    return np.zeros(SIZES, dtype=np.uint32)


# ---- the digest -----------------------------------------------------------------------------------------------------
@given(at=cell, value=word, dense=st.booleans())
def test_a_word_that_changes_changes_the_digest(at: int, value: int, dense: bool) -> None:
    payload = noise() if dense else zeros()
    before = payload_digest(payload, PART)
    assume(payload.flat[at] != value)
    payload.flat[at] = value
    assert payload_digest(payload, PART) != before


@given(at=cell, other=cell, value=word, second=word)
def test_two_words_that_change_places_change_the_digest(at: int, other: int, value: int, second: int) -> None:
    assume(at != other and value != second)
    payload = zeros()
    payload.flat[at], payload.flat[other] = value, second
    before = payload_digest(payload, PART)
    payload.flat[at], payload.flat[other] = second, value
    assert payload_digest(payload, PART) != before


@given(at=cell, value=st.integers(1, 2**32 - 1), axis=st.sampled_from(["layers", "heads", "tokens"]))
def test_rows_that_land_elsewhere_change_the_digest(at: int, value: int, axis: str) -> None:
    """Also a payload with a single word that is not zero."""
    payload = zeros()
    payload.flat[at] = value
    begin, end = getattr(PART, axis)
    ranges = {name: getattr(PART, name) for name in ("layers", "heads", "tokens")} | {axis: (begin + 1, end + 1)}
    assert payload_digest(payload, Part(**ranges)) != payload_digest(payload, PART)


@pytest.mark.parametrize("axis", range(5), ids=["layer", "kv", "head", "token", "word"])
def test_a_shifted_run_changes_the_digest(axis: int) -> None:
    assert payload_digest(np.roll(noise(), 1, axis=axis), PART) != payload_digest(noise(), PART)


def test_keys_and_values_that_change_places_change_the_digest() -> None:
    assert payload_digest(noise()[:, ::-1], PART) != payload_digest(noise(), PART)


@given(axis=st.sampled_from([(0, "layers"), (2, "heads"), (3, "tokens")]), seed=st.integers(0, 99), data=st.data())
def test_digests_of_parts_add_up(axis: tuple[int, str], seed: int, data: st.DataObject) -> None:
    """So a block may be cut anywhere, and any program may digest any tile."""
    index, name = axis
    begin, end = getattr(PART, name)
    cut = data.draw(st.integers(begin, end))
    ranges = {one: getattr(PART, one) for one in ("layers", "heads", "tokens")}
    first, second = np.split(noise(seed), [cut - begin], axis=index)
    total = payload_digest(first, Part(**ranges | {name: (begin, cut)}))
    total += payload_digest(second, Part(**ranges | {name: (cut, end)}))
    assert total % 2**64 == payload_digest(noise(seed), PART)


def test_the_type_of_the_elements_does_not_matter() -> None:
    words = noise()
    for dtype in (np.uint8, np.int16, np.float16, np.float32):
        assert payload_digest(words.view(dtype), PART) == payload_digest(words, PART)


def test_a_row_that_ends_inside_a_word_is_filled_with_zeros() -> None:
    whole = zeros().view(np.uint16)
    short = np.random.default_rng(1).integers(0, 2**16, (*SIZES[:4], 7), dtype=np.uint16)
    whole[..., :7] = short
    assert payload_digest(short, PART) == payload_digest(whole, PART)


def test_the_digest_is_the_same_in_every_version() -> None:
    """It crosses between workers: a change of the formula needs another name in `PeerHello.digests`."""
    payload = np.arange(CELLS, dtype=np.uint32).reshape(SIZES)
    assert payload_digest(payload, PART) == by_definition(payload, PART)
    assert payload_digest(payload, PART) == 0x165BDD7212F3C580


def by_definition(payload: np.ndarray, part: Part) -> int:
    """Word by word, in Python's integers."""

    def key(at: int) -> int:
        z = (at + 0x9E3779B97F4A7C15) % 2**64
        z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
        z = (z ^ (z >> 27)) * 0x94D049BB133111EB % 2**64
        return (z ^ (z >> 31)) | 1

    total = 0
    for (layer, kv, head, token, index), value in np.ndenumerate(payload):
        layer, head, token = layer + part.layers[0], head + part.heads[0], token + part.tokens[0]
        row = layer << 44 | kv << 43 | head << 31 | token
        total += int(value) * key(row) * key(2**63 | index)
    return total % 2**64


def test_keys_are_odd_and_no_two_are_so_alike_that_words_could_change_places() -> None:
    words = word_keys(2048)
    rows = row_keys(Part(layers=(0, 8), heads=(0, 8), tokens=(0, 512)), 2).ravel()
    for keys in (words, rows):
        assert np.all(keys & np.uint64(1) == 1)
        assert len(np.unique(keys & np.uint64(2**33 - 1))) == len(keys), "K1 - K2 is no multiple of 2^33"


# ---- both implementations -------------------------------------------------------------------------------------------
POOL = (5, 3, 2, 2, 16, 8)


def capabilities(implementation: str) -> Capabilities:
    return CPU if implementation == "torch" else named("sm_90")


def bound(implementation: str, pool: torch.Tensor, **way: object) -> TorchPages | TritonPages:
    layer_first = pool.stride(1) > pool.stride(0)
    shape = shape_of(tuple(pool.shape), pool.dtype, layer_first=layer_first, **way)
    return Library(capabilities(implementation), force={"pages": implementation}).bind(pages.FAMILY, shape)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("tokens", [(0, 1), (15, 17), (3, 44), (16, 32)])
def test_what_is_gathered_scatters_back_into_other_pages(implementation: str, tokens: tuple[int, int]) -> None:
    words = torch.randint(-(2**31), 2**31, POOL, dtype=torch.int64).to(torch.int32)
    other = torch.zeros(POOL[1], POOL[0], *POOL[2:], dtype=torch.int32).transpose(0, 1)
    part = Part(layers=(1, 3), heads=(0, 2), tokens=tokens)
    payload = torch.empty(part.shape(2, 8), dtype=torch.int32)
    sent, landed = torch.zeros(1, dtype=torch.int64), torch.ones(1, dtype=torch.int64)
    count = -(-tokens[1] // 16) - tokens[0] // 16
    ours, theirs = torch.tensor([3, 0, 4][:count]).int(), torch.tensor([1, 2, 0][:count]).int()
    bound(implementation, words)(words, payload, ours, part, digest=sent)
    bound(implementation, other, scatter=True)(other, payload, theirs, part, digest=landed)
    assert sent == landed
    assert payload_digest(payload.numpy(), part) == int(sent) % 2**64
    for position in range(*tokens):
        index = position // 16 - tokens[0] // 16
        cells = other[theirs[index], 1:3, :, :, position % 16]
        assert torch.equal(cells, words[ours[index], 1:3, :, :, position % 16])
        cells.zero_()
    assert not other.any(), "wrote outside the part"


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn])
@pytest.mark.parametrize("cells", [torch.bfloat16, torch.float16, torch.float32])
def test_codes_are_digested_as_they_travel(implementation: str, dtype: torch.dtype, cells: torch.dtype) -> None:
    pool = torch.randn(POOL).to(cells)
    factors = torch.rand(3, 2, 2) + 0.5
    payload, digest = torch.empty(PART_OF_POOL.shape(2, 8), dtype=dtype), torch.zeros(1, dtype=torch.int64)
    table = torch.tensor([2, 4]).int()
    bound(implementation, pool, payload=dtype)(pool, payload, table, PART_OF_POOL, digest=digest, factors=factors)
    assert payload_digest(payload.view(torch.uint8).numpy(), PART_OF_POOL) == int(digest) % 2**64
    back, again = torch.zeros_like(pool), torch.zeros(1, dtype=torch.int64)
    bound(implementation, pool, payload=dtype, scatter=True)(
        back, payload, table, PART_OF_POOL, digest=again, factors=factors
    )
    assert torch.equal(digest, again)
    sent, got = pool[4, 1:, :, :1, :4].float(), back[4, 1:, :, :1, :4].float()
    assert torch.allclose(sent, got, rtol=2**-3, atol=2**-8)


PART_OF_POOL = Part(layers=(1, 3), heads=(0, 1), tokens=(9, 20))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_what_is_too_large_for_a_code_becomes_the_largest(implementation: str) -> None:
    pool = torch.full(POOL, 1e4, dtype=torch.bfloat16)
    payload = torch.empty(PART_OF_POOL.shape(2, 8), dtype=torch.float8_e4m3fn)
    bound(implementation, pool, payload=torch.float8_e4m3fn)(
        pool, payload, torch.tensor([0, 1]).int(), PART_OF_POOL, digest=torch.zeros(1).long(),
        factors=torch.ones(3, 2, 2),
    )  # fmt: skip
    assert torch.all(payload.float() == 448.0)


SPECIAL = [  # but for the subnormals of bfloat16, which the interpreter flushes
    0.0, -0.0, 1 + 2**-8, 1 + 3 * 2**-8, 1 + 2**-11, -65519.0, 65520.0, 3.4e38, 3e-8, inf, -inf, nan,
]  # fmt: skip


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize(("cells", "payload"), list(permutations(FLOATS, 2)), ids=str)
@pytest.mark.parametrize("scatter", [False, True])
def test_floats_are_rounded_to_nearest_even_and_float16_saturates(
    implementation: str, cells: torch.dtype, payload: torch.dtype, scatter: bool
) -> None:
    source, target = (payload, cells) if scatter else (cells, payload)
    values = (torch.randn(PART_OF_POOL.shape(2, 8)) * 1e3).to(source)
    values.view(-1)[: len(SPECIAL)] = torch.tensor(SPECIAL).to(source)
    exact = values.float()
    wanted = (exact.clamp(-65504, 65504) if target is torch.float16 else exact).to(target)
    pool, sent = torch.full(POOL, 7.0, dtype=cells), torch.zeros(values.shape, dtype=payload)
    inside = [pool[page, 1:, :, :1, run] for page, run in ((2, slice(9, 16)), (4, slice(0, 4)))]
    if scatter:
        sent.copy_(values)
    else:
        for cell, part in zip(inside, values.split([7, 4], dim=3), strict=True):
            cell.copy_(part)
    digest, table = torch.zeros(1, dtype=torch.int64), torch.tensor([2, 4]).int()
    bound(implementation, pool, payload=payload, scatter=scatter)(pool, sent, table, PART_OF_POOL, digest=digest)
    got = torch.cat(inside, dim=3) if scatter else sent
    assert torch.equal(got.isnan(), wanted.isnan())
    assert torch.equal(bits(got)[~got.isnan()], bits(wanted)[~got.isnan()])
    assert payload_digest(bits(sent).numpy(), PART_OF_POOL) == int(digest) % 2**64, "of what travels"
    for cell in inside:
        cell.fill_(7.0)
    assert bool((pool == 7.0).all()), "wrote outside the part"


def bits(values: torch.Tensor) -> torch.Tensor:
    return values.contiguous().view(torch.int32 if values.element_size() == 4 else torch.int16)


@pytest.mark.interpret
@pytest.mark.skipif(not INTERPRETED, reason="runs with TRITON_INTERPRET=1: make kernels")
@pytest.mark.parametrize("change", ["flip", "swap", "head", "token"])
def test_the_kernel_sees_damage_in_what_it_stores(change: str) -> None:
    pool = torch.zeros(POOL, dtype=torch.int32)
    operation = bound("triton", pool, scatter=True)
    part, moved = PART_OF_POOL, Part(layers=(1, 3), heads=(1, 2), tokens=(10, 21))
    payload = torch.arange(2 * 2 * 1 * 11 * 8, dtype=torch.int32).view(part.shape(2, 8))
    before, after = torch.zeros(1, dtype=torch.int64), torch.zeros(1, dtype=torch.int64)
    table = torch.tensor([0, 1]).int()
    operation(pool, payload, table, part, digest=before)
    if change == "flip":
        payload[0, 1, 0, 5, 7] ^= 1 << 30
    elif change == "swap":
        payload[0, 1, 0, 5] = payload[0, 1, 0, 5].flip(0)
    elif change == "head":
        part = Part(layers=part.layers, heads=moved.heads, tokens=part.tokens)
    else:
        part = Part(layers=part.layers, heads=part.heads, tokens=moved.tokens)
    operation(pool, payload, table, part, digest=after)
    assert before != after


# ---- refusals -------------------------------------------------------------------------------------------------------
def shape(**changes: object) -> PagesShape:
    return shape_of((4, 2, 2, 2, 16, 8), torch.int32, **changes)


@pytest.mark.parametrize(
    ("device", "wanted", "why"),
    [
        ("cpu", shape(), "a CPU runs the torch reference"),
        ("sm_80", shape_of(POOL, torch.bfloat16, payload=torch.float8_e4m3fn), "no 8-bit floats of the kind"),
        ("gfx942", shape_of(POOL, torch.bfloat16, payload=torch.float8_e4m3fn), "no 8-bit floats of the kind"),
        ("sm_90", shape(payload=torch.float8_e4m3fn), "made of floats"),
        ("sm_90", shape(payload=torch.bfloat16), "made of floats"),
        ("sm_90", shape_of(POOL, torch.float32, payload=torch.int32), "int32 is not converted"),
        ("sm_90", shape_of(POOL, torch.float64), "view the pool as int32"),
        ("sm_90", shape_of((4, 2, 3, 2, 16, 8), torch.int32), "3 tensors per head"),
        ("sm_90", shape_of((4, 2, 2, 2, 16, 8192), torch.int32), "rows of 8192 elements"),
    ],
)
def test_what_the_kernel_cannot_do_has_a_reason(device: str, wanted: PagesShape, why: str) -> None:
    with pytest.raises(Unsupported, match=why):
        choices(pages.FAMILY, named(device), wanted, {"pages": "triton"})


def arguments() -> dict[str, object]:
    part = Part(layers=(0, 2), heads=(0, 2), tokens=(5, 20))
    return {
        "pool": torch.zeros(4, 2, 2, 2, 16, 8, dtype=torch.int32),
        "payload": torch.zeros(part.shape(2, 8), dtype=torch.int32),
        "pages": torch.tensor([1, 2], dtype=torch.int32),
        "part": part,
        "digest": torch.zeros(1, dtype=torch.int64),
    }


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"pool": torch.zeros(2, 4, 2, 2, 16, 8, dtype=torch.int32).transpose(0, 1)}, "pool has strides"),
        ({"pool": torch.zeros(4, 2, 2, 2, 16, 8)}, "pool is torch.float32"),
        ({"pool": torch.zeros(4, 2, 2, 2, 32, 8, dtype=torch.int32)}, r"pool has shape \[4, 2, 2, 2, 32, 8\]"),
        ({"payload": torch.zeros(2, 2, 2, 14, 8, dtype=torch.int32)}, "payload has shape"),
        ({"payload": torch.zeros(2, 2, 15, 2, 8, dtype=torch.int32).transpose(2, 3)}, "payload is not contiguous"),
        ({"pages": torch.tensor([1], dtype=torch.int32)}, r"pages has 1 entries, positions \[5, 20\) lie in 2"),
        ({"pages": torch.tensor([1, 2])}, "pages is torch.int64"),
        ({"digest": torch.zeros(1)}, "digest is torch.float32"),
    ],
)
def test_tensors_that_do_not_fit_are_refused(changes: dict[str, torch.Tensor], why: str) -> None:
    operation = TritonPages(named("sm_90"), shape(), {"BLOCK_BYTES": 4096})
    with pytest.raises(InputError, match=why):
        operation(**arguments() | changes)


@pytest.mark.parametrize(
    "ranges", [{"layers": (1, 3)}, {"heads": (1, 3)}, {"tokens": (-5, 10)}, {"layers": (-1, 1)}, {"heads": (-2, 0)}]
)
def test_a_part_outside_the_pool_is_refused(ranges: dict[str, tuple[int, int]]) -> None:
    whole = {"layers": (0, 2), "heads": (0, 2), "tokens": (5, 20)} | ranges
    operation = TritonPages(named("sm_90"), shape(), {"BLOCK_BYTES": 4096})
    part = Part(**whole)
    payload = torch.zeros(part.shape(2, 8), dtype=torch.int32)
    with pytest.raises(InputError, match=r"are not in \[0, "):
        operation(**arguments() | {"part": part, "payload": payload})


@pytest.mark.parametrize(
    ("dtype", "dim", "words"),
    [
        (torch.bfloat16, 64, torch.int32),
        (torch.float32, 3, torch.int32),
        (torch.float16, 5, torch.int16),
        (torch.int8, 12, torch.int32),
        (torch.int8, 6, torch.int16),
        (torch.int8, 3, torch.int8),
    ],
)
def test_a_pool_is_copied_in_the_widest_words_that_fit(dtype: torch.dtype, dim: int, words: torch.dtype) -> None:
    pool = torch.zeros(3, 2, 2, 1, 4, dim, dtype=dtype)
    viewed = as_words(pool)
    assert viewed.dtype is words
    assert viewed.data_ptr() == pool.data_ptr()
