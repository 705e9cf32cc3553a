"""Where a model's files are: a folder, or a hub name resolved through the hub's own cache. Knows no tensors."""

from __future__ import annotations

from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

from baton_common.errors import ConfigError

_WHEEL_DEMO, _CHECKOUT_DEMO = "demo_checkpoint", Path("demo_model", "checkpoint")
PATTERNS = ["*.json", "*.safetensors", "*.jinja", "tokenizer.model"]


def resolve_checkpoint(model: str, *, revision: str | None = None) -> Path:
    """Folder of a Hugging Face checkpoint. Downloads a hub name when the cache lacks it; blocks meanwhile.

    Raises ConfigError when it is neither a folder with config.json nor a name that can be had.
    """
    folder = Path(model).expanduser()
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise ConfigError(f"{folder} has no config.json; give a Hugging Face checkpoint folder or a hub name")
        return folder.resolve()
    if model.startswith(("/", ".", "~")) or model.count("/") != 1:
        raise ConfigError(f"no model at {model!r}; give a Hugging Face checkpoint folder or a hub name like owner/name")
    try:
        return Path(snapshot_download(model, revision=revision, local_files_only=True, allow_patterns=PATTERNS))
    except (LocalEntryNotFoundError, HFValidationError):
        pass
    try:
        return Path(snapshot_download(model, revision=revision, allow_patterns=PATTERNS))
    except (HfHubHTTPError, LocalEntryNotFoundError, HFValidationError, OSError) as error:
        reason = " ".join(str(error).split())[:200]
        raise ConfigError(f"cannot get {model!r} from the hub ({reason}); download it and give its folder") from None


def demo_checkpoint() -> Path:
    """The demo model: inside the installed package, or beside it in a checkout. Raises ConfigError otherwise."""
    here = Path(__file__).resolve().parent
    for folder in (here / _WHEEL_DEMO, here.parents[1] / _CHECKOUT_DEMO):
        if (folder / "config.json").is_file():
            return folder
    raise ConfigError("the demo model is not installed; give a checkpoint folder or a hub name like owner/name")
