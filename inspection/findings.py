"""Findings: what a head attends to, since when, and whether ablating it matters. Needs no torch.

A head qualifies if half of its attention, or more, is on the tokens that a score tests; `ablation_label` is the only
definition of whether ablations support that it matters. On a corpus without contrast pairs it is the other way round:
`text_finding` takes the head whose ablation hurts most, and says what it attends to.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from common.files import write_atomic
from inspection.ablation_results import AblationEffects, AblationResults
from inspection.head_scores import ANTECEDENT, HELD_OUT, REPEATS, SCORES, score_info
from inspection.terminal import head_name

ATTENTION_THRESHOLD = 0.5  # a head with at least this share of its attention on the tested tokens qualifies
MIN_EFFECT = 0.02  # nats/token: the least effect on held-out loss, by its lower bound, of a head that stands out
MIN_DISTINCT = 0.1  # a score this far above that of uniform attention describes a head
KINDS = "pronoun", "gender", "crossing", "induction", "place", "cause", "agreement", "own"
FINDING_SCORES = ("induction", *(ANTECEDENT + kind for kind in KINDS), "duplicate_token", "previous_token")
"""The scores on which a head can qualify, the most informative ones first."""

Head = tuple[int, int]  # (layer, head)
Interval = tuple[float, float, float]  # a mean over items, and the bounds of its 95% confidence interval
Timeline = Mapping[int, Mapping[str, ArrayLike]]  # head scores (L, H) by step and name
LABELS = {
    "supported": "ablating it hurts more than ablating another head, if its layer has one, by zero and by mean ablation",
    "disputed": "only one of zero and mean ablation hurts more than ablating another head, if its layer has one",
    "same as control": "ablating it hurts no more than ablating another head",
    "no effect": "zero and mean ablation of it alone do not both hurt",
}
"""What each label means."""
LABEL_NOTES = {label: f"high attention, {label}: {what}" for label, what in LABELS.items() if label != "supported"}
"""Notes on heads that qualify by attention without a supported effect."""


def measure_for_score(score: str) -> str:
    """The ablation measure that should get worse if the score says what the head is for."""
    if score.startswith(ANTECEDENT):
        return "logit_diff." + score.removeprefix(ANTECEDENT)
    return "repeats" if score in SCORES and SCORES[score].texts == REPEATS else "corpus"


def ablation_label(effects: AblationEffects, layer: int, head: int) -> str:
    """Whether ablating the head hurts more than ablating another head of its layer: one of `LABELS`.

    `supported` if the intervals of both zero and mean ablation say so, `disputed` if one of them does. Otherwise
    `same as control` if both kinds of ablation hurt, and `no effect` if not.
    """
    hurts = {name: table[layer, head, 1] > 0 for name, table in effects.tables.items()}
    more = [hurts.get(f"difference_{name}", hurts[name]) for name in ("zero", "mean")]
    if all(more):
        return "supported"
    if any(more):
        return "disputed"
    return "same as control" if hurts["zero"] and hurts["mean"] else "no effect"


@dataclass(frozen=True)
class Finding:
    """A head that qualifies on a score, and the effect of ablating it."""

    head: Head
    score: str
    value: float  # the score at the last step
    since: int  # the first step from which on it stayed at ATTENTION_THRESHOLD or above
    measure: str
    unit: str
    zero: Interval
    mean: Interval
    control: Interval | None  # zero ablation of another head of the layer; None where there is no other
    label: str
    baseline: float | None = None  # what the best fixed offset, or the nearest noun, scores, if it was measured

    @property
    def is_supported(self) -> bool:
        """Whether ablations support the finding, and the head beats baselines that know no content."""
        return self.label == "supported" and (self.baseline is None or self.value > self.baseline)

    @property
    def statement(self) -> str:
        """What the head attends to, and since when."""
        name, title = head_name(*self.head), score_info(self.score).title
        return f"Since step {self.since}, head {name} {title} ({self.value:.2f})"

    @property
    def summary(self) -> str:
        """The finding in two sentences: the statement, and what ablating the head does."""
        is_loss = self.measure == "repeats"
        verb = "raises" if is_loss else "lowers"
        what = "the loss on repeated tokens" if is_loss else "the logit difference of the right answer"
        effect = f"{self.zero[0]:z.2f} {self.unit} [95% CI {self.zero[1]:z.2f} to {self.zero[2]:z.2f}; "
        effect += f"mean ablation {self.mean[0]:z.2f}]"
        control = "its layer has no other head to compare with"
        if self.control:
            control = f"ablating a random other head of its layer {verb} it by {self.control[0]:z.2f}"
        return f"{self.statement}. Ablating it {verb} {what} by {effect}; {control}."


@dataclass(frozen=True)
class TextFinding(Finding):
    """The head whose ablation raises the loss on held-out text most, and what it attends to most distinctly.

    The head was chosen on one half of the texts; its effects and label are of the other half.
    """

    uniform: float = 0.0  # what uniform attention scores

    @property
    def is_supported(self) -> bool:
        """Whether ablations support that the head matters, and more than the others of its layer."""
        return self.label == "supported" and self.zero[1] >= MIN_EFFECT

    @property
    def summary(self) -> str:
        """What ablating the head does, and what it attends to; or that no head stands out."""
        name, effect = head_name(*self.head), "raises held-out loss by {:z.2f} [{:z.2f}, {:z.2f}]".format(*self.zero)
        effect += f", another head of its layer by {self.control[0]:z.2f}" if self.control else ""
        if not self.is_supported:
            start = f"No head stands out on this text: on half of it ablating {name} hurts most"
            return f"{start}, but on the other half it {effect}."
        attends = f"it {score_info(self.score).title} ({self.value:.2f}; uniform attention {self.uniform:.2f})"
        if self.value - self.uniform < MIN_DISTINCT:
            attends = f"what it attends to fits no score (at best, {attends})"
        return f"Head {name} matters most on this text: ablating it {effect}; {attends}."


def first_step_above(timeline: Timeline, score: str, head: Head) -> int:
    """The first step from which on the head's score stayed at the threshold or above; the last step if it did not."""
    first = max(timeline)
    for step in sorted(timeline, reverse=True):
        table = timeline[step].get(score)
        if table is None or not np.asarray(table)[head] >= ATTENTION_THRESHOLD:
            break
        first = step
    return first


def compute_findings(
    timeline: Timeline, ablations: AblationResults, chosen: Mapping[str, tuple[Head, float, float | None]] | None = None
) -> list[Finding]:
    """A finding for each score on which some head qualifies, supported ones first, then in the order of `FINDING_SCORES`.

    `ablations` are of the last step of the timeline. `chosen` has by score a head that was chosen on one half of the
    contrast pairs, its score on the other half, and that of a baseline, None for few pairs (`antecedent_score.py`);
    other scores take their best head.
    """
    last = {name: np.asarray(table) for name, table in timeline[max(timeline)].items()}
    findings = []
    for score in FINDING_SCORES:
        effects = ablations.measures.get(measure_for_score(score))
        if score not in last or effects is None or not np.isfinite(last[score]).any():
            continue
        best, baseline = divmod(int(np.nanargmax(last[score])), last[score].shape[1]), None
        value = float(last[score][best])
        if chosen and score in chosen:
            best, value, baseline = chosen[score]
        if value >= ATTENTION_THRESHOLD:
            since, measure = first_step_above(timeline, score, best), measure_for_score(score)
            findings.append(Finding(best, score, value, since, measure, **_effects(effects, best), baseline=baseline))
    return sorted(findings, key=lambda finding: (not finding.is_supported, finding.label != "supported"))


def text_finding(timeline: Timeline, ablations: AblationResults, uniform: Mapping[str, float]) -> TextFinding | None:
    """The head that matters most on held-out text; None where there is too little text to choose and to measure it. It is
    described by the score that exceeds that of `uniform` attention most."""
    choose, judge = (ablations.measures.get(f"corpus.{half}") for half in ("choose", "judge"))
    last = {name: np.asarray(table) for name, table in timeline[max(timeline)].items()}
    scores = [name for name in last if name in uniform and SCORES[name].is_share and SCORES[name].texts == HELD_OUT]
    if choose is None or judge is None or not scores:
        return None
    heads: list[Any] = list(np.ndindex(choose.shape))
    supported = [head for head in heads if ablation_label(choose, *head) == "supported"]
    best = max(supported or heads, key=lambda head: float(choose.tables["zero"][head][0]))
    score = max(scores, key=lambda name: float(last[name][best]) - uniform[name])
    value, since = float(last[score][best]), max(timeline)
    return TextFinding(best, score, value, since, "corpus", uniform=uniform[score], **_effects(judge, best))


def _effects(effects: AblationEffects, head: Head) -> dict[str, Any]:
    """The fields of a finding that the ablation of its head gives."""
    intervals = {name: tuple(table[head].tolist()) for name, table in effects.tables.items()}
    about = {"zero": intervals["zero"], "mean": intervals["mean"], "control": intervals.get("control_zero")}
    return {"unit": effects.unit, **about, "label": ablation_label(effects, *head)}


def describe_largest(effects: AblationEffects, named: Head | None = None, attention: ArrayLike | None = None) -> str:
    """The head whose ablation costs most. Empty if that is `named`, which attends to the antecedent most, or another head
    with much attention (of all heads: (L, H)) to the antecedent, or if it costs nothing."""
    zero = effects.tables["zero"]
    head = divmod(int(zero[..., 0].argmax()), effects.shape[1])
    if zero[head][1] <= 0:
        return ""
    text = f"ablating {head_name(*head)} lowers the logit difference most, by "
    text += "{:.2f} [{:.2f}, {:.2f}] nats".format(*zero[head])
    if named is None or attention is None:
        return text
    share = float(np.asarray(attention)[head])
    if head == named or share >= ATTENTION_THRESHOLD:
        return ""
    return f"{text} ({head_name(*named)}: {zero[named][0]:.2f}), with {share:.2f} of its attention there"


def headline(findings: Sequence[Finding]) -> str:
    """The summary of the finding on held-out text or of the first supported one; else that no head qualifies, and why."""
    for finding in findings:
        if finding.is_supported or isinstance(finding, TextFinding):
            return finding.summary
    if not findings:
        return "No head qualifies: none puts 50% or more of its attention on a tested target."
    finding = next((finding for finding in findings if finding.label == "supported"), findings[0])
    why = LABELS[finding.label]
    if finding.label == "supported":
        why = f"a fixed offset or the nearest noun scores {finding.baseline or 0.0:.2f}"
    return f"No head qualifies. {finding.statement}, but {why}."


def save_findings(path: Path, findings: Sequence[Finding], **others: Any) -> None:
    """Write the headline, all findings and `others` as JSON, atomically; an interval is [value, low, high]. Raises UserError
    (exit code 6) if the file cannot be written."""
    entries = [asdict(f) | {"is_supported": f.is_supported, "summary": f.summary} for f in findings]
    data = {"headline": headline(findings), "findings": entries, **others}
    write_atomic(path, [json.dumps(data, indent=1).encode()])
