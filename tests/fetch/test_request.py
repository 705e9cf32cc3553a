"""URIs and flags, and what is refused before anything is touched."""

from __future__ import annotations

from pathlib import Path

import pytest
from support.fetching import fetch

from baton_fetch.errors import Mistake
from baton_fetch.request import BucketPlace, DemoPlace, HubPlace, Place, Request


@pytest.mark.parametrize(
    ("uri", "revision", "place"),
    [
        ("hf://owner/name", "", HubPlace(name="owner/name", revision="main")),
        ("hf://owner/name", "v1", HubPlace(name="owner/name", revision="v1")),
        ("hf://owner/name@v1", "", HubPlace(name="owner/name", revision="v1")),
        ("hf://gpt2", "", HubPlace(name="gpt2", revision="main")),
        ("s3://bucket/a/b/", "", BucketPlace(bucket="bucket", prefix="a/b/")),
        ("s3://bucket", "", BucketPlace(bucket="bucket", prefix="")),
        ("baton://demo", "", DemoPlace()),
    ],
)
def test_places(uri: str, revision: str, place: Place) -> None:
    assert Request(uri=uri, folder=Path("m"), revision=revision).place() == place


@pytest.mark.parametrize(
    ("uri", "revision", "endpoint", "message"),
    [
        ("hf://a/b/c", "", "", "use hf://owner/name"),
        ("hf://../etc", "", "", "use hf://owner/name"),
        ("hf://owner/name@v1", "v2", "", "remove one"),
        ("s3://Bucket_/x", "", "", "use s3://bucket/prefix"),
        ("s3://bucket/x", "v1", "", "has no revisions"),
        ("file:///models/x", "", "", "they are mounted"),
        ("owner/name", "", "", "not a place"),
        ("hf://owner/name", "", "hub.example.com", r"is no http\(s\):// address"),
    ],
)
def test_mistakes(uri: str, revision: str, endpoint: str, message: str) -> None:
    with pytest.raises(Mistake, match=message):
        Request(uri=uri, folder=Path("m"), revision=revision, endpoint=endpoint).place()


def test_a_folder_of_another_model_is_not_mixed_with_this_one(tmp_path: Path) -> None:
    fetch(Request(uri="baton://demo", folder=tmp_path))
    with pytest.raises(Mistake, match="holds baton://demo; give another folder, or empty this one"):
        fetch(Request(uri="hf://owner/name", folder=tmp_path))
