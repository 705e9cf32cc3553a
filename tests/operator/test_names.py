"""Names of children: valid for every kind, at most 63 characters, and different for different services."""

from __future__ import annotations

import re

from hypothesis import given
from hypothesis import strategies as st

from baton_operator.plan.names import child_name, label_value

SUFFIXES = st.sampled_from([(), ("prefill",), ("decode",), ("colocated",), ("router",), ("settings",), ("deny",)])
NAMES = st.text("abcdefghijklmnopqrstuvwxyz0123456789-.", min_size=1, max_size=253).filter(
    lambda text: re.fullmatch(r"[a-z0-9]([-a-z0-9.]*[a-z0-9])?", text) is not None
)
DNS_1035 = re.compile(r"[a-z]([-a-z0-9]*[a-z0-9])?")


@given(NAMES, SUFFIXES)
def test_every_name_is_a_dns_label_of_at_most_63(service: str, suffix: tuple[str, ...]) -> None:
    for name in (child_name(service, *suffix), label_value(service)):
        assert len(name) <= 63
        assert DNS_1035.fullmatch(name)


@given(NAMES, NAMES, SUFFIXES)
def test_two_services_never_share_a_name_for_the_same_purpose(one: str, two: str, suffix: tuple[str, ...]) -> None:
    assert (child_name(one, *suffix) == child_name(two, *suffix)) == (one == two)
    assert (label_value(one) == label_value(two)) == (one == two)


def test_a_plain_name_is_kept_and_a_long_one_keeps_its_beginning() -> None:
    assert child_name("chat") == "chat"
    assert child_name("chat", "prefill") == "chat-prefill"
    long = "very-" * 12 + "long"
    assert child_name(long, "prefill").startswith("very-very-very-")
    assert child_name(long, "prefill").endswith("-prefill")
    assert child_name(long, "prefill") != child_name(long + "x", "prefill")
