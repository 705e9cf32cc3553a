"""Which wire two workers take, why, and what they say about those they do not have."""

from __future__ import annotations

from pathlib import Path

import pytest
from support.kv_wires import ONESIDED, needs, over
from support.kv_world import Run, Side, World, setting

from baton_kvtransfer import Receipt, TransferConfig
from baton_kvtransfer.errors import LayoutMismatch, WireError
from baton_kvtransfer.transport import Address, SocketTransport
from baton_kvtransfer.wires.choice import choose, has_rdma, skipped
from baton_kvtransfer.wires.oneside import mooncake, nixl
from baton_kvtransfer.wires.oneside.wire import OnesideWire

AUTO = TransferConfig(slot_bytes=4096, slots_per_peer=4)


@pytest.fixture
def no_libraries(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nixl, "MODULES", ("no_nixl_here",))
    monkeypatch.setattr(mooncake, "MODULE", "no_mooncake_here.engine")


def elsewhere(side: Side) -> str:
    """The side's address, as a peer on another host sees it."""
    address = Address.parse(side.address)
    return str(Address(host=address.host, port=address.port, unix=address.unix, host_id="elsewhere"))


def from_elsewhere(world: World) -> Run:
    run = world.start(0, 40, address=elsewhere(world.receiver))
    run.announce()
    run.finish()
    return run


class Radio(World):
    """Both sides believe what they are told about RDMA devices."""

    def __init__(self, *, sender: bool, receiver: bool) -> None:
        self._rdma = {"p": sender, "d": receiver}
        super().__init__("shm", sender_config=AUTO, receiver_config=AUTO)

    def side(self, name: str, config: TransferConfig, *_: object, **__: object) -> Side:
        return Side(name, config=config, transport=SocketTransport(config, rdma=self._rdma[name]))


@pytest.mark.parametrize(
    ("sender", "receiver", "wire"),
    [
        pytest.param(True, True, "nixl", marks=needs("nixl")),
        pytest.param(True, False, "tcp", marks=needs("nixl")),
        (False, True, "tcp"),
        (False, False, "tcp"),
    ],
)
def test_two_hosts_take_nixl_when_both_have_rdma(sender: bool, receiver: bool, wire: str) -> None:
    world = Radio(sender=sender, receiver=receiver)
    run = from_elsewhere(world)
    receipt = run.received.wait()
    assert isinstance(receipt, Receipt)
    assert receipt.wire == wire
    world.check_arrived(run)
    world.close()


@pytest.mark.parametrize("wire", over("shm"))
def test_one_host_takes_shm_with_or_without_rdma(wire: str) -> None:
    world = Radio(sender=True, receiver=True)
    receipt = world.send(0, 40).received.wait()
    assert isinstance(receipt, Receipt)
    assert receipt.wire == wire
    world.close()


@pytest.mark.usefixtures("no_libraries")
def test_auto_goes_on_without_the_libraries_and_the_peer_list_says_why() -> None:
    world = Radio(sender=True, receiver=True)
    receipt = from_elsewhere(world).received.wait()
    assert isinstance(receipt, Receipt)
    assert receipt.wire == "tcp"
    (info,) = world.sender.endpoint.peers()
    assert "nixl is left out: its library is not installed; pip install 'baton[nixl]'" in info.reason
    world.close()


@pytest.mark.usefixtures("no_libraries")
@pytest.mark.parametrize("wire", ONESIDED)
def test_a_wire_by_name_without_its_library_is_an_error_with_the_command(wire: str) -> None:
    with pytest.raises(WireError, match=rf"the {wire} wire .*no_{wire}_here.*pip install 'baton\[{wire}\]'"):
        SocketTransport(TransferConfig(wire=setting(wire)))


def test_a_library_that_breaks_while_it_loads_is_left_out_with_its_own_words(monkeypatch: pytest.MonkeyPatch) -> None:
    def load() -> None:
        raise ImportError("libibverbs.so.1: cannot open shared object file")

    monkeypatch.setattr(nixl, "load", load)
    choice = choose(AUTO, rdma=True)
    assert list(choice.wires) == ["shm", "tcp"]
    if not skipped("nixl", rdma=True):
        assert "libibverbs.so.1" in choice.skipped["nixl"]


def test_auto_leaves_out_a_wire_whose_devices_cannot_be_opened_and_a_name_insists(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fail(_: OnesideWire) -> None:
        raise WireError("NIXL cannot start: no usable device")

    monkeypatch.setattr(nixl, "load", lambda: None)
    monkeypatch.setattr(nixl, "MODULES", ("json",))
    monkeypatch.setattr(OnesideWire, "start", fail)
    transport = SocketTransport(AUTO, rdma=True)
    assert "nixl" in transport.wires
    transport.listen().close()
    assert list(transport.wires) == ["shm", "tcp"]
    with pytest.raises(WireError, match="no usable device"):
        SocketTransport(TransferConfig(wire="nixl")).listen()


def test_every_wire_is_offered_or_left_out_with_a_reason() -> None:
    for rdma in (False, True):
        choice = choose(AUTO, rdma=rdma)
        assert {*choice.wires, *choice.skipped} == {"shm", "nixl", "mooncake", "tcp"}
        assert all(choice.skipped.values())
        assert list(choice.wires)[-1] == "tcp"


@pytest.mark.parametrize("wire", over(*ONESIDED))
def test_peers_that_insist_on_different_wires_are_told_both(wire: str) -> None:
    world = World(wire, receiver_config=TransferConfig(wire="tcp", slot_bytes=4096))
    error = world.start(0, 20).sent.wait()
    assert isinstance(error, LayoutMismatch)
    assert (error.field, error.ours, error.theirs) == ("wires", wire, "tcp")
    world.close()


def test_rdma_is_a_device_that_can_be_opened(tmp_path: Path) -> None:
    assert not has_rdma(tmp_path / "absent")
    assert not has_rdma(tmp_path)
    (tmp_path / "uverbs0").write_bytes(b"")
    assert has_rdma(tmp_path)
