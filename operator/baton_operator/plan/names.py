"""Names of children: at most 63 characters, valid for every kind, different for different services.

A short plain service name is kept as it is; any other is cut and gets a hash of the whole name. Two services can still
ask for one name (`a` + `b-peers`, `a-b` + `peers`); whoever applies checks the owner first.
"""

from __future__ import annotations

import hashlib
import re

LONGEST = 63
_HASH_DIGITS = 8
_PLAIN = re.compile(r"[a-z]([a-z0-9-]*[a-z0-9])?")


def child_name(service: str, *suffix: str) -> str:
    """DNS-1035 label made of the service's name and what the child is for."""
    return _fit(service, "".join(f"-{part}" for part in suffix))


def label_value(service: str) -> str:
    """The service's name as the value of a label."""
    return _fit(service, "")


def _fit(service: str, tail: str) -> str:
    whole = service + tail
    if len(whole) <= LONGEST and _PLAIN.fullmatch(service):
        return whole
    mark = hashlib.sha256(service.encode()).hexdigest()[:_HASH_DIGITS]
    head = re.sub(r"[^a-z0-9-]", "-", service.lower())
    if not head[:1].isalpha():
        head = f"s-{head}"
    head = head[: LONGEST - len(tail) - _HASH_DIGITS - 1].strip("-")
    return f"{head}-{mark}{tail}"
