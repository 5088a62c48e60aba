"""Checkpoints: written whole or not at all, verified before older ones are removed, checked when they are read.

A folder such as `checkpoints/000400` holds `FILES` and a manifest of their sha256. It is written as `.writing-000400`,
synced, read back and renamed; `.removing-000100` is being removed. The newest folder that verifies is the latest.
"""

import contextlib
import hashlib
import json
import os
import re
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from common.errors import CHECKPOINT, DISK_OR_MEMORY, NON_FINITE, RemovedError, UserError, warn
from common.files import read_json, reading
from data.tokenizer import Tokenizer, load_tokenizer
from model.config import ModelConfig
from model.gpt import GPT, meta_model
from training.cli import parse
from training.config import RunConfig, as_arguments
from training.device import DistContext, resolve_attention

MODEL, OPTIMIZER, STATE, VOCABULARY = "model.safetensors", "optimizer.safetensors", "state.json", "vocabulary.json"
FILES = (MODEL, OPTIMIZER, STATE, VOCABULARY)
MANIFEST = "manifest.json"
FORMAT = 1
WRITING, REMOVING = ".writing-", ".removing-"
ANOTHER = "take another checkpoint, or one from a backup"


@dataclass
class TrainState:
    """Where a run is; everything that is not a tensor."""

    step: int = 0
    tokens_seen: int = 0
    best_loss: float | None = None
    best_step: int = 0
    evals_without_improvement: int = 0
    last_eval_step: int = -1
    skipped_steps: int = 0  # because their loss or gradient was not finite
    scaler: dict[str, float] = field(default_factory=dict)  # `GradScaler.state_dict`; empty without fp16


@dataclass(frozen=True)
class RunEnvironment:
    """What a run was trained on and with."""

    starts_with_eot: bool  # a text begins with end-of-text: of several documents, or without line breaks to begin after
    corpus: str = ""  # fingerprint of the prepared corpus
    settings: Mapping[str, str] = field(default_factory=dict)
    """What else decides the last bits of the results: device, dtype, attention, threads, compiled, torch version."""
    seen_tokens: str = ""  # which tokens the training text has: a bit each, in hexadecimal; empty if it is not known

    def has_token(self, token: int) -> bool:
        """Whether the training text has a token; True if it is not known."""
        return bool(int(self.seen_tokens[token // 4 : token // 4 + 1] or "f", 16) >> (3 - token % 4) & 1)


@dataclass(frozen=True)
class Checkpoint:
    """A verified checkpoint. Its tensors are not read yet. Every method raises UserError (4) if a file is damaged,
    RemovedError if it was removed."""

    folder: Path
    config: RunConfig
    vocab_size: int
    state: TrainState
    environment: RunEnvironment

    @property
    def run_dir(self) -> Path:
        """The folder in which files about the model are written."""
        return self.folder.parents[1]

    def weights(self) -> dict[str, Tensor]:
        """The parameters by name, in fp32."""
        return _read_tensors(self.folder / MODEL)

    def optimizer_state(self) -> dict[str, Tensor]:
        """The optimizer state, named as by `Optimizer.state_dict`: `parameter/entry`."""
        return _read_tensors(self.folder / OPTIMIZER)

    def tokenizer(self) -> Tokenizer:
        tokenizer = load_tokenizer(path := self.folder / VOCABULARY)
        if tokenizer.vocab_size != self.vocab_size:
            raise UserError(
                f"{path} has {tokenizer.vocab_size} tokens, the model {self.vocab_size}; {ANOTHER}", CHECKPOINT
            )
        return tokenizer

    def build_model(self, config: ModelConfig) -> GPT:
        """The saved model on the CPU, with attention implementation, dropout and context (at most the saved) of `config`."""
        weights = self.weights()
        name = "position_embedding.weight"
        if name in weights and config.context < self.config.model.context == len(weights[name]):
            weights[name] = weights[name][: config.context].clone()
        with reading(self.folder / MODEL, "model", ANOTHER):
            if config.n_layers > len(weights):
                raise ValueError(f"it has {len(weights)} tensors, the model {config.n_layers} layers")
            model = meta_model(config, self.vocab_size)  # no memory before shapes are compared
            if config.tie_embeddings:
                weights["lm_head.weight"] = weights["token_embedding.weight"]
            model.load_state_dict(weights, assign=True)
        model.tie_weights()
        return model

    def load_model(self, ctx: DistContext) -> GPT:
        """The saved model on the device, ready for inference."""
        config = resolve_attention(self.config.model, ctx.device, ctx.dtype)
        return self.build_model(config).to(ctx.device).eval()


def open_checkpoint(path: Path, which: str = "best") -> Checkpoint:
    """The checkpoint that `path` is, or one of a run folder: `best` (of the lowest validation loss; without evaluations
    the newest), `last` (the newest), or a step. Damaged ones are reported; instead of them the newest intact one is read.

    Raises UserError if there is no such step (exit code 2), or no intact checkpoint (4); RemovedError if it is
    removed meanwhile.
    """
    if not os.path.isdir(path):  # not Path.is_dir, which raises for names that are too long
        message = f"{path} is not a folder; give a run folder such as runs/quickstart, or one of its checkpoints"
        raise UserError(message, CHECKPOINT)
    is_checkpoint = os.path.isfile(path / MANIFEST) or os.path.isfile(path / STATE)
    folders = [path] if is_checkpoint else list_checkpoints(path / "checkpoints")[::-1]
    if not folders:
        runs = sorted({str(inner.parent.parent) for inner in path.glob("*/checkpoints/*")})
        hint = f"it contains {', '.join(runs[:9])}" if runs else "train one: python train.py"
        error = RemovedError if any(path.glob("checkpoints/*")) else UserError  # one may just have replaced another
        raise error(f"{path} has no checkpoint; {hint}", CHECKPOINT)
    if which not in ("best", "last"):
        steps = {folder.name: folder for folder in folders}
        if which.zfill(6) not in steps:
            names = ", ".join(name.lstrip("0") or "0" for name in reversed(steps))
            raise UserError(f"--checkpoint is {which!r}; {path} has best, last, {names}")
        return read_checkpoint(steps[which.zfill(6)])
    newest = _read_newest(folders)
    step, best = newest.state.step, newest.state.best_step
    if which == "best" and newest.state.best_loss is not None and best != step and not is_checkpoint:
        try:
            return read_checkpoint(best_folder := path / "checkpoints" / f"{best:06d}")
        except UserError as error:
            if isinstance(error, RemovedError) and best_folder in folders:
                raise
            warn(f"step {step} is used, not the best: {error}")
    return newest


def _read_newest(folders: list[Path]) -> Checkpoint:
    """The first of these checkpoints that is intact; raises the last one's UserError if none is."""
    for folder in folders[:-1]:
        try:
            return read_checkpoint(folder)
        except UserError as error:
            if isinstance(error, RemovedError):
                raise
            warn(f"skipping a damaged checkpoint: {error}")
    return read_checkpoint(folders[-1])


def list_checkpoints(root: Path) -> list[Path]:
    """The checkpoint folders, oldest step first."""
    folders = [path for path in root.glob("*") if step_of_folder(path) is not None and path.is_dir()]
    return sorted(folders, key=lambda path: int(path.name))


def step_of_folder(folder: Path) -> int | None:
    """The step that a checkpoint folder is named after; None for any other name."""
    return int(folder.name) if re.fullmatch("[0-9]{6}|[1-9][0-9]{6,17}", folder.name) else None


def verify_checkpoint(folder: Path) -> None:
    """Raise UserError (4) unless each file of a checkpoint has the sha256 of the manifest."""
    with reading(folder, "checkpoint", ANOTHER):
        listed = read_json(folder / MANIFEST)["files"]
        for name in FILES:
            if sha256_of_file(folder / name) != listed[name]["sha256"]:
                raise ValueError(f"{name} does not have the sha256 of its manifest")


def read_checkpoint(folder: Path) -> Checkpoint:
    """A verified checkpoint; raises UserError (4) if it is damaged, of another version, or named after another step."""
    verify_checkpoint(folder)
    with reading(folder / STATE, "state of a run", ANOTHER):
        saved = read_json(folder / STATE)
        if saved["format"] != FORMAT:
            raise ValueError(f"format {saved['format']}, this version reads {FORMAT}")
        state, environment = TrainState(**saved["state"]), RunEnvironment(**saved["environment"])
        if step_of_folder(folder) not in (None, state.step):
            raise ValueError(f"it holds step {state.step}: rename the folder, or remove it")
        try:
            config = parse(RunConfig, as_arguments(saved["config"], "its config"), "")
        except UserError as error:
            raise ValueError(str(error)) from error
    return Checkpoint(folder, config, saved["vocab_size"], state, environment)


def _read_tensors(path: Path) -> dict[str, Tensor]:
    """The fp32 tensors of a safetensors file: read, not mapped, for a mapped file that shrinks ends the process (SIGBUS)."""
    with reading(path, "file of tensors", ANOTHER):
        tensors = load_file(path, backend="pread")
        for name, value in tensors.items():
            if value.dtype != torch.float32:
                raise ValueError(f"{name} is {value.dtype} instead of float32")
    return tensors


def model_weights(model: GPT) -> dict[str, Tensor]:
    """Every parameter once (a tied LM head is the token embedding); the model's own memory, not a copy."""
    return {name: parameter.detach() for name, parameter in model.named_parameters()}


def sha256_of_weights(model: GPT) -> str:
    """One hash over the names, shapes and bytes of the weights."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model_weights(model).items()):
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        digest.update(tensor.cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def provenance(model: GPT, tokenizer: Tokenizer, state: TrainState) -> dict[str, str]:
    """Step, tokens seen, shape and hashes of a model: the metadata of an attention file."""
    return {
        "config": json.dumps(asdict(model.config)),
        "vocab_size": str(model.vocab_size),
        "step": str(state.step),
        "tokens_seen": str(state.tokens_seen),
        "weights_sha256": sha256_of_weights(model),
        "tokenizer_sha256": tokenizer.fingerprint(),
    }


def sha256_of_file(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


class CheckpointWriter:
    """Writes the checkpoints of a run folder, locked by the caller, and keeps the best and the `keep` newest."""

    def __init__(self, run: Path, keep: int) -> None:
        self.root, self.keep = run / "checkpoints", keep
        self.cleanup()

    def cleanup(self) -> None:
        """Remove what is under a temporary name; a complete checkpoint that lacks only its name gets it instead."""
        with contextlib.suppress(OSError):  # leftovers do no harm
            for path in (*self.root.glob(f"{WRITING}*"), *self.root.glob(f"{REMOVING}*")):
                final = self.root / path.name.removeprefix(WRITING).removeprefix(REMOVING)
                with contextlib.suppress(UserError):
                    if step_of_folder(final) is not None and not final.exists():
                        verify_checkpoint(path)
                        path.rename(final)
                        _fsync(self.root)
                _remove(path)

    def save(
        self,
        config: RunConfig,
        state: TrainState,
        weights: Mapping[str, Tensor],
        optimizer_state: Mapping[str, Tensor],
        tokenizer: Tokenizer,
        environment: RunEnvironment,
    ) -> Path:
        """Write `checkpoints/<step>`, whole or not at all, verify it, and remove those that are not kept.

        Raises UserError if a number is not finite (exit code 5), or the disk is full, cannot be written or did not keep
        the data (6); earlier checkpoints are as they were.
        """
        check_finite({**weights, **{f"the optimizer state {k}": v for k, v in optimizer_state.items()}})
        final = self.root / f"{state.step:06d}"
        temporary = self.root / f"{WRITING}{final.name}"
        saved: dict[str, Any] = {"format": FORMAT, "vocab_size": tokenizer.vocab_size}
        saved |= {"environment": asdict(environment), "state": asdict(state), "config": asdict(config)}
        try:
            if not self.root.is_dir():
                self.root.mkdir(parents=True)
                _fsync(self.root.parent)
            _remove(temporary)
            temporary.mkdir()
            _write_tensors(temporary / MODEL, weights)
            _write_tensors(temporary / OPTIMIZER, optimizer_state)
            (temporary / STATE).write_bytes(json.dumps(saved, indent=1).encode())
            (temporary / VOCABULARY).write_bytes(tokenizer.to_json())
            _write_manifest(temporary)
            verify_checkpoint(temporary)  # the disk may not have kept what was written
            if final.is_symlink() or final.exists():
                _set_aside(final)
            temporary.rename(final)
            _fsync(self.root)
        except (OSError, SafetensorError, UserError) as error:
            self.cleanup()
            reason = getattr(error, "strerror", None) or error
            again = "continue with --run.resume" if list_checkpoints(self.root) else "give the same command again"
            advice = f"earlier checkpoints are unchanged: free some space, then {again}"
            raise UserError(f"cannot write the checkpoint {final}: {reason}; {advice}", DISK_OR_MEMORY) from error
        self.apply_retention(state.step, state.step if state.best_loss is None else state.best_step)
        return final

    def apply_retention(self, step: int, best: int) -> None:
        """Remove all checkpoints up to `step` but the newest `keep`, `step` itself and `best`; a failure is a warning.

        Later ones can only be left from before a resume that skipped them as damaged: they are replaced in their turn.
        """
        past = [folder for folder in list_checkpoints(self.root) if int(folder.name) <= step]
        unwanted = [folder for folder in past[: -self.keep] if int(folder.name) not in (step, best)]
        try:
            _remove(self.root / f"{REMOVING}{step:06d}")
            for folder in unwanted:  # renamed first: a folder with a step's name is never incomplete
                _remove(_set_aside(folder))
        except OSError as error:
            warn(f"cannot remove an old checkpoint from {self.root}: {error.strerror or error}")


def check_finite(tensors: Mapping[str, Tensor]) -> None:
    """Raise UserError (5) for an infinity or NaN."""
    for name, value in tensors.items():
        if not value.sum().isfinite() and not value.isfinite().all():  # the sum alone costs a hundredth
            message = f"a number in {name} is not finite: nothing was saved, earlier checkpoints are unchanged"
            raise UserError(f"{message}; continue from them with --run.resume and a lower optim.lr", NON_FINITE)


def _write_manifest(folder: Path) -> None:
    """Write a manifest of the files' sizes and sha256; force them to the disk, then the manifest, then the folder."""
    files = {}
    for name in FILES:
        files[name] = {"bytes": (folder / name).stat().st_size, "sha256": sha256_of_file(folder / name)}
        _fsync(folder / name)
    (folder / MANIFEST).write_bytes(json.dumps({"format": FORMAT, "files": files}, indent=1).encode())
    _fsync(folder / MANIFEST)
    _fsync(folder)


def _write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    save_file({name: value.detach().cpu().contiguous() for name, value in tensors.items()}, path)
    path.chmod(0o644)  # safetensors allows only the owner to read


def _fsync(path: Path) -> None:
    """Force a file or folder to the disk, and out of the page cache, so that reading it back reads the disk."""
    if (is_folder := path.is_dir()) and os.name == "nt":  # Windows cannot open folders, and syncs only writable files
        return
    handle = os.open(path, os.O_RDONLY if is_folder else os.O_RDWR)
    try:
        os.fsync(handle)
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(handle)


def _set_aside(folder: Path) -> Path:
    """Rename a checkpoint that is to be removed; its new path."""
    path = folder.with_name(f"{REMOVING}{folder.name}")
    _remove(path)
    return folder.rename(path)


def _remove(path: Path) -> None:
    """Remove a file or folder if it is there; links are not followed."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
