"""The model: configuration, initialization, dropout, hooks, and agreement of the attention implementations."""

import math
import re
import shutil
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.func import functional_call

from model import functional
from model.config import ATTENTION_IMPLEMENTATIONS, ModelConfig
from model.gpt import GPT, CausalSelfAttention, Dropout
from model.kv_cache import KVCache
from tests.model import helpers
from tests.model.helpers import PRESETS, SHAPES, VOCAB, random_model, random_tokens, relative_difference, same
from tests.runs import python
from training.device import DistContext, compile_model

each_preset = pytest.mark.parametrize("preset", PRESETS)
each_shape = pytest.mark.parametrize("preset", SHAPES)
each_pair = pytest.mark.parametrize(
    ("preset", "attention"),
    [("gpt2", "eager"), ("glass", "sdpa"), ("qwen3", "chunked"), ("qwen3", "eager"), ("attention only", "sdpa")],
)


# Configuration.


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"n_heads": -3}, "model.n_heads is -3; it must be at least 1"),
        ({"d_mlp": -1}, "model.d_mlp is -1; it must be at least 0"),
        ({"d_model": 130}, "model.d_model is 130, which is not divisible by 4 heads; use 132"),
        ({"n_kv_heads": 3}, "model.n_heads is 4, which is not divisible by 3 key/value heads"),
        ({"d_head": 7}, "the head size is 7; rotary positions need an even one"),
        ({"dropout": math.nan}, "model.dropout is nan;"),
        ({"norm_eps": math.nan}, "model.norm_eps is nan;"),
        ({"rope_theta": -1.0}, "model.rope_theta is -1.0;"),
        (
            {"positions": "none", "rope_theta": 1e4},
            "model.rope_theta is 10000.0, but the model has no rotary positions",
        ),
        ({"mlp": "none", "d_mlp": 64}, "model.d_mlp is 64, but model.mlp is none"),
    ],
)
def test_invalid_config_is_reported(changes: dict[str, Any], message: str) -> None:
    (problem,) = ModelConfig(**changes).problems()
    assert problem.startswith(message)
    assert len(ModelConfig(n_layers=0, n_heads=0, context=-1).problems()) == 3  # all are reported at once
    with pytest.raises(ValueError, match=re.escape(message)):
        GPT(ModelConfig(**changes), VOCAB)


def test_zero_sizes_are_resolved() -> None:
    config = ModelConfig(n_heads=8, d_model=64)
    assert (config.n_kv_heads, config.d_head, config.d_mlp) == (8, 8, 256)
    assert replace(config, n_layers=9) == ModelConfig(n_layers=9, n_heads=8, d_model=64)
    assert replace(config, n_heads=4, n_kv_heads=0, d_head=0) == ModelConfig(n_heads=4, d_model=64)


@pytest.mark.parametrize(
    ("sizes", "vocab_size", "n_parameters"),
    [
        (("gpt2", 12, 12, 12, 768, 64, 3072, 1024), 50_257, 124_439_808),
        (("qwen3", 28, 16, 8, 1024, 128, 3072), 151_936, 596_049_920),
        (("llama", 16, 32, 8, 2048, 64, 8192), 128_256, 1_235_814_400),  # Llama 3.2 1B
    ],
)
def test_published_parameter_counts(sizes: Any, vocab_size: int, n_parameters: int) -> None:
    with torch.device("meta"):
        model = GPT(ModelConfig(*sizes), vocab_size)
    assert sum(p.numel() for p in model.parameters()) == n_parameters


@each_preset
def test_initial_weights_have_documented_distribution(preset: Any) -> None:
    model = GPT(ModelConfig(preset, n_layers=8, n_heads=4, d_model=96, context=64), 500)
    for name, parameter in model.named_parameters():
        if parameter.dim() == 1:
            norm_weight = 0.25 if preset == "glass" and name == "final_norm.weight" else 1
            assert (parameter == (0 if name.endswith("bias") else norm_weight)).all(), name
            continue
        std = 0.2 if preset == "glass" and name == "token_embedding.weight" else 0.02
        if name.endswith(("attention.out.weight", "mlp.down.weight")):
            std = 0.0 if preset == "glass" else 0.02 / math.sqrt(2 * 8)
        assert parameter.std().item() == pytest.approx(std, rel=0.05), name
        assert abs(parameter.mean().item()) <= 5 * std / math.sqrt(parameter.numel()), name


@each_shape
def test_initialization_depends_on_seed_only(preset: str) -> None:
    torch.manual_seed(11)
    first, again, other = (GPT(SHAPES[preset], VOCAB, seed=seed).state_dict() for seed in (3, 3, 4))
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["token_embedding.weight"], other["token_embedding.weight"])


@each_preset
def test_lm_head_is_tied(preset: str) -> None:
    model = random_model(preset)
    model.load_state_dict(model.state_dict())
    assert model.lm_head.weight is model.token_embedding.weight
    assert "lm_head.weight" not in dict(model.named_parameters())


def test_parameters_of_untied_and_attention_only_models() -> None:
    model = random_model("gpt2 untied")
    assert not torch.equal(model.lm_head.weight, model.token_embedding.weight)
    names = {name.split(".")[-2] for name, _ in random_model("attention only").named_parameters()}
    assert names == {"token_embedding", "qkv", "out"}


def test_ngram_embedding_depends_on_the_last_tokens_only() -> None:
    embedding, tokens = random_model("n-grams").ngram_embedding, random_tokens(1, 9)
    untrained = GPT(SHAPES["n-grams"], VOCAB).ngram_embedding
    assert embedding is not None and untrained is not None
    assert not any(parameter.any() for parameter in untrained.parameters())
    changed = tokens.clone()
    changed[0, 2] += 1
    is_changed = (embedding(tokens) != embedding(changed)).any(dim=-1)[0]
    assert is_changed.tolist() == [False] * 2 + [True] * 4 + [False] * 3
    again = torch.cat([tokens, tokens], dim=1)
    assert torch.equal(embedding(again)[:, 9 + 3 :], embedding(tokens)[:, 3:])


def test_attention_without_positions_and_mlp_sees_a_bag_of_tokens() -> None:
    """The order of earlier tokens does not matter to one layer; without its output, the logits are WE WU (Elhage et al.
    2021, "Zero-Layer Transformers")."""
    model, tokens = random_model("attention only", n_layers=1), random_tokens(1, 9)
    reordered = tokens[:, [3, 1, 7, 0, 2, 6, 5, 4, 8]]
    with torch.no_grad():
        same(model(tokens)[:, -1], model(reordered)[:, -1], 1e-5)
        model.blocks[0].attention.out.weight.zero_()  # type: ignore[union-attr, operator]
        embedding = model.token_embedding.weight
        same(model(tokens)[0], (embedding @ embedding.T)[tokens[0]], 1e-6)


# Behaviour.


@each_shape
def test_no_position_sees_the_future(preset: str) -> None:
    """Changing the token at position t changes the logits at t, and no bit of the logits before t."""
    model = random_model(preset)
    tokens = random_tokens(2, model.config.context)
    with torch.no_grad():
        before = model(tokens)
        for t in range(model.config.context):
            edited = tokens.clone()
            edited[:, t] = (edited[:, t] + 1) % VOCAB
            after = model(edited)
            assert torch.equal(after[:, :t], before[:, :t]), f"position {t} is visible earlier"
            assert not torch.equal(after[:, t], before[:, t]), f"position {t} does not see itself"


def test_text_longer_than_context_is_an_error() -> None:
    with pytest.raises(AssertionError, match="17 positions in a context of 16"):
        random_model("glass")(random_tokens(1, 17))


@each_pair
def test_dropout_is_active_in_training_only(preset: str, attention: Any) -> None:
    plain, dropping = random_model(preset, attention), random_model(preset, attention, dropout=0.5)
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


def test_dropout_drops_features_of_whole_sequences() -> None:
    """On the outputs of each attention and each MLP. What is kept is scaled, so that the mean stays."""
    model = random_model("gpt2", dropout=0.5).train()
    calls: list[tuple[Tensor, Tensor]] = []
    for dropout in helpers.modules_of(model, Dropout):
        dropout.register_forward_hook(lambda m, inputs, out: calls.append((inputs[0], out)))
    model(random_tokens(64, 8))
    assert len(calls) == 2 * model.config.n_layers
    for x, out in calls:
        is_kept = (out != 0).all(dim=1, keepdim=True)
        assert torch.equal(out, 2 * x * is_kept)
        assert abs(is_kept.float().mean() - 0.5) < 0.05 and (is_kept[0] != is_kept[1]).any()


@each_shape
def test_hooks_see_the_pattern_that_is_used(preset: str) -> None:
    """The hooked pattern times the values is the output of attention."""
    model = random_model(preset)
    calls: list[tuple[Any, Any]] = []
    modules = helpers.modules_of(model, CausalSelfAttention)
    for module in modules:
        module.register_forward_hook(lambda module, inputs, out: calls.append((inputs[:2], out)))
    patterns = helpers.record_patterns(model)
    with torch.no_grad():
        model(random_tokens(2, 12))
        for module, pattern, ((x, rope), out) in zip(modules, patterns, calls, strict=True):
            assert pattern.shape == (2, model.config.n_heads, 12, 12)
            v = functional.repeat_kv(module.project(x, rope)[2], model.config.n_heads)
            same(module.out((pattern @ v).transpose(1, 2).flatten(-2)), out, 1e-6)


@each_pair
def test_kv_cache_matches_full_forward(preset: str, attention: Any) -> None:
    """A text encoded in pieces with a KV cache has the logits of one forward pass."""
    model = random_model(preset, attention)
    context = model.config.context
    tokens = random_tokens(3, context)
    with torch.no_grad():
        full = model(tokens)
        for sizes in ([1] * context, [5, 1, 3, context - 9], [context]):
            cache = KVCache(model.config, 3, full)
            same(torch.cat([model(piece, cache) for piece in tokens.split(sizes, dim=1)], dim=1), full, 1e-5)
            assert cache.length == context


# Gradients, and eager = sdpa = chunked = compiled.


@each_preset
def test_gradcheck_of_whole_model(preset: Any) -> None:
    """Every parameter of a tiny model in double precision, against finite differences."""
    shape: dict[str, Any] = {"n_kv_heads": 1 if preset == "qwen3" else 2, "d_model": 4, "d_mlp": 6, "context": 3}
    model = GPT(ModelConfig(preset, n_layers=1, n_heads=2, attention="eager", **shape), 5).double()
    names = [name for name, _ in model.named_parameters()]
    generator = torch.Generator().manual_seed(7)
    values = [torch.randn(p.shape, generator=generator, dtype=torch.double) for p in model.parameters()]
    tokens = torch.tensor([[1, 4, 2], [3, 0, 3]])

    def losses(*parameters: Tensor) -> Tensor:
        state = dict(zip(names, parameters, strict=True))
        state["lm_head.weight"] = state["token_embedding.weight"]
        logits = functional_call(model, state, (tokens,))
        return F.cross_entropy(logits.flatten(0, 1), tokens.roll(-1).flatten(), reduction="none")

    assert torch.autograd.gradcheck(losses, [v.requires_grad_() for v in values], atol=1e-6, rtol=1e-4)


def logits_and_backward(model: Any, tokens: Tensor) -> Tensor:
    """The logits; the gradient of the mean loss is left in the parameters."""
    logits = model(tokens[:, :-1])
    F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten()).backward()
    return logits.detach()


def assert_same_gradients(model: GPT, other: GPT) -> None:
    for (name, a), b in zip(model.named_parameters(), other.parameters(), strict=True):
        assert a.grad is not None and b.grad is not None
        assert relative_difference(a.grad, b.grad) <= 1e-5, name


@each_shape
def test_implementations_agree(preset: str) -> None:
    """In fp32 with gradients; in bf16, under autocast and with bf16 weights, relative to the norm: single logits are off
    by up to 9e-2 there."""
    models = [random_model(preset, attention) for attention in ATTENTION_IMPLEMENTATIONS]
    tokens = random_tokens(3, SHAPES[preset].context + 1)
    logits = [logits_and_backward(model, tokens) for model in models]
    for model, other in zip(models[1:], logits[1:], strict=True):
        same(other, logits[0], 1e-5)
        assert_same_gradients(model, models[0])
    with torch.no_grad():
        with torch.autocast("cpu", torch.bfloat16):
            mixed = [model(tokens[:, :-1]) for model in models]
        short = [model.bfloat16()(tokens[:, :-1]) for model in models]
    assert {each.dtype for each in short} == {torch.bfloat16} and not torch.equal(mixed[0].float(), logits[0])
    for eager, *others in (mixed, short):
        assert all(relative_difference(eager.float(), other.float()) <= 2e-2 for other in others)


@pytest.mark.slow
@pytest.mark.skipif(not any(map(shutil.which, ("g++", "clang++", "c++"))), reason="torch.compile needs a C++ compiler")
@pytest.mark.parametrize("pair", ["'glass', 'eager'", "'gpt2', 'sdpa'", "'qwen3', 'chunked'", ""])
def test_compiled_model(pair: str) -> None:
    """In its own process, without the shape checks of the tests, which would break the graph."""
    check = f"check_compiled({pair})" if pair else "check_compiled_gradients_are_deterministic()"
    program = f"from tests.model import test_gpt; test_gpt.{check}"
    done = python(program)
    assert done.returncode == 0, done.stderr


def check_compiled(preset: str, attention: Any) -> None:
    plain, model = (random_model(preset, attention, n_layers=1) for _ in range(2))
    compiled = torch.compile(model)
    for seed in (1, 2, 3):
        for each in (plain, model):
            each.load_state_dict(random_model(preset, attention, seed, n_layers=1).state_dict())
            each.zero_grad()
        tokens = random_tokens(3, plain.config.context + 1, seed)
        same(logits_and_backward(compiled, tokens), logits_and_backward(plain, tokens), 1e-5)
        assert_same_gradients(model, plain)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1, "not compiled, or in several graphs"


def check_compiled_gradients_are_deterministic() -> None:
    """The same bits each time, on two threads, with few tokens that occur often."""
    torch.set_num_threads(2)
    model, tokens = random_model("glass", n_layers=1, context=128), random_tokens(16, 129)
    compiled, is_compiled = compile_model(model, tokens[:, :-1], DistContext(torch.device("cpu"), torch.float32))
    assert is_compiled
    gradients = []
    for _ in range(8):
        model.zero_grad()
        logits_and_backward(compiled, tokens)
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]))
    assert all(torch.equal(gradients[0], other) for other in gradients)
