"""Two layers form an induction head on repeated random letters, and one layer cannot. Slow: four models are trained.

The training is that of `configs/induction.toml`, without a run folder. One layer cannot, because an induction head finds
a position by the token before it, which only an earlier layer can have written there.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from data.prepare import TokenizedCorpus, prepare
from inspection.activation_cache import run_with_hooks
from inspection.eval_texts import repeated_sequences
from inspection.head_scores import induction
from model.gpt import GPT
from training.checkpoint import TrainState
from training.config import RunConfig, parse_train
from training.device import get_dist_context
from training.optimizer import Optimizer
from training.trainer import Callback, Trainer

pytestmark = pytest.mark.slow

CONFIG = Path(__file__).parents[2] / "configs" / "induction.toml"
FORMED = 0.5
"""Induction score of an induction head, at least."""
NEVER = 0.3
"""Induction score that no head of the one-layer model may reach."""


@dataclass
class Learned:
    """One training run, with an entry for each evaluation."""

    floor: float
    steps: list[int] = field(default_factory=list)
    loss: list[float] = field(default_factory=list)
    """Nats/token on held-out documents."""
    induction: list[list[float]] = field(default_factory=list)
    """The best head of each layer, on repeated random letters."""

    @property
    def formed(self) -> int | None:
        """The step of the first evaluation with an induction head."""
        return next((s for s, layers in zip(self.steps, self.induction, strict=True) if max(layers) >= FORMED), None)

    def __str__(self) -> str:
        rows = zip(self.steps, self.loss, self.induction, strict=True)
        run = "; ".join(f"{s}: {loss:.2f}, {max(layers):.2f}" for s, loss, layers in rows)
        return f"induction head at step {self.formed}; floor {self.floor:.2f}; step: loss, induction {run}"


def repeated_letters(data: TokenizedCorpus) -> torch.Tensor:
    """(8, 65): sequences of 32 different letters, repeated once."""
    end = data.tokenizer.end_of_text
    return torch.tensor(
        repeated_sequences([token for token in range(data.tokenizer.vocab_size) if token != end], end, 65, 1)
    )


def best_heads(model: GPT, texts: torch.Tensor) -> list[float]:
    """The largest induction score in each layer."""
    best: list[float] = []

    def hook(layer: int, activations: dict[str, torch.Tensor]) -> None:
        best.append(float(induction(activations["pattern"], texts[:, None]).mean(dim=0).max()))

    run_with_hooks(model, texts, hook)
    return best


@cache
def learned(n_layers: int, seed: int) -> Learned:
    """Train with the config until some steps after the head has formed, or to the end."""
    config: RunConfig = parse_train([str(CONFIG), f"--model.n_layers={n_layers}", f"--run.seed={seed}"])[0]
    config = replace(config, model=replace(config.model, attention="sdpa"))
    ctx, data = get_dist_context("fp32"), prepare(config.data, progress=False)
    model = GPT(config.model, data.tokenizer.vocab_size, seed)
    optimizer = Optimizer(model, config.optim)
    trainer = Trainer(config, ctx, data, model, model, optimizer, TrainState())
    assert data.nats_per_document is not None
    run = Learned(data.nats_per_document * data.val.n_documents / (len(data.val) - 1))
    texts = repeated_letters(data)

    class Record(Callback):
        def on_eval(self, trainer: Trainer, metrics: dict[str, Any]) -> None:
            run.steps.append(metrics["step"])
            run.loss.append(metrics["val_loss"])
            run.induction.append(best_heads(model, texts))

    trainer.callbacks = [Record()]

    while trainer.state.step < config.train.steps and (run.formed is None or run.steps[-1] < run.formed + 50):
        trainer.train_step()
        if trainer.state.step % config.train.eval_every == 0:
            trainer.evaluate()
    return run


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_two_layers_form_an_induction_head(seed: int) -> None:
    run = learned(2, seed)
    assert run.formed is not None, run
    first, second = run.induction[-1]
    assert second >= FORMED > NEVER > first, run


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_it_comes_in_a_phase_change(seed: int) -> None:
    run = learned(2, seed)
    assert run.formed is not None, run
    at = run.steps.index(run.formed)
    # Within 150 steps the loss falls most of the way to the floor; before, the head did not exist.
    before = max(0, at - 4)
    assert max(run.induction[before]) < 0.2, run
    fall, whole = run.loss[before] - run.loss[-1], run.loss[0] - run.floor
    assert fall > whole / 2, run


def test_one_layer_cannot() -> None:
    run = learned(1, 1)
    assert run.steps[-1] == 800 and max(map(max, run.induction)) < NEVER, run
    assert min(run.loss) > run.floor + 1, run
    assert min(run.loss) > max(learned(2, seed).loss[-1] for seed in (1, 2, 3)) + 0.5, run
