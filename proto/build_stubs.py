"""Build hook: turns `baton_proto/*.proto` into Python stubs, for wheels and for editable installs alike.

The stubs are never edited and never committed. `python proto/build_stubs.py` does the same by hand while a `.proto` is
being changed. It runs in a process of its own: grpc_tools and nixl cannot share one (their protobuf runtimes clash).
A wheel also takes the demo model along: `baton_common.checkpoint` finds it there.
"""

from __future__ import annotations

import re
import sys
from importlib.resources import files
from pathlib import Path
from typing import Any

from grpc_tools import protoc

ROOM = Path(__file__).resolve().parent
WITH_SERVICES = {"worker"}


def generate(room: Path = ROOM) -> list[Path]:
    """Write the stubs beside their sources and return them. Raises RuntimeError with protoc's exit status."""
    include = str(files("grpc_tools") / "_proto")
    sources = sorted((room / "baton_proto").glob("*.proto"))
    for source in sources:
        arguments = ["protoc", f"-I{room}", f"-I{include}", f"--python_out={room}", f"--pyi_out={room}"]
        if source.stem in WITH_SERVICES:
            arguments.append(f"--grpc_python_out={room}")
        status = protoc.main([*arguments, str(source.relative_to(room))])
        if status != 0:
            raise RuntimeError(f"protoc failed with status {status} on {source}")
    written = sorted((room / "baton_proto").glob("*_pb2*.py*"))
    for stub in written:  # trailing whitespace makes otherwise equal stubs differ between protoc releases
        stub.write_text(re.sub(r"[ \t]+$", "", stub.read_text(), flags=re.MULTILINE))
    return written


try:
    from hatchling.builders.hooks.plugin.interface import BuildHookInterface
except ImportError:  # run by hand, outside a build
    pass
else:

    class StubsHook(BuildHookInterface[Any]):
        """Called by hatchling before it collects files."""

        PLUGIN_NAME = "custom"

        def initialize(self, version: str, build_data: dict[str, Any]) -> None:
            generate()
            demo = ROOM.parent / "demo_model" / "checkpoint"
            if version != "editable" and demo.is_dir():  # an editable install finds it in the checkout
                build_data["force_include"][str(demo)] = "baton_common/demo_checkpoint"


if __name__ == "__main__":
    for path in generate():
        sys.stdout.write(f"{path}\n")
