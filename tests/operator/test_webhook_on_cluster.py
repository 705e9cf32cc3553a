"""The chart's webhook on a real API server: refusals, warnings, its absence, and certificates that change meanwhile.

The API server calls the operator's process by a URL instead of by the Service; all else of the configuration is the
chart's. `failurePolicy` is Fail where a call that failed should not stay hidden.
"""

from __future__ import annotations

import base64
import json
import socket
import ssl
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from support.chart import NAMESPACE, helm, of_kind, one, render
from support.cluster import Cluster, control_plane, why_no_control_plane
from support.operator_process import Operator, until

from baton_operator import shipped
from baton_operator.crd import FOLDER

pytestmark = [pytest.mark.cluster, pytest.mark.slow, pytest.mark.timeout(300)]

ISVC = "/apis/serving.baton.dev/v1alpha1/namespaces/default/inferenceservices"
NAME = "baton-operator-webhook"
HOOK = f"/apis/admissionregistration.k8s.io/v1/validatingwebhookconfigurations/{NAMESPACE}-{NAME}"
SECRET = f"/api/v1/namespaces/{NAMESPACE}/secrets/{NAME}"
# seconds instead of months, in the proportions of the product
QUICK = """
import datetime, sys
from baton_operator.certificates import Lifetimes
from baton_operator.main import main
seconds = lambda count: datetime.timedelta(seconds=count)
sys.exit(main(lifetimes=Lifetimes(serving=seconds(20), authority=seconds(60), settle_s=1.5, check_s=0.5)))
"""


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    if reason := why_no_control_plane() or ("" if helm() else "no Helm"):
        pytest.skip(reason)
    with control_plane(tmp_path_factory.mktemp("webhook-cluster")) as found:
        found.apply(*sorted(FOLDER.glob("*.yaml")))
        found.apply(shipped.FOLDER / "cpu.yaml")
        found.kubectl("create", "namespace", NAMESPACE)
        yield found


@contextmanager
def installed(
    cluster: Cluster, folder: Path, *, replicas: int = 1, program: Sequence[str] = ("-m", "baton_operator.main"),
    policy: str = "Fail",
) -> Iterator[list[Operator]]:  # fmt: skip
    """The chart's Secret and configuration, and operators of which the first is the one that is called."""
    objects = render({})
    [secret] = [item for item in of_kind(objects, "Secret") if item["metadata"]["name"] == NAME]
    hooks = one(objects, "ValidatingWebhookConfiguration")
    assert {hook["failurePolicy"] for hook in hooks["webhooks"]} == {"Ignore"}
    ports = [free_port() for _ in range(replicas)]
    for hook in hooks["webhooks"]:
        hook["clientConfig"] = {"url": f"https://localhost:{ports[0]}/validate"}
        hook["failurePolicy"] = policy
    cluster.kubectl("apply", "--server-side", "-f", "-", stdin=json.dumps(secret))
    cluster.kubectl("apply", "--server-side", "-f", "-", stdin=json.dumps(hooks))
    made: list[Operator] = []
    try:
        for index, port in enumerate(ports):
            options = (
                "--webhook-port", str(port), "--webhook-name", NAME, "--lease-namespace", NAMESPACE, "--lease-s", "5",
                "--lease-renew-s", "4", "--lease-retry-s", "1",
            )  # fmt: skip
            made.append(Operator(
                cluster.kubeconfig, folder / f"operator-{index}.log", 19600 + 10 * index,
                images=("local/router:1", "local/worker:1"), options=options, program=program,
            ))  # fmt: skip
        for port in ports:
            until(lambda port=port: trusted(cluster, port), "a webhook that is trusted", 180)  # type: ignore[misc]
        until(lambda: apply(cluster, unfit("probe")).status == 422, "the API server calls it", 180)
        yield made
    finally:
        for operator in made:
            operator.kill()
        cluster.kubectl("delete", "-f", "-", stdin=json.dumps(hooks))
        cluster.kubectl("delete", "-f", "-", stdin=json.dumps(secret))
        cluster.kubectl("delete", "lease", "--all", "-n", NAMESPACE)
        for name in cluster.kubectl("get", "isvc", "-o", "name").split():
            cluster.kubectl("patch", name, "--type=merge", "-p", '{"metadata": {"finalizers": null}}')
            cluster.kubectl("delete", name, "--wait=false", "--ignore-not-found")


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])


def bundle(cluster: Cluster) -> str:
    [hook] = cluster.request("GET", HOOK).body["webhooks"]
    return base64.b64decode(hook["clientConfig"].get("caBundle", "")).decode()


def shown(cluster: Cluster, port: int) -> x509.Certificate:
    """What a new connection is shown, verified against the published bundle. Raises OSError."""
    context = ssl.create_default_context(cadata=bundle(cluster) or None)
    with (
        socket.create_connection(("localhost", port), timeout=10) as plain,
        context.wrap_socket(plain, server_hostname="localhost") as secured,
    ):
        found = secured.getpeercert(binary_form=True)
    assert found is not None
    return x509.load_der_x509_certificate(found)


def trusted(cluster: Cluster, port: int) -> bool:
    try:
        return bool(bundle(cluster)) and bool(shown(cluster, port))
    except OSError:
        return False


def service(name: str = "demo", *, wire: str = "auto", **spec: Any) -> dict[str, Any]:
    return {
        "apiVersion": "serving.baton.dev/v1alpha1", "kind": "InferenceService",
        "metadata": {"name": name, "namespace": "default"},
        "spec": {"model": {"uri": "baton://demo"}, "transport": {"wire": wire}, **spec},
    }  # fmt: skip


def unfit(name: str = "demo") -> dict[str, Any]:
    """What the schema takes and this release cannot run."""
    return service(name, profile="h200", parallelism={"tensor": 2})


def apply(cluster: Cluster, item: dict[str, Any], *, dry: bool = True) -> Any:
    path = f"{ISVC}/{item['metadata']['name']}?fieldManager=test&force=true{'&dryRun=All' if dry else ''}"
    return cluster.request("PATCH", path, item, content_type="application/apply-patch+yaml")


def test_apply_tells_what_cannot_work_and_what_is_not_there_yet(cluster: Cluster, tmp_path: Path) -> None:
    with installed(cluster, tmp_path, replicas=2) as pair:
        refused = cluster.kubectl("apply", "-f", "-", stdin=json.dumps(unfit()), check=False)
        assert "denied the request: NotSupported: prefill wants parallelism.tensor 2" in refused
        assert cluster.request("GET", f"{ISVC}/demo").status == 404
        waits = service(
            model={"uri": "hf://a/b", "credentialsSecret": "token"}, router={"apiKeysSecret": "keys"},
        )  # fmt: skip
        said = cluster.kubectl("apply", "-f", "-", stdin=json.dumps(waits), check=False)
        assert "demo created" in said
        assert "Warning: no Secret token exists in namespace default" in said
        assert "Warning: no Secret keys exists in namespace default" in said
        absent = cluster.kubectl("apply", "-f", "-", stdin=json.dumps(service(profile="h200")), check=False)
        assert "demo configured" in absent
        assert "Warning: there is no AcceleratorProfile h200" in absent
        silent = cluster.kubectl("apply", "-f", "-", stdin=json.dumps(service("good")), check=False)
        assert silent.strip() == "inferenceservice.serving.baton.dev/good created"
        # CEL is asked first, and both say what to do
        assert "at least one" in apply(cluster, service(prefill={"replicas": 0})).text
        assert "denied" not in apply(cluster, service(prefill={"replicas": 0})).text
        assert pair[0].metric("baton_operator_admission_reviews_total", 'result="denied"') >= 1
        assert pair[0].metric("baton_operator_webhook_certificate_expires_timestamp_seconds") > time.time() + 50 * 86400
        # kopf's error lines about refusals are not the operator's errors
        assert "failed permanently" not in "".join(one.log.read_text() for one in pair)


def test_without_an_operator_the_rules_of_the_crd_hold_and_good_services_pass(cluster: Cluster, tmp_path: Path) -> None:
    with installed(cluster, tmp_path, policy="Ignore") as [operator]:
        operator.kill()
        assert "at least one" in apply(cluster, service(prefill={"replicas": 0})).text
        assert "Unsupported value" in apply(cluster, service(wire="pigeon")).text
        assert apply(cluster, service("good"), dry=False).ok
        assert apply(cluster, unfit("bad"), dry=False).ok  # told by its condition later


def test_what_is_bad_already_can_be_labelled_released_and_deleted(cluster: Cluster, tmp_path: Path) -> None:
    made = apply(cluster, unfit("bad"), dry=False)
    assert made.ok, made.text
    with installed(cluster, tmp_path):

        def stored() -> Any:
            return cluster.request("GET", f"{ISVC}/bad").body

        until(lambda: bool(stored()["metadata"].get("finalizers")), "the operator's own finaliser")
        until(lambda: "conditions" in stored().get("status", {}), "its status")
        cluster.kubectl("label", "isvc", "bad", "team=a")
        change = ("patch", "isvc", "bad", "--type=merge", "-p", '{"spec": {"slo": {"itlMs": 50}}}')
        refused = cluster.kubectl(*change, check=False)
        assert "denied the request" in refused
        cluster.kubectl("delete", "isvc", "bad", "--timeout=30s")
        assert stored().get("code") == 404


def test_no_call_fails_while_certificates_and_authorities_are_replaced(cluster: Cluster, tmp_path: Path) -> None:
    """Both replicas; the API server's own connections and new ones."""
    with installed(cluster, tmp_path, replicas=2, program=("-c", QUICK)) as pair:
        ports = [webhook_port(one) for one in pair]
        certificates: set[int] = set()
        signers: set[str] = set()
        authorities: set[int] = set()
        deadline_s, calls = time.monotonic() + 150, 0
        while len(signers) < 2 or len(certificates) < 4:
            assert time.monotonic() < deadline_s, (len(signers), len(certificates))
            answer = apply(cluster, service(f"n{calls}"))
            assert answer.ok, (calls, answer.text)
            refused = apply(cluster, unfit(f"n{calls}"))
            assert refused.status == 422, (calls, refused.text)
            for port in ports:
                certificate = shown(cluster, port)
                certificates.add(certificate.serial_number)
                signers.add(certificate.issuer.rfc4514_string())
            known = x509.load_pem_x509_certificates(bundle(cluster).encode())
            authorities |= {item.serial_number for item in known}
            calls += 1
            time.sleep(0.1)
        assert len(authorities) >= 2
        print(f"{calls} calls, {len(certificates)} certificates, {len(authorities)} authorities")


def webhook_port(operator: Operator) -> int:
    command = list(operator.process.args)  # type: ignore[call-overload]
    return int(command[command.index("--webhook-port") + 1])
