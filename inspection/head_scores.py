"""Head scores: one number for each attention head that says what its attention pattern is like.

A score is one decorated function: `compute_scores.py` computes it at every evaluation, and tables, timeline and page show
it. To let it become the headline, also name it in `findings.FINDING_SCORES`. torch is imported only in the functions.
"""

from __future__ import annotations

import codecs
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Float
from numpy.typing import NDArray

if TYPE_CHECKING:
    from jaxtyping import Bool, Int
    from torch import Tensor

    from model.gpt import GPT

    Pattern = Float[Tensor, "*heads T T"]  # A[i, j] is how much query i attends to key j
    Tokens = Int[Tensor, " T"]
    Values = Float[Tensor, "*heads Q"]  # of the queries of a text that the score is about

REPEATS, HELD_OUT, PARAMETERS = "random repeats", "held-out texts", "parameters"
CONTRAST_PAIRS = "at most 16 contrast pairs (findings and report: all)"
ANTECEDENT = "antecedent."  # Prefix of the scores that are measured on one kind of contrast pair: `antecedent.pronoun`.
ANTECEDENTS: dict[str, str] = {
    "pronoun": "a pronoun's antecedent",
    "gender": 'the animal that "she" or "he" refers to',
    "agreement": "the verb's subject",
    "induction": "the earlier mention of the next word",
    "place": "the place where the object was put",
    "cause": "the feeling that causes the action",
    "crossing": 'the noun that "it" refers to',
}
"""What decides the answer, for each kind of contrast pair of the built-in stories."""
START = re.compile(r"""(?:\0\s*|\n\s*|[.!?…।؟]["'”’)\]»]*\s+|[。！？]["”’」』）]*\s*)(?=\S)""")  # noqa: RUF001
"""What comes before a line or sentence; NUL is end-of-text."""
CLOSES = dict(zip('([{"“„«‘「『（《【', [*')]}"', "”", "“”", *"»’」』）》】"], strict=True))  # noqa: RUF001
"""What closes a bracket or quotation mark. Apostrophes have no pair."""


@dataclass(frozen=True)
class HeadScore:
    """A number for each head. In formulas, A[i, j] is how much query i attends to key j, counted from 0."""

    name: str
    title: str
    formula: str
    source: str
    texts: str  # what it is measured on: REPEATS, HELD_OUT, PARAMETERS or CONTRAST_PAIRS
    low: float = 0.0
    high: float | None = 1.0  # None where it grows with the length of the text
    is_share: bool = True  # of a head's attention, so that 0.5 means half of it
    uses_bytes: bool = False  # `compute` gets a tuple of the tokens' bytes in place of their ids
    compute: Callable[..., Any] | None = None
    """From (pattern, tokens) of a text to a value for each query, of which the score is the mean; from the model to the
    score for PARAMETERS."""


SCORES: dict[str, HeadScore] = {}  # All scores of this file by name, in order of definition.


def head_score(**fields: Any) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Register the decorated function as the head score of its name; `fields` are those of `HeadScore`. A score on REPEATS is
    measured on held-out texts too, as `text.NAME`."""

    def register(function: Callable[..., Any]) -> Callable[..., Any]:
        score = SCORES[function.__name__] = HeadScore(function.__name__, **fields, compute=function)
        if score.texts == REPEATS:
            SCORES[f"text.{score.name}"] = replace(score, name=f"text.{score.name}", texts=HELD_OUT)
        return function

    return register


@head_score(
    title="attends to the previous token",
    formula="mean over i ≥ 1 of A[i, i-1]",
    source="Elhage et al. 2021, 'Induction Heads'; Voita et al. 2019, 'positional heads'",
    texts=REPEATS,
)
def previous_token(pattern: Pattern, tokens: Tokens) -> Values:
    """0 to 1. Uniform attention gives (1/2 + ... + 1/T) / (T - 1): 0.0704 at T = 51."""
    return pattern.diagonal(-1, -2, -1)


@head_score(
    title="attends to earlier copies of the same token",
    formula="mean over queries whose token occurred before of the sum of A[i, j] over j < i with token[j] = token[i]",
    source="Wang et al. 2023, 'duplicate token heads'",
    texts=REPEATS,
)
def duplicate_token(pattern: Pattern, tokens: Tokens) -> Values:
    """0 to 1, of tokens that occurred before."""
    return _attention_to(pattern, (tokens[:, None] == tokens).tril(-1))


@head_score(
    title="attends to what followed the same token earlier",
    formula="mean over queries i that have such keys of the sum of A[i, j] over 1 ≤ j < i with token[j-1] = token[i]",
    source="Olsson et al. 2022, 'prefix matching'",
    texts=REPEATS,
)
def induction(pattern: Pattern, tokens: Tokens) -> Values:
    """0 to 1, of tokens that occurred before. Where a token occurs twice in a row, the query itself does not count as a match.

    Some authors divide by all queries of a repeated sequence, not only by those with a match: about half of this.
    """
    after_match = (tokens[:, None] == tokens.roll(1)).tril(-1)
    after_match[:, 0] = False  # no token is before the first
    return _attention_to(pattern, after_match)


@head_score(
    title="attends to the first token",
    formula="mean over i ≥ 1 of A[i, 0]",
    source="Xiao et al. 2023, 'attention sinks', section 3.1",
    texts=HELD_OUT,
)
def first_token(pattern: Pattern, tokens: Tokens) -> Values:
    """0 to 1. Query 0 is left out: it can attend to nothing else."""
    return pattern[..., 1:, 0]


@head_score(
    title="attends to the start of its line or sentence",
    formula="mean over i of A[i, j] summed over j < i: the line break or mark before the line or sentence, its first token",
    source="attention to separators, as in Clark et al. 2019, section 3.2",
    texts=HELD_OUT,
    uses_bytes=True,
)
def line_start(pattern: Pattern, pieces: tuple[bytes, ...]) -> Values:
    """0 to 1. An abbreviation followed by a space counts as the end of a sentence."""
    return _attention_to(pattern, _targets(pieces, _starts))


@head_score(
    title="attends to the bracket or quotation mark that is open",
    formula="mean over queries i inside brackets or quotes of A[i, j], j < i the innermost one that is open after i",
    source="what a closing bracket depends on, as in Karpathy et al. 2015, section 4.2",
    texts=HELD_OUT,
    uses_bytes=True,
)
def open_bracket(pattern: Pattern, pieces: tuple[bytes, ...]) -> Values:
    """0 to 1. A blank line closes all of them."""
    return _attention_to(pattern, _targets(pieces, _open_brackets))


@head_score(
    title="entropy of its attention",
    formula="mean over i ≥ 1 of H(A[i]) / ln(i + 1): 0 is one token, 1 is uniform",
    source="Clark et al. 2019, section 3.3, divided by the largest possible entropy",
    texts=HELD_OUT,
    is_share=False,
)
def entropy(pattern: Pattern, tokens: Tokens) -> Values:
    """0 (one token) to 1 (uniform), with H(p) = -sum of p ln p."""
    import torch

    entropies = torch.special.entr(pattern).sum(dim=-1)
    largest = torch.arange(1, pattern.shape[-1] + 1, device=pattern.device, dtype=pattern.dtype).log()
    return entropies[..., 1:] / largest[1:]


@head_score(
    title="mean attention distance in tokens",
    formula="mean over i of the sum over j of A[i, j] (i - j), in tokens",
    source="Vig & Belinkov 2019, 'attention distance'",
    texts=HELD_OUT,
    high=None,
    is_share=False,
)
def distance(pattern: Pattern, tokens: Tokens) -> Values:
    """0 to T - 1; uniform attention gives a mean of (T - 1) / 4."""
    import torch

    position = torch.arange(pattern.shape[-1], device=pattern.device, dtype=pattern.dtype)
    return (pattern * (position[:, None] - position)).sum(dim=-1)


@head_score(
    title="copies the tokens it attends to",
    formula="sum of λ / sum of |λ| over the eigenvalues λ of W_U W_O W_V W_E: 1 raises the attended token's logit",
    source="Elhage et al. 2021, 'Summarizing OV/QK Matrices'",
    texts=PARAMETERS,
    low=-1.0,
    is_share=False,
)
def copying(model: GPT) -> Float[Tensor, "L H"]:
    """Whether a head raises the logits of the tokens it attends to, -1 to 1; 0 if nothing it writes reaches the logits.

    Computed from W_V W_E W_U W_O, which is D x D and has the same nonzero eigenvalues. Norm weights are folded in, as
    is layer norm's subtraction of the mean. Left out: the norms' division (the same for all eigenvalues if the stream
    has the same norm everywhere), biases, positions, and what the layers in between add.
    """
    import torch

    from inspection.activation_cache import blocks_of

    def norm_weight(norm: Any) -> Tensor:
        return getattr(norm, "weight", torch.ones(())).detach().float()

    embedding = model.token_embedding.weight.detach().float()
    unembedding = model.lm_head.weight.detach().float() * norm_weight(model.final_norm)
    if model.config.architecture.norm == "layer":
        embedding = embedding - embedding.mean(dim=-1, keepdim=True)
        unembedding = unembedding - unembedding.mean(dim=-1, keepdim=True)
    products = []
    between = (embedding.T @ unembedding).cpu().double()  # W_E W_U (C, C), shared by all heads
    for block in blocks_of(model):
        H, G, D = block.attention.n_heads, block.attention.n_kv_heads, block.attention.d_head
        values = block.attention.qkv.weight.detach().cpu().double()[(H + G) * D :].unflatten(0, (G, D))
        values = (values * norm_weight(block.norm1).cpu().double()).repeat_interleave(H // G, dim=0)
        outputs = block.attention.out.weight.detach().cpu().double().unflatten(1, (H, D)).transpose(0, 1)
        products.append(values @ between @ outputs)
    circuits = torch.stack(products)
    if not circuits.isfinite().all():
        return torch.full(circuits.shape[:2], torch.nan)  # eigvals would raise
    eigenvalues = torch.linalg.eigvals(circuits)
    total = eigenvalues.abs().sum(dim=-1)
    return (eigenvalues.real.sum(dim=-1) / total.clamp(min=1e-9)).float()


def _attention_to(pattern: Pattern, keys: Bool[Tensor, "T T"]) -> Values:
    """Each query's total attention to its `keys`, of the queries that have any."""
    keys = keys.to(pattern.device)
    return (pattern * keys).sum(dim=-1)[..., keys.any(dim=-1)]


@lru_cache(maxsize=128)
def _targets(pieces: tuple[bytes, ...], find: Callable[[str], Iterator[tuple[int, list[int]]]]) -> Bool[Tensor, "T T"]:
    """For each query the earlier keys that `find` gives it: characters, each with its targets until the next one.

    A character belongs to the token that completes it; end-of-text, which has no bytes, is NUL.
    """
    import torch

    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    pairs = [(c, k) for k, piece in enumerate(pieces) for c in decoder.decode(piece or b"\0")]
    keys = torch.zeros(len(pieces), len(pieces), dtype=torch.bool)
    for character, targets in find("".join(c for c, _ in pairs)):
        keys[pairs[character][1] :] = False
        keys[pairs[character][1] :, [pairs[target][1] for target in targets]] = True
    return keys.tril(-1)


def _starts(text: str) -> Iterator[tuple[int, list[int]]]:
    """From its first character on, the two ends of the match of `START` before a line or sentence."""
    return ((match.end(), [match.start(), match.end()]) for match in START.finditer(text))


def _open_brackets(text: str) -> Iterator[tuple[int, list[int]]]:
    """The innermost bracket or quotation mark that is open after each character that changes it."""
    opened: list[int] = []
    for k, c in enumerate(text):
        if c == "\0" or text[k - 1 : k + 1] == "\n\n":
            opened.clear()
        elif opened and c in CLOSES[text[opened[-1]]]:
            opened.pop()
        elif c in CLOSES:
            opened.append(k)
        else:
            continue
        yield k, opened[-1:]


def value_weighted(
    attention: Float[np.ndarray, "*batch S"], value_norms: Float[np.ndarray, "*#batch S"]
) -> NDArray[np.float64]:
    """Attention weighted by value norms: |A_j v_j W_O|, divided by its sum (Kobayashi et al. 2020, section 3); nan where all
    value vectors are zero."""
    moved = attention.astype(np.float64) * value_norms
    total = moved.sum(axis=-1, keepdims=True)
    return np.divide(moved, total, out=np.full_like(moved, np.nan), where=total > 0)


def score_info(name: str) -> HeadScore:
    """The score of this name, `antecedent.KIND` included; for an unknown one, which a file may hold, only its name."""
    if name in SCORES:
        return SCORES[name]
    kind = name.removeprefix(ANTECEDENT)
    if kind in ("", name):
        return HeadScore(name, title=name, formula="", source="", texts="")
    return HeadScore(
        name,
        title=f"attends to {ANTECEDENTS.get(kind, 'the word that decides the answer')}",
        formula="mean over the pairs of the sum of A[i, j] over the antecedent's tokens j, i the last prompt token",
        source="attention to a known antecedent, as in Clark et al. 2019, section 4.3",
        texts=CONTRAST_PAIRS,
    )
