"""Findings follow from head scores and ablations by one table of labels."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from inspection.ablation_results import TABLES, AblationEffects, AblationResults
from inspection.findings import (
    LABELS,
    compute_findings,
    describe_largest,
    first_step_above,
    headline,
    save_findings,
    text_finding,
)

LOW, HIGH = 0.1, 0.9


def tables(**values: list[float]) -> dict[str, Any]:
    """One layer; each interval is 0.1 to both sides."""
    return {name: np.array([[[v, v - 0.1, v + 0.1] for v in row]]) for name, row in values.items()}


def effects(zero: float, mean: float, control: float, unit: str = "nats") -> AblationEffects:
    """Head 0 has these effects, head 1 those of the control."""
    rows = [[zero, control], [mean, control], [control, zero], [control, mean]]
    rows += [[value - control, control - value] for value in (zero, mean)]
    return AblationEffects(unit, 3.0, 8, tables(**dict(zip(TABLES, rows, strict=True))))


def results(**measures: AblationEffects) -> AblationResults:
    return AblationResults(30, "abc", 1, {name.replace("diff_", "diff."): e for name, e in measures.items()})


def timeline(*values: float) -> dict[int, dict[str, Any]]:
    """Induction scores of head 0 at steps 10, 20, ...; head 1 stays low."""
    return {10 * (k + 1): {"induction": np.array([[value, LOW]])} for k, value in enumerate(values)}


def test_larger_effect_of_a_head_with_little_attention_is_noted() -> None:
    measured = effects(6.96, 6.5, 8.7)
    note = describe_largest(measured, (0, 0), np.array([[HIGH, 0.04]]))
    assert note.endswith("by 8.70 [8.60, 8.80] nats (L0H0: 6.96), with 0.04 of its attention there")
    assert describe_largest(measured, (0, 0), np.array([[HIGH, 0.6]])) == ""
    assert describe_largest(measured, (0, 1), np.array([[0.04, HIGH]])) == ""


def test_no_head_that_costs_nothing_is_noted() -> None:
    assert describe_largest(effects(-0.01, -0.01, -0.02)) == ""
    assert describe_largest(effects(1.0, 1.0, 0.0)).startswith("ablating L0H0 lowers the logit difference most")


def test_ablation_that_helps_has_a_negative_effect() -> None:
    for score, measure, what in (
        ("antecedent.own", "logit_diff_own", "lowers the logit difference of the right answer"),
        ("induction", "repeats", "raises the"),
    ):
        scores = {10: {score: np.array([[HIGH, LOW]])}}
        (finding,) = compute_findings(scores, results(**{measure: effects(-0.3, -0.2, 0.0)}))
        assert f"Ablating it {what}" in finding.summary and " by -0.30 " in finding.summary
        assert "CI -0.40 to -0.20; mean ablation -0.20]" in finding.summary


def test_supported_finding_is_the_headline(tmp_path: Path) -> None:
    ablations = results(repeats=effects(1.8, 1.5, 0.02, "nats/token"))
    (finding,) = compute_findings(timeline(LOW, HIGH, HIGH), ablations)
    assert (finding.head, finding.score, finding.since, finding.label) == ((0, 0), "induction", 20, "supported")
    text = (
        "Since step 20, head L0H0 attends to what followed the same token earlier (0.90). Ablating it raises the loss on "
        "repeated tokens by 1.80 nats/token [95% CI 1.70 to 1.90; mean ablation 1.50]; ablating a random other head of "
        "its layer raises it by 0.02."
    )
    assert headline([finding]) == finding.summary == text
    save_findings(tmp_path / "findings.json", [finding])
    data = json.loads((tmp_path / "findings.json").read_text())
    (entry,) = data["findings"]
    assert data["headline"] == entry["summary"] == text
    assert (entry["is_supported"], entry["head"], entry["zero"]) == (True, [0, 0], list(finding.zero))


@pytest.mark.parametrize(
    ("zero", "mean", "control", "label"),
    [
        (1.8, 1.5, 0.0, "supported"),
        (1.8, 0.05, 0.0, "disputed"),
        (1.0, 1.0, 0.95, "same as control"),
        (0.05, 0.05, 0.0, "no effect"),
        (-1.0, -1.0, 0.0, "no effect"),
    ],
)
def test_label_compares_with_the_control(zero: float, mean: float, control: float, label: str) -> None:
    (finding,) = compute_findings(timeline(HIGH, HIGH), results(repeats=effects(zero, mean, control)))
    assert finding.label == label and finding.is_supported == (label == "supported")
    assert headline([finding]).startswith("No head qualifies") == (label != "supported")
    assert label == "supported" or LABELS[finding.label] in headline([finding])


def test_layer_of_one_head_is_judged_alone() -> None:
    alone = AblationEffects("nats", 3.0, 8, tables(zero=[1.0], mean=[1.0]))
    (finding,) = compute_findings({10: {"induction": np.array([[HIGH]])}}, results(repeats=alone))
    assert finding.label == "supported" and finding.control is None
    assert "no other head to compare with" in finding.summary


@pytest.mark.parametrize(
    ("values", "step"), [((HIGH, HIGH), 10), ((HIGH, LOW, HIGH), 30), ((LOW, HIGH, HIGH), 20), ((HIGH, LOW), 20)]
)
def test_since_is_the_last_crossing_of_the_threshold(values: tuple[float, ...], step: int) -> None:
    assert first_step_above(timeline(*values), "induction", (0, 0)) == step


def test_no_finding_below_the_threshold_or_without_effects() -> None:
    assert compute_findings(timeline(LOW, LOW), results(repeats=effects(1.8, 1.5, 0.0))) == []
    assert compute_findings(timeline(HIGH), results(corpus=effects(1.8, 1.5, 0.0))) == []
    assert headline([]) == "No head qualifies: none puts 50% or more of its attention on a tested target."


def test_headline_skips_unsupported_findings() -> None:
    scores = {10: {"induction": np.array([[HIGH, LOW]]), "antecedent.pronoun": np.array([[LOW, 0.7]])}}
    ablations = results(repeats=effects(0.0, 0.0, 0.0), logit_diff_pronoun=effects(0.0, 0.0, 2.0))
    findings = compute_findings(scores, ablations)
    assert [finding.label for finding in findings] == ["supported", "no effect"]  # the page begins with the first
    assert "head L0H1 attends to a pronoun's antecedent (0.70)" in headline(findings)
    assert "lowers the logit difference of the right answer by 2.00 nats" in headline(findings)


def test_chosen_head_must_beat_its_baseline() -> None:
    scores = {10: {"antecedent.place": np.array([[0.9, LOW]]), "antecedent.cause": np.array([[0.8, 0.9]])}}
    ablations = results(logit_diff_place=effects(2.0, 2.0, 0.0), logit_diff_cause=effects(1.0, 1.0, 0.0))
    chosen = {"antecedent.place": ((0, 0), 0.9, 1.0), "antecedent.cause": ((0, 0), 0.6, 0.5)}
    cause, place = compute_findings(scores, ablations, chosen)
    assert (place.is_supported, cause.is_supported) == (False, True)
    assert (cause.head, cause.value) == ((0, 0), 0.6)  # not the best head of all pairs
    assert "the feeling" in headline([cause, place])
    assert headline([place]).endswith("but a fixed offset or the nearest noun scores 1.00.")


def on_text(choose: AblationEffects, judge: AblationEffects, *scores: list[float]) -> Any:
    """The finding on held-out text of two heads, with these `text.induction` and `line_start` scores."""
    measures = {"corpus.choose": choose, "corpus.judge": judge}
    step = {n: np.array([s]) for n, s in zip(("text.induction", "line_start"), scores, strict=False)}
    uniform = {"text.induction": 0.05, "line_start": 0.4, "previous_token": 0.01}
    return text_finding({30: step | {"previous_token": np.array([[0.9, 0.9]])}}, results(**measures), uniform)


def test_head_that_matters_most_on_text_is_the_headline() -> None:
    """Chosen on one half, measured on the other, described by what exceeds uniform attention most."""
    found = on_text(effects(1.0, 1.0, 0.1), effects(0.21, 0.2, 0.04), [0.63, 0.7], [0.8, 0.1])
    assert (found.head, found.score, found.is_supported) == ((0, 0), "text.induction", True)
    assert headline([found]) == (
        "Head L0H0 matters most on this text: ablating it raises held-out loss by 0.21 [0.11, 0.31], another head of its "
        "layer by 0.04; it attends to what followed the same token earlier (0.63; uniform attention 0.05)."
    )
    vague = on_text(effects(1.0, 1.0, 0.1), effects(1.0, 1.0, 0.1), [0.1, 0.7], [0.45, 0.1])
    assert "what it attends to fits no score (at best, it attends to" in vague.summary


@pytest.mark.parametrize(
    ("choose", "judge", "head"),
    [
        (effects(1.0, 1.0, 0.1), effects(0.04, 0.04, 0.3), 0),  # on the other half another head is better
        (effects(0.5, 0.0, 0.4), effects(0.5, 0.0, 0.4), 0),  # by zero ablation only
        (effects(0.0, 0.0, 0.01), effects(0.01, 0.01, 0.0), 1),
        (effects(1.0, 1.0, 0.1), effects(0.11, 0.11, 0.0), 0),  # by 0.01 at least, which is hardly anything
    ],
)
def test_no_head_stands_out_on_text(choose: AblationEffects, judge: AblationEffects, head: int) -> None:
    found = on_text(choose, judge, [0.9, 0.9])
    assert found.head == (0, head) and not found.is_supported
    start = f"No head stands out on this text: on half of it ablating L0H{head} hurts most, "
    assert headline([found]).startswith(start + "but on the other half it raises")


def test_too_little_text_has_no_finding() -> None:
    assert text_finding(timeline(HIGH), results(corpus=effects(1.0, 1.0, 0.1)), {"text.induction": 0.1}) is None
    assert on_text(effects(1.0, 1.0, 0.1), effects(1.0, 1.0, 0.1)) is None  # no score on text
