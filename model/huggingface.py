"""Weights to and from the Hugging Face layouts: other programs run what is trained here, and we run theirs.

Beside the flow: nothing in training needs it. A folder holds `config.json` and `model.safetensors`, as
transformers, vLLM and llama.cpp read them; nothing in it is ever executed. The presets `gpt2` and `qwen3` are
exactly `GPT2LMHeadModel` and `Qwen3ForCausalLM`; `glass` has no counterpart there.

Dropout belongs to training, not to what a model computes: neither direction carries it.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from common.errors import CHECKPOINT, DISK_OR_MEMORY, UserError
from model.config import AttentionImplementation, ModelConfig
from model.gpt import GPT
from model.huggingface_config import describe, read_config, refusal

CONFIG_FILE, WEIGHTS_FILE = "config.json", "model.safetensors"

# Their names for our tensors, in a block and outside. Several names: our rows, cut in that order.
BLOCK_NAMES: dict[str, dict[str, tuple[str, ...]]] = {
    "gpt2": {
        "norm1.weight": ("ln_1.weight",),
        "norm1.bias": ("ln_1.bias",),
        "attention.qkv.weight": ("attn.c_attn.weight",),
        "attention.qkv.bias": ("attn.c_attn.bias",),
        "attention.out.weight": ("attn.c_proj.weight",),
        "attention.out.bias": ("attn.c_proj.bias",),
        "norm2.weight": ("ln_2.weight",),
        "norm2.bias": ("ln_2.bias",),
        "mlp.up.weight": ("mlp.c_fc.weight",),
        "mlp.up.bias": ("mlp.c_fc.bias",),
        "mlp.down.weight": ("mlp.c_proj.weight",),
        "mlp.down.bias": ("mlp.c_proj.bias",),
    },
    "qwen3": {
        "norm1.weight": ("input_layernorm.weight",),
        "attention.qkv.weight": tuple(f"self_attn.{part}_proj.weight" for part in "qkv"),
        "attention.q_norm.weight": ("self_attn.q_norm.weight",),
        "attention.k_norm.weight": ("self_attn.k_norm.weight",),
        "attention.out.weight": ("self_attn.o_proj.weight",),
        "norm2.weight": ("post_attention_layernorm.weight",),
        "mlp.up.weight": ("mlp.gate_proj.weight", "mlp.up_proj.weight"),
        "mlp.down.weight": ("mlp.down_proj.weight",),
    },
}
OTHER_NAMES = {
    "gpt2": {
        "token_embedding.weight": "transformer.wte.weight",
        "position_embedding.weight": "transformer.wpe.weight",
        "final_norm.weight": "transformer.ln_f.weight",
        "final_norm.bias": "transformer.ln_f.bias",
    },
    "qwen3": {
        "token_embedding.weight": "model.embed_tokens.weight",
        "final_norm.weight": "model.norm.weight",
    },
}
BLOCKS = {"gpt2": "transformer.h", "qwen3": "model.layers"}
# Old files keep these beside the weights: constants that the code computes for itself.
UNUSED_IN_BLOCK = {"gpt2": ("attn.bias", "attn.masked_bias"), "qwen3": ("self_attn.rotary_emb.inv_freq",)}
HEAD = "lm_head.weight"


@dataclass(frozen=True)
class Entry:
    """One of our tensors and where it stands on the other side."""

    ours: str
    theirs: tuple[str, ...]
    rows: tuple[int, ...]
    """How many of our rows each of theirs takes; empty when there is only one."""
    transposed: bool
    """GPT-2 keeps its projections as (in, out), torch as (out, in)."""


def layout(config: ModelConfig) -> Iterator[Entry]:
    """Every tensor of a model of this shape, the head excepted, which is the token embedding."""
    preset, D = config.preset, config.d_head
    rows = {
        "attention.qkv.weight": (config.n_heads * D, config.n_kv_heads * D, config.n_kv_heads * D),
        "mlp.up.weight": (config.d_mlp, config.d_mlp),
    }
    for ours, name in OTHER_NAMES[preset].items():
        yield Entry(ours, (name,), (), False)
    for layer in range(config.n_layers):
        for ours, names in BLOCK_NAMES[preset].items():
            transposed = preset == "gpt2" and ours.endswith("weight")  # the norms have gains
            theirs = tuple(f"{BLOCKS[preset]}.{layer}.{name}" for name in names)
            yield Entry(f"blocks.{layer}.{ours}", theirs, rows[ours] if len(names) > 1 else (), transposed)


def to_huggingface(model: GPT) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The content of `config.json`, and copies of the weights in the names and shapes that it implies.

    Raises:
        UserError: if Hugging Face has no model that computes the same.
    """
    config = model.config
    if config.preset not in BLOCKS:
        raise UserError(f"the preset {config.preset} has no Hugging Face layout; train with model.preset gpt2 or qwen3")
    if config.preset == "gpt2" and (
        config.n_kv_heads != config.n_heads or config.n_heads * config.d_head != config.d_model
    ):
        raise UserError(
            "GPT-2 on Hugging Face knows no shared key/value heads and no head width but d_model / n_heads; "
            "train with model.preset qwen3, or leave model.n_kv_heads and model.d_head at 0"
        )
    state, weights = model.state_dict(), {}
    for entry in layout(config):
        tensor = state[entry.ours].detach()
        parts = tensor.split(entry.rows) if entry.rows else (tensor.t() if entry.transposed else tensor,)
        for name, part in zip(entry.theirs, parts, strict=True):
            weights[name] = part.clone(memory_format=torch.contiguous_format)
    return describe(config, model.vocab_size, model.token_embedding.weight.dtype), weights


def from_huggingface(
    config: Mapping[str, Any], weights: Mapping[str, Tensor]
) -> tuple[ModelConfig, int, dict[str, Tensor]]:
    """Our configuration, the vocabulary size, and a `state_dict` for `GPT`, in the weights' own data type.

    Names may come with or without the prefix `transformer.` or `model.`, as both are in circulation.

    Raises:
        UserError: if no preset computes what the configuration asks for, or a tensor is missing, misshapen or
            unknown.
    """
    shape, vocab_size = read_config(config)
    weights = with_prefix(weights, shape.preset)
    if shape.n_layers > len(weights):
        raise refusal([f"config.json counts {shape.n_layers} layers, with only {len(weights)} tensors"])
    try:
        with torch.device("meta"):  # shapes alone, no memory
            expected = GPT(shape, vocab_size).state_dict()
    except RuntimeError as error:
        reason = str(error).splitlines()[0]
        raise refusal([f"a model of the sizes in config.json cannot be built ({reason})"]) from error
    found: list[str] = []
    state: dict[str, Tensor] = {}
    known: set[str] = set()
    for entry in layout(shape):
        known.update(entry.theirs)
        whole = expected[entry.ours]
        slots = whole.split(entry.rows) if entry.rows else (whole.t() if entry.transposed else whole,)
        wrong = [misfit(n, weights.get(n), s.shape) for n, s in zip(entry.theirs, slots, strict=True)]
        found += [line for line in wrong if line]
        if not any(wrong):
            tensor = torch.cat([weights[name] for name in entry.theirs])
            state[entry.ours] = tensor.t().contiguous() if entry.transposed else tensor
    found += strangers(weights, shape, known)
    if found:
        raise refusal(found)
    return shape, vocab_size, state | {"lm_head.weight": state["token_embedding.weight"]}


def misfit(name: str, tensor: Tensor | None, shape: torch.Size) -> str:
    """What is wrong with a tensor that should have this shape; empty when nothing is."""
    if tensor is None:
        return f"{name} is missing"
    if tensor.shape != shape:
        return f"{name} has shape {tuple(tensor.shape)} where config.json implies {tuple(shape)}"
    if tensor.dtype not in (torch.float64, torch.float32, torch.float16, torch.bfloat16):
        return f"{name} is {tensor.dtype}; quantized weights cannot be read"
    return ""


def with_prefix(weights: Mapping[str, Tensor], preset: str) -> dict[str, Tensor]:
    """The weights under full names; the files of the original GPT-2 lack the prefix."""
    prefix = BLOCKS[preset].split(".")[0] + "."
    if any(name.startswith(prefix) for name in weights):
        return dict(weights)
    return {name if name == HEAD else prefix + name: tensor for name, tensor in weights.items()}


def strangers(weights: Mapping[str, Tensor], config: ModelConfig, known: set[str]) -> list[str]:
    """Tensors that the model has no place for: they would be lost, and it would compute something else."""
    blocks = [f"{BLOCKS[config.preset]}.{layer}" for layer in range(config.n_layers)]
    unused = {f"{block}.{name}" for block in blocks for name in UNUSED_IN_BLOCK[config.preset]}
    found = [f"{name} is unknown" for name in sorted(set(weights) - known - unused - {HEAD})]
    embedding = weights.get(OTHER_NAMES[config.preset]["token_embedding.weight"])
    if HEAD in weights and embedding is not None and not torch.equal(weights[HEAD], embedding):
        found.append(f"{HEAD} differs from the token embedding; only a tied head can be represented")
    return found


def save_huggingface(model: GPT, folder: str | Path) -> None:
    """Write `config.json` and `model.safetensors` into `folder`, each whole or not at all.

    Raises:
        UserError: if Hugging Face has no such model, or the disk refuses.
    """
    config, weights = to_huggingface(model)
    folder = Path(folder)
    unfinished = [folder / f".{name}.unfinished" for name in (WEIGHTS_FILE, CONFIG_FILE)]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        save_file(weights, unfinished[0], metadata={"format": "pt"})
        unfinished[1].write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        os.replace(unfinished[0], folder / WEIGHTS_FILE)
        os.replace(unfinished[1], folder / CONFIG_FILE)
    except (OSError, SafetensorError) as error:
        for path in unfinished:
            path.unlink(missing_ok=True)
        raise UserError(f"cannot write the model to {folder}: {error}", DISK_OR_MEMORY) from error


def load_huggingface(folder: str | Path, attention: AttentionImplementation = "eager") -> GPT:
    """The model, in float32 on the CPU, that a folder with `config.json` and `model.safetensors` describes.

    Raises:
        UserError: if a file is missing or broken, or as in `from_huggingface`.
    """
    folder = Path(folder)
    try:
        config = json.loads((folder / CONFIG_FILE).read_text(encoding="utf-8"))
        weights = load_file(folder / WEIGHTS_FILE)
    except FileNotFoundError as error:
        missing = f"{folder} lacks {CONFIG_FILE} or {WEIGHTS_FILE}; both are needed (no shards)"
        raise UserError(missing, CHECKPOINT) from error
    except (OSError, ValueError, RecursionError, SafetensorError) as error:
        raise UserError(f"cannot read the model in {folder}: {error}", CHECKPOINT) from error
    if not isinstance(config, dict):
        raise UserError(f"{folder / CONFIG_FILE} holds no JSON object", CHECKPOINT)
    shape, vocab_size, state = from_huggingface(config, weights)
    model = GPT(replace(shape, attention=attention), vocab_size)
    model.load_state_dict(state)
    return model
