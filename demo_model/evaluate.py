"""Asks the shipped checkpoint every held-out question (heldout.json) and writes RESULTS.json.

    python demo_model/evaluate.py [--checkpoint FOLDER] [--dtype float32] [--misses] [--questions FILE --out FILE]

Greedy; right means the whole answer, letter for letter. Off-topic counts as declined when the answer is the refusal.
The questions were fixed before the first training run and are never trained on.
"""

from __future__ import annotations

import argparse
import json
import platform
from collections import defaultdict
from datetime import date
from pathlib import Path
from typing import Protocol, TypedDict, cast

import torch
import transformers
from dialogs import load_held_out
from phrasings import HERE, catalogue, load_talk
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

GOALS = {"known": 0.85, "off-topic": 0.80}
MOST_TOKENS = 96


class Score(TypedDict):
    right: int
    asked: int
    share: float


class Generator(Protocol):
    """What is used of a transformers model."""

    def generate(self, ids: Tensor, *, attention_mask: Tensor, max_new_tokens: int, do_sample: bool) -> Tensor: ...


class Demo:
    """The checkpoint, answering whole conversations greedily."""

    def __init__(self, folder: Path, dtype: str) -> None:
        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        self.model = cast("Generator", AutoModelForCausalLM.from_pretrained(folder, dtype=dtype))

    def answer(self, messages: list[dict[str, str]]) -> str:
        return self.answers([messages])[0]

    def answers(self, conversations: list[list[dict[str, str]]]) -> list[str]:
        """One answer each. Conversations of equal length in tokens run together, so that nothing is padded."""
        prompts = [
            self.tokenizer.apply_chat_template(c, add_generation_prompt=True, tokenize=True, return_dict=False)
            for c in conversations
        ]
        by_length: dict[int, list[int]] = defaultdict(list)
        for index, prompt in enumerate(prompts):
            by_length[len(prompt)].append(index)
        found = [""] * len(prompts)
        for length, indices in by_length.items():
            ids = torch.tensor([prompts[i] for i in indices])
            out = self.model.generate(
                ids, attention_mask=torch.ones_like(ids), max_new_tokens=MOST_TOKENS, do_sample=False
            )
            for index, row in zip(indices, out[:, length:], strict=True):
                found[index] = str(self.tokenizer.decode(row, skip_special_tokens=True))
        return found


def expected_answers() -> dict[tuple[str, str], str]:
    """(category, id) -> the one right answer."""
    return {(category, e.id): e.answer for category, entries in catalogue().items() for e in entries}


def evaluate(demo: Demo, questions: Path, *, misses: bool) -> dict[str, Score]:
    """Score by group of held-out questions. With `misses`, prints each wrong answer."""
    wanted, refusal = expected_answers(), load_talk()["refusal"]
    scores: dict[str, Score] = {}
    for group, rows in load_held_out(questions).items():
        answers = demo.answers([[{"role": "user", "content": row["question"]}] for row in rows])
        right = 0
        for row, answer in zip(rows, answers, strict=True):
            want = refusal if group == "off-topic" else wanted[group.split(",")[0], row["id"]]
            right += answer == want
            if misses and answer != want:
                print(f"  {group} | {row['id']} | {row['question']} -> {answer}")
        scores[group] = Score(right=right, asked=len(rows), share=round(right / len(rows), 4))
    return scores


def total(scores: dict[str, Score], name: str = "") -> Score:
    """The known groups together, or those whose name begins with `name`. Off-topic is never in it."""
    rows = [s for group, s in scores.items() if group != "off-topic" and group.startswith(name)]
    right, asked = sum(s["right"] for s in rows), sum(s["asked"] for s in rows)
    return Score(right=right, asked=asked, share=round(right / asked, 4))


def main() -> None:
    parser = argparse.ArgumentParser(description="Score the demo checkpoint on held-out questions.")
    parser.add_argument("--checkpoint", type=Path, default=HERE / "checkpoint")
    parser.add_argument("--dtype", default="float32", help="arithmetic: float32 or bfloat16")
    parser.add_argument("--misses", action="store_true", help="print every wrong answer")
    parser.add_argument("--questions", type=Path, default=HERE / "heldout.json")
    parser.add_argument("--out", type=Path, default=HERE / "RESULTS.json")
    args = parser.parse_args()
    torch.set_num_threads(1)
    scores = evaluate(Demo(args.checkpoint, args.dtype), args.questions, misses=args.misses)
    scores |= {"all facts": total(scores, "facts"), "all known": total(scores)}
    for group, score in scores.items():
        print(f"{group:24} {score['right']:4} / {score['asked']:4}  {100 * score['share']:5.1f} %")
    results = {
        "scores": scores,
        "goals": GOALS,
        "met": {
            "known": scores["all known"]["share"] >= GOALS["known"],
            "off-topic": scores["off-topic"]["share"] >= GOALS["off-topic"],
        },
        "evaluation": {
            "questions": args.questions.name,
            "date": date.today().isoformat(),
            "dtype": args.dtype,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "python": platform.python_version(),
        },
        "training": json.loads((args.checkpoint / "training.json").read_text()),
    }
    args.out.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
