"""Choosing tokens: pure math on float32 logits [rows, vocab]; the CPU path and the specification of the kernels.

Order: repetition, presence and frequency penalties, bias and masks, (log-probabilities), temperature, top-k, top-p,
min-p, noise. Truncation keeps every token whose logit reaches a threshold, so equal logits are kept or dropped
together and the order of a sort never shows. Noise comes from a counter-based integer hash: it depends on the seed of
the request, the output position and the vocabulary index, never on the batch, the worker or earlier draws.
It does not know requests, rows or which of this a request wants.
"""

from __future__ import annotations

import torch
from torch import Tensor

CANDIDATES = 1024  # tokens that truncation looks at first; rows that need more are sorted whole
COIN = -1  # in place of a vocabulary index: the noise of a position that belongs to no token
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

    s0 = mix(low ^ 0x9e3779b9); s1 = mix(high ^ s0); k0 = mix(position ^ s1); k1 = mix(k0 + s0), all modulo 2**32.
    """
    low = (seeds & 0xFFFFFFFF).to(torch.int32)
    high = (seeds >> 32).to(torch.int32)
    s0 = mix_(low ^ _GOLDEN)
    s1 = mix_(high ^ s0)
    k0 = mix_(positions.to(torch.int32) ^ s1)
    return k0, mix_(k0 + s0)


def noise_bits(k0: Tensor, k1: Tensor, ids: Tensor) -> Tensor:
    """mix(id * 0x9e3779b9 + k0) ^ k1, int32 modulo 2**32, of broadcastable keys and vocabulary indices."""
    bits = ids.to(torch.int32) * _GOLDEN + k0
    return mix_(bits).bitwise_xor_(k1)


def race_(bits: Tensor) -> Tensor:
    """Logarithm of standard exponential variates from hash bits, float32, always finite: minus Gumbel noise.

    With u of `uniform` the value is log(-log1p(-u)). The winner of a draw has a small u, and small floats are dense:
    that keeps ties rare in large vocabularies.
    """
    return uniform(bits).neg_().log1p_().neg_().log_()


def uniform(bits: Tensor) -> Tensor:
    """float32 in [2**-32, 1 - 2**-24] from hash bits, which are changed."""
    return bits.bitwise_and_(0x7FFFFFFF).to(torch.float32).mul_(2.0**-31).clamp_(2.0**-32, 1.0 - 2.0**-24)


def draw(logits: Tensor, temperature: Tensor, k0: Tensor, k1: Tensor) -> Tensor:
    """One token per row with probability softmax(logits / temperature), by the Gumbel-max trick: int64[rows].

    Temperatures are float32[rows] > 0; distances to the best token are scaled, so none of them overflows.
    """
    ids = torch.arange(logits.shape[-1], dtype=torch.int32, device=logits.device)
    scaled = (logits - logits.amax(-1, keepdim=True)).div_(temperature[:, None])
    return argmax(scaled.sub_(race_(noise_bits(k0[:, None], k1[:, None], ids))))


def draw_truncated(
    logits: Tensor,
    temperature: Tensor,
    top_k: Tensor,
    top_p: Tensor,
    min_p: Tensor,
    k0: Tensor,
    k1: Tensor,
    *,
    width: int = CANDIDATES,
    whole_mass: bool = True,
) -> Tensor:
    """`draw` among the tokens that `truncate` keeps, with the same noise; the parameters are explained there.

    Rows for which `width` was too little cost a sort of the whole row and, on a GPU, a wait for the device.
    """
    scaled, ids, short = truncate(logits, temperature, top_k, top_p, min_p, width=width, whole_mass=whole_mass)
    best = argmax(scaled.sub_(race_(noise_bits(k0[:, None], k1[:, None], ids))))
    tokens = ids.gather(-1, best[:, None]).squeeze(-1)
    if width < logits.shape[-1] and bool(short.any()):
        rows = short.nonzero().squeeze(-1)
        own = (part[rows] for part in (logits, temperature, top_k, top_p, min_p, k0, k1))
        tokens[rows] = draw_truncated(*own, width=logits.shape[-1])
    return tokens


def truncate(
    logits: Tensor,
    temperature: Tensor,
    top_k: Tensor,
    top_p: Tensor,
    min_p: Tensor,
    *,
    width: int,
    whole_mass: bool = True,
) -> tuple[Tensor, Tensor, Tensor]:
    """The `width` best tokens of each row: scaled logits (-inf where dropped) and ids, [rows, width], and `short`.

    top_k: int64[rows], 0 = off; top_p: 1 = off, of the mass that top-k left; min_p: of the best token's probability.
    short: bool[rows], true where tokens outside of these might be kept too: the row has to be looked at whole.
    whole_mass: false promises that every row with a top-p has a top-k below `width`, which saves a pass.
    """
    vocab = logits.shape[-1]
    width = min(width, vocab)
    values, ids = logits.topk(width, dim=-1) if width < vocab else logits.sort(dim=-1, descending=True)
    top, scale = values[:, :1].clone(), temperature[:, None]
    scaled = (values - top).div_(scale)
    limit = torch.where(top_k > 0, top_k.clamp(max=vocab), vocab)
    inside = torch.arange(width, device=logits.device) < limit[:, None]
    mass = torch.where(inside, scaled.exp(), 0.0)
    total = mass.sum(-1)
    if whole_mass and width < vocab:
        total = torch.where(limit <= width, total, (logits - top).div_(scale).exp_().sum(-1))
    before = mass.cumsum(-1) - mass
    keep = inside & ((before < (top_p * total)[:, None]) | (top_p >= 1.0)[:, None])
    keep[:, 0] = True
    lowest = scaled.gather(-1, keep.sum(-1, keepdim=True) - 1)
    # Where neither top-k nor top-p cut anything off, the last one looked at is no border.
    lowest.masked_fill_(((limit >= vocab) & (top_p >= 1.0))[:, None], float("-inf"))
    lowest = torch.maximum(lowest, min_p.log()[:, None])
    short = (scaled[:, -1] >= lowest[:, 0]) | ((limit > width) & (limit < vocab))
    return scaled.masked_fill_(scaled < lowest, float("-inf")), ids, short


def log_probabilities(logits: Tensor, tokens: Tensor, top: int) -> tuple[Tensor, Tensor, Tensor]:
    """Of the chosen tokens and of the `top` best ones: float32[rows], int64[rows, top], float32[rows, top]."""
    norm = logits.logsumexp(-1, keepdim=True)
    chosen = (logits.gather(-1, tokens[:, None]) - norm).squeeze(-1)
    best = logits.topk(min(top, logits.shape[-1]), dim=-1)
    return chosen, best.indices, best.values - norm


def matched(draft: Tensor, lengths: Tensor, chosen: Tensor) -> tuple[Tensor, Tensor]:
    """Verify drafts that no distribution belongs to: looked up, or the drafter's best. accepted int64[R], tokens
    int64[R, K + 1], -1 behind the last.

    draft: int64[R, K], of which lengths int64[R] count; chosen: int64[R, K + 1], what `sample` chose at each position
    given the drafts before it. A draft is accepted while it is what would have been chosen anyway: with the probability
    that the target gives it, as in rejection sampling, and the tokens are those of decoding without drafts, seed by
    seed. Waits for nothing.
    """
    place = torch.arange(chosen.shape[1], device=draft.device)
    right = (draft == chosen[:, :-1]) & (place[:-1] < lengths[:, None])
    accepted = right.long().cumprod(1).sum(1)
    return accepted, torch.where(place <= accepted[:, None], chosen, -1)


def verify(
    draft: Tensor, lengths: Tensor, logits: Tensor, probabilities: Tensor, temperature: Tensor, k0: Tensor, k1: Tensor
) -> tuple[Tensor, Tensor]:
    """Rejection sampling (arXiv 2211.17192, 2302.01318): accepted int64[R], tokens int64[R, K + 1], -1 behind the last.

    draft: int64[R, K] of which lengths int64[R] count, each drawn from probabilities [R, K, V], with other noise than
    that of the keys; logits [R, K + 1, V] of the target given the drafts before; temperature [R], 0 = greedy; keys
    int32[R, K + 1]. A draft is accepted with probability min(1, p / q); the first rejected one is replaced by a draw
    from what p has more than q, and behind the last one a token is drawn from p: tokens have the target's distribution.
    """
    greedy = (temperature == 0)[:, None, None]
    best = torch.zeros_like(logits).scatter_(2, logits.argmax(2, keepdim=True), 1.0)
    p = torch.where(greedy, best, (logits / temperature.clamp(min=1e-9)[:, None, None]).softmax(2))
    coin = noise_bits(k0, k1, torch.tensor(COIN, dtype=torch.int32, device=draft.device))[:, :-1]
    p_draft, q_draft = (part.gather(2, draft[:, :, None])[:, :, 0] for part in (p[:, :-1], probabilities))
    place = torch.arange(logits.shape[1], device=draft.device)
    right = (uniform(coin) * q_draft < p_draft) & (place[:-1] < lengths[:, None])
    accepted = right.long().cumprod(1).sum(1)

    row = torch.arange(len(draft), device=draft.device)
    q = torch.cat([probabilities, torch.zeros_like(probabilities[:, :1])], 1)[row, accepted]
    more = (p[row, accepted] - q.where((accepted < lengths)[:, None], 0.0)).clamp_(min=0.0)
    ids = torch.arange(logits.shape[2], dtype=torch.int32, device=draft.device)
    noise = race_(noise_bits(k0[row, accepted, None], k1[row, accepted, None], ids))
    drafted = torch.cat([draft, torch.zeros_like(draft[:, :1])], 1)
    # Where p has nothing more, p and q are the same but for rounding: the draft is as good as any.
    token = torch.where(more.amax(1) > 0, argmax(more.log() - noise), drafted[row, accepted])
    following = torch.where(place == accepted[:, None], token[:, None], -1)
    return accepted, torch.where(place < accepted[:, None], drafted, following)
