"""The router of a service: how many, and how clients reach it."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from baton_operator.api.base import AnnotationMap, Hostname, ObjectName, Port, Strict
from baton_operator.api.pool import PodTemplate, Resources
from baton_operator.api.rules import rule

ServiceType = Literal["ClusterIP", "NodePort", "LoadBalancer"]


class RouterService(Strict):
    """The Service in front of the routers."""

    type: Annotated[
        ServiceType, Field(description="NodePort and LoadBalancer are reached from outside the cluster")
    ] = "ClusterIP"
    annotations: Annotated[AnnotationMap, Field(description="of the Service")] = Field(default_factory=dict)


class Ingress(Strict):
    host: Annotated[Hostname, Field(description="name by which clients reach the service")]
    class_name: Annotated[ObjectName | None, Field(description="default: the cluster's default IngressClass")] = None
    tls_secret: Annotated[ObjectName | None, Field(description="Secret with the certificate; absent = http")] = None
    annotations: Annotated[AnnotationMap, Field(description="for the ingress controller")] = Field(default_factory=dict)


class HttpRoute(Strict):
    """Attaches the router to a Gateway that exists."""

    gateway: Annotated[ObjectName, Field(description="name of the Gateway")]
    gateway_namespace: Annotated[ObjectName | None, Field(description="default: the service's own")] = None
    section_name: Annotated[ObjectName | None, Field(description="one listener of the Gateway")] = None
    hostnames: Annotated[
        list[Hostname], Field(max_length=16, description="that the route answers to; none = those of the Gateway")
    ] = Field(default_factory=list)


class Router(Strict):
    """The OpenAI endpoint: how many routers, and how clients reach them."""

    replicas: Annotated[int, Field(ge=1, le=64, description="each of them sees every worker")] = 1
    port: Annotated[Port, Field(description="where the Service (on one machine: the router) listens")] = 8000
    service: RouterService = Field(default_factory=RouterService)
    ingress: Ingress | None = None
    http_route: HttpRoute | None = None
    api_keys_secret: Annotated[
        ObjectName | None, Field(description="Secret with one API key per entry; absent = open to all who reach it")
    ] = None
    resources: Annotated[
        Resources | None, Field(description="requests and limits; default: 500m CPU, 512Mi to 2Gi of memory")
    ] = None
    pod_template: PodTemplate | None = None

    @rule(
        cel="!(has(self.ingress) && has(self.httpRoute))",
        message="ingress and httpRoute are two ways to the same router; keep one of them",
    )
    def one_way_in(self) -> bool:
        return self.ingress is None or self.http_route is None
