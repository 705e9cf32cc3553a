"""What the code of a compiled kernel needs and consists of, read from the binary: no device has to be here.

NVIDIA's two disassemblers come with Triton; AMD's backend leaves its assembly text, in which the assembler has written
what it used. Counts are of instructions in the text, not of how often they run. It does not know families or tables.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from baton_kernels.capabilities import Capabilities
from baton_kernels.rt.program import Program

NARROW_AND_WIDE = frozenset({"U8", "S8", "U16", "S16", "64", "128", "256"})  # a memory access without one has 32 bits
SASS_ACCESSES = frozenset({"LDG", "STG", "LDGSTS", "UTMALDG", "UTMASTG"})
SASS_SPILLS = frozenset({"LDL", "STL"})
SASS_MATRIX = re.compile(r"(UTC)?[A-Z]G?MMA")
SASS_LINE = re.compile(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)", re.MULTILINE)
AMD_LINE = re.compile(r"^\s+(?:(v_s?mfmac?_\w+)|(?:global|buffer|flat)_((?:load|store)_\w+)(.*))", re.MULTILINE)
AMD_NUMBER = re.compile(r"^\s+\.(\w+):\s+(\d+)\s*$", re.MULTILINE)

MATRIX: Mapping[str, str] = {
    "mma": r"[A-Z]MMA",
    "wgmma": r"[A-Z]GMMA",
    "tcgen05": r"UTC[A-Z]MMA",
    "mfma": r"v_s?mfmac?_.*",
}
"""`Capabilities.matrix` -> names of these instructions."""
WIDE_LOAD = r"(LDG|LDGSTS)\.(128|256)|UTMALDG|load_(lds_)?dwordx4"


@dataclass(frozen=True, slots=True, kw_only=True)
class Resources:
    """Of one kernel."""

    registers: int  # per thread
    spills: int  # NVIDIA: instructions that reach local memory; AMD: vector registers
    scalar_spills: int = 0  # AMD: scalar registers kept in lanes of vector registers, which is cheap outside a loop
    stack: int  # bytes per thread
    shared: int  # bytes per program
    code: Mapping[str, int]  # matrix instructions and accesses of global memory with their width -> how many

    @property
    def beyond_limits(self) -> Mapping[str, int]:
        """What should be zero and is not, by its name with a unit."""
        found = {"spills": self.spills, "scalar spills": self.scalar_spills, "bytes of stack": self.stack}
        return {name: count for name, count in found.items() if count}


def resources(program: Program) -> Resources:
    """Compiles for the program's target, unless that was done. CompileFailed."""
    compiled = program.compile()
    shared = int(compiled.metadata.shared)
    if "cubin" in compiled.asm:
        return _nvidia(compiled.asm["cubin"], shared)
    return amd_resources(compiled.asm["amdgcn"], shared)


def missing(expected: Sequence[str], capabilities: Capabilities, code: Mapping[str, int]) -> tuple[str, ...]:
    """Which of the expected kinds of instruction (see `registry.Family.expects`) the code does not contain."""
    patterns = {
        "matrix": "|".join(MATRIX.values()),
        "widest matrix": MATRIX[capabilities.matrix],
        "descriptor": "UTMALDG" if capabilities.descriptors else "",
        "wide load": WIDE_LOAD,
    }
    return tuple(
        name for name in expected if patterns[name] and not any(re.fullmatch(patterns[name], kind) for kind in code)
    )


def prized(kind: str) -> bool:
    """Whether code that loses this kind of instruction got worse: matrix units, bulk copies, 16 bytes at a time."""
    return bool(re.search(r"MMA|mfma|UTMA|\.128|\.256|dwordx4", kind))


def sass_code(text: str) -> Counter[str]:
    """Kinds of instruction in NVIDIA's assembly: matrix, global memory and spills."""
    found: Counter[str] = Counter()
    for name in SASS_LINE.findall(text):
        head, *modifiers = name.split(".")
        if head in SASS_SPILLS or SASS_MATRIX.fullmatch(head):
            found[head] += 1
        elif head in SASS_ACCESSES:
            width = next((one.lstrip("US") for one in modifiers if one in NARROW_AND_WIDE), "32")
            found[head if head.startswith("UTMA") else f"{head}.{width}"] += 1
    return found


def amd_resources(text: str, shared: int) -> Resources:
    """From AMD's assembly, at whose end the assembler wrote the numbers."""
    numbers = {name: int(value) for name, value in AMD_NUMBER.findall(text)}
    code: Counter[str] = Counter()
    for matrix, access, rest in AMD_LINE.findall(text):
        to_shared = " lds" in rest and "_lds_" not in access
        code[matrix or (access.replace("load_", "load_lds_", 1) if to_shared else access)] += 1
    return Resources(
        registers=numbers["vgpr_count"],
        spills=numbers["vgpr_spill_count"],
        scalar_spills=numbers["sgpr_spill_count"],
        stack=numbers["private_segment_fixed_size"],
        shared=shared,
        code=dict(sorted(code.items())),
    )


def _nvidia(cubin: bytes, shared: int) -> Resources:
    from triton import knobs  # noqa: PLC0415 - absent where there is no Triton

    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        used = _said(knobs.nvidia.cuobjdump, "--dump-resource-usage", file.name)
        code = sass_code(_said(knobs.nvidia.nvdisasm, "--print-code", "--no-dataflow", file.name))
    numbers = {name: int(value) for name, value in re.findall(r"\b(REG|STACK):(\d+)", used)}
    return Resources(
        registers=numbers["REG"],
        spills=sum(code.pop(name, 0) for name in SASS_SPILLS),
        scalar_spills=0,
        stack=numbers["STACK"],
        shared=shared,
        code=dict(sorted(code.items())),
    )


def _said(tool: Any, *arguments: str) -> str:
    return subprocess.run([tool.path, *arguments], capture_output=True, text=True, check=True).stdout
