"""The Dockerfiles, read: pinned, without root, without torch where none belongs, and true to the repository."""

from __future__ import annotations

import re
import shutil
import subprocess
import tomllib
from dataclasses import dataclass
from fnmatch import fnmatch
from importlib.util import find_spec
from pathlib import Path

import pytest
from support.chart import ROOT

FILES = {name: ROOT / name / "Dockerfile" for name in ("operator", "router", "worker")}
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
EXTRAS = PROJECT["project"]["optional-dependencies"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Instruction:
    word: str
    rest: str


def instructions(name: str) -> list[Instruction]:
    """Continued lines joined, comments dropped."""
    lines = [line for line in FILES[name].read_text().splitlines() if not line.lstrip().startswith("#")]
    text = re.sub(r"\\\n\s*", " ", "\n".join(lines))
    found = [line.split(maxsplit=1) for line in text.splitlines() if line.strip()]
    return [Instruction(word=word, rest=rest) for word, rest in found]


def of(name: str, word: str) -> list[str]:
    return [instruction.rest for instruction in instructions(name) if instruction.word == word]


def stages(name: str) -> list[list[Instruction]]:
    found: list[list[Instruction]] = []
    for instruction in instructions(name):
        if instruction.word == "FROM":
            found.append([])
        if found:
            found[-1].append(instruction)
    return found


SYSTEM_LIBRARIES = stages("worker")[-1][2].rest  # the only command of a last stage; it brings no tool


def installed(folder: Path, extras: str) -> list[str]:
    """What the worker's last stage installs, by its own shell line, with an apt-get that only writes down."""
    said = folder / "said"
    stub = folder / "apt-get"
    stub.write_text(f'#!/bin/sh\necho "$@" >> {said}\n')
    stub.chmod(0o755)
    line = SYSTEM_LIBRARIES.replace("rm -rf /var/lib/apt/lists/*", "true")
    environment = {"EXTRAS": extras, "PATH": f"{folder}:/usr/bin:/bin"}
    subprocess.run(["sh", "-e", "-c", line], env=environment, check=True, timeout=30)
    words = said.read_text().split() if said.exists() else []
    return [word for word in words if word not in ("update", "install") and not word.startswith("-")]


def test_libraries_of_the_system_come_with_the_extra_that_links_to_them(tmp_path: Path) -> None:
    for number, extras in enumerate(("worker", "worker nixl", "worker mooncake", "worker nixl mooncake")):
        (folder := tmp_path / str(number)).mkdir()
        wanted = {"libcurl4", "libibverbs1", "ibverbs-providers", "libnuma1"} if "mooncake" in extras else set()
        assert set(installed(folder, extras)) == wanted


def test_no_library_that_mooncake_links_to_is_forgotten(tmp_path: Path) -> None:
    """Of the installed wheel: what it needs beyond glibc, the compiler's runtime and what it brings itself."""
    spec = find_spec("mooncake")
    readelf = shutil.which("readelf")
    if spec is None or not spec.submodule_search_locations or readelf is None:
        pytest.skip("Mooncake or readelf is not installed")
    package = Path(spec.submodule_search_locations[0])
    own = [*package.glob("*.so"), *package.parent.glob("mooncake_transfer_engine*.libs/*")]
    told = subprocess.run([readelf, "-d", *map(str, own)], capture_output=True, text=True, check=True).stdout
    needed = set(re.findall(r"\(NEEDED\).*\[(.+)\]", told)) - {file.name for file in own}
    base = re.compile(r"lib(c|m|dl|rt|pthread|resolv|gcc_s|stdc\+\+)\.so.*|ld-linux.*")
    packages = {re.sub(r"\.so\.(\d+)$", r"\1", name) for name in needed if not base.fullmatch(name)}
    assert packages
    assert packages <= set(installed(tmp_path, "worker mooncake"))


@pytest.mark.parametrize("name", FILES)
def test_the_base_is_pinned_by_tag_and_digest(name: str) -> None:
    bases = [rest.split("=", 1)[1] for rest in of(name, "ARG") if rest.startswith("PYTHON_IMAGE=")]
    assert len(bases) == 1
    assert re.fullmatch(r"python:3\.\d+-slim-bookworm@sha256:[0-9a-f]{64}", bases[0])
    assert {rest.split()[0] for rest in of(name, "FROM")} == {"${PYTHON_IMAGE}"}
    assert ":latest" not in FILES[name].read_text()


def test_all_images_share_one_base() -> None:
    """Nodes keep its layers once."""
    assert len({rest for name in FILES for rest in of(name, "ARG") if rest.startswith("PYTHON_IMAGE=")}) == 1


@pytest.mark.parametrize("name", FILES)
def test_the_last_stage_has_a_numeric_user_and_no_tools(name: str) -> None:
    build, last = stages(name)
    (user,) = [instruction.rest for instruction in last if instruction.word == "USER"]
    assert re.fullmatch(r"[1-9]\d*:[1-9]\d*", user)  # a name would not pass runAsNonRoot
    commands = [instruction.rest for instruction in last if instruction.word in ("RUN", "ADD")]
    assert commands == [SYSTEM_LIBRARIES] * (name == "worker")
    assert [i.rest for i in last if i.word == "COPY"] == ["--from=build /opt/baton /opt/baton"]
    assert [i for i in build if i.word == "RUN"]


@pytest.mark.parametrize("name", FILES)
def test_what_is_copied_is_there_and_in_the_build_context(name: str) -> None:
    rules = [line for line in (ROOT / ".dockerignore").read_text().splitlines() if line and not line.startswith("#")]
    assert rules[0] == "*"
    allowed = {rule[1:] for rule in rules if rule.startswith("!")}
    copied = [part for rest in of(name, "COPY") if "--from" not in rest for part in rest.split()[:-1]]
    assert copied
    for source in copied:
        assert (ROOT / source).exists(), source
        assert any(fnmatch(source, rule) for rule in allowed), f"{source} is hidden by .dockerignore"
    rooms = {package.split("/")[0] for package in PROJECT["tool"]["hatch"]["build"]["targets"]["wheel"]["packages"]}
    assert rooms <= set(copied)  # one wheel holds all rooms


@pytest.mark.parametrize("name", FILES)
def test_everything_installed_is_held_to_versions_and_hashes(name: str) -> None:
    for command in of(name, "RUN"):
        for part in re.split(r"&&|;", command):
            if " pip install" in part and "uv" in part.split()[0:2]:
                assert "--constraint constraints.txt" in part or "--no-deps" in part
            elif "pip install" in part and "uv pip" not in part:
                assert "--require-hashes" in part


@pytest.mark.parametrize("name", FILES)
def test_extras_are_those_of_the_project(name: str) -> None:
    text = " ".join(of(name, "RUN"))
    named = set(re.findall(r"--extra ([a-z]+)", text))
    defaults = {rest.split("=", 1)[1].strip('"') for rest in of(name, "ARG") if rest.startswith("EXTRAS=")}
    assert named | defaults == {name}  # each room's extra is called like the room
    in_comments = re.findall(r'EXTRAS="([a-z ]+)"', FILES[name].read_text())
    assert {extra for words in in_comments for extra in words.split()} <= set(EXTRAS)


@pytest.mark.parametrize("name", ["operator", "router"])
def test_operator_and_router_have_no_torch(name: str) -> None:
    wanted = [requirement.lower() for requirement in EXTRAS[name]]
    assert not [requirement for requirement in wanted if requirement.startswith(("torch", "baton["))]
    assert "! /opt/baton/bin/python -c 'import torch'" in " ".join(of(name, "RUN"))  # the build fails otherwise


@pytest.mark.parametrize("name", FILES)
def test_the_entry_point_is_a_program_of_the_project(name: str) -> None:
    (entry,) = of(name, "ENTRYPOINT")
    assert entry.strip('[]"') in PROJECT["project"]["scripts"]


def test_the_worker_comes_for_cpu_cuda_and_rocm() -> None:
    assert "TORCH_BACKEND=cpu" in of("worker", "ARG")
    assert '--torch-backend "${TORCH_BACKEND}"' in " ".join(of("worker", "RUN"))
