"""Checkpoints: written whole or not at all, verified before older ones are removed, checked when they are read.

    checkpoints/000400/            model.safetensors optimizer.safetensors state.json vocabulary.json manifest.json
    checkpoints/.writing-000400    is being written
    checkpoints/.removing-000100   is being removed, or replaced by another checkpoint of that step

A checkpoint is written to a temporary folder; each file is fsynced, then `manifest.json`, which lists their sizes and
sha256, then the folder, which is then renamed into place and read back from the disk. There is no pickle and no "latest"
pointer: the newest folder that verifies is the latest. Reading assumes nothing about who wrote the files: only JSON and
safetensors, sizes bounded before memory is allocated, and exactly the names and shapes of the model.

Every change of the disk is announced as the audit event `glassgpt.disk` (operation, path); the fault tests use it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import math
import os
import re
import shutil
import stat
import sys
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.overrides import TorchFunctionMode

from common.errors import CHECKPOINT, DISK_OR_MEMORY, NON_FINITE, UserError, escape_control_chars
from data.tokenizer import Tokenizer, load_tokenizer
from model.config import ModelConfig
from model.gpt import GPT
from training.config import RunConfig, from_saved
from training.device import DistContext, resolve_attention

MODEL, OPTIMIZER, STATE, VOCABULARY = "model.safetensors", "optimizer.safetensors", "state.json", "vocabulary.json"
FILES = (MODEL, OPTIMIZER, STATE, VOCABULARY)
MANIFEST = "manifest.json"
FORMAT = 1
WRITING, REMOVING = ".writing-", ".removing-"
MAX_JSON_BYTES = 1 << 22
"""Of a state, a manifest or a safetensors header; a model of a thousand layers takes half a megabyte."""
MAX_KV_CACHE_BYTES, MAX_KV_CACHE_RATIO = 1 << 32, 16
"""Bounds of the KV cache of a full context, in bytes and relative to the model file. GPT-2 124M needs 0.15 times."""

Shapes = dict[str, tuple[int, ...]]


@dataclass
class TrainState:
    """Where a run is; everything that is not a tensor."""

    step: int = 0
    tokens_seen: int = 0
    best_loss: float | None = None
    best_step: int = 0
    evals_without_improvement: int = 0
    last_eval_step: int = -1
    skipped_steps: int = 0
    """Steps skipped because their loss or gradient was not finite."""


@dataclass(frozen=True)
class RunEnvironment:
    """What a run was trained on and with."""

    starts_with_eot: bool
    """Whether a text begins with end-of-text: the corpus has several documents, or no line breaks to begin after."""
    corpus: str = ""
    """Fingerprint of the prepared corpus."""
    settings: Mapping[str, str] = field(default_factory=dict)
    """What else decides the last bits of the results: device, dtype, attention, threads, compiled, torch version."""


@dataclass(frozen=True)
class Checkpoint:
    """A verified checkpoint. Its tensors are not read yet. Every method raises UserError (4) if a file is damaged."""

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
        """The parameters by name."""
        return read_tensors(self.folder / MODEL)

    def optimizer_state(self) -> dict[str, Tensor]:
        """The optimizer state, named as by `Optimizer.state_dict`: `parameter/entry`, a scalar or of its shape."""
        path, parameters = self.folder / OPTIMIZER, parameter_shapes(self.config.model, self.vocab_size)
        for name, shape in read_shapes(path).items():
            expected = parameters.get(name.partition("/")[0])
            if expected is None or shape not in ((), expected):
                raise _unusable(path, f"{name} has shape {shape}, the parameter {expected}")
        return read_tensors(path)

    def tokenizer(self) -> Tokenizer:
        """The tokenizer that the model was trained with."""
        path = self.folder / VOCABULARY
        tokenizer = load_tokenizer(path)
        if tokenizer.vocab_size != self.vocab_size:
            raise _unusable(path, f"it has {tokenizer.vocab_size} tokens, the model {self.vocab_size}")
        return tokenizer

    def build_model(self, config: ModelConfig) -> GPT:
        """The saved model on the CPU, with the attention implementation and dropout of `config`."""
        model = _model_without_memory(config, self.vocab_size)
        weights = self.weights()
        model.load_state_dict({**weights, "lm_head.weight": weights["token_embedding.weight"]}, assign=True)
        model.lm_head.weight = model.token_embedding.weight
        return model

    def load_model(self, ctx: DistContext) -> GPT:
        """The saved model on the device, ready for inference."""
        config = resolve_attention(self.config.model, ctx.device, ctx.dtype)
        return self.build_model(config).to(ctx.device).eval()


# ---- reading ----


def open_checkpoint(path: Path) -> Checkpoint:
    """The newest good checkpoint of a run folder, or the one that `path` is. Damaged ones are reported and skipped.

    Raises:
        UserError: if there is no such folder, or no good checkpoint in it (exit code 4).
    """
    shown = escape_control_chars(path)
    try:
        if not path.is_dir():
            raise UserError(
                f"{shown} is not a folder; give a run folder such as runs/quickstart, or one of its checkpoints",
                CHECKPOINT,
            )
        is_checkpoint = (path / MANIFEST).is_file() or (path / STATE).is_file()
        candidates = [path] if is_checkpoint else list_checkpoints(path / "checkpoints")[::-1]
    except OSError as error:
        raise UserError(f"cannot read {shown}: {error.strerror}", CHECKPOINT) from error
    if not candidates:
        raise UserError(f"{shown} has no checkpoint; train one with: python train.py --run.dir {shown}", CHECKPOINT)
    for folder in candidates:
        problem = verify_checkpoint(folder)
        if problem is None:
            try:
                return read_checkpoint(folder)
            except UserError as error:
                if len(candidates) == 1:
                    raise
                problem = str(error)
        print(f"skipping the damaged checkpoint {escape_control_chars(folder)}: {problem}", file=sys.stderr)
    raise UserError(f"no good checkpoint in {shown}; restore one from a backup, or train again", CHECKPOINT)


def list_checkpoints(root: Path) -> list[Path]:
    """The checkpoint folders, oldest step first."""
    folders = [path for path in (root.iterdir() if root.is_dir() else ()) if step_of_folder(path) is not None]
    return sorted((path for path in folders if path.is_dir()), key=lambda path: int(path.name))


def step_of_folder(folder: Path) -> int | None:
    """The step that a checkpoint folder is named after; None for any other name."""
    matched = re.fullmatch(r"[0-9]{6,18}", folder.name)
    return int(matched[0]) if matched and f"{int(matched[0]):06d}" == matched[0] else None


def verify_checkpoint(folder: Path) -> str | None:
    """What is wrong with a checkpoint's files, or None: each is a regular file with the manifest's size and sha256."""
    try:
        listed = _read_json(folder / MANIFEST)["files"]
        for name in FILES:
            path = folder / name
            if not stat.S_ISREG(path.lstat().st_mode):
                return f"{name} is not a regular file"
            if path.stat().st_size != listed[name]["bytes"]:
                return (
                    f"{name} has {path.stat().st_size} bytes instead of {escape_control_chars(listed[name]['bytes'])}"
                )
            if sha256_of_file(path) != listed[name]["sha256"]:
                return f"{name} does not have the sha256 of its manifest"
    except OSError as error:
        return f"{escape_control_chars(Path(error.filename or MANIFEST).name)}: {error.strerror}"
    except (ValueError, KeyError, TypeError) as error:
        return f"its manifest cannot be read ({type(error).__name__})"
    return None


def read_checkpoint(folder: Path) -> Checkpoint:
    """A checkpoint whose files were verified: its state, and that its weights are those of the model it describes.

    Raises:
        UserError: if this version cannot use it, or the folder is named after another step (exit code 4).
    """
    path = folder / STATE
    try:
        saved = _read_json(path)
        if saved["format"] != FORMAT:
            raise ValueError(f"format {saved['format']}, this version reads {FORMAT}")
        state = _checked(TrainState(**saved["state"]))
        environment = _checked(RunEnvironment(**saved["environment"]))
        vocab_size, table = saved["vocab_size"], saved["config"]
        if type(vocab_size) is not int or not 1 <= vocab_size < 1 << 31 or type(table) is not dict:
            raise ValueError("its vocab_size or config is wrong")
        if step_of_folder(folder) not in (None, state.step):
            raise ValueError(f"it holds step {state.step}: rename the folder, or remove it")
    except (ValueError, KeyError, TypeError, OSError) as error:
        raise _unusable(path, error) from error
    checkpoint = Checkpoint(folder, from_saved(table, escape_control_chars(path)), vocab_size, state, environment)
    _check_weights(folder / MODEL, checkpoint.config.model, vocab_size)
    return checkpoint


def _checked(record: Any) -> Any:
    """The record, if each field has the type that it should have; raises ValueError."""
    for name, value in vars(record).items():
        if name == "best_loss":
            good = value is None or (type(value) is float and math.isfinite(value))
        elif name == "starts_with_eot":
            good = type(value) is bool
        elif name == "settings":
            good = type(value) is dict and all(type(entry) is str for entry in value.values())
        elif name == "corpus":
            good = type(value) is str
        else:
            good = type(value) is int and (-1 if name == "last_eval_step" else 0) <= value < 10**18
        if not good:
            raise ValueError(f"{name} is {value!r:.40}")
    return record


class _SkipInit(TorchFunctionMode):
    """Skips `torch.nn.init`: on the meta device it would import torch's compiler, which takes a second."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(func, "__module__", "") == "torch.nn.init":
            return args[0] if args else kwargs["tensor"]
        return func(*args, **(kwargs or {}))


def _model_without_memory(config: ModelConfig, vocab_size: int) -> GPT:
    """A model on the meta device: shapes without numbers."""
    with torch.device("meta"), _SkipInit():
        return GPT(config, vocab_size)


def parameter_shapes(config: ModelConfig, vocab_size: int) -> Shapes:
    """The shape of each parameter of a model; no memory is allocated."""
    model = _model_without_memory(dataclasses.replace(config, attention="eager"), vocab_size)
    return {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}


def _check_weights(path: Path, config: ModelConfig, vocab_size: int) -> None:
    """Compare a config with the header of the weights before a model is built; raises UserError (4)."""
    shapes = read_shapes(path)
    if config.n_layers > len(shapes):
        raise _unusable(path, f"it has {len(shapes)} tensors, the model {config.n_layers} layers")
    try:
        expected = parameter_shapes(config, vocab_size)
    except (RuntimeError, TypeError, OverflowError) as error:  # sizes that overflow torch's integers
        raise _unusable(path, "the sizes in its config are too large") from error
    for name in sorted(shapes.keys() | expected.keys()):
        if shapes.get(name) != expected.get(name):
            raise _unusable(path, f"{name} has shape {shapes.get(name)}, the model {expected.get(name)}")
    # With rotary positions no tensor shows the context, but a KV cache allocates all of it.
    cache_bytes = 2 * 4 * config.n_layers * config.n_kv_heads * config.d_head * config.context
    if cache_bytes > max(MAX_KV_CACHE_BYTES, MAX_KV_CACHE_RATIO * path.stat().st_size):
        raise _unusable(path, f"a context of {config.context:,} tokens would need {cache_bytes / 1e9:,.0f} GB")


def _read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a regular file of bounded size; raises ValueError or OSError."""
    info = path.lstat()
    if not stat.S_ISREG(info.st_mode):
        raise ValueError(f"{path.name} is not a regular file")
    if info.st_size > MAX_JSON_BYTES:
        raise ValueError(f"{path.name} has {info.st_size} bytes of JSON")
    try:
        table = json.loads(path.read_text(encoding="utf-8"))
    except RecursionError as error:
        raise ValueError(f"{path.name} is nested too deeply") from error
    if not isinstance(table, dict):
        raise ValueError(f"{path.name} is not a JSON object")
    return table


def read_shapes(path: Path) -> Shapes:
    """The shapes of the fp32 tensors in a safetensors file, from its header; raises UserError (4)."""
    try:
        if not stat.S_ISREG(path.lstat().st_mode):
            raise ValueError("not a regular file")
        with path.open("rb") as file:
            header_bytes = int.from_bytes(file.read(8), "little")
        if header_bytes > MAX_JSON_BYTES:
            raise ValueError(f"a header of {header_bytes} bytes of JSON")
        with safe_open(path, "pt", backend="pread") as tensors:
            slices = {name: tensors.get_slice(name) for name in tensors.keys()}  # noqa: SIM118
        if wrong := [name for name, tensor in slices.items() if tensor.get_dtype() != "F32"]:
            raise ValueError(f"{wrong[0]} is {slices[wrong[0]].get_dtype()} instead of F32")
        return {name: tuple(tensor.get_shape()) for name, tensor in slices.items()}
    except (SafetensorError, OSError, ValueError) as error:
        raise _unusable(path, error) from error


def read_tensors(path: Path) -> dict[str, Tensor]:
    """The finite fp32 tensors of a safetensors file; raises UserError (4).

    They are read, not mapped: a mapped file that shrinks, or is removed on a network disk, ends the process (SIGBUS).
    """
    read_shapes(path)
    try:
        tensors = load_file(path, backend="pread")
    except (SafetensorError, OSError, ValueError) as error:
        raise _unusable(path, error) from error
    if (name := first_nonfinite(tensors)) is not None:
        raise _unusable(path, f"a number in {name} is not finite")
    return tensors


def _unusable(path: Path, reason: object) -> UserError:
    """The error of a checkpoint file that cannot be used."""
    text = (reason.strerror or "unreadable") if isinstance(reason, OSError) else str(reason).split("\n", 1)[0]
    shown = escape_control_chars(f"{path} cannot be used: {text[:300]}")
    return UserError(f"{shown}; take another checkpoint", CHECKPOINT)


def first_nonfinite(tensors: Mapping[str, Tensor]) -> str | None:
    """The name of the first tensor with an infinity or NaN in it, or None.

    A finite sum proves it for a hundredth of the cost; a sum that overflows needs the second look.
    """
    for name, value in tensors.items():
        if not value.sum().isfinite() and not value.isfinite().all():
            return name
    return None


# ---- hashes ----


def model_weights(model: GPT) -> dict[str, Tensor]:
    """Every parameter once (the LM head is the token embedding); the model's own memory, not a copy."""
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
        "config": json.dumps(dataclasses.asdict(model.config)),
        "vocab_size": str(model.vocab_size),
        "step": str(state.step),
        "tokens_seen": str(state.tokens_seen),
        "weights_sha256": sha256_of_weights(model),
        "tokenizer_sha256": tokenizer.fingerprint(),
    }


def sha256_of_file(path: Path) -> str:
    """The sha256 of a file, read in blocks."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


# ---- writing ----


class CheckpointWriter:
    """Writes the checkpoints of a run and applies its retention: the best and the newest are kept.

    Args:
        run: the run folder, locked by the caller. What a killed process left in `checkpoints` is cleaned up first.
        keep: how many of the newest checkpoints are kept, besides the best.
    """

    def __init__(self, run: Path, keep: int) -> None:
        self.root, self.keep = run / "checkpoints", keep
        with contextlib.suppress(OSError):  # leftovers do no harm
            self.cleanup_tmp()

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

        Raises:
            UserError: if a number is not finite: nothing is written (exit code 5); if the disk is full, cannot be
                written or did not keep the data: earlier checkpoints are as they were (6).
        """
        _check_finite(state, {**weights, **{f"the optimizer state {k}": v for k, v in optimizer_state.items()}})
        final = self.root / f"{state.step:06d}"
        saved = {
            "format": FORMAT,
            "vocab_size": tokenizer.vocab_size,
            "environment": dataclasses.asdict(environment),
            "state": dataclasses.asdict(state),
            "config": dataclasses.asdict(config),
        }
        texts = {STATE: json.dumps(saved, indent=1).encode(), VOCABULARY: tokenizer.to_json()}
        temporary = self.root / f"{WRITING}{final.name}"
        try:
            _make_folder(temporary)
            _write_files(temporary, {MODEL: weights, OPTIMIZER: optimizer_state}, texts)
            self._rename_into_place(temporary, final)
        except (OSError, SafetensorError) as error:
            with contextlib.suppress(OSError):
                _remove(temporary)
            reason = (isinstance(error, OSError) and error.strerror) or str(error)
            raise UserError(
                f"cannot write the checkpoint {escape_control_chars(final)}: {escape_control_chars(reason)}; earlier "
                "checkpoints are unchanged: free some space, then continue with --run.resume",
                DISK_OR_MEMORY,
            ) from error
        self.apply_retention(state.step, state.step if state.best_loss is None else state.best_step)
        return final

    def _rename_into_place(self, temporary: Path, final: Path) -> None:
        """Give a finished folder its name and read it back. What it replaces is kept until then; raises OSError."""
        previous = self.root / f"{REMOVING}{final.name}"
        if final.is_symlink() or final.exists():
            _remove(previous)
            _rename(final, previous)
        try:
            _rename(temporary, final)
            _fsync(self.root)
            if problem := _read_back(final):
                raise OSError(f"the disk did not keep what was written: {problem}")
        except OSError:
            if final.exists():
                _rename(final, temporary)
            if previous.exists():
                _rename(previous, final)
            raise

    def apply_retention(self, step: int, best: int) -> None:
        """Remove all checkpoints up to `step` but the newest `keep`, `step` itself and `best`; a failure is a warning.

        Later ones can only be left from before a resume that skipped them as damaged: they are replaced in their turn.
        """
        past = [folder for folder in list_checkpoints(self.root) if int(folder.name) <= step]
        unwanted = [folder for folder in past[: -self.keep] if int(folder.name) not in (step, best)]
        try:
            _remove(self.root / f"{REMOVING}{step:06d}")
            for folder in unwanted:  # renamed first: a folder with a step's name is never incomplete
                removing = folder.with_name(f"{REMOVING}{folder.name}")
                _remove(removing)
                _rename(folder, removing)
                _remove(removing)
        except OSError as error:
            reason = escape_control_chars(f"{self.root}: {error.strerror or error}")
            print(f"cannot remove an old checkpoint from {reason}", file=sys.stderr, flush=True)

    def cleanup_tmp(self) -> None:
        """Remove what a killed process left under a temporary name; a complete checkpoint gets its name instead."""
        for path in sorted(self.root.iterdir(), reverse=True) if self.root.is_dir() else ():
            if path.name.startswith((WRITING, REMOVING)):
                final = self.root / path.name.removeprefix(WRITING).removeprefix(REMOVING)
                if not final.exists() and step_of_folder(final) is not None and verify_checkpoint(path) is None:
                    _rename(path, final)
                    _fsync(self.root)
                else:
                    _remove(path)


def _check_finite(state: TrainState, tensors: Mapping[str, Tensor]) -> None:
    """Refuse to save a state that training could not continue from.

    Raises:
        UserError: naming the first tensor with a number that is not finite, or the best loss (exit code 5).
    """
    name = first_nonfinite(tensors) if math.isfinite(state.best_loss or 0.0) else "the best loss"
    if name is not None:
        raise UserError(
            f"a number in {escape_control_chars(name)} is not finite: nothing was saved, earlier checkpoints are "
            "unchanged; continue from them with --run.resume and a lower optim.lr",
            NON_FINITE,
        )


def _write_files(folder: Path, tensors: Mapping[str, Mapping[str, Tensor]], texts: Mapping[str, bytes]) -> None:
    """Write the files, then a manifest of their sizes and sha256, each forced to the disk; then the folder."""
    for name, table in tensors.items():
        assert all(value.dtype == torch.float32 for value in table.values()), "checkpoints hold only fp32"
        _announce("write", folder / name)
        save_file({key: value.detach().cpu().contiguous() for key, value in table.items()}, folder / name)
        (folder / name).chmod(0o644)
    for name, text in texts.items():
        _announce("write", folder / name)
        (folder / name).write_bytes(text)
    for name in FILES:
        _fsync(folder / name)
    with ThreadPoolExecutor(len(FILES)) as pool:
        hashes = list(pool.map(sha256_of_file, [folder / name for name in FILES]))
    files = {
        name: {"bytes": (folder / name).stat().st_size, "sha256": sha256}
        for name, sha256 in zip(FILES, hashes, strict=True)
    }
    _announce("write", folder / MANIFEST)
    (folder / MANIFEST).write_text(json.dumps({"format": FORMAT, "files": files}, indent=1))
    _fsync(folder / MANIFEST)
    _fsync(folder)


def _read_back(folder: Path) -> str | None:
    """Verify a checkpoint from the disk rather than from the page cache, where the system allows it."""
    for name in FILES if hasattr(os, "posix_fadvise") else ():
        handle = os.open(folder / name, os.O_RDONLY)
        os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(handle)
    return verify_checkpoint(folder)


# ---- operations on the disk, each announced ----


def _announce(operation: str, path: Path) -> None:
    sys.audit("glassgpt.disk", operation, str(path))


def _make_folder(folder: Path) -> None:
    """An empty folder, and its parent."""
    if not folder.parent.is_dir():
        _announce("mkdir", folder.parent)
        folder.parent.mkdir(parents=True)
        _fsync(folder.parent.parent)
    _remove(folder)
    _announce("mkdir", folder)
    folder.mkdir()


def _fsync(path: Path) -> None:
    _announce("fsync", path)
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _rename(old: Path, new: Path) -> None:
    _announce("rename", old)
    old.rename(new)


def _remove(path: Path) -> None:
    """Remove a file or folder if it is there; links are not followed."""
    if not (path.exists() or path.is_symlink()):
        return
    _announce("remove", path)
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink()
