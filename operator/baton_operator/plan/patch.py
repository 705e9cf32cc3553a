"""The user's change of a pod template: merged like `kubectl patch` does it. Pure; leaves its arguments as they are.

Maps are merged, `null` removes, lists whose entries have a key (containers by name, ...) are merged by it, in the order
of the template with new entries at the end; every other list is replaced.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from baton_common.kube.objects import Json, Object

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
    if key is None:
        return patch
    ours, theirs = {} if base is None else _by_key(base, key), _by_key(patch, key)
    if ours is None or theirs is None:
        return patch
    return _merged_list(ours, theirs)


def _by_key(value: Json, key: str) -> dict[str, Object] | None:
    """The items of a list by their key, in order; None unless each is an object with a key of its own."""
    if not isinstance(value, Sequence) or isinstance(value, str):
        return None
    items = {str(item[key]): item for item in value if isinstance(item, Mapping) and key in item}
    return items if len(items) == len(value) else None


def _merged_list(base: Mapping[str, Object], patch: Mapping[str, Object]) -> Json:
    changed = {name: merged(base.get(name, {}), item) for name, item in patch.items() if not _deletes(item)}
    kept = {name: item for name, item in base.items() if name not in patch}
    both = kept | changed
    return [both[name] for name in dict.fromkeys([*base, *patch]) if name in both]


def _deletes(item: Object) -> bool:
    return item.get("$patch") == "delete"
