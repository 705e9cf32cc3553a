"""`baton render`: the objects that the operator would make of a service file, as YAML. Asks no cluster.

What a cluster would tell the operator is assumed, and every assumption is said. Invariant: the objects are the
planner's own; only what refers to a service that does not exist yet (owner, hash of what was applied) is left out.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

import yaml
from pydantic import ValidationError

from baton_common.errors import ConfigError
from baton_common.kube.kinds import Kind
from baton_common.kube.objects import Json, Object, mapping
from baton_operator.api import AcceleratorProfile, InferenceService, Place
from baton_operator.config import OperatorConfig
from baton_operator.document import read_service
from baton_operator.kinds import HTTP_ROUTE, OPTIONAL_KINDS, POD_MONITOR, SERVICE_MONITOR
from baton_operator.plan.blueprint import Blueprint
from baton_operator.plan.children import desired
from baton_operator.plan.intake import Platform, blueprint
from baton_operator.plan.labels import APPLIED_ANNOTATION
from baton_operator.plan.limits import kv_mismatch, unsupported
from baton_operator.shipped import shipped_profiles


class Extra(StrEnum):
    """Kinds that not every cluster has."""

    MONITORS = "monitors"
    HTTP_ROUTES = "http-routes"


_KINDS: Mapping[Extra, tuple[Kind, ...]] = {
    Extra.MONITORS: (SERVICE_MONITOR, POD_MONITOR),
    Extra.HTTP_ROUTES: (HTTP_ROUTE,),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Rendered:
    """`objects` in the order in which the operator creates them; `assumed`: one line per thing that was not known."""

    objects: tuple[Object, ...]
    assumed: tuple[str, ...]

    def as_yaml(self) -> str:
        """One document per object."""
        return "".join(f"---\n{_document(item)}" for item in self.objects)


def extras(words: str) -> frozenset[Extra]:
    """From `monitors,http-routes`. Raises ConfigError for anything else."""
    try:
        return frozenset(Extra(word.strip()) for word in words.split(",") if word.strip())
    except ValueError as error:
        raise ConfigError(f"--with: {error}; use {', '.join(Extra)}", param="with") from None


def render(
    file: Path, *, namespace: str | None, profile_file: Path | None, config: OperatorConfig, extra: frozenset[Extra]
) -> Rendered:
    """Raises InvalidDocument or ConfigError for a mistake in the files, Unplaceable when they do not fit together."""
    service = _in_namespace(read_service(file, place=Place.CLUSTER), namespace)
    profile = _profile(service.spec.profile, profile_file)
    platform = Platform(
        router_image=config.router_image, worker_image=config.worker_image, pull_secrets=config.image_pull_secrets
    )
    plan = blueprint(service, profile, platform)
    if words := unsupported(service.spec) or kv_mismatch(plan):
        raise ConfigError(f"the operator makes nothing of this: {words}")
    served = [kind for item in extra for kind in _KINDS[item]]
    children = desired(plan, served=served).children
    left_out = [
        child for child in desired(plan, served=OPTIONAL_KINDS).children if child.key not in {it.key for it in children}
    ]
    return Rendered(
        objects=tuple(child.manifest if plan.uid else _without_owner(child.manifest) for child in children),
        assumed=tuple(_assumptions(service, plan, profile_file, [child.kind for child in left_out])),
    )


def _in_namespace(service: InferenceService, namespace: str | None) -> InferenceService:
    written = service.metadata.namespace
    if namespace and written and namespace != written:
        raise ConfigError(f"-n {namespace}, but metadata.namespace is {written}; drop one of them", param="namespace")
    metadata = service.metadata.model_copy(update={"namespace": namespace or written or "default"})
    return service.model_copy(update={"metadata": metadata})


def _profile(name: str, file: Path | None) -> AcceleratorProfile:
    if file is None:
        shipped = shipped_profiles()
        if name not in shipped:
            raise ConfigError(
                f"profile {name} does not come with Baton ({', '.join(shipped)} do); give its file: --profile-file, "
                f"made with `kubectl get acceleratorprofile {name} -o yaml`",
                param="profile-file",
            )
        return shipped[name]
    try:
        written = yaml.safe_load(file.read_text())
        profile = AcceleratorProfile.parse(written if isinstance(written, dict) else {})
    except (OSError, yaml.YAMLError) as error:
        raise ConfigError(f"{file} cannot be read: {' '.join(str(error).split())}", param="profile-file") from None
    except ValidationError as error:
        faults = [f"{'.'.join(map(str, item['loc']))}: {item['msg']}" for item in error.errors(include_url=False)]
        raise ConfigError("\n".join(f"{file}: {fault}" for fault in faults), param="profile-file") from None
    if profile.metadata.name != name:
        raise ConfigError(f"spec.profile is {name}, but {file} has {profile.metadata.name}", param="profile-file")
    return profile


def _without_owner(manifest: Object) -> Object:
    metadata = mapping(manifest, "metadata")
    notes = {key: note for key, note in mapping(metadata, "annotations").items() if key != APPLIED_ANNOTATION}
    kept = {key: value for key, value in metadata.items() if key != "ownerReferences"}
    return {**manifest, "metadata": {**kept, "annotations": notes}}


def _assumptions(
    service: InferenceService, plan: Blueprint, profile_file: Path | None, left_out: Sequence[Kind]
) -> list[str]:
    images = {f"{pool.component}: {pool.image}" for pool in plan.pools}
    found = [
        f"namespace {plan.namespace}",
        f"profile {service.spec.profile}, {f'from {profile_file}' if profile_file else 'as it comes with Baton'}",
        f"images, {', '.join(sorted(images))} (--router-image, --worker-image)",
        "the API server may be at any address, on 443 or 6443; the operator looks it up",
    ]
    if not plan.uid:
        found.append("no owner: the service does not exist yet, so nothing would be removed with it")
    flags = {kind: extra for extra, kinds in _KINDS.items() for kind in kinds}
    found += [
        f"no {kind.kind}: not every cluster knows that kind (--with {flags[kind].value})"
        for kind in dict.fromkeys(left_out)
    ]
    return found


class _Dumper(yaml.SafeDumper):
    """Text of several lines as a block, so that it can be read."""


def _text(dumper: yaml.SafeDumper, value: str) -> yaml.Node:
    return dumper.represent_scalar("tag:yaml.org,2002:str", value, style="|" if "\n" in value else None)


_Dumper.add_representer(str, _text)


def _document(item: Object) -> str:
    return yaml.dump(_plain(item), Dumper=_Dumper, sort_keys=False, width=120, allow_unicode=True)


def _plain(value: Json) -> object:
    """The same in containers that YAML knows, and none of them twice: YAML would make an alias of it."""
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, Sequence) and not isinstance(value, str) else value
