"""Choosing tokens: pure math on float32 logits [rows, vocab]; the CPU path and the oracle of later GPU kernels.

Order: repetition, presence and frequency penalties, bias and masks, (log-probabilities), temperature, top-k, top-p,
min-p, noise. Truncation keeps every token whose logit reaches a threshold, so equal logits are kept or dropped
together and the order of a sort never shows. Noise comes from a counter-based integer hash: it depends on the seed of
the request, the output position and the vocabulary index, never on the batch, the worker or earlier draws.
It does not know requests, rows or which of this a request wants.
"""

from __future__ import annotations

import torch
from torch import Tensor

CANDIDATES = 1024  # top-p is decided among so many best tokens; rows that need more are sorted whole
_GOLDEN = -0x61C88647  # 0x9E3779B9 as int32
_M1, _M2 = 0x7FEB352D, 0x846CA68B - (1 << 32)


def argmax(logits: Tensor) -> Tensor:
    """Index of the first maximum of each row: int64[rows]."""
    if logits.device.type == "cpu":  # torch's own is scalar there: ten times slower on a vocabulary of 150,000
        return torch.from_numpy(logits.numpy().argmax(-1))
    return logits.argmax(-1)


def penalise_(
    logits: Tensor, counts: Tensor, in_prompt: Tensor, repetition: Tensor, presence: Tensor, frequency: Tensor
) -> Tensor:
    """Penalties, in place. counts: int32[rows, vocab] of outputs; in_prompt: bool[rows, vocab]; the rest float32[rows].

    Repetition as in CTRL (arXiv 1909.05858) and Hugging Face: over prompt and output, positive logits are divided,
    negative ones multiplied. Presence and frequency as OpenAI documents them: over the output only, subtracted.
    """
    in_output = counts > 0
    factor = repetition[:, None]
    repeated = torch.where(logits > 0, logits / factor, logits * factor)
    torch.where(in_output | in_prompt, repeated, logits, out=logits)
    logits -= frequency[:, None] * counts
    logits -= presence[:, None] * in_output
    return logits


def mix_(x: Tensor) -> Tensor:
    """A bijection of int32 lanes that spreads every bit, in place.

    In unsigned 32-bit arithmetic: x ^= x >> 16; x *= 0x7feb352d; x ^= x >> 15; x *= 0x846ca68b; x ^= x >> 16.
    Constants: "lowbias32", C. Wellons, hash-prospector. Signed shifts carry the sign in, hence the masks.
    """
    shifted = x >> 16
    x ^= shifted.bitwise_and_(0xFFFF)
    x *= _M1
    torch.bitwise_right_shift(x, 15, out=shifted)
    x ^= shifted.bitwise_and_(0x1FFFF)
    x *= _M2
    torch.bitwise_right_shift(x, 16, out=shifted)
    x ^= shifted.bitwise_and_(0xFFFF)
    return x


def noise_keys(seeds: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
    """Two int32[rows] keys from int64 seeds (all 64 bits count) and output positions.

    s0 = mix(low ^ 0x9e3779b9); s1 = mix(high ^ s0); k0 = mix(position ^ s0); k1 = mix(k0 + s1), all modulo 2**32.
    """
    low = (seeds & 0xFFFFFFFF).to(torch.int32)
    high = (seeds >> 32).to(torch.int32)
    s0 = mix_(low ^ _GOLDEN)
    s1 = mix_(high ^ s0)
    k0 = mix_(positions.to(torch.int32) ^ s0)
    return k0, mix_(k0 + s1)


def noise_bits(k0: Tensor, k1: Tensor, ids: Tensor) -> Tensor:
    """mix(mix(id + k0) ^ k1), int32, of broadcastable keys and vocabulary indices."""
    bits = mix_(ids.to(torch.int32) + k0)
    bits ^= k1
    return mix_(bits)


def gumbel(bits: Tensor) -> Tensor:
    """Standard Gumbel noise from hash bits, float32, always finite.

    u = (float(bits & 0x7fffffff) + 0.5) * 2**-31, at most 1 - 2**-24; noise = -log(-log1p(-u)). The winner of a draw
    has a small u, and small floats are dense: that keeps ties rare in large vocabularies.
    """
    u = (bits & 0x7FFFFFFF).to(torch.float32)
    u.add_(0.5).mul_(2.0**-31).clamp_(max=1.0 - 2.0**-24)
    return u.neg_().log1p_().neg_().log_().neg_()


def scale_(logits: Tensor, temperature: Tensor) -> Tensor:
    """(logits - row maximum) / temperature, in place: the best token is at 0, so no temperature overflows."""
    logits -= logits.amax(-1, keepdim=True)
    logits /= temperature[:, None]
    return logits


def thresholds(scaled: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor, *, width: int = CANDIDATES) -> Tensor:
    """Smallest kept value per row of `scaled` (from `scale_`): float32[rows], -inf = all.

    top_k: int64[rows], 0 = off; top_p: 1 = off, of the mass that top-k left; min_p: of the best token's probability.
    `width` is how many best tokens are looked at; rows that need more cost a sort of the whole row and a host sync.
    """
    vocab = scaled.shape[-1]
    width = min(width, vocab)
    values = scaled.topk(width, dim=-1).values if width < vocab else scaled.sort(dim=-1, descending=True).values
    limit = torch.where(top_k > 0, top_k.clamp(max=vocab), vocab)
    inside = torch.arange(width, device=scaled.device) < limit[:, None]
    mass = torch.where(inside, values.exp(), 0.0)
    total = torch.where(limit <= width, mass.sum(-1), scaled.logsumexp(-1).exp())
    before = mass.cumsum(-1) - mass
    keep = inside & ((before < (top_p * total)[:, None]) | (top_p >= 1.0)[:, None])
    keep[:, 0] = True
    lowest = values.gather(-1, keep.sum(-1, keepdim=True) - 1).squeeze(-1)
    lowest.masked_fill_((limit >= vocab) & (top_p >= 1.0), float("-inf"))
    short = keep[:, -1] & (limit > width) & (top_p < 1.0) | (limit > width) & (limit < vocab)
    if width < vocab and bool(short.any()):
        rows = short.nonzero().squeeze(-1)
        whole = thresholds(scaled[rows], top_k[rows], top_p[rows], min_p.new_zeros(len(rows)), width=vocab)
        lowest[rows] = whole
    return torch.maximum(lowest, min_p.log())


def draw(scaled: Tensor, k0: Tensor, k1: Tensor) -> Tensor:
    """One token per row with probability softmax(scaled), by the Gumbel-max trick: int64[rows]."""
    ids = torch.arange(scaled.shape[-1], dtype=torch.int32, device=scaled.device)
    return argmax(gumbel(noise_bits(k0[:, None], k1[:, None], ids)).add_(scaled))


def draw_truncated(scaled: Tensor, lowest: Tensor, k0: Tensor, k1: Tensor) -> Tensor:
    """`draw` among the tokens with scaled >= lowest; only those get noise, the same noise as in `draw`."""
    rows, ids = (scaled >= lowest[:, None]).nonzero(as_tuple=True)
    scores = torch.full_like(scaled, float("-inf"))
    scores[rows, ids] = gumbel(noise_bits(k0[rows], k1[rows], ids)).add_(scaled[rows, ids])
    return argmax(scores)


def log_probabilities(logits: Tensor, tokens: Tensor, top: int) -> tuple[Tensor, Tensor, Tensor]:
    """Of the chosen tokens and of the `top` best ones: float32[rows], int64[rows, top], float32[rows, top]."""
    norm = logits.logsumexp(-1, keepdim=True)
    chosen = (logits.gather(-1, tokens[:, None]) - norm).squeeze(-1)
    best = logits.topk(min(top, logits.shape[-1]), dim=-1)
    return chosen, best.indices, best.values - norm
