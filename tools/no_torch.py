"""Checks that importing each package named on the command line, with all its modules, loads no torch.

Routers and operators run in images without it. Each import happens alone, in a fresh interpreter.
"""

from __future__ import annotations

import subprocess
import sys

HEAVY = ("torch", "transformers", "triton", "numpy")
PROGRAM = """
import importlib, pkgutil, sys
package = importlib.import_module({module!r})
for found in pkgutil.walk_packages(getattr(package, "__path__", []), package.__name__ + "."):
    if not found.name.endswith(".__main__"):
        importlib.import_module(found.name)
print(*(name for name in {heavy!r} if name in sys.modules))
"""


def heavy_imports(module: str) -> list[str]:
    """Which of the heavy packages `module` loads. Raises CalledProcessError when the import itself fails."""
    program = PROGRAM.format(module=module, heavy=HEAVY)
    run = subprocess.run([sys.executable, "-c", program], check=True, stdout=subprocess.PIPE, text=True, timeout=60)
    return run.stdout.split()


def main(modules: list[str]) -> int:
    failures = 0
    for module in modules:
        loaded = heavy_imports(module)
        failures += bool(loaded)
        sys.stdout.write(f"  import {module}: {'loads ' + ', '.join(loaded) if loaded else 'ok'}\n")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
