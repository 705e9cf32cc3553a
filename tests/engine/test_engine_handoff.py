"""PREFILL on one engine, RESERVE on another, the KV copied between their pools: the same tokens as one engine alone."""

import threading

import numpy as np
import pytest
from support.checkpoints import tiny_checkpoint
from support.engine_world import RecordingRole, engine_world, make_request, tiny_model

from baton_common.errors import Aborted, BatonError, ErrorKind
from baton_engine.request import Mode, Phase

PAGE = 16


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny_checkpoint("qwen3", tmp_path_factory.mktemp("qwen3"), num_hidden_layers=5)


@pytest.fixture(scope="module")
def model(folder):
    return tiny_model(folder)


@pytest.fixture(scope="module")
def other_model(folder):
    return tiny_model(folder)


class Sender(RecordingRole):
    """Copies KV as soon as the engine says that it is there; `lose` breaks a handoff at its end."""

    def __init__(self):
        super().__init__()
        self.receiver = None  # World
        self.sender = None
        self.lose = set()
        self.source_pages = {}
        self.copied = {}  # request -> bool[layers, tokens]

    def on_prefill_admitted(self, request, pages, computed_tokens):
        super().on_prefill_admitted(request, pages, computed_tokens)
        wanted = self.receiver.role.wanted[request.request_id]
        self.source_pages[request.request_id] = pages
        layers = self.sender.engine.pool.layout.layers
        self.copied[request.request_id] = np.zeros((layers, request.prompt_tokens), dtype=bool)
        self._copy(request.request_id, 0, layers, wanted.first_missing, computed_tokens)

    def on_layers(self, plan, layer_begin, layer_end):
        super().on_layers(plan, layer_begin, layer_end)
        for work in plan.work:
            if work.request_id in self.source_pages:
                first = self.receiver.role.wanted[work.request_id].first_missing
                self._copy(work.request_id, layer_begin, layer_end, max(first, work.start), work.start + work.count)

    def _copy(self, request_id, layer_begin, layer_end, begin, end):
        target = self.receiver.role.wanted[request_id].pages
        for at in range(begin, end):
            place = slice(None), slice(layer_begin, layer_end), slice(None), slice(None), at % PAGE
            source = self.sender.engine.pool.tensor[place][self.source_pages[request_id][at // PAGE]]
            self.receiver.engine.pool.tensor[place][target[at // PAGE]] = source
            self.copied[request_id][layer_begin:layer_end, at] = True

    def on_prefill_done(self, request, first):
        super().on_prefill_done(request, first)
        wanted = self.receiver.role.wanted[request.request_id]
        assert self.copied[request.request_id][:, wanted.first_missing :].all()
        if request.request_id in self.lose:
            error = BatonError("a wire broke", kind=ErrorKind.TRANSFER)
            self.receiver.engine.kv_failed(request.request_id, error)
            self.sender.engine.handoff_failed(request.request_id, error)
        else:
            self.receiver.engine.kv_received(request.request_id, first.token_id, first.logprobs)
            self.sender.engine.handoff_done(request.request_id)


class Wanted:
    def __init__(self, pages, first_missing):
        self.pages, self.first_missing = pages, first_missing


class Receiver(RecordingRole):
    def __init__(self):
        super().__init__()
        self.wanted = {}

    def on_reserved(self, request, pages, first_missing_token):
        self.wanted[request.request_id] = Wanted(pages, first_missing_token)
        super().on_reserved(request, pages, first_missing_token)


class SlowFence:
    def __init__(self):
        self.open = threading.Event()

    def done(self):
        return self.open.is_set()


@pytest.fixture
def pair(model, other_model):
    """(prefill world, decode world), connected."""
    with (
        engine_world(model, Sender(), layer_group=2, step_tokens=24) as sender,
        engine_world(other_model, Receiver(), pages=100, max_reserved=16) as receiver,
    ):
        sender.role.sender, sender.role.receiver = sender, receiver
        yield sender, receiver


def hand_over(pair, prompt, **options):
    """Reserve, then prefill; returns the request on each side."""
    sender, receiver = pair
    reserve = make_request(prompt, mode=Mode.RESERVE, **options)
    receiver.submit(reserve)
    known = receiver.role
    known.wait(
        lambda: reserve.request_id in known.wanted or reserve.request_id in known.ended or reserve.mode is Mode.LOCAL
    )
    if reserve.request_id not in known.wanted:
        return None, reserve
    prefill = make_request(
        prompt, mode=Mode.PREFILL, request_id=reserve.request_id,
        send_from_token=known.wanted[reserve.request_id].first_missing, **options,
    )  # fmt: skip
    sender.submit(prefill)
    return prefill, reserve


def prompts(count, seed):
    random = np.random.default_rng(seed)
    heads = [random.integers(3, 320, size).tolist() for size in (20, 48)]
    return [
        (heads[n % 2] if n % 3 else []) + random.integers(3, 320, int(random.integers(2, 70))).tolist()
        for n in range(count)
    ]


def test_handed_over_generations_equal_local_ones_token_for_token(pair, model):
    sender, receiver = pair
    chosen = prompts(24, seed=1)
    options = [
        {"max_tokens": 2 + n % 20, **({"temperature": 1.0, "seed": n, "repetition_penalty": 1.2} if n % 4 == 0 else {})}
        for n in range(len(chosen))
    ]
    with engine_world(model) as alone:
        expected = alone.run(make_request(prompt, **own) for prompt, own in zip(chosen, options, strict=True))
    for wave in (slice(0, 12), slice(12, 24)):
        pairs = [hand_over(pair, prompt, **own) for prompt, own in zip(chosen[wave], options[wave], strict=True)]
        sender.wait(*(prefill for prefill, _ in pairs))
        receiver.wait(*(reserve for _, reserve in pairs))
        for (prefill, reserve), wanted in zip(pairs, expected[wave], strict=True):
            assert sender.role.ended[prefill.request_id] is None
            assert receiver.role.ended[reserve.request_id] is None
            assert sender.output(prefill) + receiver.output(reserve) == wanted
    assert any(wanted.first_missing for wanted in receiver.role.wanted.values())


def test_hooks_come_in_the_order_of_the_protocol(pair):
    sender, receiver = pair
    prefill, reserve = hand_over(pair, list(range(3, 60)), max_tokens=5)
    receiver.wait(reserve)
    sender.wait(prefill)
    assert sender.role.names(prefill.request_id) == ["on_prefill_admitted", "on_prefill_done", "release_kv", "on_ended"]
    assert receiver.role.names(reserve.request_id) == ["on_reserved", "release_kv", "on_ended"]
    assert [token.position for token in sender.role.tokens[prefill.request_id]] == [0]
    assert [token.position for token in receiver.role.tokens[reserve.request_id]] == [1, 2, 3, 4]
    layers = [(begin, end) for name, _, *rest in sender.role.hooks if name == "on_layers" for _, begin, end in [rest]]
    assert layers == [(0, 2), (2, 4), (4, 5)] * (len(layers) // 3)
    assert not any(name == "on_layers" for name, *_ in receiver.role.hooks)
    phases = list(reserve.stamps)
    assert phases.index(Phase.RESERVED) < phases.index(Phase.READY) < phases.index(Phase.RUNNING)


def test_a_first_token_that_ends_the_request_needs_no_handoff(pair):
    sender, receiver = pair
    prefill, reserve = hand_over(pair, list(range(3, 40)), max_tokens=1)
    sender.wait(prefill)
    assert sender.role.names(prefill.request_id) == ["on_prefill_admitted", "release_kv", "on_ended"]
    receiver.engine.abort(reserve.request_id, Aborted("over"))
    receiver.wait(reserve)
    assert receiver.role.names(reserve.request_id) == ["on_reserved", "release_kv", "on_ended"]


def test_a_lost_handoff_ends_both_sides_typed(pair):
    sender, receiver = pair
    reserve = make_request(list(range(3, 70)), mode=Mode.RESERVE)
    sender.role.lose.add(reserve.request_id)
    receiver.submit(reserve)
    receiver.role.wait(lambda: reserve.request_id in receiver.role.wanted)
    prefill = make_request(reserve.tokens, mode=Mode.PREFILL, request_id=reserve.request_id)
    sender.submit(prefill)
    sender.wait(prefill)
    receiver.wait(reserve)
    assert sender.role.ended[prefill.request_id].kind is ErrorKind.TRANSFER
    assert receiver.role.ended[reserve.request_id].kind is ErrorKind.TRANSFER


def test_a_short_uncached_suffix_is_prefilled_by_the_decoder_itself(pair):
    _, receiver = pair
    prompt = list(range(3, 3 + 50))
    (expected,) = receiver.run([make_request(prompt)])
    prefill, reserve = hand_over(pair, prompt, local_below_tokens=10)
    assert prefill is None
    receiver.wait(reserve)
    assert receiver.role.names(reserve.request_id) == ["on_local", "on_ended"]
    assert receiver.output(reserve) == expected


def test_pages_stay_leased_until_the_fence_of_the_role_is_done(pair):
    _, receiver = pair
    fence = SlowFence()
    receiver.role.release_kv = lambda request, error: fence
    reserve = make_request(list(range(3, 70)), mode=Mode.RESERVE)
    receiver.submit(reserve)
    receiver.role.wait(lambda: reserve.request_id in receiver.role.wanted)
    receiver.engine.kv_receiving(reserve.request_id)
    receiver.engine.abort(reserve.request_id, Aborted("the client went away"))
    (other,) = receiver.run([make_request([3, 4, 5], max_tokens=30)])
    assert len(other) == 30
    assert reserve.request_id not in receiver.role.ended
    stats = receiver.engine.stats()
    assert stats.free_pages + stats.cached_pages < stats.total_pages
    fence.open.set()
    receiver.wait(reserve)
    assert isinstance(receiver.role.ended[reserve.request_id], Aborted)


def test_stop_does_not_wait_for_ever_for_a_fence(other_model, monkeypatch):
    monkeypatch.setattr("baton_engine.engine.STOP_TIMEOUT_S", 0.05)
    role = Receiver()
    role.release_kv = lambda request, error: SlowFence()
    with engine_world(other_model, role, settles=False) as world:
        reserve = make_request(list(range(3, 70)), mode=Mode.RESERVE)
        world.submit(reserve)
        role.wait(lambda: reserve.request_id in role.wanted)
        world.engine.stop()
        assert role.ended[reserve.request_id].kind is ErrorKind.DRAINING
