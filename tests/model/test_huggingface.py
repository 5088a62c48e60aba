"""Parity with transformers: logits, gradients, patterns, files in both directions; unsupported models are rejected."""

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from common.errors import CHECKPOINT, UserError
from model.config import ATTENTION_IMPLEMENTATIONS
from model.functional import precompute_rope
from model.generate import SamplingParams, generate
from model.gpt import GPT
from model.huggingface import (
    config_from_huggingface,
    from_huggingface,
    load_huggingface,
    read_huggingface_config,
    save_huggingface,
    to_huggingface,
)
from tests.model import helpers
from tests.model.helpers import SHAPES, VOCAB, normal, random_model, random_tokens, same, transformers_model
from tests.runs import user_error

MODELS = ["gpt2", "qwen3", "llama", "gpt2 untied", "qwen3 untied", "llama untied"]
each_preset = pytest.mark.parametrize("preset", MODELS)
each_pair = pytest.mark.parametrize(
    ("preset", "attention"),
    [*((preset, "eager") for preset in MODELS), ("qwen3", "sdpa"), ("llama untied", "chunked")],
)


@each_pair
def test_logits_match_transformers(preset: str, attention: Any) -> None:
    model = random_model(preset, attention)
    tokens = random_tokens(3, model.config.context)
    with torch.no_grad():
        same(model(tokens), transformers_model(model)(tokens).logits, 1e-5)


@each_pair
def test_gradients_match_transformers(preset: str, attention: Any) -> None:
    model = random_model(preset, attention)
    theirs = transformers_model(model)
    tokens = random_tokens(3, model.config.context + 1)
    for forward in (model, lambda x: theirs(x).logits):
        F.cross_entropy(forward(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten()).backward()
    gradients: dict[str, Any] = {name: p.grad for name, p in theirs.named_parameters()}
    expected = dict(from_huggingface(to_huggingface(model)[0], gradients).named_parameters())
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None
        assert helpers.relative_difference(parameter.grad, expected[name]) <= 1e-5, name


@each_preset
def test_patterns_match_transformers(preset: str) -> None:
    model = random_model(preset)
    tokens = random_tokens(3, model.config.context)
    ours = helpers.record_patterns(model)
    with torch.no_grad():
        model(tokens)
        theirs = transformers_model(model)(tokens, output_attentions=True).attentions
    assert len(ours) == len(theirs) == model.config.n_layers
    for a, b in zip(ours, theirs, strict=True):
        same(a, b, 1e-6)
        assert a[..., -1, :].amax(-1).mean() > 2.5 / model.config.context  # nearly uniform attention proves little


@pytest.mark.parametrize("d_head", [64, 128])
def test_rotary_angles_equal_those_of_transformers(d_head: int) -> None:
    model = random_model("qwen3", d_head=d_head)
    positions = torch.arange(5000)
    theirs = transformers_model(model).model.rotary_emb(normal(1), positions[None])
    ours = precompute_rope(positions, d_head, model.config.architecture.rope_theta)
    for a, b in zip(ours, theirs, strict=True):
        assert torch.equal(a, b[0])


def test_logits_match_transformers_in_fp64() -> None:
    """GPT-2 only: the RMSNorm of transformers rounds to fp32."""
    model, tokens = random_model("gpt2").double(), random_tokens(3, 24)
    same(model(tokens), transformers_model(model).double()(tokens).logits, 1e-12)


@each_preset
def test_each_loads_the_files_of_the_other(preset: str, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    ours, tokens = random_model(preset), random_tokens(2, SHAPES[preset].context)
    save_huggingface(ours, tmp_path / "ours")
    theirs, info = AutoModelForCausalLM.from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert type(theirs).__name__ == theirs.config.architectures[0]
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    theirs.save_pretrained(tmp_path / "theirs", max_shard_size="20KB")
    assert len(list((tmp_path / "theirs").glob("model-*.safetensors"))) > 2
    models = [load_huggingface(tmp_path / "theirs", attention) for attention in ATTENTION_IMPLEMENTATIONS]
    assert [model.config.attention for model in models] == list(ATTENTION_IMPLEMENTATIONS)
    with torch.no_grad():
        expected = ours(tokens)
        for logits in (theirs.eval()(tokens).logits, *(model.eval()(tokens) for model in models)):
            same(logits, expected, 1e-5)
    assert read_huggingface_config(tmp_path / "theirs") == (replace(ours.config, attention="auto"), VOCAB)
    save_huggingface(models[0], tmp_path / "again")
    assert (tmp_path / "again" / "model.safetensors").read_bytes() == (tmp_path / "ours/model.safetensors").read_bytes()


@each_preset
def test_greedy_text_matches_transformers(preset: str) -> None:
    """200 tokens, as sample.py writes them."""
    model, prompt = random_model(preset, "sdpa", context=216), random_tokens(1, 16)
    steps = generate(model, prompt, 200, torch.Generator(), SamplingParams(temperature=0.0))
    theirs = transformers_model(model).generate(prompt, max_new_tokens=200, do_sample=False, pad_token_id=0)
    assert torch.stack([tokens for tokens, _ in steps], dim=1).tolist() == theirs[:, 16:].tolist()


@each_preset
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_round_trip(preset: str, dtype: torch.dtype, tmp_path: Path) -> None:
    """Of a model whose MLP size is not the preset's multiple; all files are loaded as float32."""
    ours = random_model(preset, d_mlp=37).to(dtype)
    save_huggingface(ours, tmp_path)
    again = load_huggingface(tmp_path)
    assert again.config == ours.config
    for (name, a), b in zip(again.named_parameters(), ours.parameters(), strict=True):
        assert a.dtype == torch.float32 and torch.equal(a, b.float()), name


@each_preset
def test_missing_prefix_and_unused_tensors_are_accepted(preset: str) -> None:
    """The original GPT-2 files lack the prefix and contain the masks; some files repeat the tied head."""
    ours = random_model(preset)
    config, weights = to_huggingface(ours)
    prefix = "transformer." if "gpt2" in preset else "model."
    bare = {name.removeprefix(prefix): tensor for name, tensor in weights.items()}
    if "gpt2" in preset:
        bare |= {f"h.0.attn.{name}": torch.ones(1, 1, 24, 24) for name in ("bias", "masked_bias")}
    bare["lm_head.weight"] = ours.lm_head.weight.detach().clone()
    state = from_huggingface(config, bare).state_dict()
    assert all(torch.equal(state[name], tensor) for name, tensor in ours.state_dict().items())


def test_original_gpt2_config_is_read() -> None:
    """As in `openai-community/gpt2`."""
    names = {"model_type": "gpt2", "activation_function": "gelu_new", "layer_norm_epsilon": 1e-05, "attn_pdrop": 0.1}
    sizes = {"vocab_size": 50257, "n_ctx": 1024, "n_embd": 768, "n_head": 12, "n_layer": 12, "n_positions": 1024}
    shape, vocab_size = config_from_huggingface(names | sizes)
    assert shape.d_mlp == 3072 and shape.dropout == 0 and vocab_size == 50257


def test_qwen3_config_of_transformers_4_is_read() -> None:
    config, _ = to_huggingface(random_model("qwen3"))
    del config["rope_parameters"]
    old = {"rope_theta": 1000000, "rope_scaling": None, "sliding_window": None, "layer_types": ["full_attention"] * 2}
    shape, _ = config_from_huggingface(config | old)
    assert shape.d_head == 10 and shape.n_kv_heads == 2


# Unsupported models and damaged folders.


def check_rejected(config: dict[str, Any], weights: dict[str, Tensor], words: str) -> None:
    with pytest.raises(ValueError, match=re.escape(words)):
        from_huggingface(config, weights)


@pytest.mark.parametrize(
    ("preset", "changes", "word"),
    [
        ("gpt2", {"model_type": "mistral"}, "model_type is 'mistral'; it must be gpt2 or qwen3 or llama"),
        ("gpt2", {"activation_function": "gelu"}, "activation_function is 'gelu'"),
        ("gpt2", {"layer_norm_epsilon": 0}, "layer_norm_epsilon is 0; it must be a positive number"),
        ("gpt2", {"layer_norm_epsilon": None}, "layer_norm_epsilon is None; it must be a positive number"),
        ("gpt2", {"tie_word_embeddings": "no"}, "tie_word_embeddings is 'no'; it must be True or False"),
        ("gpt2", {"n_layer": 10**9}, "1000000000 layers, the files"),
        ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx is True"),
        ("gpt2", {"n_head": 5}, "not divisible by 5 heads"),
        ("gpt2", {"n_layer": "two"}, "'two'"),
        ("gpt2", {"vocab_size": 48}, "wte.weight is [61, 48], not [48, 48]"),
        ("qwen3", {"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
        ("qwen3", {"use_sliding_window": True}, "use_sliding_window is True"),
        ("qwen3", {"layer_types": ["full_attention", "sliding_attention"]}, "layer_types"),
        ("qwen3", {"rope_parameters": {"rope_type": "yarn", "factor": 4.0}}, "yarn"),
        ("llama", {"rope_scaling": {"rope_type": "llama3"}, "rope_parameters": None}, "rope_type is 'llama3'"),
        ("qwen3", {"rope_parameters": None, "rope_scaling": {"type": "linear", "factor": 2}}, "linear"),
        ("qwen3", {"head_dim": 9}, "rotary positions need an even one"),
        ("qwen3", {"num_key_value_heads": 4}, "4 key/value heads"),
    ],
)
def test_unsupported_config_is_rejected(preset: str, changes: dict[str, Any], word: str) -> None:
    config, weights = to_huggingface(random_model(preset))
    check_rejected(config | changes, weights, word)


@each_preset
def test_wrong_tensors_are_named(preset: str) -> None:
    config, weights = to_huggingface(random_model(preset))
    names = (next(iter(weights)), list(weights)[7])
    first, second = (name.split(".", 1)[1] for name in names)
    check_rejected(config, {n: w for n, w in weights.items() if n not in names}, f"missing tensors: {first}, {second}")
    check_rejected(config, weights | {f"{n}.extra": weights[n] for n in names}, f"have: {first}.extra, {second}.extra")
    check_rejected(config, weights | {names[0]: weights[names[0]][:-1]}, f"config.json implies: {first} is [60, ")
    tied, head = config["tie_word_embeddings"], {"lm_head.weight": normal(VOCAB, weights[names[0]].shape[1])}
    if tied:
        check_rejected(config, weights | head, "lm_head.weight differs")
        check_rejected(config | {"tie_word_embeddings": False}, weights, "missing tensors: lm_head.weight")
    if preset == "gpt2":
        name = "transformer.h.1.mlp.c_fc.weight"
        check_rejected(config, weights | {name: weights[name].t()}, "h.1.mlp.c_fc.weight is [192, 48], not [48, 192]")


@pytest.mark.parametrize(
    ("preset", "changes", "word"),
    [
        ("gpt2", {"n_kv_heads": 2}, "no grouped key/value heads"),
        ("gpt2", {"d_head": 10}, "no head size"),
        ("gpt2", {"norm": "rms"}, "no options norm, positions and mlp"),
        ("glass", {"ngrams": 2}, "no n-gram embeddings"),
        ("llama", {"mlp": "none", "d_mlp": 0}, "no options norm, positions and mlp"),
    ],
)
def test_inexpressible_model_is_not_exported(preset: str, changes: dict[str, Any], word: str) -> None:
    with pytest.raises(ValueError, match=word):
        to_huggingface(GPT(replace(SHAPES[preset], **changes), VOCAB))


INDEX = "model.safetensors.index.json"


@pytest.mark.parametrize(
    ("files", "words"),
    [
        ({"model.safetensors": None}, "model.safetensors"),
        ({"model.safetensors": b"\x08"}, "not a readable Hugging Face model"),
        ({"config.json": b"{}"}, "'model_type' is missing"),
        ({"config.json": b"\xff\xfe"}, "not a readable"),
        (
            {"model.safetensors": None, "pytorch_model.bin": b"P"},
            "pickled weights (pytorch_model.bin), which can execute",
        ),
        (
            {"model.safetensors": None, INDEX: b'{"weight_map": {"wte.weight": "../a.safetensors"}}'},
            "'../a.safetensors'",
        ),
        ({"model.safetensors": None, INDEX: b'{"weight_map": {"wte.weight": "gone.safetensors"}}'}, "gone.safetensors"),
        ({"model.safetensors": None, INDEX: b'{"weight_map": 3}'}, "no attribute 'values'"),
    ],
)
def test_damaged_folder_is_one_line(files: dict[str, bytes | None], words: str, tmp_path: Path) -> None:
    save_huggingface(random_model("gpt2"), tmp_path)
    (tmp_path.parent / "a.safetensors").write_bytes((tmp_path / "model.safetensors").read_bytes())
    for file, content in files.items():
        if content is None:
            (tmp_path / file).unlink()
        else:
            (tmp_path / file).write_bytes(content)
    with user_error(CHECKPOINT) as caught:
        load_huggingface(tmp_path)
    assert str(tmp_path) in str(caught.value)
    assert words in str(caught.value) and "\n" not in str(caught.value)


def test_other_dtypes_are_rejected(tmp_path: Path) -> None:
    save_huggingface(random_model("llama").to(torch.float64), tmp_path)
    with pytest.raises(UserError, match=r"not float32, float16 or bfloat16: embed_tokens.weight is F64"):
        load_huggingface(tmp_path)
