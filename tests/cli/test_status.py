"""`baton status` of this machine: what a worker says of itself, its peers and its tiers."""

from __future__ import annotations

import io
from collections.abc import Iterator
from concurrent import futures

import grpc
import pytest
from rich.console import Console

from baton.ports import free_ports
from baton.state import Phase, ProcessState, ServiceState
from baton.status import show
from baton_proto import worker_pb2, worker_pb2_grpc


class Admin(worker_pb2_grpc.AdminServicer):
    """A worker that has a link, a refused one, and a tier that is off."""

    def Status(self, request: worker_pb2.StatusRequest, context: grpc.ServicerContext) -> worker_pb2.StatusReply:
        return worker_pb2.StatusReply(
            state="serving",
            peers=[
                worker_pb2.PeerStatus(
                    worker_id="decode-0", wire="tcp", state="up", bytes=3 << 20, reason="nixl: no RDMA device here [x]"
                ),
                worker_pb2.PeerStatus(worker_id="decode-1", state="refused", reason="model_digest differs"),
            ],
            tiers=[
                worker_pb2.TierStatus(name="host", state="on", bytes=1 << 20),
                worker_pb2.TierStatus(name="file", state="off", reason="No space left on device"),
            ],
        )


@pytest.fixture
def address() -> Iterator[str]:
    server = grpc.server(futures.ThreadPoolExecutor(1))
    worker_pb2_grpc.add_AdminServicer_to_server(Admin(), server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    yield f"127.0.0.1:{port}"
    server.stop(0).wait()


def shown(*addresses: str) -> list[str]:
    processes = tuple(
        ProcessState(name=f"prefill-{number}", role="prefill", address=address, log="")
        for number, address in enumerate(addresses)
    )
    state = ServiceState(
        name="default", phase=Phase.READY, note="", url="http://127.0.0.1:1", model="m", pid=1, started_s=0.0,
        processes=processes,
    )  # fmt: skip
    out = io.StringIO()
    assert not show(state, Console(file=out, width=300))
    return [" ".join(line.split()) for line in out.getvalue().splitlines()]


def test_peers_are_told_with_wire_and_reason_and_tiers_with_why_they_are_off(address: str) -> None:
    lines = shown(address)
    assert "prefill-0 decode-0 up tcp 3.0 nixl: no RDMA device here [x]" in lines
    assert "prefill-0 decode-1 refused - 0.0 model_digest differs" in lines
    assert "prefill-0 host on 1.0 -" in lines
    assert "prefill-0 file off 0.0 No space left on device" in lines


def test_a_worker_that_does_not_answer_is_told_and_the_others_too(address: str) -> None:
    [closed] = free_ports(1, host="127.0.0.1", first=24000)
    lines = shown(f"127.0.0.1:{closed}", address)
    assert any(line.startswith("prefill-0 no answer (unavailable)") for line in lines)
    assert any(line.startswith("prefill-1 serving") for line in lines)


def test_what_no_worker_has_is_not_shown() -> None:
    [closed] = free_ports(1, host="127.0.0.1", first=24000)
    assert not any("tier" in line or "wire" in line for line in shown(f"127.0.0.1:{closed}"))
