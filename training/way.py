"""The way that a run takes on a machine: number format, face of attention, threads; and what was found of it, kept."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from model.config import ATTENTION_IMPLEMENTATIONS, ModelConfig
from training.config import RunConfig
from training.device import DistContext

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class Way:
    """How products are computed, in the words of the command line."""

    dtype: str
    attention: str
    threads: int

    def machine(self, machine: DistContext) -> DistContext:
        """The machine in this number format; a processor's threads are set."""
        if machine.device.type == "cpu" and torch.get_num_threads() != self.threads:
            torch.set_num_threads(self.threads)
        return replace(machine, dtype=DTYPES[self.dtype])

    def model(self, config: ModelConfig) -> ModelConfig:
        """The model with this face of attention."""
        return replace(config, attention=self.attention)  # type: ignore[arg-type]

    def apart_from(self, other: Way) -> str:
        """What is different, in words, such as `fp32 fused`."""
        words = [self.dtype] * (self.dtype != other.dtype) + [self.attention] * (self.attention != other.attention)
        if self.threads != other.threads:
            words.append(f"{self.threads} thread{'s' * (self.threads != 1)}")
        return " ".join(words)


@dataclass(frozen=True)
class Choice:
    """The way taken, and what the others would have cost."""

    way: Way
    token: float
    """Seconds of a token in training, forward and backward."""
    others: Mapping[str, float] = field(default_factory=dict)
    """How many times as long other ways took, by what is different in them; empty where nothing was measured."""

    def seconds(self, config: RunConfig, world: int) -> float:
        """Of all the steps of a run, about."""
        return self.token * config.train.steps * config.train.batch_size * config.model.context / world

    def said(self) -> str:
        """The other ways in words: `; measured beside it: fused 1.4 x the time`; nothing where none was tried."""
        if not self.others:
            return ""
        others = ", ".join(f"{name} {times:.2g} x" for name, times in self.others.items())
        return f"; measured beside it: {others} the time"


def parsed(text: str) -> Choice:
    """A choice from its JSON.

    Raises:
        ValueError, KeyError, TypeError, AttributeError: if it is none.
    """
    table: dict[str, Any] = json.loads(text)
    way = Way(table["way"]["dtype"], table["way"]["attention"], int(table["way"]["threads"]))
    others = {str(name): float(times) for name, times in table["others"].items()}
    if (
        way.dtype not in DTYPES
        or way.attention not in ATTENTION_IMPLEMENTATIONS
        or way.threads < 1
        or not all(map(str.isprintable, others))
    ):
        raise ValueError("no way that can be taken")
    return Choice(way, float(table["token"]), others)


def recall(path: Path, threads: int) -> Choice | None:
    """What was found before; None where nothing was, or nothing that `threads` threads can do."""
    try:
        choice = parsed(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
    return choice if choice.way.threads <= threads else None


def remember(path: Path, choice: Choice) -> None:
    """Keep what was found. Where that can't be, the next run measures again."""
    temporary = path.with_suffix(f".{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_text(json.dumps(asdict(choice)), encoding="utf-8")
        temporary.replace(path)
    except OSError:
        return
