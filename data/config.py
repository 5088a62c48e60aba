"""Data settings. Imports no torch, so that a mistyped option is reported at once."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from common.errors import DISK_OR_MEMORY, UserError
from common.ranges import Range, out_of_range

VocabSize = Annotated[int, Range("between 257 and 1,000,000", lambda value: 257 <= value <= 1_000_000)]
ValFraction = Annotated[float, Range("between 0 and 1, such as 0.1", lambda value: 0 < value < 1)]


@dataclass(frozen=True)
class DataConfig:
    """Data settings."""

    source: str = "stories"
    """Training text: `stories`, `repeats`, `shakespeare`, a text file, a file of rows (.jsonl, .json, .csv, .parquet; also .gz
    or .zst), a folder, a glob such as 'texts/*.txt', or hf:NAME[:CONFIG][:SPLIT] for a dataset of the Hugging Face hub."""
    encoding: str = "utf-8"
    """Encoding of text of your own, such as `cp1252`, `gbk`, `shift_jis`, `koi8_r`; a byte-order mark goes before it."""
    tokenizer: str = "bpe"
    """`char`, `byte`, `bpe` (trained on the corpus), a tiktoken encoding such as `gpt2` or `cl100k_base`, or a folder: a run, a
    checkpoint or a Hugging Face folder, whose tokenizer is used."""
    vocab_size: VocabSize = 1024  # Size of a trained `bpe` vocabulary, including the 256 bytes and end-of-text.
    val_fraction: ValFraction = 0.1
    """Fraction of the text that is held out for validation: whole files or the last documents of one, else the end of each
    long text. Named corpora have a split of their own."""
    val: str = ""  # Validation text: a file, a folder or a glob. Then all other text of data.source is for training.
    field: str = ""
    """The field of the text in rows of JSON, CSV or parquet; by default `text`, `content`, or the longest of the first row."""
    lines: Literal["auto", "on", "off"] = "auto"
    """Whether each line is a document, and lines are held out; `auto`: in a list of short lines, such as names."""

    def problems(self) -> list[str]:
        """One line for each invalid value."""
        problems = out_of_range(self, "data.")
        if not self.source:
            problems.append("data.source is empty; name a corpus, a file, a folder or a glob")
        try:
            b"\xff".decode(self.encoding, "ignore")  # not so idna and punycode, which are for names of hosts
        except (LookupError, ValueError):
            problems.append(f"data.encoding is {self.encoding!r}; it must be a text encoding of Python, such as cp1252")
        return problems


def cache_folder() -> Path:
    """`$GLASSGPT_CACHE`, else `$XDG_CACHE_HOME/glassgpt`, else `~/.cache/glassgpt`. Raises UserError (6) without a home."""
    if folder := os.environ.get("GLASSGPT_CACHE"):
        return Path(folder)
    folder = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    if folder == "~/.cache":
        raise UserError("there is no home folder to cache tokens in; set GLASSGPT_CACHE to a folder", DISK_OR_MEMORY)
    return Path(folder) / "glassgpt"
