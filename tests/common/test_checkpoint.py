"""A model is a folder or a hub name; anything else is one clear line."""

from pathlib import Path

import pytest

from baton_common.checkpoint import resolve_checkpoint
from baton_common.errors import ConfigError


def test_a_folder_with_a_config_is_taken_as_it_is(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    assert resolve_checkpoint(str(tmp_path)) == tmp_path.resolve()


def test_a_folder_without_a_config_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"has no config\.json"):
        resolve_checkpoint(str(tmp_path))


@pytest.mark.parametrize("name", ["/no/such/folder", "./nothing", "plain", "a/b/c"])
def test_what_is_neither_folder_nor_hub_name_is_refused_without_a_download(name: str) -> None:
    with pytest.raises(ConfigError, match="no model at"):
        resolve_checkpoint(name)
