"""Two layers form an induction head on repeated random letters, and one layer cannot. Slow: four models are trained.

The training is that of `configs/induction.toml`, without a run folder. One layer cannot, because an induction head finds
a position by the token before it, which only an earlier layer can have written there.
"""

from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from data.prepare import prepare
from inspection.compute_scores import compute_head_scores
from inspection.eval_texts import EvalTexts, repeated_sequences
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


@cache
def learned(n_layers: int, seed: int) -> tuple[list[float], list[list[float]], float]:
    """Train until some steps after an induction head has formed, or to the end. Returns, at each evaluation, the loss on
    held-out documents and the induction score of the best head of each layer on repeated random letters; and the entropy
    floor in nats/token."""
    config: RunConfig = parse_train([str(CONFIG), f"--model.n_layers={n_layers}", f"--run.seed={seed}"])[0]
    config = replace(config, model=replace(config.model, attention="sdpa"))
    ctx, data = get_dist_context("fp32"), prepare(config.data, progress=False)
    model = GPT(config.model, data.tokenizer.vocab_size, seed)
    trainer = Trainer(config, ctx, data, model, model, Optimizer(model, config.optim), TrainState())
    end = data.tokenizer.end_of_text
    texts = EvalTexts(repeats=repeated_sequences(range(data.tokenizer.vocab_size), end, 65, 1))
    losses, scores = list[float](), list[list[float]]()

    class Record(Callback):
        def on_eval(self, trainer: Trainer, metrics: dict[str, Any]) -> None:
            induction = compute_head_scores(model, texts, data.tokenizer.token_bytes)["induction"]
            losses.append(metrics["val_loss"])
            scores.append(induction.amax(dim=1).tolist())

    trainer.callbacks = [Record()]
    while trainer.state.step < config.train.steps and sum(max(layers) >= FORMED for layers in scores) < 4:
        trainer.train_step()
        if trainer.state.step % config.train.eval_every == 0:
            trainer.evaluate()
    assert data.nats_per_document is not None
    return losses, scores, data.nats_per_document * data.val.n_documents / (len(data.val) - 1)


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_two_layers_form_an_induction_head_in_a_phase_change(seed: int) -> None:
    losses, scores, floor = learned(2, seed)
    formed = [max(layers) >= FORMED for layers in scores].index(True)
    first, second = scores[-1]
    assert second >= FORMED > NEVER > first, scores
    # Within 150 steps the loss falls most of the way to the floor; before, the head did not exist.
    before = max(0, formed - 4)
    assert max(scores[before]) < 0.2, scores
    assert losses[before] - losses[-1] > (losses[0] - floor) / 2, losses


def test_one_layer_cannot() -> None:
    losses, scores, floor = learned(1, 1)
    assert len(losses) == 32 and max(map(max, scores)) < NEVER, scores  # all 800 steps
    assert min(losses) > floor + 1, losses
    assert min(losses) > max(learned(2, seed)[0][-1] for seed in (1, 2, 3)) + 0.5, losses
