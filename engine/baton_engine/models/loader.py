"""Checkpoint folder -> LoadedModel. Names, shapes and dtypes are checked in the headers, then each tensor is read once.

While a tensor is read it is hashed, converted and copied into its place, so peak memory is the weights themselves.
The digest covers the spec and every tensor as stored, in an order that does not depend on how files are split.
Everything wrong with a checkpoint is a ConfigError of one line. It does not know the hub, nor tokenizers.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod
from pathlib import Path

import torch
import xxhash
from safetensors import SafetensorError, safe_open
from torch import Tensor

from baton_common.errors import ConfigError
from baton_engine.exec.device import Device
from baton_engine.models.decoder import Decoder
from baton_engine.models.families import parse_config
from baton_engine.models.fields import Fields, read_json
from baton_engine.models.kernels import bind_kernels
from baton_engine.models.names import Slot, strip_prefix, weight_slots
from baton_engine.models.spec import ModelSpec
from baton_engine.models.weights import Target, allocate, assemble, target_shapes
from baton_kvtransfer.layout import PageLayout

Progress = Callable[[int, int], None]
"""(bytes read, bytes in all), after each tensor."""

COMPUTE_DTYPES: Mapping[str, torch.dtype] = {"float32": torch.float32, "bfloat16": torch.bfloat16}
STORED_BYTES: Mapping[str, int] = {"F32": 4, "BF16": 2, "F16": 2}
SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
SHOWN = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadedModel:
    """A decoder ready to run, and what others need to know about it."""

    decoder: Decoder
    spec: ModelSpec
    dtype: str  # of the weights in memory and of the computation
    digest: str  # 32 hex digits; equal = same function, whatever the dtype in memory
    eos_token_ids: frozenset[int]
    folder: Path | None  # None: random weights


@dataclass(frozen=True, slots=True, kw_only=True)
class _Stored:
    """One tensor of the checkpoint that the decoder needs."""

    plain: str  # name without prefix
    name: str
    path: Path
    dtype: str
    slot: Slot

    @property
    def bytes(self) -> int:
        return prod(self.slot.shape) * STORED_BYTES[self.dtype]


@dataclass(frozen=True, slots=True, kw_only=True)
class Format:
    """What a checkpoint is computed as."""

    spec: ModelSpec
    dtype: str  # of weights and activations
    kv_dtype: str

    @property
    def torch_dtype(self) -> torch.dtype:
        return COMPUTE_DTYPES[self.dtype]

    def layout(self, page_tokens: int) -> PageLayout:
        """Of the KV pool."""
        return self.spec.layout(page_tokens, self.kv_dtype)


def read_format(folder: Path, *, dtype: str, kv_dtype: str, native_bf16: bool) -> Format:
    """From config.json alone. `dtype`: float32, bfloat16, or auto (the config's own, bfloat16 for a float16 one;
    float32 where bfloat16 would be emulated). `kv_dtype`: likewise, auto = `dtype`. Raises ConfigError."""
    config = read_json(folder / "config.json")
    name = _compute_dtype(dtype, config, native_bf16)
    return Format(spec=parse_config(config), dtype=name, kv_dtype=name if kv_dtype == "auto" else kv_dtype)


def load_model(
    folder: Path,
    *,
    device: Device,
    dtype: str = "auto",
    kv_dtype: str = "auto",
    page_tokens: int = 64,
    progress: Progress | None = None,
) -> LoadedModel:
    """Load a Hugging Face safetensors checkpoint. Blocks for as long as reading takes.

    Kernels for this model, `dtype`, `kv_dtype` and `page_tokens` are chosen and compiled first: what the device cannot
    compute is refused (Unsupported) before weights are read. Raises ConfigError.
    """
    form = read_format(folder, dtype=dtype, kv_dtype=kv_dtype, native_bf16=device.native_bf16)
    spec = form.spec
    stored = _match(spec, folder)

    def read() -> tuple[Decoder, str]:
        bind_kernels(spec, form.torch_dtype, form.layout(page_tokens), device.library)
        tensors = _allocate(spec, form.dtype, device)
        digest = _read(spec, stored, tensors, device, progress)
        return Decoder(spec, assemble(spec, tensors), device.library, device.upload), digest

    decoder, digest = device.run(read)
    return LoadedModel(
        decoder=decoder,
        spec=spec,
        dtype=form.dtype,
        digest=digest,
        eos_token_ids=_eos_token_ids(folder, read_json(folder / "config.json")),
        folder=folder,
    )


def random_model(spec: ModelSpec, *, seed: int, device: Device, dtype: str = "bfloat16") -> LoadedModel:
    """A model of this shape with random weights, for benchmarks and tests; no file is read."""
    if dtype not in COMPUTE_DTYPES:
        raise ConfigError(f"dtype must be one of {', '.join(COMPUTE_DTYPES)}, got {dtype!r}", param="dtype")

    def draw() -> Decoder:
        tensors = _allocate(spec, dtype, device)
        random = torch.Generator(device.torch_device).manual_seed(seed)
        for target, tensor in tensors.items():
            if target.field.endswith("norm"):
                tensor.fill_(0.0 if spec.norm_wide else 1.0)
            else:
                bound = (3.0 / tensor.shape[-1]) ** 0.5
                tensor.uniform_(-bound, bound, generator=random)
        return Decoder(spec, assemble(spec, tensors), device.library, device.upload)

    digest = hashlib.sha256(f"random {seed} {dtype} {device.torch_device.type} {spec!r}".encode()).hexdigest()[:32]
    return LoadedModel(
        decoder=device.run(draw),
        spec=spec,
        dtype=dtype,
        digest=digest,
        eos_token_ids=frozenset(),
        folder=None,
    )


def _allocate(spec: ModelSpec, dtype: str, device: Device) -> dict[Target, Tensor]:
    free = device.available_bytes() / 2**30  # before: what was made until the failure is still held after it
    try:
        return allocate(spec, COMPUTE_DTYPES[dtype], device.torch_device)
    except torch.AcceleratorError:
        raise  # a broken device, whatever was asked of it
    except RuntimeError:
        wanted = sum(map(prod, target_shapes(spec).values())) * COMPUTE_DTYPES[dtype].itemsize / 2**30
        raise ConfigError(
            f"no memory for the weights: in {dtype} they take {wanted:.1f} GiB, {device.name} has {free:.1f} GiB; use "
            f"a smaller model or dtype, another --device, or end what else runs on it",
            param="device",
        ) from None


def _compute_dtype(asked: str, config: Fields, native_bf16: bool) -> str:
    if asked in COMPUTE_DTYPES:
        return asked
    if asked != "auto":
        raise ConfigError(f"dtype must be auto or one of {', '.join(COMPUTE_DTYPES)}, got {asked!r}", param="dtype")
    for fields in (config, config.section("text_config")):
        for field in ("dtype", "torch_dtype"):
            if fields is not None and fields.has(field):
                own = fields.text(field).removeprefix("torch.")
                own = "bfloat16" if own == "float16" else own
                if own == "bfloat16" and not native_bf16:
                    return "float32"
                if own not in COMPUTE_DTYPES:
                    raise fields.wrong(field, "float32, bfloat16 or float16")
                return own
    return "float32"


def _eos_token_ids(folder: Path, config: Fields) -> frozenset[int]:
    sources = [config, config.section("text_config")]
    generation = folder / "generation_config.json"
    if generation.is_file():
        sources.append(read_json(generation))
    return frozenset(token for fields in sources if fields is not None for token in fields.token_ids("eos_token_id"))


@contextmanager
def _readable(path: Path) -> Iterator[None]:
    """Turn what reading a safetensors file may raise into one line about that file."""
    try:
        yield
    except (SafetensorError, OSError, ValueError) as error:
        reason = " ".join(str(error).split())[:160]
        raise ConfigError(f"{path} is missing, cut off or corrupt ({reason}); download the checkpoint again") from None


def _shards(folder: Path) -> list[Path]:
    index = folder / INDEX
    if index.is_file():
        files = read_json(index).section("weight_map")
        if files is None:
            raise ConfigError(f"{index} lacks weight_map; download the checkpoint again")
        return [folder / name for name in files.distinct_texts()]
    if (folder / SINGLE).is_file():
        return [folder / SINGLE]
    hint = "; convert its .bin files to safetensors" if any(folder.glob("*.bin")) else ""
    raise ConfigError(f"{folder} has neither {SINGLE} nor {INDEX}{hint}")


def _match(spec: ModelSpec, folder: Path) -> list[_Stored]:
    """Everything to read, in name order. ConfigError when names, shapes or dtypes are not what the spec needs."""
    headers: dict[str, tuple[Path, str, tuple[int, ...]]] = {}
    for path in _shards(folder):
        with _readable(path), safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 - no mapping
                if name in headers:
                    raise ConfigError(f"{folder}: tensor {name} is in {headers[name][0].name} and in {path.name}")
                header = file.get_slice(name)
                headers[name] = (path, header.get_dtype(), tuple(header.get_shape()))
    slots = weight_slots(spec)
    plain = strip_prefix(headers, spec)
    if missing := slots.keys() - plain.keys():
        raise ConfigError(f"{folder} lacks {_some(missing)}; the checkpoint is incomplete or its config.json is wrong")
    if unknown := plain.keys() - slots.keys():
        names = _some(plain[name] for name in unknown)
        raise ConfigError(f"{folder} has {names}, which a {spec.family} model with this config.json does not have")
    stored = []
    for short in sorted(slots):
        path, dtype, shape = headers[plain[short]]
        slot = slots[short]
        if dtype not in STORED_BYTES:
            raise ConfigError(
                f"{path}: tensor {plain[short]} is stored as {dtype}; quantised checkpoints are not supported"
            )
        if shape != slot.shape:
            raise ConfigError(
                f"{path}: tensor {plain[short]} has shape {list(shape)}, config.json says {list(slot.shape)}"
            )
        stored.append(_Stored(plain=short, name=plain[short], path=path, dtype=dtype, slot=slot))
    return stored


def _some(names: Iterable[str]) -> str:
    listed = sorted(names)
    more = f" and {len(listed) - SHOWN} more" if len(listed) > SHOWN else ""
    return f"tensor{'s' if len(listed) > 1 else ''} {', '.join(listed[:SHOWN])}{more}"


def _read(
    spec: ModelSpec,
    stored: list[_Stored],
    tensors: Mapping[Target, Tensor],
    device: Device,
    progress: Progress | None,
) -> str:
    """Fill `tensors`; returns the digest."""
    total = sum(one.bytes for one in stored)
    done = 0
    lines: dict[str, str] = {}
    for path in sorted({one.path for one in stored}):
        with _readable(path), safe_open(path, framework="pt") as file:
            for one in (one for one in stored if one.path == path):
                tensor = file.get_tensor(one.name)
                hashed = xxhash.xxh3_128_hexdigest(tensor.reshape(-1).view(torch.uint8).numpy())
                lines[one.plain] = f"{one.plain} {one.dtype} {list(one.slot.shape)} {hashed}"
                target = tensors[one.slot.target]
                device.copy_in(target[one.slot.begin : one.slot.begin + one.slot.shape[0]], tensor)
                done += one.bytes
                if progress is not None:
                    progress(done, total)
    text = "\n".join((repr(spec), *(lines[name] for name in sorted(lines))))
    return hashlib.sha256(text.encode()).hexdigest()[:32]
