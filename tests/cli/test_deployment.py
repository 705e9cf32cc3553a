"""From options and service files to command lines."""

from collections.abc import Sequence
from pathlib import Path

import pytest

from baton.deployment import Deployment
from baton.request import DEMO_NAME, LIBRARIES, UpOptions, deployment, service_name
from baton.supervisor import Command
from baton_common.checkpoint import demo_checkpoint
from baton_common.errors import ConfigError
from baton_kvtransfer.wires.oneside import mooncake, nixl
from baton_operator.plan.blueprint import Tiers
from baton_worker.tiering import parse_tiers

SERVICE = """\
apiVersion: serving.baton.dev/v1alpha1
kind: InferenceService
metadata: {name: mine}
spec:
  model: {uri: "file://./weights", servedName: tiny, dtype: float32, kvDtype: auto, contextTokens: 512}
  prefill: {replicas: 2}
  transport: {wire: tcp}
  router: {port: 8123}
"""


@pytest.fixture
def service(tmp_path: Path) -> Path:
    (tmp_path / "weights").mkdir()
    (tmp_path / "weights" / "config.json").write_text("{}")
    file = tmp_path / "service.yaml"
    file.write_text(SERVICE)
    return file


def commands(wanted: Deployment, ports: Sequence[int], *, cores: int = 8) -> dict[str, Command]:
    made = wanted.commands(
        worker_ports=ports, scripts=Path("/bin"), logs=Path("/logs"), pages=Path("/kv"), cores=cores,
        environment={"HOME": "/root"},
    )  # fmt: skip
    return {command.name: command for command in made}


def flag(command: Command, name: str) -> str | None:
    pairs = dict(zip(command.argv[1::2], command.argv[2::2], strict=True))
    return pairs.get(f"--{name}")


def test_the_router_knows_every_worker_and_each_has_a_port_and_a_name_of_its_own() -> None:
    made = commands(Deployment(model="/m", served_name="m", prefill=2, decode=1), (5, 6, 7))
    assert list(made) == ["router", "prefill-0", "prefill-1", "decode-0"]
    assert flag(made["router"], "workers") == "127.0.0.1:5,127.0.0.1:6,127.0.0.1:7"
    assert [flag(made[name], "listen") for name in made] == [
        "127.0.0.1:8000", "127.0.0.1:5", "127.0.0.1:6", "127.0.0.1:7",
    ]  # fmt: skip
    assert [made[name].argv[0] for name in made] == [
        "/bin/baton-router", "/bin/baton-prefill", "/bin/baton-prefill", "/bin/baton-decode",
    ]  # fmt: skip
    assert flag(made["decode-0"], "worker-id") == "decode-0"
    assert flag(made["decode-0"], "model-name") == flag(made["router"], "served-name") == "m"


def test_a_colocated_worker_is_the_decode_program_in_that_role() -> None:
    made = commands(Deployment(model="/m", served_name="m", prefill=0, decode=0, colocated=1), (5,))
    assert made["colocated-0"].argv[0] == "/bin/baton-decode"
    assert flag(made["colocated-0"], "role") == "colocated"


def test_the_router_stops_before_its_workers() -> None:
    made = commands(Deployment(model="/m", served_name="m"), (5, 6))
    assert made["router"].wave < made["prefill-0"].wave == made["decode-0"].wave


@pytest.mark.parametrize(("cores", "threads"), [(8, "4"), (3, "1"), (1, "1")])
def test_workers_share_the_cores_between_them(cores: int, threads: str) -> None:
    made = commands(Deployment(model="/m", served_name="m"), (5, 6), cores=cores)
    assert flag(made["prefill-0"], "threads") == flag(made["decode-0"], "threads") == threads
    assert made["prefill-0"].environment["OMP_NUM_THREADS"] == threads


def test_what_was_not_asked_for_is_left_to_the_components() -> None:
    made = commands(Deployment(model="/m", served_name="m"), (5, 6))
    optional = ("device", "dtype", "kv-dtype", "context-tokens", "wire", "tiers", "otlp-endpoint")
    assert {flag(made["decode-0"], name) for name in optional} == {None}
    asked = commands(Deployment(model="/m", served_name="m", wire="tcp", dtype="float32", context_tokens=512), (5, 6))
    assert flag(asked["prefill-0"], "wire") == "tcp"
    assert flag(asked["decode-0"], "dtype") == "float32"
    assert flag(asked["decode-0"], "context-tokens") == "512"


def test_every_worker_keeps_pages_in_a_folder_of_its_own() -> None:
    tiers = Tiers(host_bytes=1 << 30, disk_bytes=10 << 30, disk_class="fast")
    made = commands(Deployment(model="/m", served_name="m", prefill=2, tiers=tiers), (5, 6, 7))
    texts = [flag(made[name], "tiers") for name in made if name != "router"]
    assert texts == [f"host=1GiB,file=/kv/{name}:9GiB" for name in ("prefill-0", "prefill-1", "decode-0")]
    assert all(parse_tiers(text or "").folder_bytes == 9 << 30 for text in texts)
    assert flag(made["router"], "tiers") is None


def test_spans_of_every_process_go_to_the_collector_of_the_file(service: Path) -> None:
    service.write_text(f"{SERVICE}  tracing: {{endpoint: 'http://localhost:4318'}}\n")
    wanted = deployment(UpOptions(target=str(service)))
    made = commands(wanted, (5, 6, 7))
    assert {flag(command, "otlp-endpoint") for command in made.values()} == {"http://localhost:4318"}


def test_a_settings_file_reaches_every_process() -> None:
    made = commands(Deployment(model="/m", served_name="m", config=Path("/s.yaml")), (5, 6))
    assert {flag(command, "config") for command in made.values()} == {"/s.yaml"}


@pytest.mark.parametrize(("prefill", "decode", "colocated"), [(1, 0, 0), (0, 1, 1), (0, 0, 0)])
def test_a_set_of_workers_that_cannot_serve_is_refused(prefill: int, decode: int, colocated: int) -> None:
    with pytest.raises(ConfigError, match="--colocated"):
        Deployment(model="/m", served_name="m", prefill=prefill, decode=decode, colocated=colocated)


@pytest.mark.parametrize(
    ("host", "url"),
    [("127.0.0.1", "http://127.0.0.1:80"), ("0.0.0.0", "http://127.0.0.1:80"), ("::", "http://[::1]:80"),
     ("::1", "http://[::1]:80"), ("10.0.0.7", "http://10.0.0.7:80")],
)  # fmt: skip
def test_the_url_is_one_that_can_be_called(host: str, url: str) -> None:
    assert Deployment(model="/m", served_name="m", host=host, port=80).url == url


def test_a_service_file_gives_the_deployment_and_the_name(service: Path) -> None:
    options = UpOptions(target=str(service))
    wanted = deployment(options)
    assert wanted.model == str(service.parent / "weights")
    assert (wanted.served_name, wanted.dtype, wanted.kv_dtype, wanted.context_tokens) == ("tiny", "float32", None, 512)
    assert (wanted.prefill, wanted.decode, wanted.wire, wanted.port) == (2, 1, "tcp", 8123)
    assert service_name(options, "default") == "mine"


def test_a_flag_wins_over_the_service_file(service: Path) -> None:
    file = str(service)
    options = UpOptions(target=file, prefill=1, port=9999, dtype="bfloat16", wire="shm", served_name="x", name="n")
    wanted = deployment(options)
    assert (wanted.prefill, wanted.port, wanted.dtype, wanted.wire) == (1, 9999, "bfloat16", "shm")
    assert (wanted.served_name, service_name(options, "default")) == ("x", "n")


def test_a_service_file_gives_the_tiers(service: Path) -> None:
    assert deployment(UpOptions(target=str(service))).tiers is None
    service.write_text(f"{SERVICE}  cache: {{hostMemory: 1Gi, disk: {{size: 2Gi}}, sessions: {{quota: 256Mi}}}}\n")
    wanted = deployment(UpOptions(target=str(service))).tiers
    assert wanted == Tiers(host_bytes=1 << 30, disk_bytes=2 << 30, session_bytes=256 << 20)


@pytest.mark.parametrize("wire", sorted(LIBRARIES))
def test_a_wire_whose_library_is_missing_is_refused_with_the_command(
    service: Path, wire: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    service.write_text(SERVICE.replace("wire: tcp", f"wire: {wire}"))
    monkeypatch.setattr("baton.request.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=rf"pip install 'baton\[{wire}\]'"):
        deployment(UpOptions(target=str(service)))
    with pytest.raises(ConfigError, match=rf"pip install 'baton\[{wire}\]'"):
        deployment(UpOptions(wire=wire))
    assert deployment(UpOptions(target=str(service), wire="tcp")).wire == "tcp"
    monkeypatch.setattr("baton.request.find_spec", lambda name: name == LIBRARIES[wire][-1])
    assert deployment(UpOptions(target=str(service))).wire == wire


def test_the_libraries_are_those_of_the_wires() -> None:
    assert {"nixl": nixl.MODULES, "mooncake": (mooncake.MODULE.partition(".")[0],)} == LIBRARIES


def test_a_service_file_may_ask_for_the_demo_model(service: Path) -> None:
    service.write_text(SERVICE.replace('"file://./weights", servedName: tiny', '"baton://demo"'))
    wanted = deployment(UpOptions(target=str(service)))
    assert (wanted.model, wanted.served_name) == (str(demo_checkpoint()), DEMO_NAME)


def test_a_checkpoint_folder_is_served_under_its_own_name(service: Path) -> None:
    wanted = deployment(UpOptions(target=str(service.parent / "weights")))
    assert (wanted.served_name, wanted.prefill, wanted.decode) == ("weights", 1, 1)


def test_asking_only_for_colocated_workers_gives_no_others(service: Path) -> None:
    wanted = deployment(UpOptions(target=str(service.parent / "weights"), colocated=2))
    assert (wanted.prefill, wanted.decode, wanted.colocated) == (0, 0, 2)


def test_a_target_that_is_nothing_is_refused_with_what_it_could_be(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="checkpoint folder or a hub name"):
        deployment(UpOptions(target=str(tmp_path / "absent")))


def test_without_a_target_the_demo_model_is_served() -> None:
    wanted = deployment(UpOptions())
    assert wanted.served_name == DEMO_NAME
    assert Path(wanted.model) == demo_checkpoint()
