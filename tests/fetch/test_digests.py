"""Checksums agree with their published check values, however the bytes are cut."""

from __future__ import annotations

import hashlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from baton_fetch.digests import GIT, Digest, hasher

CHECK = b"123456789"    # what the catalogue of CRCs gives its check values for


@pytest.mark.parametrize(
    ("algorithm", "value"),
    [
        ("crc32", "cbf43926"),
        ("crc32c", "e3069283"),
        ("crc64nvme", "ae8b14860a799888"),
        ("md5", "25f9e794323b453885f5181f1b624d0b"),
        (GIT, hashlib.sha1(b"blob 9\x00123456789", usedforsecurity=False).hexdigest()),
    ],
)
def test_check_values(algorithm: str, value: str) -> None:
    running = hasher(Digest(algorithm=algorithm), len(CHECK))
    running.update(CHECK[:4])
    running.update(CHECK[4:])
    assert running.digest().hex() == value


@given(data=st.binary(max_size=200), piece=st.integers(1, 50), cuts=st.lists(st.integers(0, 200), max_size=5))
def test_over_pieces_it_is_the_hash_of_the_hashes(data: bytes, piece: int, cuts: list[int]) -> None:
    running = hasher(Digest(algorithm="md5", piece_bytes=piece), len(data))
    ends = [*sorted(min(cut, len(data)) for cut in cuts), len(data)]
    for begin, end in zip([0, *ends], ends, strict=False):
        running.update(data[begin:end])
    inner = [hashlib.md5(data[at : at + piece], usedforsecurity=False).digest() for at in range(0, len(data), piece)]
    assert running.digest() == hashlib.md5(b"".join(inner), usedforsecurity=False).digest()
