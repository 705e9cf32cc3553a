"""The two kernels that choose a token: one pass over the logits, then one program per position over what it left.

`scan_logits` (positions x splits) applies penalties, bias and masks in place and leaves, per split, the winner, the
maximum and the mass, and where truncation is wanted the maximum of each GROUP of logits. The n-th largest of these
maxima bounds the n best tokens from below and is passed by few others, so `choose_tokens` (positions) reads only the
groups above it, finds the exact border among some hundred candidates and draws. When the candidates turn out to be too
few, it takes a lower bound, and in the end looks at the whole row: slower, never wrong, and the host need not know.
Rows of FLOATS: GROUPS maxima, SPLITS (rounded up) maxima and masses, CAPACITY scaled candidates. Rows of INTS: GROUPS
numbers of groups above the bound, SPLITS winners, CAPACITY candidate ids.
"""
# mypy: disable-error-code="no-untyped-def,no-untyped-call"

from __future__ import annotations

from baton_kernels.rt.language import jit, tl
from baton_kernels.sampler.lanes import (
    LOWEST,
    MINUS_INFINITY,
    NOTHING,
    finite,
    index_of,
    noise_keys,
    order,
    pack,
    race,
    value,
)

COLUMNS = tl.constexpr(7)  # of WORK; see `sample.Work`
NOISE = tl.constexpr(1)
TRUNCATE = tl.constexpr(2)


@jit
def scaled(x, top, coldness):
    """Distance to the best logit over the temperature: at most 0, so its exponential never overflows."""
    return (x - finite(top)) * coldness


@jit
def adjusted(
    x, at, inside, ROW, WORK, REALS, COUNTS, IN_PROMPT, LIST_IDS, LIST_VALUES, MASKS,
    FIRST, SIZE, VOCAB: tl.constexpr, LIST: tl.constexpr,
):  # fmt: skip
    """Logits after penalties, mask of allowed tokens and list of biases; also written back where they changed."""
    row = tl.load(WORK).to(tl.int64)
    slot = tl.load(WORK + 3)
    begin, end = tl.load(WORK + 4).to(tl.int32), tl.load(WORK + 5).to(tl.int32)
    mask = tl.load(WORK + 6)
    if slot >= 0:
        counts = tl.load(COUNTS + slot * VOCAB + at, mask=inside, other=0)
        seen = (tl.load(IN_PROMPT + slot * VOCAB + at, mask=inside, other=0) != 0) | (counts > 0)
        repetition, presence = tl.load(REALS + row * 6 + 3), tl.load(REALS + row * 6 + 4)
        frequency = tl.load(REALS + row * 6 + 5)
        x = tl.where(seen, tl.where(x > 0, tl.div_rn(x, repetition), x * repetition), x)
        x = x - frequency * counts.to(tl.float32) - tl.where(counts > 0, presence, 0.0)
    if mask >= 0:
        words = tl.load(MASKS + mask * ((VOCAB + 31) // 32) + at // 32, mask=inside, other=0)
        x = tl.where(((words >> (at % 32)) & 1) != 0, x, float("-inf"))
    if (slot >= 0) | (mask >= 0):
        tl.store(ROW + at, x, mask=inside)
    if end > begin:
        tl.debug_barrier()
        for first in range(begin, end, LIST):
            entry = first + tl.arange(0, LIST)
            token = tl.load(LIST_IDS + entry, mask=entry < end, other=-1)
            here = (token >= FIRST) & (token < FIRST + SIZE)
            biased = tl.load(ROW + token, mask=here, other=0.0) + tl.load(LIST_VALUES + entry, mask=here, other=0.0)
            tl.store(ROW + token, biased, mask=here)
        tl.debug_barrier()
        x = tl.load(ROW + at, mask=inside, other=float("-inf"))
    return x


@jit
def scan_logits(
    LOGITS, WORK, REALS, INTEGERS, COUNTS, IN_PROMPT, LIST_IDS, LIST_VALUES, MASKS, FLOATS, INTS,
    VOCAB: tl.constexpr, GROUP: tl.constexpr, SPLITS: tl.constexpr, ROUNDED: tl.constexpr, FLOATS_ROW: tl.constexpr,
    INTS_ROW: tl.constexpr, BLOCK: tl.constexpr, LIST: tl.constexpr,
):  # fmt: skip
    """One program per position and BLOCK logits."""
    GROUPS: tl.constexpr = SPLITS * (BLOCK // GROUP)
    position, split = tl.program_id(0).to(tl.int64), tl.program_id(1)
    ROW = LOGITS + position * VOCAB
    WORK += position * COLUMNS
    FLOATS += position * FLOATS_ROW
    at = split * BLOCK + tl.arange(0, BLOCK)
    inside = at < VOCAB
    x = tl.load(ROW + at, mask=inside, other=float("-inf"))
    x = adjusted(
        x, at, inside, ROW, WORK, REALS, COUNTS, IN_PROMPT, LIST_IDS, LIST_VALUES, MASKS,
        split * BLOCK, BLOCK, VOCAB, LIST,
    )  # fmt: skip
    x = tl.where(inside, x, float("-inf"))
    row, flags = tl.load(WORK).to(tl.int64), tl.load(WORK + 2)
    top = tl.max(x, 0)
    tl.store(FLOATS + GROUPS + split, top)
    coldness = 1.0 / tl.maximum(tl.load(REALS + row * 6), 1e-9)  # greedy rows have 0
    if (flags & TRUNCATE) != 0:
        maxima = tl.max(tl.reshape(x, (BLOCK // GROUP, GROUP)), 1)
        tl.store(FLOATS + split * (BLOCK // GROUP) + tl.arange(0, BLOCK // GROUP), maxima)
        tl.store(FLOATS + GROUPS + ROUNDED + split, tl.sum(tl.exp(scaled(x, top, coldness)), 0))
    else:
        if (flags & NOISE) != 0:
            k0, k1 = noise_keys(tl.load(INTEGERS + row * 2), tl.load(WORK + 1))
            x = scaled(x, top, coldness) - race(at, k0, k1)
        winner = index_of(tl.max(pack(x, at), 0))
        tl.store(INTS + position * INTS_ROW + GROUPS + split, winner)


@jit
def census(P, n, top, coldness, pivots, BLOCK: tl.constexpr, PIVOTS: tl.constexpr):
    """How many of the n scaled values at P have keys at or above each pivot, and the sum of their exponentials."""
    counts = tl.zeros((PIVOTS,), tl.int32)
    masses = tl.zeros((PIVOTS,), tl.float32)
    for begin in range(0, n, BLOCK):
        at = begin + tl.arange(0, BLOCK)
        y = scaled(tl.load(P + at, mask=at < n, other=float("-inf")), top, coldness)
        above = tl.where(at < n, order(y), LOWEST)[:, None] >= pivots[None, :]
        counts += tl.sum(above.to(tl.int32), 0)
        masses += tl.sum(tl.where(above, tl.exp(y)[:, None], 0.0), 0)
    return counts, masses


@jit
def border(
    P, n, top, coldness, low, wanted, most, BY_MASS: tl.constexpr, BLOCK: tl.constexpr, PIVOTS: tl.constexpr
):  # fmt: skip
    """Largest key t >= low such that `wanted` values (BY_MASS: that much mass) have keys >= t, or one that cuts at the
    same place; `low` when there are not enough. A count of at most `most` is near enough. Returns t, count and mass.

    PIVOTS keys are tried at a time: a pass over a thousand values takes as long as its reduction.
    """
    index = tl.arange(0, PIVOTS)
    low += tl.zeros((), tl.int32)
    high = tl.full((), 1, tl.int32)  # keys of what is at most 0 are at most 0
    count, beyond, mass = tl.full((), 0x7FFFFFFF, tl.int32), tl.full((), 0, tl.int32), tl.full((), 0.0, tl.float32)
    searching = True
    while searching:
        pivots = low + (high - low + PIVOTS - 1) // PIVOTS * index
        counts, masses = census(P, n, top, coldness, pivots, BLOCK, PIVOTS)
        enough = masses >= wanted if BY_MASS else counts >= wanted
        reached = (index == 0) | (enough & (pivots < high))
        low = tl.max(tl.where(reached, pivots, low), 0)
        high = tl.min(tl.where(reached, high, tl.minimum(pivots, high)), 0)
        count = tl.min(tl.where(reached, counts, 0x7FFFFFFF), 0)
        mass = tl.min(tl.where(reached, masses, float("inf")), 0)
        beyond = tl.maximum(beyond, tl.max(tl.where(reached, 0, counts), 0))
        searching = (high - low > 1) & (count - beyond > 1 if BY_MASS else count > most)
    return low, count, mass


@jit
def gather(
    ROW, FLOATS, INTS, bound, top, coldness,
    VOCAB: tl.constexpr, GROUP: tl.constexpr, GROUPS: tl.constexpr, ROUNDED: tl.constexpr, CAPACITY: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Collect what has a key at or above the bound, in order of index. Returns how many; over CAPACITY: too many."""
    listed = tl.full((), 0, tl.int32)
    for begin in range(0, GROUPS, BLOCK):
        group = begin + tl.arange(0, BLOCK)
        y = scaled(tl.load(FLOATS + group, mask=group < GROUPS, other=float("-inf")), top, coldness)
        hit = (order(y) >= bound) & (group < GROUPS)
        to = listed + tl.cumsum(hit.to(tl.int32), 0) - 1
        tl.store(INTS + to, group, mask=hit)
        listed += tl.sum(hit.to(tl.int32), 0)
    tl.debug_barrier()
    found, begin = tl.full((), 0, tl.int32), tl.full((), 0, tl.int32)
    while (begin < listed) & (found <= CAPACITY):
        which = begin + tl.arange(0, BLOCK // GROUP)
        group = tl.load(INTS + which, mask=which < listed, other=0)
        token = tl.reshape(group[:, None] * GROUP + tl.arange(0, GROUP)[None, :], (BLOCK,))
        inside = tl.reshape(tl.broadcast_to((which < listed)[:, None], (BLOCK // GROUP, GROUP)), (BLOCK,))
        inside &= token < VOCAB
        y = scaled(tl.load(ROW + token, mask=inside, other=float("-inf")), top, coldness)
        hit = inside & (order(y) >= bound)
        to = found + tl.cumsum(hit.to(tl.int32), 0) - 1
        tl.store(FLOATS + GROUPS + 2 * ROUNDED + to, y, mask=hit & (to < CAPACITY))
        tl.store(INTS + GROUPS + ROUNDED + to, token, mask=hit & (to < CAPACITY))
        found += tl.sum(hit.to(tl.int32), 0)
        begin += BLOCK // GROUP
    tl.debug_barrier()
    return found


@jit
def drawn(P, IDS, n, named, low, top, coldness, k0, k1, BLOCK: tl.constexpr):
    """Winner of the race among the n scaled values at P with keys >= low; `named` = n: their ids are IDS; 0: their
    indices are."""
    best = tl.full((), NOTHING, tl.int64)
    for begin in range(0, n, BLOCK):
        at = begin + tl.arange(0, BLOCK)
        y = scaled(tl.load(P + at, mask=at < n, other=float("-inf")), top, coldness)
        token = tl.where(at < named, tl.load(IDS + at, mask=at < named, other=0), at)
        kept = (order(y) >= low) & (at < n)
        best = tl.maximum(best, tl.max(tl.where(kept, pack(y - race(token, k0, k1), token), NOTHING), 0))
    return index_of(best)


@jit
def drawn_truncated(
    ROW, FLOATS, INTS, top, whole, coldness, top_k, top_p, min_p, k0, k1,
    VOCAB: tl.constexpr, GROUP: tl.constexpr, GROUPS: tl.constexpr, ROUNDED: tl.constexpr, CAPACITY: tl.constexpr,
    WIDTH: tl.constexpr, BLOCK: tl.constexpr, PIVOTS: tl.constexpr,
):  # fmt: skip
    """Draw among what top-k, top-p (of the mass that top-k left; `whole` without one) and min-p keep."""
    least = tl.where(min_p > 0.0, order(tl.log(tl.maximum(min_p, 1e-30))), MINUS_INFINITY)
    # The mass that top-k leaves may reach below min-p's border; otherwise nothing below it matters.
    ground = tl.where((top_k > 0) & (top_p < 1.0), MINUS_INFINITY, least)
    wanted = tl.where(top_k > 0, top_k, WIDTH)
    CANDIDATES = FLOATS + GROUPS + 2 * ROUNDED
    bound, found = ground, tl.full((), 0, tl.int32)
    listed, trying = False, True
    while trying:
        if (top_k > 0) | (top_p < 1.0):
            most = wanted + wanted // 4
            near = border(FLOATS, GROUPS, top, coldness, MINUS_INFINITY, wanted, most, False, BLOCK, PIVOTS)[0]
            bound = tl.maximum(ground, near)
        found = gather(ROW, FLOATS, INTS, bound, top, coldness, VOCAB, GROUP, GROUPS, ROUNDED, CAPACITY, BLOCK)
        fits = found <= CAPACITY
        listed = fits & ((bound == ground) | (top_k > 0))
        if fits & (bound != ground) & (top_k == 0):
            masses = census(CANDIDATES, found, 0.0, 1.0, bound + tl.zeros((1,), tl.int32), BLOCK, 1)[1]
            listed = tl.max(masses, 0) >= top_p * whole
        wanted *= 4
        trying = fits & (listed == 0) & (wanted <= GROUPS)
    P, n, named = ROW, tl.full((), VOCAB, tl.int32), tl.full((), 0, tl.int32)
    low = ground
    if listed:
        P, n, named, low = CANDIDATES, found, found, bound
        top, coldness = top * 0.0, coldness * 0.0 + 1.0
    if top_k > 0:
        low, count, mass = border(P, n, top, coldness, low, top_k, top_k, False, BLOCK, PIVOTS)
        whole = mass - tl.maximum(count - top_k, 0).to(tl.float32) * tl.exp(value(low))
    if top_p < 1.0:
        low, count, mass = border(P, n, top, coldness, low, top_p * whole, 0, True, BLOCK, PIVOTS)
    low = tl.maximum(low, least)
    return drawn(P, INTS + GROUPS + ROUNDED, n, named, low, top, coldness, k0, k1, BLOCK)


@jit
def choose_tokens(
    LOGITS, WORK, REALS, INTEGERS, COUNTS, FLOATS, INTS, OUT,
    VOCAB: tl.constexpr, GROUP: tl.constexpr, SPLITS: tl.constexpr, ROUNDED: tl.constexpr, FLOATS_ROW: tl.constexpr,
    INTS_ROW: tl.constexpr, GROUPS: tl.constexpr, CAPACITY: tl.constexpr, WIDTH: tl.constexpr,
    SPLIT_BLOCK: tl.constexpr, BLOCK: tl.constexpr, PIVOTS: tl.constexpr,
):  # fmt: skip
    """One program per position."""
    position = tl.program_id(0).to(tl.int64)
    ROW = LOGITS + position * VOCAB
    WORK += position * COLUMNS
    FLOATS += position * FLOATS_ROW
    INTS += position * INTS_ROW
    row, flags, slot = tl.load(WORK).to(tl.int64), tl.load(WORK + 2), tl.load(WORK + 3)
    coldness = 1.0 / tl.maximum(tl.load(REALS + row * 6), 1e-9)  # greedy rows have 0
    split = tl.arange(0, SPLIT_BLOCK)
    inside = split < SPLITS
    maxima = tl.load(FLOATS + GROUPS + split, mask=inside, other=float("-inf"))
    top = tl.max(maxima, 0)
    k0, k1 = noise_keys(tl.load(INTEGERS + row * 2), tl.load(WORK + 1))
    if (flags & TRUNCATE) != 0:
        masses = tl.load(FLOATS + GROUPS + ROUNDED + split, mask=inside, other=0.0)
        whole = tl.sum(masses * tl.exp(scaled(maxima, top, coldness)), 0)
        top_k = tl.load(INTEGERS + row * 2 + 1)
        top_k = tl.where(top_k < VOCAB, top_k, 0).to(tl.int32)
        token = drawn_truncated(
            ROW, FLOATS, INTS, top, whole, coldness, top_k, tl.load(REALS + row * 6 + 1),
            tl.load(REALS + row * 6 + 2), k0, k1,
            VOCAB, GROUP, GROUPS, ROUNDED, CAPACITY, WIDTH, BLOCK, PIVOTS,
        )  # fmt: skip
    else:
        winners = tl.load(INTS + GROUPS + split, mask=inside, other=0)
        x = tl.load(ROW + winners, mask=inside, other=float("-inf"))
        if (flags & NOISE) != 0:
            x = scaled(x, top, coldness) - race(winners, k0, k1)
        token = index_of(tl.max(tl.where(inside, pack(x, winners), NOTHING), 0))
    token = tl.where(token < VOCAB, token, 0)  # nothing is allowed
    tl.store(OUT + position, token.to(tl.int64))
    if slot >= 0:
        COUNT = COUNTS + slot * VOCAB + token
        tl.store(COUNT, tl.load(COUNT) + 1)
