"""What the router reads of a checkpoint: tokenizer.json, chat template, special tokens, sizes. Never the weights."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from baton_common.checkpoint import resolve_checkpoint
from baton_common.errors import ConfigError
from baton_router.template import ChatTemplate

_SPECIAL_NAMES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")


@dataclass(frozen=True, slots=True, kw_only=True)
class Checkpoint:
    """Read once at start. `context_tokens` is the checkpoint's own limit; workers may announce a smaller one."""

    name: str
    tokenizer: Tokenizer
    template: ChatTemplate | None
    tool_template: ChatTemplate | None
    bos_token: str
    vocab_size: int
    context_tokens: int


def load_checkpoint(model: str) -> Checkpoint:
    """Blocks on files, and on the network for a hub name. Raises ConfigError with one clear line."""
    if not model:
        raise ConfigError("router.model is not set; give --model a checkpoint folder or a hub name", param="model")
    folder = resolve_checkpoint(model)
    given = Path(model).expanduser()
    path = folder / "tokenizer.json"
    if not path.is_file():
        raise ConfigError(
            f"{folder} has no tokenizer.json; convert it with transformers' AutoTokenizer.save_pretrained"
        )
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # the binding raises bare Exception
        raise ConfigError(f"{path} cannot be read: {' '.join(str(error).split())[:200]}") from None
    tokenizer.no_truncation()
    tokenizer.no_padding()
    config = _read_json(folder / "config.json")
    text_config = {**config, **_mapping(config.get("text_config"))}
    special = _special_tokens(folder)
    templates = _templates(folder)
    compiled = {name: ChatTemplate(source, special) for name, source in templates.items()}
    default = compiled.get("default")
    return Checkpoint(
        name=given.absolute().name if given.is_dir() else model,
        tokenizer=tokenizer,
        template=default,
        tool_template=compiled.get("tool_use", default),
        bos_token=special.get("bos_token", ""),
        vocab_size=int(text_config.get("vocab_size", 0)) or tokenizer.get_vocab_size(),
        context_tokens=int(text_config.get("max_position_embeddings", 0)) or 2048,
    )


def _read_json(path: Path) -> Mapping[str, Any]:
    if not path.is_file():
        return {}
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path} cannot be read: {error}") from None
    if not isinstance(document, dict):
        raise ConfigError(f"{path} must hold a JSON object")
    return document


def _mapping(value: object) -> Mapping[str, Any]:
    return value if isinstance(value, dict) else {}


def _special_tokens(folder: Path) -> dict[str, str]:
    """Name -> text, from tokenizer_config.json and, where that is silent, special_tokens_map.json."""
    found: dict[str, str] = {}
    for source in ("special_tokens_map.json", "tokenizer_config.json"):
        document = _read_json(folder / source)
        for name in _SPECIAL_NAMES:
            value = document.get(name)
            text = _mapping(value).get("content") if isinstance(value, dict) else value
            if isinstance(text, str):
                found[name] = text
    return found


def _templates(folder: Path) -> dict[str, str]:
    """Template name -> source. chat_template.jinja wins over tokenizer_config.json, as in transformers."""
    found: dict[str, str] = {}
    value = _read_json(folder / "tokenizer_config.json").get("chat_template")
    if isinstance(value, str):
        found["default"] = value
    elif isinstance(value, list):
        found.update({item["name"]: item["template"] for item in value})
    legacy = _read_json(folder / "chat_template.json").get("chat_template")
    if isinstance(legacy, str):
        found["default"] = legacy
    file = folder / "chat_template.jinja"
    if file.is_file():
        found["default"] = file.read_text(encoding="utf-8")
    return found
