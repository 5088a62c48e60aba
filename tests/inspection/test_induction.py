"""Two layers form an induction head on random letters said twice, and one layer cannot. Slow: four models are trained.

The training is that of `configs/induction.toml`, without what a run leaves on disk. One layer cannot, because an
induction head finds a place by what stood before it, and only an earlier layer can have written that there.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from data.prepare import TokenizedCorpus, prepare
from inspection.activation_cache import Hooks, run_with_hooks
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
"""A head that puts at least this share of its weight on what came after the earlier match."""
NEVER = 0.3
"""What no head of the control may reach."""


@dataclass
class Learned:
    """How a training went, an entry for each evaluation."""

    floor: float
    steps: list[int] = field(default_factory=list)
    loss: list[float] = field(default_factory=list)
    """Nats/token on held-out documents."""
    induction: list[list[float]] = field(default_factory=list)
    """The best head of each layer, on repeats of random letters."""

    @property
    def formed(self) -> int | None:
        """The step of the first evaluation at which an induction head is there."""
        return next((s for s, layers in zip(self.steps, self.induction, strict=True) if max(layers) >= FORMED), None)

    def __str__(self) -> str:
        rows = zip(self.steps, self.loss, self.induction, strict=True)
        course = "; ".join(f"{s}: {loss:.2f}, {max(layers):.2f}" for s, loss, layers in rows)
        return f"induction head at step {self.formed}; floor {self.floor:.2f}; step: loss, induction {course}"


def watched(data: TokenizedCorpus) -> torch.Tensor:
    """(8, 65): sequences of 32 different letters, each said twice."""
    end = data.tokenizer.end_of_text
    return torch.tensor(
        repeated_sequences([token for token in range(data.tokenizer.vocab_size) if token != end], end, 65, 1)
    )


def best_heads(model: GPT, texts: torch.Tensor) -> list[float]:
    """The largest induction score in each layer."""
    best: list[float] = []

    def on_pattern(layer: int, pattern: torch.Tensor) -> None:
        best.append(float(induction(pattern, texts[:, None]).mean(dim=0).max()))

    run_with_hooks(model, texts, Hooks(pattern=on_pattern))
    return best


@cache
def learned(n_layers: int, seed: int) -> Learned:
    """Train as the config says, until the head is there and was used for a while, or to the end."""
    config: RunConfig = parse_train([str(CONFIG), f"--model.n_layers={n_layers}", f"--run.seed={seed}"])[0]
    config = replace(config, model=replace(config.model, attention="sdpa"))
    ctx, data = get_dist_context("fp32"), prepare(config.data, progress=False)
    model = GPT(config.model, data.tokenizer.vocab_size, seed)
    optimizer = Optimizer(model, config.optim)
    trainer = Trainer(config, ctx, data, model, model, optimizer, TrainState())
    assert data.nats_per_document is not None
    course = Learned(data.nats_per_document * data.val.n_documents / (len(data.val) - 1))
    texts = watched(data)

    class Record(Callback):
        def on_eval(self, trainer: Trainer, metrics: dict[str, Any]) -> None:
            course.steps.append(metrics["step"])
            course.loss.append(metrics["val_loss"])
            course.induction.append(best_heads(model, texts))

    trainer.callbacks = [Record()]

    while trainer.state.step < config.train.steps and (course.formed is None or course.steps[-1] < course.formed + 50):
        trainer.train_step()
        if trainer.state.step % config.train.eval_every == 0:
            trainer.evaluate()
    return course


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_two_layers_form_an_induction_head(seed: int) -> None:
    course = learned(2, seed)
    assert course.formed is not None, course
    first, second = course.induction[-1]
    assert second >= FORMED > NEVER > first, course  # it takes a layer below


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_it_comes_in_a_phase_change(seed: int) -> None:
    course = learned(2, seed)
    assert course.formed is not None, course
    at = course.steps.index(course.formed)
    # Within 150 steps most of the way to the floor is gone, and before there was hardly a trace of the head.
    before = max(0, at - 4)
    assert max(course.induction[before]) < 0.2, course
    fall, whole = course.loss[before] - course.loss[-1], course.loss[0] - course.floor
    assert fall > whole / 2, course


def test_one_layer_cannot() -> None:
    course = learned(1, 1)
    assert course.steps[-1] == 800 and max(map(max, course.induction)) < NEVER, course
    assert min(course.loss) > course.floor + 1, course
    assert min(course.loss) > max(learned(2, seed).loss[-1] for seed in (1, 2, 3)) + 0.5, course
