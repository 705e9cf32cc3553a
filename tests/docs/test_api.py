"""docs/api.md names every field that a request may have, and none that it may not."""

from __future__ import annotations

import re
from pathlib import Path

from baton_router.schema import CacheControl, ChatRequest, CompletionRequest

PAGE = (Path(__file__).resolve().parents[2] / "docs/api.md").read_text()


def section(title: str) -> str:
    return PAGE.split(f"## {title}\n")[1].split("\n## ")[0]


def rows(text: str) -> set[str]:
    return set(re.findall(r"^\| `(\w+)` \|", text, re.MULTILINE))


def test_every_field_of_a_request_is_told() -> None:
    told = set(re.findall(r"`(\w+)`", section("Fields of a request")))
    known = set(ChatRequest.model_fields) | set(CompletionRequest.model_fields)
    assert known <= told, "not in docs/api.md"
    assert rows(section("Fields of a request")) <= known, "no field of a request"


def test_every_key_of_cache_control_is_told() -> None:
    assert rows(section("cache_control")) == set(CacheControl.model_fields)
