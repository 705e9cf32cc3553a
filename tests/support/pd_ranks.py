"""A prefill and a decode engine whose KV crosses between rank processes, as tensor parallelism would have it.

The engines compute on whole models. What the prefill engine writes is written into the pools of its ranks, each its
heads, layer by layer; what the ranks of the decode side received is joined in the pool of the decode engine. So between
the engines KV goes nowhere but through the ranks.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from random import Random
from typing import Any

import torch
from support.engine_world import RecordingRole, World, engine_world, make_request
from support.kv_processes import Process
from support.kv_world import CANARY, eventually
from support.rank_process import mapped, serve

from baton_common.errors import BatonError, ErrorKind
from baton_common.ids import PageId, TransferId
from baton_engine.models.loader import LoadedModel
from baton_engine.request import Mode, Request
from baton_engine.role import TokenOut
from baton_engine.step import StepPlan
from baton_kvtransfer import AxisOrder, PageLayout
from baton_kvtransfer.routes import Route, Span, heads_of, routes
from baton_proto.common_pb2 import Compat

LIMIT_S = 60.0
"""Only bounds a failing test."""
PAGES = 48
Look = dict[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """Of one side. `heads`: KV heads of the model."""

    ranks: int
    heads: int
    page_tokens: int = 16
    order: AxisOrder = AxisOrder.PAGE_LAYER_KV_HEAD_TOKEN_DIM

    def span(self, rank: int) -> Span:
        return heads_of(rank, self.ranks, self.heads)


class RankProcess(Process):
    """One rank, its pool, and the sequences in it. `tell` may come from any thread, the rest from one."""

    def __init__(
        self, name: str, incarnation: str, wire: str, *, layout: PageLayout, compat: Compat, folder: Path
    ) -> None:
        self.layout = layout
        path = folder / f"{incarnation}.pool"
        self.pool = mapped(path, layout, PAGES)
        self.pool.fill_(CANARY)
        self.free = [PageId(page) for page in range(PAGES)]
        self.tables: dict[str, torch.Tensor] = {}
        self._random = Random(incarnation)
        self._speaking = threading.Lock()
        self._over: dict[str, Look] = {}
        self.killed = False
        super().__init__(name, incarnation, wire, layout, compat.SerializeToString(), str(path), PAGES, target=serve)

    def tell(self, **order: object) -> None:
        with self._speaking:
            super().tell(**order)

    def kill(self) -> None:
        self.killed = True
        self.signal(signal.SIGKILL)

    def ask(self, **order: object) -> Look:
        self.tell(**order)
        return self._next()

    def over(self, handoff: str) -> Look:
        """How its part of the handoff ended; waits for it."""
        while handoff not in self._over:
            assert not self._next(of=handoff)
        return self._over[handoff]

    def _next(self, of: str = "") -> Look:
        """The answer to an order; {} when handoff `of` is over before."""
        while True:
            heard = self.hear()
            if "over" not in heard:
                return heard
            name = str(heard["over"])
            assert name not in self._over, "a handoff ends once"
            self._over[name] = heard
            if name == of:
                return {}

    def lease(self, handoff: str, tokens: int) -> list[PageId]:
        self._random.shuffle(self.free)
        count = -(-tokens // self.layout.page_tokens)
        taken, self.free = self.free[:count], self.free[count:]
        assert len(taken) == count, "pages were not given back"
        self.tables[handoff] = torch.tensor(taken)
        return taken

    def give_back(self, handoff: str) -> None:
        pages = self.tables.pop(handoff).tolist()
        self.pool[pages] = CANARY
        self.free += pages

    def cells(self, handoff: str, layers: Span, tokens: Span) -> tuple[Any, ...]:
        """Index into the pool: [token, layer, kv, head, dim]."""
        return places(self.tables[handoff], self.layout.page_tokens, layers, tokens)


def places(table: torch.Tensor, page_tokens: int, layers: Span, tokens: Span) -> tuple[Any, ...]:
    at = torch.arange(*tokens)
    everything = slice(None)
    return table[at // page_tokens], slice(*layers), everything, everything, at % page_tokens


class Side:
    """All ranks of one side."""

    def __init__(self, name: str, shape: Shape, model: LoadedModel, wire: str, folder: Path) -> None:
        self.name, self.shape = name, shape
        self._whole = replace(model.spec.layout(shape.page_tokens, "float32"), order=shape.order)
        self._compat = Compat(
            protocol_version=1, model_digest=model.digest, compute_dtype=model.dtype, kv_dtype=self._whole.dtype,
            page_tokens=shape.page_tokens, layers=self._whole.layers, kv_heads=shape.heads, head_dim=self._whole.dim,
            layout=shape.order.label, rope=model.spec.rope_text(), tp_size=shape.ranks,
        )  # fmt: skip
        self._wire, self._folder = wire, folder
        self.ranks: list[RankProcess] = []
        for rank in range(shape.ranks):
            self.ranks.append(self._start(rank, 1))

    def _start(self, rank: int, life: int) -> RankProcess:
        begin, end = self.shape.span(rank)
        name = f"{self.name}{rank}"
        layout = replace(self._whole, heads=end - begin)
        return RankProcess(name, f"{name}-{life}", self._wire, layout=layout, compat=self._compat, folder=self._folder)

    def restart(self, rank: int, life: int) -> None:
        """Under the same name."""
        self.ranks[rank].end()
        self.ranks[rank] = self._start(rank, life)

    def begin(
        self, do: str, handoff: TransferId, found: Sequence[Route], tokens: int, peers: Sequence[Process]
    ) -> None:
        """Tell each rank its routes; the pages are its own choice. `peers`: by rank of the other side."""
        for index, rank in enumerate(self.ranks):
            pages = rank.lease(handoff, tokens)
            mine = [route for route in found if (route.source if do == "open" else route.target) == index]
            orders = [
                {
                    "id": route.transfer_id(handoff),
                    "heads": route.source_heads if do == "open" else route.target_heads,
                    "tokens": (route.first_token, route.end_token),
                    "address": peers[route.target].address if do == "open" else "",
                    "incarnation": peers[route.target].incarnation if do == "open" else "",
                }
                for route in mine
            ]
            assert rank.ask(do=do, handoff=handoff, pages=pages, routes=orders) == {"took": handoff}

    def write(self, handoff: str, layers: Span, tokens: Span, values: torch.Tensor) -> None:
        """values [token, layer, kv, head, dim] of the whole model: each rank keeps its heads."""
        for index, rank in enumerate(self.ranks):
            rank.pool[rank.cells(handoff, layers, tokens)] = values[:, :, :, slice(*self.shape.span(index))]

    def read(self, handoff: str, tokens: Span) -> torch.Tensor:
        """[token, layer, kv, head, dim] of the whole model; replicas must have the same."""
        parts: dict[Span, torch.Tensor] = {}
        for index, rank in enumerate(self.ranks):
            held = rank.pool[rank.cells(handoff, (0, rank.layout.layers), tokens)]
            assert torch.equal(parts.setdefault(self.shape.span(index), held), held), "replicas differ"
        return torch.cat([parts[span] for span in sorted(parts)], dim=3)

    def tell(self, **order: object) -> None:
        for rank in self.ranks:
            rank.tell(**order)

    def look(self, handoff: str) -> list[Look]:
        """What each living rank has open."""
        return [rank.ask(do="look", handoff=handoff) for rank in self.ranks if not rank.killed]

    def give_back(self, handoff: str) -> None:
        for rank in self.ranks:
            rank.give_back(handoff)

    def check_pages(self) -> None:
        """Every page is free, and nothing wrote into one after it was."""
        for rank in self.ranks:
            assert sorted(rank.free) == list(range(PAGES))
            assert bool((rank.pool == CANARY).all()), "a freed page, or one of nobody, was written"


@dataclass(slots=True, kw_only=True)
class Flight:
    """One request on its way."""

    name: TransferId  # of the handoff
    reserve: Request
    prefill: Request
    found: list[Route]
    target_pages: Sequence[PageId]
    tokens: Span  # that are handed over
    source_pages: Sequence[PageId] = ()
    first: TokenOut | None = None
    layers: int  # that the source ranks are told of; fewer than all = the handoff stops in the middle


class Prefilling(RecordingRole):
    """Passes on to the ranks what the engine writes."""

    def __init__(self, side: Side) -> None:
        super().__init__()
        self.world: World
        self.side = side
        self.flights: dict[str, Flight] = {}

    def on_prefill_admitted(self, request: Request, pages: Sequence[PageId], computed_tokens: int) -> None:
        flight = self.flights[request.request_id]
        flight.source_pages = pages
        self._written(flight, (0, self.world.engine.pool.layout.layers), (0, computed_tokens))
        super().on_prefill_admitted(request, pages, computed_tokens)

    def on_layers(self, plan: StepPlan, layer_begin: int, layer_end: int) -> None:
        for work in plan.work:
            if work.request_id in self.flights:
                flight = self.flights[work.request_id]
                self._written(flight, (layer_begin, layer_end), (work.start, work.start + work.count))

    def on_prefill_done(self, request: Request, first: TokenOut) -> None:
        flight = self.flights[request.request_id]
        flight.first = first
        if flight.layers == self.world.engine.pool.layout.layers:
            self.side.tell(do="finish", handoff=flight.name, token=first.token_id)
        super().on_prefill_done(request, first)

    def _written(self, flight: Flight, layers: Span, tokens: Span) -> None:
        span = max(tokens[0], flight.tokens[0]), tokens[1]
        layers = layers[0], min(layers[1], flight.layers)
        if span[0] >= span[1] or layers[0] >= layers[1]:
            return
        pool = self.world.engine.pool
        cells = places(torch.tensor(flight.source_pages), pool.layout.page_tokens, layers, span)
        self.side.write(flight.name, layers, span, pool.tensor[cells])
        self.side.tell(do="ready", handoff=flight.name, layers=layers, tokens=span)


class Decoding(RecordingRole):
    """Knows which pages wait for KV."""

    def __init__(self) -> None:
        super().__init__()
        self.wanted: dict[str, tuple[Sequence[PageId], int]] = {}

    def on_reserved(self, request: Request, pages: Sequence[PageId], first_missing_token: int) -> None:
        self.wanted[request.request_id] = tuple(pages), first_missing_token
        super().on_reserved(request, pages, first_missing_token)


@dataclass(kw_only=True)
class Ranks:
    """Both engines and both sides."""

    prefill: World
    decode: World
    source: Side
    target: Side
    latent: bool
    numbers: int = 0

    def begin(self, prompt: Sequence[int], *, layers: int | None = None, **options: Any) -> Flight:
        """Reserve, let all ranks know, then prefill. `layers`: only so many are announced to the ranks."""
        reserve = make_request(prompt, mode=Mode.RESERVE, **options)
        self.decode.submit(reserve)
        known: Decoding = self.decode.role
        known.wait(lambda: reserve.request_id in known.wanted, LIMIT_S)
        pages, first = known.wanted[reserve.request_id]
        self.numbers += 1
        end = len(prompt)
        found = routes(
            heads=self.source.shape.heads, source_ranks=self.source.shape.ranks, target_ranks=self.target.shape.ranks,
            latent=self.latent, number=self.numbers, first_token=0, end_token=end, cached_tokens=first,
        )  # fmt: skip
        prefill = make_request(
            prompt, mode=Mode.PREFILL, request_id=reserve.request_id, send_from_token=first, **options
        )
        flight = Flight(
            name=TransferId(f"h-{self.numbers}"), reserve=reserve, prefill=prefill, found=found, target_pages=pages,
            tokens=(first, end), layers=layers or self.prefill.engine.pool.layout.layers,
        )  # fmt: skip
        self.target.begin("expect", flight.name, found, end, self.source.ranks)
        self.source.begin("open", flight.name, found, end, self.target.ranks)
        self.prefill.role.flights[prefill.request_id] = flight
        self.prefill.submit(prefill)
        return flight

    def outcomes(self, flight: Flight) -> tuple[list[Look], list[Look]]:
        """Of the ranks that send something, and of all that receive; waits."""
        senders = sorted({route.source for route in flight.found})
        sent = [self.source.ranks[rank].over(flight.name) for rank in senders]
        return sent, [rank.over(flight.name) for rank in self.target.ranks]

    def finish(self, flight: Flight) -> list[int]:
        """Wait until every rank has its part, join the parts, decode from them; all tokens."""
        _, received = self.outcomes(flight)
        first = flight.first
        assert first is not None, "the ranks are told after it"
        assert [one["first"] for one in received] == [[first.token_id]] * len(received), received
        joined = self.target.read(flight.name, flight.tokens)
        pool = self.decode.engine.pool
        layout, table = pool.layout, torch.tensor(flight.target_pages)
        pool.tensor[places(table, layout.page_tokens, (0, layout.layers), flight.tokens)] = joined
        self.decode.engine.kv_received(flight.reserve.request_id, first.token_id, None)
        self.prefill.engine.handoff_done(flight.prefill.request_id)
        self.prefill.wait(flight.prefill)
        self.decode.wait(flight.reserve)
        self.give_back(flight)
        assert self.prefill.role.ended[flight.prefill.request_id] is None
        assert self.decode.role.ended[flight.reserve.request_id] is None
        return self.prefill.output(flight.prefill) + self.decode.output(flight.reserve)

    def fail(self, flight: Flight) -> None:
        error = BatonError("a rank failed", kind=ErrorKind.TRANSFER)
        self.decode.engine.kv_failed(flight.reserve.request_id, error)
        self.prefill.engine.handoff_failed(flight.prefill.request_id, error)
        self.prefill.wait(flight.prefill)
        self.decode.wait(flight.reserve)
        self.give_back(flight)

    def give_back(self, flight: Flight) -> None:
        self.source.give_back(flight.name)
        self.target.give_back(flight.name)

    def settle(self, flight: Flight) -> None:
        """Nothing is in flight, expected, or copied any more at living ranks, and every slot is a credit in hand."""
        quiet = {"in_flight": 0, "expected": 0, "slots_away": 0, "fence": True}

        def settled() -> bool:
            found = self.source.look(flight.name) + self.target.look(flight.name)
            return all(quiet.items() <= look.items() for look in found)

        eventually(settled, "every rank is quiet", LIMIT_S)


@contextmanager
def running(
    models: tuple[LoadedModel, LoadedModel], folder: Path, *, wire: str, prefill: Shape, decode: Shape, latent: bool
) -> Iterator[Ranks]:
    with ExitStack() as stack:
        sides = []
        for name, shape, model in (("p", prefill, models[0]), ("d", decode, models[1])):
            side = Side(name, shape, model, wire, folder)
            stack.callback(lambda of: [rank.end() for rank in of.ranks], side)
            sides.append(side)
        role = Prefilling(sides[0])
        role.world = stack.enter_context(
            engine_world(models[0], role, page_tokens=prefill.page_tokens, layer_group=1, step_tokens=41)
        )
        other = stack.enter_context(engine_world(models[1], Decoding(), page_tokens=decode.page_tokens))
        made = Ranks(prefill=role.world, decode=other, source=sides[0], target=sides[1], latent=latent)
        yield made
        for side in sides:
            side.check_pages()
