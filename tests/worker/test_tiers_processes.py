"""Real workers with storage tiers: what one computed, another one, or the next one under its name, does not compute.

Weights are random and float32, so a wrong page changes the tokens; `transformers` says which they must be.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from itertools import count
from pathlib import Path

import httpx
import pytest
from support.checkpoints import tiny_checkpoint
from support.kv_tiers import small_disk
from support.kv_wires import needs
from support.mooncake_store import MooncakeMaster
from support.pd import VOCAB, connected, no_page_is_held, status, until
from support.processes import Service, WorkerProcess, free_ports, spawn_service
from support.reference import Reference
from support.router_client import Answer, RouterClient

from baton_engine.request import Mode, SamplingParams
from baton_proto import worker_pb2

pytestmark = [pytest.mark.process, pytest.mark.timeout(300)]

PAGE_TOKENS = 16
PAGE_BYTES = 3 * 2 * 2 * PAGE_TOKENS * 16 * 4  # layers, keys and values, heads, tokens, dim, float32
FRAME_BYTES = PAGE_BYTES + 64
OUTPUTS = 8
GREEDY = SamplingParams(temperature=0.0, max_tokens=OUTPUTS, ignore_eos=True)
PROMPTS = 4
WAIT_S = 100.0
"""Only bounds a failing test."""


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint("llama", tmp_path_factory.mktemp("model"), seed=7)


@pytest.fixture(scope="module")
def reference(checkpoint: Path) -> Reference:
    return Reference(checkpoint)


@pytest.fixture
def master() -> Iterator[MooncakeMaster]:
    made = MooncakeMaster()
    yield made
    made.close()


class Worker(WorkerProcess):
    """With metrics that can be read."""

    def __init__(self, checkpoint: Path, folder: Path, *, name: str, tiers: str, **settings: object) -> None:
        self._port = free_ports(1)[0]
        super().__init__(
            "colocated", checkpoint, folder, name=name, tiers=tiers, metrics_port=self._port, max_rows=4, **settings
        )

    async def metric(self, name: str, **labels: str) -> float:
        """0 where it was never counted."""
        async with httpx.AsyncClient() as client:
            text = (await client.get(f"http://127.0.0.1:{self._port}/metrics", timeout=WAIT_S)).text
        wanted = ",".join(f'{label}="{value}"' for label, value in sorted(labels.items()))
        found = re.search(rf"^baton_tier_{name}{{{re.escape(wanted)}}} (\S+)$", text, re.MULTILINE)
        return float(found[1]) if found else 0.0

    async def reaches(self, least: float, name: str, *, within_s: float = WAIT_S, **labels: str) -> None:
        async def true() -> bool:
            return await self.metric(name, **labels) >= least

        await until(true, within_s)


def text(pages: int, seed: int) -> list[int]:
    """A prompt of so many full pages and some tokens."""
    draw = random.Random(seed)
    return [draw.randrange(VOCAB) for _ in range(pages * PAGE_TOKENS + 5)]


async def ask(worker: WorkerProcess, prompt: Sequence[int], keep: worker_pb2.KvKeep | None = None) -> Answer:
    async with RouterClient(worker.address) as router:
        answer = await router.submit(Mode.LOCAL, prompt, sampling=GREEDY, keep=keep)
        await answer.end()
        return answer


def cached(answer: Answer) -> int:
    """Tokens of the prompt that were not computed."""
    return answer.tokens[0].cached_tokens or 0


async def cached_of(worker: WorkerProcess, reference: Reference, first_seed: int = 0) -> list[int]:
    """Of some prompts of 6 pages, whose tokens are the right ones. Several: on a slow machine a page that must be read
    can come too late, and is computed."""
    found = []
    for seed in range(first_seed, first_seed + PROMPTS):
        prompt = text(6, seed)
        answer = await ask(worker, prompt)
        assert answer.token_ids == reference.generate(prompt, OUTPUTS)
        found.append(cached(answer))
    return found


# ---- Mooncake --------------------------------------------------------------------------------------------------------
@pytest.mark.slow
class TestMooncake:
    pytestmark = needs("mooncake")

    async def test_a_second_worker_finds_what_the_first_stored_and_both_outlive_the_master(
        self, master: MooncakeMaster, checkpoint: Path, reference: Reference, tmp_path: Path
    ) -> None:
        tiers = f"host=1MiB,mooncake={master.address}:16MiB"
        with (
            Worker(checkpoint, tmp_path, name="first", tiers=tiers) as first,
            Worker(checkpoint, tmp_path, name="second", tiers=tiers) as second,
        ):
            first.wait_ready()
            second.wait_ready()
            seeds = count()

            async def shares() -> bool:
                """Not before both have opened the store, and not while a slow machine makes it look hung."""
                prompt = text(6, next(seeds))
                stored = {"direction": "in", "tier": "mooncake"}
                enough = await first.metric("bytes_total", **stored) + 6 * PAGE_BYTES
                cold = await ask(first, prompt)
                assert (cached(cold), cold.token_ids) == (0, reference.generate(prompt, OUTPUTS))
                with suppress(TimeoutError):
                    await first.reaches(enough, "bytes_total", within_s=3.0, **stored)
                warm = await ask(second, prompt)
                assert warm.token_ids == cold.token_ids
                return cached(warm) == 6 * PAGE_TOKENS

            await until(shares, WAIT_S)
            assert await second.metric("hits_total", tier="mooncake") >= 6

            master.kill()
            for worker in (first, second):
                await cached_of(worker, reference, first_seed=60)
            for worker in (first, second):
                await worker.reaches(1, "off", call="write", tier="mooncake")
                assert [tier.state for tier in (await status(worker)).tiers] == ["on", "off"]
                await no_page_is_held(worker)
                worker.terminate()
            assert [first.wait(WAIT_S), second.wait(WAIT_S)] == [0, 0]


# ---- a folder --------------------------------------------------------------------------------------------------------
async def test_pages_come_back_after_a_restart_and_damage_is_never_served(
    checkpoint: Path, reference: Reference, tmp_path: Path
) -> None:
    folder = tmp_path / "kv"
    with Worker(checkpoint, tmp_path, name="worker", tiers=f"host=1MiB,file={folder}:16MiB") as worker:
        worker.wait_ready()
        assert max(await cached_of(worker, reference)) == 0
        await restart(worker)
        assert max(await cached_of(worker, reference)) == 6 * PAGE_TOKENS

        await restart(worker, lambda: damage(folder))
        assert max(await cached_of(worker, reference)) == 0
        assert await worker.metric("digest_failures_total", tier="file") >= 1


async def restart(worker: WorkerProcess, between: Callable[[], None] = lambda: None) -> None:
    worker.terminate()
    assert worker.wait(WAIT_S) == 0
    between()
    worker.start().wait_ready()
    name = "file"

    async def read() -> bool:
        return {tier.name: tier.bytes for tier in (await status(worker)).tiers}[name] > 0

    await until(read, WAIT_S)  # the names of all files


def damage(folder: Path) -> None:
    pages = list(folder.rglob("*.page"))
    assert len(pages) >= 6
    for path in pages:
        raw = bytearray(path.read_bytes())
        raw[len(raw) // 2] ^= 1
        path.write_bytes(raw)


async def test_a_full_disk_turns_the_tier_off_and_serving_goes_on(
    checkpoint: Path, reference: Reference, tmp_path: Path
) -> None:
    with (
        small_disk(tmp_path / "disk", size="64k") as disk,
        Worker(checkpoint, tmp_path, name="worker", tiers=f"host=1MiB,file={disk}/kv:16MiB") as worker,
    ):
        worker.wait_ready()
        await cached_of(worker, reference)
        await worker.reaches(1, "off", call="write", tier="file")
        file = (await status(worker)).tiers[1]
        assert (file.name, file.state) == ("file", "off")
        assert "No space left on device" in file.reason
        await cached_of(worker, reference, first_seed=60)
        worker.terminate()
        assert worker.wait(WAIT_S) == 0


# ---- sessions --------------------------------------------------------------------------------------------------------
async def crowd_out(worker: WorkerProcess, seed: int) -> None:
    """Fill the pool of 64 pages, and the host pool, with other prompts."""
    for each in range(4):
        await ask(worker, text(40, seed + each))


async def test_a_kept_turn_is_restored_after_its_pages_were_needed_for_others(
    checkpoint: Path, reference: Reference, tmp_path: Path
) -> None:
    keep = worker_pb2.KvKeep(session="chat", ttl_ms=600_000, tenant="t")
    turn, other = [*text(20, seed=1), 1, 2, 3, 4, 5], text(20, seed=2)  # the answer completes page 21
    tiers = f"host={64 * FRAME_BYTES},sessions={40 * FRAME_BYTES}"
    with Worker(checkpoint, tmp_path, name="worker", tiers=tiers, pages=64) as worker:
        worker.wait_ready()
        first = await ask(worker, turn, keep)
        await ask(worker, other)
        await crowd_out(worker, 100)
        assert cached(await ask(worker, other)) == 0, "what nobody keeps is gone"

        following = [*turn, *first.token_ids, 5, 6, 7]
        answer = await ask(worker, following)
        assert answer.token_ids == reference.generate(following, OUTPUTS)
        assert cached(answer) == 21 * PAGE_TOKENS

        async with RouterClient(worker.address) as router:
            await router.end_session("chat", "t")
            await (await router.submit(Mode.LOCAL, [1], sampling=GREEDY)).end()
        await crowd_out(worker, 200)
        assert cached(await ask(worker, following)) == 0
        await no_page_is_held(worker)


# ---- prefill and decode ----------------------------------------------------------------------------------------------
@pytest.fixture
def service(checkpoint: Path, tmp_path: Path) -> Iterator[Service]:
    tiers = f"host={512 * FRAME_BYTES}"
    with spawn_service(tmp_path, checkpoint, router=False, tiers=tiers, pages=64, max_rows=4) as service:
        yield service


async def test_both_workers_of_a_pair_restore_what_they_lost(service: Service, reference: Reference) -> None:
    prompt = text(20, seed=1)
    expected = reference.generate(prompt, OUTPUTS)
    async with connected(service) as pair:
        cold = await pair.ask(prompt, GREEDY)
        assert [token.token_id for token in cold] == expected
        for seed in range(100, 104):
            await pair.ask(text(40, seed), GREEDY)
        started, reserved = await pair.begin(prompt, GREEDY)
        assert (await reserved.ticket).first_missing_token == 20 * PAGE_TOKENS, "decode has it"
        first = await started.first()
        assert [first.token_id, *await reserved.end()] == expected

        whole = [*prompt, *expected, 9]
        local = await pair.decode.submit(Mode.RESERVE, whole, sampling=GREEDY, local_below_tokens=64)
        assert (await local.ticket).local
        assert await local.end() == reference.generate(whole, OUTPUTS)
    for worker in service.workers:
        await no_page_is_held(worker)


async def test_prefill_computes_only_what_its_tiers_lack(service: Service, reference: Reference) -> None:
    prompt = text(20, seed=3)
    async with connected(service) as pair:
        await pair.ask(prompt, GREEDY)
        for seed in range(100, 104):
            await pair.ask(text(40, seed), GREEDY)
        longer = [*prompt[: 19 * PAGE_TOKENS], *text(2, seed=4)]
        started, reserved = await pair.begin(longer, GREEDY)
        first = await started.first()
        assert first.cached_tokens == 19 * PAGE_TOKENS
        assert [first.token_id, *await reserved.end()] == reference.generate(longer, OUTPUTS)
