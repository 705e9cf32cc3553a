"""What the room makes of a tier that fails, lies or is slow; and which pages may be found at all."""

from __future__ import annotations

from dataclasses import replace

import pytest
from support.kv_tiers import FORMAT, FRAME_BYTES, NAMESPACE, DictTier, chain, frame_of, keys_of, metrics, value

from baton_common.clock import ManualClock
from baton_kvtransfer import AxisOrder
from baton_kvtransfer.tiers import Namespace
from baton_kvtransfer.tiers.frames import FrameFormat
from baton_kvtransfer.tiers.guard import Guard

KEYS = keys_of(chain(3))
OUT = memoryview(bytearray(FRAME_BYTES))


class Guarded:
    def __init__(self, tier: DictTier) -> None:
        self.clock, self.metrics, self.tier = ManualClock(), metrics(), tier
        self.guard = Guard(tier, FORMAT, clock=self.clock, metrics=self.metrics, retry_s=30, slow_s=2)
        self.guard.open()


def test_a_failing_tier_is_left_alone_and_tried_again(caplog: pytest.LogCaptureFixture) -> None:
    world = Guarded(DictTier())
    world.guard.put(KEYS[0], frame_of(KEYS[0]))
    world.tier.broken = "the cable is out"
    assert world.guard.has(KEYS) == 0
    calls = len(world.tier.calls)
    assert not world.guard.get(KEYS[0], OUT)
    assert len(world.tier.calls) == calls
    world.clock.advance(30)
    assert not world.guard.get(KEYS[0], OUT), "still out, and no second warning"
    assert len(caplog.records) == 1
    assert "TierFault: the cable is out; serving goes on without it (read)" in caplog.text
    assert value(world.metrics.faults, "file", "read") == 2
    world.tier.broken = ""
    world.clock.advance(30)
    assert world.guard.get(KEYS[0], OUT)
    assert value(world.metrics.off, "file", "read") == 0


def test_a_tier_that_does_not_open_is_opened_later() -> None:
    world = Guarded(DictTier(broken="nobody there"))
    world.guard.put(KEYS[0], frame_of(KEYS[0]))
    assert world.tier.calls == ["open"]
    world.tier.broken = ""
    world.clock.advance(30)
    world.guard.put(KEYS[0], frame_of(KEYS[0]))
    assert world.guard.get(KEYS[0], OUT)
    assert world.tier.calls.count("open") == 2


def test_a_slow_call_counts_as_failed_but_its_answer_is_used() -> None:
    world = Guarded(DictTier())
    world.guard.put(KEYS[0], frame_of(KEYS[0]))
    world.tier.before = lambda call: world.clock.advance(2.5)
    assert world.guard.get(KEYS[0], OUT)
    assert world.guard.has(KEYS) == 0
    assert value(world.metrics.off, "file", "read") == 1
    assert value(world.metrics.off, "file", "write") == 0


def test_a_full_tier_is_no_failure() -> None:
    world = Guarded(DictTier(room=0))
    world.guard.put(KEYS[0], frame_of(KEYS[0]))
    assert value(world.metrics.skipped, "file", "refused") == 1
    assert value(world.metrics.faults, "file", "write") == 0


def test_a_frame_under_another_key_is_deleted() -> None:
    world = Guarded(DictTier())
    world.tier.held[KEYS[0]] = bytes(frame_of(KEYS[1]))
    assert not world.guard.get(KEYS[0], OUT)
    assert KEYS[0] not in world.tier.held
    assert value(world.metrics.damaged, "file") == 1


def test_a_tier_that_cannot_close_is_left() -> None:
    class Stubborn(DictTier):
        def close(self) -> None:
            raise RuntimeError("no")

    Guarded(Stubborn()).guard.close()


OTHERS = [
    pytest.param(replace(NAMESPACE, model_digest="other"), id="model"),
    pytest.param(replace(NAMESPACE, rank=1, ranks=2), id="rank"),
    pytest.param(replace(NAMESPACE, ranks=2), id="ranks"),
    *(
        pytest.param(replace(NAMESPACE, layout=replace(NAMESPACE.layout, **change)), id=next(iter(change)))
        for change in (
            {"layers": 1},
            {"kv": 1},
            {"heads": 4, "dim": 4},
            {"page_tokens": 32, "dim": 4},
            {"dtype": "float16"},
        )
    ),
]


@pytest.mark.parametrize("other", OTHERS)
def test_a_page_of_another_model_format_or_rank_has_another_key(other: Namespace) -> None:
    (page,) = chain(1)
    assert FrameFormat(other).key(page) != FORMAT.key(page)


def test_the_order_of_axes_in_the_pool_does_not_matter() -> None:
    order = AxisOrder.LAYER_PAGE_KV_HEAD_TOKEN_DIM
    (page,) = chain(1)
    other = replace(NAMESPACE, layout=replace(NAMESPACE.layout, order=order))
    assert FrameFormat(other).key(page) == FORMAT.key(page)


def test_every_bit_of_a_frame_counts() -> None:
    frame = frame_of(KEYS[0], 7)
    assert FORMAT.intact(frame, KEYS[0])
    for bit in range(8 * FRAME_BYTES):
        frame[bit // 8] ^= 1 << bit % 8
        assert not FORMAT.intact(frame, KEYS[0]), f"bit {bit}"
        frame[bit // 8] ^= 1 << bit % 8
