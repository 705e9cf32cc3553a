"""Handoffs between pools that differ: tensor parallelism, page size, order of axes, dtype. Real endpoints and wires."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from support.kv_ranks import CANARY, DIM, LAYERS, TOKENS, Rank, Sides, layout_of
from support.kv_world import eventually, no_kv_threads

from baton_common.errors import BatonError, ErrorKind
from baton_kvtransfer import AxisOrder, PageLayout, Receipt
from baton_kvtransfer.errors import LayoutMismatch
from baton_kvtransfer.routes import Route, heads_of, routes

ORDERS = list(AxisOrder)


@contextmanager
def sides(wire: str, **how: Any) -> Iterator[Sides]:
    made = Sides(wire, **how)
    try:
        yield made
    finally:
        made.close()
    assert no_kv_threads()


def plan(world: Sides, *, latent: bool = False, number: int = 0, cached: int = 0) -> list[Route]:
    return routes(
        heads=world.heads, source_ranks=len(world.sources), target_ranks=len(world.targets), latent=latent,
        number=number, first_token=0, end_token=TOKENS, cached_tokens=cached,
    )  # fmt: skip


def untouched(rank: Rank, cached: int) -> bool:
    """Everything but positions [cached, TOKENS) is as it was made."""
    rest = rank.pool.clone()
    for position in range(cached, TOKENS):
        page, token = rank.cell(position)
        rest[page, :, :, :, token] = CANARY
    return bool((rest.float() == CANARY).all())


# ---- tensor parallelism ---------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("heads", "source", "target", "wire"),
    [
        (4, 2, 4, "shm"),
        (4, 4, 2, "tcp"),
        (4, 1, 2, "tcp"),
        (6, 3, 2, "shm"),
        (6, 2, 3, "tcp"),
        (6, 3, 6, "shm"),
        (2, 4, 1, "shm"),  # replicas on the sending side
        (2, 1, 4, "tcp"),  # on the receiving side
        (2, 4, 4, "shm"),  # on both
    ],
)
@pytest.mark.parametrize("cached", [0, 23])
def test_every_rank_gets_its_heads(heads: int, source: int, target: int, wire: str, cached: int) -> None:
    """Pages and axes differ too: 16-token pages against 24, heads outside against heads inside."""
    theirs = layout_of(heads=heads, page_tokens=24, order=AxisOrder.PAGE_LAYER_KV_TOKEN_HEAD_DIM)
    with sides(
        wire, heads=heads, source=layout_of(heads=heads), target=theirs, source_ranks=source, target_ranks=target
    ) as world:
        sending = world.start(plan(world, number=7, cached=cached))
        sending.run()
        assert all(isinstance(outcome, Receipt) for outcome in sending.sent.values())
        for rank, one in enumerate(world.targets):
            mine = world.truth[cached:, :, :, slice(*heads_of(rank, target, heads))]
            assert torch.equal(one.holds(cached), mine)
            assert untouched(one, cached)


@pytest.mark.parametrize(("source", "target"), [(2, 1), (1, 2), (3, 2)])
def test_a_latent_cache_comes_in_parts(source: int, target: int) -> None:
    ours, theirs = layout_of(heads=1, kv=1), layout_of(heads=1, kv=1, page_tokens=64)
    with sides("shm", heads=1, source=ours, target=theirs, source_ranks=source, target_ranks=target) as world:
        sending = world.start(plan(world, latent=True))
        sending.run()
        for one in world.targets:
            assert torch.equal(one.holds(), world.truth)
            assert untouched(one, 0)
        shares = [outcome.bytes for outcome in sending.sent.values() if isinstance(outcome, Receipt)]
        assert sum(shares) == target * TOKENS * LAYERS * DIM * 4
        assert max(shares) - min(shares) <= LAYERS * DIM * 4, "the work is spread"


def test_nothing_left_to_send_still_brings_the_first_token() -> None:
    """`Rank.on_received` looks at the token."""
    with sides("shm", heads=4, source=layout_of(), target=layout_of(), source_ranks=2, target_ranks=4) as world:
        sending = world.start(plan(world, cached=TOKENS))
        sending.run()
        assert all(outcome.bytes == 0 for outcome in sending.sent.values() if isinstance(outcome, Receipt))
        assert all(untouched(one, TOKENS) for one in world.targets)


def test_one_route_that_fails_ends_the_handoff_of_its_rank() -> None:
    """Two ranks send to one; what the other one sends is aborted, and its pages are the owner's again."""
    with sides("tcp", heads=4, source=layout_of(), target=layout_of(), source_ranks=2) as world:
        found = plan(world)
        sending = world.start(found)
        for route in found:
            sending.announce(route, layers=1)
        sending.abort(found[0], BatonError("the owner gave up", kind=ErrorKind.ABORTED))
        sending.wait(sent=1, received=1)
        (outcome,) = sending.received.values()
        assert isinstance(outcome, BatonError)
        assert "the owner gave up" in outcome.message
        (other,) = sending.sent.values()
        assert isinstance(other, BatonError), "told why, or that nobody waits for it any more"
        eventually(lambda: not any(peer.transfers for peer in world.targets[0].endpoint.peers()), "nothing is held")
        again = world.start(found, "h-2")
        again.run()
        assert torch.equal(world.targets[0].holds(), world.truth)


def test_another_number_of_heads_is_refused_by_name() -> None:
    with sides("tcp", heads=4, source=layout_of(), target=layout_of(), source_ranks=2) as world:
        (wrong, *_) = plan(world)
        lie = Route(
            source=wrong.source, target=wrong.target, source_heads=(0, 1), target_heads=(0, 2), first_token=0,
            end_token=TOKENS,
        )  # fmt: skip
        sending = world.start([lie])
        sending.wait(sent=1, received=1)
        (error,) = sending.received.values()
        assert isinstance(error, LayoutMismatch)
        assert (error.field, error.ours, error.theirs) == ("heads", "2", "1")


@pytest.mark.parametrize("heads", [(0, 5), (2, 2), (-1, 1)])
def test_heads_that_the_pool_has_not_are_refused_at_the_door(heads: tuple[int, int]) -> None:
    with sides("tcp", heads=4, source=layout_of(), target=layout_of()) as world:
        wrong = Route(source=0, target=0, source_heads=heads, target_heads=heads, first_token=0, end_token=TOKENS)
        with pytest.raises(ValueError, match="of a pool of 4"):
            world.start([wrong])


# ---- pages, axes, dtypes --------------------------------------------------------------------------------------------
@pytest.mark.parametrize("target", ORDERS, ids=lambda order: order.label)
@pytest.mark.parametrize("source", ORDERS, ids=lambda order: order.label)
def test_any_order_of_axes_crosses_to_any(source: AxisOrder, target: AxisOrder) -> None:
    ours, theirs = layout_of(order=source, page_tokens=1), layout_of(order=target, page_tokens=128)
    with sides("shm", heads=4, source=ours, target=theirs) as world:
        world.start(plan(world)).run()
        assert torch.equal(world.targets[0].holds(), world.truth)
        assert untouched(world.targets[0], 0)


def payload_bytes(dtype: str) -> int:
    cells = TOKENS * LAYERS * 2 * 4
    return cells * {"float32": DIM * 4, "bfloat16": DIM * 2, "float16": DIM * 2, "float8_e4m3fn": DIM + 4}[dtype]


def converted(values: torch.Tensor, source: str, target: str) -> torch.Tensor:
    """What float32 `values`, kept as `source`, are when they are kept as `target`."""
    if source == target:
        return values
    if target != "float8_e4m3fn":
        return values.to(getattr(torch, target)).float()
    scales = values.abs().amax(-1, keepdim=True) / 448
    return (values / scales).to(torch.float8_e4m3fn).float() * scales


@pytest.mark.parametrize("wire", ["shm", "tcp"])
@pytest.mark.parametrize(
    ("source", "target", "payload"),
    [
        ("float32", "bfloat16", "bfloat16"),
        ("bfloat16", "float32", "bfloat16"),
        ("float32", "float16", "float16"),
        ("float16", "float32", "float16"),
        ("bfloat16", "float16", "float16"),
        ("float32", "float8_e4m3fn", "float8_e4m3fn"),
        ("bfloat16", "float8_e4m3fn", "float8_e4m3fn"),
        ("float8_e4m3fn", "bfloat16", "float8_e4m3fn"),
        ("float8_e4m3fn", "float32", "float8_e4m3fn"),
        ("float8_e4m3fn", "float8_e4m3fn", "float8_e4m3fn"),
        ("bfloat16", "bfloat16", "bfloat16"),
    ],
)
def test_dtypes_are_converted_on_the_narrower_side(source: str, target: str, payload: str, wire: str) -> None:
    ours = layout_of(dtype=source, page_tokens=16)
    theirs = layout_of(dtype=target, page_tokens=40, order=AxisOrder.LAYER_PAGE_KV_TOKEN_HEAD_DIM)
    with sides(wire, heads=4, source=ours, target=theirs) as world:
        sending = world.start(plan(world))
        sending.run()
        (receipt,) = sending.sent.values()
        assert isinstance(receipt, Receipt)
        assert receipt.bytes == payload_bytes(payload), "the narrower dtype travels"
        assert torch.equal(world.targets[0].holds(), converted(world.sources[0].holds(), source, target))
        if target != "float8_e4m3fn":
            assert untouched(world.targets[0], 0)


def test_a_dtype_that_cannot_be_converted_is_refused_with_both_names() -> None:
    with sides("tcp", heads=4, source=layout_of(dtype="float32"), target=layout_of(dtype="int8")) as world:
        sending = world.start(plan(world))
        sending.wait(sent=1, received=0)
        (error,) = sending.sent.values()
        assert isinstance(error, LayoutMismatch)
        assert (error.field, error.ours, error.theirs) == ("kv_dtype", "float32", "int8")
        (peer,) = world.targets[0].endpoint.peers()
        assert peer.state == "refused"
        assert "kv_dtype" in peer.reason


def test_layouts_know_four_orders() -> None:
    shape = {"layers": 2, "kv": 2, "heads": 3, "page_tokens": 4, "dim": 5, "dtype": "int8"}
    strides = {order.label: PageLayout(order=order, **shape).strides(7) for order in AxisOrder}  # type: ignore[arg-type]
    assert strides == {
        "page_layer_kv_head_token_dim": (240, 120, 60, 20, 5, 1),
        "layer_page_kv_head_token_dim": (120, 840, 60, 20, 5, 1),
        "page_layer_kv_token_head_dim": (240, 120, 60, 5, 15, 1),
        "layer_page_kv_token_head_dim": (120, 840, 60, 5, 15, 1),
    }
