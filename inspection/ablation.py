"""What changes when a head is taken away: evidence for what a head does, where weights tell only what it reads.

model + `EvalTexts` → `effects` → an `AblationResults` (see there), which tables and the page show. Two ways of taking away:
the head's output becomes 0, or its mean over a reference set, which leaves the layers above what they are used to
(Wang et al. 2022, section 3.1). And a control: the same done to another head of the layer, drawn at random.

A change shows that the model, as it is, relies on the head for this measure. No change does not show that the head is
idle: another one may do the same (Wang et al. 2022, "backup" heads).

Shapes: B texts, L layers, H heads, T positions, V vocabulary, C model width, D head width.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import combinations, count

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from torch import Tensor

from common.errors import NON_FINITE, UserError
from inspection.ablation_results import AblationEffects, AblationResults, Interval, Table, interval, table
from inspection.activation_cache import pad
from inspection.attribution import Layer, at_rest, blocks_of, embedded, layers, sum_of
from inspection.eval_items import EvalTask, Places, Tokens, batches, exams_of
from inspection.eval_texts import EvalTexts
from model.gpt import GPT, Rope

Head = tuple[int, int]
Progress = Callable[[int, int], None]
Falls = NDArray[np.float64]
"""Scores, and by how much they fall: positive where taking away hurts."""


def take_away(
    outputs: Float[Tensor, "B T HD"], heads: Sequence[int], width: int, means: Float[Tensor, "H D"] | None = None
) -> Float[Tensor, "B T HD"]:
    """The heads' outputs, side by side, with those of some heads replaced by 0, or by their means."""
    apart = outputs.unflatten(-1, (-1, width)).clone()
    apart[..., list(heads), :] = 0 if means is None else means[list(heads)].to(apart)
    return apart.flatten(-2)


@contextmanager
def without(model: GPT, heads: Iterable[Head], means: Float[Tensor, "L H D"] | None = None) -> Iterator[None]:
    """Take heads away while the body runs; afterwards, and after an exception, the model is as it was.

    Both faces pass here, and so does training. Where two of these are nested, the inner one has the last word.

    Args:
        heads: (layer, head) of each.
        means: `mean_outputs`, to put in their place; `None` puts 0.

    Raises:
        ValueError: if the model has no such head.
    """
    blocks, by_layer = blocks_of(model), dict[int, list[int]]()
    for layer, head in heads:
        if not (0 <= layer < len(blocks) and 0 <= head < model.config.n_heads):
            raise ValueError(f"the model has no head L{layer}H{head}")
        by_layer.setdefault(layer, []).append(head)

    def hook(layer: int, gone: list[int]) -> Callable[..., Tensor]:
        own = None if means is None else means[layer]
        return lambda module, args: take_away(args[0], gone, blocks[layer].attention.d_head, own)

    handles = []
    try:
        for layer, gone in by_layer.items():
            handles.append(blocks[layer].attention.out.register_forward_pre_hook(hook(layer, gone)))
        yield
    finally:
        for handle in handles:
            handle.remove()


def mean_outputs(model: GPT, texts: Sequence[Tokens]) -> Float[Tensor, "L H D"]:
    """Each head's mean output over all positions of all texts, in the model's precision, on the CPU.

    Raises:
        ValueError: if there is no text, or one that the model can't read.
    """
    if not texts or not all(texts):
        raise ValueError("no tokens to take a mean over")
    with at_rest(model) as model:
        width = blocks_of(model)[0].attention.d_head
        sums = torch.zeros(model.config.n_layers, model.config.n_heads * width, dtype=torch.float64)
        for batch in batches(model, texts):
            tokens = pad([texts[k] for k in batch])
            real = torch.arange(tokens.shape[1]) < torch.tensor([[len(texts[k])] for k in batch])
            embeddings, angles = embedded(model, tokens)
            for number, layer in enumerate(layers(model, sum_of(embeddings), angles)):
                sums[number] += layer.heads.cpu()[real].double().sum(dim=0)
    means = sums / sum(map(len, texts))
    return means.unflatten(-1, (-1, width)).to(model.token_embedding.weight.dtype)


@dataclass(frozen=True)
class Cut:
    """Heads of one layer, taken away together."""

    layer: int
    heads: tuple[int, ...]
    mean: bool


def _resume(
    model: GPT, number: int, layer: Layer, heads: Float[Tensor, "B T HD"], angles: Rope | None, places: Places
) -> Float[Tensor, "1 S V"]:
    """Logits at the places that are asked for, from a layer's attention on: `Block.forward` without the part that no
    head's absence can change."""
    block, *rest = blocks_of(model)[number:]
    x = layer.before
    if not rest:  # nobody reads the other positions any more
        x, heads = places.at(x), places.at(heads)
    x = x + block.attention.out(heads)
    x = x + block.mlp(block.norm2(x))
    for later in rest:
        x = later(x, angles)
    return model.lm_head(model.final_norm(places.at(x) if rest else x))


def falls(
    model: GPT, exam: EvalTask, cuts: Sequence[Cut], tick: Callable[[], None] | None = None
) -> tuple[Falls, Falls]:
    """The items' scores (N,) of the whole model, and by how much each falls with each cut, (cuts, N).

    The layers below a cut are computed once for all cuts. Whole and cut model take the same way from there, so that a
    head that writes nothing changes exactly nothing.

    Args:
        tick: called after each cut of each batch.

    Raises:
        UserError: if a score is not finite (exit code 5).
    """
    N = 1 + max(one.item for one in exam.asked)
    whole, lost = np.zeros((model.config.n_layers, N)), np.zeros((len(cuts), N))
    means = mean_outputs(model, exam.reference)
    with at_rest(model) as model:
        for batch in batches(model, exam.texts):
            tokens = pad([exam.texts[row] for row in batch])
            places = Places.of(exam, batch, tokens.shape[1], model.token_embedding.weight.device)
            embeddings, angles = embedded(model, tokens)
            for number, layer in enumerate(layers(model, sum_of(embeddings), angles)):
                mine = [k for k, cut in enumerate(cuts) if cut.layer == number]
                if not mine:
                    continue
                width = blocks_of(model)[number].attention.d_head
                before = places.score(_resume(model, number, layer, layer.heads, angles, places), N)
                whole[number] += before
                for k in mine:
                    left = take_away(layer.heads, cuts[k].heads, width, means[number] if cuts[k].mean else None)
                    lost[k] += before - places.score(_resume(model, number, layer, left, angles, places), N)
                    if tick is not None:
                        tick()
    if not (np.isfinite(whole).all() and np.isfinite(lost).all()):
        raise UserError("the model's predictions are not finite, so its heads can't be measured", NON_FINITE)
    return whole[cuts[0].layer], lost


def control_of(values: Falls) -> Falls | None:
    """For each head, the mean over the other heads of its layer, item by item (N, L, H); None where it has no other."""
    others = values.shape[2] - 1
    return (values.sum(axis=2, keepdims=True) - values) / others if others else None


def _effects(unit: str, whole: Falls, zero: Falls, mean: Falls, seed: int) -> AblationEffects:
    """From the scores (N,) and falls (N, L, H) of N items to means and intervals."""
    found: dict[str, Table | None] = {}
    for name, values in (("zero", zero), ("mean", mean)):
        control = control_of(values)
        found[name] = table(values, seed)
        found[f"control_{name}"] = None if control is None else table(control, seed)
        found[f"difference_{name}"] = None if control is None else table(values - control, seed)
    return AblationEffects(unit, _baseline(unit, whole), len(whole), **found)  # type: ignore[arg-type]


def _baseline(unit: str, whole: Falls) -> float:
    """The lead itself; a loss is the score's negative."""
    return float(whole.mean()) * (-1 if unit == "nats/token" else 1)


def effects(
    model: GPT,
    watch: EvalTexts,
    per_kind: int = 32,
    seed: int = 1,
    step: int = 0,
    weights_sha256: str = "",
    progress: Progress | None = None,
) -> AblationResults:
    """What taking away each head changes, on repeats, held-out texts and each kind of choice.

    A measure of which fewer than two items are there is left out. Means are taken over the measure's own texts (over
    all probes' prompts for every kind of choice).

    Args:
        per_kind: how many probes of each kind, at most.
        seed: of the resamples behind the intervals.
        step, weights_sha256: kept in the evidence, to say of which weights it speaks.
        progress: called with (passes done, passes in all).

    Raises:
        UserError: if a prediction of the model is not finite (exit code 5).
        ValueError: if a text does not fit the model.
    """
    L, H = model.config.n_layers, model.config.n_heads
    cuts = [Cut(layer, (head,), mean) for mean in (False, True) for layer in range(L) for head in range(H)]
    exams = [exam for exam in exams_of(watch, per_kind, model.config.context) if exam.measures]
    total = len(cuts) * sum(len(list(batches(model, exam.texts))) for exam in exams)
    passes = count(1)
    tick = None if progress is None else lambda: progress(next(passes), total)
    measures = {}
    for exam in exams:
        whole, lost = falls(model, exam, cuts, tick)
        by_item = lost.T.reshape(-1, 2, L, H)
        for name, items in exam.measures.items():
            measures[name] = _effects(exam.unit, whole[items], by_item[items, 0], by_item[items, 1], seed)
    return AblationResults(step, weights_sha256, seed, measures)


@dataclass(frozen=True)
class GroupEffect:
    """What taking away several heads of a layer together does, beside as many others of that layer."""

    measure: str
    unit: str
    heads: tuple[Head, ...]
    zero: Interval
    mean: Interval
    control_zero: Interval | None
    """The expectation over the sets in `drawn`; None, as is all that follows, where the layer has no other head."""
    control_mean: Interval | None
    difference_zero: Interval | None
    difference_mean: Interval | None
    drawn: tuple[tuple[Head, ...], ...]
    """The control sets, all different."""
    disjoint: bool
    """False where the layer had too few other heads: each set then holds all of those, and some of the group."""


def control_sets(group: Sequence[int], n_heads: int, draws: int, seed: int) -> list[tuple[int, ...]]:
    """Sets of as many heads as the group has, drawn from the other heads: `draws` different ones, or all there are.

    Where the others are too few, each set is all of them, filled up from the group; where there is none, no set.
    """
    others = [head for head in range(n_heads) if head not in group]
    if not others:
        return []
    kept, pool = ([], others) if len(others) >= len(group) else (others, sorted(group))
    size = len(group) - len(kept)
    if math.comb(len(pool), size) <= draws:
        return [tuple(sorted([*kept, *more])) for more in combinations(pool, size)]
    generator, found = np.random.default_rng(seed), set[tuple[int, ...]]()
    while len(found) < draws:
        found.add(tuple(sorted([*kept, *generator.choice(pool, size, replace=False).tolist()])))
    return sorted(found)


def group_effect(
    model: GPT, watch: EvalTexts, heads: Iterable[Head], measure: str, draws: int = 8, seed: int = 1, per_kind: int = 32
) -> GroupEffect:
    """The effect of taking away several heads of one layer together, on one measure (see `effects`).

    Raises:
        UserError: if a prediction of the model is not finite (exit code 5).
        ValueError: if the heads are not of one layer of the model, or the measure has fewer than two items.
    """
    group = tuple(sorted(set(heads)))
    H = model.config.n_heads
    with without(model, group):  # says so if there is no such head
        pass
    if len({layer for layer, _ in group}) != 1:
        raise ValueError("a group is one or more heads of one layer")
    exams = exams_of(watch, per_kind, model.config.context)
    exam = next((exam for exam in exams if measure in exam.measures), None)
    if exam is None:
        raise ValueError(f"there are not two items to measure {measure} on")
    layer, own = group[0][0], tuple(head for _, head in group)
    sets = [own, *control_sets(own, H, draws, seed)]
    _, lost = falls(model, exam, [Cut(layer, one, mean) for mean in (False, True) for one in sets])
    found: dict[str, Interval | None] = {}
    for name, rows in zip(("zero", "mean"), lost[:, exam.measures[measure]].reshape(2, len(sets), -1), strict=True):
        control = rows[1:].mean(axis=0) if len(sets) > 1 else None
        for key, values in ((name, rows[0]), (f"control_{name}", control)):
            found[key] = None if values is None else interval(values, seed)
        found[f"difference_{name}"] = None if control is None else interval(rows[0] - control, seed)
    drawn = tuple(tuple((layer, head) for head in one) for one in sets[1:])
    disjoint = not any(set(one) & set(own) for one in sets[1:])
    return GroupEffect(measure, exam.unit, group, **found, drawn=drawn, disjoint=disjoint)  # type: ignore[arg-type]
