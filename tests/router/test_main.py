"""The process: what it imports, what it refuses, how it stops."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import openai
import pytest
from router.fake_worker import Cluster, FakeWorker

from baton_common.errors import ConfigError
from baton_proto import worker_pb2 as wire
from baton_router.checkpoint import load_checkpoint
from baton_router.config import RouterConfig, split_address
from baton_router.main import bind, main


def test_importing_the_router_loads_no_tensor_library() -> None:
    code = (
        "import sys, baton_router.main, baton_router.api.app;"
        "print([name for name in ('torch', 'numpy', 'transformers') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout.strip() == "[]"


def test_a_taken_port_is_one_clear_line(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert main(["--model", str(folder), "--workers", "a:1", "--listen", f"127.0.0.1:{port}"]) == 2
    error = capsys.readouterr().err.strip().splitlines()
    assert len(error) == 1
    assert f"port {port}" in error[0]
    assert "in use" in error[0]


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        (["--workers", "a:1"], "model"),
        (["--workers", "a:1", "--model", "/nowhere"], "/nowhere"),
        (["--workers", "a:1", "--model", "{folder}", "--listen", "nonsense"], "listen"),
        (["--workers", "a:1", "--model", "{folder}", "--max-inflight", "many"], "max_inflight"),
        (["--workers", "a:1", "--model", "{folder}", "--listen", "256.1.1.1:80"], "256.1.1.1"),
        (["--model", "{folder}"], "--worker-services"),
        (["--model", "{folder}", "--workers", "a:1", "--worker-services", "chat-decode"], "both"),
        (["--model", "{folder}", "--worker-services", "chat-decode", "--kubeconfig", "/nowhere"], "/nowhere"),
    ],
)
def test_bad_settings_refuse_the_start_with_one_line(
    folder: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], word: str
) -> None:
    assert main([item.replace("{folder}", str(folder)) for item in arguments]) == 2
    error = capsys.readouterr().err.strip().splitlines()
    assert len(error) == 1
    assert word in error[0]


def test_a_checkpoint_without_tokeniser_is_refused(folder: Path, tmp_path: Path) -> None:
    shutil.copy(folder / "config.json", tmp_path)
    with pytest.raises(ConfigError, match=r"tokenizer\.json"):
        load_checkpoint(str(tmp_path))
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ConfigError, match="cannot be read"):
        load_checkpoint(str(tmp_path))


def test_a_template_file_wins_over_the_tokenisers_own(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder, tmp_path / "model")
    (tmp_path / "model" / "chat_template.jinja").write_text("{{ bos_token }}FILE")
    template = load_checkpoint(str(tmp_path / "model")).template
    assert template is not None
    assert template.render([]) == "<|bos|>FILE"


def test_addresses_are_host_and_port() -> None:
    assert split_address("0.0.0.0:80") == ("0.0.0.0", 80)
    assert split_address("[::1]:80") == ("::1", 80)
    for wrong in ("80", ":80", "host", "host:http", "host:70000"):
        with pytest.raises(ConfigError):
            split_address(wrong)


def test_a_bound_port_is_free_again_after_closing() -> None:
    first = bind("127.0.0.1:0")
    port = first.getsockname()[1]
    first.close()
    bind(f"127.0.0.1:{port}").close()


def test_settings_have_descriptions() -> None:
    from baton_common.settings import describe  # noqa: PLC0415

    assert all(describe(RouterConfig).values())


@pytest.mark.process
def test_the_process_serves_and_stops_with_zero_on_sigterm(folder: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    process = subprocess.Popen(
        [sys.executable, "-m", "baton_router", "--model", str(folder), "--listen", f"127.0.0.1:{port}"],
        stderr=subprocess.PIPE, text=True, env={**os.environ, "BATON_ROUTER_WORKERS": "127.0.0.1:1"},
    )  # fmt: skip
    try:
        end_s = time.monotonic() + 30
        while True:
            try:
                with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5) as answer:
                    assert json.load(answer)["status"] == "ok"
                break
            except OSError:
                assert time.monotonic() < end_s, "the router did not come up"
                time.sleep(0.05)
        process.send_signal(signal.SIGTERM)
        assert process.wait(15) == 0
    finally:
        process.kill()
        _, log = process.communicate()
    assert "Traceback" not in log


@pytest.mark.process
async def test_sigterm_lets_an_open_stream_finish(folder: Path) -> None:
    worker = await FakeWorker(wire.ROLE_COLOCATED, Cluster(), tick_s=0.02).start()
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "baton_router", "--model", str(folder), "--listen", f"127.0.0.1:{port}",
        "--workers", worker.address, "--worker-wait-s", "20", "--served-name", "m", stderr=subprocess.DEVNULL,
    )  # fmt: skip
    try:
        client = openai.AsyncOpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="x", max_retries=0)
        async with asyncio.timeout(60):
            while True:
                try:
                    stream = await client.completions.create(model="m", prompt=[100], max_tokens=40, stream=True)
                    break
                except openai.APIConnectionError:
                    await asyncio.sleep(0.1)
            first = await anext(stream)
            process.send_signal(signal.SIGTERM)
            rest = [chunk async for chunk in stream]
            assert first.choices[0].finish_reason is None
            assert rest[-1].choices[0].finish_reason == "length"
            assert await process.wait() == 0
    finally:
        if process.returncode is None:
            process.kill()
        await worker.stop()
