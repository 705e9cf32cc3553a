"""What was announced and has not left: counted once, never for ever."""

from __future__ import annotations

import pytest
from support.kv_world import LAYOUT, World, eventually

from baton_common.clock import ManualClock
from baton_common.errors import Aborted
from baton_kvtransfer import Receipt
from baton_kvtransfer.backlog import STALLED_S, Backlog
from baton_kvtransfer.plan import Block


def block(layers: tuple[int, int], heads: tuple[int, int], tokens: tuple[int, int]) -> Block:
    return Block(
        layer_begin=layers[0], layer_end=layers[1], head_begin=heads[0], head_end=heads[1],
        token_begin=tokens[0], token_end=tokens[1],
    )  # fmt: skip


@pytest.fixture
def clock() -> ManualClock:
    return ManualClock(1.0)


@pytest.fixture
def backlog(clock: ManualClock) -> Backlog:
    return Backlog(layers=4, heads=2, first_token=16, end_token=64, clock=clock)


def test_what_is_announced_twice_or_outside_the_transfer_counts_once_or_not(backlog: Backlog) -> None:
    backlog.announce(0, 4, 10)
    assert backlog.tokens == 0, "the receiver has those positions"
    backlog.announce(0, 4, 32)
    backlog.announce(0, 4, 32)
    assert backlog.tokens == 16
    backlog.announce(0, 4, 1000)
    assert backlog.tokens == 48


def test_layers_and_heads_that_left_are_parts_of_a_token(backlog: Backlog) -> None:
    backlog.announce(0, 2, 32)
    assert backlog.tokens == 8, "half of the layers"
    backlog.left(block((0, 2), (0, 1), (16, 32)))
    assert backlog.tokens == 4
    backlog.left(block((0, 2), (1, 2), (16, 31)))
    assert backlog.tokens == 1, "rounded up: something is left"
    backlog.left(block((0, 2), (1, 2), (31, 32)))
    assert backlog.tokens == 0


def test_chunks_that_are_sent_again_do_not_hide_others(backlog: Backlog) -> None:
    backlog.announce(0, 4, 64)
    backlog.left(block((0, 4), (0, 2), (16, 64)))
    backlog.left(block((0, 4), (0, 2), (16, 32)))
    assert backlog.tokens == 0


def test_a_transfer_that_is_over_has_none(backlog: Backlog) -> None:
    backlog.announce(0, 4, 64)
    backlog.drop()
    backlog.announce(0, 4, 64)
    assert backlog.tokens == 0


def test_a_peer_that_takes_nothing_counts_only_for_a_while(backlog: Backlog, clock: ManualClock) -> None:
    backlog.announce(0, 4, 32)
    clock.advance(0.9 * STALLED_S)
    backlog.announce(0, 4, 64)
    assert backlog.tokens == 48
    clock.advance(0.2 * STALLED_S)
    assert backlog.tokens == 0
    backlog.left(block((0, 1), (0, 2), (16, 32)))
    assert backlog.tokens == 44, "it moves again"


@pytest.mark.parametrize("wire", ["inproc", "shm", "tcp"])
def test_a_real_transfer_ends_with_nothing_unsent(wire: str) -> None:
    world = World(wire)
    try:
        run = world.start(5, 60)
        run.announce(layers_at_once=2, tokens_at_once=16)
        eventually(lambda: run.handle.backlog._cells == 0, "every cell leaves, and counts once")
        run.finish()
        assert isinstance(run.received.wait(), Receipt)
        assert run.handle.unsent_tokens == 0
        given_up = world.start(0, LAYOUT.page_tokens)
        given_up.handle.ready(0, LAYOUT.layers, 0, 1)
        given_up.handle.abort(Aborted("over"))
        assert given_up.handle.unsent_tokens == 0
    finally:
        world.close()
