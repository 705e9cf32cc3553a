"""The supervisor: restarts what crashes, gives up on what cannot work, stops in order, leaves nothing behind."""

import asyncio
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from cli.support import QUICK, alive, eventually, read_pid, script

from baton.state import Life
from baton.supervisor import Command, GaveUp, Policy, Supervisor
from baton_common.clock import ManualClock, SystemClock


def supervisor(*commands: Command, policy: Policy = QUICK) -> Supervisor:
    return Supervisor(commands, policy, SystemClock(), lambda: None)


async def test_a_process_that_crashes_is_started_again(tmp_path: Path) -> None:
    body = "echo x >> starts; if [ $(wc -l < starts) -lt 3 ]; then exit 7; fi; exec sleep 60"
    kept = supervisor(script(tmp_path, "worker", body))
    run = asyncio.create_task(kept.run())
    await eventually(lambda: kept.states[0].restarts == 2 and kept.states[0].life is Life.RUNNING)
    assert kept.states[0].last_exit == "with exit status 7"
    assert kept.states[0].pid > 0
    kept.stop()
    await run
    assert (kept.states[0].life, kept.states[0].pid) == (Life.STOPPED, 0)


async def test_a_killed_process_is_started_again_and_the_signal_named(tmp_path: Path) -> None:
    kept = supervisor(script(tmp_path, "worker", "exec sleep 60"))
    run = asyncio.create_task(kept.run())
    await eventually(lambda: kept.states[0].pid > 0)
    first = kept.states[0].pid
    os.kill(first, signal.SIGKILL)
    await eventually(lambda: kept.states[0].pid not in (0, first))
    assert kept.states[0].last_exit == "killed by SIGKILL"
    kept.stop()
    await run


async def test_a_configuration_error_ends_everything_with_the_last_line_and_is_not_retried(tmp_path: Path) -> None:
    bad = script(tmp_path, "bad", "echo x >> starts; echo noise; echo 'model has no tokenizer' >&2; echo; exit 2")
    good = script(tmp_path, "good", "echo $$ > pid; exec sleep 60")
    with pytest.raises(GaveUp, match="bad refuses to start: model has no tokenizer") as caught:
        await supervisor(bad, good).run()
    assert caught.value.status == 2
    assert (tmp_path / "starts").read_text() == "x\n"
    pid = read_pid(tmp_path / "pid")    # 0 when it was stopped before it could write
    assert pid == 0 or not alive(pid)


async def test_a_last_line_of_an_earlier_run_is_not_taken_for_the_reason(tmp_path: Path) -> None:
    silent = script(tmp_path, "silent", "exit 2")
    silent.log.write_text("all was well\n")
    with pytest.raises(GaveUp, match=r"silent refuses to start: \(no output"):
        await supervisor(silent).run()


async def test_a_process_that_never_stays_up_is_given_up_after_so_many_crashes(tmp_path: Path) -> None:
    with pytest.raises(GaveUp, match=r"worker ended 4 times, with exit status 1: boom") as caught:
        await supervisor(script(tmp_path, "worker", "echo x >> starts; echo boom; exit 1")).run()
    assert caught.value.status == 1
    assert (tmp_path / "starts").read_text() == "x\n" * 4


async def test_crashes_far_apart_never_add_up(tmp_path: Path) -> None:
    clock = ManualClock()
    policy = Policy(first_pause_s=0.0, stable_s=30.0, crashes=2, grace_s=5.0)
    kept = Supervisor([script(tmp_path, "worker", "exec sleep 60")], policy, clock, lambda: None)
    run = asyncio.create_task(kept.run())
    for restarts in range(4):
        await eventually(lambda wanted=restarts: kept.states[0].restarts == wanted and kept.states[0].pid > 0)
        clock.advance(31.0)
        os.kill(kept.states[0].pid, signal.SIGKILL)
    await eventually(lambda: kept.states[0].restarts == 4)
    kept.stop()
    await run


async def test_the_lower_wave_has_ended_before_the_next_is_told(tmp_path: Path) -> None:
    trap = "trap 'echo {0} told >> order; sleep 0.1; echo {0} ended >> order; exit 0' TERM; echo > {0}.up; {1}"
    router = script(tmp_path, "router", trap.format("router", "sleep 60 & wait"), wave=0)
    worker = script(tmp_path, "worker", trap.format("worker", "sleep 60 & wait"), wave=1)
    kept = supervisor(worker, router)
    run = asyncio.create_task(kept.run())
    await eventually(lambda: (tmp_path / "router.up").exists() and (tmp_path / "worker.up").exists())
    kept.stop()
    await run
    assert (tmp_path / "order").read_text().split("\n")[:4] == [
        "router told", "router ended", "worker told", "worker ended",
    ]  # fmt: skip


async def test_a_process_that_ignores_sigterm_is_killed_after_the_grace(tmp_path: Path) -> None:
    stubborn = script(tmp_path, "worker", "trap '' TERM; echo $$ > pid; while true; do sleep 0.05; done")
    kept = supervisor(stubborn, policy=Policy(grace_s=0.1))
    run = asyncio.create_task(kept.run())
    await eventually(lambda: read_pid(tmp_path / "pid") > 0)
    kept.stop()
    await run
    assert not alive(read_pid(tmp_path / "pid"))


async def test_a_second_stop_does_not_wait_for_the_grace(tmp_path: Path) -> None:
    stopped = script(tmp_path, "worker", "echo $$ > pid; kill -STOP $$; sleep 60")
    kept = supervisor(stopped, policy=Policy(grace_s=3600.0))
    run = asyncio.create_task(kept.run())
    await eventually(lambda: read_pid(tmp_path / "pid") > 0)
    kept.stop()
    await asyncio.sleep(0.05)
    assert not run.done()
    kept.stop(now=True)
    await run
    assert not alive(read_pid(tmp_path / "pid"))


async def test_stopping_while_processes_are_being_started_leaves_none(tmp_path: Path) -> None:
    commands = [script(tmp_path, f"worker-{index}", f"echo $$ > pid-{index}; exec sleep 60") for index in range(4)]
    kept = supervisor(*commands)
    run = asyncio.create_task(kept.run())
    await asyncio.sleep(0)
    kept.stop()
    await run
    assert [state.pid for state in kept.states] == [0] * 4
    assert not any(alive(read_pid(path)) for path in tmp_path.glob("pid-*") if read_pid(path))


async def test_a_program_that_does_not_exist_is_reported(tmp_path: Path) -> None:
    missing = Command(
        name="worker", role="decode", argv=("/nonexistent/program",), environment={}, address="", wave=0,
        log=tmp_path / "worker.log",
    )  # fmt: skip
    with pytest.raises(GaveUp, match=r"worker ended 4 times.*No such file"):
        await supervisor(missing).run()


SUPERVISE = """
import asyncio, sys
from pathlib import Path
from cli.support import QUICK, script
from baton.supervisor import Supervisor
from baton_common.clock import SystemClock
folder = Path(sys.argv[1])
children = [script(folder, f"child-{i}", f"trap '' TERM; echo $$ > pid-{i}; exec sleep 60") for i in range(3)]
asyncio.run(Supervisor(children, QUICK, SystemClock(), lambda: None).run())
"""


async def test_kill_9_of_the_supervisor_leaves_no_process_behind(tmp_path: Path) -> None:
    tests = Path(__file__).resolve().parents[1]
    parent = subprocess.Popen(
        [sys.executable, "-c", SUPERVISE, str(tmp_path)], env={**os.environ, "PYTHONPATH": str(tests)}
    )
    try:
        files = [tmp_path / f"pid-{index}" for index in range(3)]
        await eventually(lambda: all(read_pid(file) for file in files))
        pids = [read_pid(file) for file in files]
        assert all(alive(pid) for pid in pids)
    finally:
        parent.kill()
        parent.wait()
    await eventually(lambda: not any(alive(pid) for pid in pids))
