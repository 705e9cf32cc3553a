"""Leader election on a clock of the test: one leader at a time, a quick successor, no trust in foreign clocks."""

from __future__ import annotations

import random
from datetime import UTC, datetime, timedelta

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.operator_world import FakeKube, FakeServer

from baton_common.clock import ManualClock
from baton_common.errors import ConfigError
from baton_common.kube.errors import KubeError, NotLeader
from baton_operator.kinds import LEASE, SERVICE
from baton_operator.leader import LeaderElection, LeaseTimes

TIMES = LeaseTimes()


class Replica:
    def __init__(self, name: str, server: FakeServer, clock: ManualClock, year: int = 2026) -> None:
        began = datetime(year, 1, 1, tzinfo=UTC)
        self.changes: list[bool] = []
        self.election = LeaderElection(
            FakeKube(server), namespace="ns", name="lease", identity=name, clock=clock,
            wall=lambda: began + timedelta(seconds=clock.now()), times=TIMES, dice=random.Random(1),
        )  # fmt: skip
        self.election.on_change = self.changes.append

    @property
    def leads(self) -> bool:
        return self.election.leads


async def seconds(clock: ManualClock, count: float, *replicas: Replica) -> None:
    """Time passes; each replica looks every two seconds."""
    for _ in range(round(count / TIMES.retry_s)):
        clock.advance(TIMES.retry_s)
        for replica in replicas:
            await replica.election.step()


async def test_the_first_leads_and_the_second_waits() -> None:
    clock, server = ManualClock(), FakeServer()
    first, second = Replica("a", server, clock), Replica("b", server, clock)
    await first.election.step()
    await second.election.step()
    await seconds(clock, 60, first, second)
    assert (first.leads, second.leads) == (True, False)
    assert (first.changes, second.changes) == ([True], [])


async def test_a_dead_leader_is_replaced_in_less_than_twenty_seconds() -> None:
    clock, server = ManualClock(), FakeServer()
    first, second = Replica("a", server, clock), Replica("b", server, clock)
    await seconds(clock, 10, first, second)
    died_s = clock.now()
    while not second.leads:
        await seconds(clock, 2, second)
        assert clock.now() - died_s < 20
    assert not first.leads
    lease = server.get(LEASE, "lease")
    assert lease is not None
    assert lease["spec"]["leaseTransitions"] == 1


async def test_a_leader_that_stops_in_order_is_replaced_at_once() -> None:
    clock, server = ManualClock(), FakeServer()
    first, second = Replica("a", server, clock), Replica("b", server, clock)
    await seconds(clock, 4, first, second)
    await first.election.release()
    assert first.changes == [True, False]
    await second.election.step()
    assert second.leads


async def test_a_lease_that_is_deleted_is_made_again_only_when_nobody_can_lead_by_it() -> None:
    """Nor at all when its release goes: by then the replicas have ended."""
    clock, server = ManualClock(), FakeServer()
    first, second = Replica("a", server, clock), Replica("b", server, clock)
    await seconds(clock, 4, first, second)
    server.delete(LEASE.path("ns", "lease"))
    while first.leads:
        assert server.get(LEASE, "lease") is None
        await seconds(clock, 2, first, second)
    assert not second.leads
    assert server.get(LEASE, "lease") is None
    await seconds(clock, 16, first, second)
    assert first.leads != second.leads


async def test_a_leader_cut_off_from_the_api_stops_before_anyone_else_may_start() -> None:
    clock, server = ManualClock(), FakeServer()
    first, second = Replica("a", server, clock), Replica("b", server, clock)
    await seconds(clock, 4, first, second)

    def cut(verb: str, path: str) -> None:
        raise KubeError("no route")

    server.before = cut
    while first.leads:
        await seconds(clock, 2, first)
    server.before = lambda verb, path: None
    await second.election.step()
    assert not second.leads  # the lease has not run out yet
    await seconds(clock, 4, second)
    assert second.leads
    await first.election.step()
    assert not first.leads


async def test_clocks_of_other_machines_are_not_believed() -> None:
    clock, server = ManualClock(), FakeServer()
    first = Replica("a", server, clock, year=1999)
    second = Replica("b", server, clock, year=2050)
    await seconds(clock, 60, first, second)
    assert (first.leads, second.leads) == (True, False)


async def test_a_replica_that_lost_the_lead_cannot_write() -> None:
    leads = True
    client = FakeKube(FakeServer(), may_write=lambda: leads)
    await client.apply(SERVICE, "ns", "x", {"metadata": {"name": "x", "namespace": "ns"}})
    leads = False
    with pytest.raises(NotLeader, match="left to the replica that leads now"):
        await client.apply(SERVICE, "ns", "x", {"metadata": {"name": "x", "namespace": "ns"}})
    assert await client.get(SERVICE, "ns", "x") is not None


@pytest.mark.parametrize(("lease_s", "renew_s", "retry_s"), [(8, 8, 2), (12, 2, 2), (12, 13, 2)])
def test_times_that_would_allow_two_leaders_are_refused(lease_s: float, renew_s: float, retry_s: float) -> None:
    with pytest.raises(ConfigError, match="retry < renew < lease"):
        LeaseTimes(lease_s=lease_s, renew_s=renew_s, retry_s=retry_s)


@settings(max_examples=100, deadline=None)
@given(
    steps=st.lists(
        st.tuples(st.sampled_from(["a", "b", "c"]), st.floats(0.1, 6), st.booleans()), min_size=10, max_size=80
    )
)
async def test_never_two_leaders_whatever_fails_and_whoever_sleeps(steps: list[tuple[str, float, bool]]) -> None:
    clock, server = ManualClock(), FakeServer()
    replicas = {name: Replica(name, server, clock) for name in "abc"}
    for name, wait_s, broken in steps:
        clock.advance(wait_s)

        def fail(verb: str, path: str, broken: bool = broken) -> None:
            if broken:
                raise KubeError("broken", status=500)

        server.before = fail
        await replicas[name].election.step()
        assert sum(replica.leads for replica in replicas.values()) <= 1
