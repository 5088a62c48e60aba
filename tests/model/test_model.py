"""What the model promises: no view of the future, right gradients, a documented start, and to be watched."""

from __future__ import annotations

import math
import re
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from model import functional
from model.config import ATTENTION_IMPLEMENTATIONS, AttentionImplementation, ModelConfig
from model.gpt import GPT, AttentionPattern, CausalSelfAttention
from tests.model.checks import (
    PRESETS,
    SHAPES,
    VOCAB,
    Preset,
    check_tied_head,
    modules_of,
    random_model,
    random_tokens,
    recorded,
    same,
)


def first_loss(preset: Preset, seed: int) -> float:
    tokens = random_tokens(8, SHAPES[preset].context + 1)
    logits = GPT(SHAPES[preset], VOCAB, seed)(tokens[:, :-1])
    return F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten()).item()


@pytest.mark.parametrize("preset", ["gpt2", "qwen3"])
def test_the_first_guess_is_nearly_uniform(preset: Preset) -> None:
    assert first_loss(preset, 0) == pytest.approx(math.log(VOCAB), abs=0.05)


def test_glass_begins_as_the_identity() -> None:
    """Its blocks write nothing yet: what is read goes straight to the head."""
    model, tokens = GPT(SHAPES["glass"], VOCAB), random_tokens(2, 9)
    expected = model.lm_head(model.final_norm(model.token_embedding(tokens)))
    assert torch.equal(model(tokens), expected)


@pytest.mark.parametrize("preset", PRESETS)
def test_weights_start_as_documented(preset: Preset) -> None:
    model = GPT(ModelConfig(preset, n_layers=8, n_heads=4, d_model=96, context=64), 500)
    for name, parameter in model.named_parameters():
        if name.endswith("gain"):
            assert (parameter == (0.25 if preset == "glass" and name == "final_norm.weight" else 1)).all(), name
        elif name.endswith("bias"):
            assert (parameter == 0).all(), name
        else:
            std = 0.2 if preset == "glass" and name == "token_embedding.weight" else 0.02
            if name.endswith(("attention.out.weight", "mlp.down.weight")):
                std = 0.0 if preset == "glass" else 0.02 / math.sqrt(2 * 8)
            assert parameter.std().item() == pytest.approx(std, rel=0.05), name
            assert abs(parameter.mean().item()) <= 5 * std / math.sqrt(parameter.numel()), name


@pytest.mark.parametrize("preset", PRESETS)
def test_the_same_seed_draws_the_same_weights(preset: Preset) -> None:
    torch.manual_seed(11)  # the global generator has no say
    first, again, other = (GPT(SHAPES[preset], VOCAB, seed=seed).state_dict() for seed in (3, 3, 4))
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["token_embedding.weight"], other["token_embedding.weight"])


def test_weights_can_be_drawn_again() -> None:
    model, fresh = random_model("gpt2"), GPT(SHAPES["gpt2"], VOCAB, seed=5)
    model.initialise(5)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), fresh.parameters(), strict=True))


@pytest.mark.parametrize("preset", PRESETS)
def test_the_head_is_the_embedding(preset: Preset) -> None:
    check_tied_head(preset)


def test_gpt2_has_the_published_number_of_parameters() -> None:
    config = ModelConfig("gpt2", n_layers=12, n_heads=12, d_model=768, context=1024)
    with torch.device("meta"):
        model = GPT(config, 50257)
    assert sum(p.numel() for p in model.parameters()) == 124_439_808
    assert model.lm_head.weight.is_meta


def test_qwen3_has_the_published_number_of_parameters() -> None:
    """Qwen3-0.6B, whose model card says 0.6 B with its embedding and 0.44 B without."""
    config = ModelConfig("qwen3", 28, n_heads=16, n_kv_heads=8, d_model=1024, d_head=128, d_mlp=3072)
    with torch.device("meta"):
        model = GPT(config, 151_936)
    assert sum(p.numel() for p in model.parameters()) == 596_049_920


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"n_layers": 0}, "model.n_layers is 0; it must be at least 1"),
        ({"n_heads": 0}, "model.n_heads is 0; it must be at least 1"),
        ({"n_kv_heads": -1}, "model.n_kv_heads is -1; it must be at least 0"),
        ({"d_model": 0}, "model.d_model is 0; it must be at least 1"),
        ({"d_head": -2}, "model.d_head is -2; it must be at least 0"),
        ({"d_mlp": -1}, "model.d_mlp is -1; it must be at least 0"),
        ({"context": 0}, "model.context is 0; it must be at least 1"),
        ({"d_model": 130}, "model.d_model is 130, which 4 heads cannot share evenly; take model.d_model 132"),
        ({"n_kv_heads": 3}, "model.n_heads is 4, which 3 key/value heads cannot share evenly"),
        ({"n_kv_heads": 8}, "model.n_heads is 4, which 8 key/value heads cannot share evenly"),
        ({"d_head": 7}, "the width of a head is 7; rotary positions need an even one"),
        ({"dropout": 1.0}, "model.dropout is 1.0; it must be at least 0 and below 1"),
        ({"dropout": -0.1}, "model.dropout is -0.1;"),
        ({"dropout": math.nan}, "model.dropout is nan;"),
    ],
)
def test_a_contradictory_shape_is_named(changes: dict, message: str) -> None:
    config = replace(ModelConfig(), **changes)
    problems = config.problems()
    assert len(problems) == 1 and problems[0].startswith(message)
    with pytest.raises(ValueError, match=re.escape(message)):
        GPT(config, VOCAB)


def test_all_problems_are_reported_at_once() -> None:
    assert len(ModelConfig(n_layers=0, n_heads=0, context=-1).problems()) == 3
    assert len(ModelConfig(d_model=130, n_kv_heads=3, dropout=2.0).problems()) == 3
    assert ModelConfig().problems() == []
    assert ModelConfig("gpt2", n_heads=4, d_model=12).problems() == []  # odd heads: no rotary, no trouble


@pytest.mark.parametrize("face", ATTENTION_IMPLEMENTATIONS)
@pytest.mark.parametrize("preset", PRESETS)
def test_dropout_acts_in_training_only(preset: Preset, face: AttentionImplementation) -> None:
    plain, dropping = random_model(preset, face), random_model(preset, face, dropout=0.5)
    tokens = random_tokens(2, 8)
    with torch.no_grad():
        assert torch.equal(dropping(tokens), plain(tokens))
        dropping.train()
        torch.manual_seed(1)
        first, second = dropping(tokens), dropping(tokens)
        assert not torch.equal(first, second)
        torch.manual_seed(1)
        assert torch.equal(dropping(tokens), first)
        assert torch.equal(plain.train()(tokens), plain.eval()(tokens))


def test_dropout_stands_where_gpt2_has_it() -> None:
    """After the embeddings, and on what each attention and each MLP adds to the residual stream."""
    model = random_model("gpt2", dropout=0.5).train()
    shares: list[float] = []
    for dropout in modules_of(model, torch.nn.Dropout):
        dropout.register_forward_hook(lambda m, i, out: shares.append((out == 0).float().mean().item()))
    model(random_tokens(4, 24))
    assert len(shares) == 1 + 2 * model.config.n_layers
    assert all(share == pytest.approx(0.5, abs=0.05) for share in shares)


@pytest.mark.parametrize("face", ATTENTION_IMPLEMENTATIONS)
def test_attention_weights_are_dropped_in_training(face: AttentionImplementation) -> None:
    model = random_model("glass", face, dropout=0.5)
    attention = modules_of(model, CausalSelfAttention)[0]
    x = torch.randn(1, 6, 30, generator=torch.Generator().manual_seed(0))
    angles = functional.precompute_rope(torch.arange(6), 10, 1e4)
    assert torch.equal(attention(x, angles), attention(x, angles))
    attention.train()
    assert not torch.equal(attention(x, angles), attention(x, angles))


@pytest.mark.parametrize("preset", PRESETS)
def test_hooks_see_the_weights_that_were_used(preset: Preset) -> None:
    """The seen weights, applied to the values, give what the attention put out."""
    model = random_model(preset)
    calls: list[tuple] = []
    attentions = modules_of(model, CausalSelfAttention)
    for attention in attentions:
        attention.register_forward_hook(lambda module, inputs, out: calls.append((inputs[:2], out)))
    with torch.no_grad(), recorded(model) as seen:
        model(random_tokens(2, 12))
        assert len(seen) == len(calls) == model.config.n_layers
        for attention, weights, ((x, angles), out) in zip(attentions, seen, calls, strict=True):
            assert weights.shape == (2, model.config.n_heads, 12, 12)
            v = functional.repeat_kv(attention.project(x, angles)[2], model.config.n_heads)
            same(attention.out((weights @ v).transpose(1, 2).flatten(-2)), out, 1e-6)


@pytest.mark.parametrize("preset", PRESETS)
def test_a_hook_may_change_what_is_read(preset: Preset) -> None:
    """With the identity for weights each position reads itself alone: the others cease to matter."""
    model = random_model(preset)
    for weights in modules_of(model, AttentionPattern):
        weights.register_forward_hook(lambda module, inputs, out: torch.eye(*out.shape[-2:]).expand_as(out))
    tokens = random_tokens(1, 9)
    with torch.no_grad():
        edited = tokens.clone()
        edited[:, :8] = (edited[:, :8] + 1) % VOCAB
        assert torch.equal(model(edited)[:, 8], model(tokens)[:, 8])


def test_a_text_beyond_the_context_is_a_mistake_of_the_program() -> None:
    model = random_model("glass")
    with pytest.raises(AssertionError, match="17 positions in a context of 16"):
        model(random_tokens(1, 17))


@pytest.mark.parametrize("preset", PRESETS)
def test_rows_of_a_batch_do_not_meet(preset: Preset) -> None:
    model = random_model(preset)
    tokens = random_tokens(3, 10)
    with torch.no_grad():
        same(torch.cat([model(row[None]) for row in tokens]), model(tokens), 1e-5)
