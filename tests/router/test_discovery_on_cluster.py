"""Discovery and gates on a real API server, with no more rights than the Role of the router has.

Workers are fakes on this machine's address; their pods exist without a node, their slices are written by the test.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import socket
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from typing import Any
from urllib.parse import urlsplit

import pytest
from router.conftest import House, eventually
from router.fake_worker import FakeWorker
from support.cluster import Cluster, control_plane, why_no_control_plane

from baton_common.clock import SystemClock
from baton_common.kube.client import KubeClient
from baton_common.kube.credentials import Credentials, find_credentials
from baton_common.kube.gates import REGISTERED_GATE, TRANSPORT_GATE
from baton_proto import worker_pb2 as wire
from baton_router.checkpoint import Checkpoint
from baton_router.config import RouterConfig
from baton_router.discovery import Discovery
from baton_router.fleet import Fleet
from baton_router.service import Router

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(240)]

WAIT_S = 60.0
SERVICES = ("chat-prefill", "chat-decode")
RULES = [
    {"apiGroups": ["discovery.k8s.io"], "resources": ["endpointslices"], "verbs": ["get", "list", "watch"]},
    {"apiGroups": [""], "resources": ["pods"], "verbs": ["get"]},
    {"apiGroups": [""], "resources": ["pods/status"], "verbs": ["patch"]},
]
_numbers = itertools.count(1)


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    if reason := why_no_control_plane():
        pytest.skip(reason)
    with control_plane(tmp_path_factory.mktemp("router-cluster")) as found:
        yield found


def own_address() -> str:
    """Slices may not hold loopback addresses."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("192.0.2.1", 9))  # sends nothing
        except OSError:
            return ""
        address = str(probe.getsockname()[0])
    return "" if address.startswith("127.") else address


@dataclass
class Place:
    """A namespace with the router's ServiceAccount."""

    cluster: Cluster
    name: str
    host: str

    def send(self, method: str, path: str, body: dict[str, Any] | None = None) -> dict[str, Any]:
        answer = self.cluster.request(method, path.format(ns=f"namespaces/{self.name}"), body)
        assert answer.ok, answer.text
        return answer.body

    def allow(self, rules: list[dict[str, Any]]) -> None:
        self.send("POST", "/apis/rbac.authorization.k8s.io/v1/{ns}/roles", {"metadata": {"name": "r"}, "rules": rules})
        self.send("POST", "/apis/rbac.authorization.k8s.io/v1/{ns}/rolebindings", {
            "metadata": {"name": "r"},
            "roleRef": {"apiGroup": "rbac.authorization.k8s.io", "kind": "Role", "name": "r"},
            "subjects": [{"kind": "ServiceAccount", "name": "router", "namespace": self.name}],
        })  # fmt: skip

    def credentials(self) -> Credentials:
        """Those of the router's pod."""
        path = "/api/v1/{ns}/serviceaccounts/router/token"
        token = self.send("POST", path, {"spec": {"expirationSeconds": 3600}})["status"]["token"]
        admin = find_credentials(str(self.cluster.kubeconfig), {})
        return replace(admin, namespace=self.name, certificate_pem="", key_pem="", fixed_token=token)

    def put_pod(self, name: str) -> None:
        container = {"name": "w", "image": "none"}
        spec = {"containers": [container], "serviceAccountName": "router", "automountServiceAccountToken": False}
        self.send("POST", "/api/v1/{ns}/pods", {"metadata": {"name": name}, "spec": spec})

    def pod(self, name: str) -> dict[str, Any]:
        return self.send("GET", f"/api/v1/{{ns}}/pods/{name}")

    def condition(self, name: str, kind: str) -> dict[str, Any]:
        conditions = self.pod(name).get("status", {}).get("conditions", [])
        return next((item for item in conditions if item["type"] == kind), {})

    async def says(self, pod: str, kind: str, word: str) -> None:
        """Wait until status or reason of the condition is `word`."""
        end_s = asyncio.get_running_loop().time() + WAIT_S
        while word not in ((found := self.condition(pod, kind)).get("status"), found.get("reason")):
            assert asyncio.get_running_loop().time() < end_s, f"{pod} never said {kind} {word}, but {found}"
            await asyncio.sleep(0.1)

    def list_worker(self, service: str, worker: FakeWorker, pod: str = "") -> str:
        """A slice of its own for each worker, because each has its own port here. Returns the slice's name."""
        name = f"{service}-{next(_numbers)}"
        host, _, port = worker.address.rpartition(":")
        target = {"kind": "Pod", "name": pod or worker.worker_id, "namespace": self.name}
        self.send("POST", "/apis/discovery.k8s.io/v1/{ns}/endpointslices", {
            "metadata": {"name": name, "labels": {"kubernetes.io/service-name": service}},
            "addressType": "IPv4",
            "ports": [{"name": "metrics", "port": 9090}, {"name": "grpc", "port": int(port)}],
            "endpoints": [{"addresses": [host], "targetRef": target, "conditions": {"ready": False}}],
        })  # fmt: skip
        return name

    def unlist(self, name: str) -> None:
        self.send("DELETE", f"/apis/discovery.k8s.io/v1/{{ns}}/endpointslices/{name}")


@pytest.fixture
def place(cluster: Cluster) -> Place:
    if not (host := own_address()):
        pytest.skip("this machine has no address besides loopback, and slices may not hold that one")
    made = Place(cluster, f"router-{next(_numbers)}", host)
    made.send("POST", "/api/v1/namespaces", {"metadata": {"name": made.name}})
    made.send("POST", "/api/v1/{ns}/serviceaccounts", {"metadata": {"name": "router"}})
    return made


@asynccontextmanager
async def routing(place: Place, checkpoint: Checkpoint) -> AsyncIterator[Router]:
    router = Router(RouterConfig(worker_services=SERVICES), checkpoint, credentials=place.credentials())
    router.start()
    try:
        yield router
    finally:
        await router.stop()


def calls(router: Router, verb: str, code: int = 200) -> float:
    """Requests to the API server so far, of all resources."""
    total = 0.0
    for line in router.metrics.text().decode().splitlines():
        if line.startswith("baton_router_kube_calls_total{") and f'verb="{verb}"' in line and f'code="{code}"' in line:
            total += float(line.rpartition(" ")[2])
    return total


async def add(place: Place, house: House, role: wire.Role) -> tuple[FakeWorker, str]:
    """A worker with its pod, and the slice that lists it."""
    service = "chat-prefill" if role == wire.ROLE_PREFILL else "chat-decode"
    worker = await house.add(role, worker_id=f"{service}-{next(_numbers)}", host=place.host)
    place.put_pod(worker.worker_id)
    return worker, place.list_worker(service, worker)


async def test_workers_are_found_registered_and_proved_and_a_restart_writes_nothing(
    place: Place, house: House, checkpoint: Checkpoint
) -> None:
    place.allow(RULES)
    prefill, _ = await add(place, house, wire.ROLE_PREFILL)
    decode, _ = await add(place, house, wire.ROLE_DECODE)
    gates = [(worker, gate) for worker in (prefill, decode) for gate in (REGISTERED_GATE, TRANSPORT_GATE)]
    async with routing(place, checkpoint) as router:
        await eventually(lambda: router.fleet.readiness().ready, "a pair", WAIT_S)
        for worker, gate in gates:
            await place.says(worker.worker_id, gate, "True")
        assert decode.worker_id in place.condition(prefill.worker_id, TRANSPORT_GATE)["message"]
        assert "baton_router_endpoints 2.0" in router.metrics.text().decode()
    before = [place.pod(worker.worker_id)["metadata"]["resourceVersion"] for worker in (prefill, decode)]
    async with routing(place, checkpoint) as again:
        proved = 'probes_total{verdict="proved"} 1.0'
        await eventually(lambda: proved in again.metrics.text().decode(), "probed", WAIT_S)
        await eventually(lambda: calls(again, "get") >= 3, "both pods are read, one again with the proof", WAIT_S)
        assert calls(again, "patch") == 0
        assert calls(again, "list", 403) + calls(again, "get", 403) + calls(again, "watch", 403) == 0
    after = [place.pod(worker.worker_id)["metadata"]["resourceVersion"] for worker in (prefill, decode)]
    assert after == before


async def test_a_lost_worker_is_told_and_its_successor_on_the_same_address_is_another_pod(
    place: Place, house: House, checkpoint: Checkpoint
) -> None:
    place.allow(RULES)
    prefill, _ = await add(place, house, wire.ROLE_PREFILL)
    decode, listed = await add(place, house, wire.ROLE_DECODE)
    place.put_pod("successor")
    async with routing(place, checkpoint) as router:
        await place.says(decode.worker_id, REGISTERED_GATE, "True")
        await decode.stop()
        await place.says(decode.worker_id, REGISTERED_GATE, "Lost")
        port = int(decode.address.rpartition(":")[2])
        new = FakeWorker(wire.ROLE_DECODE, house.cluster, worker_id="successor", host=place.host, port=port)
        house.workers.append(await new.start())
        place.unlist(listed)
        place.list_worker("chat-decode", new)
        await place.says("successor", REGISTERED_GATE, "True")
        assert place.condition(decode.worker_id, REGISTERED_GATE)["status"] == "False"
        ids = {row["worker_id"] for row in router.fleet.report()}
        assert ids == {prefill.worker_id, "successor"}


async def test_a_missing_right_is_named_in_ready_and_heals_when_it_is_given(
    place: Place, house: House, checkpoint: Checkpoint
) -> None:
    await add(place, house, wire.ROLE_PREFILL)
    await add(place, house, wire.ROLE_DECODE)
    remedy = "get, list and watch on endpointslices"
    async with routing(place, checkpoint) as router:
        await eventually(lambda: remedy in " ".join(router.fleet.readiness().reasons), "told", WAIT_S)
        place.allow(RULES)
        await eventually(lambda: router.fleet.readiness().ready, "healed", WAIT_S)
        assert router.fleet.trouble == ""


@dataclass
class Wire:
    """The way to the API server, which can be cut."""

    to: tuple[str, int]
    port: int = 0
    _server: asyncio.Server | None = None
    _open: set[asyncio.StreamWriter] = field(default_factory=set)

    async def heal(self) -> None:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", self.port)
        self.port = self._server.sockets[0].getsockname()[1]

    async def cut(self) -> None:
        assert self._server is not None
        self._server.close()
        for writer in list(self._open):
            writer.transport.abort()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        there, back = await asyncio.open_connection(*self.to)
        self._open |= {writer, back}
        try:
            await asyncio.gather(_pump(reader, back), _pump(there, writer))
        finally:
            self._open -= {writer, back}
            writer.close()
            back.close()


async def _pump(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    with contextlib.suppress(ConnectionError):
        while block := await reader.read(1 << 16):
            writer.write(block)
            await writer.drain()
    writer.close()


async def test_slices_are_followed_over_ends_of_watches_and_an_api_server_that_goes_away(
    place: Place, house: House
) -> None:
    """Watches of one second, so that several end; what changes while the server is away is seen when it is back."""
    place.allow(RULES)
    credentials = place.credentials()
    url = urlsplit(credentials.server)
    if url.hostname != "127.0.0.1" or url.port is None:
        pytest.skip("the API server is on another machine; its certificate would not fit the detour")
    way = Wire((url.hostname, url.port))
    await way.heal()
    detour = replace(credentials, server=f"https://127.0.0.1:{way.port}")
    fleet = Fleet((), SystemClock())  # not started: assignments are all that is looked at
    ended: list[str] = []
    async with KubeClient(
        detour, manager="test", clock=SystemClock(), count=lambda verb, resource, code, seconds: ended.append(verb)
    ) as client:
        discovery = Discovery(
            client, fleet, namespace=place.name, services=SERVICES, clock=SystemClock(), random=lambda: 0.0, watch_s=1
        )
        following = asyncio.create_task(discovery.run())

        def pods() -> list[str]:
            return sorted(link.pod for link in fleet.links)

        await eventually(lambda: "have no EndpointSlices" in fleet.absence, "the empty list", WAIT_S)
        worker = FakeWorker(wire.ROLE_DECODE, house.cluster)
        worker.address = f"{place.host}:9000"
        names = {}
        for pod in ("a", "b", "c"):
            names[pod] = place.list_worker("chat-decode", worker, pod)
            worker.address = f"{place.host}:{9001 + len(names)}"
            await eventually(lambda: pods() == sorted(names), f"{pod} is there", WAIT_S)
        place.list_worker("somebody-else", worker, "stranger")
        watches, lists = ended.count("watch"), ended.count("list")
        await eventually(lambda: ended.count("watch") >= watches + 2, "watches end", WAIT_S)
        place.unlist(names["a"])
        await eventually(lambda: pods() == ["b", "c"], "a is gone", WAIT_S)
        assert ended.count("list") == lists, "the end of a watch is no reason to list"
        await way.cut()
        await eventually(lambda: "does not answer" in fleet.trouble, "the server is away", WAIT_S)
        place.unlist(names["b"])
        assert pods() == ["b", "c"], "what was known stays"
        await way.heal()
        await eventually(lambda: pods() == ["c"], "what was missed is seen", WAIT_S)
        await eventually(lambda: fleet.trouble == "", "no trouble any more", WAIT_S)
        following.cancel()
        await asyncio.gather(following, return_exceptions=True)
    await way.cut()
