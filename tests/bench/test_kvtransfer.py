"""The benchmark of KV handoff on amounts that take a moment: everything moves, every row comes, nothing is judged."""

import dataclasses

import pytest
from support.kv_wires import ONESIDED, needs

from bench.kvtransfer import damage, planning
from bench.kvtransfer.arena import Series, Slice, add_row, compete
from bench.kvtransfer.contenders import OurWire
from bench.kvtransfer.peers import mooncake, nixl
from bench.kvtransfer.peers.host import Memmove, raw_socket, vm_writev
from bench.kvtransfer.remote import Remote, RemoteFailed
from bench.kvtransfer.shapes import KIB_4, LLAMA
from bench.report import Report

FEW = dataclasses.replace(KIB_4, pages=32)
CONTENDERS = {
    "memmove": lambda: Memmove(FEW),
    "socket": lambda: raw_socket(FEW),
    "process_vm_writev": lambda: vm_writev(FEW),
    "shm": lambda: OurWire("shm", FEW, digest=True),
    "shm without digest": lambda: OurWire("shm", FEW, digest=False),
    "tcp, other order": lambda: OurWire("tcp", dataclasses.replace(LLAMA, pages=4), digest=True),
}
LIBRARIES = {
    "nixl": lambda: nixl.Direct(FEW, tls="tcp", shipped=False),
    "mooncake": lambda: mooncake.direct(FEW),
}


def one_round(make) -> None:
    (series,) = compete([make], rounds=1, slice_s=0.01).values()
    assert not series.failure
    assert series.slices[0].gbps > 0


@pytest.mark.parametrize("make", CONTENDERS.values(), ids=CONTENDERS)
def test_what_is_moved_arrives(make):
    one_round(make)


@pytest.mark.parametrize("wire", [pytest.param(wire, marks=needs(wire)) for wire in ONESIDED])
def test_libraries_move_it_too(wire):
    one_round(LIBRARIES[wire])


def test_one_that_cannot_start_is_left_out_and_the_others_are_measured(capsys):
    def missing():
        raise RemoteFailed("Traceback\nImportError: no such library")

    found = compete([missing, lambda: Memmove(FEW)], rounds=1, slice_s=0.01)
    assert list(found) == ["memmove"]
    assert "no such library" in capsys.readouterr().out


class Failing:
    def __init__(self) -> None:
        self.calls = 0

    def work(self) -> None:
        raise ValueError("broken")

    def close(self) -> None: ...


def test_what_fails_in_the_other_process_is_told_here():
    remote = Remote(Failing)
    with pytest.raises(RemoteFailed, match="ValueError: broken"):
        remote.call("work")
    remote.close()
    with pytest.raises(RemoteFailed, match="TypeError"):
        Remote(Failing, "too much")


def test_a_fraction_is_that_of_the_median_round():
    def series(name, values):
        return Series(name, [Slice(gbps=value, cpu_s_per_gb=0.1, foreign_cores=0.0) for value in values])

    report = Report(title="t")
    found = {"ours": series("ours", [5.0, 9.0, 4.0]), "ceiling": series("ceiling", [10.0, 10.0, 5.0])}
    add_row(report, "row", found, "ours", "ceiling", 0.75)
    (row,) = report.rows
    assert (row.value, row.ceiling, row.fraction, row.verdict) == (4.0, 5.0, 0.8, "PASS")
    found["ours"].failure = "wrong bytes arrived"
    add_row(report, "row", found, "ours", "ceiling", 0.75)
    assert (report.rows[1].verdict, report.rows[1].note) == ("FAIL", "wrong bytes arrived")


@pytest.mark.parametrize("kind", damage.KINDS)
def test_all_damage_is_done_and_seen(kind):
    harm = damage.Damage("shm")
    done, seen, wrong = harm.run(kind, 10)
    harm.close()
    assert done == seen >= 10
    assert wrong == 0


def test_late_writes_come_and_harm_nothing():
    late = damage.LateWrites()
    found = late.run(80)
    late.close()
    assert found["aborts"] >= 80
    assert found["late writes"] > 0
    assert (found["corrupted pages"], found["leaked pages"], found["leaked slots"]) == (0, 0, 0)


def test_planning_has_its_rows():
    report = Report(title="t")
    planning.measure(report, 0.0)
    assert [row.goal for row in report.rows] == list(planning.GOALS_US.values())
