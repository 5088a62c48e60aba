"""What can be set about the data. Free of torch, so that a mistyped option is answered at once."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class DataConfig:
    """Where text comes from and how it becomes tokens."""

    source: str = "stories"
    """`stories`, `repeats`, `shakespeare`, a text file, a folder, or a glob such as 'texts/*.txt'."""
    tokenizer: str = "bpe"
    """`char`, `byte`, `bpe` (trained on the corpus), or a tiktoken encoding such as `gpt2` or `cl100k_base`."""
    vocab_size: int = 1024
    """Size of a trained `bpe` vocabulary, the 256 bytes and the end-of-text token included."""
    val_fraction: float = 0.1
    """Share of the text that is held out: whole documents where there are several, else the tail. A named corpus has
    its own."""
    workers: int = 0
    """Processes that encode a large corpus; 0 takes one for each core."""

    def problems(self) -> list[str]:
        """What is wrong with these values, a line each; empty when all is well."""
        found = []
        if not self.source:
            found.append("data.source is empty; name a corpus, a file, a folder or a glob")
        if not 257 <= self.vocab_size <= 1_000_000:
            found.append(f"data.vocab_size is {self.vocab_size}; it must lie between 257 and 1,000,000")
        if not 0 < self.val_fraction < 1:
            found.append(f"data.val_fraction is {self.val_fraction}; it must lie between 0 and 1, such as 0.1")
        if self.workers < 0:
            found.append(f"data.workers is {self.workers}; it must be 0 (one for each core) or more")
        return found


def cache_folder() -> Path:
    """Where downloads and prepared tokens are kept.

    `$GLASSGPT_CACHE`, else `$XDG_CACHE_HOME/glassgpt`, else `~/.cache/glassgpt`.
    """
    if chosen := os.environ.get("GLASSGPT_CACHE"):
        return Path(chosen)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "glassgpt"
