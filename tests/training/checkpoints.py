"""Checkpoints of a tiny model for the tests, written as a run writes them, and forged as a stranger would."""

from __future__ import annotations

import contextlib
import hashlib
import json
import resource
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor
from training.saving import CheckpointWriter

from data.tokenizer import ByteTokenizer
from model.config import ModelConfig
from model.gpt import GPT
from training.checkpoint import FILES, MANIFEST, RunEnvironment, TrainState, model_weights
from training.config import RunConfig

SHAPE = ModelConfig(n_layers=2, n_heads=2, d_model=16, context=8, attention="eager")
ENVIRONMENT = RunEnvironment(True, "a corpus", {"device": "cpu", "threads": "1"})


def tensors(seed: int = 0) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Weights and moments of an untrained model."""
    weights = model_weights(GPT(SHAPE, ByteTokenizer().vocab_size, seed))
    moments = {f"{name}/exp_avg": value / 2 for name, value in weights.items()}
    return weights, {**moments, **{f"{name}/step": torch.tensor(3.0) for name in weights}}


def write(
    saver: CheckpointWriter, step: int, best: int | None = None, seed: int = 0, config: RunConfig | None = None
) -> Path:
    """A checkpoint, as soon as it is there: it may be verified after that."""
    state = TrainState(step, best_loss=None if best is None else 1.0, best_step=best or 0)
    config = config or RunConfig(model=SHAPE)
    return saver.save(config, state, *tensors(seed), ByteTokenizer(), ByteTokenizer().vocab_size, ENVIRONMENT)


def saved(run: Path, step: int = 3) -> Path:
    """A checkpoint, verified."""
    saver = CheckpointWriter(run, 9)
    folder = write(saver, step, step)
    saver.finish()
    return folder


def changed(folder: Path, **sections: dict[str, object] | object) -> None:
    """Change entries of `state.json`: of a section (`state`, `origin`), or of one of the config's (`model`)."""
    path = folder / "state.json"
    saved = json.loads(path.read_text())
    for name, entries in sections.items():
        if isinstance(entries, dict):
            (saved["config"] if name in saved["config"] else saved)[name].update(entries)
        else:
            saved[name] = entries
    path.write_text(json.dumps(saved))
    vouch(folder)


@contextlib.contextmanager
def bounded_memory(more: int = 1 << 30) -> Iterator[None]:
    """Let this process take no more than so many bytes beyond what it has."""
    now = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    before, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (now + more, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (before, hard))


def vouch(folder: Path) -> None:
    """Write a manifest that vouches for whatever lies there."""
    contents = {name: (folder / name).read_bytes() for name in FILES}
    files = {n: {"bytes": len(c), "sha256": hashlib.sha256(c).hexdigest()} for n, c in contents.items()}
    (folder / MANIFEST).write_text(json.dumps({"format": 1, "files": files}))
