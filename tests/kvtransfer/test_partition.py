"""Hosts that lose each other: two network namespaces, and a switch between them that drops everything, and heals."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Iterator

import pytest
from support.kv_netns import Net, network, serve_inside
from support.kv_processes import PAGES_USED, TOKENS, Process
from support.kv_wires import over
from support.kv_world import eventually

pytestmark = pytest.mark.slow

SILENT = ("PeerGone", "DeadlineExceeded")
HEALING_S = 30.0


@pytest.fixture(scope="module")
def net() -> Iterator[Net]:
    if os.geteuid() != 0 or shutil.which("ip") is None:
        pytest.skip("network namespaces need root and the command ip")
    try:
        made = network()
        inside = made.__enter__()
    except OSError as error:
        pytest.skip(f"this system has no network namespaces for us: {error}")
    yield inside
    made.__exit__(None, None, None)


def peer(net: Net, host: str, name: str, incarnation: str, wire: str) -> Process:
    return Process(name, incarnation, wire, net.namespace(host), net.address(host), target=serve_inside)


def begin(source: Process, target: Process, name: str, *, everything: bool, incarnation: str = "") -> None:
    target.tell(do="expect", id=name, pages=PAGES_USED, tokens=TOKENS)
    assert target.hear() == {"expected": name}
    source.tell(
        do="send", id=name, pages=PAGES_USED, tokens=TOKENS, all=everything, address=target.address,
        incarnation=incarnation or target.incarnation,
    )  # fmt: skip
    assert source.hear() == {"sending": name}


def look(process: Process, name: str) -> tuple[int, str]:
    """Whether its first chunk came, and how it ended."""
    process.tell(do="look", id=name)
    seen = process.hear()
    return int(str(seen["receiving"])), str(seen["kind"])


def works(source: Process, target: Process, name: str) -> bool:
    begin(source, target, name, everything=True)
    return source.hear() == {"ended": "Receipt", "ok": True}


@pytest.mark.parametrize("wire", over("tcp", "nixl"))
def test_a_partition_is_a_typed_error_on_both_sides_and_a_new_link_works_once_it_healed(net: Net, wire: str) -> None:
    sender, receiver = peer(net, "left", "p", "p-1", wire), peer(net, "right", "d", "d-1", wire)
    neighbour = peer(net, "left", "n", "n-1", wire)
    processes = [sender, receiver, neighbour]
    try:
        assert works(sender, receiver, "before")
        begin(sender, receiver, "cut", everything=False)
        eventually(lambda: look(receiver, "cut")[0] == 1, "chunks arrive")
        net.part()
        assert sender.hear()["ended"] in SILENT
        eventually(lambda: look(receiver, "cut")[1] in SILENT, "the receiver's owner is told")

        assert works(sender, neighbour, "elsewhere"), "survivors go on"
        begin(sender, receiver, "too early", everything=True)
        assert sender.hear()["ok"] is False

        net.heal()
        end_s, tries = time.monotonic() + HEALING_S, 0
        while not works(sender, receiver, f"again {tries}"):
            assert time.monotonic() < end_s, "the healed network is not used"
            tries += 1
        receiver.end()
        receiver = peer(net, "right", "d", "d-2", wire)
        processes.append(receiver)
        begin(sender, receiver, "stale", everything=True, incarnation="d-1")
        assert sender.hear() == {"ended": "StalePeer", "ok": False}
        assert works(sender, receiver, "anew")
    finally:
        net.heal()
        for process in processes:
            process.end()
