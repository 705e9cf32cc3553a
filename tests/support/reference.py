"""What `transformers` would have said: the reference that we did not write."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM


class Reference:
    """A model of `transformers` from a checkpoint folder, float32 unless said otherwise."""

    def __init__(self, folder: Path, dtype: torch.dtype = torch.float32) -> None:
        self._model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()

    @torch.inference_mode()
    def generate(self, prompt: Sequence[int], max_tokens: int, **options: Any) -> list[int]:
        """Outputs of `transformers.generate`, greedy, without stopping early."""
        defaults = {"do_sample": False, "min_new_tokens": max_tokens, "eos_token_id": None, "pad_token_id": 0}
        ids = torch.tensor([list(prompt)])
        whole = self._model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=max_tokens, **{**defaults, **options}
        )
        return whole[0, len(prompt) :].tolist()

    @torch.inference_mode()
    def logits(self, tokens: Sequence[int]) -> torch.Tensor:
        """float32[len(tokens), vocab]: row i predicts token i + 1."""
        return self._model(torch.tensor([list(tokens)])).logits[0].float()

    def is_greedy(self, prompt: Sequence[int], outputs: Sequence[int]) -> bool:
        """Every output is the argmax after what is before it: what `generate` would give, in one forward pass."""
        logits = self.logits([*prompt, *outputs[:-1]])
        return logits[len(prompt) - 1 :].argmax(-1).tolist() == list(outputs)

    def regret(self, prompt: Sequence[int], outputs: Sequence[int]) -> float:
        """How far below the best logit an output was, at most: 0 when all are greedy."""
        logits = self.logits([*prompt, *outputs[:-1]])[len(prompt) - 1 :]
        chosen = logits.gather(1, torch.tensor([list(outputs)]).T)
        return float((logits.amax(-1, keepdim=True) - chosen).max())
