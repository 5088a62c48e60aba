"""Head ablation: how the loss and the logit difference change when a head's output is replaced.

Zero ablation sets the head's output to 0; mean ablation sets it to its mean over a reference set, which leaves later
layers what they are used to (Wang et al. 2022, section 3.1). The control is the same ablation of another head of the
layer, drawn at random: its expectation over all of them. Effects are positive where ablating hurts.

An effect shows that the model, as it is, relies on the head for this measure. No effect does not show that the head
does nothing: another one may do the same (Wang et al. 2022, "backup" heads).

Shapes: B texts, L layers, H heads, T positions, V vocabulary, C model width, D head size, S positions scored.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import combinations, count

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from torch import Tensor

from common.errors import NON_FINITE, UserError
from inspection.ablation_results import (
    AblationEffects,
    AblationResults,
    HeadEffect,
    IntervalTable,
    bootstrap_interval,
    bootstrap_table,
)
from inspection.activation_cache import blocks_of, inference_mode, pad
from inspection.attribution import LayerActivations, run_layers
from inspection.eval_items import EvalTask, GatherIndex, Tokens, batches, eval_tasks
from inspection.eval_texts import EvalTexts
from model.gpt import GPT

Head = tuple[int, int]
"""(layer, head)."""
Progress = Callable[[int, int], None]
"""Called with (forward passes done, forward passes in all)."""
Scores = NDArray[np.float64]


@dataclass(frozen=True)
class Ablation:
    """Heads of one layer, ablated together."""

    layer: int
    heads: tuple[int, ...]
    mean: bool
    """Mean ablation instead of zero ablation."""


SEED = 1
"""Of the bootstrap resamples, and of the control sets of a group."""
CONTROL_SETS = 8
"""Control sets of a group, at most."""


def ablate(
    z: Float[Tensor, "B T HD"], heads: Sequence[int], d_head: int, means: Float[Tensor, "H D"] | None = None
) -> Float[Tensor, "B T HD"]:
    """The concatenated head outputs `z` with those of some heads replaced by 0, or by their means."""
    per_head = z.unflatten(-1, (-1, d_head)).clone()
    per_head[..., list(heads), :] = 0 if means is None else means[list(heads)].to(per_head)
    return per_head.flatten(-2)


@contextmanager
def ablate_heads(model: GPT, heads: Iterable[Head], means: Float[Tensor, "L H D"] | None = None) -> Iterator[None]:
    """Ablate heads while the body runs, with every attention implementation and in training too.

    Args:
        heads: (layer, head) of each.
        means: `mean_head_outputs`, for mean ablation; `None` is zero ablation.

    Raises:
        ValueError: if the model has no such head.
    """
    blocks, by_layer = blocks_of(model), dict[int, list[int]]()
    for layer, head in heads:
        if not (0 <= layer < len(blocks) and 0 <= head < model.config.n_heads):
            raise ValueError(f"the model has no head L{layer}H{head}")
        by_layer.setdefault(layer, []).append(head)

    def hook(layer: int, ablated: list[int]) -> Callable[..., Tensor]:
        layer_means = None if means is None else means[layer]
        return lambda module, args: ablate(args[0], ablated, blocks[layer].attention.d_head, layer_means)

    with ExitStack() as handles:
        for layer, ablated in by_layer.items():
            handles.enter_context(blocks[layer].attention.out.register_forward_pre_hook(hook(layer, ablated)))
        yield


def mean_head_outputs(model: GPT, texts: Sequence[Tokens]) -> Float[Tensor, "L H D"]:
    """Each head's mean output over all positions of all texts, in the model's precision, on the CPU.

    Raises:
        ValueError: if there is no text, or one that does not fit the model.
    """
    if not texts or not all(texts):
        raise ValueError("no tokens to take a mean over")
    with inference_mode(model) as model:
        d_head = model.config.d_head
        sums = torch.zeros(model.config.n_layers, model.config.n_heads * d_head, dtype=torch.float64)
        for batch in batches(model, texts):
            tokens = pad([texts[k] for k in batch])
            is_token = torch.arange(tokens.shape[1]) < torch.tensor([[len(texts[k])] for k in batch])
            for number, layer in enumerate(run_layers(model, tokens)):
                sums[number] += layer.z.cpu()[is_token].double().sum(dim=0)
    means = sums / sum(map(len, texts))
    return means.unflatten(-1, (-1, d_head)).to(model.token_embedding.weight.dtype)


@dataclass(frozen=True)
class _Batch:
    """The state of a batch before one layer, from which both the intact and the ablated model continue."""

    model: GPT
    number: int
    layer: LayerActivations
    index: GatherIndex

    def logits(self, z: Float[Tensor, "B T HD"]) -> Float[Tensor, "1 S V"]:
        """Logits where they are needed, with `z` as the layer's head outputs."""
        block, *later = blocks_of(self.model)[self.number :]
        x, last = self.layer.resid_pre, not later
        if last:  # no later layer attends to the other positions
            x, z = self.index.gather(x), self.index.gather(z)
        x = x + block.attention.out(z)
        x = x + block.mlp(block.norm2(x))
        for next_block in later:
            x = next_block(x, self.layer.rope)
        logits: Tensor = self.model.lm_head(self.model.final_norm(x if last else self.index.gather(x)))
        return logits


def ablation_effects(
    model: GPT, task: EvalTask, ablations: Sequence[Ablation], on_pass: Callable[[], None] | None = None
) -> tuple[Scores, Scores]:
    """The scores (N,) of a task's items, and how much each falls with each ablation, (ablations, N).

    The layers below an ablation run once for all ablations. Whole and ablated model take the same path from there, so
    that a head that writes nothing has an effect of exactly 0.

    Args:
        on_pass: called after each ablation of each batch.

    Raises:
        UserError: if a score is not finite (exit code 5).
    """
    N = task.n_items
    scores, effects = np.zeros((model.config.n_layers, N)), np.zeros((len(ablations), N))
    means = mean_head_outputs(model, task.reference)
    with inference_mode(model) as model:
        for batch in batches(model, task.texts):
            tokens = pad([task.texts[row] for row in batch])
            index = GatherIndex.of(task, batch, tokens.shape[1], model.token_embedding.weight.device)
            for number, layer in enumerate(run_layers(model, tokens)):
                ours = [(k, ablation) for k, ablation in enumerate(ablations) if ablation.layer == number]
                if not ours:
                    continue
                state = _Batch(model, number, layer, index)
                before = index.score(state.logits(layer.z), N)
                scores[number] += before
                for k, ablation in ours:
                    layer_means = means[number] if ablation.mean else None
                    z = ablate(layer.z, ablation.heads, model.config.d_head, layer_means)
                    effects[k] += before - index.score(state.logits(z), N)
                    if on_pass is not None:
                        on_pass()
    if not (np.isfinite(scores).all() and np.isfinite(effects).all()):
        raise UserError("the model's predictions are not finite, so its heads can't be ablated", NON_FINITE)
    return scores[ablations[0].layer], effects


def control_effects(effects: Scores) -> Scores | None:
    """For each head, the mean effect (N, L, H) over the other heads of its layer; None where there is no other."""
    others = effects.shape[2] - 1
    return (effects.sum(axis=2, keepdims=True) - effects) / others if others else None


def run_ablations(
    model: GPT,
    eval_texts: EvalTexts,
    step: int = 0,
    weights_sha256: str = "",
    progress: Progress | None = None,
) -> AblationResults:
    """Ablate every head, by zero and mean, and measure repeated tokens, held-out texts and each kind of contrast pair.

    A measure with fewer than two items is left out. Means are taken over the measure's own texts (over the prompts of
    all contrast pairs for every kind of them).

    Args:
        step, weights_sha256: kept in the results, to identify the model.

    Raises:
        UserError: if a prediction of the model is not finite (exit code 5).
        ValueError: if a text does not fit the model.
    """
    L, H = model.config.n_layers, model.config.n_heads
    ablations = [Ablation(layer, (head,), mean) for mean in (False, True) for layer in range(L) for head in range(H)]
    tasks = [task for task in eval_tasks(eval_texts, model.config.context) if task.measures]
    total = len(ablations) * sum(len(list(batches(model, task.texts))) for task in tasks)
    passes = count(1)
    on_pass = None if progress is None else lambda: progress(next(passes), total)
    measures = {}
    for task in tasks:
        scores, effects = ablation_effects(model, task, ablations, on_pass)
        by_item = effects.T.reshape(-1, 2, L, H)
        for name, items in task.measures.items():
            measures[name] = _summarize(task.unit, scores[items], by_item[items])
    return AblationResults(step, weights_sha256, SEED, measures)


def _summarize(unit: str, scores: Scores, effects: Scores) -> AblationEffects:
    """Means and intervals from the scores (N,) and effects (N, 2, L, H) of N items; a loss is a negative score."""
    tables: dict[str, IntervalTable | None] = {}
    for k, name in enumerate(("zero", "mean")):
        control = control_effects(effects[:, k])
        tables[name] = bootstrap_table(effects[:, k], SEED)
        tables[f"control_{name}"] = None if control is None else bootstrap_table(control, SEED)
        tables[f"difference_{name}"] = None if control is None else bootstrap_table(effects[:, k] - control, SEED)
    baseline = float(scores.mean()) * (-1 if unit == "nats/token" else 1)
    return AblationEffects(unit, baseline, len(scores), **tables)  # type: ignore[arg-type]


def draw_control_sets(group: Sequence[int], n_heads: int, draws: int, seed: int) -> list[tuple[int, ...]]:
    """`draws` different sets of as many heads as the group has, drawn from the other heads, or all there are.

    Where the others are too few, each set has all of them and some of the group; where there is none, no set.
    """
    others = [head for head in range(n_heads) if head not in group]
    if not others:
        return []
    kept, pool = ([], others) if len(others) >= len(group) else (others, sorted(group))
    size = len(group) - len(kept)
    if math.comb(len(pool), size) <= draws:
        return [tuple(sorted([*kept, *more])) for more in combinations(pool, size)]
    generator, sets = np.random.default_rng(seed), set[tuple[int, ...]]()
    while len(sets) < draws:
        sets.add(tuple(sorted([*kept, *generator.choice(pool, size, replace=False).tolist()])))
    return sorted(sets)


def ablate_group(model: GPT, eval_texts: EvalTexts, heads: Iterable[Head], measure: str) -> HeadEffect:
    """The effect of ablating several heads of one layer together, and of as many others of that layer, on one measure.

    Raises:
        UserError: if a prediction of the model is not finite (exit code 5).
        ValueError: if the heads are not of one layer of the model, or the measure has fewer than two items.
    """
    group = tuple(sorted(set(heads)))
    with ablate_heads(model, group):  # raises if there is no such head
        pass
    if len({layer for layer, _ in group}) != 1:
        raise ValueError("a group is one or more heads of one layer")
    tasks = eval_tasks(eval_texts, model.config.context)
    task = next((task for task in tasks if measure in task.measures), None)
    if task is None:
        raise ValueError(f"there are not two items to measure {measure} on")
    layer, own = group[0][0], tuple(head for _, head in group)
    controls = draw_control_sets(own, model.config.n_heads, CONTROL_SETS, SEED)
    sets = [own, *controls]
    _, effects = ablation_effects(model, task, [Ablation(layer, s, mean) for mean in (False, True) for s in sets])
    by_mode = effects[:, task.measures[measure]].reshape(2, len(sets), -1)
    values: dict[str, Scores] = {}
    for name, rows in zip(("zero", "mean"), by_mode, strict=True):
        values[name] = rows[0]
        if controls:
            values |= {f"control_{name}": rows[1:].mean(axis=0), f"difference_{name}": rows[0] - rows[1:].mean(axis=0)}
    return HeadEffect(**{name: bootstrap_interval(items, SEED) for name, items in values.items()})
