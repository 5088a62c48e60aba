"""What may be said of a head: what it reads, since when, and what happens without it. Needs numpy alone.

A head earns a sentence if it puts half of its weight, or more, where it is asked about. Whether that matters is
another question, answered beside it: by what changes when the head is taken away, next to the same done to another
head of its layer. The one sentence is kept for a head that matters by both ways of taking it away, with zero and with
its mean, and that reads more than a rule could that only counts distances or takes the nearest noun.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal, Protocol, runtime_checkable

import numpy as np
from numpy.typing import ArrayLike

from common.files import write_atomic
from inspection.ablation_results import AblationEffects, AblationResults, Interval
from inspection.terminal import head_name

ATTENTION_THRESHOLD = 0.5
"""A head that puts at least this share of its weight on something reads it."""
DESCRIPTIONS = {
    "induction": "reads the token after an earlier match",
    "antecedent.pronoun": "reads the name that a pronoun stands for",
    "antecedent.crossing": 'reads what an "it" stood for',
    "antecedent.induction": "reads the earlier mention of what comes next",
    "antecedent.place": "reads the place where a thing was put",
    "antecedent.cause": "reads the feeling that leads to what is done",
    "antecedent.agreement": "reads the subject of the verb",
    "antecedent.own": "reads the word that decides",
    "duplicate_token": "reads earlier copies of its own token",
    "previous_token": "reads the token before it",
}
"""What a score says in words, the more telling ones first."""

Head = tuple[int, int]
"""(layer, head)."""
Label = Literal["supported", "disputed", "same as control", "no effect"]
LABEL_NOTES = {
    "disputed": "high weight, disputed effect",
    "same as control": "high weight, no effect beyond that of another head",
    "no effect": "high weight, no effect",
}
"""What is said of a head that reads a lot without mattering."""


def measure_for_score(score: str) -> str:
    """The measure of `evidence.py` that fits a score: what should suffer if the score says what a head is for."""
    if score.startswith("antecedent."):
        return "logit_diff." + score.removeprefix("antecedent.")
    return "repeats" if score in ("induction", "duplicate_token", "previous_token") else "corpus"


@runtime_checkable
class Together(Protocol):
    """What taking several heads of a layer away at once does; a `causal.GroupEffect` is one."""

    @property
    def zero(self) -> Interval: ...
    @property
    def mean(self) -> Interval: ...
    @property
    def control_zero(self) -> Interval | None: ...
    @property
    def difference_zero(self) -> Interval | None: ...
    @property
    def difference_mean(self) -> Interval | None: ...


TakeAway = Callable[[str, Sequence[Head]], Together]
"""From a measure and heads of one layer to the effect of taking all of them away."""


@dataclass(frozen=True)
class Finding:
    """A head that reads something, and the effect of taking it away; or several that only matter together."""

    head: Head
    score: str
    value: float
    """The score of the last step."""
    since: int
    """The first step from which on it stayed above `ATTENTION_THRESHOLD`."""
    measure: str
    unit: str
    zero: Interval
    mean: Interval
    control: Interval | None
    """Another head of the layer set to zero; None where it has no other."""
    label: Label
    others: tuple[Head, ...] = ()
    """Heads of the same layer that do the same, and were taken away with it."""
    baseline: float | None = None
    """What the best fixed distance, or the nearest noun, would have scored; None where that was not asked."""

    @property
    def is_supported(self) -> bool:
        """Whether the head matters, and reads more than a rule without any content would."""
        return self.label == "supported" and (self.baseline is None or self.value > self.baseline)

    @property
    def summary(self) -> str:
        """The claim as a sentence."""
        return f"{self.reading}; {self.effect}."

    @property
    def reading(self) -> str:
        names = [head_name(*head) for head in (self.head, *self.others)]
        if not self.others:
            return f"By step {self.since} head {names[0]} {DESCRIPTIONS[self.score]} ({self.value:.2f})"
        all_names = f"{', '.join(names[:-1])} and {names[-1]}"
        read = DESCRIPTIONS[self.score].replace("reads", "read", 1)
        return f"By step {self.since} heads {all_names} {read} (up to {self.value:.2f})"

    @property
    def effect(self) -> str:
        """What happens without the head."""
        what = "the loss on repeats" if self.measure == "repeats" else "the lead of the right answer"
        size = 1 + len(self.others)
        it, whose, means = ("it", "its", "mean") if size == 1 else ("them", "their", "means")
        within = f"95 %: {self.zero.low:.2f} to {self.zero.high:.2f}"
        spread = f"[{within}; with {whose} {means} instead, {self.mean.value:.2f}]"
        done = f"without {it} {what} {self.moves(self.zero)} nats {spread}"
        if self.control is None:
            return f"{done}; {whose} layer has no other head to compare with"
        rivals = "a random other head" if size == 1 else f"{size} random other heads"
        return f"{done}, without {rivals} of {whose} layer it {self.moves(self.control)}"

    def moves(self, by: Interval) -> str:
        """Which way the measured number goes; a positive effect is the one that hurts."""
        rises = (by.value >= 0) == (self.measure == "repeats")
        return f"{'rises' if rises else 'falls'} by {abs(by.value):.2f}"


def ablation_label(effects: AblationEffects, layer: int, head: int) -> Label:
    """Whether taking the head away hurts more than taking another one away: by both ways, one, or neither.

    By neither it is `like another head` if it hurts all the same, by both ways, and else of `no effect`.
    """
    tables = (effects.zero, effects.mean, effects.difference_zero, effects.difference_mean)
    return _label(*(None if table is None else table[layer][head] for table in tables))


def _label(
    zero: Interval | None, mean: Interval | None, difference_zero: Interval | None, difference_mean: Interval | None
) -> Label:
    assert zero is not None and mean is not None
    more = [(margin or alone).low > 0 for margin, alone in ((difference_zero, zero), (difference_mean, mean))]
    if any(more):
        return "supported" if all(more) else "disputed"
    return "same as control" if zero.low > 0 and mean.low > 0 else "no effect"


def since(timeline: Mapping[int, Mapping[str, ArrayLike]], score: str, head: Head) -> int:
    """The first step from which on the head's score stayed at `ATTENTION_THRESHOLD` or above; the last step where it does not."""
    steps = sorted(timeline)
    first = steps[-1]
    for step in reversed(steps):
        table = timeline[step].get(score)
        if table is None or not np.asarray(table)[head] >= ATTENTION_THRESHOLD:
            break
        first = step
    return first


def claims(
    timeline: Mapping[int, Mapping[str, ArrayLike]],
    evidence: AblationResults,
    readings: Mapping[str, tuple[Head, float, float]] | None = None,
    take_away: TakeAway | None = None,
) -> list[Finding]:
    """A claim for each score on which some head passes, in the order of `DESCRIPTIONS`.

    Args:
        timeline: the head scores (L, H) of each step, as dumps hold them.
        evidence: what taking heads away does at the last step.
        readings: score → (head, weight, baseline), where the head was chosen on other questions than it was scored on
            and a rule without content was scored beside it (`relations.py`).
        take_away: asked about the heads of a layer that all pass, where the best of them does not matter alone: two
            that do the same hide each other.
    """
    last = {name: np.asarray(table) for name, table in timeline[max(timeline)].items()}
    found = []
    for score in DESCRIPTIONS:
        effects = evidence.measures.get(measure_for_score(score))
        if score not in last or effects is None or not np.isfinite(last[score]).any():
            continue
        best = np.unravel_index(np.nanargmax(last[score]), last[score].shape)
        own = ((int(best[0]), int(best[1])), float(last[score][best]), None)
        head, weight, baseline = (readings or {}).get(score, own)
        if weight < ATTENTION_THRESHOLD:
            continue
        claim = replace(_alone(score, head, effects, since(timeline, score, head)), value=weight, baseline=baseline)
        layer = last[score][head[0]]
        alike = [(head[0], k) for k in np.flatnonzero(layer >= ATTENTION_THRESHOLD).tolist() if k != head[1]]
        if take_away is not None and claim.label != "supported" and 0 < len(alike) < len(layer) - 1:
            begun = max(since(timeline, score, one) for one in (head, *alike))
            claim = _joined(claim, tuple(alike), take_away(claim.measure, [head, *alike]), begun)
        found.append(claim)
    return found


def _alone(score: str, head: Head, effects: AblationEffects, begun: int) -> Finding:
    """The claim of one head; its weight and baseline are still to be filled in."""
    layer, k = head
    return Finding(
        head=head,
        score=score,
        value=0.0,
        since=begun,
        measure=measure_for_score(score),
        unit=effects.unit,
        zero=effects.zero[layer][k],
        mean=effects.mean[layer][k],
        control=effects.control_zero[layer][k] if effects.control_zero else None,
        label=ablation_label(effects, layer, k),
    )


def _joined(one: Finding, others: tuple[Head, ...], effect: Together, begun: int) -> Finding:
    """The claim of a head with others that do the same, where they matter together; else the head's own."""
    outcome = _label(effect.zero, effect.mean, effect.difference_zero, effect.difference_mean)
    if outcome != "supported":
        return one
    one = replace(one, zero=effect.zero, mean=effect.mean, control=effect.control_zero)
    return replace(one, others=others, since=begun, label=outcome)


def sentence(found: Sequence[Finding]) -> str:
    """The one sentence: the first head whose reading stands; else that none passes, and why."""
    for claim in found:
        if claim.is_supported:
            return claim.summary
    if not found:
        return "No head passes: none puts half of its weight where it was asked about."
    claim = next((claim for claim in found if claim.label == "supported"), found[0])
    why = {
        "supported": f"and a rule that knows no content would read it as well ({claim.baseline or 0.0:.2f})",
        "disputed": "but only one of two ways of taking it away hurts more than for another head",
        "same as control": "but taking it away hurts no more than for another head",
        "no effect": "but taking it away does not hurt",
    }[claim.label]
    return f"No head passes: {claim.reading[0].lower()}{claim.reading[1:]}, {why}."


def save(path: Path, found: Sequence[Finding]) -> None:
    """Write the sentence and all claims as JSON, for the page and the tables.

    Raises:
        UserError: if the file cannot be written (exit code 6).
    """
    write_atomic(path, [json.dumps(as_json(found), indent=1).encode()])


def as_json(found: Sequence[Finding]) -> dict[str, Any]:
    """The sentence and all claims as plain data; an interval is {value, low, high}."""
    return {"headline": sentence(found), "findings": [asdict(claim) | _said(claim) for claim in found]}


def _said(claim: Finding) -> dict[str, Any]:
    return {"summary": claim.summary, "effect": claim.effect, "is_supported": claim.is_supported}
