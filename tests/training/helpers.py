"""A small trainer."""

from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from data.prepare import TokenizedCorpus, prepare
from model.config import ModelConfig
from model.gpt import GPT
from training.checkpoint import TrainState
from training.config import DataConfig, OptimConfig, RunConfig, RunSettings, TrainConfig
from training.device import DTYPES, DistContext
from training.optimizer import Optimizer
from training.trainer import Trainer

LINES = ("the fox runs", "a dog", "the lazy dog sleeps under the old tree", "one", "two more words for the end")
"""Documents of unequal length: sequences with unequal numbers of valid targets."""
TRAIN = TrainConfig(steps=6, batch_size=6, eval_every=1, eval_tokens=200)
OPTIM = OptimConfig("adamw", lr=0.01, weight_decay=0.3, warmup_steps=3, grad_clip=0.2, decay_fraction=1.0)
"""Learning rates that differ from step to step, and gradients that are all clipped."""


@cache
def corpus() -> TokenizedCorpus:
    with TemporaryDirectory() as folder:
        text = Path(folder, "lines.txt")
        text.write_text("\n<|endoftext|>\n".join(LINES * 9))
        return prepare(DataConfig(source=str(text), tokenizer="char", val_fraction=0.2), progress=False)


def make_trainer(
    train: TrainConfig = TRAIN, dropout: float = 0.0, state: TrainState | None = None, stop_at_step: int = 0
) -> Trainer:
    model_config = ModelConfig("gpt2", 1, n_heads=2, d_model=8, context=12, attention="eager", dropout=dropout)
    run = RunSettings(stop_at_step=stop_at_step)
    config = RunConfig(run=run, model=model_config, optim=OPTIM, train=train)
    model = GPT(model_config, corpus().tokenizer.vocab_size, seed=3)
    ctx = DistContext(torch.device("cpu"), DTYPES.get(train.dtype, torch.float32))
    return Trainer(config, ctx, corpus(), model, model, Optimizer(model, OPTIM), state or TrainState())
