"""Conditions without which a worker's pod is not Ready. The operator plans them, the router sets them."""

from __future__ import annotations

REGISTERED_GATE = "serving.baton.dev/router-registered"
"""Every worker pod: a router holds its stream."""

TRANSPORT_GATE = "serving.baton.dev/kv-transport"
"""Prefill and decode pods: KV crossed to or from a worker of the other role and was measured; the message has the
figures, or the error. So a new revision's decode pods wait for a prefill pod that fits them, and vice versa.
"""
