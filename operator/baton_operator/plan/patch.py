"""The user's change of a pod template: merged like `kubectl patch` does it. Pure; leaves its arguments as they are.

Maps are merged, `null` removes, lists whose entries have a key (containers by name, ...) are merged by it, in the order
of the template with new entries at the end; every other list is replaced.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from baton_operator.objects import Json, Object

_KEYS: Mapping[str, str] = {
    "containers": "name",
    "initContainers": "name",
    "volumes": "name",
    "env": "name",
    "imagePullSecrets": "name",
    "resourceClaims": "name",
    "volumeMounts": "mountPath",
    "volumeDevices": "devicePath",
    "ports": "containerPort",
    "hostAliases": "ip",
    "topologySpreadConstraints": "topologyKey",
}


def merged(base: Object, patch: Object) -> dict[str, Json]:
    """`base` with `patch` on top."""
    result = dict(base)
    for name, value in patch.items():
        if value is None:
            result.pop(name, None)
        else:
            result[name] = _merged_value(name, result.get(name), value)
    return result


def _merged_value(name: str, base: Json, patch: Json) -> Json:
    if isinstance(patch, Mapping):
        return merged(base if isinstance(base, Mapping) else {}, patch)
    key = _KEYS.get(name)
    if key is None or not _is_list(base) or not _is_list(patch):
        return patch
    assert isinstance(base, Sequence)
    assert isinstance(patch, Sequence)
    return _merged_list(base, patch, key)


def _merged_list(base: Sequence[Json], patch: Sequence[Json], key: str) -> Json:
    changes = {str(item.get(key)): item for item in patch if isinstance(item, Mapping)}
    result: list[Json] = []
    for item in base:
        change = changes.pop(str(item.get(key)), None) if isinstance(item, Mapping) else None
        if isinstance(item, Mapping) and change is not None:
            if change.get("$patch") != "delete":
                result.append(merged(item, change))
        else:
            result.append(item)
    return [*result, *(merged({}, change) for change in changes.values() if change.get("$patch") != "delete")]


def _is_list(value: Json) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, str)
