"""What decides an answer, which head reads it, and whether a rule without any content would have found it too.

A head that reads the deciding word may only be reading "nine tokens back", if that is where the word mostly stands, or
the noun that stands nearest. So each family of questions (`probes.py`) is asked of two rivals as well: the best fixed
distance (Clark et al. 2019, section 4.2, hold their heads against it) and the nearest noun. Head and distance are
chosen on one half of the probes and all are compared on the other, so that choosing among many does not flatter them.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean

from inspection.contrast_pairs import ContrastPair, measure
from inspection.findings import ATTENTION_THRESHOLD
from inspection.registry import describe_antecedent
from inspection.terminal import head_name
from model.gpt import GPT


@dataclass(frozen=True)
class AntecedentScore:
    """What the probes of one kind have shown. Weights are means over the judging half of them, from 0 to 1."""

    kind: str
    count: int
    """How many probes there were, in both halves."""
    preferred: float
    """Share of all probes in which log p(right) > log p(wrong), each summed over the candidate's tokens."""
    head: tuple[int, int]
    """(layer, head), the one that reads the evidence most."""
    weight: float
    """Its weight on the evidence at the last position of the prompt."""
    offset: int
    """The best fixed distance: so many tokens before the last position of the prompt."""
    offset_weight: float
    """Share of probes in which the token there belongs to the evidence: the weight of a head that reads it alone."""
    nearest_weight: float | None
    """Share of the nearest noun's tokens that belong to the evidence; None where no probe knows the nearest noun."""

    @property
    def passes(self) -> bool:
        """Whether the head puts half of its weight, or more, on what decides."""
        return self.weight >= ATTENTION_THRESHOLD


def at_offset(probe: ContrastPair, offset: int) -> float:
    """1 if the token so many before the last of the prompt belongs to the evidence, else 0."""
    return float(len(probe.tokens) - 1 - offset in probe.evidence)


def best_offset(probes: Sequence[ContrastPair]) -> int:
    """The fixed distance that meets the evidence most often; of several the shortest."""
    return max(range(max(len(probe.tokens) for probe in probes)), key=lambda d: sum(at_offset(p, d) for p in probes))


def at_nearest(probe: ContrastPair) -> float:
    """Share of the nearest noun's tokens that belong to the evidence."""
    return len(set(probe.nearest) & set(probe.evidence)) / len(probe.nearest)


def halves(probes: Sequence[int]) -> tuple[list[int], list[int]]:
    """Two halves, the first to choose by and the second to judge by; an odd one out helps to choose.

    They are drawn, the same for the same number of probes. Every other probe will not do: a story asks twice about
    its feelings, so the even probes would all be about one animal and the odd ones about the other.
    """
    drawn = random.Random(f"halves of {len(probes)}").sample(probes, len(probes))
    middle = (len(drawn) + 1) // 2
    return drawn[:middle], drawn[middle:]


def relations(model: GPT, probes: Sequence[ContrastPair], batch_size: int = 16) -> list[AntecedentScore]:
    """Ask the model every probe; one `AntecedentScore` for each kind, in the order in which the kinds first come.

    Probes longer than the model's context are left out, and so is a kind of which fewer than two fit.
    """
    fitting = [probe for probe in probes if probe.length <= model.config.context]
    if not fitting:
        return []
    margins, weights = measure(model, fitting, batch_size)
    found = []
    for kind in dict.fromkeys(probe.kind for probe in fitting):
        mine = [k for k, probe in enumerate(fitting) if probe.kind == kind]
        if len(mine) < 2:
            continue
        choosing, judging = halves(mine)
        layer, head = divmod(int(weights[choosing].mean(dim=0).argmax()), model.config.n_heads)
        offset = best_offset([fitting[k] for k in choosing])
        judges = [fitting[k] for k in judging]
        known = [at_nearest(probe) for probe in judges if probe.nearest]
        found.append(
            AntecedentScore(
                kind,
                len(mine),
                preferred=(margins[mine] > 0).float().mean().item(),
                head=(layer, head),
                weight=weights[judging, layer, head].mean().item(),
                offset=offset,
                offset_weight=fmean(at_offset(probe, offset) for probe in judges),
                nearest_weight=fmean(known) if known else None,
            )
        )
    return found


def sentence(found: Sequence[AntecedentScore]) -> list[str]:
    """The outcome in words, a line for each relation."""
    lines = []
    for relation in found:
        name = head_name(*relation.head)
        back = f"{relation.offset} token{'s' * (relation.offset != 1)} back" if relation.offset else "the last token"
        shares = f"{relation.weight:.2f}; {back} {relation.offset_weight:.2f}"
        if relation.nearest_weight is not None:
            shares += f"; nearest noun {relation.nearest_weight:.2f}"
        outcome = f"no head puts half of its weight on the deciding word (best {name}, {shares})"
        if relation.passes:
            outcome = f"head {name} reads {describe_antecedent(relation.kind)} ({shares})"
        lines.append(f"{relation.kind}: right in {relation.preferred:.1%} of {relation.count}; {outcome}")
    return lines
