"""Hugging Face checkpoints to and from `GPT`: a folder with `config.json` and `model.safetensors`, or shards of it.

The presets `gpt2`, `qwen3` and `llama` are exactly `GPT2LMHeadModel`, `Qwen3ForCausalLM` and `LlamaForCausalLM`; `glass` has no
counterpart. What the other side does not compute exactly raises ValueError. Dropout is not carried over in either direction.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save
from torch import Tensor

from common.files import read_json, reading, write_atomic
from model.config import PRESETS, AttentionImplementation, ModelConfig
from model.gpt import GPT

CONFIG_FILE, WEIGHTS_FILE, INDEX_FILE = "config.json", "model.safetensors", "model.safetensors.index.json"
LM_HEAD = "lm_head.weight"


@dataclass(frozen=True)
class Layout:
    """How Hugging Face names a preset's sizes, settings and modules."""

    architecture: str
    prefix: str  # of all names but the LM head's; some files omit it
    is_tied: bool  # whether the LM head is the token embedding if the file does not say
    sizes: dict[str, str]  # ours -> theirs
    numbers: dict[str, str]  # ours -> theirs: settings that may differ from the preset's
    required: dict[str, tuple[Any, ...]]  # settings that change what is computed, and no tensor -> allowed values
    exported: dict[str, Any]  # settings that only an export needs
    modules: dict[str, str]  # ours -> theirs; "*" is the layer, and several names share our rows


ROTARY_LAYOUT: dict[str, Any] = dict(
    prefix="model.",
    is_tied=False,
    sizes={
        "n_layers": "num_hidden_layers",
        "n_heads": "num_attention_heads",
        "n_kv_heads": "num_key_value_heads",
        "d_model": "hidden_size",
        "d_head": "head_dim",
        "d_mlp": "intermediate_size",
        "context": "max_position_embeddings",
    },
    numbers={"norm_eps": "rms_norm_eps", "rope_theta": "rope_theta"},
    required={
        "hidden_act": ("silu", "swish"),
        "rope_type": (None, "default"),
        "type": (None, "default"),  # the same in older files
        "partial_rotary_factor": (None, 1),
        "use_sliding_window": (False,),
    },
    exported={},
    modules={
        "token_embedding": "embed_tokens",
        "blocks.*.norm1": "layers.*.input_layernorm",
        "blocks.*.attention.qkv": "layers.*.self_attn.q_proj layers.*.self_attn.k_proj layers.*.self_attn.v_proj",
        "blocks.*.attention.out": "layers.*.self_attn.o_proj",
        "blocks.*.norm2": "layers.*.post_attention_layernorm",
        "blocks.*.mlp.up": "layers.*.mlp.gate_proj layers.*.mlp.up_proj",
        "blocks.*.mlp.down": "layers.*.mlp.down_proj",
        "final_norm": "norm",
    },
)
QK_NORM = {
    "blocks.*.attention.q_norm": "layers.*.self_attn.q_norm",
    "blocks.*.attention.k_norm": "layers.*.self_attn.k_norm",
}
LAYOUTS = {
    "gpt2": Layout(
        architecture="GPT2LMHeadModel",
        prefix="transformer.",
        is_tied=True,
        sizes=dict(n_layers="n_layer", n_heads="n_head", d_model="n_embd", d_mlp="n_inner", context="n_positions"),
        numbers={"norm_eps": "layer_norm_epsilon"},
        required={
            "activation_function": ("gelu_new", "gelu_pytorch_tanh"),
            "scale_attn_weights": (True,),
            "scale_attn_by_inverse_layer_idx": (False,),
        },
        exported=dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0),
        modules={
            "token_embedding": "wte",
            "position_embedding": "wpe",
            "blocks.*.norm1": "h.*.ln_1",
            "blocks.*.attention.qkv": "h.*.attn.c_attn",
            "blocks.*.attention.out": "h.*.attn.c_proj",
            "blocks.*.norm2": "h.*.ln_2",
            "blocks.*.mlp.up": "h.*.mlp.c_fc",
            "blocks.*.mlp.down": "h.*.mlp.c_proj",
            "final_norm": "ln_f",
        },
    ),
    "llama": Layout(architecture="LlamaForCausalLM", **ROTARY_LAYOUT),
    "qwen3": Layout(architecture="Qwen3ForCausalLM", **ROTARY_LAYOUT | {"modules": ROTARY_LAYOUT["modules"] | QK_NORM}),
}


def named_views(model: GPT) -> dict[str, Tensor]:
    """The parameters under Hugging Face's names, without the prefix, as views of ours."""
    config = model.config
    views: dict[str, Tensor] = {}
    q, kv = config.n_heads * config.d_head, config.n_kv_heads * config.d_head
    for ours, theirs in LAYOUTS[config.preset].modules.items():
        for layer in map(str, range(config.n_layers if "*" in ours else 1)):
            names = theirs.replace("*", layer).split()
            for kind, parameter in model.get_submodule(ours.replace("*", layer)).named_parameters():
                # GPT-2's Conv1D modules, which are named c_*, store matrices as (in, out)
                tensor = parameter.detach().t() if ".c_" in theirs else parameter.detach()
                parts = tensor.split([q, kv, kv] if len(names) == 3 else len(tensor) // len(names))
                views |= {f"{name}.{kind}": part for name, part in zip(names, parts, strict=True)}
    if config.tie_embeddings == "off":
        views[LM_HEAD] = model.lm_head.weight.detach()
    return views


def to_huggingface(model: GPT) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The content of `config.json`, and copies of the weights under Hugging Face's names."""
    config = model.config
    if config.preset not in LAYOUTS:
        raise ValueError(
            f"preset {config.preset} has no Hugging Face equivalent; train with model.preset gpt2, qwen3 or llama"
        )
    standard = config.n_kv_heads == config.n_heads and config.n_heads * config.d_head == config.d_model
    if config.preset == "gpt2" and not standard:
        raise ValueError(
            "GPT-2 has no grouped key/value heads and no head size other than d_model / n_heads; "
            "train with model.preset qwen3, or leave model.n_kv_heads and model.d_head at 0"
        )
    layout, architecture = LAYOUTS[config.preset], config.architecture
    content = {
        "model_type": config.preset,
        "architectures": [layout.architecture],
        "vocab_size": model.vocab_size,
        "dtype": str(model.token_embedding.weight.dtype).removeprefix("torch."),
        "bos_token_id": None,
        "eos_token_id": None,
        "tie_word_embeddings": config.tie_embeddings == "on",
        **{theirs: getattr(config, ours) for ours, theirs in layout.sizes.items()},
        **{name: allowed[0] for name, allowed in layout.required.items() if allowed[0] is not None},
        **{theirs: getattr(architecture, ours) for ours, theirs in layout.numbers.items()},
        **layout.exported,
    }
    if architecture.positions == "rotary":  # transformers 4 reads rope_theta above
        content["rope_parameters"] = {"rope_type": "default", "rope_theta": architecture.rope_theta}
    views = {(n if n == LM_HEAD else layout.prefix + n): v for n, v in named_views(model).items()}
    return content, {name: view.clone(memory_format=torch.contiguous_format) for name, view in views.items()}


def from_huggingface(
    config: Mapping[str, Any], weights: Mapping[str, Tensor], attention: AttentionImplementation = "eager"
) -> GPT:
    """The model of a `config.json` and its weights, in float32 on the CPU."""
    shape, vocab_size = config_from_huggingface(config)
    layout = LAYOUTS[shape.preset]
    masks = (".attn.bias", ".attn.masked_bias")  # constants in old files of GPT-2
    weights = {name.removeprefix(layout.prefix): x for name, x in weights.items() if not name.endswith(masks)}
    if shape.n_layers > len(weights):
        raise ValueError(f"config.json has {shape.n_layers} layers, but there are {len(weights)} tensors")
    lm_head = weights.get(LM_HEAD)
    if lm_head is not None and shape.tie_embeddings == "on":
        if not torch.equal(lm_head, weights[layout.modules["token_embedding"] + ".weight"]):
            raise ValueError(f"{LM_HEAD} differs from the token embedding, but config.json ties them")
        del weights[LM_HEAD]
    with torch.device("meta"):  # so that memory is allocated only once the shapes are right
        expected = {name: tuple(x.shape) for name, x in named_views(GPT(shape, vocab_size)).items()}
    found = {name: tuple(x.shape) for name, x in weights.items()}
    problems = [
        f"{name} is {found.get(name, 'missing')}, but config.json implies {expected.get(name, 'no such tensor')}"
        for name in {**expected, **found}
        if found.get(name) != expected.get(name)
    ]
    if problems:
        more = [f"{len(problems) - 6} more"] if len(problems) > 6 else []
        raise ValueError("; ".join(problems[:6] + more))
    model = GPT(replace(shape, attention=attention), vocab_size)
    for name, view in named_views(model).items():
        view.copy_(weights[name])
    return model


def config_from_huggingface(config: Mapping[str, Any]) -> tuple[ModelConfig, int]:
    """Model config and vocabulary size from the content of `config.json`."""
    preset = config["model_type"]
    if preset not in tuple(LAYOUTS):
        raise ValueError(f"model_type is {preset!r}; only {', '.join(LAYOUTS)} are supported")
    layout = LAYOUTS[preset]
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    config = {"rope_theta": 10_000.0, **config, **rope}  # transformers assumes 10,000
    problems = [
        f"{name} is {config[name]!r}; it must be {' or '.join(map(repr, allowed))}"
        for name, allowed in layout.required.items()
        if config.get(name, allowed[0]) not in allowed
    ]
    if any(kind != "full_attention" for kind in config.get("layer_types") or ()):
        problems.append("layer_types has other values than 'full_attention'")
    sizes: dict[str, Any] = {ours: int(config.get(theirs) or 0) for ours, theirs in layout.sizes.items()}
    for ours, theirs in layout.numbers.items():
        default = getattr(PRESETS[preset], ours)
        if (value := float(config.get(theirs, default))) != default:
            sizes[ours] = value
    is_tied = config.get("tie_word_embeddings", layout.is_tied)
    # Sizes of 0, which are null or missing in the file, are resolved.
    shape = ModelConfig(preset, tie_embeddings="on" if is_tied else "off", **sizes)
    if problems := problems + shape.problems():
        raise ValueError("; ".join(problems))
    return shape, int(config["vocab_size"])


def save_huggingface(model: GPT, folder: str | Path) -> None:
    """Write `config.json` and `model.safetensors`, each atomically; raises UserError (exit code 6) if a disk is full."""
    config, weights = to_huggingface(model)
    write_atomic(Path(folder) / WEIGHTS_FILE, [save(weights, {"format": "pt"})])
    write_atomic(Path(folder) / CONFIG_FILE, [json.dumps(config, indent=2).encode() + b"\n"])


def load_huggingface(folder: str | Path, attention: AttentionImplementation = "eager") -> GPT:
    """`from_huggingface` of the files of a folder; raises UserError (exit code 4) if it cannot be loaded."""
    with reading(folder, f"Hugging Face model ({CONFIG_FILE} and {WEIGHTS_FILE}, or shards with an index)"):
        return from_huggingface(read_json(Path(folder) / CONFIG_FILE), read_weights(Path(folder)), attention)


def read_weights(folder: Path) -> dict[str, Tensor]:
    """The tensors of a folder, by name. Raises ValueError or OSError if there are none; files that execute code are not read."""
    if (folder / INDEX_FILE).is_file() and not (folder / WEIGHTS_FILE).is_file():
        names = sorted(set(read_json(folder / INDEX_FILE)["weight_map"].values()))
        if outside := [name for name in names if Path(name).name != name]:
            raise ValueError(f"its index names {outside[0]!r}, which is not in the folder")
    else:
        names = [WEIGHTS_FILE]
        pickles = [path.name for kind in ("bin", "pt", "pth", "ckpt") for path in sorted(folder.glob(f"*.{kind}"))]
        if pickles and not (folder / WEIGHTS_FILE).is_file():
            raise ValueError(
                f"{pickles[0]} is a pickle, which executes code when it is read; if you trust it, load it with transformers "
                "and save it with save_pretrained(folder, safe_serialization=True)"
            )
    return {name: tensor for file in names for name, tensor in load_file(folder / file).items()}
