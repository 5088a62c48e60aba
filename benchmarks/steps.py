"""A worker (`common.Worker`) that takes our training steps on random tokens.

python -m benchmarks.steps TOKENS.npy VOCABULARY [--section.key value ...]

The options are train.py's, and `training.setup.build_trainer` builds the trainer as for any run.
"""

import json
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from benchmarks.common import peak_megabytes
from data.prepare import TokenizedCorpus
from data.token_dataset import TokenSplit
from data.tokenizer import ByteTokenizer
from training.config import parse_train
from training.device import get_dist_context
from training.setup import build_trainer


def write_random_tokens(path: Path, vocab_size: int, count: int = 1_000_000) -> None:
    """Tokens for all contestants."""
    np.save(path, np.random.default_rng(0).integers(0, vocab_size - 1, count).astype(np.uint16))


def load_corpus(path: Path, vocab_size: int) -> TokenizedCorpus:
    """The tokens of a file as one document, the first of them for validation too; the tokenizer only has the size."""
    tokens, tokenizer = np.load(path, mmap_mode="r"), ByteTokenizer()
    tokenizer.vocab_size = vocab_size
    train, val = (TokenSplit(part, np.zeros(1, np.int64), len(part)) for part in (tokens, tokens[:10_000]))
    return TokenizedCorpus("random numbers", path.parent, tokenizer, train, val, "random", None)


class Stopwatch:
    """Calls a function and adds up the seconds that it takes."""

    def __init__(self, function: Callable[[], None]) -> None:
        self.function, self.seconds = function, 0.0

    def __call__(self) -> None:
        start = time.perf_counter()
        self.function()
        self.seconds += time.perf_counter() - start


def run(argv: list[str]) -> None:
    """Take as many steps as each line of stdin says; print their seconds, of which in the optimizer, and the peak memory."""
    tokens, vocab_size, *options = argv
    with tempfile.TemporaryDirectory() as folder:
        config, _ = parse_train([*options, f"--run.dir={folder}"])
        ctx = get_dist_context(config.train.dtype, config.run.threads, config.run.device)
        trainer = build_trainer(config, ctx, load_corpus(Path(tokens), int(vocab_size)))
        for _ in range(2):
            trainer.train_step()
        attention = "written-out" if config.train.compile == "on" else trainer.model.config.attention
        settings = f"{str(ctx.dtype).removeprefix('torch.')}, {attention} attention"
        named = trainer.model.named_parameters()
        optimizer = Stopwatch(trainer.optimizer.step)
        trainer.optimizer.step = optimizer  # type: ignore[method-assign]
        matrices = sum(p.numel() for name, p in named if p.dim() > 1 and name != "position_embedding.weight")
        print(json.dumps({"matrices": matrices, "settings": settings}), flush=True)
        for line in sys.stdin:
            start, optimizer.seconds = time.perf_counter(), 0.0
            for _ in range(int(line)):
                trainer.train_step()
            seconds = {"seconds": time.perf_counter() - start, "optimizer": optimizer.seconds}
            print(json.dumps(seconds | {"megabytes": peak_megabytes()}), flush=True)


if __name__ == "__main__":
    run(sys.argv[1:])
