"""Two layers form an induction head on repeated random letters, and one layer cannot. Slow: four models are trained.

The training is that of `configs/induction.toml`, without a run folder. One layer cannot, because an induction head finds
a position by the token before it, which only an earlier layer can have written there.
"""

from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from data.prepare import prepare
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
    """One training run: nats/token at the entropy floor, and at each evaluation the step, the loss on held-out documents, and
    the induction score of the best head of each layer on repeated random letters."""

    floor: float
    steps: list[int] = field(default_factory=list)
    loss: list[float] = field(default_factory=list)
    induction: list[list[float]] = field(default_factory=list)

    @property
    def formed(self) -> int | None:
        """The first evaluation with an induction head."""
        return next((k for k, layers in enumerate(self.induction) if max(layers) >= FORMED), None)


@cache
def learned(n_layers: int, seed: int) -> Learned:
    """Train with the config until some steps after the head has formed, or to the end."""
    config: RunConfig = parse_train([str(CONFIG), f"--model.n_layers={n_layers}", f"--run.seed={seed}"])[0]
    config = replace(config, model=replace(config.model, attention="sdpa"))
    ctx, data = get_dist_context("fp32"), prepare(config.data, progress=False)
    model = GPT(config.model, data.tokenizer.vocab_size, seed)
    trainer = Trainer(config, ctx, data, model, model, Optimizer(model, config.optim), TrainState())
    assert data.nats_per_document is not None
    run = Learned(data.nats_per_document * data.val.n_documents / (len(data.val) - 1))
    end = data.tokenizer.end_of_text
    letters = [token for token in range(data.tokenizer.vocab_size) if token != end]
    texts = torch.tensor(repeated_sequences(letters, end, 65, 1))

    class Record(Callback):
        def on_eval(self, trainer: Trainer, metrics: dict[str, Any]) -> None:
            best: list[float] = []

            def hook(layer: int, activations: dict[str, torch.Tensor]) -> None:
                best.append(float(induction(activations["pattern"], texts[:, None]).mean(dim=0).max()))

            run_with_hooks(model, texts, hook)
            run.steps.append(metrics["step"])
            run.loss.append(metrics["val_loss"])
            run.induction.append(best)

    trainer.callbacks = [Record()]
    while trainer.state.step < config.train.steps and (run.formed is None or len(run.steps) < run.formed + 3):
        trainer.train_step()
        if trainer.state.step % config.train.eval_every == 0:
            trainer.evaluate()
    return run


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_two_layers_form_an_induction_head_in_a_phase_change(seed: int) -> None:
    run = learned(2, seed)
    assert run.formed is not None, run
    first, second = run.induction[-1]
    assert second >= FORMED > NEVER > first, run
    # Within 150 steps the loss falls most of the way to the floor; before, the head did not exist.
    before = max(0, run.formed - 4)
    assert max(run.induction[before]) < 0.2, run
    assert run.loss[before] - run.loss[-1] > (run.loss[0] - run.floor) / 2, run


def test_one_layer_cannot() -> None:
    run = learned(1, 1)
    assert run.steps[-1] == 800 and max(map(max, run.induction)) < NEVER, run
    assert min(run.loss) > run.floor + 1, run
    assert min(run.loss) > max(learned(2, seed).loss[-1] for seed in (1, 2, 3)) + 0.5, run
