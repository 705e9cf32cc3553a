"""Real processes die, hang and leave under sixteen streams. No client gets a wrong token or waits past its deadline,
and no survivor keeps a page. The truth is what `transformers` generates for the same prompt.
"""

from __future__ import annotations

import random
import signal
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import httpx
import pytest
from support.checkpoints import tiny_checkpoint
from support.house import DEADLINE_S, Stream, Streams, assert_no_leaks, eventually, status
from support.processes import RouterProcess, Service, WorkerProcess, spawn_service
from support.reference import Reference
from tokenizers import Tokenizer

pytestmark = [pytest.mark.process, pytest.mark.timeout(240)]

STREAMS = 16
OUTPUTS = 160
FIRST_TEXT_ID = 7  # below are the special tokens of the tiny checkpoints


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint("llama", tmp_path_factory.mktemp("model") / "model", seed=3)


@pytest.fixture(scope="module")
def prompts() -> list[list[int]]:
    """Sixteen prompts of two conversations, so that they share prefixes, long enough to be handed over."""
    chance = random.Random(5)
    shared = [[chance.randrange(FIRST_TEXT_ID, 320) for _ in range(70)] for _ in range(2)]
    return [
        shared[index % 2] + [chance.randrange(FIRST_TEXT_ID, 320) for _ in range(chance.randrange(80, 200))]
        for index in range(STREAMS)
    ]


@pytest.fixture(scope="module")
def expected(checkpoint: Path, prompts: list[list[int]]) -> list[str]:
    reference = Reference(checkpoint)
    tokenizer = Tokenizer.from_file(str(checkpoint / "tokenizer.json"))
    return [tokenizer.decode(reference.generate(prompt, OUTPUTS)) for prompt in prompts]


@pytest.fixture(scope="module")
def lasting_house(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    """Two of each behind a router; one house for all tests, so that each lives with what the one before left behind."""
    settings = {"request_timeout_s": DEADLINE_S, "local_below_tokens": 16}
    folder = tmp_path_factory.mktemp("house")
    with spawn_service(
        folder, checkpoint, prefill=2, decode=2, router_settings=settings, fixed_ports=True
    ) as service:
        yield service


@pytest.fixture
def house(lasting_house: Service) -> Service:
    """The house with everybody at home again, and seen by the router."""
    assert lasting_house.router is not None
    for process in (*lasting_house.workers, lasting_house.router):
        if process.exit_code is not None:
            process.start()
    for process in (*lasting_house.workers, lasting_house.router):
        process.wait_ready()
    lasting_house.router.wait_workers(len(lasting_house.workers))
    return lasting_house


def assert_all_right(answers: list[Stream], expected: list[str]) -> None:
    for index, (answer, text) in enumerate(zip(answers, expected, strict=True)):
        assert (answer.status, answer.error, answer.finish) == (200, "", "length"), f"stream {index}: {answer}"
        assert answer.completion_tokens == OUTPUTS, f"stream {index}: {answer}"
        assert answer.text == text, f"stream {index} has wrong tokens"
        assert answer.seconds < DEADLINE_S


def busiest(workers: tuple[WorkerProcess, ...]) -> WorkerProcess:
    """The worker with most to lose."""
    return max(workers, key=lambda worker: status(worker).load.running + status(worker).load.reserved)


FAULTS = [
    pytest.param("prefill", signal.SIGKILL, 0, id="kill -9 prefill before the first token"),
    pytest.param("prefill", signal.SIGKILL, 8, id="kill -9 prefill while others decode"),
    pytest.param("decode", signal.SIGKILL, 0, id="kill -9 decode before the first token"),
    pytest.param("decode", signal.SIGKILL, 600, id="kill -9 decode in the middle of the answers"),
    pytest.param("prefill", signal.SIGSTOP, 8, id="SIGSTOP prefill"),
    pytest.param("decode", signal.SIGSTOP, 400, id="SIGSTOP decode"),
]


@pytest.mark.parametrize(("role", "number", "after_events"), FAULTS)
def test_a_worker_that_dies_or_hangs_costs_no_client_a_token(
    role: str, number: signal.Signals, after_events: int, house: Service, prompts: list[list[int]], expected: list[str]
) -> None:
    assert house.router is not None
    with Streams(house.router.url, prompts, OUTPUTS).running() as streams:
        streams.wait_events(after_events)
        victim = busiest(getattr(house, role))
        victim.signal(number)
        answers = streams.answers()
    assert_all_right(answers, expected)
    assert_no_leaks([worker for worker in house.workers if worker is not victim])
    if number == signal.SIGSTOP:
        victim.resume()
        assert_no_leaks([victim])


@pytest.mark.parametrize("role", ["prefill", "decode"])
def test_a_worker_that_is_asked_to_leave_finishes_or_hands_back(
    role: str, house: Service, prompts: list[list[int]], expected: list[str]
) -> None:
    assert house.router is not None
    with Streams(house.router.url, prompts, OUTPUTS).running() as streams:
        streams.wait_events(100)
        leaver = busiest(getattr(house, role))
        leaver.terminate()
        assert leaver.wait(30) == 0, leaver.log()
        answers = streams.answers()
    assert_all_right(answers, expected)
    assert_no_leaks([worker for worker in house.workers if worker is not leaver])


def test_a_lost_router_leaves_nothing_behind_and_a_new_one_serves(
    house: Service, prompts: list[list[int]], expected: list[str]
) -> None:
    assert house.router is not None
    with Streams(house.router.url, prompts, OUTPUTS).running() as streams:
        streams.wait_events(100)
        house.router.kill()
        house.router.wait()
        answers = streams.answers()
    for answer, text in zip(answers, expected, strict=True):
        assert answer.error, "the router died, yet the stream ended as if it were whole"
        assert text.startswith(answer.text), "what was sent before the end was wrong"
    assert_no_leaks(house.workers)
    house.router.start().wait_ready().wait_workers(len(house.workers))
    with Streams(house.router.url, prompts, OUTPUTS).running() as streams:
        assert_all_right(streams.answers(), expected)
    assert_no_leaks(house.workers)


def test_the_only_decode_worker_dies_and_its_successor_goes_on(
    checkpoint: Path, tmp_path: Path, prompts: list[list[int]], expected: list[str], unused_tcp_port: int
) -> None:
    """One of each, as `baton up` starts them; the test plays the supervisor that restarts on the same port."""
    with (
        WorkerProcess("prefill", checkpoint, tmp_path) as prefill,
        WorkerProcess("decode", checkpoint, tmp_path, listen=f"127.0.0.1:{unused_tcp_port}") as decode,
    ):
        addresses = [worker.wait_ready().address for worker in (prefill, decode)]
        settings = {"request_timeout_s": DEADLINE_S, "local_below_tokens": 16, "resume_wait_s": 40}
        with RouterProcess(checkpoint, tmp_path, workers=addresses, **settings) as router:
            router.wait_ready().wait_workers(2)
            with Streams(router.url, prompts, OUTPUTS).running() as streams:
                streams.wait_events(300)
                decode.kill()
                decode.wait()
                decode.start().wait_ready()
                answers = streams.answers()
            assert_all_right(answers, expected)
            assert_no_leaks([prefill, decode])


def test_the_only_prefill_worker_dies_and_decode_does_its_work(
    checkpoint: Path, tmp_path: Path, prompts: list[list[int]], expected: list[str]
) -> None:
    settings = {"request_timeout_s": DEADLINE_S, "local_below_tokens": 16}
    with spawn_service(tmp_path, checkpoint, router_settings=settings) as house:
        assert house.router is not None
        [prefill], [decode] = house.prefill, house.decode
        prefill.stop()  # so that it surely dies with prompts that decode waits for
        with Streams(house.router.url, prompts, OUTPUTS).running() as streams:
            eventually(lambda: status(decode).load.reserved > 0, 30, lambda: "decode was never asked to wait")
            prefill.kill()
            answers = streams.answers()
        assert_all_right(answers, expected)
        assert_no_leaks(house.decode)


def test_clients_that_leave_in_the_middle_free_everything(house: Service, prompts: list[list[int]]) -> None:
    assert house.router is not None
    url, outputs = f"{house.router.url}/v1/completions", 700
    body = {"model": "model", "max_tokens": outputs, "temperature": 0, "stream": True, "ignore_eos": True}
    with ExitStack() as streams:
        for prompt in prompts:
            call = httpx.stream("POST", url, json=body | {"prompt": prompt}, timeout=60)
            assert next(streams.enter_context(call).iter_lines()).startswith("data: ")
        before = [status(worker).load.steps for worker in house.decode]
    assert_no_leaks(house.workers)
    for worker, steps in zip(house.decode, before, strict=True):
        assert status(worker).load.steps - steps < outputs // 2, "it went on for clients that were gone"


def test_a_router_that_is_asked_to_leave_finishes_its_answers(
    house: Service, prompts: list[list[int]], expected: list[str]
) -> None:
    assert house.router is not None
    with Streams(house.router.url, prompts, OUTPUTS).running() as streams:
        streams.wait_events(100)
        house.router.terminate()
        answers = streams.answers()
    assert_all_right(answers, expected)
    assert house.router.wait(30) == 0, house.router.log()
    assert_no_leaks(house.workers)
