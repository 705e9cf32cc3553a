"""Prefill and decode as real processes, over each wire: the same tokens as a colocated worker and as `transformers`.

A small client plays the router. Weights are random and float32, so a wrong or missing page changes the tokens.
All processes compute on the CPU; with a GPU (`-m gpu`) everything is shown once more with all of them on that one.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
from support.checkpoints import tiny_checkpoint
from support.kv_wires import ONESIDED, over
from support.pd import VOCAB, connected, ids, no_page_is_held, prompts, side_by_side, status
from support.processes import Service, WorkerProcess, spawn_service
from support.reference import Reference
from support.router_client import RouterClient

from baton_engine.request import Mode, SamplingParams
from baton_engine.role import TokenOut

pytestmark = [pytest.mark.process, pytest.mark.timeout(300)]

PAGE_TOKENS = 16
OUTPUTS = 10
ODD_CHUNKS = {"step_tokens": 41, "max_rows": 16}  # prompts are cut at odd places, prefills and decodes are mixed


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint("llama", tmp_path_factory.mktemp("model"), seed=7)


@pytest.fixture(scope="module", params=("cpu", pytest.param("gpu", marks=pytest.mark.gpu)))
def device(request: pytest.FixtureRequest) -> str:
    return "cpu" if request.param == "cpu" else str(request.getfixturevalue("gpu_device"))


@pytest.fixture(scope="module")
def colocated(device: str, checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[WorkerProcess]:
    folder = tmp_path_factory.mktemp("colocated")
    with WorkerProcess("colocated", checkpoint, folder, device=device, **ODD_CHUNKS) as process:
        yield process.wait_ready()


@pytest.fixture(scope="module", params=over("shm", "tcp", *ONESIDED))
def wire(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def service(device: str, wire: str, checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    folder = tmp_path_factory.mktemp(wire)
    with spawn_service(folder, checkpoint, router=False, wire=wire, device=device, **ODD_CHUNKS) as service:
        yield service


async def ask_colocated(
    process: WorkerProcess, questions: Sequence[tuple[Sequence[int], SamplingParams]]
) -> list[list[TokenOut]]:
    async with RouterClient(process.address) as router:

        async def ask(prompt: Sequence[int], sampling: SamplingParams) -> list[TokenOut]:
            answer = await router.submit(Mode.LOCAL, prompt, sampling=sampling)
            await answer.end()
            return answer.tokens

        return await side_by_side(questions, ask)


# ---- the same tokens ------------------------------------------------------------------------------------------------
async def test_greedy_tokens_are_those_of_a_colocated_worker_and_of_transformers(
    service: Service, wire: str, colocated: WorkerProcess, checkpoint: Path
) -> None:
    greedy = SamplingParams(temperature=0.0, max_tokens=OUTPUTS, ignore_eos=True)
    questions = [(prompt, greedy) for prompt in prompts(200, seed=1)]
    async with connected(service) as pair:
        answers = ids(await side_by_side(questions, pair.ask))
    assert answers == ids(await ask_colocated(colocated, questions))
    reference = Reference(checkpoint)
    for (prompt, _), answer in zip(questions, answers, strict=True):
        assert reference.is_greedy(prompt, answer), prompt
    for (prompt, _), answer in list(zip(questions, answers, strict=True))[:10]:
        assert reference.generate(prompt, OUTPUTS) == answer
    for process in service.workers:
        await no_page_is_held(process)
    assert {peer.wire for peer in (await status(service.decode[0])).peers} == {wire}
    assert (await status(service.prefill[0])).load.handoffs >= 200


async def test_seeded_sampling_is_equal_whoever_computes(service: Service, colocated: WorkerProcess) -> None:
    rng = random.Random(3)
    questions = [
        (
            prompt,
            SamplingParams(
                temperature=rng.choice((0.5, 1.0, 1.5)), top_p=rng.choice((0.5, 1.0)), top_k=rng.choice((0, 20)),
                repetition_penalty=rng.choice((1.0, 1.3)), presence_penalty=rng.choice((0.0, 0.5)),
                frequency_penalty=rng.choice((0.0, 0.5)), logit_bias={5: 3.0}, seed=rng.randrange(2**63),
                max_tokens=OUTPUTS, ignore_eos=True, logprobs=True, top_logprobs=2,
            ),
        )
        for prompt in prompts(48, seed=2)
    ]  # fmt: skip
    async with connected(service) as pair:
        answers = await side_by_side(questions, pair.ask)
    local = await ask_colocated(colocated, questions)
    assert ids(answers) == ids(local)
    for answer, expected in zip(answers, local, strict=True):
        for token, other in zip(answer, expected, strict=True):
            assert token.logprobs is not None
            assert other.logprobs is not None
            assert token.logprobs.logprob == pytest.approx(other.logprobs.logprob, abs=1e-3)
            assert [token_id for token_id, _ in token.logprobs.top] == [token_id for token_id, _ in other.logprobs.top]


async def test_what_decode_has_cached_is_not_sent_again(service: Service) -> None:
    greedy = SamplingParams(temperature=0.0, max_tokens=4, ignore_eos=True)
    prompt = [(7 * index + 11) % VOCAB for index in range(5 * PAGE_TOKENS + 3)]
    async with connected(service) as pair:
        await pair.ask(prompt, greedy)
        again = await pair.decode.submit(Mode.RESERVE, [*prompt, 1, 2, 3], sampling=greedy)
        assert (await again.ticket).first_missing_token == 5 * PAGE_TOKENS
        await pair.decode.abort(again)


async def test_a_moved_request_goes_on_where_it_was(service: Service) -> None:
    whole = SamplingParams(temperature=0.8, seed=5, max_tokens=OUTPUTS, ignore_eos=True)
    prompt = prompts(1, seed=4)[0]
    async with connected(service) as pair:
        tokens = [token.token_id for token in await pair.ask(prompt, whole)]
        sent = [*prompt, *tokens[:4]]  # the client has four tokens when the first decode worker dies
        reserved = await pair.decode.submit(Mode.RESERVE, sent, prompt_tokens=len(prompt), sampling=whole)
        started = await pair.prefill.submit(
            Mode.PREFILL, sent, prompt_tokens=len(prompt), sampling=whole, ticket=await reserved.ticket
        )
        first = await started.first()
        assert first.position == 4
        assert [first.token_id, *await reserved.end()] == tokens[4:]


@pytest.mark.parametrize(
    ("tokens", "sampling", "param"),
    [
        ([1, VOCAB], SamplingParams(), "prompt"),
        ([1] * 5000, SamplingParams(), "prompt"),
        ([1], SamplingParams(temperature=-1.0), "temperature"),
        ([1], SamplingParams(max_tokens=0), "max_tokens"),
    ],
    ids=["strange token", "too long", "temperature", "max_tokens"],
)
async def test_what_can_never_work_is_refused_by_field(
    service: Service, tokens: list[int], sampling: SamplingParams, param: str
) -> None:
    async with connected(service) as pair:
        answer = await pair.decode.submit(Mode.RESERVE, tokens, sampling=sampling)
        await answer.over
        assert answer.error is not None
        assert (answer.error.kind.value, answer.error.param) == ("invalid", param)
