"""The names of the head scores and what each of them means, for tables, charts, page and guide, which need no torch.

The formulas themselves are computed in `metrics.py`; which texts each is measured on is decided in `scores.py`.
"""

from __future__ import annotations

from dataclasses import dataclass

ANTECEDENTS: dict[str, str] = {
    "pronoun": "the name that decides it",
    "agreement": "the subject that decides it",
    "induction": "the earlier mention",
    "place": "the place that decides it",
    "cause": "the feeling that decides it",
    "crossing": "the noun that decides it",
}
"""What a head reads if it reads the evidence, for each kind of probe of the embedded stories."""
ANTECEDENT = "antecedent."
"""Begins the name of a score that is measured on one kind of probe: `antecedent.pronoun`."""


@dataclass(frozen=True)
class HeadScore:
    """A number for each head; A[i, j] in a formula is the weight with which query i reads key j, counted from 0."""

    name: str
    title: str
    formula: str
    low: float
    high: float | None
    """The largest value it can take; None where that grows with the text."""
    source: str
    texts: str
    """"repeats", "held-out texts", "weights" or "probes"."""


def _score(name: str, title: str, formula: str, source: str, texts: str, low: float = 0.0) -> HeadScore:
    return HeadScore(name, title, formula, low, None if name == "distance" else 1.0, source, texts)


SCORES: dict[str, HeadScore] = {
    score.name: score
    for score in (
        _score(
            "previous_token",
            "reads the previous token",
            "mean over i ≥ 1 of A[i, i-1]",
            "Elhage et al. 2021, 'Induction Heads'; Voita et al. 2019, 'positional heads'",
            "repeats",
        ),
        _score(
            "duplicate_token",
            "reads the same token, earlier",
            "mean over queries whose token came before of the sum of A[i, j] over j < i with token[j] = token[i]",
            "Wang et al. 2023, 'duplicate token heads'",
            "repeats",
        ),
        _score(
            "induction",
            "reads what came after the same token",
            "mean over queries whose token came before, at j-1 < i-1, of the sum of A[i, j] over all such j",
            "Olsson et al. 2022, 'prefix matching'",
            "repeats",
        ),
        _score(
            "first_token",
            "rests on the first token",
            "mean over i ≥ 1 of A[i, 0]",
            "Xiao et al. 2023, 'attention sinks', section 3.1",
            "held-out texts",
        ),
        _score(
            "entropy",
            "how widely it reads",
            "mean over i ≥ 1 of H(A[i]) / ln(i + 1): 0 reads one token, 1 reads all alike",
            "Clark et al. 2019, section 3.3, as a share of the most that is possible",
            "held-out texts",
        ),
        _score(
            "distance",
            "how many tokens back it reads",
            "mean over i of the sum over j of A[i, j] (i - j), in tokens",
            "Vig & Belinkov 2019, 'attention distance'",
            "held-out texts",
        ),
        _score(
            "copying",
            "copies what it reads",
            "sum of λ / sum of |λ| over the eigenvalues λ of W_U W_O W_V W_E: 1 raises what is read, -1 lowers it",
            "Elhage et al. 2021, 'Summarizing OV/QK Matrices'",
            "weights",
            low=-1.0,
        ),
    )
}


def describe_antecedent(kind: str) -> str:
    """What decides a probe of this kind, in words."""
    return ANTECEDENTS.get(kind, "the word that decides it")


def score_info(name: str) -> HeadScore:
    """The score of this name, those of the probes (`antecedent.KIND`) included.

    Raises:
        KeyError: if there is none.
    """
    kind = name.removeprefix(ANTECEDENT)
    if name == kind or not kind:
        return SCORES[name]
    formula = "mean over the probes of the sum of A[i, j] over the tokens j that decide, i the last before the answer"
    source = "the weight on a known antecedent, as in Clark et al. 2019, section 4.3"
    return HeadScore(name, f"{kind}: reads {describe_antecedent(kind)}", formula, 0.0, 1.0, source, "probes")
