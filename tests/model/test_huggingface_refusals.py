"""Hugging Face models that are refused, each trouble by its name, and folders that are broken."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from common.errors import CHECKPOINT, CONFIG, DISK_OR_MEMORY, UserError
from model.gpt import GPT
from model.huggingface import from_huggingface, load_huggingface, save_huggingface, to_huggingface
from tests.model.checks import SHAPES, VOCAB, random_model

BOTH = pytest.mark.parametrize("preset", ["gpt2", "qwen3"])


def refused(config: dict[str, Any], weights: dict[str, torch.Tensor], *words: str) -> None:
    with pytest.raises(UserError) as caught:
        from_huggingface(config, weights)
    assert caught.value.exit_code == CHECKPOINT
    assert "\n" not in str(caught.value)
    for word in words:
        assert word in str(caught.value)


@pytest.mark.parametrize(
    ("preset", "changes", "word"),
    [
        ("gpt2", {"model_type": "llama"}, "model_type is 'llama'"),
        ("gpt2", {"model_type": None}, "model_type is None"),
        ("gpt2", {"model_type": ["gpt2"]}, "model_type is ['gpt2']"),
        ("gpt2", {"activation_function": "gelu"}, "activation_function is 'gelu'"),
        ("gpt2", {"layer_norm_epsilon": 1e-6}, "layer_norm_epsilon is 1e-06"),
        ("gpt2", {"scale_attn_weights": False}, "scale_attn_weights is False"),
        ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx is True"),
        ("gpt2", {"add_cross_attention": True}, "add_cross_attention is True"),
        ("gpt2", {"tie_word_embeddings": False}, "tie_word_embeddings is False"),
        ("gpt2", {"quantization_config": {"bits": 4}}, "quantization_config"),
        ("gpt2", {"n_head": 5}, "5 heads cannot share evenly"),
        ("gpt2", {"n_layer": 0}, "n_layer is 0"),
        ("gpt2", {"n_layer": True}, "n_layer is True"),
        ("gpt2", {"n_layer": 10**12}, "1000000000000 layers"),
        ("gpt2", {"n_embd": "48"}, "n_embd is '48'"),
        ("gpt2", {"vocab_size": None}, "vocab_size is None"),
        ("gpt2", {"n_embd": 4 * 10**18}, "cannot be built"),
        ("qwen3", {"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
        ("qwen3", {"rms_norm_eps": 1e-5}, "rms_norm_eps is 1e-05"),
        ("qwen3", {"attention_bias": True}, "attention_bias is True"),
        ("qwen3", {"use_sliding_window": True}, "use_sliding_window is True"),
        ("qwen3", {"layer_types": ["full_attention", "sliding_attention"]}, "layer_types"),
        ("qwen3", {"layer_types": "full_attention"}, "layer_types"),
        ("qwen3", {"tie_word_embeddings": False}, "tie_word_embeddings is False"),
        ("qwen3", {"rope_parameters": {"rope_type": "yarn", "factor": 4.0}}, "yarn"),
        ("qwen3", {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4}}, "rope_theta is 10000.0"),
        ("qwen3", {"rope_parameters": None, "rope_theta": 5e6}, "rope_theta is 5000000.0"),
        ("qwen3", {"rope_parameters": None, "rope_scaling": {"type": "linear", "factor": 2}}, "linear"),
        (
            "qwen3",
            {"rope_parameters": {"rope_theta": 1e6, "partial_rotary_factor": 0.5}},
            "part of each head",
        ),
        ("qwen3", {"rope_parameters": {"rope_theta": 1e6, "mscale": 2}}, "mscale"),
        ("qwen3", {"rope_parameters": "default"}, "rope"),
        ("qwen3", {"head_dim": None}, "head_dim is None"),
        ("qwen3", {"head_dim": 9}, "rotary positions need an even one"),
        ("qwen3", {"num_key_value_heads": 4}, "4 key/value heads"),
    ],
)
def test_what_no_preset_computes_is_refused(preset: str, changes: dict[str, Any], word: str) -> None:
    config, weights = to_huggingface(random_model(preset))
    refused(config | changes, weights, word)


@pytest.mark.parametrize("name", ["tie_word_embeddings", "head_dim", "hidden_size"])
def test_a_silent_configuration_means_what_transformers_takes_it_for(name: str) -> None:
    config, weights = to_huggingface(random_model("qwen3"))
    del config[name]
    refused(config, weights, name)


def test_a_silent_configuration_has_the_default_theta_of_transformers() -> None:
    config, weights = to_huggingface(random_model("qwen3"))
    del config["rope_parameters"], config["rope_theta"]
    refused(config, weights, "rope_theta is 10000.0")


@BOTH
def test_every_missing_extra_or_misshapen_tensor_is_named(preset: str) -> None:
    config, weights = to_huggingface(random_model(preset))
    for name in weights:
        refused(config, {n: w for n, w in weights.items() if n != name}, f"{name} is missing")
        refused(config, weights | {name: weights[name][:-1]}, name, "has shape", "implies")
        refused(config, weights | {f"{name}.extra": weights[name]}, f"{name}.extra is unknown")


def test_transposed_weights_are_noticed() -> None:
    config, weights = to_huggingface(random_model("gpt2"))
    name = "transformer.h.1.mlp.c_fc.weight"
    refused(config, weights | {name: weights[name].t()}, f"{name} has shape (192, 48)", "(48, 192)")


@BOTH
def test_an_untied_head_and_quantized_weights_are_refused(preset: str) -> None:
    config, weights = to_huggingface(random_model(preset))
    first = next(iter(weights))
    refused(config, weights | {"lm_head.weight": weights[first] + 1}, "lm_head.weight differs")
    refused(config, weights | {first: weights[first].to(torch.int8)}, f"{first} is torch.int8")


def test_a_long_list_of_troubles_is_cut() -> None:
    config, weights = to_huggingface(random_model("qwen3"))
    refused(config, {name: tensor[:-1] for name, tensor in weights.items()}, "; and 18 more")


def test_what_hugging_face_cannot_express_is_not_exported() -> None:
    cases: list[tuple[str, dict[str, Any], str]] = [
        ("glass", {}, "glass has no Hugging Face layout"),
        ("gpt2", {"n_kv_heads": 2}, "no shared key/value heads"),
        ("gpt2", {"d_head": 10}, "no head width"),
    ]
    for preset, changes, word in cases:
        with pytest.raises(UserError, match=word) as caught:
            to_huggingface(GPT(replace(SHAPES[preset], **changes), VOCAB))
        assert caught.value.exit_code == CONFIG


@pytest.mark.parametrize("broken", ["missing", "cut", "garbage", "no json", "deep json", "no object", "latin"])
def test_a_broken_folder_is_one_line(broken: str, tmp_path: Path) -> None:
    save_huggingface(random_model("gpt2"), tmp_path)
    config, weights = tmp_path / "config.json", tmp_path / "model.safetensors"
    if broken == "missing":
        weights.unlink()
    elif broken == "cut":
        weights.write_bytes(weights.read_bytes()[:-100])
    elif broken == "garbage":
        weights.write_bytes(b"\xff" * 64)
    else:
        texts = {"no json": b"{", "deep json": b"[" * 100_000, "no object": b"[1]", "latin": b"\xff\xfe"}
        config.write_bytes(texts[broken])
    with pytest.raises(UserError) as caught:
        load_huggingface(tmp_path)
    assert caught.value.exit_code == CHECKPOINT and str(tmp_path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_failed_save_leaves_the_old_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_huggingface(random_model("gpt2"), tmp_path)
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}

    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("model.huggingface.json.dumps", full)
    with pytest.raises(UserError, match="No space left") as caught:
        save_huggingface(random_model("gpt2", seed=9), tmp_path)
    assert caught.value.exit_code == DISK_OR_MEMORY
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before
