"""What can be declared and cannot be run: told before any pod is made, instead of by pods that crash. Pure.

The API is wider than this release on purpose: services and profiles for more GPUs are written, checked and rendered.
"""

from __future__ import annotations

from baton_common.kube.objects import Object, objects, text, texts
from baton_operator.api import Role, ServiceSpec
from baton_operator.plan.blueprint import Blueprint
from baton_operator.plan.labels import Component
from baton_operator.plan.pods import MAIN_CONTAINER, pod_template

_SHARED = ("dtype",)  # of a worker's engine; KV can only be handed over where they are equal, all else is converted
_OPEN = frozenset({"", "auto"})  # decided by the checkpoint: the workers compare, and a router tells


def unsupported(spec: ServiceSpec) -> str:
    """What the workers of this release cannot do, with the remedy; empty = nothing."""
    for role in Role:
        if spec.pool(role).most > 0 and spec.tensor(role) > 1:
            return (
                f"{role} wants parallelism.tensor {spec.tensor(role)}, and tensor parallelism is not in this release; "
                "set parallelism.tensor to 1 and use a model that fits one GPU"
            )
    return ""


def kv_mismatch(plan: Blueprint) -> str:
    """Why prefill and decode of this service can never hand KV to each other; empty = nothing speaks against it."""
    sides = [(part, plan.pool(part)) for part in (Component.PREFILL, Component.DECODE)]
    mains = {part.value: _main(pod_template(plan, pool)) for part, pool in sides if pool is not None}
    if len(mains) < 2:
        return ""
    for name in _SHARED:
        everywhere = str(plan.settings["engine"].get(name, ""))
        found = {role: _written(main, name) or everywhere for role, main in mains.items()}
        values = set(found.values())
        if len(values) > 1 and not values & _OPEN:
            says = " and ".join(f"{role} says {value}" for role, value in found.items())
            return (
                f"KV cannot be handed over: for {name}, {says}; remove {_variable(name)} and {_flag(name)} from the "
                "podTemplates and set it once for all roles, in spec.model"
            )
    return ""


def _main(template: Object) -> Object:
    return next(item for item in objects(template, "spec", "containers") if text(item, "name") == MAIN_CONTAINER)


def _written(container: Object, name: str) -> str:
    """What a podTemplate says in place of the settings file: a flag wins over a variable."""
    flag, value = _flag(name), ""
    for entry in objects(container, "env"):
        if text(entry, "name") == _variable(name):
            value = text(entry, "value")
    words = (*texts(container, "command"), *texts(container, "args"))
    for word, following in zip(words, (*words[1:], ""), strict=True):
        if word == flag:
            value = following
        elif word.startswith(f"{flag}="):
            value = word.removeprefix(f"{flag}=")
    return value


def _variable(name: str) -> str:
    return f"BATON_ENGINE_{name.upper()}"


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"
