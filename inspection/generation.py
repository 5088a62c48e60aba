"""Attention while the model writes: for each token the reading that produced the one after it.

Around `model.generate.generate`, with or without its cache: hooks keep the newest rows of each step and throw the rest
away. The result is written as an attention file like any other.

A text that outgrows the context is read through a window, whose older half is let go each time it is full
(`model.generate.window_start`). Query i keeps the row with which it was the newest token, zero outside the window of
that moment; the file's metadata says under `windows` which window that was, as a JSON list of [first query, start].
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from torch import Tensor

from common.errors import CONFIG, DISK_OR_MEMORY, UserError
from inspection import attention_file as dump
from inspection import record
from inspection.activation_cache import eager_attention, hooks, likeliest, value_norms
from inspection.attention_file import DTYPES
from model.config import ModelConfig
from model.generate import window_start
from model.gpt import GPT, Block

SUFFIX = ".safetensors"
MOST_BYTES = 2 << 30
"""Of the weights of one text."""
BYTES = {"f16": 2, "f32": 4}


@dataclass(frozen=True)
class Generated:
    """What the readings of one text looked like: L layers, H heads, T tokens."""

    tokens: NDArray[np.int32]
    pattern_tril: NDArray[np.floating[Any]]
    """(L, H, T (T + 1) / 2) weights, as in `dump.AttentionRecord`."""
    value_norms: NDArray[np.float32]
    """(L, H, T), of each position at the moment when it was the newest."""
    loss: NDArray[np.float32]
    top: NDArray[np.int64]
    top_p: NDArray[np.float32]
    windows: list[tuple[int, int]]
    """(first query, where its window and those of the queries after it start)."""


def triangle(T: int) -> int:
    return T * (T + 1) // 2


def check_size(config: ModelConfig, prompt: int, count: int, dtype: str) -> None:
    """Refuse to record `count` tokens after a prompt of so many if their weights would fill the memory.

    L H T (T + 1) / 2 numbers are kept, zeros included.

    Raises:
        UserError: saying how many tokens would fit (exit code 2).
    """
    row, read = config.n_layers * config.n_heads * BYTES[dtype], prompt - window_start(prompt, config.context)
    if row * triangle(read + count) <= MOST_BYTES:
        return
    fitting = int((2 * MOST_BYTES / row) ** 0.5) - 1 - read
    raise UserError(
        f"the weights of {read + count} tokens take {row * triangle(read + count) / 2**30:.1f} GiB, "
        f"more than {MOST_BYTES >> 30}: take --tokens {max(fitting, 0)} or fewer",
        CONFIG,
    )


class Recorder:
    """Keeps the newest rows of each reading. Made by `recording`.

    Args:
        start: the tokens that the model reads before it writes; what lies before the first window is left out.
        count: most tokens that it writes.
        dtype: of the weights that are kept, `f16` or `f32`.
    """

    def __init__(self, model: GPT, start: Sequence[int], count: int, dtype: str) -> None:
        check_size(model.config, len(start), count, dtype)
        self.model, self.start = model, list(start)
        self.begin = window_start(len(start), model.config.context)
        room = len(start) - self.begin + count
        heads = (model.config.n_layers, model.config.n_heads)
        self.pattern_tril = np.zeros((*heads, triangle(room)), dtype=DTYPES[dtype.upper()])
        self.norms = np.zeros((*heads, room), dtype=np.float32)
        self.tokens: list[int] = []
        self.new = 0  # how many of these came with the last reading
        self.loss: list[float] = []
        self.top: list[tuple[NDArray[Any], NDArray[Any]]] = []
        self.windows: list[tuple[int, int]] = []
        self.awaited: Tensor | None = None  # log p of the token that comes next
        self.drawn: list[list[int]] = []
        """What `generate` has yielded; to be filled by the caller, for the last token is drawn but not read."""

    def before(self, module: object, args: tuple[Any, ...]) -> None:
        """The model is about to read: the whole window, or with a cache only what is new in it."""
        (tokens,) = args
        if len(tokens) != 1:
            raise ValueError(f"{len(tokens)} texts; one at a time can be recorded")
        self.new = 1 if self.tokens else len(self.start) - self.begin
        newest = tokens[0, -self.new :].tolist()
        if self.awaited is not None:
            self.loss.append(-float(self.awaited[newest[0]]))
        self.tokens += newest

    def weights(self, layer: int, weights: Float[Tensor, "1 H T S"]) -> None:
        """Keep the rows of the newest queries."""
        T, start = len(self.tokens), len(self.tokens) - weights.shape[-1]
        first = T - self.new
        if not self.windows or self.windows[-1][1] != start:
            self.windows.append((first, start))
        rows = weights[0, :, -self.new :].detach().cpu().numpy()
        for i in range(first, T):
            place = triangle(i)
            self.pattern_tril[layer, :, place + start : place + i + 1] = rows[:, i - first, : i + 1 - start]

    def values(self, layer: int, values: Float[Tensor, "1 H T D"]) -> None:
        """Keep how long the newest values are."""
        out = cast(Block, self.model.blocks[layer]).attention.out.weight
        newest = value_norms(values[:, :, -self.new :].detach(), out.detach())[0]
        self.norms[layer, :, len(self.tokens) - self.new : len(self.tokens)] = newest.cpu().numpy()

    def after(self, module: object, args: object, features: Float[Tensor, "1 T C"]) -> None:
        """The model has read; the head says what may come next, after every new position."""
        newest = self.model.head(features[0, -self.new :]).detach().float().cpu()
        log_p = newest.log_softmax(dim=-1)
        known = torch.tensor(self.tokens[len(self.tokens) - self.new + 1 :], dtype=torch.long)
        self.loss += (-log_p[:-1].gather(1, known[:, None])[:, 0]).tolist()
        top, top_p = likeliest(newest)
        self.top.append((top.numpy(), top_p.numpy()))
        self.awaited = log_p[-1]

    @torch.no_grad()
    def finish(self) -> None:
        """Read what was drawn last, or, if nothing was, the beginning."""
        text = self.start + [tokens[0] for tokens in self.drawn]
        if len(text) - self.begin > len(self.tokens):
            window = text[window_start(len(text), self.model.config.context) :]
            self.model(torch.tensor([window], device=self.model.token_embedding.weight.device))

    def generated(self) -> Generated:
        """All that was recorded."""
        T = len(self.tokens)
        top, top_p = (np.concatenate(parts) for parts in zip(*self.top, strict=True))
        return Generated(
            np.array(self.tokens, dtype=np.int32),
            self.pattern_tril[..., : triangle(T)],
            self.norms[..., :T],
            np.array(self.loss, dtype=np.float32),
            top,
            top_p,
            self.windows,
        )


@contextmanager
def recording(model: GPT, start: Sequence[int], count: int, dtype: str = "f16") -> Iterator[Recorder]:
    """Record one text while `generate(model, start, count, ...)` runs in the body, on the explicit face.

    The body appends what is drawn to `drawn`, a list of one token each time. Afterwards the model is as it was.

    Raises:
        UserError: if the weights would fill the memory (exit code 2).
        ValueError: if several texts are written side by side.
    """
    recorder = Recorder(model, start, count, dtype)
    before = model.token_embedding.register_forward_pre_hook(recorder.before)  # what it reads
    after = model.final_norm.register_forward_hook(recorder.after)  # `generate` asks the head for the last one alone
    try:
        with eager_attention(model), hooks(model, recorder.weights, recorder.values):
            yield recorder
            recorder.finish()
    finally:
        before.remove()
        after.remove()


def attention_file(name: str) -> Path:
    """The file that `--attend` names, with its suffix and its folder.

    Raises:
        UserError: if it has another suffix, or is there and holds something else (exit code 2), or its folder can't be
            made (exit code 6).
    """
    path = Path(name)
    if path.suffix not in ("", SUFFIX):
        raise UserError(f"--attend is {name!r}; the weights are written as {SUFFIX}: name it {path.stem}{SUFFIX}")
    if path.is_dir():
        raise UserError(f"--attend is {name!r}, a folder; name a file in it")
    path = path.with_suffix(SUFFIX)
    try:
        if path.exists():
            dump.read_attention_file(path)  # somebody's weights are not to be lost to a slip
        path.parent.mkdir(parents=True, exist_ok=True)
    except UserError as error:
        raise UserError(f"{path} is there and is no attention file; give --attend another name") from error
    except OSError as error:
        raise UserError(f"cannot write into {path.parent}: {error.strerror}", DISK_OR_MEMORY) from error
    return path


def write(path: Path, seen: Generated, token_bytes: Callable[[int], bytes], metadata: Mapping[str, str]) -> None:
    """Write the recorded text, named "sample", as an attention file.

    Raises:
        UserError: if the file cannot be written (exit code 6).
    """
    ours = {"windows": json.dumps(seen.windows), "versions": record.package_versions()}
    dtype = {2: "f16", 4: "f32"}[seen.pattern_tril.itemsize]
    texts = [("sample", seen, [token_bytes(token) for token in seen.tokens.tolist()])]
    record.write_attention_file(path, texts, {**metadata, **ours}, dtype, token_bytes=token_bytes)
