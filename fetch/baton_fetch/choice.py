"""Which files of a checkpoint serving needs. Pure.

The engine reads `model.safetensors`, or the shards that its index names; the router reads tokenizer, template and
config. Everything else of a repository (other formats, pictures, originals) stays where it is.
"""

from __future__ import annotations

import json
from collections.abc import Collection

from baton_fetch.errors import Mistake

CONFIG, TOKENIZER = "config.json", "tokenizer.json"
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
_SMALL = (
    CONFIG, "generation_config.json", TOKENIZER, "tokenizer_config.json", "special_tokens_map.json",
    "added_tokens.json", "vocab.json", "merges.txt", "vocab.txt", "tokenizer.model", "chat_template.jinja",
    "chat_template.json",
)  # fmt: skip
_OTHER_WEIGHTS = (".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack", ".onnx", ".ckpt")


def small_files(names: Collection[str], *, place: str, only_tokenizer: bool) -> list[str]:
    """Everything but the weights, the index included. Raises Mistake when this is no checkpoint that can be served."""
    if CONFIG not in names:
        raise Mistake(f"{place}: has no {CONFIG}, so it is no checkpoint; check spec.model.uri")
    if only_tokenizer and TOKENIZER not in names:
        raise Mistake(f"{place}: has no {TOKENIZER}; make it with transformers' AutoTokenizer.save_pretrained")
    found = [name for name in _SMALL if name in names]
    if only_tokenizer:
        return found
    if INDEX in names:
        return [*found, INDEX]
    if SINGLE not in names:
        others = sorted(name for name in names if name.endswith(_OTHER_WEIGHTS))
        hint = f" ({others[0]} is another format)" if others else ""
        raise Mistake(
            f"{place}: has no weights as safetensors{hint}: neither {SINGLE} nor {INDEX}; "
            "convert it with transformers' save_pretrained, or choose a checkpoint that has them"
        )
    return found


def weight_files(names: Collection[str], index: str | None, *, place: str) -> list[str]:
    """Shards that `index`, the text of the index, names; without one the single file. Raises Mistake."""
    if index is None:
        return [SINGLE]
    try:
        shards = sorted({str(name) for name in json.loads(index)["weight_map"].values()})
    except (ValueError, LookupError, TypeError, AttributeError):
        raise Mistake(f"{place}: {INDEX} cannot be read; upload the checkpoint again") from None
    if missing := [name for name in shards if name not in names]:
        raise Mistake(
            f"{place}: {INDEX} names {missing[0]}, which is not there ({len(missing)} of {len(shards)} shards are "
            "missing); upload the checkpoint again"
        )
    return shards
