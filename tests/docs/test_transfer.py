"""docs/transfer.md says what the code does: wires, metrics, settings, the example of a cache, links."""

from __future__ import annotations

import json
import re
from pathlib import Path

import yaml
from charts.test_queries import EMITTED

from baton_kvtransfer.wires.choice import WIRES
from baton_operator.api import InferenceService
from baton_router.schema import CacheControl
from baton_worker.tiering import parse_tiers

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs/transfer.md").read_text()


def section(title: str) -> str:
    return PAGE.partition(f"\n## {title}\n")[2].partition("\n## ")[0]


def anchors(page: str) -> set[str]:
    titles = re.findall(r"^#+ (.+)$", page, re.MULTILINE)
    return {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles}


def test_every_wire_has_its_row() -> None:
    assert sorted(re.findall(r"^\| `(\w+)` \|", section("Wires"), re.MULTILINE)) == sorted(WIRES)


def test_metrics_that_are_named_exist() -> None:
    named = re.findall(r"`(baton_\w+?)(\*?)`", PAGE)
    assert len(named) > 4
    for name, star in named:
        assert any(known.startswith(name) if star else known == name for known in EMITTED), name


def test_the_example_of_a_cache_is_valid() -> None:
    [written] = re.findall(r"```yaml\n(.*?)```", section("Tiers"), re.DOTALL)
    spec = yaml.safe_load(written)["spec"]
    service = {
        "apiVersion": "serving.baton.dev/v1alpha1", "kind": "InferenceService", "metadata": {"name": "a"},
        "spec": {"model": {"uri": "hf://a/b"}, **spec},
    }  # fmt: skip
    assert InferenceService.parse(service).spec.cache is not None


def test_the_setting_and_the_field_of_sessions_are_understood() -> None:
    [text] = re.findall(r"`--tiers (\S+)`", PAGE)
    assert parse_tiers(text).mooncake_master
    [body] = re.findall(r"```json\n(.*?)```", section("Sessions"), re.DOTALL)
    assert CacheControl.model_validate(json.loads(body)["cache_control"]).ttl_s() == 1800


def test_links_lead_somewhere() -> None:
    for target in re.findall(r"\]\(([^)]+)\)", PAGE):
        path, _, anchor = target.partition("#")
        page = (ROOT / "docs" / path).read_text() if path else PAGE
        assert not anchor or anchor in anchors(page), target
    for path in re.findall(r"`(tests/[\w./-]+)`", PAGE):
        assert (ROOT / path).exists(), path


def test_links_from_other_pages_lead_to_its_headings() -> None:
    for name in ("kubernetes", "monitoring"):
        for anchor in re.findall(r"\(transfer\.md#([\w-]+)\)", (ROOT / f"docs/{name}.md").read_text()):
            assert anchor in anchors(PAGE)
