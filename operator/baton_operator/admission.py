"""What `kubectl apply` of an InferenceService is told at once, beyond the CRD's rules.

Refused: what only a change of the service itself can heal. Warned of: what may still come. The words are those of the
reconciler's conditions (`prerequisites.py`). Never in the way: an unchanged spec, a service that is being deleted, an
API server that does not answer and a defect of ours all pass; the conditions tell the rest.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from dataclasses import dataclass

from prometheus_client import Counter

from baton_common.kube.client import KubeClient
from baton_common.kube.objects import Object, at, text
from baton_operator.prerequisites import ClusterFacts, Refused, missing, parsed, planned, served_kinds

log = logging.getLogger("baton.operator.admission")

_ANSWER_S = 3.0  # the API server waits 5 s, and then goes on without us


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """Refused with `denial`, or let in with `warnings`."""

    denial: str = ""
    warnings: tuple[str, ...] = ()

    @property
    def result(self) -> str:
        return "denied" if self.denial else "warned" if self.warnings else "passed"


class Admission:
    """Only reads, so every replica answers, leader or not."""

    def __init__(self, client: KubeClient, *, facts: Callable[[], ClusterFacts], reviews: Counter) -> None:
        self._client = client
        self._facts = facts
        self._reviews = reviews

    async def judge(self, new: Object, old: Object | None) -> Verdict:
        """`old`: what is stored, None for a new one. Never raises."""
        if text(new, "metadata", "deletionTimestamp") or (old is not None and at(new, "spec") == at(old, "spec")):
            return Verdict()
        extra = {"namespace": text(new, "metadata", "namespace"), "service": text(new, "metadata", "name")}
        try:
            async with asyncio.timeout(_ANSWER_S):
                verdict = await self._look(new)
        except Exception as error:  # whatever it is, it is not the user's fault
            log.warning("let in unseen: %s", error or "the API server does not answer", extra=extra, exc_info=error)
            self._reviews.labels("unseen").inc()
            return Verdict()
        if verdict.denial:
            log.info("refused: %s", verdict.denial, extra=extra)
        self._reviews.labels(verdict.result).inc()
        return verdict

    async def _look(self, new: Object) -> Verdict:
        facts = self._facts()
        try:
            plan = await planned(self._client, parsed(new), facts.platform)
        except Refused as refusal:
            if refusal.lasting:
                return Verdict(denial=f"{refusal.reason}: {refusal.message}")
            return Verdict(warnings=(refusal.message,))
        served = await served_kinds(self._client, plan, facts)
        found = await missing(self._client, plan, served)
        return Verdict(warnings=tuple(finding.message for _, finding in found))
