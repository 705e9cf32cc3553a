"""Several transfers that are one handoff: all receipts, or the first error and the abort of the rest."""

from __future__ import annotations

from collections.abc import Sequence

import hypothesis.strategies as st
from hypothesis import given

from baton_common.errors import BatonError
from baton_common.ids import TransferId
from baton_kvtransfer import Fence, Receipt
from baton_kvtransfer.gate import Gate
from baton_kvtransfer.handoff import Handoff

IDS = [TransferId(f"h/{rank}.0") for rank in range(3)]


class Owner:
    """What happens to the transfers of one handoff, and what is said of it."""

    def __init__(self) -> None:
        self.told: list[Sequence[Receipt] | BatonError] = []
        self.aborted: dict[TransferId, BatonError] = {}
        self.gates = {transfer_id: Gate() for transfer_id in IDS}
        self.handoff = Handoff(IDS, self.abort, self.told.append)

    def abort(self, transfer_id: TransferId, error: BatonError) -> Fence:
        self.aborted[transfer_id] = error
        self.gates[transfer_id].close()
        return self.gates[transfer_id]


def receipt(transfer_id: TransferId) -> Receipt:
    return Receipt(
        transfer_id=transfer_id, peer="p", wire="shm", bytes=1, chunks=1, resends=0, first_chunk_s=0, last_chunk_s=0,
        finish_s=0, commit_s=0,
    )  # fmt: skip


@given(order=st.permutations(IDS))
def test_it_is_through_when_every_transfer_is(order: list[TransferId]) -> None:
    owner = Owner()
    for transfer_id in order:
        assert not owner.told
        owner.handoff.ended(transfer_id, receipt(transfer_id))
        owner.handoff.ended(TransferId("somebody else's"), receipt(transfer_id))
    assert owner.told == [[receipt(transfer_id) for transfer_id in order]]
    assert not owner.aborted


@given(order=st.permutations(IDS), good=st.integers(0, 2))
def test_the_first_failure_aborts_what_is_open_and_is_told_once(order: list[TransferId], good: int) -> None:
    owner, error = Owner(), BatonError("first")
    for transfer_id in order[:good]:
        owner.handoff.ended(transfer_id, receipt(transfer_id))
    owner.handoff.ended(order[good], error)
    assert owner.told == [error]
    assert owner.aborted == dict.fromkeys(order[good + 1 :], error)
    for transfer_id in order:
        owner.handoff.ended(transfer_id, BatonError("an echo of the abort"))
        owner.handoff.ended(transfer_id, receipt(transfer_id))
    assert owner.told == [error]


def test_after_an_abort_nothing_is_told_and_the_fence_is_that_of_all_copies() -> None:
    owner, error = Owner(), BatonError("enough")
    owner.handoff.ended(IDS[0], receipt(IDS[0]))
    assert owner.gates[IDS[2]].enter()  # a copy runs
    fence = owner.handoff.abort(error)
    assert owner.aborted == {IDS[1]: error, IDS[2]: error}
    assert not fence.done()
    owner.gates[IDS[2]].leave()
    assert fence.done()
    owner.handoff.ended(IDS[1], error)
    assert owner.told == []
    assert owner.handoff.abort(error).done()


def test_after_a_failure_the_pages_wait_for_the_copies_of_the_others() -> None:
    """As `KvEndpoint.cancel`: a second cancel knows nothing of a copy that was running at the first."""
    running, over = Gate(), Gate()
    over.close()
    assert running.enter()
    running.close()
    fences = {IDS[1]: [running], IDS[2]: [over]}
    told: list[Sequence[Receipt] | BatonError] = []
    error = BatonError("first")
    handoff = Handoff(
        IDS, lambda transfer_id, _: fences[transfer_id].pop() if fences[transfer_id] else over, told.append
    )
    handoff.ended(IDS[0], error)
    assert told == [error]
    for fence in (handoff.abort(BatonError("the request is over")), handoff.abort(error)):
        assert not fence.done()
    running.leave()
    assert fence.done()
