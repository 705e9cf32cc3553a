"""The wires that tests run over, and which of them this machine cannot run."""

from __future__ import annotations

import pytest
from _pytest.mark.structures import ParameterSet

from baton_kvtransfer.wires.oneside import mooncake, nixl

_LOADERS = {"nixl": nixl.load, "mooncake": mooncake.load}
ONESIDED = tuple(_LOADERS)


def needs(wire: str) -> list[pytest.MarkDecorator]:
    """Marks that skip a test where the wire's library cannot be loaded."""
    if wire not in _LOADERS:
        return []
    try:
        _LOADERS[wire]()
    except ImportError as error:
        return [pytest.mark.skip(reason=f"the {wire} wire cannot be had here: {error}")]
    return []


def over(*wires: str) -> list[ParameterSet]:
    """Parameters, one per wire."""
    return [pytest.param(wire, marks=needs(wire), id=wire) for wire in wires]
