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

from inspection import dump
from inspection.capture import capture_batch
from inspection.figures import head_grid
from inspection.probes import Probe, examine, sentence
from inspection.words import token_text
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

    def report(self, picture: Path) -> list[str]:
        """Draw every head on the first text into `picture`; what the heads read, in words."""
        name, tokens = self.texts[0]
        seen = capture_batch(self.model, [tokens])[0]
        labels = [token_text(self.token_bytes(token)) for token in tokens]
        head_grid(picture, seen.pattern.numpy(), labels, f"what each head reads: {name}")
        return sentence(examine(self.model, self.probes)) if self.probes else []


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
