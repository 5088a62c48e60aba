"""Reading checkpoints, which may come from anybody: every file is checked before anything is made of it.

A checkpoint is a folder `checkpoints/000400` of safetensors and JSON, free of pickle; `saving.py` writes it. Its
manifest lists the size and sha256 of each file. There is no "latest" pointer: the newest folder that verifies is the
latest. What a manifest cannot vouch for, as a stranger wrote it too, `strangers.py` checks: bounded sizes, plain types,
and a shape that fits the weights, so that no memory is taken for a model that is not there.
"""

from __future__ import annotations

import dataclasses
import hashlib
import math
import re
import stat
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from common.errors import CHECKPOINT, UserError, escape_control_chars
from data import tokenizer as tokenizers
from data.tokenizer import Tokenizer
from model.config import ModelConfig
from model.gpt import GPT
from training.config import RunConfig, from_saved
from training.device import DistContext, resolve_attention
from training.strangers import (
    check_cache,
    check_moments,
    check_weights,
    plain,
    read_json,
    read_tensors,
    without_memory,
)

__all__ = [
    "Checkpoint",
    "RunEnvironment",
    "TrainState",
    "list_checkpoints",
    "load_weights",
    "model_weights",
    "open_checkpoint",
    "read_checkpoint",
    "read_tensors",
    "sha256_of_file",
    "sha256_of_weights",
    "step_of_folder",
    "verify_checkpoint",
]

MANIFEST = "manifest.json"
FILES = ("model.safetensors", "optimizer.safetensors", "state.json", "vocabulary.json")
FORMAT = 1
REPLACED = ".replaced-"
"""Before a step's name: the checkpoint that another of that step is about to take the place of."""


@dataclass
class TrainState:
    """Where a run stands; all of it that is no tensor."""

    step: int = 0
    tokens_seen: int = 0
    best_loss: float | None = None
    best_step: int = 0
    evals_without_improvement: int = 0
    """Evaluations since the best one."""
    last_eval_step: int = -1
    """The last step that was evaluated."""
    skipped_steps: int = 0
    """Steps passed over because their loss or gradient was not finite."""


@dataclass(frozen=True)
class RunEnvironment:
    """What a checkpoint's numbers come from."""

    starts_with_eot: bool
    """Whether a text begins with end-of-text: the corpus had several documents, or no lines to begin after."""
    corpus: str = ""
    """Fingerprint of the prepared corpus."""
    settings: Mapping[str, str] = dataclasses.field(default_factory=dict)
    """What else decides the last bits: device, dtype, kernels, threads, compiled, torch."""


@dataclass(frozen=True)
class Checkpoint:
    """A verified checkpoint, its tensors not yet read."""

    folder: Path
    config: RunConfig
    vocab_size: int
    state: TrainState
    environment: RunEnvironment

    @property
    def starts_with_eot(self) -> bool:
        """Whether a text begins with end-of-text."""
        return self.environment.starts_with_eot

    def weights(self) -> dict[str, Tensor]:
        """The model's parameters by name.

        Raises:
            UserError: if they do not fit the config beside them, or a number is not finite (exit code 4).
        """
        return read_tensors(self.folder / "model.safetensors")

    def optimizer_state(self) -> dict[str, Tensor]:
        """The optimizer's moments, named as `Optimizer.state` names them.

        Raises:
            UserError: if they are not those of the weights, or a number is not finite (exit code 4).
        """
        check_moments(self.folder / "optimizer.safetensors", self.config.model, self.vocab_size)
        return read_tensors(self.folder / "optimizer.safetensors")

    def tokenizer(self) -> Tokenizer:
        """The tokenizer that the model was trained with.

        Raises:
            UserError: if it is damaged, or has another number of tokens than the model (exit code 4).
        """
        path = self.folder / "vocabulary.json"
        found = tokenizers.load_tokenizer(path)
        if found.vocab_size != self.vocab_size:
            raise UserError(
                f"{escape_control_chars(path)} has {found.vocab_size} tokens, the model beside it {self.vocab_size}: "
                "take another checkpoint",
                CHECKPOINT,
            )
        return found

    def build_model(self, shape: ModelConfig) -> GPT:
        """The model as it was saved, on the CPU; no first weights are drawn for it.

        Args:
            shape: the config's, with kernels and dropout of the caller's choice.

        Raises:
            UserError: if the weights do not fit it (exit code 4).
        """
        check_weights(self.folder / "model.safetensors", shape, self.vocab_size)
        with without_memory():
            model = GPT(shape, self.vocab_size)
        load_weights(model, self.weights(), self.folder)
        return model

    def load_model(self, ctx: DistContext) -> GPT:
        """The model, ready to be sampled from.

        Raises:
            UserError: if the weights do not fit the config beside them (exit code 4).
        """
        shape = resolve_attention(self.config.model, ctx.device, ctx.dtype)
        return self.build_model(shape).to(ctx.device).eval()


def load_weights(model: GPT, weights: dict[str, Tensor], folder: Path) -> None:
    """Copy `weights` into the model; the head is stored once, as the embedding that it is.

    A model without memory (on the device `meta`) takes the tensors themselves.

    Raises:
        UserError: if they do not fit (exit code 4).
    """
    without_memory = model.token_embedding.weight.is_meta
    try:
        whole = {**weights, "lm_head.weight": weights["token_embedding.weight"]}
        model.load_state_dict(whole, assign=without_memory)
    except KeyError as error:
        raise UserError(
            f"the weights in {escape_control_chars(folder)} lack {escape_control_chars(error)}", CHECKPOINT
        ) from error
    except RuntimeError as error:
        last = escape_control_chars(str(error).splitlines()[-1].strip())
        raise UserError(
            f"the weights in {escape_control_chars(folder)} do not fit its config: {last}", CHECKPOINT
        ) from error
    model.lm_head.weight = model.token_embedding.weight


def model_weights(model: GPT) -> dict[str, Tensor]:
    """What `model.safetensors` holds: every parameter once; the model's own memory, where it lies."""
    return {name: parameter.detach() for name, parameter in model.named_parameters()}


def sha256_of_weights(model: GPT) -> str:
    """One hash over all names, shapes, and bytes of the weights."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model_weights(model).items()):
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        digest.update(tensor.cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def sha256_of_file(path: Path) -> str:
    """The sha256 of a file, read in blocks."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def step_of_folder(folder: Path) -> int | None:
    """The step that a checkpoint's folder is named after; None for another name."""
    found = re.fullmatch(r"[0-9]{6,18}", folder.name.removeprefix(REPLACED))
    step = int(found[0]) if found else -1
    return step if found and f"{step:06d}" == found[0] else None


def list_checkpoints(root: Path) -> list[Path]:
    """The checkpoint folders, oldest step first.

    Where a process was killed between two renames, the folder that was about to be replaced stands for its step.
    """
    found: dict[int, Path] = {}
    for path in sorted(root.iterdir() if root.is_dir() else ()):  # "." sorts before digits
        step = step_of_folder(path)
        if step is not None and path.is_dir():
            found[step] = path
    return [found[step] for step in sorted(found)]


def verify_checkpoint(folder: Path) -> str | None:
    """Why a checkpoint folder cannot be trusted, or None: every file present, of the listed size and sha256."""
    try:
        listed = read_json(folder / MANIFEST)["files"]
        for name in FILES:
            path = folder / name
            size, sha256 = plain(listed[name]["bytes"], int), plain(listed[name]["sha256"], str)
            found = path.lstat()
            if not stat.S_ISREG(found.st_mode):
                return f"{name} is no file of its own (a link, or something else)"
            if found.st_size != size:
                return f"{name} has {found.st_size} bytes instead of {size}"
            if sha256_of_file(path) != sha256:
                return f"{name} does not have the sha256 of its manifest"
    except OSError as error:
        return f"{escape_control_chars(Path(error.filename or MANIFEST).name)}: {error.strerror}"
    except (ValueError, KeyError, TypeError) as error:
        return f"its manifest cannot be read ({type(error).__name__})"
    return None


def open_checkpoint(path: Path) -> Checkpoint:
    """The newest good checkpoint of a run folder, or the one that `path` names.

    Broken ones are named on stderr and passed over.

    Raises:
        UserError: if there is no such folder, or no good checkpoint in it (exit code 4).
    """
    shown = escape_control_chars(path)
    try:
        if not path.is_dir():
            raise UserError(
                f"{shown} is no folder; give a run folder such as runs/quickstart, or one of its checkpoints",
                CHECKPOINT,
            )
        single = (path / MANIFEST).is_file() or (path / "state.json").is_file()
        candidates = [path] if single else list_checkpoints(path / "checkpoints")[::-1]
    except OSError as error:
        raise UserError(f"cannot read {shown}: {error.strerror}", CHECKPOINT) from error
    if not candidates:
        raise UserError(f"{shown} holds no checkpoint; train one with: python train.py --run.dir {shown}", CHECKPOINT)
    for folder in candidates:
        fault = verify_checkpoint(folder)
        if fault is None:
            try:
                return read_checkpoint(folder)
            except UserError as error:
                if len(candidates) == 1:
                    raise
                fault = str(error)
        print(f"passing over the damaged checkpoint {escape_control_chars(folder)}: {fault}", file=sys.stderr)
    raise UserError(f"no checkpoint in {shown} is whole; restore one from a copy, or train again", CHECKPOINT)


def read_checkpoint(folder: Path) -> Checkpoint:
    """A checkpoint's `state.json`, and whether the weights beside it have the shape that it says.

    A folder that is named after another step than it holds is refused: it was copied there by hand, and the steps
    after it would be taken for newer than they are.

    Raises:
        UserError: if it is not what this version writes (exit code 4).
    """
    path = folder / "state.json"
    try:
        saved = plain(read_json(path), dict)
        if saved["format"] != FORMAT:
            raise ValueError(f"its format is {saved['format']}, and this version reads {FORMAT}")
        state, origin = state_from(plain(saved["state"], dict)), origin_from(saved)
        vocab_size, table = plain(saved["vocab_size"], int), plain(saved["config"], dict)
        named = step_of_folder(folder)
        if named is not None and named != state.step:
            raise ValueError(f"it holds step {state.step}: rename the folder, or remove it")
        if vocab_size < 1:
            raise ValueError(f"its vocab_size is {vocab_size}")
    except (ValueError, KeyError, TypeError, OSError) as error:
        raise UserError(
            f"{escape_control_chars(path)} is not a state that this version reads ({escape_control_chars(error)})",
            CHECKPOINT,
        ) from error
    config = from_saved(table, escape_control_chars(path))
    check_weights(folder / "model.safetensors", config.model, vocab_size)
    check_cache(folder / "model.safetensors", config.model)
    return Checkpoint(folder, config, vocab_size, state, origin)


def state_from(table: dict[str, object]) -> TrainState:
    """Raises ValueError or TypeError for all that is no state."""
    state = TrainState(**table)  # type: ignore[arg-type]
    if state.best_loss is not None and not math.isfinite(plain(state.best_loss, float)):
        raise ValueError("its best loss is not finite")
    for name, value in dataclasses.asdict(state).items():
        if name != "best_loss" and not (-1 if name == "last_eval_step" else 0) <= plain(value, int) < 10**18:
            raise ValueError(f"its {name} is {value}")
    return state


def origin_from(saved: dict[str, object]) -> RunEnvironment:
    """Raises ValueError, KeyError or TypeError for all that is no origin."""
    if "environment" not in saved:  # written before there was one
        return RunEnvironment(plain(saved["documents"], bool))
    table = plain(saved["environment"], dict)
    how = {plain(key, str): plain(value, str) for key, value in plain(table["settings"], dict).items()}
    return RunEnvironment(plain(table["starts_with_eot"], bool), plain(table["corpus"], str), how)
