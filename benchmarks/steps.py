"""Our steps, as a worker that takes them when asked (`side_by_side.Worker`):

    python -m benchmarks.steps TOKENS.npy VOCABULARY [--section.key value ...]

The options are train.py's, and so is the way: `training.setup.build_trainer` chooses number format, attention, threads and compiler
as it does for any run, and its trainer takes the steps, batches and clipping included. Only the corpus is random
numbers, so that any size of vocabulary can be measured.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.side_by_side import peak_megabytes
from data.prepare import TokenizedCorpus
from data.token_dataset import TokenSplit
from data.tokenizer import Tokenizer
from model.gpt import GPT
from training.config import parse_train
from training.device import get_dist_context
from training.setup import build_trainer


class Numbers(Tokenizer):
    """A vocabulary that stands for no text."""

    name = "numbers"

    def __init__(self, vocab_size: int) -> None:
        self.vocab_size, self.end_of_text = vocab_size, vocab_size - 1

    def encode(self, text: str) -> np.ndarray:
        return np.zeros(len(text), np.int64)

    def token_bytes(self, token: int) -> bytes:
        return b"\n"

    def to_dict(self) -> dict[str, Any]:
        return {"kind": self.name, "vocab_size": self.vocab_size}


def random_tokens(path: Path, vocab_size: int, count: int = 1_000_000) -> None:
    """Tokens for both contestants; none is end-of-text."""
    np.save(path, np.random.default_rng(0).integers(0, vocab_size - 1, count).astype(np.uint16))


def corpus(path: Path, vocab_size: int) -> TokenizedCorpus:
    """The tokens of a file as one document, all of them for training and the first few to validate on."""
    tokens, start = np.load(path, mmap_mode="r"), np.zeros(1, np.int64)
    train, val = (TokenSplit(part, start, len(part)) for part in (tokens, tokens[:10_000]))
    return TokenizedCorpus("random numbers", path.parent, Numbers(vocab_size), train, val, "random", None)


def matrix_parameters(model: GPT) -> int:
    """Parameters that a token is multiplied with: all matrices but that of the positions, which is looked up."""
    named = model.named_parameters()
    return sum(p.numel() for name, p in named if p.dim() > 1 and name != "position_embedding.weight")


def peak() -> float:
    """Megabytes: of the GPU's memory where there is one, else resident."""
    return torch.cuda.max_memory_allocated() / 1e6 if torch.cuda.is_available() else peak_megabytes()


def main(argv: list[str]) -> None:
    tokens, vocab_size, *options = argv
    with tempfile.TemporaryDirectory() as folder:
        config, _ = parse_train([*options, f"--run.dir={folder}"])
        trainer = build_trainer(
            config, get_dist_context(config.train.dtype, config.run.threads), corpus(Path(tokens), int(vocab_size))
        )
        for _ in range(2):
            trainer.train_step()
        about = {
            "parameters": sum(p.numel() for p in trainer.model.parameters()),
            "matrices": matrix_parameters(trainer.model),
            "how": dict(trainer.environment.settings),
        }
        print(json.dumps(about), flush=True)
        for line in sys.stdin:
            start = time.perf_counter()
            for _ in range(int(line)):
                trainer.train_step()
            print(json.dumps({"seconds": time.perf_counter() - start, "megabytes": peak()}), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
