"""The settings file that all pods of a service mount: one section per program, only what differs from the defaults."""

from __future__ import annotations

import yaml

from baton_common.kube.objects import canonical
from baton_operator.plan.blueprint import Blueprint

_HEAD = "# Made by baton-operator from the InferenceService; edit that instead.\n"


def settings_text(plan: Blueprint) -> str:
    """YAML; equal settings, equal text."""
    sections = {name: dict(section) for name, section in plan.settings.items() if section}
    # through JSON: plain containers only, so that YAML has no tags of ours in it
    return _HEAD + yaml.safe_dump(yaml.safe_load(canonical(sections)), sort_keys=True)
