"""The checks that guard the code base see what they should see."""

import ast
import importlib.util
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

TOOLS = Path(__file__).resolve().parents[2] / "tools"


def load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, TOOLS / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


def test_settings_are_the_annotated_fields_of_dataclasses() -> None:
    tree = ast.parse(
        "@dataclass(frozen=True)\n"
        "class Config:\n"
        "    port: Annotated[int, Field(ge=0)] = 1\n"
        "    name: Annotated[str, 'no field']\n"
        "    other: int = 3\n"
        "class Spec(BaseModel):\n"
        "    replicas: Annotated[int, Field(ge=0)] = 1\n"
    )
    assert load("report").settings(tree) == 1


def test_lengths_of_functions_count_methods_and_async_ones() -> None:
    tree = ast.parse("class A:\n    def f(self):\n        pass\nasync def g():\n    pass\n    pass\n")
    found = {item.where.split()[-1]: item.lines for item in load("report").functions(tree, "x.py")}
    assert found == {"f": 2, "g": 3}


def test_locking_drops_hashes_of_packages_that_come_in_several_builds_only() -> None:
    numpy = "numpy==2 \\\n    --hash=sha256:aa \\\n    --hash=sha256:bb\n"
    tqdm = "tqdm==4 \\\n    --hash=sha256:dd\n"
    text = f"{numpy}torch==2.13.0 \\\n    --hash=sha256:cc\n{tqdm}"
    assert load("lock").without_hashes(text, frozenset({"torch", "triton"})) == f"{numpy}torch==2.13.0\n{tqdm}"


def test_the_constraints_hold_versions_and_hashes_and_no_addresses() -> None:
    text = (TOOLS.parent / "constraints.txt").read_text()
    assert "://" not in text
    assert " @ " not in text
    without = [
        line.split("==")[0]
        for line in text.splitlines()
        if not line.startswith((" ", "#")) and not line.endswith("\\")
    ]
    assert set(without) == {"torch", "triton"}


def test_a_heavy_import_is_found_wherever_in_the_package_it_hides(tmp_path: Path) -> None:
    (tmp_path / "room").mkdir()
    (tmp_path / "room" / "__init__.py").write_text("")
    (tmp_path / "room" / "deep.py").write_text("import numpy\n")
    run = subprocess.run(
        [sys.executable, str(TOOLS / "no_torch.py"), "room"],
        cwd=tmp_path, env={"PYTHONPATH": str(tmp_path)}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert run.returncode == 1
    assert "loads numpy" in run.stdout


@pytest.mark.parametrize("candidate", ["/nonexistent/python", "/bin/true-not-there"])
def test_without_a_usable_python_the_message_says_which_are_and_how_to_name_one(candidate: str) -> None:
    run = subprocess.run([str(TOOLS / "find-python"), candidate], capture_output=True, text=True, check=False)
    assert run.returncode == 1
    assert "3.11, 3.12 or 3.13" in run.stderr
    assert "make PYTHON=" in run.stderr
