"""Conditions on pods: written when they differ, said once when they end, never in turn by two routers."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

import pytest
from router.conftest import House, eventually

from baton_common.clock import SystemClock
from baton_common.kube.client import KubeClient
from baton_common.kube.credentials import Credentials
from baton_common.kube.errors import error_for
from baton_common.kube.gates import REGISTERED_GATE, TRANSPORT_GATE
from baton_common.kube.kinds import Kind
from baton_proto import worker_pb2 as wire
from baton_router.fleet import Fleet
from baton_router.gates import GatePace, Gates, PodWriter
from baton_router.links import Link
from baton_router.metrics import RouterMetrics
from baton_router.probe import ProbeResult
from baton_router.proving import ProofPace, Prover

QUICK = GatePace(lost_grace_s=0.05, unmet_grace_s=0.3, resync_s=0.1, retry_min_s=0.02)
QUICK_PROOFS = ProofPace(retry_min_s=0.02, retry_max_s=0.05, nobody_grace_s=0.05)


@dataclass
class Pods:
    """The pods of a namespace; `writes` are the patches that came."""

    conditions: dict[str, dict[str, dict[str, str]]] = field(default_factory=dict)
    writes: list[tuple[str, str, str, str]] = field(default_factory=list)  # pod, gate, status, reason
    reads: int = 0
    refuse: int = 0
    terminating: set[str] = field(default_factory=set)

    def status(self, pod: str, gate: str = REGISTERED_GATE) -> str:
        return self.conditions.get(pod, {}).get(gate, {}).get("status", "")

    def said(self, gate: str = REGISTERED_GATE) -> list[tuple[str, str, str]]:
        """(pod, status, reason) of what was written about a gate."""
        return [(pod, status, reason) for pod, written, status, reason in self.writes if written == gate]

    def reason(self, pod: str, gate: str = TRANSPORT_GATE) -> str:
        return self.conditions.get(pod, {}).get(gate, {}).get("reason", "")


class PodClient(KubeClient):
    """The client on `Pods`, with strategic merge by type."""

    def __init__(self, pods: Pods) -> None:
        super().__init__(Credentials(server="http://fake", namespace="ns"), manager="router", clock=SystemClock())
        self._pods = pods

    async def _call(self, verb: str, method: str, kind: Kind, path: str, **more: Any) -> Any:
        await asyncio.sleep(0)
        name = path.removeprefix("/api/v1/namespaces/ns/pods/").removesuffix("/status")
        if self._pods.refuse:
            raise error_for(self._pods.refuse, "not now", "Because", 0.0)
        if name not in self._pods.conditions:
            raise error_for(404, "no such pod", "NotFound", 0.0)
        if verb == "get":
            self._pods.reads += 1
            going = {"deletionTimestamp": "2026-01-01T00:00:00Z"} if name in self._pods.terminating else {}
            conditions = [dict(item) for item in self._pods.conditions[name].values()]
            return {"metadata": {"name": name, "uid": f"uid-{name}", **going}, "status": {"conditions": conditions}}
        assert (verb, path[-7:], more["content"]) == ("patch", "/status", "application/strategic-merge-patch+json")
        assert more["body"]["metadata"] == {"uid": f"uid-{name}"}
        for item in more["body"]["status"]["conditions"]:
            self._pods.conditions[name][item["type"]] = item
            self._pods.writes.append((name, item["type"], item["status"], item["reason"]))
        return {}


async def proved(prefill: Link, decode: Link) -> ProbeResult:
    return ProbeResult(verdict="proved", message=f"KV crossed to {decode.pod}", seconds=0.003, bytes=4096)


@dataclass
class Seat:
    """One router's fleet with gates and prover."""

    fleet: Fleet
    metrics: RouterMetrics


@asynccontextmanager
async def seated(
    pods: Pods,
    assignment: dict[str, str],
    *,
    probe: Callable[[Link, Link], Awaitable[ProbeResult]] = proved,
    pace: GatePace = QUICK,
) -> AsyncIterator[Seat]:
    fleet, metrics = Fleet((), SystemClock()), RouterMetrics()
    fleet.start()
    fleet.assign(assignment)
    writer = PodWriter(PodClient(pods), "ns", lambda: datetime(2026, 1, 1, tzinfo=UTC))
    gates = Gates(fleet, writer, SystemClock(), lambda: 0.5, pace)
    prover = Prover(fleet, probe, gates.tell, metrics, lambda: 0.5, QUICK_PROOFS)
    running = [asyncio.create_task(part.run()) for part in (gates, prover)]
    try:
        yield Seat(fleet, metrics)
        assert not any(task.done() for task in running)
    finally:
        for task in running:
            task.cancel()
        await asyncio.gather(*running, return_exceptions=True)
        await fleet.stop()


async def passes(pods: Pods, count: int = 3) -> None:
    """So many more reads of pods: what would have been written has been."""
    least = pods.reads + count
    await eventually(lambda: pods.reads >= least, "resync")


async def test_a_registered_worker_is_told_once_and_then_only_read(house: House) -> None:
    worker = await house.add(wire.ROLE_DECODE, worker_id="d")
    pods = Pods({"d": {}})
    async with seated(pods, {worker.address: "d"}):
        await eventually(lambda: pods.status("d") == "True", "registered")
        await passes(pods)
    assert pods.said() == [("d", "True", "Registered")]
    assert pods.conditions["d"][REGISTERED_GATE]["lastTransitionTime"] == "2026-01-01T00:00:00Z"


async def test_a_router_that_starts_again_writes_nothing(house: House) -> None:
    prefill, decode = await house.pair()
    pods = Pods({prefill.worker_id: {}, decode.worker_id: {}})
    assignment = {worker.address: worker.worker_id for worker in (prefill, decode)}
    for _ in range(2):
        written = len(pods.writes)
        async with seated(pods, assignment) as seat:
            await eventually(lambda: pods.status(prefill.worker_id, TRANSPORT_GATE) == "True", "proved")
            await eventually(lambda: pods.status(decode.worker_id) == "True", "registered")
            await eventually(lambda metrics=seat.metrics: "probe_bytes_total 4096" in text_of(metrics), "probed")  # type: ignore[misc]
            await passes(pods, 6)
    assert len(pods.writes) == written


def text_of(metrics: RouterMetrics) -> str:
    return metrics.text().decode()


async def test_a_lost_worker_is_told_once_and_again_true_when_it_is_back(house: House) -> None:
    worker = await house.add(wire.ROLE_DECODE, worker_id="d")
    pods = Pods({"d": {}})
    async with seated(pods, {worker.address: "d"}) as seat:
        await eventually(lambda: pods.status("d") == "True", "registered")
        await worker.stop()
        await eventually(lambda: pods.status("d") == "False", "lost")
        assert pods.reason("d", REGISTERED_GATE) == "Lost"
        await asyncio.sleep(3 * QUICK.resync_s)
        assert len(pods.said()) == 2
        await worker.start()
        await eventually(lambda: pods.status("d") == "True", "registered again")
        assert seat.fleet.readiness().reasons


async def test_a_short_interruption_is_not_told(house: House) -> None:
    worker = await house.add(wire.ROLE_DECODE, worker_id="d")
    pods = Pods({"d": {}})
    patient = GatePace(lost_grace_s=30.0, resync_s=0.1)
    async with seated(pods, {worker.address: "d"}, pace=patient) as seat:
        await eventually(lambda: pods.status("d") == "True", "registered")
        worker.hang_up()
        await eventually(lambda: not seat.fleet.registered(), "the stream broke")
        await eventually(lambda: bool(seat.fleet.registered()), "and is back")
        await passes(pods)
    assert len(pods.said()) == 1


async def test_two_routers_that_disagree_do_not_write_in_turn(house: House) -> None:
    """One reaches the worker, the other does not: its False is said once, the True is asserted."""
    worker = await house.add(wire.ROLE_DECODE, worker_id="d")
    pods = Pods({"d": {}})
    async with seated(pods, {worker.address: "d"}):
        await eventually(lambda: pods.status("d") == "True", "registered")
        async with seated(pods, {"127.0.0.1:1": "d"}):
            contradiction = ("d", REGISTERED_GATE, "False", "Lost")
            await eventually(lambda: contradiction in pods.writes, "the other contradicts")
            await eventually(lambda: pods.status("d") == "True", "the first insists")
            await passes(pods, 6)
    assert [status for _, status, _ in pods.said()] == ["True", "False", "True"]


async def test_a_pod_that_was_never_met_says_nothing_it_did_not_say(house: House) -> None:
    pods = Pods({"slow": {}})
    async with seated(pods, {"127.0.0.1:1": "slow"}):
        await passes(pods, 1)
    assert pods.writes == []


async def test_pods_that_go_or_are_gone_are_left_alone(house: House) -> None:
    going = await house.add(wire.ROLE_DECODE, worker_id="going")
    gone = await house.add(wire.ROLE_DECODE, worker_id="gone")
    pods = Pods({"going": {}}, terminating={"going"})
    async with seated(pods, {going.address: "going", gone.address: "gone"}):
        await passes(pods)
    assert pods.writes == []


@pytest.mark.parametrize("status", [403, 409, 500])
async def test_a_refused_write_is_repeated_and_disturbs_nothing(house: House, status: int) -> None:
    worker = await house.add(wire.ROLE_COLOCATED, worker_id="w")
    pods = Pods({"w": {}}, refuse=status)
    async with seated(pods, {worker.address: "w"}) as seat:
        await eventually(lambda: seat.fleet.readiness().ready, "it serves")
        await worker.stop()
        await eventually(lambda: not seat.fleet.registered(), "lost")
        await worker.start()
        await eventually(lambda: bool(seat.fleet.registered()), "back")
        pods.refuse = 0
        await eventually(lambda: pods.status("w") == "True", "told in the end")


# ---- proof of the transport


async def test_without_a_decode_worker_prefill_says_so_and_is_proved_when_one_comes(house: House) -> None:
    prefill = await house.add(wire.ROLE_PREFILL, worker_id="p")
    pods = Pods({"p": {}, "d": {}})
    async with seated(pods, {prefill.address: "p"}) as seat:
        await eventually(lambda: pods.reason("p") == "NoDecodeWorker", "nobody yet")
        assert pods.status("p") == "True", "it is registered nevertheless"
        decode = await house.add(wire.ROLE_DECODE, worker_id="d")
        seat.fleet.assign({prefill.address: "p", decode.address: "d"})
        await eventually(lambda: pods.status("p", TRANSPORT_GATE) == "True", "proved")
    assert pods.conditions["p"][TRANSPORT_GATE]["message"] == "KV crossed to d"
    assert pods.conditions["d"][TRANSPORT_GATE]["message"] == "KV crossed to d"


async def test_a_decode_worker_waits_for_a_prefill_worker_that_fits(house: House) -> None:
    """Of a new revision: its pod does not become Ready, so the old pair stays."""
    prefill, decode = await house.pair()
    later = await house.add(wire.ROLE_DECODE, worker_id="later", model_digest="new")
    assignment = {worker.address: worker.worker_id for worker in (prefill, decode, later)}
    pods = Pods({**{pod: {} for pod in assignment.values()}, "fits": {}})
    async with seated(pods, assignment) as seat:
        await eventually(lambda: pods.status(decode.worker_id, TRANSPORT_GATE) == "True", "the old pair")
        await eventually(lambda: pods.reason("later") == "NoPrefillWorker", "nobody fits")
        assert "model_digest differs" in pods.conditions["later"][TRANSPORT_GATE]["message"]
        fits = await house.add(wire.ROLE_PREFILL, worker_id="fits", model_digest="new")
        seat.fleet.assign({**assignment, fits.address: "fits"})
        await eventually(lambda: pods.status("later", TRANSPORT_GATE) == "True", "the new pair")
    assert pods.status("fits", TRANSPORT_GATE) == "True"


async def test_without_any_prefill_worker_decode_has_nothing_to_prove(house: House) -> None:
    """The pool is scaled to nothing. As long as somebody listed has not said what he is, it may be a prefill worker."""
    decode = await house.add(wire.ROLE_DECODE, worker_id="d")
    pods = Pods({"d": {}, "starting": {}})
    async with seated(pods, {decode.address: "d", "127.0.0.1:1": "starting"}) as seat:
        await eventually(lambda: pods.reason("d") == "NoPrefillWorker", "somebody may come")
        seat.fleet.assign({decode.address: "d"})
        await eventually(lambda: pods.status("d", TRANSPORT_GATE) == "True", "nobody is listed")
    assert pods.reason("d") == "NotUsed"


async def test_two_that_want_the_same_proof_ask_for_it_once(house: House) -> None:
    prefill, decode = await house.pair()
    asked: list[str] = []

    async def probe(prefill: Link, decode: Link) -> ProbeResult:
        asked.append(prefill.pod)
        await asyncio.sleep(0.05)
        return await proved(prefill, decode)

    pods = Pods({prefill.worker_id: {}, decode.worker_id: {}})
    async with seated(pods, {worker.address: worker.worker_id for worker in (prefill, decode)}, probe=probe):
        for worker in (prefill, decode):
            await eventually(lambda name=worker.worker_id: pods.status(name, TRANSPORT_GATE) == "True", "proved")  # type: ignore[misc]
    assert asked == [prefill.worker_id]


async def test_a_decode_worker_that_does_not_fit_is_not_probed_and_the_field_is_named(house: House) -> None:
    prefill = await house.add(wire.ROLE_PREFILL, worker_id="p")
    decode = await house.add(wire.ROLE_DECODE, worker_id="d", model_digest="other")
    pods = Pods({"p": {}, "d": {}})
    async with seated(pods, {prefill.address: "p", decode.address: "d"}):
        await eventually(lambda: pods.reason("p") == "NoDecodeWorker", "nobody fits")
    assert "model_digest differs" in pods.conditions["p"][TRANSPORT_GATE]["message"]


async def test_a_failed_probe_is_told_with_its_error_and_repeated(house: House) -> None:
    prefill, decode = await house.pair()
    name, answers = prefill.worker_id, iter(["failed", "failed", "busy"])
    asked: list[str] = []

    async def probe(prefill: Link, decode: Link) -> ProbeResult:
        asked.append(decode.pod)
        verdict = next(answers, "proved")
        return ProbeResult(verdict=verdict, message=f"{verdict} {decode.pod}")  # type: ignore[arg-type]

    pods = Pods({name: {}, decode.worker_id: {}})
    assignment = {worker.address: worker.worker_id for worker in (prefill, decode)}
    async with seated(pods, assignment, probe=probe):
        await eventually(lambda: pods.status(name, TRANSPORT_GATE) == "True", "proved in the end")
    said = [(status, reason) for pod, gate, status, reason in pods.writes if gate == TRANSPORT_GATE]
    assert said[0] == ("False", "ProbeFailed")
    assert said[-1] == ("True", "Probed")
    assert len(asked) == 4


async def test_a_new_decode_worker_is_tried_at_once(house: House) -> None:
    prefill, broken = await house.pair()
    pods = Pods({prefill.worker_id: {}})

    async def probe(prefill: Link, decode: Link) -> ProbeResult:
        if decode.pod == broken.worker_id:
            return ProbeResult(verdict="failed", message=f"no route to {decode.pod}")
        return await proved(prefill, decode)

    assignment = {worker.address: worker.worker_id for worker in (prefill, broken)}
    async with seated(pods, assignment, probe=probe) as seat:
        await eventually(lambda: pods.reason(prefill.worker_id) == "ProbeFailed", "failed")
        assert f"no route to {broken.worker_id}" in pods.conditions[prefill.worker_id][TRANSPORT_GATE]["message"]
        good = await house.add(wire.ROLE_DECODE, worker_id="good")
        seat.fleet.assign({**assignment, good.address: "good"})
        await eventually(lambda: pods.status(prefill.worker_id, TRANSPORT_GATE) == "True", "proved")


async def test_another_process_in_the_pod_has_to_prove_it_again(house: House) -> None:
    prefill, decode = await house.pair()
    asked: list[str] = []

    async def probe(prefill: Link, decode: Link) -> ProbeResult:
        asked.append(prefill.key)
        return await proved(prefill, decode)

    pods = Pods({prefill.worker_id: {}, decode.worker_id: {}})
    async with seated(pods, {worker.address: worker.worker_id for worker in (prefill, decode)}, probe=probe):
        await eventually(lambda: len(asked) == 1, "proved")
        await prefill.stop()
        await prefill.start()
        await eventually(lambda: len(asked) == 2, "proved again")
    assert asked[0] != asked[1]


async def test_a_condition_that_is_true_is_contradicted_once_by_a_failing_probe(house: House) -> None:
    prefill, decode = await house.pair()
    count = 0

    async def probe(prefill: Link, decode: Link) -> ProbeResult:
        nonlocal count
        count += 1
        return ProbeResult(verdict="failed", message=f"try {count}")

    name = prefill.worker_id
    true = {"type": TRANSPORT_GATE, "status": "True", "reason": "Probed", "message": "before"}
    pods = Pods({name: {TRANSPORT_GATE: dict(true)}, decode.worker_id: {}})
    async with seated(pods, {worker.address: worker.worker_id for worker in (prefill, decode)}, probe=probe):
        await eventually(lambda: pods.reason(name) == "ProbeFailed", "contradicted")
        pods.conditions[name][TRANSPORT_GATE] = dict(true)  # another router insists
        tries = count
        await eventually(lambda: count > tries + 3, "tried again")
        await passes(pods, 4)
        assert pods.status(name, TRANSPORT_GATE) == "True"
