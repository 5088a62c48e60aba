"""Hugging Face checkpoints to and from `GPT`: a folder with `config.json` and safetensors, in one file or in shards.

The presets `gpt2`, `llama` and `qwen3` are exactly `GPT2LMHeadModel`, `LlamaForCausalLM` and `Qwen3ForCausalLM`; `glass`
is `modeling_glass.py`. What the other side does not compute exactly raises ValueError. Files hold float32, float16 or
bfloat16 and are read as float32; a model is written in its own dtype. Dropout is not carried over in either direction.
"""

import json
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from textwrap import shorten
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor

from common.errors import CHECKPOINT, UserError, escape_control_chars
from common.files import read_json, reading, write_atomic
from model.config import PRESETS, AttentionImplementation, ModelConfig
from model.gpt import GPT, meta_model

CONFIG_FILE, WEIGHTS_FILE, INDEX_FILE = "config.json", "model.safetensors", "model.safetensors.index.json"
HEAD, DTYPES = "lm_head.weight", ("F32", "F16", "BF16")
TO_CONVERT = (
    "it has pickled weights ({}), which can execute code and are never loaded; where you trust them, convert them with "
    "transformers: AutoModelForCausalLM.from_pretrained(FOLDER).save_pretrained(NEW_FOLDER, safe_serialization=True)"
)


@dataclass(frozen=True)
class Layout:
    """How Hugging Face names a preset's sizes, settings and modules."""

    architecture: str
    prefix: str  # of all names but the LM head's; some files omit it
    sizes: dict[str, str]  # ours -> theirs
    numbers: dict[str, tuple[str, float]]  # ours -> theirs, and its value where a file does not have it
    tied: bool  # where a file does not say
    required: dict[str, tuple[Any, ...]]  # settings that change what is computed, and no tensor -> allowed values
    exported: dict[str, Any]  # settings that only an export needs
    modules: dict[str, str]  # ours -> theirs; "*" is the layer, and several names share our rows


QWEN3 = Layout(
    architecture="Qwen3ForCausalLM",
    prefix="model.",
    sizes={
        "n_layers": "num_hidden_layers",
        "n_heads": "num_attention_heads",
        "n_kv_heads": "num_key_value_heads",
        "d_model": "hidden_size",
        "d_head": "head_dim",
        "d_mlp": "intermediate_size",
        "context": "max_position_embeddings",
    },
    numbers={"norm_eps": ("rms_norm_eps", 1e-6), "rope_theta": ("rope_theta", 10_000.0)},
    tied=False,
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
        "blocks.*.attention.q_norm": "layers.*.self_attn.q_norm",
        "blocks.*.attention.k_norm": "layers.*.self_attn.k_norm",
        "blocks.*.attention.out": "layers.*.self_attn.o_proj",
        "blocks.*.norm2": "layers.*.post_attention_layernorm",
        "blocks.*.mlp.up": "layers.*.mlp.gate_proj layers.*.mlp.up_proj",
        "blocks.*.mlp.down": "layers.*.mlp.down_proj",
        "final_norm": "norm",
    },
)
LAYOUTS = {
    "gpt2": Layout(
        architecture="GPT2LMHeadModel",
        prefix="transformer.",
        sizes=dict(n_layers="n_layer", n_heads="n_head", d_model="n_embd", d_mlp="n_inner", context="n_positions"),
        numbers={"norm_eps": ("layer_norm_epsilon", 1e-5)},
        tied=True,
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
    "qwen3": QWEN3,
    "llama": replace(
        QWEN3,
        architecture="LlamaForCausalLM",
        modules={ours: theirs for ours, theirs in QWEN3.modules.items() if not ours.endswith(("q_norm", "k_norm"))},
    ),
    "glass": replace(
        QWEN3,
        architecture="GlassForCausalLM",
        numbers={"norm_eps": ("rms_norm_eps", 1e-5), "rope_theta": ("rope_theta", 10_000.0)},
        tied=True,
        required=QWEN3.required | {"hidden_act": ("relu2",)},
        exported={
            "auto_map": {
                "AutoConfig": "modeling_glass.GlassConfig",
                "AutoModelForCausalLM": "modeling_glass.GlassForCausalLM",
            }
        },
        modules=QWEN3.modules | {"blocks.*.mlp.up": "layers.*.mlp.up_proj"},
    ),
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
    return views if config.tie_embeddings else {**views, HEAD: model.lm_head.weight.detach()}


def to_huggingface(model: GPT) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The content of `config.json`, and copies of the weights under Hugging Face's names."""
    config = model.config
    layout, architecture = LAYOUTS[config.preset], config.architecture
    numbers = {theirs: getattr(architecture, ours) for ours, (theirs, _) in layout.numbers.items()}
    free = replace(PRESETS[config.preset], norm_eps=architecture.norm_eps, rope_theta=architecture.rope_theta)
    if architecture != free:
        raise ValueError(f"Hugging Face's {config.preset} has no options norm, positions and mlp; leave them at preset")
    if config.ngrams > 1:
        raise ValueError("Hugging Face has no n-gram embeddings; train with model.ngrams 1")
    standard = config.n_kv_heads == config.n_heads and config.n_heads * config.d_head == config.d_model
    if config.preset == "gpt2" and not standard:
        raise ValueError(
            "GPT-2 has no grouped key/value heads and no head size other than d_model / n_heads; "
            "train with model.preset llama or qwen3, or leave model.n_kv_heads and model.d_head at 0"
        )
    content = {
        "model_type": config.preset,
        "architectures": [layout.architecture],
        "vocab_size": model.vocab_size,
        "dtype": str(model.token_embedding.weight.dtype).removeprefix("torch."),
        "bos_token_id": None,
        "eos_token_id": None,
        "tie_word_embeddings": config.tie_embeddings,
        **{theirs: getattr(config, ours) for ours, theirs in layout.sizes.items()},
        **numbers,
        **{name: allowed[0] for name, allowed in layout.required.items() if allowed[0] is not None},
        **layout.exported,
    }
    if "rope_theta" in numbers:  # transformers 4 reads it above
        content["rope_parameters"] = {"rope_type": "default", "rope_theta": numbers["rope_theta"]}
    weights = {n if n == HEAD else layout.prefix + n: view for n, view in named_views(model).items()}
    return content, {name: view.clone(memory_format=torch.contiguous_format) for name, view in weights.items()}


def from_huggingface(
    config: Mapping[str, Any], weights: Mapping[str, Any], attention: AttentionImplementation = "eager"
) -> GPT:
    """The model of a `config.json` and its weights, in float32 on the CPU.

    `weights` are tensors, or slices of a safetensors file, of which one at a time is read. Raises ValueError if they
    do not fit the config, before memory is allocated.
    """
    shape, vocab_size = config_from_huggingface(config)
    layout = LAYOUTS[shape.preset]
    constants = (".attn.bias", ".attn.masked_bias", ".rotary_emb.inv_freq")  # in old files
    weights = {name.removeprefix(layout.prefix): x for name, x in weights.items() if not name.endswith(constants)}
    if shape.n_layers > len(weights):  # a model of a billion layers takes forever to build
        raise ValueError(f"config.json has {shape.n_layers} layers, the files {len(weights)} tensors")
    model = meta_model(replace(shape, attention=attention), vocab_size)
    tied_head = weights.pop(HEAD, None) if shape.tie_embeddings else None
    check_tensors({name: list(x.shape) for name, x in named_views(model).items()}, weights)
    model.to_empty(device="cpu")
    model.tie_weights()
    for name, view in named_views(model).items():
        view.copy_(weights[name][:])
    if tied_head is not None and not torch.equal(tied_head[:].float(), model.lm_head.weight):
        message = "lm_head.weight differs from the token embedding, to which config.json ties it"
        raise ValueError(f"{message}; to use it, set tie_word_embeddings to false there")
    return model


def check_tensors(expected: Mapping[str, list[int]], weights: Mapping[str, Any]) -> None:
    """Raise ValueError that names each tensor that is missing, unknown, or of another shape or dtype."""
    shapes = {name: list(x.shape if isinstance(x, Tensor) else x.get_shape()) for name, x in weights.items()}
    dtypes = {name: x.get_dtype() for name, x in weights.items() if not isinstance(x, Tensor)}
    both = [name for name in expected if name in shapes]
    problems = {
        "missing tensors": [name for name in expected if name not in shapes],
        "tensors that the model does not have": [name for name in shapes if name not in expected],
        "tensors of another shape than config.json implies": [
            f"{name} is {shapes[name]}, not {expected[name]}" for name in both if shapes[name] != expected[name]
        ],
        "tensors that are not float32, float16 or bfloat16": [
            f"{name} is {dtypes[name]}" for name in both if dtypes.get(name, DTYPES[0]) not in DTYPES
        ],
    }
    lines = [f"{what}: {shorten(', '.join(names), 400)}" for what, names in problems.items() if names]
    if lines:
        raise ValueError(escape_control_chars("; ".join(lines)))


def config_from_huggingface(config: Mapping[str, Any]) -> tuple[ModelConfig, int]:
    """Model config and vocabulary size from the content of `config.json`."""
    preset = config["model_type"]
    if preset not in tuple(LAYOUTS):
        raise ValueError(f"model_type is {preset!r}; it must be {' or '.join(LAYOUTS)}")
    layout = LAYOUTS[preset]
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    config = {**dict(layout.numbers.values()), "tie_word_embeddings": layout.tied, **config, **rope}
    problems = [
        f"{name} is {config[name]!r}; it must be {' or '.join(map(repr, allowed))}"
        for name, allowed in (layout.required | {"tie_word_embeddings": (True, False)}).items()
        if config.get(name, allowed[0]) not in allowed
    ]
    if any(kind != "full_attention" for kind in config.get("layer_types") or ()):
        problems.append("layer_types has other values than 'full_attention'")
    problems += [
        f"{name} is {config[name]!r}; it must be a positive number"
        for name, _ in layout.numbers.values()
        if not (isinstance(config[name], (int, float)) and config[name] > 0)
    ]
    if problems:
        raise ValueError("; ".join(problems))
    values: dict[str, Any] = {ours: int(config.get(theirs) or 0) for ours, theirs in layout.sizes.items()}
    for ours, (theirs, _) in layout.numbers.items():
        values[ours] = 0.0 if config[theirs] == getattr(PRESETS[preset], ours) else float(config[theirs])
    # resolves sizes of 0, which are null or missing in the file
    shape = ModelConfig(preset, **values, tie_embeddings=bool(config["tie_word_embeddings"]))
    if problems := shape.problems():
        raise ValueError("; ".join(problems))
    return shape, int(config["vocab_size"])


def save_huggingface(model: GPT, folder: str | Path, **settings: Any) -> None:
    """Write `config.json`, with further settings, and `model.safetensors`, each atomically; raises UserError (exit code 6) if a
    disk is full, ValueError as `to_huggingface`."""
    config, weights = to_huggingface(model)
    write_atomic(Path(folder) / WEIGHTS_FILE, [save(weights, {"format": "pt"})])
    write_atomic(Path(folder) / CONFIG_FILE, [json.dumps(config | settings, indent=2).encode() + b"\n"])


def read_huggingface_config(folder: str | Path) -> tuple[ModelConfig, int]:
    """Model config and vocabulary size of a folder, whose weights are not read; raises UserError (exit code 4)."""
    with reading(folder, f"Hugging Face model ({CONFIG_FILE})"):
        return config_from_huggingface(read_json(Path(folder) / CONFIG_FILE))


def load_huggingface(folder: str | Path, attention: AttentionImplementation = "eager") -> GPT:
    """`from_huggingface` of the files of a folder, one tensor at a time; raises UserError (exit code 4) if it cannot be
    loaded, or its weights are pickled."""
    with reading(folder, f"Hugging Face model ({CONFIG_FILE} and {WEIGHTS_FILE})"), ExitStack() as files:
        config = read_json(Path(folder) / CONFIG_FILE)
        return from_huggingface(config, open_tensors(Path(folder), files), attention)


def open_tensors(folder: Path, files: ExitStack) -> dict[str, Any]:
    """The tensors of a folder by name, as slices that are not read yet, of files that `files` closes."""
    has_index = not (folder / WEIGHTS_FILE).exists() and (folder / INDEX_FILE).exists()
    names = sorted(set(read_json(folder / INDEX_FILE)["weight_map"].values())) if has_index else [WEIGHTS_FILE]
    pickled = sorted(path.name for path in folder.iterdir() if path.suffix in (".bin", ".pt", ".pth"))
    if pickled and not has_index and not (folder / WEIGHTS_FILE).exists():
        raise UserError(f"{folder}: {TO_CONVERT.format(escape_control_chars(', '.join(pickled[:3])))}", CHECKPOINT)
    if outside := [name for name in names if Path(name).name != name]:
        raise ValueError(f"{INDEX_FILE} names {outside[0]!r}, which is not the name of a file in the folder")
    tensors: dict[str, Any] = {}
    for name in names:
        # Read, not mapped, for a mapped file that shrinks ends the process (SIGBUS).
        file = files.enter_context(safe_open(folder / name, "pt", backend="pread"))
        for key in file.keys():  # noqa: SIM118
            tensors[key] = file.get_slice(key)
    return tensors
