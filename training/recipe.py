"""The recipe of an own text: what its size decides unless the user does. Imports no torch."""

import math
import os

from training.config import RunConfig, option_names

RECIPES = (
    (200_000, 512, 0.2, 2.0, 30),
    (1_000_000, 1024, 0.2, 0.5, 30),
    (10_000_000, 2048, 0.0, 0.5, 20),
    (math.inf, 4096, 0.0, 0.1, 20),
)
"""Below so many bytes of text: vocabulary, dropout, weight decay, and the most epochs that are worth training.

A small text is repeated often, which overfits without dropout and strong weight decay, and has few examples of each token.
Measured on five texts up to 4 MB (benchmarks/NOTES.md); the last row is not."""


def recipe(n_bytes: int) -> tuple[int, float, float, int]:
    """Vocabulary, dropout, weight decay and epochs for a text of so many bytes."""
    return next(row[1:] for row in RECIPES if n_bytes < row[0])


def read_recipe(config: RunConfig, argv: list[str]) -> tuple[list[str], float, str]:
    """The options that an own text gets by its size, before those of `argv`; the most epochs to plan; the size in words.

    With a config file, a named corpus or a run to resume: none, infinity, "". Raises UserError if there is no such text (3).
    """
    from data.corpora import NAMED
    from data.text_files import find_files

    has_file = bool(argv) and not argv[0].startswith("-")
    if has_file or config.run.resume or config.data.source in NAMED:
        return [], math.inf, ""
    n_bytes = sum(path.stat().st_size for path in find_files(config.data.source))
    vocab_size, dropout, weight_decay, epochs = recipe(n_bytes)
    options = [f"--data.vocab_size={vocab_size}", f"--model.dropout={dropout}", f"--optim.weight_decay={weight_decay}"]
    if "train.steps" not in option_names(argv) and os.environ.get("WORLD_SIZE", "1") == "1":
        options.append("--train.minutes=2")
    return options, epochs, f"{n_bytes / 1e6:,.1f} MB" if n_bytes >= 999_500 else f"{math.ceil(n_bytes / 1e3)} kB"


def describe(config: RunConfig, epochs: float, size: str) -> str:
    """The line that is printed: `recipe  70 kB of text: vocabulary 512, dropout 0.2, weight decay 2, at most 30 epochs`."""
    parts = [f"vocabulary {config.data.vocab_size}"] if config.data.tokenizer == "bpe" else []
    parts += [f"dropout {config.model.dropout:g}", f"weight decay {config.optim.weight_decay:g}"]
    parts += [f"at most {epochs:g} epochs"] if config.train.minutes else []
    return f"recipe  {size} of text: {', '.join(parts)}"
