"""The choice of a pair: pages, load, roles, and what must never be chosen."""

from __future__ import annotations

from dataclasses import replace

from hypothesis import given
from hypothesis import strategies as st

from baton_router.policy import Need, Pair, Refusal, WorkerRole, WorkerView, choose

NEED = Need(tokens=1024, local_below_tokens=64)


def worker(key: str, role: WorkerRole, **changes: object) -> WorkerView:
    view = WorkerView(
        key=key, role=role, compat=b"c", page_tokens=64, matched_pages=0, queued_tokens=0, running=0,
        free_pages=100, total_pages=100, step_ms=10.0, prefill_tokens_per_s=1000.0,
    )  # fmt: skip
    return replace(view, **changes)  # type: ignore[arg-type]


def prefill(key: str = "p", **changes: object) -> WorkerView:
    return worker(key, WorkerRole.PREFILL, **changes)


def decode(key: str = "d", **changes: object) -> WorkerView:
    return worker(key, WorkerRole.DECODE, **changes)


def chosen(views: list[WorkerView], need: Need = NEED, turn: int = 0) -> tuple[str, str | None]:
    found = choose(views, need, turn)
    assert isinstance(found, Pair), found
    return found.decode, found.prefill


def test_a_pair_is_a_decode_and_a_prefill_worker() -> None:
    assert chosen([prefill(), decode()]) == ("d", "p")


def test_the_prefill_worker_with_the_pages_wins() -> None:
    assert chosen([prefill("p1"), prefill("p2", matched_pages=10), decode()])[1] == "p2"


def test_a_long_queue_outweighs_the_pages() -> None:
    views = [prefill("p1"), prefill("p2", matched_pages=4, queued_tokens=5000), decode()]
    assert chosen(views)[1] == "p1"


def test_the_decode_worker_with_less_to_do_wins() -> None:
    assert chosen([prefill(), decode("d1", running=9), decode("d2", running=1)])[0] == "d2"


def test_a_decode_worker_without_room_is_avoided() -> None:
    assert chosen([prefill(), decode("d1", free_pages=3), decode("d2", running=30)])[0] == "d2"


def test_pages_on_decode_attract_the_next_turn() -> None:
    views = [prefill(), decode("d1"), decode("d2", matched_pages=16, running=2)]
    assert chosen(views)[0] == "d2"


def test_equal_workers_take_turns() -> None:
    views = [prefill("p1"), prefill("p2"), decode("d1"), decode("d2")]
    assert {chosen(views, turn=turn) for turn in range(4)} == {("d1", "p1"), ("d2", "p2")}


def test_no_prefill_worker_means_decode_alone() -> None:
    assert chosen([decode()]) == ("d", None)
    assert chosen([decode(), prefill(draining=True)]) == ("d", None)
    assert chosen([decode(), prefill()], replace(NEED, failed=frozenset({"p"}))) == ("d", None)


def test_a_mismatched_prefill_worker_is_no_prefill_worker() -> None:
    assert chosen([decode(), prefill(compat=b"other")]) == ("d", None)


def test_busy_is_a_refusal_and_failed_is_not() -> None:
    views = [decode(), prefill()]
    assert choose(views, replace(NEED, busy=frozenset({"p"})), 0) is Refusal.OVERLOADED
    assert choose(views, replace(NEED, busy=frozenset({"d"})), 0) is Refusal.OVERLOADED
    assert choose(views, replace(NEED, failed=frozenset({"d"})), 0) is Refusal.NO_WORKER
    assert choose([prefill()], NEED, 0) is Refusal.NO_WORKER


def test_what_prefill_can_pull_back_from_decode_is_not_computed_again() -> None:
    """So the worker that has the conversation is worth more than one with a little less to do."""
    views = [prefill(), decode("d1"), decode("d2", matched_pages=12, running=20)]
    assert chosen(views)[0] == "d2"
    assert chosen([prefill("p1", matched_pages=12, queued_tokens=500), prefill("p2"), views[2]]) == ("d2", "p2")


def test_a_short_suffix_does_not_need_the_busy_prefill_worker() -> None:
    views = [decode(matched_pages=16), prefill()]
    assert chosen(views, replace(NEED, busy=frozenset({"p"}))) == ("d", None)


ROLES = st.sampled_from(WorkerRole)
ROWS = st.tuples(
    ROLES, st.sampled_from([b"a", b"b"]), st.booleans(), st.integers(0, 50), st.integers(0, 16), st.integers(0, 9000)
)
VIEWS = st.lists(ROWS, max_size=7)


@given(VIEWS, st.sets(st.integers(0, 6)), st.sets(st.integers(0, 6)), st.integers(0, 99))
def test_what_is_chosen_is_always_allowed(
    rows: list[tuple[WorkerRole, bytes, bool, int, int, int]], failed: set[int], busy: set[int], turn: int
) -> None:
    views = {
        str(index): worker(str(index), role, compat=compat, draining=draining, running=running, matched_pages=matched,
                           queued_tokens=queued)
        for index, (role, compat, draining, running, matched, queued) in enumerate(rows)
    }  # fmt: skip
    need = replace(NEED, failed=frozenset(map(str, failed)), busy=frozenset(map(str, busy)))
    found = choose(views.values(), need, turn)
    open_decodes = [
        view for view in views.values()
        if view.role is not WorkerRole.PREFILL and not view.draining and view.key not in need.failed | need.busy
    ]  # fmt: skip
    assert found == choose(views.values(), need, turn)
    if isinstance(found, Refusal):
        assert found is Refusal.OVERLOADED or not [view for view in open_decodes if view.key not in need.busy]
        return
    assert views[found.decode] in open_decodes
    if found.prefill is not None:
        taken = views[found.prefill]
        assert taken.role is WorkerRole.PREFILL
        assert not taken.draining
        assert taken.key not in need.failed | need.busy
        assert taken.compat == views[found.decode].compat
