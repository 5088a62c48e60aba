"""Checkpoints: whole or absent, checked when they are read, and free of pickle.

A checkpoint is a folder `checkpoints/000400` of safetensors and JSON. It is written under another name, its manifest
last, and renamed into place, so that a folder of that form is complete; sizes and sha256 in the manifest say so again
when it is read. There is no "latest" pointer: the newest folder that verifies is the latest.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from data import tokenizer as tokenizers
from data.tokenizer import Tokenizer
from model.gpt import GPT
from runtime.config import RunConfig, from_saved
from runtime.device import Machine, choose_kernels
from runtime.errors import CHECKPOINT, DISK_OR_MEMORY, UserError

MANIFEST = "manifest.json"
FILES = ("model.safetensors", "optimizer.safetensors", "state.json", "tokenizer.json")
LARGEST_JSON = 1 << 30  # a file from a stranger must not fill the memory


@dataclass
class TrainState:
    """Where a run stands; all of it that is no tensor."""

    step: int = 0
    tokens_seen: int = 0
    best_loss: float | None = None
    best_step: int = 0
    stale: int = 0
    """Evaluations since the best one."""


@dataclass(frozen=True)
class Checkpoint:
    """A verified checkpoint, its tensors not yet read."""

    folder: Path
    config: RunConfig
    vocab_size: int
    state: TrainState
    documents: bool
    """Whether a text begins with end-of-text: the corpus had several documents, or no lines to begin after."""

    def weights(self) -> dict[str, Tensor]:
        """The model's parameters by name."""
        return read_tensors(self.folder / "model.safetensors")

    def moments(self) -> dict[str, Tensor]:
        """The optimizer's moments, named as `Optimizer.state` names them."""
        return read_tensors(self.folder / "optimizer.safetensors")

    def tokenizer(self) -> Tokenizer:
        """The tokenizer that the model was trained with."""
        return tokenizers.load(self.folder / "tokenizer.json")

    def model(self, machine: Machine) -> GPT:
        """The model, ready to be sampled from.

        Raises:
            UserError: if the weights do not fit the config beside them (exit code 4).
        """
        model = GPT(choose_kernels(self.config.model, machine.device, machine.dtype), self.vocab_size)
        load_weights(model, self.weights(), self.folder)
        return model.to(machine.device).eval()


def load_weights(model: GPT, weights: dict[str, Tensor], folder: Path) -> None:
    """Copy `weights` into the model; the head is stored once, as the embedding that it is.

    Raises:
        UserError: if they do not fit.
    """
    try:
        model.load_state_dict({**weights, "head.weight": weights["token_embedding.weight"]})
    except KeyError as error:
        raise UserError(f"the weights in {folder} lack {error}", CHECKPOINT) from error
    except RuntimeError as error:
        lines = str(error).splitlines()
        raise UserError(f"the weights in {folder} do not fit its config: {lines[-1].strip()}", CHECKPOINT) from error


def model_weights(model: GPT) -> dict[str, Tensor]:
    """What `model.safetensors` holds: every parameter once."""
    return {name: parameter.detach().cpu().contiguous() for name, parameter in model.named_parameters()}


def sha256_of_weights(model: GPT) -> str:
    """One hash over all names, shapes, and bytes of the weights."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model_weights(model).items()):
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        digest.update(tensor.flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def sha256_of_file(path: Path) -> str:
    """The sha256 of a file, read in blocks."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sync(path: Path) -> None:
    """Wait until a file or folder is on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def save(
    run: Path,
    config: RunConfig,
    state: TrainState,
    model: GPT,
    moments: dict[str, Tensor],
    tokenizer: Tokenizer,
    documents: bool,
) -> Path:
    """Write `run/checkpoints/<step>`, whole or not at all, then remove what rotation lets go.

    Raises:
        UserError: if the disk is full or can't be written (exit code 6); earlier checkpoints are untouched.
    """
    root = run / "checkpoints"
    final = root / f"{state.step:06d}"
    temporary = root / f".writing-{state.step:06d}"
    try:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        save_file(model_weights(model), temporary / "model.safetensors")
        save_file(
            {key: value.cpu().contiguous() for key, value in moments.items()}, temporary / "optimizer.safetensors"
        )
        tokenizer.save(temporary / "tokenizer.json")
        saved = {
            "format": 1,
            "vocab_size": model.vocab_size,
            "documents": documents,
            "torch": torch.__version__,
            "state": dataclasses.asdict(state),
            "config": dataclasses.asdict(config),
        }
        (temporary / "state.json").write_text(json.dumps(saved, indent=1), encoding="utf-8")
        write_manifest(temporary)
        if final.exists():  # a damaged folder of the same step, or the same step saved again
            shutil.rmtree(final)
        temporary.rename(final)
        sync(root)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(temporary, ignore_errors=True)
        raise UserError(f"cannot write the checkpoint {final}: {reason(error)}", DISK_OR_MEMORY) from error
    prune(root, {state.best_step, state.step}, config.train.keep)
    return final


def reason(error: Exception) -> str:
    """Why a file could not be written, in words."""
    return (error.strerror if isinstance(error, OSError) else None) or str(error).splitlines()[0]


def write_manifest(folder: Path) -> None:
    """List each file's size and sha256, once every file is on the disk; the manifest is the last one written."""
    files = {}
    for name in FILES:
        sync(folder / name)
        files[name] = {"bytes": (folder / name).stat().st_size, "sha256": sha256_of_file(folder / name)}
    (folder / MANIFEST).write_text(json.dumps({"format": 1, "files": files}, indent=1), encoding="utf-8")
    sync(folder / MANIFEST)
    sync(folder)


def steps_in(root: Path) -> list[Path]:
    """The checkpoint folders, oldest step first."""
    if not root.is_dir():
        return []
    return sorted((p for p in root.iterdir() if p.name.isdecimal() and p.is_dir()), key=lambda p: int(p.name))


def prune(root: Path, precious: set[int], keep: int) -> None:
    """Remove all but the newest `keep` checkpoints and those of the `precious` steps."""
    for folder in steps_in(root)[:-keep]:
        if int(folder.name) not in precious:
            shutil.rmtree(folder, ignore_errors=True)


def read_json(path: Path) -> Any:
    """A JSON file of bounded size.

    Raises:
        ValueError: if it is no JSON, or absurdly large.
        OSError: if it can't be read.
    """
    if path.stat().st_size > LARGEST_JSON:
        raise ValueError(f"{path.name} is larger than a checkpoint's can be")
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except RecursionError as error:
        raise ValueError(f"{path.name} is nested too deeply") from error


def fault_of(folder: Path) -> str | None:
    """Why a checkpoint folder cannot be trusted, or None: every file present, of the listed size and sha256."""
    try:
        listed = read_json(folder / MANIFEST)["files"]
        for name in FILES:
            path = folder / name
            if path.stat().st_size != listed[name]["bytes"]:
                return f"{name} has {path.stat().st_size} bytes instead of {listed[name]['bytes']}"
            if sha256_of_file(path) != listed[name]["sha256"]:
                return f"{name} does not have the sha256 of its manifest"
    except OSError as error:
        return f"{Path(error.filename or MANIFEST).name}: {error.strerror}"
    except (ValueError, KeyError, TypeError) as error:
        return f"its manifest cannot be read ({type(error).__name__})"
    return None


def read_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file.

    Raises:
        UserError: if it is none (exit code 4).
    """
    try:
        return load_file(path)
    except (SafetensorError, OSError, ValueError) as error:
        raise UserError(f"{path} is no readable safetensors file: {reason(error)}", CHECKPOINT) from error


def open_checkpoint(path: Path) -> Checkpoint:
    """The newest good checkpoint of a run folder, or the one that `path` names.

    Broken ones are named on stderr and passed over.

    Raises:
        UserError: if there is no such folder, or no good checkpoint in it (exit code 4).
    """
    if not path.is_dir():
        raise UserError(
            f"{path} is no folder; give a run folder such as runs/quickstart, or one of its checkpoints", CHECKPOINT
        )
    single = (path / MANIFEST).is_file() or (path / "state.json").is_file()
    candidates = [path] if single else steps_in(path / "checkpoints")[::-1]
    if not candidates:
        raise UserError(f"{path} holds no checkpoint; train one with: python train.py --run.dir {path}", CHECKPOINT)
    for folder in candidates:
        fault = fault_of(folder)
        if fault is None:
            return read_state(folder)
        print(f"passing over the damaged checkpoint {folder}: {fault}", file=sys.stderr)
    raise UserError(f"no checkpoint in {path} is whole; restore one from a copy, or train again", CHECKPOINT)


def read_state(folder: Path) -> Checkpoint:
    """A checkpoint's `state.json`.

    Raises:
        UserError: if it is not what this version writes (exit code 4).
    """
    try:
        saved = read_json(folder / "state.json")
        state = TrainState(**saved["state"])
        vocab_size = int(saved["vocab_size"])
        config = from_saved(saved["config"], str(folder / "state.json"))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"{folder / 'state.json'} is not a state that this version reads ({error})", CHECKPOINT
        ) from error
    return Checkpoint(folder, config, vocab_size, state, bool(saved.get("documents")))
