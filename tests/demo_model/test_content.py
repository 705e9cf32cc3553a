"""What the demo model is taught, and what is kept from it."""

from __future__ import annotations

import itertools

import handbook
import pytest
from dialogs import Dialogs, load_held_out
from phrasings import HERE, SUM_LIMIT, catalogue, facts, load_talk, normalised


@pytest.fixture(scope="module")
def held_out() -> frozenset[str]:
    return frozenset(normalised(row["question"]) for rows in load_held_out().values() for row in rows)


def test_at_least_100_facts_have_at_least_10_phrasings_each() -> None:
    phrasings = [{normalised(q) for q in entry.questions} for entry in facts()]
    assert len(phrasings) >= 100
    assert min(len(p) for p in phrasings) >= 10


def test_answers_are_distinct_and_short_enough_for_a_demo() -> None:
    answers = [entry.answer for entry in facts()]
    assert len(set(answers)) == len(answers)
    assert max(len(answer.split()) for answer in answers) <= 35


def test_there_are_capitals_and_every_sum_of_the_stated_range() -> None:
    found = catalogue()
    assert len(found["capitals"]) >= 40
    assert len(found["sums"]) == (SUM_LIMIT + 1) ** 2


def test_no_question_has_two_answers_across_all_categories() -> None:
    found = catalogue()  # raises on a conflict
    answers: dict[str, set[str]] = {}
    for entry in itertools.chain.from_iterable(found.values()):
        for question in entry.questions:
            answers.setdefault(normalised(question), set()).add(entry.answer)
    assert [q for q, a in answers.items() if len(a) > 1] == []


def test_held_out_phrasings_are_not_among_the_training_phrasings(held_out: frozenset[str]) -> None:
    trained = {normalised(q) for entries in catalogue().values() for entry in entries for q in entry.questions}
    assert held_out & trained == set()


def test_the_second_held_out_set_is_not_among_the_training_phrasings_either() -> None:
    second = load_held_out(HERE / "heldout_second.json")
    trained = {normalised(q) for entries in catalogue().values() for entry in entries for q in entry.questions}
    assert len(second["facts, second set"]) == 60
    assert {normalised(row["question"]) for rows in second.values() for row in rows} & trained == set()


def test_the_training_stream_never_draws_a_held_out_question(held_out: frozenset[str]) -> None:
    stream = Dialogs(seed=5)
    drawn = {normalised(turn.question) for _ in range(3000) for turn in stream.draw().turns}
    assert len(drawn) > 3000
    assert held_out & drawn == set()


def test_every_fact_is_asked_in_held_out_wordings() -> None:
    rows = load_held_out()
    ids = {entry.id for entry in facts()}
    assert {row["id"] for row in rows["facts, own wording"]} == ids
    assert {row["id"] for row in rows["facts, new templates"]} == ids
    assert len(rows["off-topic"]) >= 150


def test_the_training_stream_repeats_for_a_seed_and_differs_between_seeds() -> None:
    first, again, other = Dialogs(seed=1), Dialogs(seed=1), Dialogs(seed=2)
    ours = [first.draw() for _ in range(50)]
    assert ours == [again.draw() for _ in range(50)]
    assert ours != [other.draw() for _ in range(50)]


def test_the_training_stream_has_conversations_refusals_and_system_messages() -> None:
    stream = Dialogs(seed=3)
    dialogs = [stream.draw() for _ in range(400)]
    turns = [turn for dialog in dialogs for turn in dialog.turns]
    refusal = load_talk()["refusal"]
    declined = sum(turn.answer == refusal for turn in turns) / len(turns)
    assert {1, 2, 3, 4} <= {len(dialog.turns) for dialog in dialogs}
    assert any(dialog.system for dialog in dialogs)
    assert 0.15 < declined < 0.4


def test_the_handbook_says_what_the_model_was_taught() -> None:
    text = handbook.TARGET.read_text()
    assert text == handbook.render(), "run python demo_model/handbook.py"
    assert all(entry.answer in text for entry in facts())
