"""Small models with random weights, the same models of transformers, and comparisons, for several tests."""

import math
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from model import gpt
from model.config import ModelConfig
from model.huggingface import to_huggingface

VOCAB = 61
PRESETS = ("glass", "gpt2", "qwen3")

# Small, and no two sizes alike, so that mixed-up axes do not fit by chance.
SHAPES = {
    "glass": ModelConfig("glass", n_layers=2, n_heads=3, d_model=30, context=16),
    "gpt2": ModelConfig("gpt2", n_layers=2, n_heads=4, d_model=48, context=24),
    "qwen3": ModelConfig("qwen3", n_layers=2, n_heads=6, n_kv_heads=2, d_model=48, d_head=10, context=24),
    "llama": ModelConfig("llama", n_layers=2, n_heads=4, n_kv_heads=2, d_model=40, context=24, rope_theta=500.0),
    "gpt2 untied": ModelConfig("gpt2", 2, n_heads=4, d_model=48, context=24, tie_embeddings=False, norm_eps=1e-3),
    "qwen3 untied": ModelConfig(
        "qwen3", 2, n_heads=4, d_model=40, context=24, tie_embeddings=False, norm_eps=1e-3, rope_theta=7000.0
    ),
    "llama untied": ModelConfig("llama", 2, n_heads=2, d_model=36, context=24, tie_embeddings=False, norm_eps=1e-3),
    "attention only": ModelConfig(
        "glass", 2, n_heads=3, d_model=30, context=16, mlp="none", norm="none", positions="none"
    ),
    "gpt2 rms rotary": ModelConfig("gpt2", 2, n_heads=3, d_model=36, context=16, norm="rms", positions="rotary"),
    "n-grams": ModelConfig("glass", 2, n_heads=3, d_model=30, context=16, ngrams=4, ngram_rows=97),
}


def random_model(
    preset: str, attention: Any = "eager", seed: int = 1, vocab_size: int = VOCAB, **changes: Any
) -> gpt.GPT:
    """A model in eval mode whose every parameter is random, large enough for attention far from uniform."""
    model = gpt.GPT(replace(SHAPES[preset], attention=attention, **changes), vocab_size)
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
    from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig, Qwen3Config

    config, weights = to_huggingface(model)
    kind: Any = {"gpt2": GPT2Config, "qwen3": Qwen3Config, "llama": LlamaConfig}[config["model_type"]]
    theirs = AutoModelForCausalLM.from_config(kind.from_dict(config), attn_implementation="eager")
    missing, unexpected = theirs.load_state_dict(weights, strict=False)
    assert missing == ["lm_head.weight"] * model.config.tie_embeddings and not unexpected, (missing, unexpected)
    return theirs.eval()


def record_patterns(model: gpt.GPT) -> list[Tensor]:
    """A list that gets the attention pattern (B, H, T, S) of each layer whenever the model is called."""
    patterns: list[Tensor] = []
    for module in modules_of(model, gpt.AttentionPattern):
        module.register_forward_hook(lambda m, i, out: patterns.append(out))
    return patterns


def modules_of(model: nn.Module, kind: type) -> list[Any]:
    return [module for module in model.modules() if isinstance(module, kind)]


def relative_difference(ours: Tensor, theirs: Tensor) -> float:
    return ((ours - theirs).norm() / theirs.norm()).item()


def same(ours: Tensor, theirs: Tensor, atol: float) -> None:
    torch.testing.assert_close(ours, theirs, rtol=0, atol=atol)
