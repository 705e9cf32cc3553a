"""Loading: what a good folder gives, and the one clear line that every broken one gives."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from support.checkpoints import FAMILIES, tiny_checkpoint, write_safetensors

from baton_common.errors import ConfigError
from baton_engine.exec.device import open_device
from baton_engine.models.families import parse_config
from baton_engine.models.fields import Fields, read_json
from baton_engine.models.loader import load_model, random_model


@pytest.fixture(scope="module")
def device():
    device = open_device("cpu", threads=1)
    yield device
    device.close()


@pytest.fixture
def folder(tmp_path):
    return tiny_checkpoint("qwen3", tmp_path / "model", num_hidden_layers=2)


def edit(folder, file="config.json", **changes):
    path = folder / file
    values = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({key: value for key, value in values.items() if value is not ...}))


def edit_weights(folder, change):
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors")


def refused(folder, device, *parts, dtype="auto"):
    """Loading fails with one line that has all these parts."""
    with pytest.raises(ConfigError) as caught:
        load_model(folder, device=device, dtype=dtype)
    text = str(caught.value)
    assert "\n" not in text
    assert [part for part in parts if part not in text] == [], text


def split(folder, shards):
    """The same checkpoint over several files with an index."""
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = sorted(weights)
    places = {}
    for shard in range(shards):
        file = f"model-{shard + 1:05}-of-{shards:05}.safetensors"
        part = names[shard::shards]
        save_file({name: weights[name] for name in part}, folder / file)
        places |= dict.fromkeys(part, file)
    index = {"metadata": {"total_size": 1}, "weight_map": places}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def same_weights(one, two):
    pairs = zip(one.decoder.weights.layers, two.decoder.weights.layers, strict=True)
    return all(torch.equal(a.qkv, b.qkv) and torch.equal(a.gate_up, b.gate_up) for a, b in pairs)


def test_projections_are_fused_in_order(folder, device):
    config, weights = read_json(folder / "config.json"), load_file(folder / "model.safetensors")
    model = load_model(folder, device=device)
    layer = model.decoder.weights.layers[1]
    attention, mlp = "model.layers.1.self_attn", "model.layers.1.mlp"
    parts = [weights[f"{attention}.{name}_proj.weight"] for name in "qkv"]
    assert torch.equal(layer.qkv, torch.cat(parts))
    assert torch.equal(layer.gate_up, torch.cat([weights[f"{mlp}.{name}_proj.weight"] for name in ("gate", "up")]))
    assert model.decoder.weights.head is model.decoder.weights.embed
    assert model.spec == parse_config(config)
    assert model.folder == folder
    assert model.decoder.weights.bytes == sum(tensor.numel() * 4 for tensor in weights.values())


def test_shards_load_like_one_file_and_have_the_same_digest(folder, device):
    whole = load_model(folder, device=device)
    split(folder, 3)
    parts = load_model(folder, device=device)
    assert same_weights(whole, parts)
    assert whole.digest == parts.digest


def test_the_digest_changes_with_any_weight_and_any_config_value_that_matters(folder, tmp_path, device):
    digests = {load_model(folder, device=device).digest}
    other = tiny_checkpoint("qwen3", tmp_path / "seed", num_hidden_layers=2, seed=1)
    digests.add(load_model(other, device=device).digest)
    edit(folder, rope_theta=20000.0)
    digests.add(load_model(folder, device=device).digest)
    edit_weights(folder, lambda weights: weights["model.norm.weight"][:1].mul_(1.001))
    digests.add(load_model(folder, device=device).digest)
    assert len(digests) == 4


def test_the_digest_does_not_depend_on_the_dtype_in_memory(folder, device):
    one, two = (load_model(folder, device=device, dtype=dtype) for dtype in ("float32", "bfloat16"))
    assert one.digest == two.digest
    assert (one.decoder.dtype, two.decoder.dtype) == (torch.float32, torch.bfloat16)


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"torch_dtype": "bfloat16"}, "bfloat16"),
        ({"torch_dtype": "float16"}, "bfloat16"),
        ({"torch_dtype": ..., "dtype": "bfloat16"}, "bfloat16"),
        ({"torch_dtype": ...}, "float32"),
    ],
)
def test_auto_takes_the_dtype_of_the_config(folder, device, fields, expected):
    edit(folder, **fields)
    assert load_model(folder, device=replace(device, native_bf16=True)).dtype == expected


def test_auto_avoids_bfloat16_where_the_device_would_emulate_it(folder, device):
    edit(folder, torch_dtype="bfloat16")
    slow = replace(device, native_bf16=False)
    assert load_model(folder, device=slow).dtype == "float32"
    assert load_model(folder, device=slow, dtype="bfloat16").dtype == "bfloat16"


def test_progress_ends_at_the_size_of_the_weights(folder, device):
    seen = []
    load_model(folder, device=device, progress=lambda done, total: seen.append((done, total)))
    assert [done for done, _ in seen] == sorted({done for done, _ in seen})
    assert seen[-1] == (sum(tensor.numel() * 4 for tensor in load_file(folder / "model.safetensors").values()),) * 2


def test_stop_tokens_come_from_both_configs(folder, device):
    edit(folder, eos_token_id=7)
    edit(folder, "generation_config.json", eos_token_id=[8, 9])
    assert load_model(folder, device=device).eos_token_ids == {7, 8, 9}
    (folder / "generation_config.json").unlink()
    assert load_model(folder, device=device).eos_token_ids == {7}


def test_harmless_extra_tensors_are_left_alone(folder, device):
    before = load_model(folder, device=device).digest

    def change(weights):
        weights["lm_head.weight"] = weights["model.embed_tokens.weight"].clone()
        weights["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)

    edit_weights(folder, change)
    assert load_model(folder, device=device).digest == before


def test_missing_tensors_are_named(folder, device):
    edit_weights(folder, lambda weights: weights.pop("model.layers.1.mlp.up_proj.weight"))
    refused(folder, device, "lacks tensor layers.1.mlp.up_proj.weight", "incomplete")


def test_many_missing_tensors_are_counted(folder, device):
    edit(folder, num_hidden_layers=4)
    refused(folder, device, "lacks tensors layers.2.", "and 18 more")


def test_unknown_tensors_are_named(folder, device):
    edit_weights(folder, lambda weights: weights.update({"model.layers.0.moe.gate.weight": torch.ones(2)}))
    refused(folder, device, "model.layers.0.moe.gate.weight", "does not have")


def test_mis_shaped_tensors_are_named_with_both_shapes(folder, device):
    edit(folder, intermediate_size=80)
    refused(folder, device, "mlp.down_proj.weight has shape [64, 96], config.json says [64, 80]")


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn])
def test_quantised_tensors_are_refused_by_name(folder, device, dtype):
    name = "model.layers.0.mlp.up_proj.weight"
    edit_weights(folder, lambda weights: weights.update({name: weights[name].to(dtype)}))
    refused(folder, device, name, "quantised")


def test_a_quantised_config_is_refused(folder, device):
    edit(folder, quantization_config={"quant_method": "fp8"})
    refused(folder, device, "quantised", "use the unquantised one")


@pytest.mark.parametrize("keep", [0, 5, 300, -100])
def test_a_cut_off_file_is_refused(folder, device, keep):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    refused(folder, device, str(path), "cut off or corrupt", "download")


def test_weights_that_do_not_fit_are_refused_with_their_size(folder, device, monkeypatch):
    def full(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(torch, "empty", full)
    refused(folder, device, "no memory for the weights", "float32", "GiB, cpu has", "another --device")


def test_a_file_of_garbage_is_refused(folder, device):
    (folder / "model.safetensors").write_bytes(np.random.default_rng(0).bytes(4000))
    refused(folder, device, "cut off or corrupt")


def test_a_missing_shard_is_named(folder, device):
    split(folder, 2)
    (folder / "model-00002-of-00002.safetensors").unlink()
    refused(folder, device, "model-00002-of-00002.safetensors is missing")


def test_the_same_tensor_in_two_shards_is_refused(folder, device):
    split(folder, 2)
    name = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]["model.norm.weight"]
    other = next(path for path in folder.glob("model-*.safetensors") if path.name != name)
    save_file({**load_file(other), "model.norm.weight": torch.ones(64)}, other)
    refused(folder, device, "model.norm.weight is in", "and in")


@pytest.mark.parametrize("index", ['{"metadata": {}}', '{"weight_map": {"a": 3}}', "[1]", "{"])
def test_a_broken_index_is_refused(folder, device, index):
    (folder / "model.safetensors.index.json").write_text(index)
    refused(folder, device, "model.safetensors.index.json")


def test_a_folder_without_safetensors_says_what_it_looked_for(folder, device):
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    refused(folder, device, "neither model.safetensors nor", "convert its .bin files")


def test_a_folder_without_config_is_refused(tmp_path, device):
    refused(tmp_path, device, "cannot read", "config.json")


def test_config_that_is_no_json_is_refused(folder, device):
    (folder / "config.json").write_text("{'model_type'")
    refused(folder, device, "config.json is no valid JSON")


def test_an_unknown_family_is_named_with_the_known_ones(folder, device):
    edit(folder, model_type="gpt_oss", architectures=["GptOssForCausalLM"])
    refused(folder, device, "'gpt_oss'", "GptOssForCausalLM", "LlamaForCausalLM", "Qwen3ForCausalLM", "supported are")


def test_another_architecture_of_a_known_family_is_refused(folder, device):
    edit(folder, architectures=["Qwen3ForSequenceClassification"])
    refused(folder, device, "Qwen3ForSequenceClassification", "not supported")


@pytest.mark.parametrize(
    ("changes", "parts"),
    [
        ({"hidden_size": ...}, ["lacks hidden_size"]),
        ({"hidden_size": "64"}, ["hidden_size must be a positive integer, got '64'"]),
        ({"num_hidden_layers": 0}, ["num_hidden_layers must be a positive integer"]),
        ({"num_key_value_heads": 3}, ["num_key_value_heads must be a divisor of num_attention_heads (4)"]),
        ({"head_dim": 15}, ["head_dim must be even"]),
        ({"hidden_act": "relu6"}, ["hidden_act must be one of silu", "relu6"]),
        ({"rms_norm_eps": -1}, ["rms_norm_eps must be a positive number"]),
        ({"tie_word_embeddings": "yes"}, ["tie_word_embeddings must be true or false"]),
        ({"rope_scaling": {"rope_type": "longrope"}}, ["rope_scaling", "rope_type must be one of default", "longrope"]),
        ({"rope_scaling": {"rope_type": "linear"}}, ["rope_scaling lacks factor"]),
        ({"rope_scaling": {"rope_type": "default", "partial_rotary_factor": 0.5}}, ["partial_rotary_factor must be 1"]),
        ({"rope_scaling": 4}, ["rope_scaling must be an object"]),
        ({"layer_types": ["linear_attention"] * 2, "use_sliding_window": True}, ["layer_types must be made of"]),
        ({"layer_types": ["full_attention"], "use_sliding_window": True}, ["layer_types must be 2 entries long"]),
        ({"eos_token_id": "</s>"}, ["eos_token_id must be a token id"]),
        ({"torch_dtype": "int8"}, ["torch_dtype must be float32"]),
    ],
)
def test_a_wrong_field_is_named_with_its_value(folder, device, changes, parts):
    edit(folder, **changes)
    refused(folder, device, "config.json", *parts)


def test_an_unknown_dtype_is_refused(folder, device):
    refused(folder, device, "dtype must be auto or one of float32, bfloat16", "'fp8'", dtype="fp8")


def test_an_explicit_null_is_not_a_default():
    base = {**FAMILIES["mistral"], "vocab_size": 9, "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1,
            "num_attention_heads": 2, "max_position_embeddings": 64}  # fmt: skip
    windows = []
    for changes in ({}, {"sliding_window": None}, {"sliding_window": 9}):
        values = {key: value for key, value in base.items() if key != "sliding_window"} | changes
        spec = parse_config(Fields({**values, "num_key_value_heads": 2}, "config"))
        windows.append(spec.layers[0].window)
    assert windows == [4096, None, 9]


def test_specs_give_the_layout_and_a_line_about_rope(tmp_path):
    spec = parse_config(read_json(tiny_checkpoint("gemma3", tmp_path) / "config.json"))
    layout = spec.layout(64, "bfloat16")
    assert layout.page_shape == (4, 2, 2, 64, 16)
    assert spec.rope_text() == "default theta=10000.0; linear theta=100000.0 factor=4.0"
    assert [layer.window for layer in spec.layers] == [24, 24, None, 24]


def test_random_models_repeat_with_their_seed(device, tmp_path):
    spec = parse_config(read_json(tiny_checkpoint("gemma2", tmp_path) / "config.json"))
    one, same, other = (random_model(spec, seed=seed, device=device, dtype="bfloat16") for seed in (1, 1, 2))
    assert same_weights(one, same)
    assert not same_weights(one, other)
    assert one.digest == same.digest != other.digest
    assert one.dtype == "bfloat16"


def test_bfloat16_checkpoints_round_to_nearest(tmp_path):
    values = np.array([[1.0, 1.00390625, 1.0078125, -3.14159, 1e-30]], dtype=np.float32)
    write_safetensors(tmp_path / "x.safetensors", {"x": values}, "bfloat16")
    assert torch.equal(load_file(tmp_path / "x.safetensors")["x"], torch.from_numpy(values).bfloat16())
