"""The tests' own test: head scores are computed wrongly in ways that happen by accident, and a check must notice."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from inspection import head_scores as metrics
from inspection import scores
from model.gpt import CausalSelfAttention
from tests.inspection.head_score_checks import (
    ON_TOKENS,
    WANTED,
    check_ambiguous_text,
    check_batches,
    check_copying,
    check_copying_by_hand,
    check_handmade,
    check_head_scores,
    check_rollout,
    check_value_weighted,
    expanded,
)

Patch = pytest.MonkeyPatch


def keys_of(tokens: Tensor, shift: int = -1, diagonal: int = -1) -> Tensor:
    """Which keys j < i have tokens[j + shift] = tokens[i]; the right ones with the values given."""
    length = tokens.shape[-1]
    wanted = torch.zeros(*tokens.shape, length, dtype=torch.bool)
    for j in range(max(0, -shift), min(length, length - shift)):
        wanted[..., j] = tokens == tokens[..., j + shift, None]
    return wanted.tril(diagonal)


def mass_over(average: Callable[[Tensor, Tensor], Tensor], **keys: int) -> Callable[[Tensor, Tensor], Tensor]:
    """A formula that sums the weights on keys and averages the sums in some way over the queries."""

    def formula(pattern: Tensor, tokens: Tensor) -> Tensor:
        wanted = keys_of(tokens, **keys)
        return average((pattern * wanted).sum(-1), wanted.any(-1))

    return formula


def over_eligible(mass: Tensor, eligible: Tensor) -> Tensor:
    return (mass * eligible).sum(-1) / eligible.sum(-1)


def over_all(mass: Tensor, eligible: Tensor) -> Tensor:
    return mass.mean(-1)


def rolled(step: Callable[[Tensor, Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """Rollout with another step from (heads (H, T, T), what came before) to what comes after."""

    def formula(pattern: Tensor) -> Tensor:
        found = [torch.eye(pattern.shape[-1])]
        for heads in pattern:
            found.append(step(heads, found[-1]))
        return torch.stack(found[1:])

    return formula


def half(heads: Tensor) -> Tensor:
    return 0.5 * heads.mean(0) + 0.5 * torch.eye(heads.shape[-1])


def entropy(pattern: Tensor) -> Tensor:
    return torch.special.entr(pattern).sum(-1)


def logs(pattern: Tensor, start: int = 1) -> Tensor:
    return torch.arange(start, pattern.shape[-1] + start).log()


def distances(pattern: Tensor, sign: int = 1) -> Tensor:
    place = torch.arange(pattern.shape[-1])
    return (pattern * sign * (place[:, None] - place)).sum(-1)


def swapped(metric: str) -> Callable[..., Tensor]:
    """The formula on patterns of which query and key are exchanged."""
    formula = getattr(metrics, metric)
    return lambda pattern, *rest: formula(pattern.mT, *rest)


def by_hand(name: str) -> Callable[[], None]:
    return partial(check_handmade, name)


# What is wrong, which formula, what stands in its place, and every check that must notice.
MUTANTS: dict[str, tuple[str, Callable[..., Tensor], list[Callable[[], None]]]] = {
    **{f"{n}: query and key exchanged": (n, swapped(n), [by_hand(n)]) for n in WANTED},
    "previous: itself": ("previous_token", lambda p: p.diagonal(0, -2, -1).mean(-1), [by_hand("previous_token")]),
    "previous: two back": ("previous_token", lambda p: p.diagonal(-2, -2, -1).mean(-1), [by_hand("previous_token")]),
    "previous: over all T": (
        "previous_token",
        lambda p: p.diagonal(-1, -2, -1).sum(-1) / p.shape[-1],
        [by_hand("previous_token"), check_head_scores],
    ),
    "first: query 0 too": ("first_token", lambda p: p[..., 0].mean(-1), [by_hand("first_token"), check_head_scores]),
    "first: the second": ("first_token", lambda p: p[..., 1:, 1].mean(-1), [by_hand("first_token")]),
    **{
        f"{name}: over all queries": (
            name,
            mass_over(over_all, shift=shift),
            [by_hand(name), check_ambiguous_text, check_batches, check_head_scores],
        )
        for name, shift in (("induction", -1), ("duplicate_token", 0))
    },
    **{
        f"{name}: the query's own place too": (
            name,
            mass_over(over_eligible, shift=shift, diagonal=0),
            [check_ambiguous_text],
        )
        for name, shift in (("induction", -1), ("duplicate_token", 0))
    },
    "induction: the token before": ("induction", mass_over(over_eligible, shift=1), [by_hand("induction")]),
    "induction: the token itself": ("induction", mass_over(over_eligible, shift=0), [by_hand("induction")]),
    "induction: two after": ("induction", mass_over(over_eligible, shift=-2), [by_hand("induction")]),
    "induction: nan is 0": (
        "induction",
        lambda p, t, formula=metrics.induction: formula(p, t).nan_to_num(),
        [check_batches],
    ),
    "duplicate: one after": (
        "duplicate_token",
        mass_over(over_eligible, shift=-1),
        [by_hand("duplicate_token"), check_ambiguous_text],
    ),
    "entropy: in nats": ("relative_entropy", lambda p: entropy(p)[..., 1:].mean(-1), [by_hand("relative_entropy")]),
    "entropy: in bits": (
        "relative_entropy",
        lambda p: (entropy(p) / logs(p))[..., 1:].mean(-1) / math.log(2),
        [by_hand("relative_entropy")],
    ),
    "entropy: by ln T": (
        "relative_entropy",
        lambda p: (entropy(p) / math.log(p.shape[-1]))[..., 1:].mean(-1),
        [by_hand("relative_entropy")],
    ),
    "entropy: by ln(i + 2)": (
        "relative_entropy",
        lambda p: (entropy(p) / logs(p, 2))[..., 1:].mean(-1),
        [by_hand("relative_entropy"), check_head_scores],
    ),
    "distance: without query 0": (
        "mean_distance",
        lambda p: distances(p)[..., 1:].mean(-1),
        [by_hand("mean_distance"), check_head_scores],
    ),
    "distance: forwards": ("mean_distance", lambda p: distances(p, -1).mean(-1), [by_hand("mean_distance")]),
    "values: rows not divided": (
        "value_weighted",
        lambda p, v: p * v[..., None, :],
        [check_value_weighted],
    ),
    "values: those of the query": (
        "value_weighted",
        lambda p, v: (w := p * v[..., :, None]) / w.sum(-1, keepdim=True).clamp_min(1e-30),
        [check_value_weighted],
    ),
    "values: columns divided": (
        "value_weighted",
        lambda p, v: (w := p * v[..., None, :]) / w.sum(-2, keepdim=True).clamp_min(1e-30),
        [check_value_weighted],
    ),
    "values: nan where nothing moves": (
        "value_weighted",
        lambda p, v: (w := p * v[..., None, :]) / w.sum(-1, keepdim=True),
        [check_value_weighted],
    ),
    "rollout: without the residual": ("rollout", rolled(lambda heads, x: heads.mean(0) @ x), [check_rollout]),
    "rollout: last layer first": ("rollout", rolled(lambda heads, x: x @ half(heads)), [check_rollout]),
    "rollout: the largest head": (
        "rollout",
        rolled(lambda heads, x: (heads.amax(0) + torch.eye(5)) / 2 @ x),
        [check_rollout],
    ),
    "rollout: transposed": ("rollout", rolled(lambda heads, x: half(heads).T @ x), [check_rollout]),
    "copying: gains not folded": (
        "copying",
        partial(expanded, fold=False),
        [partial(check_copying, p) for p in ("glass", "gpt2", "qwen3")],
    ),
    "copying: mean kept": ("copying", partial(expanded, centre=False), [partial(check_copying, "gpt2")]),
    "copying: heads dealt out in turn": ("copying", partial(expanded, deal=True), [partial(check_copying, "qwen3")]),
    "copying: H and D exchanged": (
        "copying",
        partial(expanded, swap=True),
        [partial(check_copying, p) for p in ("glass", "gpt2", "qwen3")] + [check_copying_by_hand],
    ),
    "copying: keys for values": ("copying", partial(expanded, keys=True), [partial(check_copying, "gpt2")]),
    "copying: without signs": ("copying", partial(expanded, absolute=True), [check_copying_by_hand]),
    "copying: signs alone": ("copying", partial(expanded, by_size=True), [partial(check_copying, "gpt2")]),
}
CASES = [(name, number) for name, (_, _, watchers) in MUTANTS.items() for number in range(len(watchers))]


@pytest.mark.parametrize(("name", "number"), CASES)
def test_a_wrong_formula_is_noticed(name: str, number: int, monkeypatch: Patch) -> None:
    metric, wrong, watchers = MUTANTS[name]
    monkeypatch.setattr(metrics, metric, wrong)
    for formulas in (scores.ON_REPEATS, scores.ON_TEXTS):  # these hold the functions themselves
        if metric in formulas:
            monkeypatch.setitem(formulas, metric, lambda pattern, tokens: wrong(*(pattern, tokens)[: arity(metric)]))
    with pytest.raises(AssertionError):
        watchers[number]()


def arity(metric: str) -> int:
    return 2 if metric in ON_TOKENS else 1


def heads_across(attention: CausalSelfAttention, x: Tensor, angles: Any) -> tuple[Tensor, ...]:
    """Queries, keys and values with H and D exchanged in the view."""
    H, D = attention.n_heads, attention.d_head
    return tuple(part.unflatten(-1, (D, H)).permute(0, 3, 1, 2) for part in attention.qkv(x).split(H * D, dim=-1))


def left_padded(texts: Any) -> Tensor:
    longest = max(map(len, texts))
    return torch.tensor([[*[0] * (longest - len(text)), *text] for text in texts])


@pytest.mark.parametrize(
    ("owner", "name", "wrong"),
    [
        (CausalSelfAttention, "project", heads_across),
        (scores, "pad", left_padded),
        (scores, "measure", lambda model, probes: (None, torch.rand(len(probes), 2, 3))),
    ],
)
def test_a_wrong_measurement_is_noticed(owner: object, name: str, wrong: object, monkeypatch: Patch) -> None:
    monkeypatch.setattr(owner, name, wrong)
    with pytest.raises(AssertionError):
        check_head_scores()
