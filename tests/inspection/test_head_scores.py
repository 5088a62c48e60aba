"""Head scores promise their closed forms, on a model of which every weight is known and on heads that read all alike.

`metric_checks.py` has the checks and `test_metric_mutants.py` proves that they notice what is wrong.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from inspection import head_scores as metrics
from inspection import scores
from inspection.eval_texts import EvalTexts
from inspection.head_scores import SCORES, score_info
from model.gpt import GPT
from tests.inspection.handmade import handmade
from tests.inspection.head_score_checks import CHECKS, ON_TOKENS, same, watched
from tests.model.helpers import random_model


@pytest.mark.parametrize("name", CHECKS)
def test_scores_are_what_they_should_be(name: str) -> None:
    CHECKS[name]()


@st.composite
def patterns(draw: st.DrawFn) -> tuple[Tensor, Tensor]:
    """A pattern (2, 3, T, T), from nearly uniform to nearly one-hot, and tokens of which some come twice."""
    length = draw(st.integers(2, 12))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 10_000)))
    logits = draw(st.sampled_from([0.1, 2.0, 50.0])) * torch.randn(2, 3, length, length, generator=generator)
    future = ~torch.ones(length, length, dtype=torch.bool).tril()
    tokens = torch.randint(draw(st.integers(1, 8)), (length,), generator=generator)
    return logits.masked_fill(future, -torch.inf).softmax(-1), tokens


@given(patterns())
@settings(max_examples=60, deadline=None)
def test_scores_stay_within_their_limits(drawn: tuple[Tensor, Tensor]) -> None:
    pattern, tokens = drawn
    for name, formula in (scores.ON_REPEATS | scores.ON_TEXTS).items():
        found, score = formula(pattern, tokens), SCORES[name]
        assert found.shape == (2, 3)
        if found.isnan().any():
            assert name in ON_TOKENS and found.isnan().all() and formula is not metrics.previous_token
            continue
        highest = (len(tokens) - 1) / 2 if score.high is None else score.high
        assert score.low - 1e-6 <= found.min() and found.max() <= highest + 1e-6


@given(patterns(), st.integers(0, 1000))
@settings(max_examples=40, deadline=None)
def test_what_is_weighted_or_rolled_out_is_a_pattern_again(drawn: tuple[Tensor, Tensor], seed: int) -> None:
    pattern, _ = drawn
    norms = torch.rand(pattern.shape[:-1], generator=torch.Generator().manual_seed(seed)) + 1e-3
    for again in (metrics.value_weighted(pattern, norms), metrics.rollout(pattern)):
        same(again.sum(-1), 1.0, atol=1e-5)
        assert again.min() >= 0 and (again.triu(1) == 0).all()
    same(metrics.value_weighted(pattern, torch.full_like(norms, 3.0)), pattern)


@given(st.sampled_from(["glass", "gpt2", "qwen3"]), st.integers(0, 50))
@settings(max_examples=10, deadline=None)
def test_copying_stays_within_its_limits_and_is_turned_by_a_sign(preset: str, seed: int) -> None:
    model = random_model(preset, seed=seed)
    found = metrics.copying(model)
    assert found.abs().max() <= 1 + 1e-6
    with torch.no_grad():
        model.blocks[1].attention.out.weight.neg_()
    same(metrics.copying(model), torch.stack([found[0], -found[1]]))


def test_heads_that_write_nothing_do_not_copy_and_a_broken_model_has_no_score() -> None:
    model = GPT(replace(random_model("glass").config), 61)  # as it is drawn, with outputs of zero
    same(metrics.copying(model), 0.0)
    with torch.no_grad():
        model.blocks[1].attention.qkv.weight.fill_(torch.nan)
    assert metrics.copying(model).isnan().any()
    assert "copying" not in scores.head_scores(model, EvalTexts())


def test_what_cannot_be_measured_is_left_out() -> None:
    model = handmade()
    one_token, distinct = EvalTexts((("a", (0,)),)), EvalTexts((), ((0, 1, 2, 3, 4),))
    assert set(scores.head_scores(model, EvalTexts())) == {"copying"}
    assert set(scores.head_scores(model, one_token)) == {"copying", "distance"}
    assert set(scores.head_scores(model, distinct)) == {"copying", "previous_token"}


def test_only_so_many_probes_of_a_kind_are_asked() -> None:
    watch = watched()
    first = EvalTexts(probes=(*watch.probes[:2], *watch.probes[8:10]))
    few, same_few = scores.head_scores(handmade(), watch, per_kind=2), scores.head_scores(handmade(), first)
    for kind in ("antecedent.match", "antecedent.before"):
        same(few[kind], same_few[kind])


def test_every_score_can_be_explained() -> None:
    found = scores.head_scores(handmade(), watched())
    assert {name for name in found if not name.startswith("antecedent.")} == set(SCORES)
    for name in (*found, "antecedent.pronoun"):
        score = score_info(name)
        assert score.name == name and score.title and score.formula and score.source
    assert "the name that decides it" in score_info("antecedent.pronoun").title
    for unknown in ("", "antecedent.", "reads", "Induction"):
        with pytest.raises(KeyError):
            score_info(unknown)
