"""The images of the end-to-end tests, without Docker, daemon or registry: `python tools/make_images.py --kit KIT`.

Users build the Dockerfiles; this makes the same contents for a local cluster from a Debian base, the kit's `image.py`
and the packages that `uv` resolves. The tag is a digest of everything inside, so equal content is never built twice and
a changed one never hides behind an old tag. Prints one JSON object: {"tag": ..., "archives": [...], "mounts": [...]}.
Workers get torch by a read-only mount of this very environment into every container of the test cluster: see `mounts`.
Needs root once, for the base, and the Python minor version of the Debian release (3.11).
"""

from __future__ import annotations

import argparse
import hashlib
import json
import shutil
import subprocess
import sys
import sysconfig
import tomllib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
RELEASE, PYTHON = "bookworm", (3, 11)
USER = "65532:65532"
SITE = "/opt/site"
MOUNTED_SITE = "/opt/mounted-site"
APP = "/opt/baton"
_PROGRAM = """#!/usr/bin/python3
import sys

from {module} import {function}

sys.exit({function}())
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Image:
    """`extra` names the dependencies in pyproject.toml; None = those of the mounted environment."""

    name: str
    flavour: str
    extra: str | None
    program: str

    def reference(self, tag: str) -> str:
        return f"baton/{self.name}:{tag}{self.flavour}"


IMAGES = (
    Image(name="operator", flavour="", extra="operator", program="baton-operator"),
    Image(name="router", flavour="", extra="router", program="baton-router"),
    Image(name="worker", flavour="-cpu", extra=None, program="baton-decode"),
)


class Failed(SystemExit):
    """Says what to do."""


def project() -> dict[str, dict[str, str]]:
    with (ROOT / "pyproject.toml").open("rb") as file:
        document = tomllib.load(file)
    packages = document["tool"]["hatch"]["build"]["targets"]["wheel"]["packages"]
    return {"scripts": document["project"]["scripts"], "packages": {Path(p).name: p for p in packages}}


def base(cache: Path) -> Path:
    """Debian with Python, as a layer. Made once: a minute."""
    layer = cache / f"base-{RELEASE}.tar"
    if not layer.exists():
        if shutil.which("mmdebstrap") is None:
            raise Failed("the base image needs mmdebstrap: apt-get install --no-install-recommends mmdebstrap")
        options = [f"--dpkgopt=path-exclude=/usr/share/{part}/*" for part in ("man", "locale", "doc")]
        half = layer.with_suffix(".part")
        packages = "--include=python3,libstdc++6,ca-certificates"
        run(["mmdebstrap", "--variant=essential", "--format=tar", packages, *options, RELEASE, str(half)])
        half.rename(layer)
    return layer


def dependencies(cache: Path, extra: str) -> Path:
    """Folder with the packages of one extra, for the base's Python."""
    mark = digest([ROOT / "pyproject.toml", ROOT / "constraints.txt"], extra)
    folder = cache / f"site-{extra}-{mark}"
    if not folder.exists():
        for old in cache.glob(f"site-{extra}-*"):
            shutil.rmtree(old)
        half = folder.with_suffix(".part")
        run([
            str(Path(sys.executable).with_name("uv")), "pip", "install", "--quiet", "--target", str(half),
            "--python", sys.executable, "--link-mode", "copy", "--constraint", str(ROOT / "constraints.txt"),
            "--requirement", str(ROOT / "pyproject.toml"), "--extra", extra,
        ])  # fmt: skip
        half.rename(folder)
    return folder


def application(cache: Path) -> tuple[Path, str]:
    """Our packages and programs, and the digest of them."""
    parts = project()
    folder = cache / "application"
    shutil.rmtree(folder, ignore_errors=True)
    for name, source in parts["packages"].items():
        shutil.copytree(ROOT / source, folder / name, ignore=shutil.ignore_patterns("__pycache__", "*.pyc"))
    shutil.copytree(ROOT / "demo_model" / "checkpoint", folder / "baton_common" / "demo_checkpoint")
    programs = folder / "bin"
    programs.mkdir()
    for name, target in parts["scripts"].items():
        module, _, function = target.partition(":")
        script = programs / name
        script.write_text(_PROGRAM.format(module=module, function=function))
        script.chmod(0o755)
    (programs / "python").symlink_to("/usr/bin/python3")
    return folder, digest(sorted(p for p in folder.rglob("*") if p.is_file()), "application")


def digest(files: Iterable[Path], *words: str) -> str:
    found = hashlib.sha256("\0".join(words).encode())
    for file in files:
        found.update(file.name.encode() + b"\0" + file.read_bytes())
    return found.hexdigest()[:12]


def pack(kit: Path, cache: Path, image: Image, tag: str, layers: Sequence[str]) -> Path:
    archive = cache / f"{image.name}-{tag}{image.flavour}.tar"
    if not archive.exists():
        for old in cache.glob(f"{image.name}-*{image.flavour}.tar"):
            old.unlink()
        half = archive.with_suffix(".part")
        path = f"PATH={APP}/bin:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
        site = MOUNTED_SITE if image.extra is None else SITE
        variables = (path, f"PYTHONPATH={APP}:{site}", "PYTHONUNBUFFERED=1", "PYTHONDONTWRITEBYTECODE=1", "HOME=/tmp")
        run([
            sys.executable, str(kit / "image.py"), "--out", str(half), "--name", image.reference(tag),
            *(part for layer in layers for part in ("--layer", layer)),
            *(part for variable in variables for part in ("--env", variable)),
            "--user", USER, "--workdir", APP, "--entrypoint", image.program,
        ])  # fmt: skip
        half.rename(archive)
    return archive


def run(command: Sequence[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise Failed(f"{' '.join(command)}\n{done.stdout}{done.stderr}")


def make(kit: Path, cache: Path, names: Sequence[str]) -> dict[str, str | list[str]]:
    """The images `names`; returns what `main` prints."""
    if not (kit / "image.py").exists():
        raise Failed(f"{kit} is no cluster kit: it has no image.py")
    if sys.version_info[:2] != PYTHON:
        raise Failed(f"Debian {RELEASE} has Python {'.'.join(map(str, PYTHON))}: run this with the same")
    if not (ROOT / "proto/baton_proto/worker_pb2.py").exists():
        raise Failed("the protobuf stubs are not generated: run make install")
    cache.mkdir(parents=True, exist_ok=True)
    folder, code = application(cache)
    tag = f"{code}{digest([ROOT / 'constraints.txt'])[:4]}"
    archives = []
    for image in IMAGES:
        if image.name in names:
            layers = [str(base(cache))]
            if image.extra is not None:
                layers.append(f"{dependencies(cache, image.extra)}={SITE}")
            archives.append(str(pack(kit, cache, image, tag, [*layers, f"{folder}={APP}"])))
    return {"tag": tag, "archives": archives, "mounts": [f"{sysconfig.get_path('purelib')}:{MOUNTED_SITE}"]}


def main(arguments: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kit", type=Path, default=ROOT.parent / "shared/cluster", help="folder with image.py")
    parser.add_argument("--cache", type=Path, default=Path.home() / ".cache/baton/images")
    parser.add_argument("--image", action="append", choices=[image.name for image in IMAGES], help="default: all")
    chosen = parser.parse_args(arguments)
    names = chosen.image or [image.name for image in IMAGES]
    print(json.dumps(make(chosen.kit.resolve(), chosen.cache, names)))


if __name__ == "__main__":
    main(sys.argv[1:])
