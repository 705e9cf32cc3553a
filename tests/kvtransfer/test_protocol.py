"""The slot protocol, message by message, and as a property under every fault a network can do."""

from __future__ import annotations

import hypothesis.strategies as st
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule
from support.kv_pure import LAYOUT, SLOT_BYTES, TIMERS, Letter, Life, PureLink

from baton_common.errors import ErrorKind
from baton_common.ids import PageId, RequestId, TransferId
from baton_kvtransfer.errors import Aborted, Corrupt, DeadlineExceeded, PeerGone, WireError
from baton_kvtransfer.protocol import RECEIVE_EDGES, SEND_EDGES, ReceiveState, SendState
from baton_kvtransfer.records import FirstToken, Outbound, Receipt
from baton_kvtransfer.sending import FAIR_TURN, Sender
from baton_proto.peer_pb2 import Commit, Credit, Granted, PeerMessage, Reserve, Sent, Slot

RANGES = st.tuples(st.integers(0, 9), st.integers(1, 12))  # first position, count
FAULTS = ["write late", "drop", "deliver early", "deliver twice", "flip"]


def link(*, remote_memory: bool = True) -> PureLink:
    return PureLink(seed=1, remote_memory=remote_memory)


def opened(world: PureLink, first_token: int = 2, end_token: int = 11, deadline_s: float = 60.0) -> Life:
    life = world.open(first_token, end_token, deadline_s)
    assert life is not None
    return life


def announce_all(world: PureLink, life: Life) -> None:
    for _ in range(4):
        world.progress(life)


@pytest.mark.parametrize("remote_memory", [True, False])
def test_a_transfer_runs_from_reserve_to_commit(remote_memory: bool) -> None:
    world = link(remote_memory=remote_memory)
    life = opened(world)
    announce_all(world, life)
    world.settle()
    assert isinstance(life.sender_outcome, Receipt)
    assert isinstance(life.receiver_outcome, FirstToken)
    assert life.sender_outcome.bytes == 9 * 3 * 2 * 2 * 2
    assert life.sender_outcome.resends == 0
    world.check_quiet()


def test_an_empty_range_commits_without_a_chunk() -> None:
    world = link()
    life = opened(world, 8, 8)
    announce_all(world, life)
    world.settle()
    assert isinstance(life.sender_outcome, Receipt)
    assert life.sender_outcome.chunks == 0
    world.check_quiet()


def test_chunks_leave_while_later_layers_are_not_ready() -> None:
    world = link()
    life = opened(world)
    world.settle()
    world.progress(life)
    assert world.push()
    world.settle()
    assert life.sender_outcome is None


def test_no_chunk_leaves_without_a_credit() -> None:
    world = link()
    life = opened(world)
    world.settle()
    announce_all(world, life)
    pushed = 0
    while world.push():
        pushed += 1
    assert pushed == len(world.table)
    world.deliver_forth(world.forth.popleft())
    while world.back:
        world.deliver_back(world.back.popleft())
    assert world.push()


def pushed_ids(world: PureLink) -> list[str]:
    return [letter.message.chunk.transfer_id for letter in world.forth if letter.message.HasField("chunk")]


def test_transfers_that_still_prefill_take_turns() -> None:
    world = link()
    lives = [opened(world, 0, 12), opened(world, 0, 12)]
    world.settle()
    for life in lives:
        for _ in range(3):
            world.progress(life)
    while world.push():
        pass
    assert pushed_ids(world) == ["t0", "t1", "t0"]


def test_the_transfer_that_can_be_over_first_goes_first() -> None:
    world = link()
    prefilling, long, short = opened(world, 0, 12), opened(world, 0, 12), opened(world, 0, 4)
    world.settle()
    for _ in range(3):
        world.progress(prefilling)
    announce_all(world, long)
    announce_all(world, short)
    while world.push():
        pass
    assert pushed_ids(world) == [short.transfer_id] * 3


class Line:
    """A sender alone, with as many credits as it wants: who is served, and after how many chunks of others."""

    def __init__(self, sizes: list[int], finished: list[bool]) -> None:
        self.sender = Sender(layout=LAYOUT, slot_bytes=SLOT_BYTES, timers=TIMERS)
        self.sender.connected(
            peer="d", wire="pure", slots=[Slot(index=0, generation=1)], slot_bytes=SLOT_BYTES, payload=LAYOUT.dtype,
            now_s=0.0,
        )  # fmt: skip
        self.names = [TransferId(f"t{number}") for number in range(len(sizes))]
        for name, tokens in zip(self.names, sizes, strict=True):
            order = Outbound(
                transfer_id=name, request_id=RequestId("r"), peer_address="", peer_incarnation="",
                pages=[PageId(0)] * tokens, first_token=0, end_token=tokens, deadline_s=1e9, done=lambda _: None,
            )  # fmt: skip
            self.sender.open(order, 0.0)
            self.sender.receive(PeerMessage(granted=Granted(transfer_id=name)), 0.0)
            self.sender.ready(name, (0, LAYOUT.layers), (0, tokens), 0.0)
        for name, over in zip(self.names, finished, strict=True):
            if over:
                self.sender.finish(name, FirstToken(token_id=1, position=0), 0.0)

    def serve(self) -> TransferId | None:
        push = self.sender.next_push()
        if push is None:
            return None
        self.sender.pushed(push, 0.0)
        slot = push.chunk.slot
        credit = Credit(slots=[Slot(index=slot.index, generation=slot.generation + 1)])
        self.sender.receive(PeerMessage(credit=credit), 0.0)
        return push.order.transfer_id


@given(st.lists(st.tuples(st.integers(1, 60), st.booleans()), min_size=1, max_size=6))
def test_nobody_starves_and_three_of_four_chunks_are_of_who_is_nearest_its_end(made: list[tuple[int, bool]]) -> None:
    line = Line([size for size, _ in made], [over for _, over in made])
    most = FAIR_TURN * len(line.names)
    served: list[TransferId] = []
    by_rule = 0
    while True:
        left = {name: line.sender._transfers[name].left_cells for name in line.names}
        finished = {name: left[name] for name, (_, over) in zip(line.names, made, strict=True) if over and left[name]}
        name = line.serve()
        if name is None:
            break
        served.append(name)
        by_rule += not finished or finished.get(name) == min(finished.values())
        for waiting in line.names:
            assert not left[waiting] or waiting in served[-most:] or len(served) < most, f"{waiting} starves"
    assert by_rule >= len(served) - -(-len(served) // FAIR_TURN)
    for name, tokens in zip(line.names, (size for size, _ in made), strict=True):
        cells = LAYOUT.layers * LAYOUT.heads * tokens
        assert line.sender._transfers[name].left_cells == 0
        assert sum(block.cells for block in line.sender._transfers[name].blocks) == cells


def test_an_unknown_transfer_is_refused_at_once() -> None:
    world = link()
    life = opened(world)
    world.cancel(life)
    world.settle()
    assert isinstance(life.sender_outcome, Aborted)
    assert life.sender_outcome.kind is ErrorKind.TRANSFER
    assert life.sender_outcome.phase == "queued"
    world.check_quiet()


def test_a_reserve_for_another_range_names_the_field_and_both_values() -> None:
    world = link()
    life = opened(world, 2, 11)
    world.forth.clear()
    reserve = Reserve(transfer_id=life.transfer_id, request_id="r", first_token=2, end_token=12, heads=LAYOUT.heads)
    world.deliver_forth(Letter(PeerMessage(reserve=reserve)))
    assert isinstance(life.receiver_outcome, Exception)
    assert str(life.receiver_outcome).startswith("end_token differs: ours 11, theirs 12")


@pytest.mark.parametrize("stage", range(6))
@pytest.mark.parametrize("side", ["sender", "receiver"])
def test_an_abort_ends_both_sides_in_every_state(stage: int, side: str) -> None:
    world = link()
    life = opened(world)
    if stage >= 1:
        world.settle()
    for _ in range(min(stage, 4)):
        world.progress(life)
        if stage >= 3:
            world.push()
    if side == "sender":
        world.abort(life)
    else:
        world.cancel(life)
    world.check_canaries()
    world.settle()
    assert isinstance(life.sender_outcome, Aborted | Exception)
    assert isinstance(life.receiver_outcome, Aborted | Exception)
    world.check_quiet()
    world.check_canaries()


def test_both_sides_aborting_at_once_drain() -> None:
    world = link()
    life = opened(world)
    world.settle()
    world.progress(life)
    world.push()
    world.abort(life)
    world.cancel(life)
    world.settle()
    world.check_quiet()


def test_damaged_chunks_are_sent_again() -> None:
    world = link(remote_memory=False)
    life = opened(world)
    world.settle()
    announce_all(world, life)
    world.push()
    letter = world.forth[0]
    assert letter.payload is not None
    letter.payload = bytes([letter.payload[0] ^ 1]) + letter.payload[1:]
    world.settle()
    assert isinstance(life.sender_outcome, Receipt)
    assert life.sender_outcome.resends == 1
    world.check_quiet()


def test_damage_in_every_round_ends_as_corrupt() -> None:
    world = link(remote_memory=False)
    life = opened(world)
    announce_all(world, life)
    while world.push() or world.forth or world.back:
        if world.forth:
            letter = world.forth.popleft()
            if letter.payload is not None:
                letter.payload = bytes(len(letter.payload))
            world.deliver_forth(letter)
        if world.back:
            world.deliver_back(world.back.popleft())
    assert isinstance(life.receiver_outcome, Corrupt)
    assert isinstance(life.sender_outcome, Aborted)
    assert life.sender_outcome.kind.retriable
    world.check_quiet()


def test_lost_chunks_are_asked_for() -> None:
    world = link()
    life = opened(world)
    world.settle()
    announce_all(world, life)
    world.push()
    world.forth.pop()
    world.settle()
    assert isinstance(life.sender_outcome, Receipt)
    assert life.sender_outcome.resends == 1


@pytest.mark.parametrize("abort", [False, True])
def test_slots_of_lost_chunks_come_back_with_the_second_heartbeat(abort: bool) -> None:
    world = link()
    life = opened(world)
    world.settle()
    announce_all(world, life)
    world.push()
    world.forth.pop()
    if abort:
        world.abort(life)
    world.settle()
    assert world.sender.free_slots == len(world.table) - 1
    for _ in range(2):
        world.advance(1.0)
        world.settle()
    world.check_quiet()


@pytest.mark.parametrize("kind", ["reserve", "granted", "sent", "resend", "credit", "commit"])
def test_a_lost_message_costs_time_not_the_transfer(kind: str) -> None:
    world = link()
    life = opened(world)
    announce_all(world, life)
    to_lose = {"chunk", "resend"} if kind == "resend" else {kind}  # a Resend is said only after a loss
    for _ in range(8):
        while world.push() or world.forth or world.back:
            for way, deliver in ((world.forth, world.deliver_forth), (world.back, world.deliver_back)):
                if way:
                    letter = way.popleft()
                    name = letter.message.WhichOneof("kind")
                    if name in to_lose:
                        to_lose.remove(name)
                    else:
                        deliver(letter)
        world.advance(1.0)
    assert not to_lose
    assert isinstance(life.sender_outcome, Receipt)
    world.settle()
    world.check_quiet()


def test_a_lost_abort_is_repeated_until_drained() -> None:
    world = link()
    life = opened(world)
    world.settle()
    world.progress(life)
    world.settle()
    world.abort(life)
    world.forth.clear()
    world.advance(1.0)
    world.settle()
    assert isinstance(life.receiver_outcome, Aborted)
    world.check_quiet()


def test_an_abort_that_crosses_a_commit_ends_as_committed() -> None:
    world = link()
    life = opened(world, deadline_s=4.0)
    announce_all(world, life)
    while world.push() or world.forth or len(world.back) > 1:
        if world.forth:
            world.deliver_forth(world.forth.popleft())
        while world.back and not world.back[0].message.HasField("commit"):
            world.deliver_back(world.back.popleft())
        if world.back and not world.forth:
            break
    assert isinstance(life.receiver_outcome, FirstToken)
    world.sender.tick(world.clock.now() + 4.0)  # the lease ends while Commit is on its way
    assert life.sender_outcome is None
    world.collect()
    world.settle()
    assert isinstance(life.sender_outcome, Receipt)
    world.check_quiet()


def test_the_lease_end_aborts_so_that_the_receiver_cannot_commit_released_pages() -> None:
    world = link()
    life = opened(world, deadline_s=4.0)
    world.settle()
    world.progress(life)
    world.settle()
    world.sender.tick(world.clock.now() + 4.0)
    world.collect()
    assert isinstance(life.sender_outcome, DeadlineExceeded)
    assert life.sender_outcome.phase == "prefilling"
    world.settle()
    assert isinstance(life.receiver_outcome, Aborted)
    assert life.receiver_outcome.kind is ErrorKind.DEADLINE
    world.check_quiet()


def test_a_peer_that_forgot_the_transfer_ends_it() -> None:
    world = link()
    life = opened(world)
    world.settle()
    for _ in range(4):  # no Alive of the receiver gets through
        world.back.clear()
        world.forth.clear()
        world.advance(1.0)
    assert isinstance(life.sender_outcome, DeadlineExceeded)
    assert "no longer names" in life.sender_outcome.message


def test_finish_before_everything_was_ready_is_a_defect_with_an_answer() -> None:
    world = link()
    life = opened(world)
    world.settle()
    world.sender.finish(life.transfer_id, FirstToken(token_id=1, position=0), world.clock.now())
    world.collect()
    assert isinstance(life.sender_outcome, Exception)
    world.settle()
    world.check_quiet()


def test_a_commit_that_nobody_earned_breaks_the_link() -> None:
    world = link()
    life = opened(world)
    world.settle()
    with pytest.raises(WireError, match="Commit before Sent"):
        world.deliver_back(Letter(PeerMessage(commit=Commit(transfer_id=life.transfer_id))))


@pytest.mark.parametrize(
    "message",
    [
        PeerMessage(credit=Credit(slots=[Slot(index=77, generation=1)])),
        PeerMessage(sent=Sent(transfer_id="t0")),
        PeerMessage(),
    ],
)
def test_what_a_receiver_may_not_send_breaks_the_link(message: PeerMessage) -> None:
    world = link()
    with pytest.raises(WireError):
        world.deliver_back(Letter(message))


def test_a_wild_chunk_count_costs_nothing() -> None:
    world = link()
    life = opened(world)
    world.settle()
    world.deliver_forth(Letter(PeerMessage(sent=Sent(transfer_id=life.transfer_id, chunks=2**32 - 1))))
    assert len(world.back[-1].message.resend.sequences) <= 4096


def test_a_lost_link_fails_everything_on_it() -> None:
    world = link()
    lives = [opened(world), opened(world, 0, 4)]
    world.settle()
    world.progress(lives[0])
    world.push()
    world.sender.lose(PeerGone("gone"))
    world.receiver.lose(PeerGone("gone"))
    world.collect()
    for life in lives:
        assert isinstance(life.sender_outcome, PeerGone)
        assert life.sender_outcome.transfer_id == life.transfer_id
        assert isinstance(life.receiver_outcome, PeerGone)


def test_terminal_states_have_no_way_out() -> None:
    for edges, terminal in (
        (SEND_EDGES, (SendState.RELEASED, SendState.DRAINED)),
        (RECEIVE_EDGES, (ReceiveState.COMMITTED, ReceiveState.DRAINED)),
    ):
        assert all(not edges[state] for state in terminal)
        assert set(edges) == set(type(terminal[0]))


class Chaos(RuleBasedStateMachine):
    """Two owners, a network that does what it likes, memory that is written late: no wrong byte is ever committed.

    Few rules with a choice inside, because hypothesis switches whole rules off in most runs.
    """

    world: PureLink

    @initialize(seed=st.integers(0, 2**16), remote=st.booleans(), ranges=st.lists(RANGES, min_size=1, max_size=4))
    def begin(self, seed: int, remote: bool, ranges: list[tuple[int, int]]) -> None:
        self.world = PureLink(seed=seed, remote_memory=remote)
        for first, count in ranges:
            self.world.open(first, first + count)

    def some_life(self, pick: int) -> Life | None:
        lives = [life for life in self.world.lives.values() if life.receiver_outcome is None or not life.sender_outcome]
        return lives[pick % len(lives)] if lives else None

    @rule(which=RANGES, deadline_s=st.sampled_from([60.0, 60.0, 2.0]))
    def open(self, which: tuple[int, int], deadline_s: float) -> None:
        self.world.open(which[0], sum(which), deadline_s)

    @rule(pick=st.integers(0, 7), steps=st.integers(1, 4), pushes=st.integers(0, 4))
    def compute(self, pick: int, steps: int, pushes: int) -> None:
        life = self.some_life(pick)
        for _ in range(steps):
            if life is not None and life.sender_outcome is None:
                self.world.progress(life)
        for _ in range(pushes):
            self.world.push()

    @rule(count=st.sampled_from([1, 3, 10, 40]))
    def flow(self, count: int) -> None:
        for _ in range(count):
            self.world.push()
            if self.world.forth:
                self.world.deliver_forth(self.world.forth.popleft())
            if self.world.back:
                self.world.deliver_back(self.world.back.popleft())

    @rule(fault=st.sampled_from(FAULTS), index=st.integers(0, 7), forth=st.booleans(), repeat=st.integers(1, 3))
    def fault(self, fault: str, index: int, forth: bool, repeat: int) -> None:
        world = self.world
        way, deliver = (world.forth, world.deliver_forth) if forth else (world.back, world.deliver_back)
        for _ in range(repeat):
            index %= max(1, len(way))
            if fault == "write late" and world.written:
                target = world.slot(world.random.choice(sorted(world.written)), 64)
                target[:] = world.random.randbytes(len(target))
            elif fault == "drop" and way:
                del way[index]
            elif fault == "deliver early" and way:
                letter = way[index]
                del way[index]
                deliver(letter)
            elif fault == "deliver twice" and way:
                way.append(way[index])
                deliver(way[index])
            elif fault == "flip" and way and way[index].payload:
                payload = way[index].payload
                assert payload is not None
                way[index].payload = payload[:-1] + bytes([payload[-1] ^ (1 << world.random.randrange(8))])

    @rule(pick=st.integers(0, 7), by_sender=st.booleans(), sure=st.integers(0, 2))
    def give_up(self, pick: int, by_sender: bool, sure: int) -> None:
        life = self.some_life(pick)
        if life is None or sure:  # rare, so that many transfers come to their end
            return
        if by_sender:
            self.world.abort(life)
        elif life.receiver_outcome is None:
            self.world.cancel(life)

    @rule(seconds=st.sampled_from([0.1, 0.1, 1.0]))
    def wait(self, seconds: float) -> None:
        try:
            self.world.advance(seconds)
        except WireError as error:  # an unanswered abort: only a fence helps, which is the end of the link
            self.world.sender.lose(PeerGone(error.message))
            self.world.receiver.lose(PeerGone(error.message))
            self.world.collect()
            self.world.forth.clear()
            self.world.back.clear()

    @invariant()
    def nobody_wrote_into_pages_of_others(self) -> None:
        self.world.check_canaries()

    def teardown(self) -> None:
        """The faults stop: everything ends within its deadlines, and nothing leaked."""
        for life in self.world.lives.values():
            while life.sender_outcome is None and life.announced <= LAYOUT.layers:
                self.world.progress(life)
        for _ in range(64):
            self.world.settle()
            self.wait(1.0)
        self.world.settle()
        for life in list(self.world.lives.values()):
            if life.receiver_outcome is None:
                self.world.cancel(life)
        self.world.settle()
        self.world.check_quiet()
        self.world.check_canaries()


TestChaos = Chaos.TestCase
TestChaos.settings = settings(
    max_examples=120, stateful_step_count=40, deadline=None, suppress_health_check=list(HealthCheck)
)
