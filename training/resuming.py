"""What may be different when a run goes on from a checkpoint, and what may not."""

from __future__ import annotations

import dataclasses

from common.errors import DATA, UserError
from data.prepare import TokenizedCorpus
from data.tokenizer import fingerprint
from training.checkpoint import Checkpoint
from training.config import RunConfig


def check_resumable(config: RunConfig, saved: Checkpoint, data: TokenizedCorpus) -> None:
    """Steps, rates, evaluation, memory and machine may change on resuming; shape, batches, seed and data may not.

    Raises:
        UserError: naming what differs (exit code 2), or that the text is another one (3).
    """
    before, now = dataclasses.asdict(saved.config), dataclasses.asdict(config)
    fixed = [("model", key) for key in now["model"] if key != "attention"]
    fixed += [("run", "seed"), ("optim", "optimizer"), ("train", "batch_size")]
    fixed += [("data", key) for key in now["data"] if key not in ("workers", "source")]  # a text may be moved
    for section, key in fixed:
        if before[section][key] != now[section][key]:
            raise UserError(
                f"{section}.{key} was {before[section][key]} in {saved.folder} and cannot become "
                f"{now[section][key]} on resuming; start a new run for that"
            )
    tokenizer = data.tokenizer
    same = tokenizer.vocab_size == saved.vocab_size and fingerprint(tokenizer) == fingerprint(saved.tokenizer())
    if not same or saved.environment.corpus not in ("", data.fingerprint):
        raise UserError(
            f"the corpus or its tokenizer has changed since {saved.folder} was written; bring the old text back, or "
            "start a new run",
            DATA,
        )
