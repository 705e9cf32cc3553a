"""From EndpointSlices to links: which address is whose, and that nothing stale remains when pods come and go."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager

import pytest
from router.conftest import House, eventually
from router.fake_worker import FakeWorker

from baton_common.clock import SystemClock
from baton_common.kube.client import KubeClient
from baton_common.kube.credentials import Credentials
from baton_common.kube.objects import Json, Object
from baton_proto import worker_pb2 as wire
from baton_router.discovery import Discovery, pods_by_address
from baton_router.fleet import Fleet
from baton_router.links import LinkState

GRPC: Json = [{"name": "metrics", "port": 9090}, {"name": "grpc", "port": 9000}]


def endpoint(pod: str, *addresses: str, terminating: bool = False) -> Object:
    conditions = {"ready": False, "serving": not terminating, "terminating": terminating}
    target: Object = {"targetRef": {"kind": "Pod", "name": pod}} if pod else {}
    return {"addresses": list(addresses), "conditions": conditions, **target}


def of(*endpoints: Object, family: str = "IPv4", ports: Json = GRPC) -> Object:
    return {"addressType": family, "endpoints": list(endpoints), "ports": ports}


@pytest.mark.parametrize(
    ("slices", "pods"),
    [
        pytest.param([], {}, id="nothing"),
        pytest.param([of(endpoint("a", "10.0.0.1"))], {"10.0.0.1:9000": "a"}, id="a pod that is not ready is dialled"),
        pytest.param(
            [of(endpoint("a", "10.0.0.1", terminating=True))], {"10.0.0.1:9000": "a"}, id="a terminating pod as well"
        ),
        pytest.param([of(endpoint("a", "fd00::1"), family="IPv6")], {"[fd00::1]:9000": "a"}, id="IPv6 in brackets"),
        pytest.param(
            [of(endpoint("a", "10.0.0.1")), of(endpoint("a", "fd00::1"), family="IPv6")], {"10.0.0.1:9000": "a"},
            id="a pod of both families is one worker",
        ),
        pytest.param(
            [of(endpoint("a", "10.0.0.1")), of(endpoint("b", "10.0.0.2"), endpoint("c", "10.0.0.3"))],
            {"10.0.0.1:9000": "a", "10.0.0.2:9000": "b", "10.0.0.3:9000": "c"}, id="several slices",
        ),
        pytest.param(
            [of(endpoint("a", "10.0.0.1")), of(endpoint("a", "10.0.0.1"))], {"10.0.0.1:9000": "a"},
            id="an endpoint on its way between two slices",
        ),
        pytest.param(
            [of(endpoint("a", "10.0.0.1", "10.0.0.9"))], {"10.0.0.1:9000": "a"}, id="the first of equal addresses"
        ),
        pytest.param(
            [of(endpoint("new", "10.0.0.1")), of(endpoint("an-old-one", "10.0.0.1", terminating=True))],
            {"10.0.0.1:9000": "new"}, id="an address used again belongs to the pod that stays",
        ),
        pytest.param(
            [of(endpoint("", "10.0.0.1")), of(endpoint("a", "10.0.0.1"))], {"10.0.0.1:9000": "a"},
            id="a name is better than none",
        ),
        pytest.param([of(endpoint("", "10.0.0.1"))], {"10.0.0.1:9000": ""}, id="an endpoint that is no pod"),
        pytest.param(
            [of(endpoint("a", "10.0.0.1"), ports=[{"name": "http", "port": 80}])], {}, id="no port of that name"
        ),
        pytest.param([of(endpoint("a", "10.0.0.1"), ports=None)], {}, id="no ports"),
        pytest.param([of(endpoint("a", "worker.example"), family="FQDN")], {}, id="names are not dialled"),
        pytest.param([of({"addresses": []}), {"addressType": "IPv4"}], {}, id="empty"),
    ],
)  # fmt: skip
def test_addresses_of_slices(slices: Sequence[Object], pods: dict[str, str]) -> None:
    assert pods_by_address(slices) == pods
    assert pods_by_address(list(reversed(slices))) == pods


@asynccontextmanager
async def started(addresses: Sequence[str] = ()) -> AsyncIterator[Fleet]:
    fleet = Fleet(addresses, SystemClock())
    fleet.start()
    yield fleet
    await fleet.stop()


def up(fleet: Fleet) -> list[str]:
    return sorted(link.hello.worker_id for link in fleet.links if link.hello)


async def test_workers_come_and_go_with_the_assignment(house: House) -> None:
    first = await house.add(wire.ROLE_PREFILL, worker_id="p-1")
    second = await house.add(wire.ROLE_DECODE, worker_id="d-1")
    async with started() as fleet:
        assert not fleet.readiness().ready
        fleet.assign({first.address: "p-1"})
        await eventually(lambda: up(fleet) == ["p-1"], "the first is up")
        fleet.assign({first.address: "p-1", second.address: "d-1"})
        await eventually(lambda: fleet.readiness().ready, "the pair is ready")
        fleet.assign({first.address: "p-1"})
        assert not fleet.readiness().ready, "a worker that is not listed gets no new requests"
        await second.stop()
        await eventually(lambda: [link.pod for link in fleet.links] == ["p-1"], "the second left nothing")
        assert [row["worker_id"] for row in fleet.report()] == ["p-1"]


async def test_an_unreachable_worker_is_forgotten_at_once(house: House) -> None:
    async with started() as fleet:
        fleet.assign({"127.0.0.1:1": "gone"})
        await eventually(lambda: "nothing answers" in fleet.readiness().reasons[0], "the reason is told")
        fleet.assign({})
        assert fleet.links == []
        assert fleet.report() == []


async def test_an_answer_on_a_worker_that_is_not_listed_any_more_goes_to_its_end(house: House) -> None:
    worker = await house.add(wire.ROLE_COLOCATED, tick_s=0.01)
    await house.serve()
    assert house.router is not None
    client = house.client()
    stream = await client.completions.create(model="tiny", prompt=[100], max_tokens=30, stream=True)
    first = await anext(stream)
    house.router.fleet.assign({})
    rest = [chunk async for chunk in stream]
    assert first.choices[0].finish_reason is None
    assert rest[-1].choices[0].finish_reason == "length"
    assert len(worker.submits) == 1
    assert worker.aborts == []


async def test_a_worker_that_is_listed_again_keeps_its_stream(house: House) -> None:
    worker = await house.add(wire.ROLE_COLOCATED, worker_id="w")
    async with started() as fleet:
        for pods in ({worker.address: "w"}, {}, {worker.address: "w"}):
            fleet.assign(pods)
            await eventually(lambda: up(fleet) == ["w"], "connected")
        assert fleet.readiness().ready
        assert len(worker.streams) == 1


async def test_an_address_that_another_pod_took_over(house: House) -> None:
    """The old stream may hold for a while; then the new pod is registered, and the old one left nothing."""
    old = await house.add(wire.ROLE_COLOCATED, worker_id="old")
    async with started() as fleet:
        fleet.assign({old.address: "old"})
        await eventually(lambda: up(fleet) == ["old"], "the old pod is up")
        await old.stop()
        new = FakeWorker(wire.ROLE_COLOCATED, house.cluster, worker_id="new", port=int(old.address.rpartition(":")[2]))
        house.workers.append(await new.start())
        await eventually(
            lambda: any("should be pod old, but new answers" in reason for reason in fleet.readiness().reasons),
            "the slice has not followed yet, so nobody is registered",
        )
        assert fleet.registered() == []
        assert fleet.links[0].state is LinkState.REFUSED
        fleet.assign({new.address: "new"})
        await eventually(lambda: up(fleet) == ["new"], "the new pod is up")
        assert [link.pod for link in fleet.links] == ["new"]
        assert fleet.readiness().ready


async def test_two_pods_on_one_address_are_one_row_in_the_metrics(house: House) -> None:
    worker = await house.add(wire.ROLE_COLOCATED, worker_id="w")
    router = await house.route([])
    router.fleet.assign({worker.address: "w"})
    await eventually(lambda: up(router.fleet) == ["w"], "up")
    router.fleet.assign({worker.address: ""})
    await eventually(lambda: up(router.fleet) == ["w", "w"], "both up")
    rows = [line for line in router.metrics.text().decode().splitlines() if line.startswith("baton_router_worker_up{")]
    assert rows == [f'baton_router_worker_up{{address="{worker.address}",role="colocated"}} 1.0']


async def test_ready_tells_what_discovery_waits_for() -> None:
    """The API server cannot be reached; the Services are named."""
    fleet = Fleet((), SystemClock())
    nowhere = Credentials(server="http://127.0.0.1:1", namespace="ns")
    async with KubeClient(nowhere, manager="test", clock=SystemClock()) as client:
        discovery = Discovery(
            client, fleet, namespace="ns", services=["chat-prefill", "chat-decode"], clock=SystemClock(),
            random=lambda: 0.5,
        )  # fmt: skip
        running = asyncio.create_task(discovery.run())
        await eventually(lambda: "does not answer" in fleet.trouble, "the trouble is told")
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)
    reasons = " ".join(fleet.readiness().reasons)
    assert "chat-prefill, chat-decode in namespace ns" in reasons
    assert "list endpointslices.discovery.k8s.io: the API server does not answer" in reasons
