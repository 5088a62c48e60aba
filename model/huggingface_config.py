"""The `config.json` of the Hugging Face layouts, to and from `ModelConfig`.

`model/huggingface.py` stands above it and brings the weights. A file may ask for something that no preset
computes (another activation, a sliding window, scaled rotary positions); it is refused by name, since a model
that loads without a word and then computes something else helps nobody.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

import torch

from common.errors import CHECKPOINT, UserError
from model.config import PRESETS, ModelConfig

# Their names for our sizes.
SIZES = {
    "gpt2": {
        "n_layers": "n_layer",
        "n_heads": "n_head",
        "d_model": "n_embd",
        "d_mlp": "n_inner",
        "context": "n_positions",
    },
    "qwen3": {
        "n_layers": "num_hidden_layers",
        "n_heads": "num_attention_heads",
        "n_kv_heads": "num_key_value_heads",
        "d_model": "hidden_size",
        "d_head": "head_dim",
        "d_mlp": "intermediate_size",
        "context": "max_position_embeddings",
    },
}
MAY_BE_NULL = ("n_inner", "num_key_value_heads")  # null there means what 0 means here

# Settings that change what is computed: what a file without the entry means; what the preset computes.
FIXED: dict[str, dict[str, tuple[Any, tuple[Any, ...]]]] = {
    "gpt2": {
        "activation_function": ("gelu_new", ("gelu_new", "gelu_pytorch_tanh")),
        "layer_norm_epsilon": (1e-5, (PRESETS["gpt2"].norm_eps,)),
        "scale_attn_weights": (True, (True,)),
        "scale_attn_by_inverse_layer_idx": (False, (False,)),
        "add_cross_attention": (False, (False,)),
        "tie_word_embeddings": (True, (True,)),
        "quantization_config": (None, (None,)),
    },
    "qwen3": {
        "hidden_act": ("silu", ("silu", "swish")),
        "rms_norm_eps": (1e-6, (PRESETS["qwen3"].norm_eps,)),
        "attention_bias": (False, (False,)),
        "use_sliding_window": (False, (False,)),
        "tie_word_embeddings": (False, (True,)),
        "quantization_config": (None, (None,)),
    },
}


def describe(config: ModelConfig, vocab_size: int, dtype: torch.dtype) -> dict[str, Any]:
    """The content of `config.json`. Nothing is left to a default: those have changed between versions."""
    preset = config.preset
    ours = {
        "n_layers": config.n_layers,
        "n_heads": config.n_heads,
        "n_kv_heads": config.n_kv_heads,
        "d_model": config.d_model,
        "d_head": config.d_head,
        "d_mlp": config.d_mlp,
        "context": config.context,
    }
    common: dict[str, Any] = {
        "model_type": preset,
        "architectures": ["GPT2LMHeadModel" if preset == "gpt2" else "Qwen3ForCausalLM"],
        "vocab_size": vocab_size,
        "dtype": str(dtype).removeprefix("torch."),
        "initializer_range": 0.02,
        "bos_token_id": None,  # which token ends a text is the tokenizer's affair
        "eos_token_id": None,
        **{theirs: ours[name] for name, theirs in SIZES[preset].items()},
        **{name: accepted[0] for name, (_, accepted) in FIXED[preset].items() if accepted[0] is not None},
    }
    if preset == "gpt2":
        return common | dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)
    theta = config.architecture.rope_theta
    return common | {
        "rope_theta": theta,  # where transformers 4 looks for it
        "rope_parameters": {"rope_type": "default", "rope_theta": theta},  # and transformers 5
        "attention_dropout": 0.0,
        "sliding_window": None,
    }


def refusal(found: list[str]) -> UserError:
    """One error for all that was found; a long list is cut: its beginning says what kind of file it is."""
    more = f"; and {len(found) - 6} more" if len(found) > 6 else ""
    return UserError("cannot load this Hugging Face model: " + "; ".join(found[:6]) + more, CHECKPOINT)


def read_config(config: Mapping[str, Any]) -> tuple[ModelConfig, int]:
    """Our configuration and the vocabulary size from the content of `config.json`.

    Raises:
        UserError: naming every setting that no preset can represent.
    """
    preset = config.get("model_type")
    if not isinstance(preset, str) or preset not in SIZES:
        raise refusal([f"model_type is {preset!r}; only {' and '.join(SIZES)} can be represented"])
    found = [
        f"{name} is {config.get(name, default)!r}; it must be {' or '.join(map(repr, accepted))}"
        for name, (default, accepted) in FIXED[preset].items()
        if config.get(name, default) not in accepted
    ]
    if preset == "qwen3":
        found += rope_problems(config)
    sizes: dict[str, Any] = {}
    for ours, theirs in {**SIZES[preset], "vocab_size": "vocab_size"}.items():
        value = config.get(theirs)
        if value is None and theirs in MAY_BE_NULL:
            value = 0
        elif type(value) is not int or value < 1:
            found.append(f"{theirs} is {value!r}; it must be a whole number above 0")
        sizes[ours] = value
    if found:
        raise refusal(found)
    vocab_size = sizes.pop("vocab_size")
    shape = ModelConfig(**sizes, preset=cast(Any, preset))
    if problems := shape.problems():
        raise refusal(problems)
    return shape, vocab_size


def rope_problems(config: Mapping[str, Any]) -> list[str]:
    """Where Qwen3's settings leave the preset's plain rotary positions, or attention to all positions."""
    found = []
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    if not isinstance(rope, Mapping) or rope.get("rope_type", rope.get("type", "default")) != "default":
        found.append(f"the rope scaling is {rope!r}; only plain rotary positions can be represented")
    elif rope.get("partial_rotary_factor", config.get("partial_rotary_factor", 1)) != 1:
        found.append("the rotary positions turn a part of each head only; they must turn all of it")
    elif unknown := sorted(set(rope) - {"rope_type", "type", "rope_theta", "partial_rotary_factor"}):
        found.append(f"the rope parameters {', '.join(unknown)} cannot be represented")
    else:
        theta = rope.get("rope_theta", config.get("rope_theta", 10_000.0))
        if theta != PRESETS["qwen3"].rope_theta:
            found.append(f"rope_theta is {theta!r}; it must be {PRESETS['qwen3'].rope_theta!r}")
    kinds = config.get("layer_types")
    if kinds is not None and (not isinstance(kinds, list) or any(kind != "full_attention" for kind in kinds)):
        found.append("layer_types holds more than 'full_attention'")
    return found
