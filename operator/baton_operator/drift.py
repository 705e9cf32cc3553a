"""Does a live object still say what we applied? Pure.

The server adds defaults and other managers add fields of their own: neither is drift. Drift is a field of ours that is
gone or different, and anything added to a list that has one owner as a whole (a rule of a NetworkPolicy or of a Role).
In a Deployment's pod template and a Service's ports, lists are maps with a key: others may add entries, not touch ours.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from baton_common.kube.objects import Json, Object
from baton_operator.quantity import amount

_MERGE_KEYS: Mapping[str, tuple[str, ...]] = {
    "containers": ("name",),
    "initContainers": ("name",),
    "volumes": ("name",),
    "env": ("name",),
    "imagePullSecrets": ("name",),
    "ownerReferences": ("uid",),
    "volumeMounts": ("mountPath",),
    "ports": ("containerPort", "port", "protocol"),
    "topologySpreadConstraints": ("topologyKey", "whenUnsatisfiable"),
    "readinessGates": ("conditionType",),
    "finalizers": (),
}
_KEYED_EVERYWHERE = frozenset({"ownerReferences"})
_KINDS_WITH_KEYED_LISTS = frozenset({"Deployment", "Service"})
_PORT_DEFAULTS: Mapping[str, Json] = {"protocol": "TCP"}


def drifted(desired: Object, live: Object) -> list[str]:
    """Dotted paths of what is ours and not as we want it; empty = nothing to do."""
    keyed = desired.get("kind") in _KINDS_WITH_KEYED_LISTS
    return list(_compare(desired, live, "", keyed))


def _compare(desired: Json, live: Json, path: str, keyed: bool) -> Iterator[str]:
    if isinstance(desired, Mapping):
        if not isinstance(live, Mapping):
            if desired or live is not None:  # the server drops empty maps
                yield path
            return
        for name, value in desired.items():
            yield from _compare(value, live.get(name), f"{path}.{name}" if path else name, keyed)
    elif isinstance(desired, Sequence) and not isinstance(desired, str):
        yield from _compare_lists(desired, live, path, keyed)
    elif not _equal(desired, live):
        yield path


def _compare_lists(desired: Sequence[Json], live: Json, path: str, keyed: bool) -> Iterator[str]:
    if not isinstance(live, Sequence) or isinstance(live, str):
        if desired:
            yield path
        return
    name = path.rpartition(".")[2]
    keys = _MERGE_KEYS.get(name) if keyed or name in _KEYED_EVERYWHERE else None
    if keys is None:
        if len(desired) != len(live):
            yield path
            return
        for index, (ours, theirs) in enumerate(zip(desired, live, strict=True)):
            yield from _compare(ours, theirs, f"{path}.{index}", keyed)
        return
    there = {_key(item, keys): item for item in live}
    for item in desired:
        key = _key(item, keys)
        yield from _compare(item, there.get(key), f"{path}.{key[0] if key else ''}", keyed)


def _key(item: Json, keys: tuple[str, ...]) -> tuple[str, ...]:
    if not isinstance(item, Mapping):
        return (str(item),)
    return tuple(str(item.get(key, _PORT_DEFAULTS.get(key))) for key in keys)


def _equal(desired: Json, live: Json) -> bool:
    if desired == live:
        # True == 1 in Python, not in JSON
        return isinstance(desired, bool) == isinstance(live, bool)
    if desired is None or live is None:
        return False
    if isinstance(desired, bool) or isinstance(live, bool):
        return False
    if isinstance(desired, str | int | float) and isinstance(live, str | int | float):
        ours, theirs = amount(str(desired)), amount(str(live))
        return ours is not None and ours == theirs
    return False
