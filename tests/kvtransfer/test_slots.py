"""Small parts that everything leans on: generations, credits, gates, and the one place where a transfer ends."""

from __future__ import annotations

import pytest

from baton_common.errors import BatonError
from baton_common.ids import RequestId, TransferId
from baton_kvtransfer import Inbound
from baton_kvtransfer.errors import WireError
from baton_kvtransfer.expectations import Expectations
from baton_kvtransfer.gate import Gate
from baton_kvtransfer.slots import Credits, SlotTable
from baton_proto.peer_pb2 import Slot

ID = TransferId("t")


def inbound(deadline_s: float = 9.0) -> Inbound:
    return Inbound(
        transfer_id=ID, request_id=RequestId("r"), pages=[], first_token=0, end_token=0, deadline_s=deadline_s
    )


def nobody(transfer_id: TransferId, error: BatonError) -> None:
    raise AssertionError("nobody claimed it")


def test_a_slot_taken_back_makes_older_generations_late() -> None:
    table = SlotTable(2)
    before = table.snapshot()[1]
    after = table.advance(1)
    assert not table.is_current(before)
    assert table.is_current(after)
    assert table.is_current(table.snapshot()[0])


def test_a_slot_that_does_not_exist_breaks_the_link() -> None:
    with pytest.raises(WireError):
        SlotTable(2).is_current(Slot(index=2, generation=1))


def test_a_credit_counts_once_however_often_it_is_said() -> None:
    credits_ = Credits()
    credits_.set_up([Slot(index=0, generation=1)])
    taken = credits_.take()
    assert taken == Slot(index=0, generation=1)
    assert not credits_.add([taken])
    assert credits_.take() is None
    assert credits_.add([Slot(index=0, generation=2)])
    assert not credits_.add([Slot(index=0, generation=2)])
    assert credits_.take() == Slot(index=0, generation=2)
    assert credits_.take() is None


def test_a_newer_generation_replaces_an_unused_credit() -> None:
    credits_ = Credits()
    credits_.set_up([Slot(index=0, generation=1)])
    credits_.add([Slot(index=0, generation=4)])
    assert len(credits_) == 1
    assert credits_.take() == Slot(index=0, generation=4)


def test_a_credit_put_back_can_be_taken_again_unless_it_grew_old() -> None:
    credits_ = Credits()
    credits_.set_up([Slot(index=0, generation=1)])
    taken = credits_.take()
    assert taken is not None
    credits_.put_back(taken)
    assert credits_.take() == taken
    credits_.add([Slot(index=0, generation=2)])
    credits_.put_back(taken)
    assert credits_.take() == Slot(index=0, generation=2)


def test_a_closed_gate_lets_nobody_in_and_waits_for_those_inside() -> None:
    gate = Gate()
    assert gate.enter()
    assert not gate.done()
    gate.close()
    assert not gate.enter()
    assert not gate.done()
    gate.leave()
    assert gate.done()


def test_exactly_one_of_commit_failure_and_cancel_ends_a_transfer() -> None:
    table = Expectations()
    table.add(inbound())
    told: list[TransferId] = []
    entry = table.claim(ID, lambda transfer_id, error: told.append(transfer_id))
    assert entry is not None
    assert table.end(ID)
    assert not table.end(ID)
    assert entry.gate.done()
    assert table.cancel(ID, BatonError("late")).done()
    assert told == []


def test_a_cancel_closes_the_gate_and_tells_the_link_that_claimed_it() -> None:
    table = Expectations()
    table.add(inbound())
    told: list[str] = []
    entry = table.claim(ID, lambda transfer_id, error: told.append(error.message))
    assert entry is not None
    assert entry.gate.enter()
    fence = table.cancel(ID, BatonError("enough"))
    assert told == ["enough"]
    assert not fence.done()
    assert not entry.gate.enter()
    entry.gate.leave()
    assert fence.done()
    assert not table.end(ID)


def test_only_one_link_can_claim() -> None:
    table = Expectations()
    assert table.claim(ID, nobody) is None
    table.add(inbound())
    assert table.claim(ID, nobody) is not None
    assert table.claim(ID, nobody) is None


def test_only_unclaimed_transfers_fall_due_here() -> None:
    table = Expectations()
    table.add(inbound(5.0))
    assert table.next_deadline_s() == 5.0
    assert table.overdue(4.9) == []
    assert [late.transfer_id for late in table.overdue(5.0)] == [ID]
    table.claim(ID, nobody)
    assert table.overdue(5.0) == []
    assert table.next_deadline_s() is None
