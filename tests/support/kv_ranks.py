"""KV endpoints of several ranks on each side, with pools of any layout, and handoffs between them.

All ranks of a side hold shares of one model's KV; `truth` is that of the whole model.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from random import Random

import torch
from prometheus_client import CollectorRegistry
from support.kv_world import LIMIT_S, MakeBlocks, setting

from baton_common.clock import SystemClock
from baton_common.errors import BatonError
from baton_common.ids import PageId, RequestId, TransferId
from baton_kvtransfer import (
    AxisOrder,
    FirstToken,
    Inbound,
    KvEndpoint,
    Outbound,
    PageLayout,
    Receipt,
    Transfer,
    TransferConfig,
    TransferMetrics,
)
from baton_kvtransfer.blocks import HostBlocks
from baton_kvtransfer.handoff import Handoff
from baton_kvtransfer.layout import SCALED
from baton_kvtransfer.records import Fence
from baton_kvtransfer.routes import Route, heads_of
from baton_kvtransfer.transport import SocketTransport
from baton_proto.common_pb2 import Compat

LAYERS, DIM, TOKENS = 3, 16, 100
CANARY = 9.0


def layout_of(
    *, heads: int = 4, kv: int = 2, page_tokens: int = 16, dtype: str = "float32",
    order: AxisOrder = AxisOrder.PAGE_LAYER_KV_HEAD_TOKEN_DIM,
) -> PageLayout:  # fmt: skip
    return PageLayout(layers=LAYERS, kv=kv, heads=heads, page_tokens=page_tokens, dim=DIM, dtype=dtype, order=order)


class Rank:
    """One rank: pool, endpoint, and the page table of the one sequence under test."""

    def __init__(
        self, name: str, layout: PageLayout, wire: str, seed: int = 0, blocks: MakeBlocks | None = None
    ) -> None:
        self.name, self.layout = name, layout
        pages = -(-TOKENS // layout.page_tokens)
        count = pages + 3
        self.table = [PageId(page) for page in Random(seed).sample(range(count), pages)]
        dtype = getattr(torch, layout.dtype)
        flat = torch.full((layout.page_shape[0] * count * layout.page_bytes,), CANARY).to(dtype)
        self.pool = flat.as_strided(layout.shape(count), layout.strides(count))
        self.scales = torch.ones(self.pool.shape[:-1]) if layout.dtype in SCALED else None
        self.handoff: Handoff | None = None
        config = TransferConfig(wire=setting(wire), slot_bytes=4096, slots_per_peer=3)
        self.endpoint = KvEndpoint(
            worker_id=name,
            incarnation=f"{name}-1",
            compat=Compat(protocol_version=1, model_digest="m", kv_dtype=layout.dtype, page_tokens=layout.page_tokens),
            pool=self.pool,
            layout=layout,
            config=config,
            clock=SystemClock(),
            events=self,
            metrics=TransferMetrics(CollectorRegistry()),
            blocks=blocks(self.pool) if blocks else HostBlocks(self.pool, layout, scales=self.scales),
            transport=SocketTransport(config),
        )
        self.address = self.endpoint.start()

    def on_receiving(self, transfer_id: TransferId) -> None:
        pass

    def on_received(self, transfer_id: TransferId, first: FirstToken, receipt: Receipt) -> None:
        assert first.token_id == 17
        assert self.handoff is not None
        self.handoff.ended(transfer_id, receipt)

    def on_failed(self, transfer_id: TransferId, error: BatonError) -> None:
        assert self.handoff is not None
        self.handoff.ended(transfer_id, error)

    def cell(self, position: int) -> tuple[PageId, int]:
        return self.table[position // self.layout.page_tokens], position % self.layout.page_tokens

    def hold(self, truth: torch.Tensor) -> None:
        """truth float32 [position, layer, kv, head, dim], of this rank's heads."""
        for position, cells in enumerate(truth):
            page, token = self.cell(position)
            if self.scales is not None:
                scale = cells.abs().amax(-1) / 448
                self.scales[page, :, :, :, token] = scale
                cells = cells / scale.unsqueeze(-1)
            self.pool[page, :, :, :, token] = cells.to(self.pool.dtype)

    def holds(self, first: int = 0, end: int = TOKENS) -> torch.Tensor:
        """float32 [position, layer, kv, head, dim]"""
        found = []
        for position in range(first, end):
            page, token = self.cell(position)
            cells = self.pool[page, :, :, :, token].float()
            found.append(cells if self.scales is None else cells * self.scales[page, :, :, :, token].unsqueeze(-1))
        return torch.stack(found)


class Sides:
    """P ranks and D ranks. `heads`: of the model."""

    def __init__(
        self, wire: str, *, heads: int, source: PageLayout, target: PageLayout, source_ranks: int = 1,
        target_ranks: int = 1, source_blocks: MakeBlocks | None = None, target_blocks: MakeBlocks | None = None,
    ) -> None:  # fmt: skip
        """The layouts are of the whole model; each rank gets its share of the heads."""
        self.heads = heads
        self.sources = [
            Rank(f"p{rank}", _share(source, rank, source_ranks, heads), wire, seed=rank, blocks=source_blocks)
            for rank in range(source_ranks)
        ]
        self.targets = [
            Rank(f"d{rank}", _share(target, rank, target_ranks, heads), wire, seed=50 + rank, blocks=target_blocks)
            for rank in range(target_ranks)
        ]
        generator = torch.Generator().manual_seed(heads)
        self.truth = torch.randn(TOKENS, LAYERS, source.kv, heads, DIM, generator=generator)
        for rank, one in enumerate(self.sources):
            one.hold(self.truth[:, :, :, slice(*heads_of(rank, source_ranks, heads))])

    def start(self, found: Sequence[Route], name: str = "h-1") -> Sending:
        return Sending(self, found, TransferId(name))

    def close(self) -> None:
        for rank in (*self.sources, *self.targets):
            rank.endpoint.close()


class Sending:
    """One handoff under way: `outcomes` of the target ranks, and of the source ranks."""

    def __init__(self, sides: Sides, found: Sequence[Route], name: TransferId) -> None:
        self.received: dict[str, Sequence[Receipt] | BatonError] = {}
        self.sent: dict[TransferId, Receipt | BatonError] = {}
        self.transfers: dict[TransferId, Transfer] = {}
        self._changed = threading.Condition()
        self._routes, self._name = found, name
        due_s = time.monotonic() + 60
        for rank, target in enumerate(sides.targets):
            mine = [route for route in found if route.target == rank]
            names = [route.transfer_id(name) for route in mine]
            target.handoff = Handoff(names, target.endpoint.cancel, lambda end, who=target.name: self._end(who, end))
            for route in mine:
                target.endpoint.expect(
                    Inbound(
                        transfer_id=route.transfer_id(name),
                        request_id=RequestId("r"),
                        pages=target.table,
                        first_token=route.first_token,
                        end_token=route.end_token,
                        deadline_s=due_s,
                        heads=route.target_heads,
                    )
                )
        for route in found:
            source, target = sides.sources[route.source], sides.targets[route.target]
            transfer_id = route.transfer_id(name)
            self.transfers[transfer_id] = source.endpoint.open(
                Outbound(
                    transfer_id=transfer_id,
                    request_id=RequestId("r"),
                    peer_address=target.address,
                    peer_incarnation=f"{target.name}-1",
                    pages=source.table,
                    first_token=route.first_token,
                    end_token=route.end_token,
                    deadline_s=due_s,
                    heads=route.source_heads,
                    done=lambda outcome, of=transfer_id: self._over(of, outcome),
                )
            )

    def announce(self, route: Route, *, layers: int = LAYERS) -> None:
        self.transfers[route.transfer_id(self._name)].ready(0, layers, 0, TOKENS)

    def finish(self, route: Route) -> None:
        self.transfers[route.transfer_id(self._name)].finish(FirstToken(token_id=17, position=0))

    def run(self) -> None:
        """Announce and finish all routes, and wait for both sides."""
        for route in self._routes:
            self.announce(route)
            self.finish(route)
        self.wait(sent=len(self.transfers), received=len({route.target for route in self._routes}))

    def wait(self, *, sent: int, received: int) -> None:
        """Until so many transfers of the sources, and handoffs of the targets, are over."""
        with self._changed:
            assert self._changed.wait_for(lambda: (len(self.sent), len(self.received)) == (sent, received), LIMIT_S), (
                f"never over: {self.sent} {self.received}"
            )

    def abort(self, route: Route, error: BatonError) -> Fence:
        return self.transfers[route.transfer_id(self._name)].abort(error)

    def _end(self, who: str, outcome: Sequence[Receipt] | BatonError) -> None:
        with self._changed:
            assert who not in self.received, "a handoff ends once"
            self.received[who] = outcome
            self._changed.notify_all()

    def _over(self, transfer_id: TransferId, outcome: Receipt | BatonError) -> None:
        with self._changed:
            self.sent[transfer_id] = outcome
            self._changed.notify_all()


def _share(layout: PageLayout, rank: int, ranks: int, heads: int) -> PageLayout:
    begin, end = heads_of(rank, ranks, heads)
    return layout_of(
        heads=end - begin, kv=layout.kv, page_tokens=layout.page_tokens, dtype=layout.dtype, order=layout.order
    )
