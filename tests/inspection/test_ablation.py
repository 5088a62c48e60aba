"""Head ablation: known effects on the handmade model, the definition by brute force, and mutants that must be noticed."""

import copy
import math
from collections.abc import Callable
from dataclasses import replace
from functools import cache, partial
from statistics import fmean
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from common.errors import NON_FINITE
from inspection import ablation, eval_items
from inspection.ablation import ablate_together, loss_increases, random_others, run_ablations
from inspection.contrast_pairs import ContrastPair
from inspection.eval_items import EvalTask
from inspection.eval_texts import EvalTexts
from model.config import AttentionImplementation
from model.gpt import GPT
from tests.inspection.handmade import INDUCTION, LEAD, PREVIOUS, handmade, repeats
from tests.inspection.test_activation_cache import snapshot
from tests.model.helpers import random_model, random_tokens
from tests.runs import user_error

V, N, COUNT = 30, 12, 5
"""Vocabulary of the handmade model, tokens of a copy, and number of repeated sequences."""
REPEATS = tuple(map(tuple, repeats(COUNT, N, V)))
IMPLEMENTATIONS: dict[str, AttentionImplementation] = {
    "glass": "eager",
    "gpt2": "sdpa",
    "qwen3": "chunked",
    "attention only": "eager",
}
ALL_HEADS = [(layer, head) for layer in range(2) for head in range(3)]


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


def check_zero_ablation() -> None:
    """Without either of the two heads nothing is predicted: ln V. The others have an effect of exactly 0."""
    measures = run_ablations(handmade(V), EvalTexts(repeats=REPEATS)).measures
    assert list(measures) == ["repeats"]
    effects = measures["repeats"]
    assert (effects.unit, effects.count) == ("nats/token", COUNT) and abs(effects.baseline) < 1e-5
    zero, control, difference = (effects.tables[name] for name in ("zero", "control_zero", "difference_zero"))
    for head in ALL_HEADS:
        matters = head in (PREVIOUS, INDUCTION)
        assert matters or not zero[head].any()
        assert zero[head][0] == pytest.approx(math.log(V) if matters else 0, abs=1e-4)
        assert control[head][0] == pytest.approx(0 if matters else math.log(V) / 2, abs=1e-4)
        assert difference[head][0] == pytest.approx(zero[head][0] - control[head][0], abs=1e-9)


def check_mean_ablation() -> None:
    """The mean of the induction head raises every token by how often the head predicts it."""
    mean = run_ablations(handmade(V), EvalTexts(repeats=REPEATS)).measures["repeats"].tables["mean"]
    logits = torch.zeros(V)
    for text in REPEATS:
        logits[list(text[1 : N + 1])] += LEAD / (COUNT * len(text))
    targets = torch.tensor([text[N + 2 :] for text in REPEATS])
    expected = (logits.logsumexp(0) - logits[targets]).mean().item()
    assert abs(expected - math.log(V)) > 0.01
    assert mean[INDUCTION][0] == pytest.approx(expected, abs=1e-4)
    assert mean[PREVIOUS][0] == pytest.approx(math.log(V), abs=1e-4)
    assert not any(mean[head].any() for head in ALL_HEADS if head not in (PREVIOUS, INDUCTION))


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


def log_p(model: GPT, text: tuple[int, ...], first: int) -> list[float]:
    """Of each token from the given position on."""
    log_probs = model(torch.tensor([text]))[0, first - 1 : -1].log_softmax(dim=-1)
    return log_probs.gather(1, torch.tensor(text[first:])[:, None])[:, 0].tolist()


def reference_texts(measure: str) -> list[tuple[int, ...]]:
    """The texts over which the means of a measure are taken."""
    texts = eval_texts()
    held_out = [tokens for _, tokens in texts.held_out()]
    return {"repeats": [*texts.repeats], "corpus": held_out}.get(measure, [p.tokens for p in texts.contrast_pairs])


def item_scores(model: GPT, measure: str) -> list[float]:
    """The scores of a measure's items by definition, one text at a time; higher is better."""
    if not measure.startswith("logit_diff"):
        return [fmean(log_p(model, text, 7 if measure == "repeats" else 1)) for text in reference_texts(measure)]
    return [
        sum(log_p(model, p.tokens + p.right, len(p.tokens))) - sum(log_p(model, p.tokens + p.wrong, len(p.tokens)))
        for p in eval_texts().contrast_pairs
        if measure.endswith(p.kind)
    ]


def check_brute_force(preset: str, attention: AttentionImplementation) -> None:
    """Effects equal those of `ablated_copy` and the definition of each measure, text by text."""
    model = random_model(preset, attention)
    measures = run_ablations(model, eval_texts()).measures
    choose = measures.pop("corpus.choose")
    halves = [item_scores(model, "corpus")[k] for k in eval_items.halves(range(3))[0]]
    assert choose.baseline == pytest.approx(-fmean(halves), abs=2e-5)
    assert list(measures) == ["repeats", "corpus", "logit_diff.one", "logit_diff.several"]
    for name, effects in measures.items():
        before, means = item_scores(model, name), ablation.mean_head_outputs(model, reference_texts(name))
        sign = -1 if effects.unit == "nats/token" else 1
        assert effects.baseline == pytest.approx(sign * fmean(before), abs=2e-5)
        assert effects.count == len(before)
        for layer, head, kind in ((0, 2, "zero"), (0, 0, "mean"), (1, 1, "mean")):
            after = item_scores(ablated_copy(model, layer, head, means[layer, head] if kind == "mean" else None), name)
            assert effects.tables[kind][layer, head, 0] == pytest.approx(fmean(before) - fmean(after), abs=4e-5)


def test_loss_increases_are_the_effect_token_by_token() -> None:
    model, held_out = random_model("qwen3", "chunked"), reference_texts("corpus")
    zero = run_ablations(model, eval_texts()).measures["corpus"].tables["zero"]
    found = loss_increases(model, held_out, 1, 1)
    assert [len(rise) + 1 for rise in found] == list(map(len, held_out))
    assert np.mean([rise.mean() for rise in found]) == pytest.approx(zero[1, 1, 0], abs=4e-5) != 0


def check_no_trace() -> None:
    model = random_model("gpt2", "sdpa", dropout=0.3).train()
    before = snapshot(model)
    run_ablations(model, eval_texts())
    loss_increases(model, reference_texts("corpus"), 0, 0)
    assert snapshot(model) == before


CHECKS: dict[str, Callable[[], None]] = {
    "zero": check_zero_ablation,
    "mean": check_mean_ablation,
    "no trace": check_no_trace,
    **{f"brute force, {p}": partial(check_brute_force, p, a) for p, a in IMPLEMENTATIONS.items()},
}


@pytest.mark.parametrize("name", CHECKS)
def test_ablation_check(name: str) -> None:
    CHECKS[name]()


def next_head(real: Any, z: Tensor, head: int, d_head: int, mean: Any = None) -> Tensor:
    return real(z, (head + 1) % (z.shape[-1] // d_head), d_head, mean)


def change_weights(change: Callable[[float], float], real: Any, *args: Any) -> list[EvalTask]:
    return [replace(t, queries=[q._replace(weight=change(q.weight)) for q in t.queries]) for t in real(*args)]


MUTANTS: dict[str, tuple[str, Callable[..., Any], list[str]]] = {
    "next head": ("ablate", next_head, ["zero", "brute force, qwen3"]),
    "not ablated": ("ablate", lambda real, z, *_: z, ["zero", "brute force, gpt2"]),
    "zero for mean": ("ablate", lambda real, z, head, d_head, *_: real(z, head, d_head), ["mean"]),
    "other layer's means": ("mean_head_outputs", lambda real, *args: real(*args).flip(0), ["mean"]),
    "control includes head": ("control_effects", lambda real, e: e.mean(axis=-1, keepdims=True) + 0 * e, ["zero"]),
    "sign": ("eval_tasks", partial(change_weights, lambda weight: -weight), ["zero"]),
    "wrong is right": ("eval_tasks", partial(change_weights, abs), ["brute force, glass"]),
}


@pytest.mark.parametrize(("name", "check"), [(name, check) for name in MUTANTS for check in MUTANTS[name][2]])
def test_broken_ablation_fails_a_check(name: str, check: str, monkeypatch: pytest.MonkeyPatch) -> None:
    function, broken, _ = MUTANTS[name]
    monkeypatch.setattr(ablation, function, partial(broken, getattr(ablation, function)))
    with pytest.raises(AssertionError):
        CHECKS[check]()


def test_layer_of_one_head_has_no_control() -> None:
    effects = run_ablations(random_model("glass", n_heads=1, n_kv_heads=1), eval_texts()).measures["corpus"]
    assert effects.shape == (2, 1) and list(effects.tables) == ["zero", "mean"]


def test_non_finite_model_is_an_error() -> None:
    model = random_model("glass")
    with torch.no_grad():
        model.final_norm.weight[3] = math.nan
    with user_error(NON_FINITE, "not finite"):
        run_ablations(model, eval_texts())


def test_heads_ablated_together() -> None:
    """One head has the effect of `run_ablations`; both heads of the handmade model, ln V; others nothing."""
    model, texts = random_model("glass", attention="eager"), eval_texts()
    alone, every = ablate_together(model, texts, [(1, 2)]), run_ablations(model, texts).measures
    assert list(alone) == list(every)
    for name, effects in alone.items():
        assert effects.baseline == pytest.approx(every[name].baseline, abs=1e-6)
        for kind in ("zero", "mean"):
            assert effects.tables[kind] == pytest.approx(every[name].tables[kind][1, 2], abs=1e-5)
    tables = ablate_together(handmade(V), EvalTexts(repeats=REPEATS), [PREVIOUS, INDUCTION])["repeats"].tables
    assert tables["zero"][0] == pytest.approx(math.log(V), abs=1e-4)
    assert not tables["control_zero"].any() and not tables["control_mean"].any()


def test_control_of_several_heads() -> None:
    draws = random_others([(0, 1), (2, 0), (2, 3)], 6)
    assert len({tuple(draw) for draw in draws}) > 1 and draws == random_others([(0, 1), (2, 0), (2, 3)], 6)
    for draw in draws:
        assert [layer for layer, _ in draw] == [0, 2, 2] and len(set(draw)) == 3
        assert not {(0, 1), (2, 0), (2, 3)} & set(draw)
    assert random_others([(0, 0), (0, 1)], 3) == []
