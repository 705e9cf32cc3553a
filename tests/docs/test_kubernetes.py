"""docs/kubernetes.md says what the code does: fields, reasons, rights, commands, samples and links."""

from __future__ import annotations

import ast
import importlib.util
import re
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import typer
import yaml

import baton.cluster_report
import baton_operator
from baton.main import app
from baton_operator.api import AcceleratorProfile, InferenceService
from baton_operator.config import OperatorConfig
from baton_operator.crd import structural
from baton_operator.plan.children import desired
from baton_operator.plan.intake import Platform, blueprint
from baton_operator.shipped import shipped_profiles

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs/kubernetes.md").read_text()
REASON = re.compile(r"[A-Z][A-Za-z]{3,}")
TELLERS = ("Refused", "_not_yet")  # called with the reason first


def tool() -> ModuleType:
    spec = importlib.util.spec_from_file_location("fields", ROOT / "tools/fields.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["fields"] = module
    spec.loader.exec_module(module)
    return module


def words(node: ast.AST | None) -> Iterator[str]:
    """The strings that an expression may be."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        yield node.value
    elif isinstance(node, ast.IfExp):
        yield from words(node.body)
        yield from words(node.orelse)


def reasons_of(file: Path) -> set[str]:
    """Every reason that a file of the operator can give."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Call):
            found |= {word for keyword in node.keywords if keyword.arg == "reason" for word in words(keyword.value)}
            if isinstance(node.func, ast.Name) and node.func.id in TELLERS and node.args:
                found |= set(words(node.args[0]))
        elif isinstance(node, ast.Assign) and "reason" in [ast.unparse(target) for target in node.targets]:
            found |= set(words(node.value))
    return {word for word in found if REASON.fullmatch(word)}


def operator_reasons() -> set[str]:
    folder = Path(next(iter(baton_operator.__path__)))
    return set().union(*(reasons_of(file) for file in sorted(folder.rglob("*.py"))))


def rows() -> Iterator[tuple[str, str]]:
    """(heading, first cell) of every row of a table."""
    heading = ""
    for line in PAGE.splitlines():
        if line.startswith("#"):
            heading = line.lstrip("# ")
        elif line.startswith("| `"):
            yield heading, line.split("|")[1]


def test_tables_of_fields_are_as_the_models() -> None:
    assert tool().filled(PAGE) == PAGE, "run python tools/fields.py"


def test_every_field_of_both_kinds_has_its_row() -> None:
    made = tool().tables()
    service = structural(InferenceService)
    spec: Any = service["properties"]["spec"]["properties"]  # type: ignore[index,call-overload]
    profile: Any = structural(AcceleratorProfile)["properties"]["spec"]["properties"]  # type: ignore[index,call-overload]
    assert [row.name for row in made["spec"]] == list(spec)
    assert {row.name.partition(".")[0] for row in made["profile"]} == set(profile)
    assert {row.name.partition(".")[0] for row in made["router"]} == set(spec["router"]["properties"])
    assert all(row.meaning for table in made.values() for row in table)
    assert set(made) == set(re.findall(r"<!-- fields: ([\w.]+) -->", PAGE))


def test_fields_that_the_text_names_exist() -> None:
    spec: Any = structural(InferenceService)["properties"]["spec"]  # type: ignore[index,call-overload]
    sections = "|".join(spec["properties"])
    named = set(re.findall(rf"`(?:spec\.)?((?:{sections})(?:\.\w+)+)", PAGE))
    assert len(named) > 5
    for path in named:
        found: Any = spec
        for part in path.split("."):
            assert part in found["properties"], f"there is no {path}"
            found = found["properties"][part]


def test_every_reason_is_explained_and_every_explained_reason_exists() -> None:
    told = operator_reasons()
    assert {"Valid", "ProfileNotFound", "Unschedulable", "SecretNotFound", "NameTaken", "NotProbed"} <= told
    explained = set(re.findall(r"`([A-Z][A-Za-z]+)`", PAGE))
    assert told - explained == set()
    in_tables = {
        reason for heading, cell in rows() if "Ready" in heading or heading.startswith("Accepted")
        for reason in REASON.findall(cell)
    }  # fmt: skip
    assert in_tables - told == set()


def test_what_baton_status_adds_is_explained() -> None:
    source = Path(baton.cluster_report.__file__).read_text()
    conditions = {"Ready", "ContainersReady", "Failed", "True"}
    own = set(re.findall(r'"([A-Z][a-z]+(?:[A-Z][a-z]+)*)"[,)]', source)) - conditions
    assert {"NotSeen", "StatusOutdated", "Deleting"} <= own
    assert {reason for reason in own if f"`{reason}`" not in PAGE} == set()


def granted() -> Iterator[tuple[str, str]]:
    """(resource, verb) of every rule of the chart."""
    text = (ROOT / "charts/baton/templates/rbac.yaml").read_text()
    for resources, verbs in re.findall(r"resources: \[(.*?)\]\n(?:\s+resourceNames: .*\n)?\s+verbs: \[(.*?)\]", text):
        yield from ((resource, verb) for resource in resources.split(", ") for verb in verbs.split(", "))


def test_the_rights_of_the_operator_are_those_of_the_chart() -> None:
    rights = PAGE.partition("# Rights")[2].partition("# Security")[0]
    told = {
        (resource, verb)
        for line in rights.splitlines() if line.startswith("| `")
        for resource in re.findall(r"`([\w/]+)`", line.split("|")[1])
        for verb in re.findall(r"\w+", line.split("|")[2])
    }  # fmt: skip
    # one row for the three: "`inferenceservices`, their `status` and `finalizers`"
    whole = {(re.sub(r"^(inferenceservices)/.*", r"\1", resource), verb) for resource, verb in granted()}
    assert len(whole) > 50
    assert whole - told == set()
    verbs = {verb for _, verb in whole}
    known = {resource for resource, _ in whole}
    assert {pair for pair in told if pair[0] in known and pair[1] in verbs} - whole == set()


def test_the_rights_of_a_router_are_those_of_the_planner() -> None:
    rights = PAGE.partition("# Rights")[2].partition("# Security")[0]
    config = OperatorConfig()
    platform = Platform(router_image=config.router_image, worker_image=config.worker_image)
    service = InferenceService.parse(yaml.safe_load((ROOT / "docs/samples/cpu-demo.yaml").read_text()))
    made = desired(blueprint(service, shipped_profiles()["cpu"], platform), served=[])
    role: Any = next(child.manifest for child in made.children if child.kind.kind == "Role")
    line = " ".join(rights.partition("**The router**")[2].partition("**Workers**")[0].split())
    for rule in role["rules"]:
        assert f"`{rule['resources'][0]}` {', '.join(rule['verbs'])}" in line


def test_the_first_service_is_the_sample_and_every_sample_is_listed() -> None:
    sample = (ROOT / "docs/samples/cpu-demo.yaml").read_text()
    assert re.sub(r"^#.*\n", "", sample) in PAGE
    listed = PAGE.partition("## Samples")[2].partition("# Fields")[0]
    present = {file.name for file in (ROOT / "docs/samples").glob("*.yaml")}
    assert present == set(re.findall(r"`([\w-]+\.yaml)`", listed))


def commands() -> list[str]:
    blocks = re.findall(r"```sh\n(.*?)```", PAGE, re.DOTALL)
    lines = [line.partition(" #")[0].strip() for block in blocks for line in block.splitlines()]
    typed = lines + re.findall(r"`(baton [^`]+)`", PAGE)
    return [line for line in typed if line.startswith("baton ")]


@pytest.mark.parametrize("line", commands())
def test_every_baton_command_of_the_page_exists_with_its_options(line: str) -> None:
    [_, name, *arguments] = shlex.split(line.partition("|")[0])
    command = typer.main.get_command(app).commands[name]  # type: ignore[attr-defined]
    known = {option for parameter in command.params for option in parameter.opts}
    assert {word for word in arguments if word.startswith("-")} <= known


def test_links_lead_somewhere() -> None:
    titles = [line.lstrip("# ").lower() for line in PAGE.splitlines() if line.startswith("#")]
    headings = {re.sub(r"[^\w -]", "", title).replace(" ", "-") for title in titles}
    for target in re.findall(r"\]\(([^)]+)\)", PAGE):
        path, _, anchor = target.partition("#")
        assert not path or (ROOT / "docs" / path).is_file(), target
        assert not anchor or path or anchor in headings, target
    for path in re.findall(r"`((?:docs|charts|operator|crds)/[\w./-]+)`", PAGE):
        assert (ROOT / path).exists(), path
