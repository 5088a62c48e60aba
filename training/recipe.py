"""The recipe of an own text: what its size and script decide unless the user does. Imports no torch."""

import contextlib
import math
import os
from collections.abc import Iterable
from pathlib import Path

from training.config import RunConfig, option_names

RECIPES = (
    (200_000, 512, 0.2, 2.0, 30),
    (500_000, 1024, 0.2, 0.5, 30),
    (1_000_000, 1024, 0.0, 0.5, 20),
    (2_000_000, 2048, 0.0, 0.5, 20),
    (10_000_000, 2048, 0.0, 0.2, 20),
    (math.inf, 4096, 0.0, 0.3, 20),
)
"""Below so many bytes of text: vocabulary, dropout, weight decay, and the most epochs that are worth training.

A small text is repeated often, which overfits without dropout and strong weight decay, and has few examples of each token.
Measured on texts up to 55 MB (benchmarks/NOTES.md)."""
PACKED = 3  # bytes of text in a byte of a compressed file, about
MANY_CHARACTERS, SAMPLE_BYTES = 1000, 200_000
"""A text with more different characters at its start, as Chinese and Japanese have, is encoded by character."""


def has_many_characters(files: Iterable[Path], encoding: str) -> bool:
    """Whether the largest file begins with more than `MANY_CHARACTERS` different ones, of two bytes or more on average."""
    from data.text_copy import find_codec

    with contextlib.suppress(OSError), max(files, key=lambda file: file.stat().st_size).open("rb") as largest:
        start = largest.read(SAMPLE_BYTES)
        text = start.decode(find_codec(start, encoding), "ignore")
        return len(set(text)) > MANY_CHARACTERS and len(text.encode(errors="ignore")) > 2 * len(text)
    return False


def read_recipe(config: RunConfig, argv: list[str]) -> tuple[list[str], float, str]:
    """The options that an own text gets by its size, before those of `argv`; the most epochs to plan; the size in words.

    With a config file, a named corpus or a run to resume: none, infinity, "". Raises UserError if there is no such text (3).
    """
    from data.corpora import NAMED
    from data.text_files import COMPRESSED, find_files

    has_file = bool(argv) and not argv[0].startswith("-")
    if has_file or config.run.resume or config.data.source in NAMED:
        return [], math.inf, ""
    files, given = find_files(config.data.source, config.data.encoding), option_names(argv)
    packed = (*COMPRESSED, ".parquet")
    n_bytes = sum(path.stat().st_size * (PACKED if path.suffix.lower() in packed else 1) for path in files)
    vocab_size, dropout, weight_decay, epochs = next(row[1:] for row in RECIPES if n_bytes < row[0])
    options = [f"--model.dropout={dropout}", f"--optim.weight_decay={weight_decay}"]
    if not given & {"data.vocab_size", "data.tokenizer"} and has_many_characters(files, config.data.encoding):
        options.insert(0, "--data.tokenizer=char")
    else:
        options.insert(0, f"--data.vocab_size={vocab_size}")
    if "train.steps" not in given and os.environ.get("WORLD_SIZE", "1") == "1":
        options.append("--train.minutes=2")
    return options, epochs, f"{n_bytes / 1e6:,.1f} MB" if n_bytes >= 999_500 else f"{math.ceil(n_bytes / 1e3)} kB"


def describe(config: RunConfig, epochs: float, size: str) -> str:
    """The line that is printed: `recipe  70 kB of text: vocabulary 512, dropout 0.2, weight decay 2, at most 30 epochs`."""
    is_bpe = config.data.tokenizer == "bpe"
    parts = [f"vocabulary {config.data.vocab_size}" if is_bpe else f"tokenizer {config.data.tokenizer}"]
    parts += [f"dropout {config.model.dropout:g}", f"weight decay {config.optim.weight_decay:g}"]
    parts += [f"at most {epochs:g} epochs"] if config.train.minutes else []
    return f"recipe  {size} of text: {', '.join(parts)}"
