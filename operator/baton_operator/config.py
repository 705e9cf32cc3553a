"""Settings of the operator, section `operator` (variables BATON_OPERATOR_<FIELD>, flags --<field>)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from pydantic import BeforeValidator, Field


def _comma_list(value: object) -> object:
    """`a,b` from a flag or variable; a YAML list stays as it is."""
    if isinstance(value, str):
        return tuple(part.strip() for part in value.split(",") if part.strip())
    return value


CommaList = Annotated[tuple[str, ...], BeforeValidator(_comma_list)]


@dataclass(frozen=True, slots=True, kw_only=True)
class OperatorConfig:
    """What one operator process needs to know."""

    namespaces: Annotated[
        CommaList, Field(description="namespaces whose services are served, comma separated; empty = all")
    ] = ()
    kubeconfig: Annotated[str, Field(description="file that says how to reach the cluster; empty = the pod's own")] = ""
    router_image: Annotated[str, Field(description="image of the routers")] = "baton/router:0.1.0"
    worker_image: Annotated[
        str, Field(description="image of the workers; {flavour} becomes the profile's flavour, like cpu or cuda")
    ] = "baton/worker:0.1.0-{flavour}"
    image_pull_secrets: Annotated[
        CommaList, Field(description="Secrets for pulling both images, comma separated, in the services' namespaces")
    ] = ()
    workers: Annotated[int, Field(ge=1, le=64, description="services reconciled at the same time")] = 4
    resync_s: Annotated[float, Field(ge=1, description="every service is looked at again after, seconds")] = 300.0
    unready_resync_s: Annotated[
        float, Field(ge=0.5, description="the same while a service is not Ready: what it waits for may be unwatched")
    ] = 5.0
    request_timeout_s: Annotated[float, Field(gt=0, description="deadline of one API request, seconds")] = 10.0
    back_off_first_s: Annotated[float, Field(gt=0, description="wait after a first failure, seconds; it doubles")] = 0.5
    back_off_cap_s: Annotated[float, Field(gt=0, description="longest wait between two tries, seconds")] = 60.0
    lease_name: Annotated[str, Field(description="Lease by which replicas choose their leader")] = "baton-operator"
    lease_namespace: Annotated[str, Field(description="where that Lease lies; empty = the operator's namespace")] = ""
    lease_s: Annotated[float, Field(gt=0, description="a silent leader is replaced after so long, seconds")] = 12.0
    lease_renew_s: Annotated[float, Field(gt=0, description="a leader that cannot renew stops after, seconds")] = 8.0
    lease_retry_s: Annotated[float, Field(gt=0, description="time between two looks at the Lease, seconds")] = 2.0
    metrics_port: Annotated[int, Field(ge=0, le=65535, description="Prometheus port; 0 = off")] = 9090
    health_port: Annotated[int, Field(ge=0, le=65535, description="port of /healthz and /readyz; 0 = off")] = 8081
    webhook_port: Annotated[int, Field(ge=0, le=65535, description="port of the admission webhook; 0 = off")] = 0
    webhook_name: Annotated[
        str,
        Field(description="the webhook's Service and Secret; its configuration is called NAMESPACE-NAME"),
    ] = "baton-operator-webhook"
    log_level: Annotated[
        Literal["debug", "info", "warning", "error"], Field(description="least severe log records to write")
    ] = "info"
    log_style: Annotated[Literal["text", "json"], Field(description="readable lines or one JSON object each")] = "text"
