"""Hugging Face checkpoints to and from `GPT`.

A folder holds `config.json` and `model.safetensors`, as transformers, vLLM and llama.cpp read them. The presets `gpt2`
and `qwen3` are exactly `GPT2LMHeadModel` and `Qwen3ForCausalLM`; `glass` has no counterpart. A configuration that no
preset computes exactly (another activation, sliding windows, scaled RoPE) is rejected by name. Dropout is not carried
over in either direction.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor

from common.errors import CHECKPOINT, UserError
from common.files import write_atomic
from model.config import PRESETS, AttentionImplementation, ModelConfig
from model.gpt import GPT

CONFIG_FILE, WEIGHTS_FILE = "config.json", "model.safetensors"
LM_HEAD = "lm_head.weight"


@dataclass(frozen=True)
class Layout:
    """How Hugging Face names a preset's sizes, settings and tensors."""

    architecture: str
    prefix: str
    """Of all tensor names; some files omit it."""
    blocks: str
    sizes: dict[str, str]
    """Our size -> theirs."""
    fixed: dict[str, tuple[Any, ...]]
    """Settings that change what is computed -> the values that the preset computes, the first by default."""
    outside: dict[str, str]
    """Our tensor outside the blocks -> theirs."""
    block: dict[str, tuple[str, ...]]
    """Our tensor of a block -> theirs; of several names, each takes a part of our rows."""
    ignored: tuple[str, ...]
    """Constants of a block that old files contain."""


LAYOUTS = {
    "gpt2": Layout(
        architecture="GPT2LMHeadModel",
        prefix="transformer.",
        blocks="transformer.h",
        sizes=dict(n_layers="n_layer", n_heads="n_head", d_model="n_embd", d_mlp="n_inner", context="n_positions"),
        fixed={
            "activation_function": ("gelu_new", "gelu_pytorch_tanh"),
            "layer_norm_epsilon": (PRESETS["gpt2"].norm_eps,),
            "scale_attn_weights": (True,),
            "scale_attn_by_inverse_layer_idx": (False,),
            "add_cross_attention": (False,),
            "tie_word_embeddings": (True,),
            "quantization_config": (None,),
        },
        outside={
            "token_embedding.weight": "transformer.wte.weight",
            "position_embedding.weight": "transformer.wpe.weight",
            "final_norm.weight": "transformer.ln_f.weight",
            "final_norm.bias": "transformer.ln_f.bias",
        },
        block={
            f"{ours}.{kind}": (f"{theirs}.{kind}",)
            for ours, theirs in {
                "norm1": "ln_1",
                "attention.qkv": "attn.c_attn",
                "attention.out": "attn.c_proj",
                "norm2": "ln_2",
                "mlp.up": "mlp.c_fc",
                "mlp.down": "mlp.c_proj",
            }.items()
            for kind in ("weight", "bias")
        },
        ignored=("attn.bias", "attn.masked_bias"),
    ),
    "qwen3": Layout(
        architecture="Qwen3ForCausalLM",
        prefix="model.",
        blocks="model.layers",
        sizes={
            "n_layers": "num_hidden_layers",
            "n_heads": "num_attention_heads",
            "n_kv_heads": "num_key_value_heads",
            "d_model": "hidden_size",
            "d_head": "head_dim",
            "d_mlp": "intermediate_size",
            "context": "max_position_embeddings",
        },
        fixed={
            "hidden_act": ("silu", "swish"),
            "rms_norm_eps": (PRESETS["qwen3"].norm_eps,),
            "attention_bias": (False,),
            "use_sliding_window": (False,),
            "partial_rotary_factor": (None, 1),
            "tie_word_embeddings": (True,),
            "quantization_config": (None,),
        },
        outside={"token_embedding.weight": "model.embed_tokens.weight", "final_norm.weight": "model.norm.weight"},
        block={
            "norm1.weight": ("input_layernorm.weight",),
            "attention.qkv.weight": tuple(f"self_attn.{part}_proj.weight" for part in "qkv"),
            "attention.q_norm.weight": ("self_attn.q_norm.weight",),
            "attention.k_norm.weight": ("self_attn.k_norm.weight",),
            "attention.out.weight": ("self_attn.o_proj.weight",),
            "norm2.weight": ("post_attention_layernorm.weight",),
            "mlp.up.weight": ("mlp.gate_proj.weight", "mlp.up_proj.weight"),
            "mlp.down.weight": ("mlp.down_proj.weight",),
        },
        ignored=("self_attn.rotary_emb.inv_freq",),
    ),
}


def tensor_map(config: ModelConfig) -> Iterator[tuple[str, tuple[str, ...], tuple[int, ...], bool]]:
    """For each of our tensors except the LM head: its name, their names, the rows of each, and whether it is transposed.

    GPT-2 stores projections as (in, out), torch as (out, in).
    """
    layout = LAYOUTS[config.preset]
    q, kv = config.n_heads * config.d_head, config.n_kv_heads * config.d_head
    rows = {"attention.qkv.weight": (q, kv, kv), "mlp.up.weight": (config.d_mlp, config.d_mlp)}
    for ours, theirs in layout.outside.items():
        yield ours, (theirs,), (), False
    for layer in range(config.n_layers):
        for ours, names in layout.block.items():
            full_names = tuple(f"{layout.blocks}.{layer}.{name}" for name in names)
            transposed = config.preset == "gpt2" and ours.endswith("weight") and "norm" not in ours
            yield f"blocks.{layer}.{ours}", full_names, rows[ours] if len(names) > 1 else (), transposed


def parts_of(tensor: Tensor, rows: tuple[int, ...], transposed: bool) -> tuple[Tensor, ...]:
    """Our tensor as their tensors."""
    return tensor.split(rows) if rows else (tensor.t() if transposed else tensor,)


def to_huggingface(model: GPT) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The content of `config.json`, and copies of the weights under Hugging Face's names.

    Raises:
        UserError: if Hugging Face has no model that computes the same.
    """
    config = model.config
    if config.preset not in LAYOUTS:
        raise UserError(f"preset {config.preset} has no Hugging Face equivalent; train with model.preset gpt2 or qwen3")
    standard = config.n_kv_heads == config.n_heads and config.n_heads * config.d_head == config.d_model
    if config.preset == "gpt2" and not standard:
        raise UserError(
            "GPT-2 has no grouped key/value heads and no head size other than d_model / n_heads; "
            "train with model.preset qwen3, or leave model.n_kv_heads and model.d_head at 0"
        )
    state, weights = model.state_dict(), {}
    for ours, theirs, rows, transposed in tensor_map(config):
        for name, part in zip(theirs, parts_of(state[ours].detach(), rows, transposed), strict=True):
            weights[name] = part.clone(memory_format=torch.contiguous_format)
    return config_to_huggingface(config, model.vocab_size, model.token_embedding.weight.dtype), weights


def config_to_huggingface(config: ModelConfig, vocab_size: int, dtype: torch.dtype) -> dict[str, Any]:
    """The content of `config.json`, with every value explicit, since defaults differ between versions."""
    layout = LAYOUTS[config.preset]
    content: dict[str, Any] = {
        "model_type": config.preset,
        "architectures": [layout.architecture],
        "vocab_size": vocab_size,
        "dtype": str(dtype).removeprefix("torch."),
        "initializer_range": 0.02,
        "bos_token_id": None,
        "eos_token_id": None,
        **{theirs: getattr(config, ours) for ours, theirs in layout.sizes.items()},
        **{name: allowed[0] for name, allowed in layout.fixed.items() if allowed[0] is not None},
    }
    if config.preset == "gpt2":
        return content | dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)
    theta = config.architecture.rope_theta
    return content | {
        "rope_theta": theta,  # read by transformers 4
        "rope_parameters": {"rope_type": "default", "rope_theta": theta},  # read by transformers 5
        "attention_dropout": 0.0,
        "sliding_window": None,
    }


def from_huggingface(
    config: Mapping[str, Any], weights: Mapping[str, Tensor]
) -> tuple[ModelConfig, int, dict[str, Tensor]]:
    """Model config, vocabulary size, and a `state_dict` for `GPT` in the dtype of `weights`.

    Raises:
        UserError: if no preset computes what the configuration says, or a tensor is missing, misshapen or unknown.
    """
    shape, vocab_size = config_from_huggingface(config)
    layout = LAYOUTS[shape.preset]
    if not any(name.startswith(layout.prefix) for name in weights):
        weights = {name if name == LM_HEAD else layout.prefix + name: tensor for name, tensor in weights.items()}
    with torch.device("meta"):
        expected = GPT(shape, vocab_size).state_dict()
    known = {LM_HEAD, *(f"{layout.blocks}.{i}.{name}" for i in range(shape.n_layers) for name in layout.ignored)}
    state: dict[str, Tensor] = {}
    problems: list[str] = []
    for ours, theirs, rows, transposed in tensor_map(shape):
        known.update(theirs)
        for name, part in zip(theirs, parts_of(expected[ours], rows, transposed), strict=True):
            if (tensor := weights.get(name)) is None:
                problems.append(f"{name} is missing")
            elif tensor.shape != part.shape:
                problems.append(f"{name} has shape {tuple(tensor.shape)}, but config.json implies {tuple(part.shape)}")
            elif not tensor.is_floating_point():
                problems.append(f"{name} is {tensor.dtype}; quantized weights are not supported")
        if not problems:
            joined = torch.cat([weights[name] for name in theirs])
            state[ours] = joined.t().contiguous() if transposed else joined
    problems += [f"{name} is unknown" for name in sorted(set(weights) - known)]
    if not problems and LM_HEAD in weights and not torch.equal(weights[LM_HEAD], state["token_embedding.weight"]):
        problems.append(f"{LM_HEAD} differs from the token embedding; only tied embeddings are supported")
    if problems:
        raise load_error(problems)
    return shape, vocab_size, state | {LM_HEAD: state["token_embedding.weight"]}


def config_from_huggingface(config: Mapping[str, Any]) -> tuple[ModelConfig, int]:
    """Model config and vocabulary size from the content of `config.json`.

    Raises:
        UserError: naming every setting that no preset has.
    """
    preset = config.get("model_type")
    if not isinstance(preset, str) or preset not in LAYOUTS:
        raise load_error([f"model_type is {preset!r}; only {' and '.join(LAYOUTS)} are supported"])
    config = {"tie_word_embeddings": preset == "gpt2", **config}  # the defaults of transformers
    problems = [
        f"{name} is {config[name]!r}; it must be {' or '.join(map(repr, allowed))}"
        for name, allowed in LAYOUTS[preset].fixed.items()
        if config.get(name, allowed[0]) not in allowed
    ]
    if preset == "qwen3":
        problems += rope_problems(config)
    sizes: dict[str, Any] = {}
    for ours, theirs in {**LAYOUTS[preset].sizes, "vocab_size": "vocab_size"}.items():
        sizes[ours] = config.get(theirs)
        if sizes[ours] is None and theirs in ("n_inner", "num_key_value_heads"):
            sizes[ours] = 0  # null has the meaning of our 0
        elif type(sizes[ours]) is not int or sizes[ours] < 1:
            problems.append(f"{theirs} is {sizes[ours]!r}; it must be a positive integer")
    if problems:
        raise load_error(problems)
    vocab_size = sizes.pop("vocab_size")
    shape = ModelConfig(**sizes, preset=cast(Any, preset))
    if problems := shape.problems():
        raise load_error(problems)
    return shape, vocab_size


def rope_problems(config: Mapping[str, Any]) -> list[str]:
    """Where a Qwen3 configuration differs from the preset's unscaled RoPE, or from full attention."""
    problems, theta = [], PRESETS["qwen3"].rope_theta
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    is_unknown = set(rope) - {"rope_type", "type", "rope_theta"}
    if is_unknown or rope.get("rope_type", rope.get("type", "default")) != "default":
        problems.append(f"RoPE scaling is {rope!r}; it is not supported")
    elif (their_theta := rope.get("rope_theta", config.get("rope_theta", 10_000.0))) != theta:
        problems.append(f"rope_theta is {their_theta!r}; it must be {theta!r}")
    kinds = config.get("layer_types")
    if kinds is not None and (not isinstance(kinds, list) or any(kind != "full_attention" for kind in kinds)):
        problems.append("layer_types has other values than 'full_attention'")
    return problems


def load_error(problems: list[str]) -> UserError:
    """One error for all problems, of which the first six are listed."""
    more = f"; and {len(problems) - 6} more" if len(problems) > 6 else ""
    return UserError("cannot load this Hugging Face model: " + "; ".join(problems[:6]) + more, CHECKPOINT)


def save_huggingface(model: GPT, folder: str | Path) -> None:
    """Write `config.json` and `model.safetensors`, each atomically.

    Raises:
        UserError: if Hugging Face has no such model (exit code 2), or the files cannot be written (exit code 6).
    """
    config, weights = to_huggingface(model)
    write_atomic(Path(folder) / WEIGHTS_FILE, [save(weights, {"format": "pt"})])
    write_atomic(Path(folder) / CONFIG_FILE, [json.dumps(config, indent=2).encode() + b"\n"])


def load_huggingface(folder: str | Path, attention: AttentionImplementation = "eager") -> GPT:
    """The model of a folder with `config.json` and `model.safetensors`, in float32 on the CPU.

    Raises:
        UserError: if a file is missing or damaged, or as in `from_huggingface` (exit code 4).
    """
    folder = Path(folder)
    try:
        config = json.loads((folder / CONFIG_FILE).read_text(encoding="utf-8"))
        weights = load_file(folder / WEIGHTS_FILE)
    except FileNotFoundError as error:
        missing = f"{folder} needs {CONFIG_FILE} and an unsharded {WEIGHTS_FILE}"
        raise UserError(missing, CHECKPOINT) from error
    except (OSError, ValueError, RecursionError, SafetensorError) as error:
        raise UserError(f"cannot read the model in {folder}: {error}", CHECKPOINT) from error
    if not isinstance(config, dict):
        raise UserError(f"{folder / CONFIG_FILE} is not a JSON object", CHECKPOINT)
    shape, vocab_size, state = from_huggingface(config, weights)
    model = GPT(replace(shape, attention=attention), vocab_size)
    model.load_state_dict(state)
    return model
