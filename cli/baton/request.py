"""What `baton up` was asked for: options and service files, made into a Deployment.

Precedence: a flag, then the service file, then the default. A model that is only on the hub is downloaded here, once,
before any process starts. Knows the file system and the hub, no processes.
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from baton.deployment import DEFAULT_PORT, LOOPBACK, Deployment
from baton_common.checkpoint import demo_checkpoint, resolve_checkpoint
from baton_common.errors import ConfigError
from baton_operator.api import DEMO_URI, InferenceService, Role
from baton_operator.document import read_service
from baton_operator.plan.intake import tiers

DEMO_NAME = "baton-demo"
LIBRARIES = {"nixl": ("nixl_cu13", "nixl_cu12"), "mooncake": ("mooncake",)}
"""Packages by wire; any one of them is enough."""

_SERVICE_SUFFIXES = (".yaml", ".yml")


@dataclass(frozen=True, slots=True, kw_only=True)
class UpOptions:
    """Flags of `baton up`; None = not given."""

    target: str | None = None     # checkpoint folder, hub name or service file
    name: str | None = None
    host: str | None = None
    port: int | None = None
    prefill: int | None = None
    decode: int | None = None
    colocated: int | None = None
    device: str | None = None
    dtype: str | None = None
    kv_dtype: str | None = None
    context_tokens: int | None = None
    wire: str | None = None
    served_name: str | None = None
    config: Path | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class _Wanted:
    """Of a model: where it is, and what it is called unless somebody says otherwise."""

    location: str
    called: str
    revision: str | None = None


def service_name(options: UpOptions, default: str) -> str:
    """Name under which the service is supervised: the flag's, the file's, or `default`."""
    if options.name is not None:
        return options.name
    service = _service(options.target)
    return service.metadata.name if service else default


def deployment(options: UpOptions) -> Deployment:
    """May block for long when the model must be downloaded. Raises ConfigError or InvalidDocument."""
    service = _service(options.target)
    wanted = _from_service(service, options.target) if service else _from_target(options.target)
    counts = _counts(options, service)
    spec = service.spec if service else None
    return Deployment(
        model=str(resolve_checkpoint(wanted.location, revision=wanted.revision)),
        served_name=options.served_name or (spec.model.served_name if spec else None) or wanted.called,
        host=options.host or LOOPBACK,
        port=options.port or (spec.router.port if spec else DEFAULT_PORT),
        prefill=counts[0],
        decode=counts[1],
        colocated=counts[2],
        device=options.device,
        dtype=options.dtype or (_unless_auto(spec.model.dtype) if spec else None),
        kv_dtype=options.kv_dtype or (_unless_auto(spec.model.kv_dtype) if spec else None),
        context_tokens=options.context_tokens or (spec.model.context_tokens if spec else None),
        wire=_available(options.wire or (spec.transport.wire if spec else None)),
        tiers=tiers(spec.cache) if spec else None,
        collector=spec.tracing.endpoint if spec and spec.tracing else None,
        config=options.config,
    )


def _service(target: str | None) -> InferenceService | None:
    return read_service(Path(target)) if target is not None and target.endswith(_SERVICE_SUFFIXES) else None


def _from_target(target: str | None) -> _Wanted:
    if target is None:
        return _Wanted(location=str(demo_checkpoint()), called=DEMO_NAME)
    folder = Path(target).expanduser()
    return _Wanted(location=target, called=folder.resolve().name if folder.is_dir() else target)


def _from_service(service: InferenceService, target: str | None) -> _Wanted:
    model = service.spec.model
    if model.uri == DEMO_URI:
        return _Wanted(location=str(demo_checkpoint()), called=model.name)
    scheme, _, rest = model.uri.partition("://")
    if scheme == "hf":
        name, _, revision = rest.partition("@")
        return _Wanted(location=name, called=model.name, revision=model.revision or revision or None)
    folder = Path(target or ".").resolve().parent / rest    # an absolute path stays what it is
    return _Wanted(location=str(folder), called=folder.resolve().name)


def _counts(options: UpOptions, service: InferenceService | None) -> tuple[int, int, int]:
    """Prefill, decode and colocated workers. Asking only for colocated ones asks for no others."""
    if service:
        pools = [service.spec.pool(role) for role in (Role.PREFILL, Role.DECODE, Role.COLOCATED)]
        base = (pools[0].least, pools[1].least, pools[2].least)
    else:
        base = (0, 0, 0) if options.colocated and options.prefill is None and options.decode is None else (1, 1, 0)
    return (
        base[0] if options.prefill is None else options.prefill,
        base[1] if options.decode is None else options.decode,
        base[2] if options.colocated is None else options.colocated,
    )


def _available(wire: str | None) -> str | None:
    """Raises ConfigError when its library is not there: workers would say so only after they have loaded the model."""
    if wire in LIBRARIES and not any(find_spec(name) for name in LIBRARIES[wire]):
        raise ConfigError(
            f"the {wire} wire needs a library that is not installed; pip install 'baton[{wire}]', or take another wire "
            "with --wire",
            param="wire",
        )
    return wire


def _unless_auto(value: str) -> str | None:
    return None if value == "auto" else value
