"""The kinds of object that the operator reads or writes, and where the API serves them."""

from __future__ import annotations

from baton_common.kube.kinds import Kind

INFERENCE_SERVICE = Kind(
    group="serving.baton.dev", version="v1alpha1", kind="InferenceService", plural="inferenceservices"
)
ACCELERATOR_PROFILE = Kind(
    group="serving.baton.dev", version="v1alpha1", kind="AcceleratorProfile", plural="acceleratorprofiles",
    namespaced=False,
)  # fmt: skip
SECRET = Kind(group="", version="v1", kind="Secret", plural="secrets")
CLAIM = Kind(group="", version="v1", kind="PersistentVolumeClaim", plural="persistentvolumeclaims")
EVENT = Kind(group="events.k8s.io", version="v1", kind="Event", plural="events")
LEASE = Kind(group="coordination.k8s.io", version="v1", kind="Lease", plural="leases")
WEBHOOK_CONFIGURATION = Kind(
    group="admissionregistration.k8s.io", version="v1", kind="ValidatingWebhookConfiguration",
    plural="validatingwebhookconfigurations", namespaced=False,
)  # fmt: skip
SERVICE_ACCOUNT = Kind(group="", version="v1", kind="ServiceAccount", plural="serviceaccounts")
CONFIG_MAP = Kind(group="", version="v1", kind="ConfigMap", plural="configmaps")
SERVICE = Kind(group="", version="v1", kind="Service", plural="services")
DEPLOYMENT = Kind(group="apps", version="v1", kind="Deployment", plural="deployments")
ROLE = Kind(group="rbac.authorization.k8s.io", version="v1", kind="Role", plural="roles")
ROLE_BINDING = Kind(group="rbac.authorization.k8s.io", version="v1", kind="RoleBinding", plural="rolebindings")
DISRUPTION_BUDGET = Kind(group="policy", version="v1", kind="PodDisruptionBudget", plural="poddisruptionbudgets")
NETWORK_POLICY = Kind(group="networking.k8s.io", version="v1", kind="NetworkPolicy", plural="networkpolicies")
INGRESS = Kind(group="networking.k8s.io", version="v1", kind="Ingress", plural="ingresses")
HTTP_ROUTE = Kind(group="gateway.networking.k8s.io", version="v1", kind="HTTPRoute", plural="httproutes")
SERVICE_MONITOR = Kind(group="monitoring.coreos.com", version="v1", kind="ServiceMonitor", plural="servicemonitors")
POD_MONITOR = Kind(group="monitoring.coreos.com", version="v1", kind="PodMonitor", plural="podmonitors")

OPTIONAL_KINDS = (HTTP_ROUTE, SERVICE_MONITOR, POD_MONITOR)
"""Made only where the cluster serves them."""

CHILD_KINDS = (
    SERVICE_ACCOUNT, ROLE, ROLE_BINDING, CONFIG_MAP, SERVICE, NETWORK_POLICY, DISRUPTION_BUDGET, DEPLOYMENT, INGRESS,
    HTTP_ROUTE, SERVICE_MONITOR, POD_MONITOR,
)  # fmt: skip
"""What a service is made of, in the order in which it is created: what a pod needs comes before the pod."""
