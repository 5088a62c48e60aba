"""Checkpoints in other programs' formats: a Hugging Face folder, and GGUF for llama.cpp. Each is read back and compared."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from common.errors import CHECKPOINT, CONFIG, UserError, escape_control_chars
from common.files import read_metrics
from data.tokenizer import Tokenizer, load_huggingface_tokenizer
from data.tokenizer_export import to_tokenizer_json, tokenizer_config
from model import config as model_config
from model.gpt import GPT
from model.huggingface import load_huggingface, save_huggingface, to_huggingface
from training.checkpoint import Checkpoint
from training.config import RunConfig, RunSettings, to_toml
from training.device import DTYPES

MODELING_FILE = "modeling_glass.py"
SAMPLE = 'One day, the fox\'s 3 hens met: "Où?" 字 🌳\n\n  They ran.\t<end>'  # text on which token ids are compared
LOGIT_TOLERANCE = 1e-4


def write_huggingface(checkpoint: Checkpoint, folder: Path, dtype: str) -> list[str]:
    """Write a Hugging Face folder and check it; returns what to print, with OUT for the folder.

    Raises UserError: what was written computes something else (exit code 4), or a package that checks it is missing (2).
    """
    tokenizer, model = checkpoint.tokenizer(), checkpoint.build_model(with_eager(checkpoint)).eval().to(DTYPES[dtype])
    is_glass = model.config.preset == "glass"
    trust = ", trust_remote_code=True" if is_glass else ""
    ends = dict.fromkeys(("bos_token_id", "eos_token_id"), tokenizer.end_of_text)
    try:
        save_huggingface(model, folder, **ends)
    except ValueError as error:
        raise UserError(f"this model has no form in transformers: {error}", CONFIG) from error
    sampling = {"do_sample": True, "temperature": 0.8, "pad_token_id": tokenizer.end_of_text, **ends}
    contents = {
        "generation_config.json": json.dumps(sampling, indent=2) + "\n",
        "tokenizer_config.json": json.dumps(tokenizer_config(tokenizer, model.config.context), indent=2) + "\n",
        "tokenizer.json": to_tokenizer_json(tokenizer, checkpoint.environment.starts_with_eot),
        "README.md": model_card(checkpoint, trust),
    }
    for name, content in contents.items():
        (folder / name).write_text(content, "utf-8")
    if is_glass:
        shutil.copy(Path(model_config.__file__).parent / MODELING_FILE, folder)
    check_huggingface(model.float(), tokenizer, folder)
    custom = [f"preset glass is no architecture of transformers: OUT/{MODELING_FILE} computes it, and must be trusted"]
    return [
        "checked: the same logits and token ids as the checkpoint",
        *(custom if is_glass else []),
        f'load it with AutoModelForCausalLM.from_pretrained("OUT"{trust}) and AutoTokenizer.from_pretrained("OUT"{trust})',
    ]


def with_eager(checkpoint: Checkpoint) -> model_config.ModelConfig:
    """The checkpoint's model config with eager attention and without dropout."""
    return replace(checkpoint.config.model, attention="eager", dropout=0.0)


def check_huggingface(model: GPT, tokenizer: Tokenizer, folder: Path) -> None:
    """Load what was written, and compare logits and token ids. Raises UserError (4) if they differ."""
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(model.vocab_size, (2, min(64, model.config.context)), generator=generator)
    with torch.no_grad():
        expected, found = model(tokens), load_huggingface(folder).eval()(tokens)
    difference = float((found - expected).abs().max())
    if not difference <= LOGIT_TOLERANCE * max(1.0, float(expected.abs().max())):
        raise UserError(f"the exported model's logits differ by {difference:.2g}: nothing was exported", CHECKPOINT)
    again = load_huggingface_tokenizer(folder, tokenizer.vocab_size)
    text = tokenizer.decode(tokens.flatten().tolist()) + ("" if tokenizer.name == "char" else SAMPLE)
    if again.encode(text).tolist() != tokenizer.encode(text).tolist() or again.end_of_text != tokenizer.end_of_text:
        raise UserError("the exported tokenizer gives other token ids: nothing was exported", CHECKPOINT)


def model_card(checkpoint: Checkpoint, trust: str) -> str:
    """README.md: what the model is, its loss, how to load it, and its config."""
    state, shape, data = checkpoint.state, checkpoint.config.model, checkpoint.config.data
    losses: dict[str, float] = {}
    for line in read_metrics(checkpoint.run_dir / "metrics.jsonl"):
        losses |= {name: line[name] for name in ("uniform", "unigram", "trigram", "floor") if name in line}
        if "val_loss" in line and line["step"] == state.step:
            losses["this model"] = line["val_loss"]
    data = replace(data, source=Path(data.source).name, val=Path(data.val).name, tokenizer=Path(data.tokenizer).name)
    run, model = RunSettings(seed=checkpoint.config.run.seed), replace(shape, init=Path(shape.init).name)
    config = to_toml(RunConfig(run, data, model, checkpoint.config.optim, checkpoint.config.train)).replace("```", "")
    table = "".join(f"\n* held-out loss, {name}: {loss:.4f} nats/token" for name, loss in losses.items())
    return f"""# A GPT trained with GlassGPT

* architecture: `{shape.preset}`, {shape.n_layers} layers, {shape.n_heads} heads, d_model {shape.d_model}, context {shape.context}
* step {state.step}, {state.tokens_seen:,} tokens seen
* trained on `{escape_control_chars(data.source).replace("`", "")}`{table}
* each text begins with end-of-text: {"yes, the tokenizer adds it" if checkpoint.environment.starts_with_eot else "no"}

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("this folder"{trust})
tokenizer = AutoTokenizer.from_pretrained("this folder"{trust})
```

## Config

```toml
{config}```
"""


def write_gguf(checkpoint: Checkpoint, path: Path, dtype: str) -> list[str]:
    """Write a GGUF file and read it back; returns what to print, with OUT for the file.

    Raises UserError: the model or tokenizer has no form in llama.cpp, or the package gguf is missing (exit code 2); what is
    read back differs (4).
    """
    try:
        import gguf
    except ImportError as error:
        raise UserError("GGUF files are written by the package gguf: pip install gguf", CONFIG) from error
    tokenizer, shape = checkpoint.tokenizer(), checkpoint.config.model
    if shape.preset not in ("gpt2", "qwen3"):
        raise UserError(f"llama.cpp has no preset {shape.preset}; train with model.preset gpt2 or qwen3", CONFIG)
    if tokenizer.name not in ("byte", "bpe", "gpt2"):  # those that split text as the pre-tokenizer gpt-2 of llama.cpp
        raise UserError(f"llama.cpp has no {tokenizer.name} tokenizer; train with bpe, byte or gpt2", CONFIG)
    model = checkpoint.build_model(with_eager(checkpoint))
    arch = gguf.MODEL_ARCH.GPT2 if shape.preset == "gpt2" else gguf.MODEL_ARCH.QWEN3
    writer = gguf.GGUFWriter(path, gguf.MODEL_ARCH_NAMES[arch])
    _write_gguf_config(writer, gguf, shape, dtype)
    _write_gguf_tokenizer(writer, gguf, tokenizer, checkpoint.environment.starts_with_eot)
    names = gguf.get_tensor_name_map(arch, shape.n_layers)
    kind = {"fp32": "F32", "bf16": "BF16", "fp16": "F16"}[dtype]
    written: dict[str, np.ndarray] = {}
    for name, tensor in to_huggingface(model)[1].items():
        if ".c_" in name:
            tensor = tensor.t()  # GPT-2's Conv1D modules store (in, out), llama.cpp (out, in)
        ours = str(names.get_name(name, try_suffixes=(".weight", ".bias")))
        quantization = getattr(gguf.GGMLQuantizationType, kind if tensor.dim() == 2 and ".wpe." not in name else "F32")
        written[ours] = gguf.quants.quantize(tensor.contiguous().numpy(), quantization)
        writer.add_tensor(ours, written[ours], raw_dtype=quantization)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    found = {tensor.name: tensor.data for tensor in gguf.GGUFReader(path).tensors}
    if found.keys() != written.keys() or not all(np.array_equal(found[n], data) for n, data in written.items()):
        raise UserError("the tensors that were read back from the GGUF file differ: nothing was exported", CHECKPOINT)
    return [f"checked: {len(found)} tensors read back equal", "run it with llama.cpp: llama-cli -m OUT"]


def _write_gguf_config(writer: Any, gguf: Any, shape: model_config.ModelConfig, dtype: str) -> None:
    writer.add_block_count(shape.n_layers)
    writer.add_context_length(shape.context)
    writer.add_embedding_length(shape.d_model)
    writer.add_feed_forward_length(shape.d_mlp)
    writer.add_head_count(shape.n_heads)
    types = {"fp32": "ALL_F32", "bf16": "MOSTLY_BF16", "fp16": "MOSTLY_F16"}
    writer.add_file_type(getattr(gguf.LlamaFileType, types[dtype]))
    if shape.preset == "gpt2":
        writer.add_layer_norm_eps(shape.architecture.norm_eps)
        return
    writer.add_layer_norm_rms_eps(shape.architecture.norm_eps)
    writer.add_head_count_kv(shape.n_kv_heads)
    writer.add_key_length(shape.d_head)
    writer.add_value_length(shape.d_head)
    writer.add_rope_freq_base(shape.architecture.rope_theta)


def _write_gguf_tokenizer(writer: Any, gguf: Any, tokenizer: Tokenizer, starts_with_eot: bool) -> None:
    content = json.loads(to_tokenizer_json(tokenizer))
    vocab = {i: token for token, i in content["model"]["vocab"].items()}
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list([vocab[i] for i in range(tokenizer.vocab_size)])
    normal, control = gguf.TokenType.NORMAL, gguf.TokenType.CONTROL
    writer.add_token_types([normal if tokenizer.token_bytes(i) else control for i in range(tokenizer.vocab_size)])
    merges = [" ".join(pair) for pair in content["model"]["merges"]]
    writer.add_token_merges(merges or [f"{vocab[tokenizer.end_of_text]} {vocab[tokenizer.end_of_text]}"])  # needs one
    writer.add_bos_token_id(tokenizer.end_of_text)
    writer.add_eos_token_id(tokenizer.end_of_text)
    writer.add_add_bos_token(starts_with_eot)
