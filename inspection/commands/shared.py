"""What the commands of `attend.py` share. A command is a dataclass of its options, with a method `result`."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from tyro.conf import Positional

from common.errors import CONFIG, UserError
from inspection.attention_file import LoadedModel
from inspection.terminal import head_name

HEAD = r"L\d{1,6}H\d{1,6}"
LEAST = {"step": -1, "against": -1, "position": -1, "seed": 0, "top": 1, "tokens": 1, "port": 0}  # -1 is a default


@dataclass(frozen=True)
class RunOptions:
    """Options of a command on a run."""

    run: Positional[str]  # A run folder, one of its checkpoints, or an attention file.

    def problems(self) -> list[str]:
        """One line for each invalid value."""
        values = {name: value for name in LEAST if isinstance(value := getattr(self, name, None), int)}
        small = {name: value for name, value in values.items() if value < LEAST[name]}
        problems = [f"--{name} is {value}; it must be at least {LEAST[name]}" for name, value in small.items()]
        if (head := getattr(self, "head", "")) and not re.fullmatch(HEAD, head):
            problems.append(f"--head is {head!r}; it must be a layer and a head, such as L1H2")
        return problems


@dataclass(frozen=True)
class OutputOptions(RunOptions):
    """Options of a command that prints text or JSON."""

    json: bool = False  # Print JSON instead of text.


@dataclass(frozen=True)
class DeviceOptions(RunOptions):
    """Options of a command that loads the model."""

    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    """Where to compute; `auto` is a CUDA GPU if there is one, else the CPU."""


@dataclass(frozen=True)
class Result:
    """What a command prints."""

    lines: list[str]
    data: dict[str, Any] = field(default_factory=dict)  # For `--json`.
    ok: bool = True  # False if a check failed: the result is printed, then the exit code is 4.


@dataclass(frozen=True)
class Context:
    """What `attend.py` hands to a command."""

    width: int  # Of the terminal, in columns.
    load_model: Callable[[Path, str], LoadedModel]
    """(checkpoint, or run folder, and `best`, `last` or a step) -> the model; `UserError` if there is none."""


def parse_head(name: str, shape: tuple[int, int]) -> tuple[int, int]:
    """`L1H2` as (layer, head); `UserError` if a model of that shape (layers, heads) has no such head (exit code 2)."""
    layer, head = map(int, re.findall(r"\d+", name))
    if layer >= shape[0] or head >= shape[1]:
        last = head_name(shape[0] - 1, shape[1] - 1)
        raise UserError(f"there is no head {name}; the model has L0H0 to {last}", CONFIG)
    return layer, head


def parse_heads(names: Iterable[str], shape: tuple[int, int]) -> list[tuple[int, int]]:
    """Names such as `L1H2` as (layer, head), each once; `UserError` if one names no head of the model (exit code 2)."""
    chosen = list(names)
    for name in chosen:
        if not re.fullmatch(HEAD, name):
            raise UserError(f"{name!r} is not a head; name a layer and a head, such as L1H2", CONFIG)
    return list(dict.fromkeys(parse_head(name, shape) for name in chosen))
