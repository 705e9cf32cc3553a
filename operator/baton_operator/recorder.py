"""Kubernetes Events about a service: few, and each thing once.

The same (type, reason, message) about a service is written again only after `_REPEAT_S`; a service that changes its
mind all the time gets at most `_BURST` events, refilled one per `_REFILL_S`. Events are a courtesy: one that cannot be
written is logged and forgotten.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Literal

from baton_common.clock import Clock
from baton_common.errors import BatonError
from baton_common.kube.client import KubeClient
from baton_common.kube.objects import Object, digest, text
from baton_operator.kinds import EVENT, INFERENCE_SERVICE
from baton_operator.plan.labels import MANAGER, PREFIX
from baton_operator.plan.names import label_value

log = logging.getLogger("baton.operator.events")

_REPEAT_S = 600.0
_BURST = 15
_REFILL_S = 20.0
_NOTE_LIMIT = 1024  # of the API

EventType = Literal["Normal", "Warning"]


class EventRecorder:
    """One per process."""

    def __init__(self, client: KubeClient, *, identity: str, clock: Clock, wall: Callable[[], datetime]) -> None:
        self._client = client
        self._identity = identity
        self._clock = clock
        self._wall = wall
        self._said: dict[str, dict[str, float]] = {}  # by uid: digest of an event -> when
        self._tokens: dict[str, tuple[float, float]] = {}  # by uid: tokens, when counted

    async def tell(self, service: Object, kind: EventType, reason: str, message: str) -> None:
        """Write one Event about `service`, unless it was said lately."""
        uid, now_s = text(service, "metadata", "uid"), self._clock.now()
        said = self._said.setdefault(uid, {})
        key = digest([kind, reason, message])
        if now_s - said.get(key, -_REPEAT_S) < _REPEAT_S or not self._take(uid, now_s):
            return
        for old in [old for old, at_s in said.items() if now_s - at_s >= _REPEAT_S]:
            del said[old]
        said[key] = now_s
        log.info("%s: %s", reason, message, extra={"service": text(service, "metadata", "name"), "type": kind})
        try:
            await self._client.create(
                EVENT, text(service, "metadata", "namespace"), self._event(service, kind, reason, message)
            )
        except BatonError as error:
            log.warning("event %s not written: %s", reason, error)

    def forget(self, uid: str) -> None:
        """The service is gone."""
        self._said.pop(uid, None)
        self._tokens.pop(uid, None)

    def _take(self, uid: str, now_s: float) -> bool:
        tokens, counted_s = self._tokens.get(uid, (float(_BURST), now_s))
        tokens = min(float(_BURST), tokens + (now_s - counted_s) / _REFILL_S)
        enough = tokens >= 1.0
        self._tokens[uid] = (tokens - 1.0 if enough else tokens, now_s)
        return enough

    def _event(self, service: Object, kind: EventType, reason: str, message: str) -> Object:
        now = self._wall().astimezone(UTC)
        name, namespace = text(service, "metadata", "name"), text(service, "metadata", "namespace")
        stamp = f"{int(now.timestamp() * 1_000_000):x}"
        return {
            "apiVersion": EVENT.api_version,
            "kind": EVENT.kind,
            "metadata": {"name": f"{label_value(name)}.{stamp}", "namespace": namespace},
            "eventTime": now.strftime("%Y-%m-%dT%H:%M:%S.%fZ"),
            "reportingController": f"{PREFIX}/{MANAGER}",
            "reportingInstance": self._identity[:128],
            "action": "Reconcile",
            "reason": reason[:128],
            "note": message[:_NOTE_LIMIT],
            "type": kind,
            "regarding": {
                "apiVersion": INFERENCE_SERVICE.api_version,
                "kind": INFERENCE_SERVICE.kind,
                "name": name,
                "namespace": namespace,
                "uid": text(service, "metadata", "uid"),
                "resourceVersion": text(service, "metadata", "resourceVersion"),
            },
        }
