"""What a run would read, found without preparing, downloading or writing anything. For planning: `train.py --plan`.

Where this stands: beside `prepare.py`, whose cache it looks into. What is not there yet stays unknown.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from common.errors import UserError
from data.config import DataConfig, cache_folder
from data.corpora import open_corpus
from data.held import DamagedShards
from data.manifest import load_shards
from data.named import GENERATED
from data.prepare import Stamp, cache_key, index_of, known_contents, sha256_of, stamp_of
from data.token_dataset import TokenSplit
from data.tokenizer import encoding_names, train_tokenizer

ENCODINGS = {
    "gpt2": 50_257,
    "r50k_base": 50_257,
    "p50k_base": 50_281,
    "p50k_edit": 50_284,
    "cl100k_base": 100_277,
    "o200k_base": 200_019,
    "o200k_harmony": 201_088,
}
"""Sizes of tiktoken's vocabularies, so that none has to be fetched to be counted."""
CHARACTERS = 97
"""Assumed where a text's characters are not known: what an English keyboard prints, a line break, end-of-text."""
QUICKLY_READ = 256_000_000
"""Bytes of text that are read to know it again by its content; more is looked for in the cache's list alone."""


@dataclass(frozen=True, eq=False)
class Found:
    """What is known of a corpus and its vocabulary."""

    vocab_size: int
    how: str
    """How the vocabulary's size is known, in a few words; empty where the corpus is there."""
    train: TokenSplit | None = None
    val: TokenSplit | None = None


def find(config: DataConfig) -> Found:
    """The corpus where it is prepared already; else what the settings alone say.

    Raises:
        UserError: if there is no such tokenizer (exit code 2).
    """
    splits = find_splits(config)
    if splits:
        return Found(splits["train"].vocab_size, "", splits["train"], splits["val"])
    if config.tokenizer == "byte":
        return Found(257, "256 bytes and end-of-text")
    if config.tokenizer == "bpe":
        return Found(config.vocab_size, "as wanted; a small text gives fewer")
    if config.tokenizer == "char":
        return Found(CHARACTERS, "assumed: the text's characters are not counted yet")
    if config.tokenizer not in ENCODINGS or config.tokenizer not in encoding_names():
        return Found(train_tokenizer(config.tokenizer, 0, ()).vocab_size, "as tiktoken has it")
    return Found(ENCODINGS[config.tokenizer], "as tiktoken has it")


def find_splits(config: DataConfig) -> dict[str, TokenSplit]:
    """The splits of a prepared corpus; none where text or tokens are not there, or not whole."""
    cache = cache_folder().absolute()
    source = config.source
    made = cache / f"{source}-{GENERATED[source].version()}" if source in GENERATED else None
    if source == "shakespeare":
        made = cache / "tinyshakespeare.txt"
    if not cache.is_dir() or (made is not None and not made.exists()):
        return {}
    try:
        corpus = open_corpus(source, config.val_fraction, cache)
        stamps = {path: stamp_of(path) for path in sorted({span.path for span in corpus.train + corpus.val})}
        contents = contents_of(stamps, cache)
        if contents.keys() != stamps.keys():
            return {}
        key = cache_key(corpus, contents, config)
        return dict(load_shards(cache / f"tokens-{key}", key).splits)
    except (UserError, DamagedShards):
        return {}


def contents_of(stamps: dict[Path, Stamp], cache: Path) -> dict[Path, str]:
    """The sha256 of each file that is on the list of an earlier run, or quickly read."""
    found = known_contents(stamps, index_of(stamps, cache))
    unread = [path for path in stamps if path not in found]
    if sum(stamps[path][0] for path in unread) <= QUICKLY_READ:
        with tqdm(disable=True) as silent:
            found |= {path: sha256_of(path, silent) for path in unread}
    return found
