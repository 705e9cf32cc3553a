"""Sources of KV are asked in turn; the engine is told once, and nothing is written after `stop`."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from random import Random

import pytest
from support.kv_world import LIMIT_S, eventually

from baton_common.errors import BatonError, ErrorKind
from baton_common.ids import PageHash, PageId, RequestId
from baton_engine.request import Mode, Request, SamplingParams
from baton_engine.role import Fence
from baton_worker.filling import Done, Filler, Filling

PAGE = 16
ID = RequestId("r")


@dataclass
class Told:
    """The engine: what it was told."""

    filled: list[tuple[RequestId, int]] = field(default_factory=list)
    aborted: list[BatonError] = field(default_factory=list)

    def kv_filled(self, request_id: RequestId, tokens: int) -> None:
        self.filled.append((request_id, tokens))

    def abort(self, request_id: RequestId, error: BatonError) -> None:
        self.aborted.append(error)


@dataclass
class OpenFence:
    over: bool = False

    def done(self) -> bool:
        return self.over


@dataclass
class Scripted:
    """A source that does what the test says. Without `act` it never answers by itself."""

    act: Callable[[Filling, int, Done], None] = lambda filling, first, done: None
    willing: bool = True
    fence: OpenFence = field(default_factory=lambda: OpenFence(over=True))
    asked: list[tuple[int, int]] = field(default_factory=list)  # from and to which token
    answers: list[Done] = field(default_factory=list)
    stopped: list[RequestId] = field(default_factory=list)

    def wants(self, request: Request) -> bool:
        return self.willing

    def fill(self, filling: Filling, first_token: int, done: Done) -> None:
        self.asked.append((first_token, filling.end_token))
        self.answers.append(done)
        self.act(filling, first_token, done)

    def stop(self, request_id: RequestId) -> Fence:
        self.stopped.append(request_id)
        return self.fence


def up_to(tokens: int) -> Scripted:
    return Scripted(lambda filling, first, done: done(tokens))


def request() -> Request:
    return Request(
        request_id=ID,
        mode=Mode.LOCAL,
        tokens=[1] * 70,
        prompt_tokens=70,
        sampling=SamplingParams(),
        deadline_s=1e9,
        arrival_s=0.0,
    )


def begun(*sources: Scripted, have: int = 0, pages: int = 4) -> tuple[Filler, Told]:
    told = Told()
    filler = Filler(engine=told, sources=sources, page_tokens=PAGE)
    table = [PageId(page) for page in range(pages + 1)]
    filler.begin(request(), table, [PageHash(bytes([page])) for page in range(pages)], have)
    return filler, told


def test_each_source_goes_on_where_the_one_before_stopped() -> None:
    sources = up_to(2 * PAGE), up_to(2 * PAGE), up_to(3 * PAGE)
    _, told = begun(*sources, have=PAGE)
    assert [source.asked for source in sources] == [[(16, 64)], [(32, 64)], [(32, 64)]]
    assert told.filled == [(ID, 3 * PAGE)]


def test_nobody_is_asked_for_what_is_there() -> None:
    first, second = up_to(4 * PAGE), up_to(4 * PAGE)
    _, told = begun(first, second)
    assert second.asked == []
    assert told.filled == [(ID, 4 * PAGE)]


def test_who_has_nothing_for_it_is_not_asked() -> None:
    unwilling = Scripted(willing=False)
    filler, told = begun(unwilling)
    assert not filler.wants(request())
    assert unwilling.asked == []
    assert told.filled == [(ID, 0)]
    assert begun(unwilling, up_to(PAGE))[0].wants(request())


def test_without_sources_nothing_is_wanted() -> None:
    filler, told = begun(have=PAGE)
    assert not filler.wants(request())
    assert told.filled == [(ID, PAGE)]


def test_the_answer_may_come_from_any_thread_and_later() -> None:
    slow, next_one = Scripted(), up_to(2 * PAGE)
    _, told = begun(slow, next_one)
    assert told.filled == []
    thread = threading.Thread(target=slow.answers[0], args=(PAGE,))
    thread.start()
    thread.join(LIMIT_S)
    assert next_one.asked == [(PAGE, 64)]
    assert told.filled == [(ID, 2 * PAGE)]


def test_a_second_answer_is_none() -> None:
    first, second = Scripted(), Scripted()
    _, told = begun(first, second)
    first.answers[0](PAGE)
    first.answers[0](3 * PAGE)
    assert len(second.asked) == 1
    second.answers[0](2 * PAGE)
    second.answers[0](3 * PAGE)
    first.answers[0](3 * PAGE)
    assert told.filled == [(ID, 2 * PAGE)]


def test_a_source_that_raises_is_passed_by() -> None:
    def fails(filling: Filling, first: int, done: Done) -> None:
        raise RuntimeError("defect")

    broken, works = Scripted(fails), up_to(PAGE)
    _, told = begun(broken, works)
    assert broken.stopped == [ID]
    assert told.filled == [(ID, PAGE)]


def test_a_source_that_raises_while_it_writes_ends_the_request() -> None:
    """Whoever wrote next would write beside it; the fence keeps the pages."""

    def fails(filling: Filling, first: int, done: Done) -> None:
        raise RuntimeError("defect")

    broken, never = Scripted(fails, fence=OpenFence()), up_to(PAGE)
    filler, told = begun(broken, never)
    assert never.asked == []
    assert told.filled == []
    assert told.aborted[0].kind is ErrorKind.TRANSFER
    fence = filler.stop(ID)
    assert not fence.done()
    broken.fence.over = True
    assert fence.done()


def test_stop_ends_it_for_good() -> None:
    slow, next_one = Scripted(fence=OpenFence()), Scripted()
    filler, told = begun(slow, next_one)
    fence = filler.stop(ID)
    assert slow.stopped == [ID]
    assert next_one.stopped == []
    assert not fence.done()
    slow.fence.over = True
    assert fence.done()
    slow.answers[0](PAGE)
    assert next_one.asked == []
    assert told.filled == []


def test_stop_of_what_is_not_filled_is_done() -> None:
    filler, _ = begun(source := up_to(PAGE))
    assert filler.stop(ID).done()
    assert filler.stop(RequestId("unknown")).done()
    assert source.stopped == []


class Writer:
    """A source that writes in a thread of its own, and knows whether somebody else does."""

    def __init__(self, pages: list[str], random: Random) -> None:
        self._pages = pages
        self._random = random
        self._lock = threading.Lock()
        self._stopped = False
        self.writing = False
        self.thread: threading.Thread | None = None

    def wants(self, request: Request) -> bool:
        return True

    def fill(self, filling: Filling, first_token: int, done: Done) -> None:
        tokens = first_token + PAGE * self._random.randrange(3)
        self.thread = threading.Thread(target=self._write, args=(min(tokens, filling.end_token), done))
        self.thread.start()

    def _write(self, tokens: int, done: Done) -> None:
        with self._lock:
            if self._stopped:
                return
            self.writing = True
        self._pages.append("begin")
        self._pages.append("end")
        self.writing = False
        done(tokens)

    def stop(self, request_id: RequestId) -> Fence:
        with self._lock:
            self._stopped = True
        return self

    def done(self) -> bool:
        return not self.writing


@pytest.mark.parametrize("seed", range(60))
def test_stop_races_the_answers(seed: int) -> None:
    """Once `stop` returned and its fence is done, nothing is written and nothing is told; sources never overlap."""
    random = Random(seed)
    pages: list[str] = []
    writers = [Writer(pages, random) for _ in range(3)]
    filler, told = begun(*writers)
    for _ in range(random.randrange(400)):
        pass
    fence = filler.stop(ID)
    eventually(fence.done, "what is written is over")
    written, filled = list(pages), list(told.filled)
    for writer in writers:
        if writer.thread is not None:
            writer.thread.join(LIMIT_S)
    assert pages == written
    assert told.filled == filled
    assert len(filled) <= 1
    assert pages == ["begin", "end"] * (len(pages) // 2)


def test_many_requests_at_once() -> None:
    told = Told()
    answers: list[tuple[int, Done]] = []
    source = Scripted(lambda filling, first, done: answers.append((len(filling.hashes), done)))
    filler = Filler(engine=told, sources=[source], page_tokens=PAGE)

    def begin(number: int, pages: int) -> None:
        each = request()
        each.request_id = RequestId(str(number))
        hashes: Sequence[PageHash] = [PageHash(bytes([page])) for page in range(pages)]
        filler.begin(each, [PageId(page) for page in range(pages + 1)], hashes, 0)

    for number in range(50):
        begin(number, 1 + number % 4)
    threads = [threading.Thread(target=done, args=(pages * PAGE,)) for pages, done in answers]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(LIMIT_S)
    assert sorted(told.filled) == sorted((RequestId(str(number)), (1 + number % 4) * PAGE) for number in range(50))
