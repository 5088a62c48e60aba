"""Checks of the model that several tests share; `test_mutants.py` runs them on code broken on purpose.

Each check builds its own model, so that it sees what a test has patched, and fails with an AssertionError.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model import functional, gpt
from model.config import AttentionImplementation, ModelConfig
from model.huggingface import from_huggingface, to_huggingface
from model.kv_cache import KVCache

VOCAB = 61
Preset = Literal["glass", "gpt2", "qwen3"]
PRESETS: tuple[Preset, ...] = ("glass", "gpt2", "qwen3")

# Small, and no two sizes alike, so that mixed-up axes do not fit by chance.
SHAPES = {
    "glass": ModelConfig("glass", n_layers=2, n_heads=3, d_model=30, context=16),
    "gpt2": ModelConfig("gpt2", n_layers=2, n_heads=4, d_model=48, context=24),
    "qwen3": ModelConfig("qwen3", n_layers=2, n_heads=6, n_kv_heads=2, d_model=48, d_head=10, context=24),
}


def random_model(preset: str, attention: AttentionImplementation = "eager", seed: int = 1, **changes: Any) -> gpt.GPT:
    """A model in eval mode whose every parameter is random, large enough for attention far from uniform."""
    model = gpt.GPT(replace(SHAPES[preset], attention=attention, **changes), VOCAB)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if name.endswith(("q_norm.weight", "k_norm.weight")):
                parameter.copy_(0.9 + 0.2 * noise)
            elif "norm" in name and name.endswith("weight"):
                parameter.copy_(1 + 0.3 * noise)
            elif name.endswith("bias"):
                parameter.copy_(0.2 * noise)
            elif "embedding" in name or name == "lm_head.weight":
                parameter.copy_(0.1 * noise)
            else:
                parameter.copy_(1.1 * noise / math.sqrt(parameter.shape[1]))
    return model.eval()


def random_tokens(batch: int, length: int, seed: int = 2) -> Tensor:
    return torch.randint(VOCAB, (batch, length), generator=torch.Generator().manual_seed(seed))


def normal(*shape: int, seed: int = 3, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def transformers_model(model: gpt.GPT) -> Any:
    """The transformers model with the same weights and eager attention, in eval mode."""
    from transformers import AutoModelForCausalLM, GPT2Config, Qwen3Config

    config, weights = to_huggingface(model)
    kind: Any = {"gpt2": GPT2Config, "qwen3": Qwen3Config}[config["model_type"]]
    theirs = AutoModelForCausalLM.from_config(kind.from_dict(config), attn_implementation="eager")
    missing, unexpected = theirs.load_state_dict(weights, strict=False)
    assert missing == ["lm_head.weight"] and not unexpected, (missing, unexpected)
    assert theirs.lm_head.weight.data_ptr() == theirs.get_input_embeddings().weight.data_ptr()
    return theirs.eval()


@contextmanager
def recorded_patterns(model: gpt.GPT) -> Iterator[list[Tensor]]:
    """The attention pattern (B, H, T, S) of each layer, as the model uses it."""
    patterns: list[Tensor] = []
    modules = modules_of(model, gpt.AttentionPattern)
    hooks = [module.register_forward_hook(lambda m, i, out: patterns.append(out)) for module in modules]
    yield patterns
    for hook in hooks:
        hook.remove()


def modules_of(model: nn.Module, kind: type) -> list[Any]:
    return [module for module in model.modules() if isinstance(module, kind)]


def relative_difference(ours: Tensor, theirs: Tensor) -> float:
    return ((ours - theirs).norm() / theirs.norm()).item()


def same(ours: Tensor, theirs: Tensor, atol: float) -> None:
    torch.testing.assert_close(ours, theirs, rtol=0, atol=atol)


# Parity with transformers.


def check_logits_match_reference(preset: str, attention: AttentionImplementation = "eager") -> None:
    model = random_model(preset, attention)
    tokens = random_tokens(3, model.config.context)
    with torch.no_grad():
        same(model(tokens), transformers_model(model)(tokens).logits, 1e-5)


def check_gradients_match_reference(preset: str, attention: AttentionImplementation = "eager") -> None:
    model = random_model(preset, attention)
    theirs = transformers_model(model)
    tokens = random_tokens(3, model.config.context + 1)
    for forward in (model, lambda x: theirs(x).logits):
        F.cross_entropy(forward(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten()).backward()
    gradients: dict[str, Any] = {name: p.grad for name, p in theirs.named_parameters()}
    _, _, expected = from_huggingface(to_huggingface(model)[0], gradients)
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None
        assert relative_difference(parameter.grad, expected[name]) <= 1e-5, name


def check_patterns_match_reference(preset: str) -> None:
    model = random_model(preset)
    tokens = random_tokens(3, model.config.context)
    with torch.no_grad(), recorded_patterns(model) as ours:
        model(tokens)
        theirs = transformers_model(model)(tokens, output_attentions=True).attentions
    assert len(ours) == len(theirs) == model.config.n_layers
    for a, b in zip(ours, theirs, strict=True):
        same(a, b, 1e-6)
        assert a[..., -1, :].amax(-1).mean() > 2.5 / model.config.context  # nearly uniform attention proves little


# The model by itself.


def check_causality(preset: str) -> None:
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


def check_cache(preset: str, attention: AttentionImplementation = "eager") -> None:
    """A text encoded in pieces with a KV cache has the logits of one forward pass."""
    model = random_model(preset, attention)
    context = model.config.context
    tokens = random_tokens(3, context)
    with torch.no_grad():
        full = model(tokens)
        for sizes in ([1] * context, [5, 1, 3, context - 9], [context]):
            cache = KVCache(model.config, 3, full)
            pieces = [model(piece, cache) for piece in tokens.split(sizes, dim=1)]
            same(torch.cat(pieces, dim=1), full, 1e-5)
            assert cache.length == context


def check_tied_embeddings(preset: str) -> None:
    model = random_model(preset)
    model.load_state_dict(model.state_dict())
    assert model.lm_head.weight is model.token_embedding.weight
    names = [name for name, _ in model.named_parameters()]
    assert "lm_head.weight" not in names and "token_embedding.weight" in names


# The operations, against the library's.


def check_same_function(
    ours: Callable[..., Tensor], theirs: Callable[..., Tensor], *inputs: Tensor | float | None
) -> None:
    """Two functions agree in value (1e-5), in the gradient of each tensor (1e-5 relative), and in bfloat16 (2e-2)."""
    results = []
    for function in (ours, theirs):
        leaves = [x.clone().requires_grad_() if isinstance(x, Tensor) else x for x in inputs]
        out = function(*leaves)
        out.backward(normal(*out.shape, seed=9))
        results.append((out.detach(), [x.grad for x in leaves if isinstance(x, Tensor)]))
    (value, gradients), (expected, expected_gradients) = results
    same(value, expected, 1e-5)
    for a, b in zip(gradients, expected_gradients, strict=True):
        assert a is not None and b is not None and relative_difference(a, b) <= 1e-5
    short = [x.bfloat16() if isinstance(x, Tensor) else x for x in inputs]
    assert ours(*short).dtype == theirs(*short).dtype == torch.bfloat16
    torch.testing.assert_close(ours(*short), theirs(*short), rtol=2e-2, atol=2e-2)


def check_eager_attention() -> None:
    """Eager attention against sdpa, for full texts and for more keys than queries."""
    for T, S in ((7, 7), (1, 7), (3, 7)):
        q, k, v = normal(2, 3, T, 8), normal(2, 3, S, 8, seed=4), normal(2, 3, S, 8, seed=5)
        check_same_function(lambda q, k, v: functional.attention_pattern(q, k) @ v, functional.sdpa, q, k, v)


def check_equal_keys() -> None:
    """With equal keys query i attends to each of its i + 1 keys by 1 / (i + 1)."""
    for T, S in ((9, 9), (1, 9), (4, 9)):
        pattern = functional.attention_pattern(normal(1, 2, T, 6), normal(1, 2, 1, 6, seed=4).expand(1, 2, S, 6))
        position = torch.arange(S - T, S)
        expected = (torch.arange(S) <= position[:, None]) / (position[:, None] + 1.0)
        same(pattern, expected.expand(1, 2, T, S), 1e-6)
        assert (pattern[..., expected == 0] == 0).all()


def check_layer_norm() -> None:
    """At scales where the place of eps matters."""
    for scale in (1.0, 1e-3):
        x, weight = 0.5 * scale + scale * normal(4, 5, 16), 1 + normal(16, seed=4)
        for bias in (normal(16, seed=5), None):
            same(functional.layer_norm(x, weight, bias, 1e-5), F.layer_norm(x, (16,), weight, bias, 1e-5), 1e-5)


def check_rms_norm() -> None:
    for scale in (1.0, 1e-3):
        x, weight = scale * (0.5 + normal(4, 5, 16)), 1 + normal(16, seed=4)
        same(functional.rms_norm(x, weight, 1e-6), F.rms_norm(x, (16,), weight, 1e-6), 1e-5)


def check_activations() -> None:
    x = torch.linspace(-8, 8, 400)
    same(functional.gelu(x), F.gelu(x, approximate="tanh"), 1e-6)
    same(functional.relu2(x), F.relu(x) ** 2, 0)
    same(functional.silu(x), F.silu(x), 1e-6)


def check_rope_depends_on_distance() -> None:
    """Rotated queries and keys score each other by distance alone, and keep their norms."""
    q, k = normal(1, 1, 1, 8).expand(1, 1, 40, 8), normal(1, 1, 1, 8, seed=4).expand(1, 1, 40, 8)
    cos, sin = functional.precompute_rope(torch.arange(40), 8, 100.0)
    rotated_q, rotated_k = functional.apply_rope(q, cos, sin), functional.apply_rope(k, cos, sin)
    scores = (rotated_q @ rotated_k.transpose(-2, -1))[0, 0]
    for distance in range(-39, 40):
        diagonal = scores.diagonal(distance)
        same(diagonal, diagonal[:1].expand_as(diagonal), 1e-4)
    assert scores[0].std() > 0.1
    same(rotated_q.norm(dim=-1), q.norm(dim=-1), 1e-5)
