"""Head ablation: known effects on the handmade model, the definition by brute force, and mutants that must be noticed."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import replace
from functools import cache, partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from common.errors import NON_FINITE, UserError
from inspection import ablation
from inspection.ablation import ablate_group, ablate_heads, draw_control_sets, run_ablations
from inspection.ablation_results import Interval, IntervalTable
from inspection.contrast_pairs import ContrastPair
from inspection.eval_items import EvalTask, Query
from inspection.eval_texts import EvalTexts
from model.config import AttentionImplementation
from model.gpt import GPT
from tests.inspection.handmade import INDUCTION, LEAD, PREVIOUS, handmade, repeats
from tests.model.helpers import random_model, random_tokens

V, N, COUNT = 30, 12, 5
"""Vocabulary of the handmade model, tokens of a copy, and number of repeated sequences."""
REPEATS = tuple(map(tuple, repeats(COUNT, N, V)))
ZERO = Interval(0.0, 0.0, 0.0)
IMPLEMENTATIONS: dict[str, AttentionImplementation] = {"glass": "eager", "gpt2": "sdpa", "qwen3": "chunked"}
ALL_HEADS = [(layer, head) for layer in range(2) for head in range(3)]
Patch = pytest.MonkeyPatch


def texts_of(*lengths: int) -> list[tuple[int, ...]]:
    return [tuple(random_tokens(1, T, seed=T)[0].tolist()) for T in lengths]


@cache
def eval_texts() -> EvalTexts:
    """Texts, repeats and contrast pairs of different lengths for the random models."""
    answers = {"one": ((3,), (4,)), "several": ((3, 5), (4, 5, 6))}
    lengths = {"one": (5, 9, 12), "several": (4, 11)}
    pairs = [ContrastPair(kind, text, (1,), *answers[kind]) for kind in answers for text in texts_of(*lengths[kind])]
    names = ["held-out 1", "line 1", "held-out 2", "held-out 3"]
    texts = tuple(zip(names, texts_of(9, 15, 13, 2), strict=True))
    return EvalTexts(texts, tuple((0, *text[1:6], *text[1:6]) for text in texts_of(6, 7, 8)), tuple(pairs))


def cells(table: IntervalTable | None) -> dict[tuple[int, int], Interval]:
    assert table is not None
    return {(layer, head): cell for layer, row in enumerate(table) for head, cell in enumerate(row)}


def check_zero_ablation() -> None:
    """Without either of the two heads nothing is predicted: ln V. The others have an effect of exactly 0."""
    measures = run_ablations(handmade(V), EvalTexts(repeats=REPEATS)).measures
    assert list(measures) == ["repeats"]
    effects = measures["repeats"]
    assert (effects.unit, effects.count) == ("nats/token", COUNT) and abs(effects.baseline) < 1e-5
    zero, control, difference = cells(effects.zero), cells(effects.control_zero), cells(effects.difference_zero)
    for head in ALL_HEADS:
        matters = head in (PREVIOUS, INDUCTION)
        assert matters or zero[head] == ZERO
        assert zero[head].value == pytest.approx(math.log(V) if matters else 0, abs=1e-4)
        assert control[head].value == pytest.approx(0 if matters else math.log(V) / 2, abs=1e-4)
        assert difference[head].value == pytest.approx(zero[head].value - control[head].value, abs=1e-9)
        for cell in (zero[head], control[head], difference[head]):
            assert cell.low <= cell.value <= cell.high


def check_mean_ablation() -> None:
    """The mean of the induction head raises every token by how often the head predicts it."""
    effects = run_ablations(handmade(V), EvalTexts(repeats=REPEATS)).measures["repeats"]
    logits = torch.zeros(V)
    for text in REPEATS:
        logits[list(text[1 : N + 1])] += LEAD / (COUNT * len(text))
    targets = torch.tensor([text[N + 2 :] for text in REPEATS])
    expected = (logits.logsumexp(0) - logits[targets]).mean().item()
    mean = cells(effects.mean)
    assert abs(expected - math.log(V)) > 0.01
    assert mean[INDUCTION].value == pytest.approx(expected, abs=1e-4)
    assert mean[PREVIOUS].value == pytest.approx(math.log(V), abs=1e-4)
    assert all(mean[head] == ZERO for head in ALL_HEADS if head not in (PREVIOUS, INDUCTION))


def ablated_copy(model: GPT, layer: int, head: int, mean: Tensor | None) -> GPT:
    """A copy whose output matrix ignores the head and adds its projection of the mean."""
    model = copy.deepcopy(model)
    attention = model.blocks[layer].attention
    columns = attention.out.weight[:, head * attention.d_head : (head + 1) * attention.d_head]
    if mean is not None:
        constant = (columns @ mean).detach().clone()
        attention.register_forward_hook(lambda module, args, out: out + constant)
    with torch.no_grad():
        columns.zero_()
    return model


def check_ablate_heads(preset: str, attention: AttentionImplementation) -> None:
    """`ablate_heads` equals a model with the head's columns of the output matrix set to zero."""
    model, tokens = random_model(preset, attention), random_tokens(3, 14)
    means = ablation.mean_head_outputs(model, texts_of(6, 9))
    with torch.no_grad():
        whole = model(tokens)
        for layer, head, mean in ((0, 1, None), (0, 2, means), (1, model.config.n_heads - 1, None), (1, 0, means)):
            with ablate_heads(model, [(layer, head)], mean):
                logits = model(tokens)
            expected = ablated_copy(model, layer, head, None if mean is None else means[layer, head])(tokens)
            torch.testing.assert_close(logits, expected, rtol=0, atol=1e-5)
            assert (logits - whole).abs().max() > 1e-3


def loss(model: GPT, text: tuple[int, ...], first: int) -> float:
    logits = model(torch.tensor([text]))[0, first - 1 : -1]
    return F.cross_entropy(logits, torch.tensor(text[first:])).item()


def logit_difference(model: GPT, pair: ContrastPair) -> float:
    def log_p(answer: tuple[int, ...]) -> float:
        return -loss(model, pair.tokens + answer, len(pair.tokens)) * len(answer)

    return log_p(pair.right) - log_p(pair.wrong)


def reference_texts(measure: str) -> list[tuple[int, ...]]:
    """The texts over which the means of a measure are taken."""
    texts = eval_texts()
    held_out = [text for name, text in texts.texts if name.startswith("held-out")]
    return {"repeats": list(texts.repeats), "corpus": held_out}.get(measure, [p.tokens for p in texts.contrast_pairs])


def item_scores(model: GPT, measure: str) -> list[float]:
    """The scores of a measure's items by definition, one text at a time; higher is better."""
    if measure == "repeats":
        return [-loss(model, text, 7) for text in reference_texts(measure)]
    if measure == "corpus":
        return [-loss(model, text, 1) for text in reference_texts(measure)]
    return [logit_difference(model, p) for p in eval_texts().contrast_pairs if f"logit_diff.{p.kind}" == measure]


def check_brute_force(preset: str, attention: AttentionImplementation) -> None:
    """Effects equal those of `ablate_heads` and the definition of each measure, text by text."""
    model = random_model(preset, attention)
    measures = run_ablations(model, eval_texts()).measures
    assert list(measures) == ["repeats", "corpus", "logit_diff.one", "logit_diff.several"]
    for name, effects in measures.items():
        before, means = item_scores(model, name), ablation.mean_head_outputs(model, reference_texts(name))
        sign = -1 if effects.unit == "nats/token" else 1
        assert effects.baseline == pytest.approx(sign * sum(before) / len(before), abs=2e-5)
        assert effects.count == len(before)
        for layer, head, kind in ((0, 2, "zero"), (0, 0, "mean"), (1, 1, "mean")):
            with ablate_heads(model, [(layer, head)], means if kind == "mean" else None):
                after = item_scores(model, name)
            effect = sum(a - b for a, b in zip(before, after, strict=True)) / len(after)
            assert getattr(effects, kind)[layer][head].value == pytest.approx(effect, abs=4e-5)


def check_no_trace() -> None:
    """No hook, flag, gradient or parameter changes, also if the body raises."""
    model, tokens = random_model("gpt2", "sdpa", dropout=0.3).train(), random_tokens(1, 9)
    model.blocks[0].mlp.eval()
    modes = [module.training for module in model.modules()]
    parameters = {name: p.clone() for name, p in model.named_parameters()}
    state = torch.get_rng_state()
    with pytest.raises(KeyError), ablate_heads(model, [(0, 1), (1, 2)]):
        raise KeyError
    run_ablations(model, eval_texts())
    assert [module.training for module in model.modules()] == modes
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert all(torch.equal(p, parameters[name]) and p.grad is None for name, p in model.named_parameters())
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(model.eval()(tokens), random_model("gpt2", "sdpa")(tokens))


CHECKS: dict[str, Callable[[], None]] = {
    "zero": check_zero_ablation,
    "mean": check_mean_ablation,
    "no trace": check_no_trace,
    **{f"hook, {p}": partial(check_ablate_heads, p, a) for p, a in IMPLEMENTATIONS.items()},
    **{f"brute force, {p}": partial(check_brute_force, p, a) for p, a in IMPLEMENTATIONS.items()},
}


@pytest.mark.parametrize("name", CHECKS)
def test_ablation_check(name: str) -> None:
    CHECKS[name]()


def wrap(name: str, change: Callable[..., Any]) -> Callable[[Patch], None]:
    """Replace a function of `ablation` by `change(the real one, *its arguments)`."""

    def apply(patch: Patch) -> None:
        real = getattr(ablation, name)
        patch.setattr(ablation, name, lambda *args, **kwargs: change(real, *args, **kwargs))

    return apply


def next_head(real: Any, z: Tensor, heads: Any, d_head: int, means: Any = None) -> Tensor:
    return real(z, [(head + 1) % (z.shape[-1] // d_head) for head in heads], d_head, means)


def change_queries(change: Callable[[Query], Query]) -> Callable[[Patch], None]:
    def broken(real: Any, *args: Any) -> list[EvalTask]:
        return [replace(task, queries=[change(query) for query in task.queries]) for task in real(*args)]

    return wrap("eval_tasks", broken)


MUTANTS: dict[str, tuple[Callable[[Patch], None], list[str]]] = {
    "next head": (wrap("ablate", next_head), ["zero", "hook, qwen3"]),
    "not ablated": (wrap("ablate", lambda real, z, *rest: z), ["zero", "hook, gpt2"]),
    "zero for mean": (
        wrap("ablate", lambda real, z, heads, d_head, *_: real(z, heads, d_head)),
        ["mean", "hook, gpt2"],
    ),
    "other layer's means": (wrap("mean_head_outputs", lambda real, *args: real(*args).flip(0)), ["mean"]),
    "hooks stay": (
        lambda patch: patch.setattr("torch.utils.hooks.RemovableHandle.remove", lambda self: None),
        ["no trace"],
    ),
    "control includes head": (
        wrap("control_effects", lambda real, e: e.mean(axis=2, keepdims=True) + 0 * e),
        ["zero"],
    ),
    "sign": (change_queries(lambda q: q._replace(weight=-q.weight)), ["zero"]),
    "wrong is right": (change_queries(lambda q: q._replace(weight=abs(q.weight))), ["brute force, glass"]),
}
CASES = [(name, check) for name, (_, checks) in MUTANTS.items() for check in checks]


@pytest.mark.parametrize(("name", "check"), CASES)
def test_broken_ablation_fails_a_check(name: str, check: str, monkeypatch: Patch) -> None:
    MUTANTS[name][0](monkeypatch)
    with pytest.raises(AssertionError):
        CHECKS[check]()


def test_nested_ablations_add_up() -> None:
    model, tokens = random_model("glass"), random_tokens(1, 9)
    means = ablation.mean_head_outputs(model, texts_of(9))
    with ablate_heads(model, [(0, 1)]), ablate_heads(model, [(1, 2)]), ablate_heads(model, [(0, 2)]):
        nested = model(tokens)
    with ablate_heads(model, [(0, 1), (0, 2), (1, 2)]):
        assert torch.equal(model(tokens), nested)
    with ablate_heads(model, [(0, 1)], torch.zeros_like(means)):
        mean_of_zero = model(tokens)
    with ablate_heads(model, [(0, 1)]):
        assert torch.equal(model(tokens), mean_of_zero)


@pytest.mark.parametrize("head", [(2, 0), (-1, 0), (0, 3)])
def test_unknown_head_is_refused(head: tuple[int, int]) -> None:
    model = random_model("glass")
    with pytest.raises(ValueError, match="no head L"), ablate_heads(model, [(0, 0), head]):
        pass
    assert not any(m._forward_pre_hooks for m in model.modules())


def test_layer_of_one_head_has_no_control() -> None:
    effects = run_ablations(random_model("glass", n_heads=1, n_kv_heads=1), eval_texts()).measures["corpus"]
    assert len(effects.zero[0]) == 1
    assert effects.control_zero is effects.control_mean is effects.difference_zero is effects.difference_mean is None


def test_non_finite_model_is_an_error() -> None:
    model = random_model("glass")
    with torch.no_grad():
        model.final_norm.weight[3] = math.nan
    with pytest.raises(UserError, match="not finite") as error:
        run_ablations(model, eval_texts())
    assert error.value.exit_code == NON_FINITE


def test_group_and_its_control_sets() -> None:
    model, texts = handmade(V), EvalTexts(repeats=REPEATS)
    alone = ablate_group(model, texts, [INDUCTION], "repeats")
    assert alone.zero.value == pytest.approx(math.log(V), abs=1e-4)
    assert alone.control_zero == alone.control_mean == ZERO and alone.difference_zero == alone.zero
    two = ablate_group(model, texts, [(1, 2), INDUCTION], "repeats")
    assert two.control_zero is not None and two.control_zero.value == pytest.approx(math.log(V) / 2, abs=1e-4)
    every = ablate_group(model, texts, [(1, 0), (1, 1), (1, 2)], "repeats")
    assert every.control_zero is every.difference_mean is None


@given(st.integers(1, 12), st.data())
def test_control_sets_are_other_heads_if_possible(n_heads: int, data: st.DataObject) -> None:
    group = data.draw(st.sets(st.integers(0, n_heads - 1), min_size=1))
    draws, seed = data.draw(st.integers(1, 9)), data.draw(st.integers(0, 5))
    sets = draw_control_sets(sorted(group), n_heads, draws, seed)
    others = set(range(n_heads)) - group
    assert sets == draw_control_sets(sorted(group), n_heads, draws, seed)
    assert len(set(sets)) == len(sets) <= draws and bool(sets) == bool(others)
    for control in map(set, sets):
        assert len(control) == len(group) and control <= set(range(n_heads))
        assert control <= others if len(others) >= len(group) else others < control
    if others:
        size = math.comb(len(others), len(group)) or math.comb(len(group), len(group) - len(others))
        assert len(sets) == min(draws, size)
