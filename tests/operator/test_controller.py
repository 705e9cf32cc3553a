"""Who is looked at when: changes, children, profiles, failures, and only in the replica that leads."""

from __future__ import annotations

import asyncio
import subprocess
import sys

from prometheus_client import CollectorRegistry

from baton_common.clock import SystemClock
from baton_common.errors import BatonError
from baton_operator.config import OperatorConfig
from baton_operator.controller import Controller, ServiceKey
from baton_operator.metrics import OperatorMetrics
from baton_operator.reconcile import Outcome

CONFIG = OperatorConfig(workers=2, resync_s=1000.0, unready_resync_s=1000.0, back_off_first_s=0.5)


class Passes:
    """Notes each pass; fails as often as told."""

    def __init__(self, failures: int = 0) -> None:
        self.seen: list[ServiceKey] = []
        self.running: set[ServiceKey] = set()
        self._failures = failures

    async def reconcile(self, namespace: str, name: str) -> Outcome:
        key = ServiceKey(namespace, name)
        assert key not in self.running
        self.running.add(key)
        await asyncio.sleep(0.01)
        self.running.discard(key)
        self.seen.append(key)
        if self._failures:
            self._failures -= 1
            raise BatonError("broken")
        return Outcome(settled=True, ready=True)


class House:
    """A controller that runs inside `async with`."""

    def __init__(self, passes: Passes, *, leads: bool = True) -> None:
        self.passes, self.leads = passes, leads
        self.metrics = CollectorRegistry()
        self.controller = Controller(
            passes, config=CONFIG, clock=SystemClock(), leads=lambda: self.leads, metrics=OperatorMetrics(self.metrics)
        )

    async def __aenter__(self) -> House:
        self._task = asyncio.create_task(self.controller.run())
        return self

    async def __aexit__(self, *_: object) -> None:
        self._task.cancel()
        await asyncio.wait([self._task])

    async def passes_made(self, count: int) -> None:
        async with asyncio.timeout(5):
            while len(self.passes.seen) < count:
                await asyncio.sleep(0.01)

    def counted(self, result: str) -> float:
        return self.metrics.get_sample_value("baton_operator_reconciles_total", {"result": result}) or 0.0


async def test_a_burst_of_changes_is_few_passes_and_never_two_at_a_time() -> None:
    async with House(Passes()) as house:
        for _ in range(50):
            house.controller.service_changed("ns", "a", "cpu")
            await asyncio.sleep(0.001)
        await asyncio.sleep(0.1)
        assert 1 <= len(house.passes.seen) <= 12


async def test_a_child_wakes_its_own_service_and_a_stranger_nobody() -> None:
    async with House(Passes()) as house:
        house.controller.service_changed("ns", "a", "cpu")
        await house.passes_made(1)
        house.controller.child_changed("ns", "unknown")
        house.controller.child_changed("ns", "a")
        await house.passes_made(2)
        assert house.passes.seen == [("ns", "a"), ("ns", "a")]


async def test_a_profile_wakes_the_services_that_use_it() -> None:
    async with House(Passes()) as house:
        house.controller.service_changed("ns", "a", "cpu")
        house.controller.service_changed("ns", "b", "h200")
        await house.passes_made(2)
        house.controller.profile_changed("h200")
        await house.passes_made(3)
        assert house.passes.seen[2] == ("ns", "b")


async def test_a_failure_is_tried_again_by_itself() -> None:
    async with House(Passes(failures=1)) as house:
        house.controller.service_changed("ns", "a", "cpu")
        await house.passes_made(2)
        await asyncio.sleep(0.05)
        assert (house.counted("error"), house.counted("ready")) == (1.0, 1.0)


async def test_a_replica_that_does_not_lead_only_listens_and_a_new_leader_looks_at_everything() -> None:
    async with House(Passes(), leads=False) as house:
        house.controller.service_changed("ns", "a", "cpu")
        house.controller.service_changed("ns", "b", "cpu")
        await asyncio.sleep(0.1)
        assert house.passes.seen == []
        house.leads = True
        house.controller.lead_changed(True)
        await house.passes_made(2)
        assert set(house.passes.seen) == {("ns", "a"), ("ns", "b")}


def test_the_operator_loads_no_torch() -> None:
    code = "import sys, baton_operator.main; print(sorted({'torch', 'numpy', 'grpc'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout.strip() == "[]"
