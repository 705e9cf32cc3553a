"""Which rank sends what to whom: every cell of every target rank exactly once, from a rank that has it."""

from __future__ import annotations

from collections import Counter
from itertools import product

import hypothesis.strategies as st
import pytest
from hypothesis import given, settings

from baton_common.ids import TransferId
from baton_kvtransfer.plan import Block, page_runs
from baton_kvtransfer.routes import Route, heads_of, routes

Cell = tuple[int, int]
"""(head of the model, position)"""


def planned(
    *, heads: int, source: int, target: int, latent: bool = False, number: int = 0, first: int = 0, end: int = 64,
    cached: int = 0,
) -> list[Route]:  # fmt: skip
    return routes(
        heads=heads, source_ranks=source, target_ranks=target, latent=latent, number=number, first_token=first,
        end_token=end, cached_tokens=cached,
    )  # fmt: skip


def on_pages(route: Route, heads: tuple[int, int], page_tokens: int) -> list[tuple[int, int]]:
    """(local head, position) as a rank touches them in its pages, in the order of the payload."""
    block = Block(
        layer_begin=0, layer_end=1, head_begin=heads[0], head_end=heads[1], token_begin=route.first_token,
        token_end=route.end_token,
    )  # fmt: skip
    runs = list(page_runs(block, page_tokens))
    assert all(run.offset >= 0 and run.offset + run.count <= page_tokens for run in runs)
    positions = [run.page * page_tokens + run.offset + step for run in runs for step in range(run.count)]
    return list(product(range(*heads), positions))


def check(found: list[Route], *, heads: int, source: int, target: int, tokens: range, pages: tuple[int, int]) -> None:
    arrived: dict[int, Counter[Cell]] = {rank: Counter() for rank in range(target)}
    for route in found:
        ours, theirs = heads_of(route.source, source, heads), heads_of(route.target, target, heads)
        assert 0 <= route.source_heads[0] < route.source_heads[1] <= ours[1] - ours[0]
        sent = on_pages(route, route.source_heads, pages[0])
        got = on_pages(route, route.target_heads, pages[1])
        assert [(ours[0] + head, position) for head, position in sent] == [
            (theirs[0] + head, position) for head, position in got
        ], "the same cell of the model on both sides"
        arrived[route.target].update((theirs[0] + head, position) for head, position in got)
    for rank, cells in arrived.items():
        assert cells == Counter(product(range(*heads_of(rank, target, heads)), tokens))
    assert {route.target for route in found} == set(range(target)), "token #1 reaches every rank"
    pairs = [(route.source, route.target) for route in found]
    assert len(set(pairs)) == len(pairs), "a pair of ranks has one transfer"


@given(
    heads=st.integers(1, 32),
    ranks=st.tuples(st.integers(1, 16), st.integers(1, 16)),
    number=st.integers(0, 2**40),
    tokens=st.tuples(st.integers(0, 300), st.integers(0, 300), st.integers(0, 700)),
    pages=st.tuples(st.integers(1, 128), st.integers(1, 128)),
)
@settings(max_examples=150, deadline=None)
def test_every_head_and_position_of_every_rank_arrives_once(
    heads: int, ranks: tuple[int, int], number: int, tokens: tuple[int, int, int], pages: tuple[int, int]
) -> None:
    first, count, cached = tokens
    found = planned(
        heads=heads, source=ranks[0], target=ranks[1], number=number, first=first, end=first + count, cached=cached
    )
    wanted = range(min(max(first, cached), first + count), first + count)
    check(found, heads=heads, source=ranks[0], target=ranks[1], tokens=wanted, pages=pages)


@given(
    ranks=st.tuples(st.integers(1, 16), st.integers(1, 16)),
    number=st.integers(0, 99),
    tokens=st.tuples(st.integers(0, 40), st.integers(0, 90)),
    pages=st.tuples(st.integers(1, 128), st.integers(1, 128)),
)
@settings(max_examples=80, deadline=None)
def test_a_latent_cache_is_split_by_position(
    ranks: tuple[int, int], number: int, tokens: tuple[int, int], pages: tuple[int, int]
) -> None:
    first, end = tokens[0], sum(tokens)
    found = planned(heads=1, source=ranks[0], target=ranks[1], latent=True, number=number, first=first, end=end)
    check(found, heads=1, source=ranks[0], target=ranks[1], tokens=range(first, end), pages=pages)
    if tokens[1]:
        sizes = Counter(route.end_token - route.first_token for route in found)
        assert max(sizes) - min(sizes) <= 1, "evenly"


@pytest.mark.parametrize("heads", [1, 2, 3, 8, 32])
def test_all_pairs_of_ranks(heads: int) -> None:
    for source, target in product(range(1, 17), repeat=2):
        found = planned(heads=heads, source=source, target=target, number=5, end=2)
        check(found, heads=heads, source=source, target=target, tokens=range(2), pages=(1, 3))


def test_two_ranks_to_four_send_halves() -> None:
    found = planned(heads=8, source=2, target=4)
    assert [(r.source, r.target, r.source_heads, r.target_heads) for r in found] == [
        (0, 0, (0, 2), (0, 2)),
        (0, 1, (2, 4), (0, 2)),
        (1, 2, (0, 2), (0, 2)),
        (1, 3, (2, 4), (0, 2)),
    ]


def test_replicas_take_turns() -> None:
    """Four ranks hold two heads: whoever is asked, each pair of replicas shares the work over handoffs and targets."""
    one_target = Counter(
        route.source for number in range(10) for route in planned(heads=2, source=4, target=1, number=number)
    )
    assert one_target == dict.fromkeys(range(4), 5)
    equal = Counter(route.source for route in planned(heads=2, source=4, target=4))
    assert equal == dict.fromkeys(range(4), 1), "no rank is idle while another sends twice"


def test_each_route_has_an_id_of_its_own() -> None:
    ids = {route.transfer_id(TransferId("d-7")) for route in planned(heads=8, source=2, target=4)}
    assert ids == {"d-7/0.0", "d-7/0.1", "d-7/1.2", "d-7/1.3"}


@pytest.mark.parametrize(
    ("sizes", "says"),
    [
        ({"heads": 0, "source": 1, "target": 1}, "at least 1"),
        ({"heads": 8, "source": 0, "target": 1}, "at least 1"),
        ({"heads": 2, "source": 1, "target": 1, "latent": True}, "one head"),
    ],
)
def test_sizes_that_cannot_be_are_refused(sizes: dict[str, int], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        planned(**sizes)
