"""Storage tiers of the KV cache. The door is `TierStack`, made by `open_tiers` or from tiers of one's own."""

from __future__ import annotations

from pathlib import Path

from baton_common.clock import Clock
from baton_kvtransfer.blocks import Blocks
from baton_kvtransfer.tiers.config import TierConfig
from baton_kvtransfer.tiers.file import FileTier
from baton_kvtransfer.tiers.frames import FrameFormat, Namespace
from baton_kvtransfer.tiers.ladder import TierState
from baton_kvtransfer.tiers.metrics import TierMetrics
from baton_kvtransfer.tiers.mooncake import MooncakeTier
from baton_kvtransfer.tiers.pins import SessionId
from baton_kvtransfer.tiers.pool import HostTooSmall
from baton_kvtransfer.tiers.stack import TierStack
from baton_kvtransfer.tiers.ticket import Copy, Progress, Ticket
from baton_kvtransfer.tiers.tier import Tier, TierFault
from baton_kvtransfer.wires.choice import has_rdma

__all__ = [
    "Copy",
    "HostTooSmall",
    "Namespace",
    "Progress",
    "SessionId",
    "Ticket",
    "Tier",
    "TierConfig",
    "TierFault",
    "TierMetrics",
    "TierStack",
    "TierState",
    "open_tiers",
]


def open_tiers(
    config: TierConfig, *, namespace: Namespace, blocks: Blocks, host: str, clock: Clock, metrics: TierMetrics
) -> TierStack | None:
    """The tiers that the configuration names; None = none. `host`: where other machines reach this one.

    Raises HostTooSmall, and WireError when a library that is asked for is missing.
    """
    if not config.host_bytes:
        if config.folder or config.mooncake_master:
            raise ValueError("a tier is set, but no host memory that it could use; set host_bytes")
        return None
    tiers: list[Tier] = []
    if config.folder:
        tiers.append(FileTier(Path(config.folder), quota_bytes=config.folder_bytes, metrics=metrics))
    if config.mooncake_master:
        tiers.append(
            MooncakeTier(
                config.mooncake_master,
                host=host,
                protocol="rdma" if has_rdma() else "tcp",
                segment_bytes=config.mooncake_segment_bytes,
                frame_bytes=FrameFormat(namespace).frame_bytes,
            )
        )
    return TierStack(tiers, namespace=namespace, blocks=blocks, config=config, clock=clock, metrics=metrics)
