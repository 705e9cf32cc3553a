"""What a declared service becomes: every object, read as a specification."""

from __future__ import annotations

from typing import Any

import pytest
import yaml
from support.operator_world import PLATFORM, Tree, profile_object, service_object

from baton_operator.api import AcceleratorProfile, InferenceService, Unplaceable
from baton_operator.kinds import POD_MONITOR, SERVICE_MONITOR
from baton_operator.plan.children import Desired, desired, scale_steps
from baton_operator.plan.intake import Platform, blueprint
from baton_operator.plan.labels import KV_REVISION_LABEL, REVISION_LABEL, Component
from baton_operator.shipped import shipped_profiles


def planned(hardware: AcceleratorProfile | None = None, platform: Platform = PLATFORM, **spec: Any) -> Desired:
    written = service_object(**spec)
    written["metadata"]["uid"] = "uid-1"
    profile = hardware or AcceleratorProfile.parse(profile_object())
    plan = blueprint(InferenceService.parse(written), profile, platform)
    return desired(plan, served=[SERVICE_MONITOR, POD_MONITOR])


def one(wanted: Desired, kind: str, name: str) -> Any:
    return next(item.manifest for item in wanted.children if (item.kind.kind, item.name) == (kind, name))


def template(wanted: Desired, role: str) -> Any:
    return one(wanted, "Deployment", f"chat-{role}")["spec"]["template"]


def main(wanted: Desired, role: str) -> Any:
    return template(wanted, role)["spec"]["containers"][0]


def flags(wanted: Desired, role: str) -> dict[str, str]:
    words = [part for word in main(wanted, role)["command"][1:] for part in word.split("=", 1)]
    return dict(zip(words[::2], words[1::2], strict=True))


def test_the_smallest_service_becomes_these_objects_in_this_order() -> None:
    assert [(item.kind.kind, item.name) for item in planned().children] == [
        ("ServiceAccount", "chat-worker"),
        ("ServiceAccount", "chat-router"),
        ("Role", "chat-router"),
        ("RoleBinding", "chat-router"),
        ("ConfigMap", "chat-settings"),
        ("Service", "chat"),
        ("Service", "chat-prefill"),
        ("Service", "chat-decode"),
        ("NetworkPolicy", "chat-deny"),
        ("NetworkPolicy", "chat-router"),
        ("NetworkPolicy", "chat-prefill"),
        ("NetworkPolicy", "chat-decode"),
        ("PodDisruptionBudget", "chat-prefill"),
        ("PodDisruptionBudget", "chat-decode"),
        ("PodDisruptionBudget", "chat-router"),
        ("Deployment", "chat-prefill"),
        ("Deployment", "chat-decode"),
        ("Deployment", "chat-router"),
        ("ServiceMonitor", "chat-router"),
        ("PodMonitor", "chat-workers"),
    ]


def test_every_object_has_the_service_as_its_owner_and_label() -> None:
    for item in planned().children:
        metadata: Any = item.manifest["metadata"]
        assert [owner["uid"] for owner in metadata["ownerReferences"]] == ["uid-1"]
        assert metadata["ownerReferences"][0]["controller"] is True
        assert metadata["labels"]["serving.baton.dev/service"] == "chat"
        assert metadata["annotations"]["serving.baton.dev/service-name"] == "chat"
        assert len(item.applied_hash) == 16


def test_equal_input_gives_equal_objects() -> None:
    assert planned() == planned()


@pytest.mark.parametrize("role", ["prefill", "decode"])
def test_a_worker_is_started_with_its_role_ports_and_addresses(role: str) -> None:
    wanted = planned(model={"uri": "pvc://weights/llama/8b", "servedName": "llama"})
    assert main(wanted, role)["command"][0] == f"baton-{role}"
    assert flags(wanted, role) == {
        "--config": "/etc/baton/settings.yaml",
        "--model": "/models/llama/8b",
        "--model-name": "llama",
        "--role": role,
        "--worker-id": "$(POD_NAME)",
        "--listen": "0.0.0.0:9000",
        "--peer-listen": "0.0.0.0:9100",
        "--peer-advertise": "$(POD_IP)",
        "--metrics-port": "9090",
        "--drain-s": {"prefill": "60", "decode": "410"}[role],
        "--dump-dir": "/tmp",
    }
    names = {item["name"] for item in main(wanted, role)["env"]}
    assert {"POD_NAME", "POD_IP"} <= names


def test_a_colocated_worker_is_a_decode_worker_without_peers() -> None:
    wanted = planned(colocated={"replicas": 1})
    assert main(wanted, "colocated")["command"][0] == "baton-decode"
    assert "--peer-listen" not in flags(wanted, "colocated")
    assert flags(wanted, "colocated")["--peer-advertise"] == "$(POD_IP)", "memory lent to a Mooncake store is there"
    assert flags(wanted, "colocated")["--role"] == "colocated"
    assert "peer" not in {port["name"] for port in main(wanted, "colocated")["ports"]}


def test_the_router_finds_workers_by_their_services_and_reads_keys_from_files() -> None:
    wanted = planned(router={"apiKeysSecret": "keys", "port": 80})
    router = flags(wanted, "router")
    assert router["--worker-services"] == "chat-prefill,chat-decode"
    assert router["--listen"] == "0.0.0.0:8000"
    assert router["--api-keys-folder"] == "/etc/baton-keys"
    volumes = {volume["name"]: volume for volume in template(wanted, "router")["spec"]["volumes"]}
    assert volumes["api-keys"]["secret"] == {"secretName": "keys"}
    assert "keys" not in str(template(wanted, "decode"))
    assert one(wanted, "Service", "chat")["spec"]["ports"][0]["port"] == 80


def test_settings_hold_what_the_user_typed_and_a_change_of_them_changes_the_pods() -> None:
    before = planned()
    after = planned(model={"uri": "hf://Qwen/Qwen3-0.6B", "kvDtype": "bfloat16", "contextTokens": 4096})
    settings = yaml.safe_load(one(after, "ConfigMap", "chat-settings")["data"]["settings.yaml"])
    assert settings["engine"] == {"dtype": "auto", "kv_dtype": "bfloat16", "context_tokens": 4096}
    assert settings["transfer"] == {"wire": "auto"}
    assert settings["worker"]["device"] == "cpu"
    assert before.revision != after.revision


def test_routers_stay_in_the_service_while_requests_wait_for_the_successor_of_the_only_worker() -> None:
    """Out of the Service they would turn waiting into refused connections."""
    wanted = planned()
    router = yaml.safe_load(one(wanted, "ConfigMap", "chat-settings")["data"]["settings.yaml"])["router"]
    probe = main(wanted, "router")["readinessProbe"]
    assert router["worker_wait_s"] == router["resume_wait_s"] > 30
    assert probe["periodSeconds"] * probe["failureThreshold"] >= router["worker_wait_s"]


def test_a_volume_is_mounted_read_only_and_nothing_is_fetched() -> None:
    spec = template(planned(model={"uri": "pvc://weights/llama"}), "decode")["spec"]
    assert spec["volumes"][0]["persistentVolumeClaim"] == {"claimName": "weights", "readOnly": True}
    assert "initContainers" not in spec


def test_a_hub_model_is_fetched_first_with_its_credentials_and_only_there() -> None:
    wanted = planned(
        model={"uri": "hf://Qwen/Qwen3-0.6B", "revision": "v1", "credentialsSecret": "token", "cacheClaim": "cache"}
    )
    [fetch] = template(wanted, "decode")["spec"]["initContainers"]
    assert fetch["command"][:3] == ["baton-fetch", "--uri", "hf://Qwen/Qwen3-0.6B"]
    assert fetch["command"][-1] == "--revision=v1"
    assert fetch["envFrom"] == [{"secretRef": {"name": "token"}}]
    assert flags(wanted, "decode")["--model"] == fetch["command"][fetch["command"].index("--to") + 1]
    assert "token" not in str(main(wanted, "decode"))
    volume = template(wanted, "decode")["spec"]["volumes"][0]
    assert volume["persistentVolumeClaim"] == {"claimName": "cache"}
    [tokenizer] = template(wanted, "router")["spec"]["initContainers"]
    assert "--only-tokenizer" in tokenizer["command"]


@pytest.mark.parametrize("role", ["prefill", "decode", "router"])
def test_pods_pass_the_restricted_standard(role: str) -> None:
    spec = template(planned(), role)["spec"]
    assert spec["securityContext"]["runAsNonRoot"] is True
    assert spec["securityContext"]["runAsUser"] > 0
    assert spec["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    for container in (*spec["containers"], *spec["initContainers"]):
        assert container["securityContext"]["allowPrivilegeEscalation"] is False
        assert container["securityContext"]["capabilities"] == {"drop": ["ALL"]}
        assert container["securityContext"]["readOnlyRootFilesystem"] is True
    assert not {"hostNetwork", "hostPID", "hostIPC"} & spec.keys()
    assert not any("hostPath" in volume for volume in spec["volumes"])
    assert spec["automountServiceAccountToken"] is (role == "router")


def test_probes_ask_for_progress_and_for_a_loaded_model() -> None:
    worker, router = main(planned(), "decode"), main(planned(), "router")
    assert worker["livenessProbe"]["grpc"] == {"port": 9000, "service": ""}
    assert worker["readinessProbe"]["grpc"] == {"port": 9000, "service": "baton.v1.Worker"}
    assert router["readinessProbe"]["httpGet"]["path"] == "/ready"
    assert router["livenessProbe"]["httpGet"]["path"] == "/health"


@pytest.mark.parametrize(
    ("spec", "seconds"),
    [
        ({}, 410),
        ({"slo": {"itlMs": 20}}, 164),
        ({"model": {"uri": "hf://a/b", "contextTokens": 128}}, 30),
        ({"model": {"uri": "hf://a/b", "contextTokens": 1000000}}, 3600),
    ],
)
def test_the_grace_period_covers_the_longest_answer_at_the_slowest_pace(spec: Tree, seconds: int) -> None:
    wanted = planned(**spec)
    assert flags(wanted, "decode")["--drain-s"] == str(seconds)
    assert template(wanted, "decode")["spec"]["terminationGracePeriodSeconds"] == seconds + 10
    assert template(wanted, "router")["spec"]["terminationGracePeriodSeconds"] == seconds + 15


@pytest.mark.parametrize("role", ["prefill", "decode", "router"])
def test_a_pod_that_is_stopped_while_it_starts_hears_it(role: str) -> None:
    """Process 1 ignores signals that it has no handler for: only the pause container may be that."""
    assert template(planned(), role)["spec"]["shareProcessNamespace"] is True


def pages_volume(wanted: Desired, role: str) -> Any:
    volumes = {volume["name"]: volume for volume in template(wanted, role)["spec"]["volumes"]}
    return volumes.get("kv-pages")


def test_tiers_reach_every_worker_with_memory_and_a_folder_of_its_own() -> None:
    cache = {
        "hostMemory": "8Gi", "disk": {"size": "64Gi"}, "mooncake": {"master": "m.ns.svc:50051", "memory": "4Gi"},
        "sessions": {"quota": "1500Mi"},
    }  # fmt: skip
    wanted = planned(cache=cache)
    for role in ("prefill", "decode"):
        assert flags(wanted, role)["--tiers"] == (
            "host=8GiB,file=/kv/pages:58983MiB,mooncake=m.ns.svc:50051:4GiB,sessions=1500MiB"
        )
        assert main(wanted, role)["resources"]["requests"]["memory"] == "13Gi"
        assert pages_volume(wanted, role)["emptyDir"] == {"sizeLimit": "64Gi"}
        mounts = {mount["name"]: mount for mount in main(wanted, role)["volumeMounts"]}
        assert mounts["kv-pages"] == {"name": "kv-pages", "mountPath": "/kv"}
    assert pages_volume(wanted, "router") is None
    assert "--tiers" not in flags(wanted, "router")


def test_without_a_cache_nothing_of_it_is_in_a_pod() -> None:
    assert "--tiers" not in flags(planned(), "decode")
    assert pages_volume(planned(), "decode") is None
    assert pages_volume(planned(cache={"hostMemory": "1Gi"}), "decode") is None


def test_a_storage_class_gives_every_pod_a_volume_that_goes_with_it() -> None:
    wanted = planned(cache={"hostMemory": "1Gi", "disk": {"size": "100Gi", "storageClass": "fast"}})
    claim = pages_volume(wanted, "decode")["ephemeral"]["volumeClaimTemplate"]["spec"]
    assert claim == {
        "accessModes": ["ReadWriteOnce"], "storageClassName": "fast", "resources": {"requests": {"storage": "100Gi"}},
    }  # fmt: skip


def test_a_patch_may_take_another_volume_for_pages() -> None:
    local = {"name": "kv-pages", "emptyDir": None, "hostPath": {"path": "/nvme/kv"}}
    wanted = planned(
        cache={"hostMemory": "1Gi", "disk": {"size": "100Gi"}}, decode={"podTemplate": {"spec": {"volumes": [local]}}}
    )
    assert pages_volume(wanted, "decode") == {"name": "kv-pages", "hostPath": {"path": "/nvme/kv"}}
    assert "emptyDir" in pages_volume(wanted, "prefill")


def test_a_change_of_tiers_rolls_workers_and_not_routers() -> None:
    before, after = planned(), planned(cache={"hostMemory": "1Gi"})
    assert {part for part in Component if before.revisions.get(part) != after.revisions.get(part)} == {
        Component.PREFILL, Component.DECODE,
    }  # fmt: skip


def test_gpus_rdma_and_nodes_come_from_the_profile() -> None:
    h200 = shipped_profiles()["h200"]
    wanted = planned(h200, profile="h200", parallelism={"tensor": 4}, decode={"parallelism": {"tensor": 8}})
    gpu = h200.spec.gpu
    assert gpu is not None
    assert main(wanted, "prefill")["resources"]["limits"][gpu.resource] == "4"
    assert main(wanted, "decode")["resources"]["limits"][gpu.resource] == "8"
    assert gpu.resource not in main(wanted, "router")["resources"]["limits"]
    assert main(wanted, "decode")["image"] == "local/worker:1-cuda"
    assert set(h200.spec.node_selector) <= set(template(wanted, "decode")["spec"]["nodeSelector"])
    assert "nodeSelector" not in template(wanted, "router")["spec"]


@pytest.mark.parametrize("name", sorted(shipped_profiles()))
def test_every_shipped_profile_gives_pods(name: str) -> None:
    wanted = planned(shipped_profiles()[name], profile=name)
    assert template(wanted, "prefill")["spec"]["containers"]


def test_more_gpus_than_a_node_has_is_refused_with_the_remedy() -> None:
    with pytest.raises(Unplaceable, match=r"set parallelism.tensor to at most 8"):
        planned(shipped_profiles()["h200"], profile="h200", parallelism={"tensor": 16})


def test_a_patch_reaches_the_pod_but_not_the_labels_that_find_it() -> None:
    wanted = planned(
        decode={
            "podTemplate": {
                "metadata": {"labels": {"team": "a"}, "annotations": {"x": "y"}},
                "spec": {"priorityClassName": "high", "containers": [{"name": "main", "image": "mine:2"}]},
            }
        }
    )
    pod = template(wanted, "decode")
    assert pod["spec"]["priorityClassName"] == "high"
    assert pod["spec"]["containers"][0]["image"] == "mine:2"
    assert pod["spec"]["containers"][0]["command"][0] == "baton-decode"
    assert pod["metadata"]["labels"]["team"] == "a"
    selector = one(wanted, "Deployment", "chat-decode")["spec"]["selector"]["matchLabels"]
    assert selector.items() <= pod["metadata"]["labels"].items()


def test_a_change_of_one_role_rolls_that_role_only_and_keeps_kv_compatible() -> None:
    before, after = planned(), planned(decode={"resources": {"requests": {"cpu": 2}}})
    changed = {part for part in Component if before.revisions.get(part) != after.revisions.get(part)}
    assert changed == {Component.DECODE}
    assert before.revision != after.revision
    labels = [template(wanted, "decode")["metadata"]["labels"] for wanted in (before, after)]
    assert labels[0][KV_REVISION_LABEL] == labels[1][KV_REVISION_LABEL]
    assert labels[0][REVISION_LABEL] != labels[1][REVISION_LABEL]


def test_replicas_are_no_revision_and_another_model_is_another_kv() -> None:
    assert planned().revision == planned(decode={"replicas": 7}).revision
    kv = [
        template(wanted, "decode")["metadata"]["labels"][KV_REVISION_LABEL]
        for wanted in (planned(), planned(model={"uri": "hf://other/model"}))
    ]
    assert kv[0] != kv[1]


def test_an_autoscaled_role_leaves_replicas_out_and_only_bounds_are_kept() -> None:
    wanted = planned(decode={"minReplicas": 2, "maxReplicas": 4})
    assert "replicas" not in one(wanted, "Deployment", "chat-decode")["spec"]
    assert one(wanted, "Deployment", "chat-prefill")["spec"]["replicas"] == 1
    written = service_object(decode={"minReplicas": 2, "maxReplicas": 4})
    plan = blueprint(InferenceService.parse(written), AcceleratorProfile.parse(profile_object()), PLATFORM)
    steps = {asked: scale_steps(plan, {Component.DECODE: asked}) for asked in range(7)}
    assert {asked: [step.replicas for step in found] for asked, found in steps.items()} == {
        0: [2], 1: [2], 2: [], 3: [], 4: [], 5: [4], 6: [4],
    }  # fmt: skip


def connections(wanted: Desired) -> set[tuple[str, str, int | None]]:
    """(from, to, port) between components that both ends allow; None: any port."""

    def sides(role: str, side: str, peer: str) -> set[tuple[str, int | None]]:
        found = set()
        for rule in one(wanted, "NetworkPolicy", f"chat-{role}")["spec"][side]:
            for other in rule.get(peer, []):
                labels = other.get("podSelector", {}).get("matchLabels", {})
                if "serving.baton.dev/role" in labels:
                    found |= {(labels["serving.baton.dev/role"], port.get("port")) for port in rule["ports"]}
        return found

    roles = [item.name.removeprefix("chat-") for item in wanted.children if item.kind.kind == "Deployment"]
    out = {(role, other, port) for role in roles for other, port in sides(role, "egress", "to")}
    into = {(other, role, port) for role in roles for other, port in sides(role, "ingress", "from")}
    assert out == into
    return out


KV_WAYS = (("prefill", "decode"), ("decode", "prefill"), ("decode", "decode"))


def test_exactly_these_connections_are_allowed_between_pods_on_both_ends() -> None:
    """KV goes to decode, back for the next turn, and from a decode worker that drains to another one."""
    assert connections(planned()) == {
        ("router", "prefill", 9000), ("router", "decode", 9000), *((*way, 9100) for way in KV_WAYS),
    }  # fmt: skip
    assert connections(planned(colocated={"replicas": 1})) == {("router", "colocated", 9000)}


@pytest.mark.parametrize("wire", ["nixl", "mooncake"])
def test_a_library_that_picks_its_ports_may_use_any_between_those_who_exchange_kv(wire: str) -> None:
    wanted = planned(transport={"wire": wire})
    assert connections(wanted) == {
        ("router", "prefill", 9000), ("router", "decode", 9000), *((*way, None) for way in KV_WAYS),
    }  # fmt: skip


def test_auto_comes_to_such_a_library_only_where_there_is_rdma() -> None:
    rdma = {"device": "cuda", "gpu": {"resource": "nvidia.com/gpu", "perNode": 8}, "rdma": {"resource": "rdma/ib"}}
    wanted = planned(AcceleratorProfile.parse(profile_object("ib", **rdma)), profile="ib")
    assert ("prefill", "decode", None) in connections(wanted)
    assert ("prefill", "decode", 9100) in connections(planned(transport={"wire": "tcp"}))


def test_parts_of_a_mooncake_store_reach_each_other_and_their_master() -> None:
    cache = {"hostMemory": "1Gi", "mooncake": {"master": "mooncake.store.svc:50051", "memory": "1Gi"}}
    wanted = planned(cache=cache, model={"uri": "pvc://weights/llama"}, colocated={}, prefill={}, decode={})
    workers = ("prefill", "decode", "colocated")
    made = connections(wanted)
    assert {(one, other, None) for one in workers for other in workers} <= made
    for role in workers:
        egress = one(wanted, "NetworkPolicy", f"chat-{role}")["spec"]["egress"]
        assert {"ports": [{"protocol": "TCP", "port": 50051}]} in egress
    assert "50051" not in str(one(wanted, "NetworkPolicy", "chat-router"))


def test_everything_else_is_denied_and_the_ways_out_are_known() -> None:
    wanted = planned(model={"uri": "pvc://weights/llama"})
    deny = one(wanted, "NetworkPolicy", "chat-deny")["spec"]
    assert deny["policyTypes"] == ["Ingress", "Egress"]
    assert "ingress" not in deny
    assert "egress" not in deny
    open_to_all = {
        role: sorted(port["port"] for rule in one(wanted, "NetworkPolicy", f"chat-{role}")["spec"]["egress"]
                     if "to" not in rule for port in rule["ports"])
        for role in ("router", "prefill", "decode")
    }  # fmt: skip
    assert open_to_all == {"router": [53, 53, 443, 6443], "prefill": [53, 53], "decode": [53, 53]}
    fetching = one(planned(), "NetworkPolicy", "chat-decode")["spec"]["egress"]
    assert {"ports": [{"protocol": "TCP", "port": 443}]} in fetching


def test_spans_go_to_the_collector_from_every_pod() -> None:
    wanted = planned(model={"uri": "pvc://w"}, tracing={"endpoint": "http://collector.monitoring:4318"})
    settings = yaml.safe_load(one(wanted, "ConfigMap", "chat-settings")["data"]["settings.yaml"])
    for section in ("router", "worker"):
        assert settings[section]["otlp_endpoint"] == "http://collector.monitoring:4318"
    for role in ("router", "prefill", "decode"):
        egress = one(wanted, "NetworkPolicy", f"chat-{role}")["spec"]["egress"]
        assert {"ports": [{"protocol": "TCP", "port": 4318}]} in egress
    without = yaml.safe_load(one(planned(), "ConfigMap", "chat-settings")["data"]["settings.yaml"])
    assert not any("otlp_endpoint" in section for section in without.values())


def test_the_router_reaches_the_api_server_at_its_known_addresses_only() -> None:
    platform = Platform(
        router_image="r", worker_image="w", api_servers=(("10.96.0.1", 443), ("172.16.0.2", 6443), ("fd00::2", 6443))
    )
    egress = one(planned(platform=platform, model={"uri": "pvc://w"}), "NetworkPolicy", "chat-router")["spec"]["egress"]
    blocks = {
        (peer["ipBlock"]["cidr"], port["port"])
        for rule in egress for peer in rule.get("to", []) if "ipBlock" in peer for port in rule["ports"]
    }  # fmt: skip
    assert blocks == {("10.96.0.1/32", 443), ("172.16.0.2/32", 6443), ("fd00::2/128", 6443)}
    assert not any("to" not in rule and rule["ports"][0]["port"] != 53 for rule in egress)


def test_a_router_may_watch_endpoints_and_set_conditions_of_pods_and_nothing_else() -> None:
    rules = one(planned(), "Role", "chat-router")["rules"]
    assert {(resource, verb) for rule in rules for resource in rule["resources"] for verb in rule["verbs"]} == {
        ("endpointslices", "get"), ("endpointslices", "list"), ("endpointslices", "watch"),
        ("pods", "get"), ("pods/status", "patch"),
    }  # fmt: skip


def gates(wanted: Desired, role: str) -> list[str]:
    return [gate["conditionType"] for gate in template(wanted, role)["spec"].get("readinessGates", [])]


def test_a_worker_is_ready_only_when_a_router_has_said_so() -> None:
    registered, transport = "serving.baton.dev/router-registered", "serving.baton.dev/kv-transport"
    assert gates(planned(), "prefill") == [registered, transport]
    assert gates(planned(), "decode") == [registered, transport]
    assert gates(planned(colocated={"replicas": 1}), "colocated") == [registered]
    assert gates(planned(), "router") == []


def test_budgets_and_headless_services_follow_every_role() -> None:
    wanted = planned()
    for role in ("prefill", "decode", "router"):
        assert one(wanted, "PodDisruptionBudget", f"chat-{role}")["spec"]["maxUnavailable"] == 1
    for role in ("prefill", "decode"):
        assert one(wanted, "Service", f"chat-{role}")["spec"]["clusterIP"] == "None"


def test_ways_in_from_outside() -> None:
    wanted = planned(router={"ingress": {"host": "chat.example.com", "tlsSecret": "cert", "className": "nginx"}})
    ingress = one(wanted, "Ingress", "chat")["spec"]
    assert ingress["rules"][0]["http"]["paths"][0]["backend"]["service"] == {"name": "chat", "port": {"name": "http"}}
    assert ingress["tls"] == [{"hosts": ["chat.example.com"], "secretName": "cert"}]
    assert not any(item.kind.kind == "HTTPRoute" for item in planned(router={"httpRoute": {"gateway": "g"}}).children)
