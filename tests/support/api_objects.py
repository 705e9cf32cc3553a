"""Objects of the API and the table of what is taken and what is refused, with the words. Used offline and for real."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from pydantic import BaseModel

from baton_operator.api import API_VERSION, AcceleratorProfile, InferenceService, Rule, rules_of

Tree = dict[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One object, and every fault that the rules find in it: {path: end of the message}. No fault: it is accepted."""

    name: str
    spec: Mapping[str, Any]
    faults: Mapping[str, str] = field(default_factory=dict)
    called: str = "demo"
    was: Mapping[str, Any] | None = None    # the spec before, when it is an update


def service(spec: Mapping[str, Any] | None = None, *, name: str = "demo") -> Tree:
    """The smallest service with `spec` merged over it."""
    smallest = {"model": {"uri": "hf://Qwen/Qwen3-0.6B"}}
    return {
        "apiVersion": API_VERSION, "kind": "InferenceService", "metadata": {"name": name},
        "spec": merged(smallest, spec or {}),
    }  # fmt: skip


def profile(spec: Mapping[str, Any] | None = None, *, name: str = "demo") -> Tree:
    """A CPU profile with `spec` merged over it."""
    return {
        "apiVersion": API_VERSION, "kind": "AcceleratorProfile", "metadata": {"name": name},
        "spec": merged({"device": "cpu"}, spec or {}),
    }  # fmt: skip


def merged(base: Mapping[str, Any], over: Mapping[str, Any]) -> Tree:
    made = dict(base)
    for key, value in over.items():
        below = made.get(key)
        made[key] = merged(below, value) if isinstance(value, Mapping) and isinstance(below, Mapping) else value
    return made


def models_below(model: type[BaseModel]) -> Iterator[type[BaseModel]]:
    """The model and every model that its fields are made of."""
    yield model
    for info in model.model_fields.values():
        todo: list[Any] = [info.annotation]
        while todo:
            one = todo.pop()
            if isinstance(one, type) and issubclass(one, BaseModel):
                yield from models_below(one)
            else:
                todo += getattr(one, "__args__", ())


def rules_in_crds() -> set[str]:
    models = {*models_below(InferenceService), *models_below(AcceleratorProfile)}
    found: list[Rule[Any]] = [item for model in models for item in rules_of(model) if item.in_crd]
    return {item.name for item in found}


GPU = {"profile": "h200"}
MODEL = "hf://Qwen/Qwen3-0.6B"

SERVICES = [
    Case(name="smallest", spec={}),
    Case(name="revision-apart", spec={"model": {"revision": "main"}}),
    Case(name="revision-in-the-uri", spec={"model": {"uri": "hf://a/b@v1.0/x"}}),
    Case(name="claim", spec={"model": {"uri": "pvc://models"}}),
    Case(name="folder-of-a-claim", spec={"model": {"uri": "pvc://models/qwen/0.6b"}}),
    Case(name="demo-model", spec={"model": {"uri": "baton://demo"}}),
    Case(
        name="bucket",
        spec={
            "model": {
                "uri": "s3://bucket/a/b", "endpoint": "http://minio:9000", "credentialsSecret": "keys",
                "cacheClaim": "models",
            }
        },
    ),
    Case(name="kv-narrower", spec={"model": {"dtype": "float32", "kvDtype": "bfloat16"}}),
    Case(name="kv-unknown-dtype", spec={"model": {"kvDtype": "float32"}}),
    Case(name="bounds", spec={"prefill": {"minReplicas": 1, "maxReplicas": 4}, "decode": {"replicas": 2}}),
    Case(name="equal-bounds", spec={"prefill": {"minReplicas": 2, "maxReplicas": 2}}),
    Case(name="colocated-alone", spec={"colocated": {}}),
    Case(name="all-three", spec={"prefill": {}, "decode": {}, "colocated": {"replicas": 2}}),
    Case(
        name="colocated-and-emptied-others",
        spec={"prefill": {"replicas": 0}, "decode": {"replicas": 0}, "colocated": {"replicas": 1}},
    ),
    Case(name="colocated-has-no-handoff", spec={"colocated": {}, "transport": {"wire": "shm"}}),
    Case(name="tensor", spec={**GPU, "parallelism": {"tensor": 4}, "prefill": {"parallelism": {"tensor": 8}}}),
    Case(
        name="resources",
        spec={"decode": {"resources": {"requests": {"cpu": 2, "memory": "900Mi"}, "limits": {"memory": "1Gi"}}}},
    ),
    Case(
        name="request-equal-in-another-unit",
        spec={"decode": {"resources": {"requests": {"cpu": "1000m"}, "limits": {"cpu": 1}}}},
    ),
    Case(
        name="pod-template",
        spec={
            "decode": {
                "podTemplate": {
                    "metadata": {"labels": {"team": "a"}, "annotations": {"x/y": "z"}},
                    "spec": {"containers": [{"name": "main", "anything": 1}], "priorityClassName": "high"},
                }
            }
        },
    ),
    Case(
        name="ingress",
        spec={
            "router": {
                "replicas": 2, "ingress": {"host": "a.example.com", "tlsSecret": "tls"}, "apiKeysSecret": "keys",
                "service": {"type": "LoadBalancer", "annotations": {"a": "b"}},
            }
        },
    ),
    Case(name="route", spec={"router": {"httpRoute": {"gateway": "public", "hostnames": ["*.example.com"]}}}),
    Case(name="surge-or-unavailable", spec={"rollout": {"maxSurge": "25%", "maxUnavailable": "0%"}}),
    Case(name="drain-first", spec={"rollout": {"maxSurge": 0, "maxUnavailable": 1}}),
    Case(name="slo", spec={"slo": {"itlMs": 50, "percentile": 99}}),
    Case(name="host-memory", spec={"cache": {"hostMemory": "64Mi"}}),
    Case(
        name="all-tiers",
        spec={
            "cache": {
                "hostMemory": 2**30, "disk": {"size": "1Gi", "storageClass": "fast"}, "sessions": {"quota": "1024Mi"},
                "mooncake": {"master": "mooncake-master.store.svc:50051", "memory": "1Gi"},
            }
        },
    ),
    Case(name="longest-name", called="a" * 63, spec={}),
    # ---- refused
    Case(name="uri-of-no-scheme", spec={"model": {"uri": "Qwen/Qwen3"}}, faults={"spec.model.uri": "or baton://demo"}),
    Case(name="hub-name-in-one-part", spec={"model": {"uri": "hf://x"}}, faults={"spec.model.uri": "or baton://demo"}),
    Case(name="nothing-behind-the-claim", spec={"model": {"uri": "pvc://a//"}}, faults={"spec.model.uri": "demo"}),
    Case(
        name="folder-of-this-machine", spec={"model": {"uri": "file:///models/a"}},
        faults={"spec.model.uri": "use pvc://claim/folder (file:// works with baton up)"},
    ),
    Case(
        name="two-revisions", spec={"model": {"uri": "hf://a/b@1", "revision": "2"}},
        faults={"spec.model.revision": "remove one of the two"},
    ),
    Case(
        name="revision-of-a-claim", spec={"model": {"uri": "pvc://a/b", "revision": "2"}},
        faults={"spec.model.revision": "remove one of the two"},
    ),
    Case(
        name="download-of-a-claim",
        spec={"model": {"uri": "pvc://a/b", "endpoint": "https://x", "cacheClaim": "c"}},
        faults={
            "spec.model.endpoint": "remove it or change the uri",
            "spec.model.cacheClaim": "remove it, nothing is downloaded here",
        },
    ),
    Case(
        name="kv-wider", spec={"model": {"dtype": "bfloat16", "kvDtype": "float32"}},
        faults={
            "spec.model.kvDtype": "kvDtype float32 is wider than dtype bfloat16, which costs memory and gains nothing; "
            "set kvDtype to auto or bfloat16"
        },
    ),
    Case(
        name="tensor-of-three", spec={**GPU, "parallelism": {"tensor": 3}, "decode": {"parallelism": {"tensor": 6}}},
        faults={
            "spec.parallelism.tensor": "use 1, 2, 4, 8, 16, 32 or 64",
            "spec.decode.parallelism.tensor": "use 1, 2, 4, 8, 16, 32 or 64",
        },
    ),
    Case(
        name="tensor-without-gpus", spec={"parallelism": {"tensor": 2}},
        faults={"spec.profile": "choose a GPU profile or set parallelism.tensor to 1"},
    ),
    Case(
        name="tensor-without-gpus-in-one-role", spec={"decode": {"parallelism": {"tensor": 2}}},
        faults={"spec.profile": "choose a GPU profile or set parallelism.tensor to 1"},
    ),
    Case(
        name="gpus-by-hand",
        spec={**GPU, "decode": {"resources": {"limits": {"nvidia.com/gpu": 8}}}},
        faults={"spec.decode.resources": "remove them here and set parallelism.tensor"},
    ),
    Case(
        name="router-with-gpus", spec={"router": {"resources": {"requests": {"amd.com/gpu": 1}}}},
        faults={"spec.router.resources": "remove them here and set parallelism.tensor"},
    ),
    Case(
        name="request-above-limit",
        spec={"prefill": {"resources": {"requests": {"memory": "2Gi"}, "limits": {"memory": "2000Mi"}}}},
        faults={"spec.prefill.resources": "raise the limit or lower the request"},
    ),
    Case(
        name="label-of-ours",
        spec={"decode": {"podTemplate": {"metadata": {"labels": {"serving.baton.dev/role": "x"}}}}},
        faults={"spec.decode.podTemplate.metadata.labels": "choose another prefix"},
    ),
    Case(
        name="replicas-and-bounds", spec={"decode": {"replicas": 1, "minReplicas": 1, "maxReplicas": 2}},
        faults={"spec.decode.replicas": "remove replicas, or the other two"},
    ),
    Case(
        name="one-bound", spec={"decode": {"minReplicas": 1}},
        faults={"spec.decode": "set both, or replicas alone"},
    ),
    Case(
        name="bounds-the-wrong-way-round", spec={"decode": {"minReplicas": 3, "maxReplicas": 2}},
        faults={"spec.decode.minReplicas": "lower the one or raise the other"},
    ),
    Case(
        name="prefill-without-decode", spec={"decode": {"replicas": 0}},
        faults={"spec": "or neither and use colocated"},
    ),
    Case(
        name="prefill-beside-colocated", spec={"prefill": {}, "colocated": {}},
        faults={"spec": "or neither and use colocated"},
    ),
    Case(name="nobody", spec={"colocated": {"replicas": 0}}, faults={"spec": "each, or use colocated"}),
    Case(
        name="shared-memory-between-pods", spec={"transport": {"wire": "shm"}},
        faults={"spec.transport.wire": "use auto or tcp (shm works with baton up)"},
    ),
    Case(
        name="two-ways-in",
        spec={"router": {"ingress": {"host": "a"}, "httpRoute": {"gateway": "b"}}},
        faults={"spec.router": "keep one of them"},
    ),
    Case(
        name="stuck-rollout", spec={"rollout": {"maxSurge": 0, "maxUnavailable": "0%"}},
        faults={"spec.rollout": "raise one of them"},
    ),
    Case(name="slo-of-nothing", spec={"slo": {"percentile": 90}}, faults={"spec.slo": "or remove slo"}),
    Case(
        name="tiers-without-memory", spec={"cache": {"disk": {"size": "1Gi"}, "sessions": {"quota": "1Gi"}}},
        faults={"spec.cache.hostMemory": "set cache.hostMemory, or remove cache"},
    ),
    Case(name="tiers-of-nothing", spec={"cache": {}}, faults={"spec.cache.hostMemory": "or remove cache"}),
    Case(
        name="tiers-that-hold-nothing", spec={"cache": {"hostMemory": "500m", "disk": {"size": "1Mi"}}},
        faults={
            "spec.cache.hostMemory": "raise cache.hostMemory to 64Mi or more",
            "spec.cache.disk.size": "raise disk.size to 64Mi or more",
        },
    ),
    Case(
        name="quota-above-memory", spec={"cache": {"hostMemory": "1Gi", "sessions": {"quota": "1025Mi"}}},
        faults={"spec.cache.sessions.quota": "lower sessions.quota or raise cache.hostMemory"},
    ),
    Case(name="name-too-long", called="a" * 64, spec={}, faults={"": "beginning with a letter and not ending with -"}),
    Case(name="name-of-digits", called="7b", spec={}, faults={"": "beginning with a letter and not ending with -"}),
    Case(name="name-with-dots", called="a.b", spec={}, faults={"": "beginning with a letter and not ending with -"}),
]  # fmt: skip

NEW_PROFILE = "make a new profile and set it in the services"
CUDA = {"device": "cuda", "gpu": {"resource": "nvidia.com/gpu", "perNode": 8}}
PROFILES = [
    Case(name="smallest", spec={}),
    Case(name="gpus", spec={**CUDA, "rdma": {"resource": "rdma/ib"}, "linuxCapabilities": ["IPC_LOCK"]}),
    Case(name="tolerations", spec={"tolerations": [{"operator": "Exists"}, {"key": "a", "value": "b"}]}),
    Case(name="same-arch", spec={"arch": "arm64", "env": {"A": "1"}}, was={"arch": "arm64"}),
    Case(
        name="gpus-of-a-cpu", spec={**CUDA, "device": "cpu"},
        faults={"spec": "give gpu.resource and gpu.perNode to any other"},
    ),
    Case(
        name="no-gpus", spec={"device": "cuda"},
        faults={
            "spec": "device cuda and gpu do not fit: remove gpu from a cpu profile, "
            "give gpu.resource and gpu.perNode to any other"
        },
    ),
    Case(
        name="another-vendor", spec={**CUDA, "device": "rocm"},
        faults={"spec.gpu": "amd.com/gpu with rocm, nvidia.com/gpu with cuda"},
    ),
    Case(name="rdma-alone", spec={"rdma": {"resource": "rdma/ib"}}, faults={"spec.rdma": "remove rdma"}),
    Case(
        name="value-of-exists", spec={"tolerations": [{"key": "a", "operator": "Exists", "value": "b"}]},
        faults={"spec.tolerations[0].value": "or use operator Equal"},
    ),
    Case(
        name="key-of-nothing", spec={"tolerations": [{"key": "a"}, {"value": "b"}]},
        faults={"spec.tolerations[1]": "add the key of the taint"},
    ),
    Case(name="another-device", spec=CUDA, was={}, faults={"spec": NEW_PROFILE}),
    Case(name="another-arch", spec={}, was={"arch": "arm64"}, faults={"spec": NEW_PROFILE}),
]  # fmt: skip

# What the schema alone refuses, on both sides, in words of their own.
MISFITS: dict[str, Tree] = {
    "unknown-field": {"prefil": {}},
    "unknown-field-deep-down": {"decode": {"resources": {"request": {}}}},
    "kv-dtype-of-one-role": {"decode": {"kvDtype": "float32"}},
    "no-model": {"model": {"uri": None}},
    "text-for-a-number": {"router": {"port": "8000"}},
    "number-for-text": {"model": {"revision": 1}},
    "port": {"router": {"port": 0}},
    "replicas": {"decode": {"replicas": -1}},
    "scale-to-zero": {"decode": {"minReplicas": 0, "maxReplicas": 1}},
    "dtype": {"model": {"dtype": "float8"}},
    "wire": {"transport": {"wire": "carrier-pigeon"}},
    "master-without-port": {"cache": {"hostMemory": "1Gi", "mooncake": {"master": "store"}}},
    "master-is-no-url": {"cache": {"hostMemory": "1Gi", "mooncake": {"master": "http://store:50051"}}},
    "disk-without-size": {"cache": {"hostMemory": "1Gi", "disk": {}}},
    "host-memory": {"cache": {"hostMemory": "8 GB"}},
    "collector-without-scheme": {"tracing": {"endpoint": "collector:4318"}},
    "surge": {"rollout": {"maxSurge": "1/2"}},
    "surge-above-all": {"rollout": {"maxSurge": "101%"}},
    "amount": {"decode": {"resources": {"limits": {"memory": "16 GB"}}}},
    "fraction": {"decode": {"resources": {"limits": {"cpu": 0.5}}}},
    "service-type": {"router": {"service": {"type": "ExternalName"}}},
    "host": {"router": {"ingress": {"host": "http://a"}}},
    "host-missing": {"router": {"ingress": {}}},
    "secret-name": {"model": {"credentialsSecret": "A_B"}},
    "endpoint": {"model": {"endpoint": "minio:9000"}},
    "list-for-a-map": {"prefill": []},
    "long-uri": {"model": {"uri": "hf://a/" + "b" * 1024}},
}
