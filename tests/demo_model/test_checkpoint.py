"""The shipped checkpoint: its files, its size, and a few answers. Figures of quality are in demo_model/RESULTS.json."""

from __future__ import annotations

import json
from typing import cast

import pytest
from dialogs import Dialog, Turn
from evaluate import Demo, expected_answers
from phrasings import HERE, load_talk
from safetensors import safe_open
from tokenizers import Tokenizer
from train import encode

FOLDER = HERE / "checkpoint"
MOST_BYTES = 8 * 1000 * 1000


@pytest.fixture(scope="module")
def demo() -> Demo:
    return Demo(FOLDER, "float32")


def ask(*contents: str) -> list[dict[str, str]]:
    """User and assistant turns in turn, the last one the user's."""
    return [{"role": ("user", "assistant")[i % 2], "content": c} for i, c in enumerate(contents)]


def test_the_checkpoint_is_in_hugging_face_layout_and_at_most_8_mb() -> None:
    files = {path.name: path.stat().st_size for path in FOLDER.iterdir()}
    served = {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"}
    assert served <= set(files)
    assert sum(files.values()) <= MOST_BYTES


def test_the_config_names_the_family_the_dtype_and_the_end_token() -> None:
    config = json.loads((FOLDER / "config.json").read_text())
    tokenizer = Tokenizer.from_file(str(FOLDER / "tokenizer.json"))
    assert config["architectures"] == ["LlamaForCausalLM"]
    assert config["torch_dtype"] == "bfloat16"
    assert config["tie_word_embeddings"] is True
    assert config["vocab_size"] == tokenizer.get_vocab_size() == 2048
    assert config["eos_token_id"] == tokenizer.token_to_id("<|end|>")


def test_the_weights_are_bf16_and_number_3_to_4_million() -> None:
    with safe_open(FOLDER / "model.safetensors", framework="pt") as weights:
        slices = [weights.get_slice(name) for name in weights.keys()]  # noqa: SIM118
    sizes = [rows * (columns[0] if columns else 1) for rows, *columns in (s.get_shape() for s in slices)]
    assert {s.get_dtype() for s in slices} == {"BF16"}
    assert 3_000_000 <= sum(sizes) <= 4_000_000


def test_the_tokenizer_brings_any_text_back_and_splits_numbers_into_digits() -> None:
    tokenizer = Tokenizer.from_file(str(FOLDER / "tokenizer.json"))
    for text in ("What is 12 + 345?", "naïve café — 東京 🙂", "  two  spaces\n\ttab"):
        assert tokenizer.decode(tokenizer.encode(text, add_special_tokens=False).ids) == text
    assert len([t for t in tokenizer.encode("12345", add_special_tokens=False).tokens if t.isdigit()]) == 5


def test_the_chat_template_writes_conversations_as_they_were_trained(demo: Demo) -> None:
    dialog = Dialog(
        system="Be concise.",
        turns=(Turn(question="Hi", answer="Hello!"), Turn(question=" What is a page? ", answer="A page.")),
    )
    messages = [{"role": "system", "content": "Be concise."}, *ask("Hi", "Hello!", " What is a page? ", "A page.")]
    text = cast("str", demo.tokenizer.apply_chat_template(messages, tokenize=False))
    assert text.startswith("<|begin|><|system|>Be concise.<|end|><|user|>Hi<|end|><|assistant|>Hello!<|end|>")
    trained, _ = encode(dialog, Tokenizer.from_file(str(FOLDER / "tokenizer.json")))
    assert demo.tokenizer.encode(text, add_special_tokens=False) == trained


def test_the_chat_template_refuses_a_role_it_was_not_trained_on(demo: Demo) -> None:
    with pytest.raises(Exception, match="unknown role critic"):
        demo.tokenizer.apply_chat_template([{"role": "critic", "content": "x"}], tokenize=False)


@pytest.mark.parametrize(
    ("question", "category", "answer_of"),
    [
        ("What is the KV cache?", "facts", "kv-cache"),
        ("How big is a page?", "facts", "page-size"),
        ("How do I start Baton?", "facts", "up"),
        ("Hello!", "small talk", "hello"),
        ("What is the capital of France?", "capitals", "France"),
        ("What is 7 + 8?", "sums", "7+8"),
    ],
)
def test_it_answers_what_it_was_taught(demo: Demo, question: str, category: str, answer_of: str) -> None:
    assert demo.answer(ask(question)) == expected_answers()[category, answer_of]


@pytest.mark.parametrize("question", ["Who painted the Mona Lisa?", "How do I bake bread?", "What is 250 + 37?"])
def test_it_declines_what_it_was_not_taught(demo: Demo, question: str) -> None:
    assert demo.answer(ask(question)) == load_talk()["refusal"]


def test_earlier_turns_and_a_system_message_do_not_disturb_it(demo: Demo) -> None:
    wanted = expected_answers()
    page, prefill = wanted["facts", "page"], wanted["facts", "prefill"]
    messages = [
        {"role": "system", "content": "You are a helpful assistant."},
        *ask("What is prefill?", prefill, "Who won the chess championship?", load_talk()["refusal"], "What is a page?"),
    ]
    assert demo.answer(messages) == page


def test_the_recorded_results_meet_the_goals() -> None:
    results = json.loads((HERE / "RESULTS.json").read_text())
    assert results["scores"]["all known"]["share"] >= results["goals"]["known"]
    assert results["scores"]["off-topic"]["share"] >= results["goals"]["off-topic"]
    assert results["training"] == json.loads((FOLDER / "training.json").read_text())
