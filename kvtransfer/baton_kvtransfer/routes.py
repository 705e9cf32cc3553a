"""Who sends which KV to whom when each side is several ranks: pure arithmetic on ranks, heads and positions.

Rank r of n owns heads [r*H//n, (r+1)*H//n) of H; with more ranks than heads it owns head r*H//n, which has replicas.
Invariant: over all routes of a handoff, every (head, position) of every target rank arrives exactly once, from a rank
that has it. Routes know neither pages nor bytes: each is one transfer, planned like any other.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

from baton_common.ids import TransferId

Span = tuple[int, int]
"""[begin, end)"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Route:
    """One rank to one rank. Heads are local, so counted in the pool of that rank; equally many on both sides."""

    source: int
    target: int
    source_heads: Span
    target_heads: Span
    first_token: int
    end_token: int

    def transfer_id(self, handoff: TransferId) -> TransferId:
        """Of this part of a handoff."""
        return TransferId(f"{handoff}/{self.source}.{self.target}")


def heads_of(rank: int, ranks: int, heads: int) -> Span:
    """Heads of the model that the rank owns; never none."""
    begin = rank * heads // ranks
    return begin, max(begin + 1, (rank + 1) * heads // ranks)


def routes(
    *,
    heads: int,
    source_ranks: int,
    target_ranks: int,
    latent: bool,
    number: int,
    first_token: int,
    end_token: int,
    cached_tokens: int = 0,
) -> list[Route]:
    """`heads`: KV heads of the model. `latent`: MLA, whose one head every rank has whole. `number` of the handoff, to
    spread the work of replicas. Positions below `cached_tokens` are not sent. Raises ValueError for impossible sizes.

    Each target rank has at least one route, also when no position is left: its transfer carries token #1.
    """
    if min(heads, source_ranks, target_ranks) < 1:
        raise ValueError(f"{heads} heads on {source_ranks} and {target_ranks} ranks; each must be at least 1")
    if latent and heads != 1:
        raise ValueError(f"a latent cache has one head, not {heads}")
    first = min(max(first_token, cached_tokens), end_token)
    if latent:
        parts = _shares(first, end_token, source_ranks, number)
        return [
            Route(source=source, target=target, source_heads=(0, 1), target_heads=(0, 1), first_token=a, end_token=b)
            for target in range(target_ranks)
            for source, (a, b) in parts
        ]
    found: list[Route] = []
    for target in range(target_ranks):
        wanted = heads_of(target, target_ranks, heads)
        for owners, owned in _owners(source_ranks, heads):
            begin, end = max(wanted[0], owned[0]), min(wanted[1], owned[1])
            if begin < end:
                route = Route(
                    source=owners[(number + target) % len(owners)],
                    target=target,
                    source_heads=(begin - owned[0], end - owned[0]),
                    target_heads=(begin - wanted[0], end - wanted[0]),
                    first_token=first,
                    end_token=end_token,
                )
                found.append(route)
    return found


def _owners(ranks: int, heads: int) -> list[tuple[list[int], Span]]:
    """Replicas together, each group with its heads; the groups divide the heads."""
    groups: dict[Span, list[int]] = {}
    for rank in range(ranks):
        groups.setdefault(heads_of(rank, ranks, heads), []).append(rank)
    return [(replicas, span) for span, replicas in groups.items()]


def _shares(first: int, end: int, ranks: int, number: int) -> list[tuple[int, Span]]:
    """The positions, evenly over the ranks; one empty share when there are none."""
    count = end - first
    cuts = [first + count * index // ranks for index in range(ranks + 1)]
    shares = [(rank, (a, b)) for rank, (a, b) in enumerate(pairwise(cuts)) if a < b]
    return shares or [(number % ranks, (first, end))]
