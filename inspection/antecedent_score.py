"""Which head attends to the antecedent of an answer, and whether a baseline without any content would find it too.

The baselines are the best fixed offset ("nine tokens back"; Clark et al. 2019, section 4.2) and the nearest noun. Head
and offset are chosen on one half of the pairs and compared on the other, so that choosing does not bias the result. With
fewer than `MIN_HELD_OUT` pairs the head is chosen and measured on all of them, and not compared.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from statistics import fmean

from inspection.compute_scores import score_pairs
from inspection.contrast_pairs import ContrastPair
from inspection.eval_items import halves
from inspection.findings import ATTENTION_THRESHOLD, Head
from inspection.head_scores import ANTECEDENT, score_info
from inspection.terminal import head_name
from model.gpt import GPT

MIN_HELD_OUT = 8  # pairs of a kind with a known antecedent, in both halves


@dataclass(frozen=True)
class AntecedentScore:
    """The result for one kind of contrast pair. Attention is a mean over the second half of the pairs, or over few ones."""

    kind: str
    count: int  # of pairs
    accuracy: float  # share of all pairs with log p(right) > log p(wrong), each summed over the answer's tokens
    head: Head | None = None  # with the most attention on the antecedent; None if no antecedent is known
    attention: float = 0.0  # its attention to the antecedent from the last position of the prompt
    offset: int = 0  # the best fixed offset: this many tokens before the last position of the prompt
    offset_baseline: float | None = None  # share of pairs whose token there is of the antecedent; None for few pairs
    nearest_noun_baseline: float | None = None
    """Share of the nearest noun's tokens that belong to the antecedent; None where no pair knows the nearest noun."""

    @property
    def baseline(self) -> float | None:
        """The better of both baselines; None for few pairs."""
        return None if self.offset_baseline is None else max(self.offset_baseline, self.nearest_noun_baseline or 0.0)

    @property
    def summary(self) -> str:
        right = f"{self.kind}: right in {self.accuracy:.1%} of {self.count}"
        if self.head is None:
            return right
        back = f"{self.offset} token{'s' * (self.offset != 1)} back" if self.offset else "the last token"
        values = f"{self.attention:.2f}"
        if self.offset_baseline is not None:
            values += f"; {back} {self.offset_baseline:.2f}"
        if self.nearest_noun_baseline is not None:
            values += f"; nearest noun {self.nearest_noun_baseline:.2f}"
        name = head_name(*self.head)
        result = f"no head puts 50% of its attention on the antecedent (best {name}, {values})"
        if self.attention >= ATTENTION_THRESHOLD:
            result = f"head {name} {score_info(ANTECEDENT + self.kind).title} ({values})"
        return f"{right}; {result}"


def antecedent_scores(model: GPT, pairs: Sequence[ContrastPair]) -> list[AntecedentScore]:
    """The score of each kind of contrast pair, in the order in which they first occur. No head is chosen on a single pair."""
    logit_diffs, attention = score_pairs(model, pairs)
    scores = []
    for kind in dict.fromkeys(pair.kind for pair in pairs):
        ours = [k for k, pair in enumerate(pairs) if pair.kind == kind]
        accuracy = float((logit_diffs[ours] > 0).mean())
        known = [k for k in ours if pairs[k].antecedent]
        if not known or len(ours) < 2:
            scores.append(AntecedentScore(kind, len(ours), accuracy))
            continue
        choose, judge = halves(known) if len(known) >= MIN_HELD_OUT else (known, known)
        layer, head = divmod(int(attention[choose].mean(dim=0).argmax()), model.config.n_heads)
        chosen, judged = [pairs[k] for k in choose], [pairs[k] for k in judge]
        offset = max(range(max(len(pair.tokens) for pair in chosen)), key=partial(_share_at, chosen))
        nouns = [(set(pair.nearest_noun), set(pair.antecedent)) for pair in judged if pair.nearest_noun]
        nearest = [len(noun & antecedent) / len(noun) for noun, antecedent in nouns]
        mean = attention[judge, layer, head].mean().item()
        baselines = (offset, _share_at(judged, offset), fmean(nearest) if nearest else None) if judge != choose else ()
        scores.append(AntecedentScore(kind, len(ours), accuracy, (layer, head), mean, *baselines))
    return scores


def _share_at(pairs: Sequence[ContrastPair], offset: int) -> float:
    """Share of the pairs in which the token `offset` before the last of the prompt belongs to the antecedent."""
    return fmean(len(pair.tokens) - 1 - offset in pair.antecedent for pair in pairs)
