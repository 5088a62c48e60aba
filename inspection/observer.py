"""What is watched while a model learns: the same texts at every evaluation, and, at the end, what its heads read.

The texts never change during a run, so that two of its dumps differ by the model alone.
"""

from __future__ import annotations

import json
import platform
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from inspection import dump
from inspection.capture import capture_batch
from inspection.figures import head_grid, one_head
from inspection.probes import Probe, examine, sentence
from inspection.words import head_name, token_text
from model.gpt import GPT


class Observer:
    """Writes a dump of fixed texts whenever it is asked, and says what the heads read.

    Args:
        model: is read at each call, in whatever state it then is.
        texts: (name, tokens) of each text, at most `context` tokens long.
        probes: questions with a right and a wrong answer; may be empty.
        token_bytes: the bytes of a token.
        folder: where dumps go, as `000400.safetensors`.
    """

    def __init__(
        self,
        model: GPT,
        texts: Sequence[tuple[str, Sequence[int]]],
        probes: Sequence[Probe],
        token_bytes: Callable[[int], bytes],
        folder: Path,
    ) -> None:
        self.model, self.texts, self.probes = model, texts, probes
        self.token_bytes, self.folder = token_bytes, folder

    def write(self, step: int, metadata: Mapping[str, str]) -> Path:
        """Write the dump of a step; its path."""
        path = self.folder / f"{step:06d}.safetensors"
        write_dump(path, self.model, self.texts, self.token_bytes, metadata)
        return path

    def report(self, folder: Path) -> tuple[list[str], list[Path]]:
        """What the heads read: in words, and as pictures in `folder`.

        `attention.png` has every head on the first text; `head.png`, where a head passes, the one that reads what
        decides most surely, at the place where the answer is due.
        """
        name, tokens = self.texts[0]
        picture = folder / "attention.png"
        head_grid(picture, self.pattern(tokens), self.labels(tokens), f"what each head reads: {name}")
        readings = examine(self.model, self.probes)
        passed = [reading for reading in readings if reading.passes]
        if not passed:
            return sentence(readings) if readings else [], [picture]
        best = max(passed, key=lambda reading: reading.weight)
        probe = next(probe for probe in self.probes if probe.kind == best.kind)
        layer, head = best.head
        title = f"{head_name(layer, head)} where an answer is due: {best.kind}"
        last = len(probe.tokens) - 1
        one_head(folder / "head.png", self.pattern(probe.tokens)[layer, head], self.labels(probe.tokens), title, last)
        return sentence(readings), [picture, folder / "head.png"]

    def pattern(self, tokens: Sequence[int]) -> NDArray[np.float32]:
        """The weights (L, H, T, T) while the model reads `tokens`."""
        weights: NDArray[np.float32] = capture_batch(self.model, [tokens])[0].pattern.numpy()
        return weights

    def labels(self, tokens: Sequence[int]) -> list[str]:
        """Each token as it may be shown."""
        return [token_text(self.token_bytes(token)) for token in tokens]


def write_dump(
    path: Path,
    model: GPT,
    texts: Sequence[tuple[str, Sequence[int]]],
    token_bytes: Callable[[int], bytes],
    metadata: Mapping[str, str],
    dtype: str = "f16",
) -> None:
    """Capture texts and write them as one attention file, with the versions of what computed them.

    Raises:
        UserError: if the file cannot be written (exit code 6).
    """
    seen = capture_batch(model, [tokens for _, tokens in texts])
    rows = [
        (name, one, [token_bytes(token) for token in tokens]) for (name, tokens), one in zip(texts, seen, strict=True)
    ]
    versions = {"python": platform.python_version(), "torch": torch.__version__, "numpy": np.__version__}
    dump.write(path, rows, {**metadata, "versions": json.dumps(versions)}, dtype)
