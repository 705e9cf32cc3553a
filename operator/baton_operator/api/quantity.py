"""Amounts of resources as Kubernetes writes them, as exact numbers. Pure."""

from __future__ import annotations

from decimal import Decimal

_SUFFIXES = {
    "m": Decimal("0.001"), "": Decimal(1), "k": Decimal(10**3), "M": Decimal(10**6), "G": Decimal(10**9),
    "T": Decimal(10**12), "P": Decimal(10**15), "Ki": Decimal(2**10), "Mi": Decimal(2**20), "Gi": Decimal(2**30),
    "Ti": Decimal(2**40), "Pi": Decimal(2**50),
}  # fmt: skip


def amount(quantity: int | str) -> Decimal:
    """`quantity` must have the form of `base.Quantity`, which every field of that type has."""
    text = str(quantity)
    number = text.rstrip("mkKMGTPi")
    return Decimal(number) * _SUFFIXES[text[len(number) :]]


def amount_bytes(quantity: int | str | None) -> int:
    """Of memory or disk, whole bytes; absent = 0."""
    return 0 if quantity is None else int(amount(quantity))


def of_bytes(size_bytes: int) -> str:
    """As short as it can be said exactly."""
    for suffix in ("Ti", "Gi", "Mi", "Ki"):
        unit = int(_SUFFIXES[suffix])
        if size_bytes and size_bytes % unit == 0:
            return f"{size_bytes // unit}{suffix}"
    return str(size_bytes)
