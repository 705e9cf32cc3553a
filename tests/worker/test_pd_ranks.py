"""Several ranks on each side, each a real process with the KV heads that are its own: tokens as from one worker alone.

The KV is that of real engines, which compute on whole models; the ranks carry it (see support/pd_ranks.py). Every rank
chooses its own pages. At the end of each test all of them are free, and none was written after it was freed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from random import Random

import pytest
from support.checkpoints import tiny_checkpoint
from support.engine_world import engine_world, make_request, tiny_model
from support.kv_wires import over
from support.kv_world import eventually
from support.pd_ranks import LIMIT_S, Flight, Ranks, Shape, running

from baton_common.errors import ErrorKind
from baton_engine.models.loader import LoadedModel
from baton_kvtransfer import AxisOrder
from baton_kvtransfer.routes import Route

pytestmark = [pytest.mark.process, pytest.mark.timeout(300)]

OUTPUTS = 32
Rank = tuple[str, int]
"""(side, number)"""


def made_up(seed: int, count: int) -> list[int]:
    random = Random(seed)
    return [random.randrange(3, 320) for _ in range(count)]


FIRST = [made_up(1, 150), made_up(2, 97), made_up(3, 3)]
THEN = [FIRST[0][:131] + made_up(4, 50), FIRST[1] + made_up(5, 20)]  # decode has pages of these from before


@dataclass(frozen=True, kw_only=True)
class Known:
    """A model, once for each engine, and what one engine alone answers to each prompt."""

    models: tuple[LoadedModel, LoadedModel]
    answers: dict[tuple[int, ...], list[int]]

    def check(self, flights: Sequence[Flight], answers: Sequence[list[int]]) -> None:
        for flight, answer in zip(flights, answers, strict=True):
            assert answer == self.answers[tuple(flight.reserve.tokens[: flight.reserve.prompt_tokens])]


@pytest.fixture(scope="module")
def known(tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], Known]:
    """By number of KV heads."""

    @cache
    def make(heads: int) -> Known:
        folder = tiny_checkpoint(
            "qwen3", tmp_path_factory.mktemp("model"), num_key_value_heads=heads, num_attention_heads=max(4, heads)
        )
        models = tiny_model(folder), tiny_model(folder)
        prompts = [*FIRST, *THEN]
        with engine_world(models[0]) as alone:
            answers = alone.run(make_request(prompt, max_tokens=OUTPUTS) for prompt in prompts)
        assert len(set(map(tuple, answers))) == len(prompts), "a model that minds its prompt"
        return Known(models=models, answers=dict(zip(map(tuple, prompts), answers, strict=True)))

    return make


def hand_over(ranks: Ranks, known: Known, prompts: Sequence[list[int]]) -> list[Flight]:
    """All at once."""
    flights = [ranks.begin(prompt, max_tokens=OUTPUTS) for prompt in prompts]
    known.check(flights, [ranks.finish(flight) for flight in flights])
    return flights


def check_receipts(ranks: Ranks, flight: Flight, wire: str) -> None:
    """Each cell of each target rank came once, over the wire that was asked for."""
    sent, received = ranks.outcomes(flight)
    layout = ranks.decode.engine.pool.layout
    cell = layout.layers * layout.kv * layout.dim * 4 * (flight.tokens[1] - flight.tokens[0])
    assert [one["bytes"] for one in received] == [rank.layout.heads * cell for rank in ranks.target.ranks]
    assert sum(one["bytes"] for one in sent) == sum(one["bytes"] for one in received)
    assert sum(one["routes"] for one in received) == len(flight.found)
    assert {tuple(one["wires"]) for one in [*sent, *received]} == {(wire,)}


@pytest.mark.parametrize(
    ("heads", "prefill", "decode", "wire"),
    [
        *[
            pytest.param(4, source, target, ("shm", "tcp")[number % 2], id=f"tp{source}-tp{target}")
            for number, (source, target) in enumerate((p, d) for p in (1, 2, 4) for d in (1, 2, 4))
        ],
        pytest.param(6, 3, 2, "shm", id="tp3-tp2"),
        pytest.param(2, 4, 1, "tcp", id="replicas-tp1"),
        pytest.param(2, 1, 4, "shm", id="tp1-replicas"),
        pytest.param(2, 4, 4, "tcp", id="replicas-replicas"),
        pytest.param(1, 4, 2, "shm", id="latent-tp4-tp2"),
        pytest.param(1, 2, 4, "tcp", id="latent-tp2-tp4"),
    ],
)
def test_ranks_change_no_token(
    known: Callable[[int], Known], tmp_path: Path, heads: int, prefill: int, decode: int, wire: str
) -> None:
    """One head, which every rank has whole, goes as a latent cache does: each source rank sends some positions."""
    told = known(heads)
    source, target = Shape(ranks=prefill, heads=heads), Shape(ranks=decode, heads=heads)
    with running(told.models, tmp_path, wire=wire, prefill=source, decode=target, latent=heads == 1) as ranks:
        flights = hand_over(ranks, told, FIRST)
        assert {flight.tokens[0] for flight in flights} == {0}
        again = hand_over(ranks, told, THEN)
        assert [flight.tokens[0] for flight in again] == [128, 96], "what decode has is not sent"
        for flight in (*flights, *again):
            check_receipts(ranks, flight, wire)
        ranks.settle(again[-1])


@pytest.mark.parametrize("wire", over("nixl"))
def test_ranks_over_nixl(known: Callable[[int], Known], tmp_path: Path, wire: str) -> None:
    told = known(4)
    source, target = Shape(ranks=2, heads=4), Shape(ranks=4, heads=4)
    with running(told.models, tmp_path, wire=wire, prefill=source, decode=target, latent=False) as ranks:
        for flight in hand_over(ranks, told, FIRST):
            check_receipts(ranks, flight, wire)


@pytest.mark.parametrize(("prefill", "decode"), [(16, 64), (64, 16)])
def test_ranks_with_pages_and_axes_of_their_own(
    known: Callable[[int], Known], tmp_path: Path, prefill: int, decode: int
) -> None:
    told = known(4)
    source = Shape(ranks=4, heads=4, page_tokens=prefill, order=AxisOrder.LAYER_PAGE_KV_TOKEN_HEAD_DIM)
    target = Shape(ranks=2, heads=4, page_tokens=decode)
    with running(told.models, tmp_path, wire="tcp", prefill=source, decode=target, latent=False) as ranks:
        hand_over(ranks, told, FIRST)
        for flight in hand_over(ranks, told, THEN):
            check_receipts(ranks, flight, "tcp")
            common = 131 if flight.prefill.tokens[:131] == FIRST[0][:131] else 97
            assert flight.tokens[0] == common // decode * decode


# ---- a rank dies ----------------------------------------------------------------------------------------------------
def reached(found: Sequence[Route], victim: Rank) -> set[Rank]:
    """Ranks that share a route with it, or with one of those, and so on."""
    pairs = [{("p", route.source), ("d", route.target)} for route in found]
    hit, before = {victim}, 0
    while before != len(hit):
        before = len(hit)
        hit = hit.union(*(pair for pair in pairs if pair & hit))
    return hit - {victim}


@pytest.mark.parametrize(
    ("heads", "prefill", "decode", "victim", "wire"),
    [
        pytest.param(6, 3, 2, ("p", 1), "tcp", id="sender-of-all"),
        pytest.param(1, 4, 2, ("p", 3), "shm", id="sender-of-a-latent-part"),
        pytest.param(4, 2, 4, ("p", 0), "shm", id="sender-of-some"),
        pytest.param(4, 4, 2, ("d", 1), "tcp", id="receiver"),
    ],
)
def test_a_rank_that_is_killed_ends_the_handoff_of_all(
    known: Callable[[int], Known], tmp_path: Path, heads: int, prefill: int, decode: int, victim: Rank, wire: str
) -> None:
    """In the middle: KV of one layer is on its way to every rank. Who shares no route with the dead one is told by the
    owner of the handoff."""
    told = known(heads)
    source, target = Shape(ranks=prefill, heads=heads), Shape(ranks=decode, heads=heads)
    with running(told.models, tmp_path, wire=wire, prefill=source, decode=target, latent=heads == 1) as ranks:
        everybody = {
            (side.name, number): rank for side in (ranks.source, ranks.target) for number, rank in enumerate(side.ranks)
        }
        flight = ranks.begin(FIRST[0], layers=1, max_tokens=OUTPUTS)
        ranks.prefill.role.wait(lambda: "on_prefill_done" in ranks.prefill.role.names(flight.prefill.request_id))
        eventually(
            lambda: sum(look["receiving"] for look in ranks.target.look(flight.name)) == len(flight.found),
            "KV of every route arrives",
            LIMIT_S,
        )
        everybody.pop(victim).kill()
        hit = reached(flight.found, victim)
        direct = {rank for route in flight.found for rank in reached([route], victim)}
        for name in hit:  # who shares a route with it may hear of the abort of another one before
            error = everybody[name].over(flight.name)["error"]
            assert error == "Aborted" or (error == "PeerGone" and name in direct), (name, error)
        for rank in everybody.values():
            assert rank.ask(do="abort", handoff=flight.name) == {"aborted": flight.name}
        ranks.settle(flight)
        ranks.fail(flight)
        for world, request in ((ranks.prefill, flight.prefill), (ranks.decode, flight.reserve)):
            assert world.role.ended[request.request_id].kind is ErrorKind.TRANSFER

        {"p": ranks.source, "d": ranks.target}[victim[0]].restart(victim[1], life=2)
        for following in hand_over(ranks, told, FIRST):
            check_receipts(ranks, following, wire)
        ranks.settle(following)
