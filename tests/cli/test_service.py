"""One service from start to end, with scripts for processes and a scripted answer for readiness."""

import asyncio
import io
import socket
from collections.abc import Callable
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import pytest
from cli.support import QUICK, eventually, script
from rich.console import Console

from baton.deployment import Deployment
from baton.ports import can_listen, free_ports
from baton.readiness import Readiness, ask
from baton.service import Machine, Service, prepare
from baton.state import Life, Phase, ServiceState, StateDir, state_dir
from baton.supervisor import Command
from baton.view import Board, Lines
from baton_common.clock import SystemClock
from baton_common.errors import ConfigError

READY = Readiness(ready=True, reason="")


def not_ready(reason: str) -> Readiness:
    return Readiness(ready=False, reason=reason)


class Scene:
    """A service whose readiness is `answer`; remembers every state it was shown."""

    def __init__(self, folder: StateDir, *commands: Command, ready_timeout_s: float = 60.0) -> None:
        folder.logs.mkdir(parents=True, exist_ok=True)
        self.answer = not_ready("no decode worker")
        self.shown: list[ServiceState] = []
        self.folder = folder
        self.service = Service(
            folder=folder, model="m", url="http://127.0.0.1:1", commands=commands, policy=QUICK, clock=SystemClock(),
            pid=1, started_s=0.0, view=self.shown.append, ready_timeout_s=ready_timeout_s,
            is_ready=lambda url, timeout_s: self.answer,
        )  # fmt: skip

    @property
    def phases(self) -> list[Phase]:
        """Without repetitions."""
        phases = [state.phase for state in self.shown]
        return [phase for index, phase in enumerate(phases) if index == 0 or phases[index - 1] is not phase]

    def saw(self, phase: Phase) -> Callable[[], bool]:
        return lambda: self.shown[-1].phase is phase if self.shown else False


@pytest.fixture
def folder(tmp_path: Path) -> StateDir:
    return state_dir(tmp_path / "state", "test")


async def test_a_service_starts_becomes_ready_and_stops(folder: StateDir, tmp_path: Path) -> None:
    scene = Scene(folder, script(tmp_path, "worker", "exec sleep 60"))
    run = asyncio.create_task(scene.service.run())
    await eventually(lambda: any(state.note == "no decode worker" for state in scene.shown))
    scene.answer = READY
    await eventually(scene.saw(Phase.READY))
    scene.service.stop()
    assert await run == 0
    assert scene.phases == [Phase.STARTING, Phase.READY, Phase.STOPPING, Phase.STOPPED]
    assert folder.read() == scene.shown[-1]
    assert scene.shown[-1].processes[0].life is Life.STOPPED


async def test_a_service_that_is_ready_no_longer_is_degraded_and_says_why(folder: StateDir, tmp_path: Path) -> None:
    scene = Scene(folder, script(tmp_path, "worker", "exec sleep 60"))
    scene.answer = READY
    run = asyncio.create_task(scene.service.run())
    await eventually(scene.saw(Phase.READY))
    scene.answer = not_ready("prefill-0 is gone")
    await eventually(scene.saw(Phase.DEGRADED))
    assert scene.shown[-1].note == "prefill-0 is gone"
    scene.answer = READY
    await eventually(scene.saw(Phase.READY))
    scene.service.stop()
    await run


async def test_workers_are_called_by_name_in_what_the_router_says(folder: StateDir, tmp_path: Path) -> None:
    worker = script(tmp_path, "decode-0", "exec sleep 60")
    scene = Scene(folder, worker)
    scene.answer = not_ready(f"worker {worker.address}: connecting")
    run = asyncio.create_task(scene.service.run())
    await eventually(lambda: any(state.note == "decode-0: connecting" for state in scene.shown))
    scene.service.stop()
    await run


async def test_a_configuration_error_fails_the_service_with_its_line(folder: StateDir, tmp_path: Path) -> None:
    scene = Scene(folder, script(tmp_path, "worker", "echo 'no tokenizer.json in /m'; exit 2"))
    assert await scene.service.run() == 2
    assert scene.shown[-1].phase is Phase.FAILED
    assert scene.shown[-1].note == "worker refuses to start: no tokenizer.json in /m"


async def test_a_service_that_is_not_ready_in_time_is_stopped_and_says_why(folder: StateDir, tmp_path: Path) -> None:
    scene = Scene(folder, script(tmp_path, "worker", "exec sleep 60"), ready_timeout_s=0.0)
    assert await scene.service.run() == 1
    assert scene.shown[-1].phase is Phase.FAILED
    assert "no decode worker" in scene.shown[-1].note
    assert str(folder.logs) in scene.shown[-1].note


async def test_a_router_that_does_not_answer_is_not_ready() -> None:
    [port] = free_ports(1, host="127.0.0.1", first=21000)
    answer = await asyncio.to_thread(ask, f"http://127.0.0.1:{port}", 1.0)
    assert not answer.ready
    assert "does not answer" in answer.reason


@pytest.mark.parametrize(
    ("status", "body", "reason"),
    [
        ("200 OK", b'{"ready": true}', ""),
        ("503 Service Unavailable", b'{"ready": false, "reasons": ["no decode worker", "x"]}', "no decode worker; x"),
        ("503 Service Unavailable", b"<html>", "the router gives no reason"),
        ("503 Service Unavailable", b'{"ready": false}', "no reason given"),
    ],
)
async def test_the_reason_of_the_router_is_passed_on(status: str, body: bytes, reason: str) -> None:
    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(f"HTTP/1.1 {status}\r\nContent-Length: {len(body)}\r\n\r\n".encode() + body)
        await writer.drain()
        writer.close()

    server = await asyncio.start_server(answer, "127.0.0.1", 0)
    async with server:
        port = server.sockets[0].getsockname()[1]
        assert await asyncio.to_thread(ask, f"http://127.0.0.1:{port}", 5.0) == Readiness(
            ready=status.startswith("200"), reason=reason
        )


def machine(scripts: Path) -> Machine:
    for name in ("baton-router", "baton-prefill", "baton-decode"):
        (scripts / name).touch()
    return Machine(scripts=scripts, cores=2, environment={})


def test_a_taken_port_is_reported_before_anything_is_started(folder: StateDir, tmp_path: Path) -> None:
    with closing(socket.socket()) as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert not can_listen("127.0.0.1", port)
        with pytest.raises(ConfigError, match=f"port {port} on 127.0.0.1 is in use; choose another with --port"):
            prepare(Deployment(model="/m", served_name="m", port=port), folder, machine(tmp_path))


def test_a_host_that_is_not_ours_is_reported() -> None:
    with pytest.raises(ConfigError, match=r"--host no\.such\.host"):
        can_listen("no.such.host.invalid", 8000)


def test_workers_get_ports_that_are_free(folder: StateDir, tmp_path: Path) -> None:
    [port] = free_ports(1, host="127.0.0.1", first=21100)
    wanted = Deployment(model="/m", served_name="m", port=port)
    with closing(socket.socket()) as taken:
        taken.bind(("127.0.0.1", free_ports(1, host="127.0.0.1", first=wanted.first_worker_port)[0]))
        taken.listen()
        workers = [command.address for command in prepare(wanted, folder, machine(tmp_path))[1:]]
        assert f"127.0.0.1:{taken.getsockname()[1]}" not in workers
        assert len(set(workers)) == 2


def test_missing_programs_are_named(folder: StateDir, tmp_path: Path) -> None:
    [port] = free_ports(1, host="127.0.0.1", first=21200)
    bare = Machine(scripts=tmp_path / "empty", cores=2, environment={})
    with pytest.raises(ConfigError, match="baton-router, baton-prefill, baton-decode not found"):
        prepare(Deployment(model="/m", served_name="m", port=port), folder, bare)


def test_lines_tell_each_change_once_and_end_with_what_to_type() -> None:
    out = io.StringIO()
    lines = Lines(Console(file=out, width=200), hint="  baton chat\n")
    from_scene = ServiceState(
        name="t", phase=Phase.STARTING, note="", url="http://127.0.0.1:8000", model="m", pid=1, started_s=0.0,
        processes=(),
    )  # fmt: skip
    waiting = replace(from_scene, note="no decode worker")
    for state in (from_scene, waiting, waiting, replace(from_scene, phase=Phase.READY)):
        lines.show(state)
    text = out.getvalue()
    assert text.count("no decode worker") == 1
    assert "baton: ready: http://127.0.0.1:8000" in text
    assert "curl http://127.0.0.1:8000/v1/chat/completions" in text
    assert text.rstrip().endswith("baton chat")


def test_the_board_shows_processes_and_why_it_waits() -> None:
    out = io.StringIO()
    state = ServiceState(
        name="t", phase=Phase.STARTING, note="no decode worker", url="http://127.0.0.1:8000", model="m", pid=1,
        started_s=0.0, processes=(),
    )  # fmt: skip
    with Board(Console(file=out, width=120, force_terminal=True)) as board:
        board.show(state)
    assert "no decode worker" in out.getvalue()
