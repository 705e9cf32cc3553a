"""Conditions without which a worker's pod is not Ready. The operator plans them, the router sets them."""

from __future__ import annotations

REGISTERED_GATE = "serving.baton.dev/router-registered"
"""Every worker pod: a router holds its stream."""

TRANSPORT_GATE = "serving.baton.dev/kv-transport"
"""Prefill pods: KV went to a decode worker and was measured. The message has the figures, or the error."""
