"""Sizing: explicit numbers are taken, chosen ones fit the machine, too little is refused with a number that works."""

import pytest

from baton_common.errors import ConfigError
from baton_engine.config import EngineConfig
from baton_engine.exec.sizing import kv_pages
from baton_kvtransfer.layout import PageLayout

LAYOUT = PageLayout(layers=2, kv=2, heads=2, page_tokens=64, dim=32, dtype="float32")
CONTEXT = 1000  # 16 pages


def pages(available=1 << 40, **settings):
    return kv_pages(EngineConfig(**settings), LAYOUT, CONTEXT, available=available, device_fraction=0.5)


def test_an_explicit_number_of_pages_or_bytes_is_taken():
    assert pages(pages=16) == 16
    assert pages(kv_bytes=20 * LAYOUT.page_bytes + 5) == 20


def test_a_chosen_pool_holds_all_rows_but_no_more():
    assert pages(max_rows=3) == 3 * 16


def test_a_chosen_pool_stays_within_its_fraction_of_memory():
    assert pages(available=100 * LAYOUT.page_bytes, kv_memory_fraction=0.25) == 25


def test_without_a_fraction_the_devices_own_counts():
    assert pages(available=100 * LAYOUT.page_bytes) == 50


@pytest.mark.parametrize(
    ("available_pages", "settings", "param"),
    [
        (1000, {"pages": 15}, "pages"),
        (1000, {"kv_bytes": 15 * LAYOUT.page_bytes}, "kv_bytes"),
        (30, {}, "kv_memory_fraction"),
        (12, {}, "context_tokens"),
    ],
)
def test_a_pool_below_one_context_is_refused_and_the_advice_works(available_pages, settings, param):
    with pytest.raises(ConfigError) as caught:
        pages(available=available_pages * LAYOUT.page_bytes, **settings)
    assert caught.value.param == param
    advice = float(str(caught.value).rsplit(" ", 1)[1])
    if param == "context_tokens":
        available = available_pages * LAYOUT.page_bytes
        assert kv_pages(EngineConfig(), LAYOUT, int(advice), available=available, device_fraction=0.5) > 0
    else:
        better = {param: advice if param == "kv_memory_fraction" else int(advice)}
        assert pages(available=available_pages * LAYOUT.page_bytes, **better) >= 16
