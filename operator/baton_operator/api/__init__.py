"""The API of Baton, serving.baton.dev/v1alpha1, as frozen typed models: the one source of the CRDs."""

from baton_operator.api.base import API_VERSION, GROUP, VERSION, Role, Strict
from baton_operator.api.cache import Cache, Disk, Mooncake, Sessions
from baton_operator.api.metadata import Metadata
from baton_operator.api.model import DEMO_URI, Model
from baton_operator.api.policy import Rollout, Slo, Tracing, Transport
from baton_operator.api.pool import Parallelism, PodMetadata, PodTemplate, Pool, Resources
from baton_operator.api.profile import AcceleratorProfile, Gpus, ProfileSpec, Rdma, Toleration
from baton_operator.api.router import HttpRoute, Ingress, Router, RouterService
from baton_operator.api.rules import Place, Rule, Violation, rules_of, violations
from baton_operator.api.service import InferenceService, ServiceSpec
from baton_operator.api.sizing import Unplaceable, WorkerSize, worker_size
from baton_operator.api.status import Condition, ConditionType, RolesStatus, RoleStatus, ServiceStatus

__all__ = [
    "API_VERSION", "DEMO_URI", "GROUP", "VERSION", "AcceleratorProfile", "Cache", "Condition", "ConditionType", "Disk",
    "Gpus", "HttpRoute", "InferenceService", "Ingress", "Metadata", "Model", "Mooncake", "Parallelism", "Place",
    "PodMetadata", "PodTemplate", "Pool", "ProfileSpec", "Rdma", "Resources", "Role", "RoleStatus", "RolesStatus",
    "Rollout", "Router", "RouterService", "Rule", "ServiceSpec", "ServiceStatus", "Sessions", "Slo", "Strict",
    "Toleration", "Tracing", "Transport", "Unplaceable", "Violation", "WorkerSize", "rules_of", "violations",
    "worker_size",
]  # fmt: skip
