"""The profiles that come with Baton: `profiles/*.yaml`, each named after its file."""

from __future__ import annotations

from pathlib import Path

import yaml

from baton_operator.api import AcceleratorProfile

FOLDER = Path(__file__).with_name("profiles")


def shipped_profiles() -> dict[str, AcceleratorProfile]:
    """By name. Reads files; raises pydantic.ValidationError when one is not a profile."""
    profiles = [AcceleratorProfile.parse(yaml.safe_load(file.read_text())) for file in sorted(FOLDER.glob("*.yaml"))]
    return {profile.metadata.name: profile for profile in profiles}
