"""The model inside of a page: weights that training keeps of some steps, and what `web/engine.js` needs to run them.

`attention/weights/000540.safetensors` holds the parameters by name, and what ablation puts in place of heads and MLPs:
`means.heads` (L, H D) and `means.mlps` (L, C), means over held-out texts. Weights are f16, or int8 with `NAME.scale`, f32, of
each row.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import load_file, save

from common.errors import UserError, warn
from common.files import read_json, reading, write_atomic
from data.tokenizer import Tokenizer, from_dict
from inspection.page_data import PageRun
from inspection.page_encoding import DTYPES, Encoder
from model.config import ModelConfig

if TYPE_CHECKING:
    from inspection.attention_file import LoadedModel
    from model.gpt import GPT

FOLDER = "weights"
KINDS = "char", "byte", "bpe"  # of the tokenizers that `web/tokenizer.js` knows
SIZES = "n_layers", "n_heads", "n_kv_heads", "d_model", "d_head", "d_mlp", "context", "ngrams", "ngram_rows"
PageModel = tuple[dict[str, Any] | None, list[bytes]]  # a table for the page, and the vocabulary


def write_weights(path: Path, model: GPT, texts: Sequence[Sequence[int]], bits: int) -> None:
    """Write the parameters with 8 or 16 bits, and the means over texts; raises UserError (exit code 6) if that fails."""
    from inspection.ablation import mean_outputs

    heads, mlps = mean_outputs(model, texts)
    arrays: dict[str, NDArray[Any]] = {"means.heads": heads.flatten(1).numpy(), "means.mlps": mlps.numpy()}
    for name, parameter in model.named_parameters():
        weight = parameter.detach().float().cpu().numpy()
        if bits == 8 and weight.ndim == 2:
            scale = np.maximum(np.abs(weight).max(axis=1), 1e-30) / 127
            arrays[name] = np.rint(weight / scale[:, None]).astype(np.int8)
            arrays[f"{name}.scale"] = scale.astype(np.float32)
        else:
            arrays[name] = weight.clip(-65504, 65504).astype(np.float16)
    write_atomic(path, [save(arrays)])


def encode_model(run: PageRun, limit: int) -> PageModel:
    """The model of a run, with the weights of as many steps as fit into `limit` characters: those of the last step, of step 0,
    then the newest. None if not even the first fit, or the run has none, or has a tokenizer that `web/tokenizer.js` does not
    know."""
    steps, folder = run.steps, run.folder
    metadata = run.files[-1].metadata if run.files else {}
    if folder is None or not (found := _read_tokenizer(folder, metadata.get("tokenizer_sha256", ""))):
        return None, []
    tokenizer, starts_with_eot = found
    encoder, snapshots = Encoder(limit), list[dict[str, Any]]()
    for step in dict.fromkeys([steps[-1], steps[0], *reversed(steps)]):
        if (path := folder / "attention" / FOLDER / f"{step:06d}.safetensors").is_file():
            try:
                arrays = _load(path)
                weights = {name: encoder.array(array, array.dtype.name) for name, array in arrays.items()}
            except OverflowError:
                break
            except UserError as error:
                warn(f"skipping damaged weights: {error}")
                continue
            snapshots.append({"step": step, "weights": weights})
    with reading(folder, "run with weights"):
        config = ModelConfig(**json.loads(metadata["config"]))
    if not snapshots or snapshots[0]["step"] != steps[-1]:
        return None, []
    table, vocabulary = _describe(config, tokenizer, [tokenizer.end_of_text] if starts_with_eot else [])
    return {**table, "tokenizer": dict(tokenizer.saved), "snapshots": snapshots}, vocabulary


def _read_tokenizer(folder: Path, sha256: str) -> tuple[Tokenizer, bool] | None:
    """The tokenizer of that hash from a checkpoint, and whether texts start with end-of-text; None if all are damaged, or
    it is of another kind than `KINDS`."""
    for state in sorted(folder.glob("checkpoints/*/state.json"), reverse=True):
        with suppress(UserError), reading(state.parent, "checkpoint"):
            content = state.with_name("vocabulary.json").read_bytes()
            if hashlib.sha256(content).hexdigest() == sha256 and (saved := json.loads(content))["kind"] in KINDS:
                return from_dict(saved), bool(read_json(state)["environment"]["starts_with_eot"])
    return None


def _load(path: Path) -> dict[str, NDArray[Any]]:
    with reading(path, "file of weights"):
        arrays = load_file(path)
        if not {"token_embedding.weight", "means.heads", "means.mlps"} <= {*arrays}:
            raise ValueError("it has no token embedding or no means")
        if wrong := [name for name, array in arrays.items() if array.dtype.name not in DTYPES]:
            raise ValueError(f"{wrong[0]} is {arrays[wrong[0]].dtype}")
    return arrays


def describe_model(loaded: LoadedModel, steps: Sequence[int]) -> PageModel:
    """A model that a server runs at `steps`."""
    prefix = loaded.encode("a")[: -len(loaded.tokenizer.encode("a"))]
    table, vocabulary = _describe(loaded.model.config, loaded.tokenizer, prefix)
    return {**table, "steps": list(steps)}, vocabulary


def _describe(config: ModelConfig, tokenizer: Tokenizer, prefix: Sequence[int]) -> tuple[dict[str, Any], list[bytes]]:
    """What is the same whoever runs the model; `prefix` are the tokens before each text."""
    sizes = {name: getattr(config, name) for name in SIZES} | asdict(config.architecture)
    table = {"config": sizes, "vocab_size": tokenizer.vocab_size, "end_of_text": tokenizer.end_of_text}
    vocabulary = [tokenizer.token_bytes(token) for token in range(tokenizer.vocab_size)]
    return {**table, "prefix": list(prefix)}, vocabulary
