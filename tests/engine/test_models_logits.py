"""Every family computes the function that `transformers` computes, on random tiny checkpoints and a poisoned pool."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.checkpoints import FAMILIES, tiny_checkpoint
from support.driver import Driver
from transformers import AutoModelForCausalLM

from baton_engine.exec.device import open_device
from baton_engine.models.loader import load_model

LLAMA3 = FAMILIES["llama"]["rope_scaling"]
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
VARIANTS = {
    "llama tied": ("llama", {"tie_word_embeddings": True}),
    "llama with biases": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "llama with plain rope": ("llama", {"rope_scaling": None}),
    "llama with linear rope": ("llama", {"rope_scaling": {"type": "linear", "factor": 3.0}}),
    "llama with new rope form": ("llama", {"rope_scaling": None, "rope_theta": None,
                                           "rope_parameters": {**LLAMA3, "rope_theta": 5000.0}}),
    "llama with one kv head": ("llama", {"num_key_value_heads": 1}),
    "llama without grouping": ("llama", {"num_key_value_heads": 4}),
    "llama with wide heads": ("llama", {"head_dim": 32}),
    "qwen2 untied": ("qwen2", {"tie_word_embeddings": False}),
    "qwen2 with window in upper layers": ("qwen2", {"use_sliding_window": True, "sliding_window": 20,
                                                    "max_window_layers": 1}),
    "qwen2 with yarn": ("qwen2", {"rope_scaling": YARN}),
    "qwen3 untied": ("qwen3", {"tie_word_embeddings": False}),
    "qwen3 with biases": ("qwen3", {"attention_bias": True}),
    "qwen3 with layer types": ("qwen3", {"use_sliding_window": True, "sliding_window": 20, "layer_types": [
        "sliding_attention", "full_attention", "sliding_attention"]}),
    "qwen3 with yarn and mscale": ("qwen3", {"rope_scaling": {**YARN, "mscale": 0.7, "mscale_all_dim": 0.4}}),
    "mistral without window": ("mistral", {"sliding_window": None}),
    "gemma2 without caps": ("gemma2", {"attn_logit_softcapping": None, "final_logit_softcapping": None}),
    "gemma2 by its own pattern": ("gemma2", {"layer_types": None}),
    "gemma3 by its own pattern": ("gemma3", {"layer_types": None, "sliding_window_pattern": 3}),
    "gemma3 with new rope form": ("gemma3", {"rope_scaling": None, "rope_theta": None, "rope_local_base_freq": None,
                                             "rope_parameters": {
        "full_attention": {"rope_type": "linear", "factor": 2.0, "rope_theta": 30000.0},
        "sliding_attention": {"rope_type": "default", "rope_theta": 700.0}}}),
}  # fmt: skip


@pytest.fixture(scope="module")
def device():
    device = open_device("cpu", threads=1)
    yield device
    device.close()


def tokens(count, seed=0):
    return torch.randint(0, 320, (count,), generator=torch.Generator().manual_seed(seed)).tolist()


def reference(folder, dtype=torch.float32):
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, attn_implementation="eager")

    def logits(ids):
        with torch.no_grad():
            return model(torch.tensor([ids])).logits[0].float()

    return logits


def written(family, tmp_path, **overrides):
    """A checkpoint; an override of None becomes an explicit null, or absent where absent means something else."""
    folder = tiny_checkpoint(family, tmp_path, **overrides)
    config = json.loads((folder / "config.json").read_text())
    nulls = {name: None for name in ("sliding_window", "attn_logit_softcapping", "final_logit_softcapping")
             if name in overrides and overrides[name] is None}  # fmt: skip
    (folder / "config.json").write_text(json.dumps({**config, **nulls}))
    return folder


@pytest.mark.parametrize("family", FAMILIES)
def test_float32_logits_equal_transformers(family, tmp_path, device):
    folder = tiny_checkpoint(family, tmp_path)
    ids = tokens(150)
    model = load_model(folder, device=device, dtype="float32")
    assert (Driver(model, device).logits(ids) - reference(folder)(ids)).abs().max() <= 1e-4


@pytest.mark.parametrize("variant", VARIANTS)
def test_float32_logits_equal_transformers_in_every_variant(variant, tmp_path, device):
    family, overrides = VARIANTS[variant]
    folder = written(family, tmp_path, **overrides)
    ids = tokens(100, seed=1)
    model = load_model(folder, device=device, dtype="float32")
    assert (Driver(model, device).logits(ids) - reference(folder)(ids)).abs().max() <= 1e-4


@pytest.mark.parametrize("family", FAMILIES)
def test_bfloat16_logits_equal_transformers_at_the_scale_of_its_own_initialisation(family, tmp_path, device):
    folder = tiny_checkpoint(family, tmp_path, dtype="bfloat16", initializer_range=0.02)
    ids = tokens(100, seed=2)
    model = load_model(folder, device=device, dtype="bfloat16")
    assert (Driver(model, device).logits(ids) - reference(folder, torch.bfloat16)(ids)).abs().max() <= 2e-2


@pytest.mark.parametrize("family", FAMILIES)
def test_bfloat16_is_as_close_to_the_truth_as_transformers_is(family, tmp_path, device):
    """Sharp weights amplify every rounding, so two honest bfloat16 runs differ: both are measured against float32."""
    folder = tiny_checkpoint(family, tmp_path, dtype="bfloat16")
    ids = tokens(100, seed=3)
    truth = reference(folder)(ids)
    ours = Driver(load_model(folder, device=device, dtype="bfloat16"), device).logits(ids)
    theirs = reference(folder, torch.bfloat16)(ids)
    assert (ours - truth).abs().mean() <= 1.15 * (theirs - truth).abs().mean()


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("chunks", [(1,), (63, 1, 1), (64, 64), (37, 50, 3), (129,)])
def test_chunks_of_any_size_give_the_logits_of_the_whole_prompt(family, chunks, tmp_path, device):
    folder = tiny_checkpoint(family, tmp_path)
    model = load_model(folder, device=device, dtype="float32")
    ids = tokens(140, seed=4)
    driver = Driver(model, device)
    assert (driver.logits(ids, chunks=chunks) - driver.logits(ids)).abs().max() <= 1e-4


def test_the_text_part_of_a_multimodal_gemma3_is_the_same_model(tmp_path, device):
    plain = tiny_checkpoint("gemma3", tmp_path / "plain")
    ids = tokens(80, seed=5)
    expected = Driver(load_model(plain, device=device), device).logits(ids)
    config = json.loads((plain / "config.json").read_text())
    weights = load_file(plain / "model.safetensors")
    for prefix in ("language_model.model.", "model.language_model."):
        folder = tmp_path / prefix
        folder.mkdir()
        outer = {"model_type": "gemma3", "architectures": ["Gemma3ForConditionalGeneration"], "text_config": config}
        (folder / "config.json").write_text(json.dumps(outer))
        renamed = {prefix + name.removeprefix("model."): tensor for name, tensor in weights.items()}
        renamed["vision_tower.patch.weight"] = torch.zeros(3)
        save_file(renamed, folder / "model.safetensors")
        model = load_model(folder, device=device)
        assert torch.equal(Driver(model, device).logits(ids), expected)
        assert model.eos_token_ids == {2}
