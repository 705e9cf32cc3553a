"""Both halves of the KV protocol over a network that a test controls message by message: no threads, no sockets.

Pages are reused as soon as their owner may: the receiver's are stamped with a canary, the sender's with noise. So a
late scatter breaks a canary, and a late gather breaks what the receiver commits.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from random import Random

import torch

from baton_common.clock import ManualClock
from baton_common.errors import Aborted, BatonError
from baton_common.ids import PageId, RequestId, TransferId
from baton_kvtransfer.blocks import XXH3, HostBlocks, seal_of
from baton_kvtransfer.expectations import Expectations
from baton_kvtransfer.gate import Gate
from baton_kvtransfer.layout import PageLayout
from baton_kvtransfer.protocol import Failed, Received, Timers
from baton_kvtransfer.receiving import Receiver, Verdict
from baton_kvtransfer.records import FirstToken, Inbound, Outbound, Receipt
from baton_kvtransfer.sending import Sender
from baton_kvtransfer.slots import SlotTable
from baton_proto.peer_pb2 import PeerMessage

LAYOUT = PageLayout(layers=3, kv=2, heads=2, page_tokens=4, dim=2, dtype="int8")
SLOT_BYTES = 40  # five positions of one layer: chunks end inside pages
TIMERS = Timers(alive_s=1.0, lease_s=3.0, answer_s=5.0)
CANARY = 99


@dataclass(slots=True)
class Letter:
    message: PeerMessage
    payload: bytes | None = None  # of wires that carry it in the stream


@dataclass(slots=True)
class Life:
    """One transfer, seen from outside."""

    transfer_id: TransferId
    first_token: int
    end_token: int
    sender_pages: list[PageId]
    receiver_pages: list[PageId]
    wanted: torch.Tensor  # [positions, layers, kv, heads, dim]
    sender_gate: Gate = field(default_factory=Gate)
    receiver_gate: Gate | None = None
    announced: int = 0  # steps of `progress`
    sender_outcome: Receipt | BatonError | None = None
    receiver_outcome: FirstToken | BatonError | None = None


class PureLink:
    """One sender, one receiver. `remote_memory`: slots are written in place, as shm and RDMA do."""

    def __init__(self, *, seed: int, remote_memory: bool, slots: int = 3, pages: int = 20) -> None:
        self.random = Random(seed)
        self.clock = ManualClock(100.0)
        self.remote_memory = remote_memory
        self.memory = memoryview(bytearray(slots * SLOT_BYTES))
        self.sender_pool = torch.zeros(LAYOUT.shape(pages), dtype=torch.int8)
        self.receiver_pool = torch.full(LAYOUT.shape(pages), CANARY, dtype=torch.int8)
        self.sender_blocks = HostBlocks(self.sender_pool, LAYOUT)
        self.receiver_blocks = HostBlocks(self.receiver_pool, LAYOUT)
        self.free_sender = [PageId(page) for page in range(pages)]
        self.free_receiver = [PageId(page) for page in range(pages)]
        self.table = SlotTable(slots)
        self.expected = Expectations()
        self.sender = Sender(layout=LAYOUT, slot_bytes=SLOT_BYTES, timers=TIMERS)
        self.sender.connected(
            peer="d",
            wire="pure",
            slots=self.table.snapshot(),
            slot_bytes=SLOT_BYTES,
            payload=LAYOUT.dtype,
            now_s=self.clock.now(),
        )
        self.receiver = Receiver(
            layout=LAYOUT, slots=self.table, expected=self.expected, timers=TIMERS, peer="p", wire="pure",
            now_s=self.clock.now(), wake=lambda: None,
        )  # fmt: skip
        self.forth: deque[Letter] = deque()
        self.back: deque[Letter] = deque()
        self.lives: dict[TransferId, Life] = {}
        self.written: set[int] = set()

    # ---- owners -------------------------------------------------------------------------------------------------
    def open(self, first_token: int, end_token: int, deadline_s: float = 60.0) -> Life | None:
        """None when one side has no pages left."""
        count = -(-end_token // LAYOUT.page_tokens)
        if min(len(self.free_sender), len(self.free_receiver)) < count:
            return None
        self.random.shuffle(self.free_sender)
        self.random.shuffle(self.free_receiver)
        life = Life(
            transfer_id=TransferId(f"t{len(self.lives)}"),
            first_token=first_token,
            end_token=end_token,
            sender_pages=[self.free_sender.pop() for _ in range(count)],
            receiver_pages=[self.free_receiver.pop() for _ in range(count)],
            wanted=torch.empty(0),
        )
        for page in life.sender_pages:
            self.sender_pool[page] = torch.randint(-100, 90, LAYOUT.page_shape).to(torch.int8)
        life.wanted = self._positions(self.sender_pool, life.sender_pages, first_token, end_token)
        self.lives[life.transfer_id] = life
        due_s = self.clock.now() + deadline_s
        inbound = Inbound(
            transfer_id=life.transfer_id, request_id=RequestId("r"), pages=life.receiver_pages,
            first_token=first_token, end_token=end_token, deadline_s=due_s,
        )  # fmt: skip
        self.expected.add(inbound)
        order = Outbound(
            transfer_id=life.transfer_id, request_id=RequestId("r"), peer_address="", peer_incarnation="",
            pages=life.sender_pages, first_token=first_token, end_token=end_token, deadline_s=due_s,
            done=lambda _: None,
        )  # fmt: skip
        self.sender.open(order, self.clock.now())
        self.collect()
        return life

    def progress(self, life: Life) -> None:
        """Announce the next layer, or finish."""
        now_s = self.clock.now()
        if life.announced < LAYOUT.layers:
            layers = (life.announced, life.announced + 1)
            self.sender.ready(life.transfer_id, layers, (0, life.end_token), now_s)
        elif life.announced == LAYOUT.layers:
            self.sender.finish(life.transfer_id, FirstToken(token_id=life.end_token, position=0), now_s)
        life.announced += 1
        self.collect()

    def abort(self, life: Life) -> None:
        if life.sender_outcome is None:
            life.sender_gate.close()
            life.sender_outcome = Aborted("owner of the sender")
            self._reuse_sender(life)
            self.sender.abort(life.transfer_id, life.sender_outcome, self.clock.now())
            self.collect()

    def cancel(self, life: Life) -> None:
        error = Aborted("owner of the receiver")
        gate = self.expected.cancel(life.transfer_id, error)
        assert gate.done(), "nothing runs between two events"
        if life.receiver_outcome is None:
            life.receiver_outcome = error
            self._reuse_receiver(life)
        self.collect()

    # ---- network ------------------------------------------------------------------------------------------------
    def collect(self) -> None:
        """Whatever the halves have to say goes on its way."""
        self.receiver.flush(self.clock.now())
        while self.sender.messages:
            self.forth.append(Letter(self.sender.messages.popleft()))
        while self.receiver.messages:
            self.back.append(Letter(self.receiver.messages.popleft()))
        while self.sender.ended:
            self._sender_ended()
        while self.receiver.events:
            self._receiver_event()

    def push(self) -> bool:
        """The sender gathers and pushes one chunk."""
        push = self.sender.next_push()
        if push is None:
            return False
        if not self.lives[push.order.transfer_id].sender_gate.enter():
            self.sender.unpushed(push)
            return True
        chunk = push.chunk
        staging = memoryview(bytearray(chunk.bytes))
        window = self.slot(chunk.slot.index, chunk.bytes) if self.remote_memory else staging
        chunk.digest = self.sender_blocks.gather(push.block, push.order.pages, window, seal_of(chunk, XXH3))
        self.lives[push.order.transfer_id].sender_gate.leave()
        self.written.add(chunk.slot.index)
        self.forth.append(Letter(PeerMessage(chunk=chunk), None if self.remote_memory else bytes(window)))
        self.sender.pushed(push, self.clock.now())
        self.collect()
        return True

    def slot(self, index: int, size: int) -> memoryview:
        return self.memory[index * SLOT_BYTES :][:size]

    def deliver_forth(self, letter: Letter) -> None:
        now_s = self.clock.now()
        landing = self.receiver.receive(letter.message, now_s)
        if landing is not None:
            chunk = landing.chunk
            payload = self.slot(chunk.slot.index, chunk.bytes) if letter.payload is None else memoryview(letter.payload)
            verdict = Verdict.CLOSED
            if landing.gate.enter():
                intact = self.receiver_blocks.scatter(
                    landing.block, landing.pages, payload, seal_of(chunk, XXH3), digest=chunk.digest,
                    shared=self.remote_memory,
                )  # fmt: skip
                landing.gate.leave()
                verdict = Verdict.GOOD if intact else Verdict.DAMAGED
            self.receiver.landed(landing, verdict, now_s)
        self.collect()

    def deliver_back(self, letter: Letter) -> None:
        self.sender.receive(letter.message, self.clock.now())
        self.collect()

    def advance(self, seconds: float) -> None:
        self.clock.advance(seconds)
        self.sender.tick(self.clock.now())
        self.receiver.tick(self.clock.now())
        for inbound in self.expected.overdue(self.clock.now()):
            if self.expected.end(inbound.transfer_id):
                self._receiver_failed(inbound.transfer_id, Aborted("nobody came"))
        self.collect()

    def settle(self) -> None:
        """Deliver everything, in order, until nothing moves."""
        while self.push() or self.forth or self.back:
            if self.forth:
                self.deliver_forth(self.forth.popleft())
            if self.back:
                self.deliver_back(self.back.popleft())

    # ---- what must always hold ----------------------------------------------------------------------------------
    def check_canaries(self) -> None:
        for page in self.free_receiver:
            assert bool((self.receiver_pool[page] == CANARY).all()), f"page {page} was written after its owner took it"

    def check_quiet(self) -> None:
        """After all ended and was delivered: nothing leaked."""
        assert len(self.sender) == len(self.receiver) == len(self.expected) == 0
        assert self.sender.free_slots == len(self.table)
        for life in self.lives.values():
            assert life.sender_outcome is not None, f"{life.transfer_id}: the sender never heard"
            assert life.receiver_outcome is not None, f"{life.transfer_id}: the receiver never heard"
            if isinstance(life.sender_outcome, Receipt):
                assert isinstance(life.receiver_outcome, FirstToken), "a receipt without a commit"

    # ---- outcomes -----------------------------------------------------------------------------------------------
    def _sender_ended(self) -> None:
        ended = self.sender.ended.popleft()
        life = self.lives[ended.transfer_id]
        if life.sender_outcome is None:
            life.sender_outcome = ended.outcome
            life.sender_gate.close()
            self._reuse_sender(life)

    def _receiver_event(self) -> None:
        event = self.receiver.events.popleft()
        if isinstance(event, Received):
            life = self.lives[event.transfer_id]
            assert life.receiver_outcome is None, "ended twice"
            arrived = self._positions(self.receiver_pool, life.receiver_pages, life.first_token, life.end_token)
            assert torch.equal(arrived, life.wanted), f"{event.transfer_id}: committed wrong bytes"
            assert event.first.token_id == life.end_token
            life.receiver_outcome = event.first
            self._reuse_receiver(life)
        elif isinstance(event, Failed):
            self._receiver_failed(event.transfer_id, event.error)

    def _receiver_failed(self, transfer_id: TransferId, error: BatonError) -> None:
        life = self.lives[transfer_id]
        assert life.receiver_outcome is None, "ended twice"
        life.receiver_outcome = error
        self._reuse_receiver(life)

    def _reuse_receiver(self, life: Life) -> None:
        for page in life.receiver_pages:
            self.receiver_pool[page] = CANARY
        self.free_receiver.extend(life.receiver_pages)

    def _reuse_sender(self, life: Life) -> None:
        for page in life.sender_pages:
            self.sender_pool[page] = torch.randint(-100, 90, LAYOUT.page_shape).to(torch.int8)
        self.free_sender.extend(life.sender_pages)

    def _positions(self, pool: torch.Tensor, pages: list[PageId], first: int, end: int) -> torch.Tensor:
        rows = [pool[pages[p // LAYOUT.page_tokens], :, :, :, p % LAYOUT.page_tokens] for p in range(first, end)]
        return torch.stack(rows) if rows else torch.empty(0)
