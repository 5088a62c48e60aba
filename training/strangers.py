"""What is asked of a checkpoint's files before anything is made of them, as a stranger may have written them all.

A manifest vouches for a folder's being what was written, not for who wrote it. So nothing is believed: a file's size is
looked at before it is read, a header before the tensors, and the config is held against the header before a model is
built of it. The bounds are far above what `saving.py` writes. Everything that can go wrong is a `UserError`, or one of
the few exceptions that `checkpoint.py` makes one of; nothing here can execute what a file holds.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import stat
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor
from torch.overrides import TorchFunctionMode

from common.errors import CHECKPOINT, UserError, escape_control_chars
from model.config import ModelConfig
from model.gpt import GPT

LARGEST_JSON = 1 << 22
"""Bytes of a state or manifest, and of a safetensors header: a thousand layers take half a megabyte."""
LARGEST_CACHE = 1 << 32
"""Bytes of one text's keys and values that any model may ask for."""
CACHE_TO_WEIGHTS = 16
"""How many times the bytes of its weights they may be; GPT-2 124M has 0.15 times at its 1,024 tokens."""

Kind = TypeVar("Kind")
Shapes = dict[str, tuple[int, ...]]


def plain(value: object, kind: type[Kind]) -> Kind:
    """The value, if it is of just that type: True is no int.

    Raises:
        TypeError: if it is not.
    """
    if type(value) is not kind:
        raise TypeError(f"{kind.__name__} expected, {type(value).__name__} found")
    return value


def require_small(path: Path, size: int) -> None:
    """Raises ValueError for a JSON text of so many bytes that it can only be meant to fill the memory."""
    if size > LARGEST_JSON:
        raise ValueError(f"{path.name} has {size} bytes of JSON, more than a checkpoint's can have")


def read_json(path: Path) -> Any:
    """A JSON file of bounded size.

    Raises:
        ValueError: if it is no JSON, or absurdly large, or no plain file.
        OSError: if it can't be read.
    """
    found = path.lstat()
    if not stat.S_ISREG(found.st_mode):
        raise ValueError(f"{path.name} is no file of its own (a link, or something else)")
    require_small(path, found.st_size)
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except RecursionError as error:
        raise ValueError(f"{path.name} is nested too deeply") from error


def read_shapes(path: Path) -> Shapes:
    """The shapes of a safetensors file's tensors by name; their bytes are not read.

    Raises:
        UserError: if it is no such file, or holds other numbers than fp32 (exit code 4).
    """
    try:
        if not stat.S_ISREG(path.lstat().st_mode):
            raise ValueError("it is no file of its own (a link, or something else)")
        with path.open("rb") as file:
            require_small(path, int.from_bytes(file.read(8), "little"))
        with safe_open(path, "pt", backend="pread") as file:
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
            others = [name for name, found in slices.items() if found.get_dtype() != "F32"]
            if others:
                raise ValueError(f"{escape_control_chars(others[0])} is {slices[others[0]].get_dtype()} and not F32")
            return {name: tuple(found.get_shape()) for name, found in slices.items()}
    except (SafetensorError, OSError, ValueError) as error:
        raise UserError(
            f"{escape_control_chars(path)} is no safetensors file of a checkpoint: {escape_control_chars(reason(error))}",
            CHECKPOINT,
        ) from error


def reason(error: Exception) -> str:
    """Why a file could not be read, in one line."""
    return (error.strerror if isinstance(error, OSError) else None) or (str(error).splitlines() or [""])[0]


def read_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file, in memory of their own.

    A mapped file (the library's default) would end the process with SIGBUS once it shrinks, or is rotated out on a
    network's disk.

    Raises:
        UserError: if it is none, or holds a number that is not finite (exit code 4).
    """
    read_shapes(path)
    try:
        found = load_file(path, backend="pread")
    except (SafetensorError, OSError, ValueError) as error:
        raise UserError(
            f"{escape_control_chars(path)} cannot be read: {escape_control_chars(reason(error))}", CHECKPOINT
        ) from error
    if (name := not_finite(found)) is not None:
        raise UserError(
            f"{escape_control_chars(path)} holds a number that is not finite, in {escape_control_chars(name)}: take another checkpoint",
            CHECKPOINT,
        )
    return found


def not_finite(tensors: Mapping[str, Tensor]) -> str | None:
    """The name of the first tensor with an infinity or NaN in it; None where every number is finite.

    A sum is finite only if everything in it is, and costs a hundredth of looking at each number. The sum of large
    numbers may overflow where none of them has, so that a second look follows where it is not finite.
    """
    for name, value in tensors.items():
        if not value.sum().isfinite() and not value.isfinite().all():
            return name
    return None


class _Undrawn(TorchFunctionMode):
    """Leaves numbers as they are where a layer would draw them."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if getattr(func, "__module__", "") == "torch.nn.init":
            return args[0] if args else (kwargs or {})["tensor"]
        return func(*args, **(kwargs or {}))


@contextlib.contextmanager
def without_memory() -> Iterator[None]:
    """Models made in the body have shapes and no numbers (torch's device `meta`).

    Nothing is drawn for them: torch would import its compiler to draw numbers that are not there, which takes seconds.
    """
    with torch.device("meta"), _Undrawn():
        yield


def shapes_of(config: ModelConfig, vocab_size: int) -> tuple[Shapes, Shapes]:
    """The shapes of a model's parameters, every one once, without memory: outside the blocks, and of one block.

    Raises:
        ValueError: if there can be no such model.
    """
    try:
        with without_memory():
            one = GPT(dataclasses.replace(config, n_layers=1, attention="eager"), vocab_size)
    except (RuntimeError, TypeError, OverflowError) as error:  # sizes that no number of torch's holds
        raise ValueError("its sizes are absurd") from error
    shapes = {name: tuple(parameter.shape) for name, parameter in one.named_parameters()}
    block = {name: shape for name, shape in shapes.items() if name.startswith("blocks.0.")}
    return {name: shape for name, shape in shapes.items() if name not in block}, block


def expected_shape(name: str, config: ModelConfig, outside: Shapes, block: Shapes) -> tuple[int, ...] | None:
    """The shape of the parameter of that name; None if the model has none."""
    part, _, rest = name.partition(".")
    layer, _, rest = rest.partition(".")
    if part == "blocks" and layer.isdecimal() and str(int(layer[:18])) == layer and int(layer) < config.n_layers:
        return block.get(f"blocks.0.{rest}")
    return outside.get(name)


def check_weights(path: Path, config: ModelConfig, vocab_size: int) -> None:
    """Hold a config against the header of the weights: every name and shape, before anything is built.

    Raises:
        UserError: if they are not those of one model (exit code 4).
    """
    found = read_shapes(path)
    try:
        outside, block = shapes_of(config, vocab_size)
        if len(found) != (count := len(outside) + config.n_layers * len(block)):
            raise ValueError(f"it holds {len(found)} tensors instead of {count}")
        for name, shape in found.items():
            if shape != (wanted := expected_shape(name, config, outside, block)):
                raise ValueError(f"{name} has shape {shape} instead of {wanted}")
    except ValueError as error:
        raise UserError(
            f"{escape_control_chars(path)} does not fit the config beside it: {escape_control_chars(error)}", CHECKPOINT
        ) from error


def check_moments(path: Path, config: ModelConfig, vocab_size: int) -> None:
    """Hold the optimizer's moments against the model: each a scalar, or of the shape of a parameter.

    Raises:
        UserError: if one is not (exit code 4).
    """
    outside, block = shapes_of(config, vocab_size)
    for name, shape in read_shapes(path).items():
        wanted = expected_shape(name.partition("/")[0], config, outside, block)
        if wanted is None or shape not in ((), wanted):
            raise UserError(
                f"{escape_control_chars(path)} does not fit the model: {escape_control_chars(name)} has shape {shape} instead of {wanted}",
                CHECKPOINT,
            )


def check_cache(path: Path, config: ModelConfig) -> None:
    """Bound the context. With rotary positions no tensor shows it, but `KVCache` takes memory for all of it at once.

    Raises:
        UserError: if one text's keys and values would dwarf the model (exit code 4).
    """
    asked = 2 * 4 * config.n_layers * config.n_kv_heads * config.d_head * config.context
    if asked > max(LARGEST_CACHE, CACHE_TO_WEIGHTS * path.stat().st_size):
        raise UserError(
            f"the config beside {escape_control_chars(path)} has a context of {config.context:,} tokens, whose keys and values "
            f"would take {asked / 1e9:,.0f} GB: it is damaged or hostile; take another checkpoint",
            CHECKPOINT,
        )
