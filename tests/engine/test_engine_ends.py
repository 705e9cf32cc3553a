"""Every request ends once, typed, and leaves nothing: refusals, aborts, deadlines, overload, stop, a failing model."""

import dataclasses
import json
import threading

import numpy as np
import pytest
from support.checkpoints import tiny_checkpoint
from support.engine_world import RecordingRole, engine_world, make_request, tiny_model

from baton_common.clock import SystemClock
from baton_common.errors import Aborted, ConfigError, DeadlineExceeded, Draining, ErrorKind, Overloaded
from baton_engine.config import EngineConfig
from baton_engine.engine import Engine
from baton_engine.exec.device import open_device
from baton_engine.request import Phase


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny_model(tiny_checkpoint("llama", tmp_path_factory.mktemp("llama")))


class Held:
    """A decoder that waits before each step while `gate` is closed, and fails when `broken`."""

    def __init__(self, decoder):
        self._decoder = decoder
        self.gate = threading.Event()
        self.gate.set()
        self.broken = False

    def forward(self, *args, **options):
        assert self.gate.wait(10.0)
        if self.broken:
            raise RuntimeError("a kernel failed")
        return self._decoder.forward(*args, **options)


@pytest.fixture
def held(model):
    """The model, with a decoder that tests can hold."""
    return dataclasses.replace(model, decoder=Held(model.decoder))


def long(prompt=(5, 6, 7), **options):
    return make_request(list(prompt), max_tokens=400, **options)


def error_of(world, request):
    return world.role.ended[request.request_id]


def has_tokens(world, request, count=1):
    return lambda: len(world.role.tokens.get(request.request_id, ())) >= count


@pytest.mark.parametrize(
    ("param", "request_of"),
    [
        ("prompt", lambda: make_request([])),
        ("prompt", lambda: make_request([3, 320])),
        ("prompt", lambda: make_request([3, -1])),
        ("temperature", lambda: make_request([3], temperature=-1.0)),
        ("max_tokens", lambda: make_request([3], max_tokens=0)),
        ("logit_bias", lambda: make_request([3], logit_bias={320: 1.0})),
    ],
)
def test_what_can_never_work_is_refused_by_name(model, param, request_of):
    with engine_world(model) as world:
        request = request_of()
        world.submit(request)
        world.wait(request)
        error = error_of(world, request)
        assert (error.kind, error.param, error.request_id) == (ErrorKind.INVALID, param, request.request_id)
        assert request.phase is Phase.FREED


def test_a_prompt_beyond_the_context_is_refused_with_both_lengths(model):
    with engine_world(model, context_tokens=64) as world:
        request = make_request([3] * 65)
        world.submit(request)
        world.wait(request)
        assert error_of(world, request).kind is ErrorKind.INVALID
        assert "65" in str(error_of(world, request))
        assert "64" in str(error_of(world, request))


def test_an_id_in_use_is_refused_and_the_first_one_lives(held):
    with engine_world(held) as world:
        held.decoder.gate.clear()
        first = make_request([3, 4, 5])
        second = make_request([3, 4, 5], request_id=first.request_id)
        errors = []
        world.role.on_ended = lambda request, error: errors.append((request, error))
        world.submit(first, second)
        held.decoder.gate.set()
        world.role.wait(lambda: len(world.role.tokens.get(first.request_id, ())) == 8)
        world.settle()
    assert [(request is second, error is not None) for request, error in errors] == [(True, True), (False, False)]
    assert errors[0][1].param == "request_id"


def test_an_abort_in_the_middle_frees_everything_and_leaves_the_others_alone(model):
    with engine_world(model) as world:
        victims, others = [long() for _ in range(3)], [make_request([8, 9, n], max_tokens=40) for n in range(3)]
        world.submit(*victims, *others)
        world.role.wait(has_tokens(world, victims[0], 3))
        for victim in victims:
            world.engine.abort(victim.request_id, Aborted("the client went away"))
        world.wait(*victims, *others)
        assert all(isinstance(error_of(world, victim), Aborted) for victim in victims)
        assert all(error_of(world, other) is None for other in others)
        expected = [world.output(other) for other in others]
        world.settle()
        assert world.run(make_request([8, 9, n], max_tokens=40) for n in range(3)) == expected


def test_an_abort_of_nobody_or_of_the_dead_is_ignored(model):
    with engine_world(model) as world:
        request = make_request([3, 4])
        world.engine.abort("nobody", Aborted("x"))
        world.run([request])
        world.engine.abort(request.request_id, Aborted("too late"))
        world.run([make_request([3, 4])])
        assert error_of(world, request) is None


def test_aborts_at_every_point_of_life_leave_nothing(model):
    with engine_world(model, step_tokens=16, pages=40, context_tokens=300) as world:
        requests = [make_request([3 + n] * (5 + 7 * n), max_tokens=30) for n in range(12)]
        for n, request in enumerate(requests):
            world.submit(request)
            if n % 2:
                world.role.wait(lambda n=n: len(world.role.hooks) >= 3 * n, 10.0)
            world.engine.abort(requests[n // 2].request_id, Aborted("random"))
        world.wait(*requests)


def test_a_deadline_ends_a_waiting_and_a_running_request(held):
    with engine_world(held, max_rows=1) as world:
        held.decoder.gate.clear()
        now_s = SystemClock().now()
        running, waiting = long(deadline_s=now_s + 0.15), long(deadline_s=now_s + 0.15)
        late = long(deadline_s=now_s - 1.0)
        world.submit(running, waiting, late)
        world.wait(late)
        threading.Timer(0.3, held.decoder.gate.set).start()
        world.wait(running, waiting)
        for request in (running, waiting, late):
            assert isinstance(error_of(world, request), DeadlineExceeded)


def test_more_than_the_queue_holds_is_refused_with_a_time_to_come_back(held):
    with engine_world(held, max_rows=1, max_queue=2) as world:
        held.decoder.gate.clear()
        requests = [make_request([3, 4, n]) for n in range(8)]
        world.submit(requests[0])
        world.role.wait(lambda: world.engine.stats().steps == 0)
        world.submit(*requests[1:])
        threading.Timer(0.1, held.decoder.gate.set).start()
        world.wait(*requests)
        refused = [error for error in world.role.ended.values() if error is not None]
        assert len(refused) >= 5
        assert all(isinstance(error, Overloaded) and error.retry_after_ms > 0 for error in refused)


def test_stop_ends_what_is_in_flight_with_draining_and_later_submissions_too(model):
    role = RecordingRole()
    with engine_world(model, role) as world:
        requests = [long() for _ in range(12)]
        world.submit(*requests)
        world.role.wait(has_tokens(world, requests[0]))
        world.engine.stop()
        assert all(isinstance(error_of(world, request), Draining) for request in requests)
        late = make_request([3])
        world.submit(late)
        assert isinstance(error_of(world, late), Draining)
        assert late.phase is Phase.FREED
        world.engine.stop()


def test_an_engine_that_never_ran_stops(model):
    with engine_world(model):
        pass


@pytest.mark.parametrize("where", ["model", "role"])
def test_a_failure_ends_every_request_typed_and_reports_a_dump(held, where):
    role = RecordingRole()
    with engine_world(held, role, crashes_expected=True, max_rows=2) as world:
        requests = [long() for _ in range(5)]
        world.submit(*requests)
        world.role.wait(has_tokens(world, requests[0], 2))
        if where == "model":
            held.decoder.broken = True
        else:
            role.on_tokens = lambda step, tokens: 1 // 0
        world.wait(*requests)
        for request in requests:
            assert error_of(world, request).kind is ErrorKind.INTERNAL
        world.engine.stop()
        late = make_request([3])
        world.submit(late)
        assert error_of(world, late).kind is ErrorKind.INTERNAL
        assert world.engine.stats().empty
    ((cause, dump),) = world.crashes
    assert isinstance(cause, RuntimeError if where == "model" else ZeroDivisionError)
    text = json.dumps(dump)
    assert requests[0].request_id in text
    assert dump["plan"]["work"]
    assert {one["phase"] for one in dump["requests"]} >= {"queued"}
    assert dump["pages"]["total"] == 128


def test_a_pool_below_one_context_refuses_to_start_with_the_number_to_set(model):
    device = open_device("cpu", threads=1)
    config = EngineConfig(dtype="float32", page_tokens=16, context_tokens=512, pages=31)
    with pytest.raises(ConfigError, match="set pages to 32"):
        Engine(model, config, device, RecordingRole(), SystemClock(), lambda error, dump: None)
    device.close()


@pytest.mark.parametrize("seed", range(4))
def test_random_aborts_in_a_tight_pool_never_touch_another_request(model, seed):
    random = np.random.default_rng(seed)
    heads = [random.integers(3, 320, size).tolist() for size in (16, 40)]

    def requests():
        return [
            make_request(
                [*heads[n % 2], *(3 + (n * k) % 300 for k in range(n % 23))],
                max_tokens=5 + n * 7 % 40, temperature=float(n % 3 == 0), seed=n,
            )
            for n in range(24)
        ]  # fmt: skip

    with engine_world(model) as calm:
        expected = calm.run(requests())
    victims = set(random.choice(24, 10, replace=False).tolist())
    with engine_world(
        model, pages=14, context_tokens=200, max_rows=6, step_tokens=int(random.integers(6, 40))
    ) as world:
        everyone = requests()
        for n, request in enumerate(everyone):
            world.submit(request)
            if n in victims:
                patience = int(random.integers(0, 12))
                world.role.wait(
                    lambda at=len(world.role.hooks) + patience: (
                        len(world.role.hooks) >= at or world.engine.stats().empty
                    )
                )
                world.engine.abort(request.request_id, Aborted("random"))
        world.wait(*everyone)
        for n, request in enumerate(everyone):
            output = world.output(request)
            error = error_of(world, request)
            assert output == (expected[n] if error is None else expected[n][: len(output)])
            assert error is None or n in victims
