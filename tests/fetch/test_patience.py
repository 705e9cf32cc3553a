"""How long failures are borne, on a clock that stands still."""

from __future__ import annotations

import pytest

from baton_common.clock import ManualClock
from baton_fetch.errors import FetchFailed, Unavailable
from baton_fetch.patience import Patience
from baton_fetch.progress import Progress
from baton_fetch.units import amount, duration


def patience(clock: ManualClock, waits: list[float]) -> Patience:
    def wait(seconds: float) -> None:
        waits.append(seconds)
        clock.advance(seconds)

    return Patience(place="s3://b/m", clock=clock, wait=wait, contact_s=5.0, give_up_s=300.0)


def fail_for_ever(subject: Patience) -> None:
    while True:
        subject.failed(Unavailable("connection refused"))


def test_a_place_that_never_answered_is_given_up_soon() -> None:
    clock, waits = ManualClock(), []
    with pytest.raises(FetchFailed, match=r"s3://b/m: gave up after 5\.0 s .*\(connection refused\)"):
        fail_for_ever(patience(clock, waits))
    assert clock.now() == pytest.approx(5.0)
    assert len(waits) >= 3


def test_one_that_answered_is_given_minutes_and_waits_grow() -> None:
    clock, waits = ManualClock(), []
    subject = patience(clock, waits)
    subject.succeeded()
    with pytest.raises(FetchFailed, match="gave up after 5 min 0 s"):
        fail_for_ever(subject)
    assert waits[0] < 1 < max(waits) <= 24


def test_every_success_begins_the_time_anew() -> None:
    clock, waits = ManualClock(), []
    subject = patience(clock, waits)
    for _ in range(1000):
        subject.failed(Unavailable("busy"))
        subject.succeeded()
    assert max(waits) < 1


def test_progress_is_said_at_most_every_five_seconds(caplog: pytest.LogCaptureFixture) -> None:
    clock = ManualClock()
    progress = Progress(clock)
    progress.total_bytes = 10**9
    with caplog.at_level("INFO"):
        for _ in range(24):
            clock.advance(0.5)
            progress.fetched(25 * 10**6, "model.safetensors")
    assert [record.getMessage() for record in caplog.records] == [
        "25 %, 250.0 MB of 1.0 GB, 50.0 MB/s, ETA 15 s, model.safetensors",
        "50 %, 500.0 MB of 1.0 GB, 50.0 MB/s, ETA 10 s, model.safetensors",
    ]


def test_units() -> None:
    assert [amount(n) for n in (12, 1500, 2.5e6, 140e9, 3e12)] == ["12 B", "1.5 kB", "2.5 MB", "140.0 GB", "3.0 TB"]
    assert [duration(s) for s in (0.25, 42, 61, 7322)] == ["0.2 s", "42 s", "1 min 1 s", "2 h 2 min"]
