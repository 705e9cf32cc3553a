"""Amounts as Kubernetes writes them: 500m, 2, 16Gi. The API server rewrites them ("1000m" becomes "1")."""

from __future__ import annotations

import re
from decimal import Decimal

_FORM = re.compile(r"([+-]?\d+(?:\.\d*)?|[+-]?\.\d+)(m|k|M|G|T|P|E|Ki|Mi|Gi|Ti|Pi|Ei|)")
_BINARY = {f"{letter}i": Decimal(1024) ** power for power, letter in enumerate("KMGTPE", start=1)}
_DECIMAL = {letter: Decimal(1000) ** power for power, letter in enumerate("kMGTPE", start=1)}
_SCALE = {"": Decimal(1), "m": Decimal("0.001"), **_BINARY, **_DECIMAL}


def amount(text: str) -> Decimal | None:
    """The number of base units; None when it is no quantity."""
    found = _FORM.fullmatch(text)
    return Decimal(found[1]) * _SCALE[found[2]] if found else None
