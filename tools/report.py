"""Prints the longest files and functions and counts the settings; fails when there are more settings than the budget.

Length is a sign, not a rule: a file over 400 lines or a function over 60 (a kernel over 150) probably hides a second
noun, so those are marked, and growing past the line needs a reason. The number of settings is a rule. A setting is an
annotated `Field(...)` of a configuration dataclass (`baton_common.settings`): each has a flag and an environment
variable.
"""

from __future__ import annotations

import ast
import subprocess
import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FILE_LINES = 400
FUNCTION_LINES = 60
KERNEL_LINES = 150  # a Triton kernel cannot be cut into functions as freely
SETTINGS = 80
SHOWN = 10


@dataclass(frozen=True, slots=True, kw_only=True)
class Sized:
    lines: int
    limit: int
    where: str

    def __str__(self) -> str:
        return f"  {self.lines:5d}{' !' if self.lines > self.limit else '  '} {self.where}"


def sources(root: Path) -> list[Path]:
    """Python files of the packages: those that git knows or would add, without tests and generated stubs."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "*.py"]
    names = subprocess.run(command, cwd=root, check=True, stdout=subprocess.PIPE, text=True).stdout.splitlines()
    return [root / name for name in names if not name.startswith(("tests/", "e2e/")) and (root / name).is_file()]


def functions(tree: ast.Module, name: str) -> list[Sized]:
    found: list[Sized] = []
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            lines = (node.end_lineno or node.lineno) - node.lineno + 1
            kernel = any(isinstance(item, ast.Name) and item.id == "jit" for item in node.decorator_list)
            limit = KERNEL_LINES if kernel else FUNCTION_LINES
            found.append(Sized(lines=lines, limit=limit, where=f"{name}:{node.lineno} {node.name}"))
    return found


def settings(tree: ast.Module) -> int:
    """Annotated `Field(...)`s in the dataclasses of one file."""
    count = 0
    for node in ast.walk(tree):
        if isinstance(node, ast.ClassDef) and any("dataclass" in ast.unparse(item) for item in node.decorator_list):
            fields = [item for item in node.body if isinstance(item, ast.AnnAssign)]
            count += sum("Annotated[" in (text := ast.unparse(item.annotation)) and "Field(" in text for item in fields)
    return count


def main() -> int:
    files: list[Sized] = []
    bodies: list[Sized] = []
    counts: Counter[str] = Counter()
    for path in sources(ROOT):
        name, text = str(path.relative_to(ROOT)), path.read_text()
        tree = ast.parse(text, filename=name)
        files.append(Sized(lines=text.count("\n"), limit=FILE_LINES, where=name))
        bodies += functions(tree, name)
        if declared := settings(tree):
            counts[name] = declared
    for title, sized in (
        (f"files (limit {FILE_LINES})", files),
        (f"functions (limit {FUNCTION_LINES}, kernels {KERNEL_LINES})", bodies),
    ):
        longest = sorted(sized, key=lambda item: -item.lines)[:SHOWN]
        over = sum(item.lines > item.limit for item in sized)
        sys.stdout.write(f"longest {title}; {over} over\n" + "".join(f"{item}\n" for item in longest))
    total = counts.total()
    sys.stdout.write(f"settings: {total} of {SETTINGS}\n")
    sys.stdout.write("".join(f"  {declared:5d}   {name}\n" for name, declared in counts.most_common()))
    if total > SETTINGS:
        sys.stdout.write(f"{total - SETTINGS} settings too many: give one a value that always works and delete it\n")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
