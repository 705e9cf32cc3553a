"""Makes demo_model/checkpoint/: trains the tokenizer, then a 3.4 M parameter Llama-shaped chat model from nothing.

    python demo_model/train.py                 # about 40 minutes on one CPU core
    python demo_model/train.py --steps 300     # a quick look

Loss counts on answers only; prompts are context. fp32 on the CPU, written as bf16. Same seed, same data stream; the
last bits of the weights still depend on the machine's arithmetic. Held-out questions never enter (dialogs.py).
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from dialogs import Dialog, Dialogs
from phrasings import HERE
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

SEED = 20
VOCAB = 2048
CONTEXT = 1024
ROPE_THETA = 10000.0
BEGIN, END, PAD = "<|begin|>", "<|end|>", "<|pad|>"
SPECIALS = [BEGIN, END, PAD, "<|system|>", "<|user|>", "<|assistant|>"]
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message.role not in ['system', 'user', 'assistant'] %}"
    "{{ raise_exception('unknown role ' + message.role) }}{% endif %}"
    "{{ '<|' + message.role + '|>' + message.content | trim + eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
IGNORED = -100


def train_tokenizer(seed: int) -> Tokenizer:
    """Byte-level BPE with single digits, on the training conversations alone."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB,
        special_tokens=SPECIALS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    stream = Dialogs(seed)
    texts = (turn.question + " " + turn.answer for _ in range(20000) for turn in stream.draw().turns)
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BEGIN} $A", special_tokens=[(BEGIN, tokenizer.token_to_id(BEGIN))]
    )
    return tokenizer


def encode(dialog: Dialog, tokenizer: Tokenizer) -> tuple[list[int], list[int]]:
    """Token ids as the chat template writes them, and targets[t] = id to predict after t (IGNORED outside answers)."""
    vocab = tokenizer.get_vocab()
    begin, end, system, user, assistant = (vocab[s] for s in (BEGIN, END, "<|system|>", "<|user|>", "<|assistant|>"))

    def text(value: str) -> list[int]:
        return list(tokenizer.encode(value.strip(), add_special_tokens=False).ids)

    ids, targets = [begin], [IGNORED]
    if dialog.system is not None:
        ids += [system, *text(dialog.system), end]
    for turn in dialog.turns:
        ids += [user, *text(turn.question), end, assistant]
        answer = [*text(turn.answer), end]
        targets += [IGNORED] * (len(ids) - 1 - len(targets)) + answer
        ids += answer
    return ids, [*targets, IGNORED]


def batches(stream: Dialogs, tokenizer: Tokenizer, tokens: int) -> Iterator[tuple[Tensor, Tensor]]:
    """ids and targets int64[rows, longest]: rows of similar length, about `tokens` cells a batch, padded at the end."""
    pad = tokenizer.get_vocab()[PAD]
    order = torch.Generator().manual_seed(SEED)
    while True:
        pool = sorted((encode(stream.draw(), tokenizer) for _ in range(1500)), key=lambda pair: len(pair[0]))
        groups: list[list[tuple[list[int], list[int]]]] = [[]]
        for pair in pool:
            if len(pair[0]) > CONTEXT:
                continue
            if groups[-1] and (len(groups[-1]) + 1) * len(pair[0]) > tokens:
                groups.append([])
            groups[-1].append(pair)
        for index in torch.randperm(len(groups), generator=order).tolist():
            longest = len(groups[index][-1][0])
            yield (
                torch.tensor([ids + [pad] * (longest - len(ids)) for ids, _ in groups[index]]),
                torch.tensor([targets + [IGNORED] * (longest - len(targets)) for _, targets in groups[index]]),
            )


def build_model(tokenizer: Tokenizer) -> LlamaForCausalLM:
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCAB,
            hidden_size=256,
            intermediate_size=688,
            num_hidden_layers=4,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=64,
            max_position_embeddings=CONTEXT,
            rms_norm_eps=1e-5,
            rope_parameters={"rope_type": "default", "rope_theta": ROPE_THETA},
            tie_word_embeddings=True,
            bos_token_id=tokenizer.token_to_id(BEGIN),
            eos_token_id=tokenizer.token_to_id(END),
            pad_token_id=tokenizer.token_to_id(PAD),
            use_cache=False,
        )
    )


def loss_of(model: LlamaForCausalLM, ids: Tensor, targets: Tensor) -> Tensor:
    """Mean cross entropy over answer tokens; logits only where they count. Padding is last, so causality hides it."""
    hidden = model.model(input_ids=ids, use_cache=False).last_hidden_state
    counted = targets != IGNORED
    return nn.functional.cross_entropy(model.lm_head(hidden[counted]), targets[counted])


def save(model: LlamaForCausalLM, tokenizer: Tokenizer, folder: Path) -> None:
    """Hugging Face layout, weights in bf16."""
    folder.mkdir(parents=True, exist_ok=True)
    weights = {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}
    out = build_model(tokenizer)
    out.load_state_dict(weights)
    out.config.use_cache = True
    out.bfloat16().save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    # Older readers know these two names only.
    config |= {"torch_dtype": "bfloat16", "rope_theta": ROPE_THETA}
    _write_json(folder / "config.json", config)
    ids = {"bos_token_id": out.config.bos_token_id, "eos_token_id": out.config.eos_token_id}
    _write_json(folder / "generation_config.json", {**ids, "pad_token_id": out.config.pad_token_id, "do_sample": False})
    tokenizer.save(str(folder / "tokenizer.json"))
    _write_json(
        folder / "tokenizer_config.json",
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": BEGIN,
            "eos_token": END,
            "pad_token": PAD,
            "additional_special_tokens": SPECIALS[3:],
            "model_max_length": CONTEXT,
            "clean_up_tokenization_spaces": False,
            "chat_template": CHAT_TEMPLATE,
        },
    )


def _write_json(path: Path, value: object) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n")


def train(*, steps: int, tokens: int, rate: float, folder: Path, minutes: float) -> None:
    """AdamW with warm-up and cosine by progress (steps or minutes, whichever is further); saves every 500 steps."""
    torch.manual_seed(SEED)
    tokenizer = train_tokenizer(SEED)
    model = build_model(tokenizer)
    matrices = [p for p in model.parameters() if p.dim() > 1]
    vectors = [p for p in model.parameters() if p.dim() == 1]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}],
        lr=rate,
        betas=(0.9, 0.95),
    )
    feed = batches(Dialogs(SEED + 1), tokenizer, tokens)
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters", flush=True)
    start, seen, counted, step, average = time.monotonic(), 0, 0, 0, 0.0
    progress = 0.0
    while progress < 1.0:
        ids, targets = next(feed)
        elapsed = time.monotonic() - start
        progress = max((step + 1) / steps, elapsed / (60 * minutes))
        warm = min(1.0, (step + 1) / 100)
        for group in optimizer.param_groups:
            group["lr"] = rate * warm * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * min(progress, 1.0))))
        loss = loss_of(model, ids, targets)
        optimizer.zero_grad(set_to_none=True)
        torch.autograd.backward(loss)
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        step, seen, counted = step + 1, seen + ids.numel(), counted + int((targets != IGNORED).sum())
        average = loss.item() if step == 1 else 0.98 * average + 0.02 * loss.item()
        if step % 25 == 0:
            spent = time.monotonic() - start
            print(f"step {step} loss {average:.4f} {seen / spent:.0f} tok/s {spent / 60:.1f} min", flush=True)
        if step % 500 == 0:
            save(model, tokenizer, folder)
    save(model, tokenizer, folder)
    record = {
        "seed": SEED,
        "steps": step,
        "tokens_per_batch": tokens,
        "tokens_seen": seen,
        "answer_tokens_seen": counted,
        "final_loss": round(average, 4),
        "learning_rate": rate,
        "training_minutes": round((time.monotonic() - start) / 60, 1),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
    }
    _write_json(folder / "training.json", record)
    print(json.dumps(record), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description="Train the demo checkpoint.")
    parser.add_argument("--steps", type=int, default=6000)
    parser.add_argument("--minutes", type=float, default=600.0, help="stop (with the rate wound down) by this time")
    parser.add_argument("--tokens", type=int, default=1536, help="cells per batch")
    parser.add_argument("--rate", type=float, default=1.5e-3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=HERE / "checkpoint")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    train(steps=args.steps, tokens=args.tokens, rate=args.rate, folder=args.out, minutes=args.minutes)


if __name__ == "__main__":
    main()
