"""Moving KV pages between workers. The door is `KvEndpoint`; see README.md."""

from baton_kvtransfer.config import TransferConfig
from baton_kvtransfer.endpoint import KvEndpoint, Transfer
from baton_kvtransfer.layout import AxisOrder, PageLayout
from baton_kvtransfer.leaving import leave
from baton_kvtransfer.metrics import TransferMetrics
from baton_kvtransfer.records import (
    Fence,
    FirstToken,
    Inbound,
    InboundEvents,
    Outbound,
    PeerInfo,
    Pull,
    PullOrder,
    Receipt,
)

__all__ = [
    "AxisOrder",
    "Fence",
    "FirstToken",
    "Inbound",
    "InboundEvents",
    "KvEndpoint",
    "Outbound",
    "PageLayout",
    "PeerInfo",
    "Pull",
    "PullOrder",
    "Receipt",
    "Transfer",
    "TransferConfig",
    "TransferMetrics",
    "leave",
]
