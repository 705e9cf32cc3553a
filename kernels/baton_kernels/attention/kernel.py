"""The Triton kernel of paged attention: one program computes one work unit for one KV head.

Decode, verify and extend are one kernel with other tiles. Packed query m is head m % GROUP of query token m // GROUP.
Scores are kept in units of log2: exp2 is what the hardware has, and scale * log2(e) is multiplied in once.
KV blocks that every query of the tile sees whole run without masks. The edges (window, diagonal, end of the row) run
with them, and there values behind the row's end are zeroed too: zero weight times an earlier owner's NaN is NaN.
A block inside one page costs one scalar read of the page table and has affine addresses; only where a block spans pages
are page ids read token by token.
"""
# mypy: disable-error-code="no-untyped-def,no-untyped-call"

from __future__ import annotations

from baton_kernels.rt.language import INTERPRET, cast, jit, operand, tl


@jit
def _operand_in(x, dtype: tl.constexpr):
    """Stored KV as an operand beside queries of `dtype`: every code of a narrower type is exact there."""
    if INTERPRET:
        return x.to(tl.float32)
    else:
        return x.to(dtype)


@jit
def _page_of(TABLE, n, limit, PAGE: tl.constexpr, BLOCK_N: tl.constexpr):
    """Page ids of tokens n .. n + BLOCK_N, 0 from `limit` on: a scalar if one page holds them, else one per token."""
    if PAGE % BLOCK_N == 0:
        return tl.load(TABLE + n // PAGE, mask=n < limit, other=0).to(tl.int64)
    else:
        tokens = n + tl.arange(0, BLOCK_N)
        return tl.load(TABLE + tokens // PAGE, mask=tokens < limit, other=0).to(tl.int64)


@jit
def _load_block(
    KV, page, head, n, limit,
    HALF: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr, PAGE: tl.constexpr,
    S_PAGE: tl.constexpr, S_HALF: tl.constexpr, S_HEAD: tl.constexpr, S_TOKEN: tl.constexpr,
    MASKED: tl.constexpr, DESCRIPTOR: tl.constexpr,
):  # fmt: skip
    """Keys (HALF = 0) or values of a block [BLOCK_N, BLOCK_D]; MASKED: values are zero at and behind token `limit`."""
    token = tl.arange(0, BLOCK_N)
    if DESCRIPTOR:
        block = KV.load([page.to(tl.int32), HALF, head, n % PAGE, 0]).reshape(BLOCK_N, BLOCK_D)
        if MASKED and HALF == 1:
            block = tl.where((n + token < limit)[:, None], block, tl.zeros([BLOCK_N, BLOCK_D], block.dtype))
        return block
    else:
        d = tl.arange(0, BLOCK_D)
        if PAGE % BLOCK_N == 0:
            base = KV + page * S_PAGE + HALF * S_HALF + head.to(tl.int64) * S_HEAD + (n % PAGE) * S_TOKEN
            at = base + token[:, None] * S_TOKEN + d[None, :]
        else:
            row = page * S_PAGE + HALF * S_HALF + head.to(tl.int64) * S_HEAD + ((n + token) % PAGE) * S_TOKEN
            at = KV + row[:, None] + d[None, :]
        if MASKED and HALF == 1:
            return tl.load(at, mask=(n + token < limit)[:, None] & (d < D)[None, :], other=0.0)
        elif D != BLOCK_D:
            return tl.load(at, mask=(d < D)[None, :], other=0.0)
        else:
            return tl.load(at)


@jit
def _load_factors(
    FACTORS, page, head, n, limit,
    HALF: tl.constexpr, KV_HEADS: tl.constexpr, BLOCK_N: tl.constexpr, PAGE: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Factors of a block's tokens, float32[BLOCK_N]."""
    token = n + tl.arange(0, BLOCK_N)
    at = FACTORS + (page * (2 * KV_HEADS) + HALF * KV_HEADS + head) * PAGE + token % PAGE
    if MASKED and HALF == 1:
        return tl.load(at, mask=token < limit, other=0.0)
    else:
        return tl.load(at)


@jit
def _within(age, window):
    """0 <= age < window, in one comparison."""
    return age.to(tl.uint32, bitcast=True) < window.to(tl.uint32, bitcast=True)


@jit
def _visible(n, position, bits, start, window, BLOCK_N: tl.constexpr, TREE: tl.constexpr):
    """bool[BLOCK_M, BLOCK_N]: which tokens of the block each query sees. In a tree `bits` decide between its nodes."""
    token = n + tl.arange(0, BLOCK_N)[None, :]
    age = position[:, None] - token
    if TREE:
        own = token - start
        bit = (bits[:, None] >> (own & 63).to(tl.int64)) & 1
        return tl.where(own.to(tl.uint32, bitcast=True) < 64, bit != 0, _within(age, window))
    else:
        return _within(age, window)


@jit
def _ones(bits):
    """Count of set bits of int64."""
    bits = bits - ((bits >> 1) & 0x5555555555555555)
    bits = (bits & 0x3333333333333333) + ((bits >> 2) & 0x3333333333333333)
    bits = (bits + (bits >> 4)) & 0x0F0F0F0F0F0F0F0F
    bits = bits + (bits >> 8)
    bits = bits + (bits >> 16)
    return ((bits + (bits >> 32)) & 0x7F).to(tl.int32)


@jit
def _step(
    KV, FACTORS, page, q, best, total, acc, head, n, limit, scale, position, bits, start, window,
    KV_HEADS: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr, PAGE: tl.constexpr,
    S_PAGE: tl.constexpr, S_HALF: tl.constexpr, S_HEAD: tl.constexpr, S_TOKEN: tl.constexpr,
    SOFTCAP: tl.constexpr, TREE: tl.constexpr, TOKEN_FACTORS: tl.constexpr, DESCRIPTOR: tl.constexpr,
    MASKED: tl.constexpr,
):  # fmt: skip
    """One block of KV into the running (best, total, acc)."""
    k = _load_block(
        KV, page, head, n, limit, 0, D, BLOCK_D, BLOCK_N, PAGE, S_PAGE, S_HALF, S_HEAD, S_TOKEN, MASKED, DESCRIPTOR
    )
    v = _load_block(
        KV, page, head, n, limit, 1, D, BLOCK_D, BLOCK_N, PAGE, S_PAGE, S_HALF, S_HEAD, S_TOKEN, MASKED, DESCRIPTOR
    )
    scores = tl.dot(operand(q), tl.trans(_operand_in(k, q.dtype)), input_precision="ieee")
    if TOKEN_FACTORS:
        scores *= _load_factors(FACTORS, page, head, n, limit, 0, KV_HEADS, BLOCK_N, PAGE, MASKED)[None, :]
    if SOFTCAP > 0.0:
        # tanh(x) = 1 - 2 / (1 + exp(2x)); scale holds 2 log2(e) / cap, and the result is in units of log2.
        scores = (SOFTCAP * 1.4426950408889634) * (1.0 - 2.0 / (1.0 + tl.exp2(scores * scale)))
        scale = 1.0
    if MASKED:
        scores = tl.where(_visible(n, position, bits, start, window, BLOCK_N, TREE), scores, float("-inf"))
    now = tl.maximum(best, tl.max(scores, 1) * scale)
    safe = now
    if MASKED:
        safe = tl.where(now == float("-inf"), 0.0, now)
    weights = tl.exp2(scores * scale - safe[:, None])
    shrink = tl.exp2(best - safe)
    total = total * shrink + tl.sum(weights, 1)
    acc = acc * shrink[:, None]
    if TOKEN_FACTORS:
        weights *= _load_factors(FACTORS, page, head, n, limit, 1, KV_HEADS, BLOCK_N, PAGE, MASKED)[None, :]
    acc = tl.dot(operand(cast(weights, q.dtype)), _operand_in(v, q.dtype), acc, input_precision="ieee")
    return now, total, acc


@jit
def attend(
    Q, KV, FACTORS, TABLE, UNITS, TREES, SINKS, OUT, LSE, PARTIAL, PARTIAL_LSE,
    scale, window, q_steps, out_steps, table_width, wants_lse,
    GROUP: tl.constexpr, KV_HEADS: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, PAGE: tl.constexpr, S_PAGE: tl.constexpr, S_HALF: tl.constexpr, S_HEAD: tl.constexpr,
    S_TOKEN: tl.constexpr, SOFTCAP: tl.constexpr, HAS_SINKS: tl.constexpr, TREE: tl.constexpr,
    ONE_FACTOR: tl.constexpr, TOKEN_FACTORS: tl.constexpr, DESCRIPTOR: tl.constexpr,
):  # fmt: skip
    """Grid (KV heads, units). UNITS: a section of `work.pack`. q_steps, out_steps: strides of tokens in 16 elements, so
    that the compiler sees what a row is aligned to. scale: of a score, times log2(e), or 2 log2(e) / SOFTCAP."""
    head = tl.program_id(0)
    at = tl.program_id(1)
    if at >= tl.load(UNITS):
        return
    unit = UNITS + (1 + at) * 8
    row = tl.load(unit)
    first_query = tl.load(unit + 1)
    queries = tl.load(unit + 2)
    kv_tokens = tl.load(unit + 3)
    first_m = tl.load(unit + 4)
    kv_begin = tl.multiple_of(tl.load(unit + 5), BLOCK_N)
    kv_end = tl.load(unit + 6)
    slot = tl.load(unit + 7)

    local = tl.arange(0, BLOCK_M)
    d = tl.arange(0, BLOCK_D)
    token = (first_m + local) // GROUP
    query_head = head * GROUP + (first_m + local) % GROUP
    inside = token < queries
    start = kv_tokens - queries
    position = start + token  # in a tree: the depth
    here = (first_query + token).to(tl.int64)
    within = inside[:, None] & (d < D)[None, :]
    q = tl.load(Q + here[:, None] * (q_steps * 16) + query_head[:, None] * D + d[None, :], mask=within, other=0.0)
    TABLE += row.to(tl.int64) * table_width
    last_m = tl.minimum(first_m + BLOCK_M, queries * GROUP) - 1
    whole_end = tl.minimum(start + first_m // GROUP + 1, kv_end)
    bits = position
    if TREE:
        # Bits behind the query's own place, and of nodes that the window has left (the 64th query on), do not count.
        ones = tl.full([BLOCK_M], -1, tl.int64)
        upto = ones ^ ((ones * 2) << tl.minimum(token, 63))
        gone = tl.maximum(token - window + 1, 0)
        bits = tl.load(TREES + here, mask=inside, other=-1) & upto
        bits = tl.where(gone > 63, 0, bits & (ones << tl.minimum(gone, 63)))
        position = start + tl.where(token < 64, _ones(bits) - 1, token)
        whole_end = tl.minimum(start, kv_end)
    if ONE_FACTOR:
        scale *= tl.load(FACTORS)

    best = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    # Blocks [kv_begin, left) and [right, kv_end) are masked, [left, right) are whole.
    left = tl.maximum(kv_begin, tl.cdiv(tl.maximum(start + last_m // GROUP - window + 1, 0), BLOCK_N) * BLOCK_N)
    left = tl.minimum(left, tl.cdiv(kv_end, BLOCK_N) * BLOCK_N)
    right = tl.maximum(left, whole_end // BLOCK_N * BLOCK_N)
    page = _page_of(TABLE, left, right, PAGE, BLOCK_N)
    for n in tl.range(left, right, BLOCK_N):
        following = _page_of(TABLE, n + BLOCK_N, right, PAGE, BLOCK_N)
        best, total, acc = _step(
            KV, FACTORS, page, q, best, total, acc, head, n, kv_tokens, scale, position, bits, start, window,
            KV_HEADS, D, BLOCK_D, BLOCK_N, PAGE, S_PAGE, S_HALF, S_HEAD, S_TOKEN,
            SOFTCAP, TREE, TOKEN_FACTORS, DESCRIPTOR, False,
        )  # fmt: skip
        page = following  # read a block ahead, or each load of KV would wait for it
    before = (left - kv_begin) // BLOCK_N
    edges = before + tl.cdiv(tl.maximum(kv_end - right, 0), BLOCK_N)
    for edge in tl.range(0, edges, num_stages=1):
        n = tl.where(edge < before, kv_begin + edge * BLOCK_N, right + (edge - before) * BLOCK_N)
        page = _page_of(TABLE, n, kv_tokens, PAGE, BLOCK_N)
        best, total, acc = _step(
            KV, FACTORS, page, q, best, total, acc, head, n, kv_tokens, scale, position, bits, start, window,
            KV_HEADS, D, BLOCK_D, BLOCK_N, PAGE, S_PAGE, S_HALF, S_HEAD, S_TOKEN,
            SOFTCAP, TREE, TOKEN_FACTORS, DESCRIPTOR, True,
        )  # fmt: skip

    if ONE_FACTOR:
        acc *= tl.load(FACTORS + 1)
    if slot < 0:
        if HAS_SINKS:
            sink = tl.load(SINKS + query_head, mask=inside, other=0.0) * 1.4426950408889634
            now = tl.maximum(best, sink)
            shrink = tl.exp2(best - now)
            total = total * shrink + tl.exp2(sink - now)
            acc *= shrink[:, None]
            best = now
        acc = acc / tl.where(total == 0.0, 1.0, total)[:, None]
        to = OUT + here[:, None] * (out_steps * 16) + query_head[:, None] * D + d[None, :]
        tl.store(to, cast(acc, OUT.dtype.element_ty), mask=within)
        if wants_lse:
            tl.store(LSE + here * (KV_HEADS * GROUP) + query_head, best + tl.log2(total), mask=inside)
    else:
        state = (slot.to(tl.int64) * KV_HEADS + head) * BLOCK_M + local
        acc = acc / tl.where(total == 0.0, 1.0, total)[:, None]
        tl.store(PARTIAL + state[:, None] * D + d[None, :], acc, mask=within)
        tl.store(PARTIAL_LSE + state, best + tl.log2(total), mask=inside)
