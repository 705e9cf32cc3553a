"""The state folder: who runs, and which service a command means."""

import subprocess
import sys
from pathlib import Path

import pytest

from baton.state import (
    AlreadyRunning,
    Life,
    Phase,
    ProcessState,
    ServiceState,
    StateDir,
    find_running,
    running,
    state_dir,
    state_home,
)
from baton_common.errors import ConfigError


def service(home: Path, name: str) -> StateDir:
    folder = state_dir(home, name)
    folder.logs.mkdir(parents=True)
    return folder


ROUTER = ProcessState(name="router", role="router", address="127.0.0.1:8000", log="/l", life=Life.RUNNING, pid=8)
STATE = ServiceState(
    name="a", phase=Phase.READY, note="", url="http://127.0.0.1:8000", model="m", pid=7, started_s=1.5,
    processes=(ROUTER,),
)  # fmt: skip


def test_a_service_runs_while_the_lock_is_held_and_no_longer(tmp_path: Path) -> None:
    folder = service(tmp_path, "a")
    assert not folder.is_running()
    with folder.locked():
        assert folder.is_running()
        assert [found.name for found in running(tmp_path)] == ["a"]
        with pytest.raises(AlreadyRunning, match="baton down --name a"), folder.locked():
            pass
    assert not folder.is_running()


def test_a_lock_dies_with_its_process_however_it_dies(tmp_path: Path) -> None:
    folder = service(tmp_path, "a")
    program = (
        "import sys, time; from pathlib import Path; from baton.state import state_dir\n"
        "with state_dir(Path(sys.argv[1]), 'a').locked(): print('held', flush=True); time.sleep(60)"
    )
    with subprocess.Popen([sys.executable, "-c", program, str(tmp_path)], stdout=subprocess.PIPE) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == b"held\n"
        assert folder.is_running()
        holder.kill()
    assert not folder.is_running()


def test_what_is_written_is_read_again(tmp_path: Path) -> None:
    folder = service(tmp_path, "a")
    folder.write(STATE)
    assert folder.read() == STATE
    folder.forget()
    assert folder.read() is None


def test_a_state_of_another_version_is_no_state(tmp_path: Path) -> None:
    folder = service(tmp_path, "a")
    (folder.path / "state.json").write_text('{"name": "a"}')
    assert folder.read() is None


def test_without_a_name_the_default_or_the_only_service_is_meant(tmp_path: Path) -> None:
    assert find_running(tmp_path, None) is None
    with service(tmp_path, "a").locked():
        assert find_running(tmp_path, None) == state_dir(tmp_path, "a")
        assert find_running(tmp_path, "b") is None
        with service(tmp_path, "b").locked():
            with pytest.raises(ConfigError, match="a, b"):
                find_running(tmp_path, None)
            with service(tmp_path, "default").locked():
                assert find_running(tmp_path, None) == state_dir(tmp_path, "default")


@pytest.mark.parametrize("name", ["", "../x", "A", "a b", "-a", "a" * 64])
def test_a_name_that_could_leave_its_folder_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(ConfigError, match="--name"):
        state_dir(tmp_path, name)


def test_the_state_home_follows_the_xdg_rule() -> None:
    assert state_home({"XDG_STATE_HOME": "/x"}) == Path("/x/baton")
    assert state_home({"XDG_STATE_HOME": "relative"}) == state_home({}) == Path.home() / ".local/state/baton"
