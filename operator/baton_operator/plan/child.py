"""One object that a service needs."""

from __future__ import annotations

from dataclasses import dataclass

from baton_operator.kube.kinds import Kind
from baton_operator.objects import Object


@dataclass(frozen=True, slots=True, kw_only=True)
class Child:
    """`manifest` is all that the operator owns of the object, in the form that server-side apply takes."""

    kind: Kind
    namespace: str
    name: str
    manifest: Object

    @property
    def key(self) -> tuple[str, str]:
        """(resource, name): unique among the children of one service."""
        return self.kind.resource, self.name


@dataclass(frozen=True, slots=True, kw_only=True)
class ScaleTo:
    """Set a Deployment's replicas through /scale: they belong to an autoscaler, who went, or began, out of bounds."""

    name: str
    replicas: int
