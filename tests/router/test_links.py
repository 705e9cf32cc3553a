"""What a link to one worker keeps in step, and whom it refuses."""

from __future__ import annotations

from router.conftest import House, eventually
from router.fake_worker import FakeWorker

from baton_proto import worker_pb2 as wire


async def test_a_gap_in_kv_events_asks_for_a_snapshot(house: House) -> None:
    worker = await house.add(wire.ROLE_COLOCATED)
    await house.route()
    assert worker.snapshots_asked == 0
    worker.send_kv(worker.streams[0], stored=b"x" * 16, skip=3)
    await eventually(lambda: worker.snapshots_asked == 1, "a snapshot is wanted")
    assert house.router is not None
    pages = house.router.fleet.links[0].pages
    await eventually(lambda: len(pages) == 0, "the snapshot replaced everything")


async def test_another_protocol_version_is_refused_with_a_reason(house: House) -> None:
    worker = FakeWorker(wire.ROLE_COLOCATED, house.cluster)
    worker.protocol_version = 99
    house.workers.append(await worker.start())
    router = await house.route([worker.address])
    await eventually(lambda: "99" in router.fleet.links[0].reason, "refused")
    assert not router.fleet.readiness().ready
    assert "protocol_version differs" in router.fleet.readiness().reasons[0]
