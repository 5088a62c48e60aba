"""Parity with transformers: logits, gradients, attention, and files in both directions."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from model.config import ATTENTION_IMPLEMENTATIONS, AttentionImplementation, ModelConfig
from model.gpt import GPT
from model.huggingface import from_huggingface, load_huggingface, save_huggingface, to_huggingface
from tests.model.checks import (
    SHAPES,
    VOCAB,
    check_attention_matches_reference,
    check_gradients_match_reference,
    check_logits_match_reference,
    random_model,
    random_tokens,
    reference_of,
    same,
)

BOTH = pytest.mark.parametrize("preset", ["gpt2", "qwen3"])


@BOTH
@pytest.mark.parametrize("face", ATTENTION_IMPLEMENTATIONS)
def test_logits_are_those_of_transformers(preset: str, face: AttentionImplementation) -> None:
    check_logits_match_reference(preset, face)


@BOTH
@pytest.mark.parametrize("face", ATTENTION_IMPLEMENTATIONS)
def test_gradients_are_those_of_transformers(preset: str, face: AttentionImplementation) -> None:
    check_gradients_match_reference(preset, face)


@BOTH
def test_attention_is_that_of_transformers(preset: str) -> None:
    check_attention_matches_reference(preset)


def test_in_double_precision_nothing_is_left_to_rounding() -> None:
    """GPT-2 alone: the reference's RMSNorm rounds to single precision."""
    model, tokens = random_model("gpt2").double(), random_tokens(3, 24)
    same(model(tokens), reference_of(model).double()(tokens).logits, 1e-12)


@BOTH
def test_what_transformers_saves_can_be_loaded(preset: str, tmp_path: Path) -> None:
    """Their own random weights, through their own `save_pretrained`."""
    from transformers import set_seed

    set_seed(3)
    theirs = reference_of(random_model(preset))
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.normal_(0.1, 0.15)
    theirs.save_pretrained(tmp_path)
    tokens = random_tokens(2, SHAPES[preset].context)
    with torch.no_grad():
        for face in ATTENTION_IMPLEMENTATIONS:
            ours = load_huggingface(tmp_path, face).eval()
            assert ours.config.attention == face
            same(ours(tokens), theirs(tokens).logits, 1e-5)


@BOTH
def test_what_is_saved_here_transformers_loads(preset: str, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    ours = random_model(preset)
    folder = tmp_path / "new" / "folder"
    save_huggingface(ours, folder)
    assert sorted(path.name for path in folder.iterdir()) == ["config.json", "model.safetensors"]
    theirs, notes = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(notes[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    tokens = random_tokens(2, SHAPES[preset].context)
    with torch.no_grad():
        same(theirs.eval()(tokens).logits, ours(tokens), 1e-5)


@BOTH
def test_transformers_builds_the_model_from_its_configuration(preset: str, tmp_path: Path) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    ours = random_model(preset)
    save_huggingface(ours, tmp_path)
    config = AutoConfig.from_pretrained(tmp_path)
    theirs = AutoModelForCausalLM.from_config(config)
    assert type(theirs).__name__ == config.architectures[0]
    assert sum(p.numel() for p in theirs.parameters()) == sum(p.numel() for p in ours.parameters())


@BOTH
def test_there_and_back_again_is_the_same_model(preset: str, tmp_path: Path) -> None:
    ours = random_model(preset)
    shape, vocab_size, state = from_huggingface(*to_huggingface(ours))
    assert vocab_size == VOCAB and state.keys() == ours.state_dict().keys()
    assert all(torch.equal(tensor, state[name]) for name, tensor in ours.state_dict().items())
    for name in ("preset", "n_layers", "n_heads", "n_kv_heads", "d_head", "d_mlp", "context"):
        assert getattr(shape, name) == getattr(ours.config, name)
    save_huggingface(ours, tmp_path)
    again = load_huggingface(tmp_path)
    assert again.lm_head.weight is again.token_embedding.weight
    assert torch.equal(again(random_tokens(1, 9)), ours(random_tokens(1, 9)))


@BOTH
def test_exported_tensors_are_copies_of_their_own(preset: str) -> None:
    ours = random_model(preset)
    _, weights = to_huggingface(ours)
    before = [p.clone() for p in ours.parameters()]
    for tensor in weights.values():
        assert tensor.is_contiguous() and not tensor.requires_grad
        tensor.zero_()
    assert all(torch.equal(a, b) for a, b in zip(before, ours.parameters(), strict=True))


def test_an_mlp_of_any_width_survives(tmp_path: Path) -> None:
    for preset in ("gpt2", "qwen3"):
        ours = random_model(preset, d_mlp=37)
        save_huggingface(ours, tmp_path)
        assert torch.equal(load_huggingface(tmp_path)(random_tokens(1, 9)), ours(random_tokens(1, 9)))


@BOTH
def test_half_precision_files_load_into_single_precision(preset: str, tmp_path: Path) -> None:
    save_huggingface(random_model(preset).bfloat16(), tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["dtype"] == "bfloat16"
    again = load_huggingface(tmp_path)
    assert all(p.dtype == torch.float32 for p in again.parameters())


# Files in circulation.


@BOTH
def test_names_without_the_prefix_and_unused_tensors_are_tolerated(preset: str) -> None:
    """The original GPT-2 files lack the prefix and hold the masks; some files repeat the tied head."""
    config, weights = to_huggingface(random_model(preset))
    prefix = "transformer." if preset == "gpt2" else "model."
    bare = {name.removeprefix(prefix): tensor for name, tensor in weights.items()}
    if preset == "gpt2":
        for layer in range(2):
            bare[f"h.{layer}.attn.bias"] = torch.ones(1, 1, 24, 24)
            bare[f"h.{layer}.attn.masked_bias"] = torch.tensor(-1e4)
    bare["lm_head.weight"] = next(iter(weights.values())).clone()
    _, _, wanted = from_huggingface(config, weights)
    _, _, state = from_huggingface(config, bare)
    assert all(torch.equal(state[name], wanted[name]) for name in wanted)


def test_the_original_gpt2_configuration_is_read() -> None:
    """As in `openai-community/gpt2`; its dropouts and task settings are not what the model computes."""
    config = {
        "model_type": "gpt2",
        "architectures": ["GPT2LMHeadModel"],
        "activation_function": "gelu_new",
        "layer_norm_epsilon": 1e-05,
        "initializer_range": 0.02,
        "vocab_size": 50257,
        "n_ctx": 1024,
        "n_embd": 768,
        "n_head": 12,
        "n_layer": 12,
        "n_positions": 1024,
        "attn_pdrop": 0.1,
        "embd_pdrop": 0.1,
        "resid_pdrop": 0.1,
        "bos_token_id": 50256,
        "eos_token_id": 50256,
        "summary_activation": None,
    }
    with torch.device("meta"):
        _, weights = to_huggingface(GPT(ModelConfig("gpt2", 12, 12, d_model=768, context=1024), 50257))
    shape, vocab_size, _ = from_huggingface(config, weights)
    assert shape.d_mlp == 3072 and shape.dropout == 0 and vocab_size == 50257


def test_a_qwen3_configuration_of_transformers_4_is_read() -> None:
    config, weights = to_huggingface(random_model("qwen3"))
    del config["rope_parameters"]
    old = {"rope_theta": 1000000, "rope_scaling": None, "sliding_window": None, "max_window_layers": 28}
    shape, _, _ = from_huggingface(config | old, weights)
    assert shape.d_head == 10 and shape.n_kv_heads == 2


def test_files_say_that_they_hold_torch_tensors(tmp_path: Path) -> None:
    """Some readers look for the mark; a file without it is read here all the same."""
    from safetensors import safe_open

    save_huggingface(random_model("gpt2"), tmp_path)
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}
    save_file(load_file(tmp_path / "model.safetensors"), tmp_path / "model.safetensors")
    load_huggingface(tmp_path)
