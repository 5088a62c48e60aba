"""What is said of a head follows from the numbers: a head that reads but does not matter is never praised."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from inspection import findings as claims
from inspection.ablation_results import AblationEffects, AblationResults, Interval
from inspection.findings import Finding

LOW, HIGH = 0.1, 0.9


def table(*values: float) -> tuple[tuple[Interval, ...], ...]:
    """One layer; each interval reaches 0.1 to both sides."""
    return (tuple(Interval(v, v - 0.1, v + 0.1) for v in values),)


def measured(zero: float, mean: float, control: float) -> AblationEffects:
    """Head 0 has these effects, head 1 those of the control."""
    zeros, means = table(zero, control), table(mean, control)
    margins = table(zero - control, control - zero), table(mean - control, control - mean)
    return AblationEffects("nats", 3.0, 8, zeros, means, table(control, zero), table(control, mean), *margins)


def evidence(**measures: AblationEffects) -> AblationResults:
    return AblationResults(30, "abc", 1, {name.replace("_", "."): effects for name, effects in measures.items()})


def timeline(*values: float, score: str = "induction") -> dict[int, dict[str, np.ndarray]]:
    """Scores of head 0 at steps 10, 20, ...; head 1 stays low."""
    return {10 * (k + 1): {score: np.array([[value, LOW]])} for k, value in enumerate(values)}


def test_a_head_that_reads_and_matters_is_named_with_its_numbers() -> None:
    (claim,) = claims.claims(timeline(LOW, HIGH, HIGH), evidence(repeats=measured(1.8, 1.5, 0.02)))
    assert (claim.head, claim.score, claim.since, claim.label) == ((0, 0), "induction", 20, "supported")
    assert claims.sentence([claim]) == (
        "By step 20 head L0H0 reads the token after an earlier match (0.90); without it the loss on repeats rises by "
        "1.80 nats [95 %: 1.70 to 1.90; with its mean instead, 1.50], without a random other head of its layer it "
        "rises by 0.02."
    )


@pytest.mark.parametrize(
    ("zero", "mean", "control", "label"),
    [
        (1.8, 1.5, 0.0, "supported"),
        (1.8, 0.05, 0.0, "disputed"),
        (0.05, 0.05, 0.0, "no effect"),
        (1.0, 1.0, 0.95, "same as control"),
    ],
)
def test_the_verdict_asks_for_more_than_another_head_by_both_ways(
    zero: float, mean: float, control: float, label: str
) -> None:
    (claim,) = claims.claims(timeline(HIGH, HIGH), evidence(repeats=measured(zero, mean, control)))
    assert claim.label == label
    assert claims.sentence([claim]).startswith("No head passes") == (label != "supported")


def test_without_another_head_in_the_layer_the_head_stands_alone() -> None:
    alone = AblationEffects("nats", 3.0, 8, table(1.0), table(1.0), None, None, None, None)
    (claim,) = claims.claims({10: {"induction": np.array([[HIGH]])}}, evidence(repeats=alone))
    assert claim.label == "supported" and claim.control is None
    assert "no other head to compare with" in claim.summary


def test_since_is_the_start_of_the_last_unbroken_time_above_half() -> None:
    for values, step in (((HIGH, HIGH), 10), ((HIGH, LOW, HIGH), 30), ((LOW, HIGH, HIGH), 20), ((HIGH, LOW), 20)):
        assert claims.since(timeline(*values), "induction", (0, 0)) == step
    gap = {**timeline(HIGH, HIGH, HIGH), 20: {}}
    assert claims.since(gap, "induction", (0, 0)) == 30


def test_no_head_passes_where_none_reads() -> None:
    assert claims.claims(timeline(LOW, LOW), evidence(repeats=measured(1.8, 1.5, 0.0))) == []
    assert claims.sentence([]).startswith("No head passes")


def test_a_score_without_a_measure_or_with_nan_alone_says_nothing() -> None:
    assert claims.claims(timeline(HIGH), evidence(corpus=measured(1.8, 1.5, 0.0))) == []
    assert claims.claims({10: {"induction": np.full((1, 2), np.nan)}}, evidence(repeats=measured(1.0, 1.0, 0.0))) == []


def test_the_first_head_that_matters_is_the_sentence_even_behind_one_that_does_not() -> None:
    scores = {10: {"induction": np.array([[HIGH, LOW]]), "antecedent.pronoun": np.array([[LOW, 0.7]])}}
    pronoun = measured(0.0, 0.0, 2.0)  # its second head matters
    found = claims.claims(scores, evidence(repeats=measured(0.0, 0.0, 0.0), logit_diff_pronoun=pronoun))
    assert [claim.label for claim in found] == ["no effect", "supported"]
    assert "L0H1 reads the name that a pronoun stands for (0.70)" in claims.sentence(found)
    assert "lead of the right answer falls by 2.00 nats" in claims.sentence(found)


def test_a_head_chosen_on_other_questions_is_taken_over() -> None:
    scores = {10: {"antecedent.pronoun": np.array([[0.8, 0.7]])}}
    chosen = {"antecedent.pronoun": ((0, 1), 0.6, 0.5)}
    (claim,) = claims.claims(scores, evidence(logit_diff_pronoun=measured(0.0, 0.0, 2.0)), chosen)
    assert claim.head == (0, 1) and claim.value == 0.6 and claim.is_supported


def test_a_reading_that_a_rule_without_content_has_too_is_no_sentence() -> None:
    scores = {10: {"antecedent.place": np.array([[0.9, LOW]]), "antecedent.cause": np.array([[0.8, LOW]])}}
    both = evidence(logit_diff_place=measured(2.0, 2.0, 0.0), logit_diff_cause=measured(1.0, 1.0, 0.0))
    chosen = {"antecedent.place": ((0, 0), 0.9, 1.0), "antecedent.cause": ((0, 0), 0.8, 0.5)}
    found = claims.claims(scores, both, chosen)
    assert [claim.is_supported for claim in found] == [False, True]
    assert "the feeling" in claims.sentence(found)
    alone = claims.sentence(found[:1])
    assert alone.startswith("No head passes") and "a rule that knows no content would read it as well (1.00)" in alone


def test_every_score_has_the_measure_that_it_should_move() -> None:
    wanted = {"induction": "repeats", "antecedent.place": "logit_diff.place", "entropy": "corpus", "copying": "corpus"}
    assert {score: claims.measure_for_score(score) for score in wanted} == wanted


def test_claims_are_kept_as_plain_data(tmp_path: Path) -> None:
    found = claims.claims(timeline(HIGH), evidence(repeats=measured(1.8, 1.5, 0.02)))
    claims.save(tmp_path / "findings.json", found)
    kept = json.loads((tmp_path / "findings.json").read_text())
    assert kept["headline"] == claims.sentence(found)
    (claim,) = kept["findings"]
    assert claim["head"] == [0, 0] and claim["zero"]["value"] == 1.8 and claim["label"] == "supported"
    assert isinstance(found[0], Finding)


# Heads that do the same hide each other.


def both(zero: float, mean: float, control: float) -> claims.Together:
    class Effect:
        def __init__(self) -> None:
            self.zero, self.mean, self.control_zero = (table(v)[0][0] for v in (zero, mean, control))
            self.difference_zero, self.difference_mean = table(zero - control)[0][0], table(mean - control)[0][0]

    return Effect()


def alike(*values: float) -> dict[int, dict[str, np.ndarray]]:
    """Induction scores of the three heads of a layer at step 10, a step after nothing was there."""
    return {5: {"induction": np.array([[LOW] * 3])}, 10: {"induction": np.array([values])}}


def three(zero: float) -> AblationEffects:
    """None of three heads does more than another."""
    flat, none = table(zero, zero, zero), table(0.0, 0.0, 0.0)
    return AblationEffects("nats/token", 3.0, 8, flat, flat, flat, flat, none, none)


def test_two_heads_that_only_matter_together_are_named_together() -> None:
    asked = []

    def take_away(measure: str, heads: object) -> claims.Together:
        asked.append((measure, heads))
        return both(2.0, 1.5, 0.1)

    (claim,) = claims.claims(alike(0.9, LOW, 0.8), evidence(repeats=three(0.3)), take_away=take_away)
    assert asked == [("repeats", [(0, 0), (0, 2)])]
    assert claim.head == (0, 0) and claim.others == ((0, 2),) and claim.is_supported and claim.since == 10
    assert claims.sentence([claim]) == (
        "By step 10 heads L0H0 and L0H2 read the token after an earlier match (up to 0.90); without them the loss on "
        "repeats rises by 2.00 nats [95 %: 1.90 to 2.10; with their means instead, 1.50], without 2 random other heads "
        "of their layer it rises by 0.10."
    )


def test_two_heads_that_do_not_matter_together_either_stay_as_they_were() -> None:
    found = claims.claims(alike(0.9, LOW, 0.8), evidence(repeats=three(0.3)), take_away=lambda *_: both(0.3, 0.3, 0.3))
    assert found[0].others == () and found[0].label == "same as control"


@pytest.mark.parametrize("values", [(0.9, LOW, LOW), (0.9, 0.9, 0.9)])
def test_a_head_without_its_like_or_without_another_is_not_asked_about_again(values: tuple[float, ...]) -> None:
    def never(*_: object) -> claims.Together:
        raise AssertionError("nothing to take away together")

    assert claims.claims(alike(*values), evidence(repeats=three(0.3)), take_away=never)[0].others == ()


def test_a_head_that_matters_alone_needs_no_company() -> None:
    (claim,) = claims.claims(
        timeline(HIGH), evidence(repeats=measured(1.8, 1.5, 0.02)), take_away=lambda *_: both(9.0, 9.0, 0.0)
    )
    assert claim.others == () and claim.zero.value == 1.8
