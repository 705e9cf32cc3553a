"""KV of a prompt copied from another engine's pool instead of computed: the same tokens, and it counts as cached."""

import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from support.checkpoints import tiny_checkpoint
from support.engine_world import RecordingRole, engine_world, make_request, tiny_model

from baton_common.errors import Aborted, ErrorKind
from baton_engine.request import Keep, Mode, Phase

PAGE = 16


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny_checkpoint("qwen3", tmp_path_factory.mktemp("qwen3"))


@pytest.fixture(scope="module")
def model(folder):
    return tiny_model(folder)


@pytest.fixture(scope="module")
def other_model(folder):
    return tiny_model(folder)


class Gate:
    """A fence that the test opens."""

    def __init__(self):
        self.open = threading.Event()

    def done(self):
        return self.open.is_set()


class Keeper(RecordingRole):
    """Knows where each page is; reads them for as long as `fence` says."""

    def __init__(self):
        super().__init__()
        self.places = {}
        self.fence = None

    def wants_pages(self):
        return True

    def on_pages(self, hashes, pages):
        self.places.update(zip(hashes, pages, strict=True))
        super().on_pages(hashes, pages)
        return self.fence


class Copier(RecordingRole):
    """Fills from the pool of `source`, on a thread of its own; at most `most` pages."""

    def __init__(self, source, most=99):
        super().__init__()
        self.source = source
        self.most = most
        self.target = None  # World
        self.seen = {}
        self.fence = Gate()
        self.answers = True
        self.threads = ThreadPoolExecutor(1)

    def wants_fill(self, request):
        self.seen[request.request_id] = (request.keep, list(request.hashes))
        return True

    def on_fill(self, request, pages, hashes, have_tokens):
        super().on_fill(request, pages, hashes, have_tokens)
        if self.answers:
            self.threads.submit(self.copy, request.request_id, pages, hashes, have_tokens // PAGE)

    def copy(self, request_id, pages, hashes, at):
        end = min(len(hashes), at + self.most)
        while at < end and hashes[at] in self.source.role.places:
            theirs = self.source.role.places[hashes[at]]
            self.target.engine.pool.tensor[pages[at]] = self.source.engine.pool.tensor[theirs]
            at += 1
        self.target.engine.kv_filled(request_id, at * PAGE)

    def release_kv(self, request, error):
        super().release_kv(request, error)
        return self.fence


@pytest.fixture
def pair(model, other_model):
    """(who computes, who is filled from it)."""
    with engine_world(model, Keeper(), pages=400) as source:  # nothing is evicted: places stay true
        role = Copier(source)
        with engine_world(other_model, role) as target:
            role.target = target
            yield source, target
        role.threads.shutdown()


def prompts(count):
    random = np.random.default_rng(5)
    heads = [random.integers(3, 320, size).tolist() for size in (33, 64)]
    return [heads[n % 2] + random.integers(3, 320, 1 + 11 * n % 60).tolist() for n in range(count)]


def fills(world, request):
    """(pages, hashes, have_tokens) of each on_fill."""
    return [rest for name, who, *rest in world.role.hooks if name == "on_fill" and who is request]


@pytest.mark.parametrize("most", [0, 2, 99])
def test_filled_generations_equal_computed_ones_token_for_token(pair, most):
    source, target = pair
    target.role.most = most
    chosen = prompts(12)
    expected = source.run(make_request(prompt, max_tokens=12) for prompt in chosen)
    for prompt, wanted in zip(chosen, expected, strict=True):
        request = make_request(prompt, max_tokens=12)
        assert target.run([request]) == [wanted]
        found = 0
        for _, hashes, have in fills(target, request):
            found = min(have // PAGE + most, len(hashes)) * PAGE
            assert request.cached_tokens == target.role.tokens[request.request_id][0].cached_tokens == found
    assert any(request.cached_tokens >= 64 for name, request, *_ in target.role.hooks if name == "on_ended") or not most
    assert not any(name == "release_kv" for name, *_ in target.role.hooks), "each was answered, none ended before"


def test_many_at_once(pair):
    source, target = pair
    chosen = prompts(40)
    expected = source.run(make_request(prompt, max_tokens=9) for prompt in chosen)
    assert target.run(make_request(prompt, max_tokens=9) for prompt in chosen) == expected


def test_the_role_sees_names_of_pages_and_what_is_to_be_kept(pair):
    _, target = pair
    keep = Keep(session="chat", ttl_s=60.0, tenant="a")
    prompt = list(range(3, 3 + 2 * PAGE))
    request = make_request(prompt, max_tokens=2 * PAGE, keep=keep)
    target.run([request])
    kept, hashes = target.role.seen[request.request_id]
    assert (kept, len(hashes)) == (keep, 1), "the page of the last token is computed"
    ((pages, filled, have),) = fills(target, request)
    assert (list(filled), len(pages), have) == (hashes, 2, 0)
    assert request.hashes[:1] == hashes
    assert len(request.hashes) == 3, "all pages that were completed; the last token's KV was never written"
    assert set(request.hashes) == target.role.known


def test_a_filled_prefill_announces_what_came_from_elsewhere(pair):
    source, target = pair
    (prompt,) = prompts(1)
    source.run([make_request(prompt)])
    request = make_request(prompt, mode=Mode.PREFILL)
    target.submit(request)
    target.role.wait(lambda: "on_prefill_done" in target.role.names(request.request_id))
    (computed,) = [rest[-1] for name, _, *rest in target.role.hooks if name == "on_prefill_admitted"]
    assert computed == request.cached_tokens == len(prompt) // PAGE * PAGE
    target.role.fence.open.set()
    target.engine.handoff_done(request.request_id)
    target.wait(request)
    assert target.role.names(request.request_id) == [
        "on_fill", "on_prefill_admitted", "on_prefill_done", "release_kv", "on_ended",
    ]  # fmt: skip


def test_an_aborted_fill_ends_after_the_fence_of_the_role(pair):
    _, target = pair
    target.role.answers = False
    request = make_request(prompts(1)[0])
    target.submit(request)
    target.role.wait(lambda: bool(fills(target, request)))
    target.engine.abort(request.request_id, Aborted("the client went away"))
    target.role.wait(lambda: "release_kv" in target.role.names(request.request_id))
    target.role.answers = True
    assert len(target.run([make_request([3, 4, 5], max_tokens=20)])[0]) == 20
    assert request.request_id not in target.role.ended
    target.role.fence.open.set()
    target.wait(request)
    assert isinstance(target.role.ended[request.request_id], Aborted)


@pytest.mark.parametrize("how", ["stop", "crash"])
def test_an_engine_that_ends_gives_back_what_is_being_filled(other_model, how):
    role = Copier(None)
    role.answers = False
    role.fence.open.set()
    with engine_world(other_model, role, settles=False, crashes_expected=how == "crash") as world:
        request = make_request(prompts(1)[0])
        world.submit(request)
        role.wait(lambda: bool(fills(world, request)))
        assert request.phase is Phase.FILLING
        if how == "crash":
            role.on_tokens = lambda step, tokens: 1 // 0
            world.submit(make_request([3, 4, 5]))
        else:
            world.engine.stop()
        world.wait(request)
        error = role.ended[request.request_id]
        assert error.kind is (ErrorKind.INTERNAL if how == "crash" else ErrorKind.DRAINING)
        assert role.names(request.request_id) == ["on_fill", "release_kv", "on_ended"]
    role.threads.shutdown()


def test_pages_that_are_read_hold_still(model):
    role = Keeper()
    role.fence = Gate()
    with engine_world(model, role, pages=6, context_tokens=96) as world:
        first, second = (make_request([head, *range(3, 3 + 64)], max_tokens=4) for head in (7, 8))
        world.run([first])
        told = set(role.places.values())
        before = world.engine.pool.tensor[sorted(told)].clone()
        world.submit(second)
        assert len(world.run([make_request([3], max_tokens=9)])[0]) == 9
        assert second.phase is Phase.QUEUED, "two pages are free, five are needed"
        assert (world.engine.pool.tensor[sorted(told)] == before).all()
        role.fence.open.set()
        world.wait(second)
        assert len(world.output(second)) == 4


def test_nobody_is_told_of_pages_who_did_not_ask(model):
    with engine_world(model) as world:
        world.run([make_request(list(range(3, 60)))])
        assert not any(name == "on_pages" for name, *_ in world.role.hooks)


def eventually(fact):
    pause = threading.Event()
    for _ in range(6000):
        if fact():
            return
        pause.wait(0.005)
    raise AssertionError("never came true")


class Congested(RecordingRole):
    """The network is full until the test says otherwise."""

    def __init__(self):
        super().__init__()
        self.unsent = 0

    def unsent_tokens(self):
        return self.unsent


def test_no_prefill_starts_while_the_network_is_far_behind(model):
    role = Congested()
    with engine_world(model, role) as world:
        first, second = (make_request([head, *range(3, 60)], mode=Mode.PREFILL) for head in (7, 8))
        world.submit(first)
        role.wait(lambda: "on_prefill_done" in role.names(first.request_id))
        role.unsent = 10_000
        world.submit(second)
        assert len(world.run([make_request([3, 4], max_tokens=20)])[0]) == 20, "LOCAL requests go on"
        assert second.phase is Phase.QUEUED
        eventually(lambda: world.engine.stats().unsent_tokens == 10_000)
        role.unsent = 0
        role.wait(lambda: "on_prefill_done" in role.names(second.request_id))
        for request in (first, second):
            world.engine.handoff_done(request.request_id)
        world.wait(first, second)
