"""Checks of the head scores that several tests share; `test_metric_mutants.py` runs them on formulas wrong on purpose.

Each finds the formulas through their module, so that it sees what a test has put in their place, and fails with an
AssertionError.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial

import torch
from torch import Tensor

from inspection import head_scores as metrics
from inspection import scores
from inspection.activation_cache import run_with_cache
from inspection.contrast_pairs import ContrastPair
from inspection.eval_texts import EvalTexts
from model.gpt import GPT
from tests.inspection.handmade import INDUCTION, PREVIOUS, handmade, repeats
from tests.model.helpers import random_model

N = 25
T = 2 * N + 1
HARMONIC = sum(1 / (i + 1) for i in range(1, T)) / (T - 1)
"""What reading all alike gives a head's previous token, and its first one."""
FOUND = sum(1 / (i + 1) for i in range(N + 1, T)) / N
"""And what it gives the one key that an induction head looks for."""
ON_TOKENS = ("induction", "duplicate_token")
"""The scores that compare tokens."""
# Uniform heads, the previous-token head, the induction head: on a text of token 0 and N others, said twice.
WANTED = {
    "previous_token": (HARMONIC, 1.0, 1 / (T - 1)),
    "first_token": (HARMONIC, 1 / (T - 1), N / (T - 1)),
    "duplicate_token": (FOUND, 0.0, 0.0),
    "induction": (FOUND, 0.0, 1.0),
    "relative_entropy": (1.0, 0.0, 0.0),
    "mean_distance": ((T - 1) / 4, (T - 1) / T, (sum(range(N + 1)) + N * (N - 1)) / T),
}


def same(ours: Tensor, wanted: Tensor | float, atol: float = 1e-6) -> None:
    torch.testing.assert_close(ours, torch.as_tensor(wanted).expand_as(ours), atol=atol, rtol=0)


def table(uniform: float, previous: float, induction: float) -> Tensor:
    """A value for each head of the model built by hand."""
    wanted = torch.full((2, 3), uniform)
    wanted[PREVIOUS], wanted[INDUCTION] = previous, induction
    return wanted


@cache
def seen() -> tuple[Tensor, Tensor]:
    """Pattern (L, H, T, T) and tokens (T,) of the model built by hand."""
    tokens = torch.tensor(repeats(1, N)[0])
    return run_with_cache(handmade(), tokens).pattern, tokens


def uniform(length: int) -> Tensor:
    return torch.ones(length, length).tril() / torch.arange(1, length + 1)[:, None]


def check_handmade(name: str) -> None:
    pattern, tokens = seen()
    arguments = (pattern, tokens) if name in ON_TOKENS else (pattern,)
    same(getattr(metrics, name)(*arguments), table(*WANTED[name]))


def check_ambiguous_text() -> None:
    """Tokens that stand twice in a row, or come three times: A A B B A, read all alike."""
    tokens, pattern = torch.tensor([5, 5, 7, 7, 5]), uniform(5)
    # Query 1 and 3 look for themselves alone, which does not count; query 4 finds places 1 and 2.
    same(metrics.induction(pattern, tokens), 2 / 5)
    # Query 1 finds place 0, query 3 place 2, query 4 places 0 and 1.
    same(metrics.duplicate_token(pattern, tokens), (1 / 2 + 1 / 4 + 2 / 5) / 3)


def check_batches() -> None:
    """Texts side by side are what they are one by one; a text without anything to find is nan."""
    texts = torch.tensor([[1, 2, 1, 2, 1], [1, 2, 3, 4, 5], [3, 3, 3, 1, 3]])
    pattern = torch.rand(3, 4, 5, 5, generator=torch.Generator().manual_seed(1)).tril()
    for formula in (metrics.induction, metrics.duplicate_token):
        together = formula(pattern, texts[:, None])
        for k in range(3):
            torch.testing.assert_close(together[k], formula(pattern[k], texts[k]), equal_nan=True)
        assert together[1].isnan().all() and not together[[0, 2]].isnan().any()


def check_value_weighted() -> None:
    """Values as long as their place: query i reads key j of length j by j / (1 + 2 + ... + i)."""
    length = 6
    weighted = metrics.value_weighted(uniform(length), torch.arange(6.0))
    wanted = torch.tensor([[j / max(1, i * (i + 1) / 2) if j <= i else 0.0 for j in range(length)] for i in range(6)])
    same(weighted, wanted)  # the first row, of which the only vector is 0, stays 0
    tokens = torch.tensor(repeats(1, N)[0])
    built = run_with_cache(handmade(), tokens)
    weighted = metrics.value_weighted(built.pattern, built.value_norms)
    same(weighted[PREVIOUS], built.pattern[PREVIOUS])  # all its values are equally long
    same(weighted[INDUCTION][N + 1 :], built.pattern[INDUCTION][N + 1 :])
    same(weighted[0, 1], 0.0)  # it writes nothing


def check_rollout() -> None:
    """A layer that reads the previous token, below one of which one head reads position 0 from position 3 on."""
    length = 5
    previous = torch.zeros(length, length)
    previous[0, 0] = 1
    previous[torch.arange(1, length), torch.arange(length - 1)] = 1
    first = torch.eye(length)
    first[3:] = torch.eye(length)[0]
    both = torch.stack([torch.stack([previous, previous]), torch.stack([first, torch.eye(length)])])
    rolled = metrics.rollout(both)
    same(rolled[0], (previous + torch.eye(length)) / 2)
    # Position 3 keeps 3/4 of what layer 0 had here and takes 1/4 from position 0.
    row = torch.zeros(length)
    row[[2, 3]] = 3 / 8
    row[0] = 1 / 4
    same(rolled[1, 3], row)
    same(rolled[1, :3], rolled[0, :3])


def expanded(
    model: GPT,
    fold: bool = True,
    centre: bool = True,
    deal: bool = False,
    swap: bool = False,
    keys: bool = False,
    absolute: bool = False,
    by_size: bool = False,
) -> Tensor:
    """`copying` through the V x V matrix itself, one head at a time in fp64; each switch breaks it in one way."""
    double = {name: p.detach().double() for name, p in model.named_parameters()}
    config, E = model.config, double["token_embedding.weight"]
    H, G, D = config.n_heads, config.n_kv_heads, config.d_head
    centred = centre and config.architecture.norm == "layer"

    def norm(x: Tensor, gain: Tensor) -> Tensor:
        x = x - x.mean(dim=-1, keepdim=True) if centred else x
        return x * gain if fold else x

    found = torch.zeros(config.n_layers, H)
    for layer in range(config.n_layers):
        block = f"blocks.{layer}."
        first = H if keys else H + G
        for head in range(H):
            group = head % G if deal else head // (H // G)
            start = (first + group) * D
            value = double[block + "attention.qkv.weight"][start : start + D]
            out = double[block + "attention.out.weight"][:, head * D : (head + 1) * D]
            if swap:
                out = double[block + "attention.out.weight"][:, head::H]
            written = norm(E, double[block + "norm1.weight"]) @ value.T @ out.T  # (V, C): what reading each token adds
            eigenvalues = torch.linalg.eigvals(norm(written, double["final_norm.weight"]) @ E.T)
            total = eigenvalues.abs().sum()
            real = eigenvalues.real.abs().sum() if absolute else eigenvalues.real.sum()
            if by_size:
                real = (eigenvalues.real > 0).sum() - (eigenvalues.real < 0).sum()
                total = torch.tensor(float(len(eigenvalues)))
            found[layer, head] = (real / total) if total > 1e-9 else 0.0
    return found


def check_copying(preset: str) -> None:
    """Against the V x V matrix itself; on what reads grouped heads, gains that differ, and a mean to take away."""
    model = random_model(preset)
    found = metrics.copying(model)
    same(found, expanded(model), atol=1e-4)
    assert found.std() > 0.05, "heads that are all alike prove little"


def check_copying_by_hand() -> None:
    model = handmade()
    attention = model.blocks[0].attention
    heads = attention.qkv.weight.view(3, 3, attention.d_head, -1)
    with torch.no_grad():  # head 2 of layer 0 writes what it reads, but for the sign
        heads[2, 2, :30, :30] = torch.eye(30)
        attention.out.weight.view(-1, 3, attention.d_head)[:30, 2, :30] = -torch.eye(30)
    wanted = table(0.0, 0.0, 1.0)
    wanted[0, 2] = -1.0
    same(metrics.copying(model), wanted)


def watched() -> EvalTexts:
    """Texts of three lengths, the last without anything to read; repeats; probes that the two heads answer."""
    texts = (("long", tuple(repeats(1, N)[0])), ("short", tuple(repeats(1, 10, seed=5)[0])), ("one", (0,)))
    said = [tuple(text) for text in repeats(8, N, seed=3)]
    again = [text[: N + 3 + k] for k, text in enumerate(said)]  # each breaks off within the second saying
    found = [ContrastPair("match", text, (len(text) - N,), (said[k][len(text)],), (0,)) for k, text in enumerate(again)]
    back = [ContrastPair("before", text[: 9 + k], (7 + k,), (1, 2), (3,)) for k, text in enumerate(again)]
    return EvalTexts(texts, tuple(said[:3]), (*found, *back))


def check_head_scores() -> None:
    found = scores.head_scores(handmade(), watched())
    for name in ("previous_token", "duplicate_token", "induction"):
        same(found[name], table(*WANTED[name]))
    short = sum(1 / (i + 1) for i in range(1, 21)) / 20
    same(found["first_token"], table((HARMONIC + short) / 2, (1 / 50 + 1 / 20) / 2, 1 / 2))
    same(found["entropy"], table(1.0, 0.0, 0.0))
    one, two = WANTED["mean_distance"][2], (sum(range(11)) + 10 * 9) / 21
    same(found["distance"], table((12.5 + 5) / 3, (50 / 51 + 20 / 21) / 3, (one + two) / 3), atol=1e-5)
    same(found["copying"], table(0.0, 0.0, 1.0))
    alike = sum(1 / (N + 3 + k) for k in range(8)) / 8
    same(found["antecedent.match"], table(alike, 0.0, 1.0))
    same(found["antecedent.before"], table(sum(1 / (9 + k) for k in range(8)) / 8, 1.0, 0.0))


CHECKS: dict[str, Callable[[], None]] = {
    **{f"{name} on the model built by hand": partial(check_handmade, name) for name in WANTED},
    "tokens that come several times": check_ambiguous_text,
    "batches": check_batches,
    "value-weighted": check_value_weighted,
    "rollout": check_rollout,
    **{f"copying, {preset}": partial(check_copying, preset) for preset in ("glass", "gpt2", "qwen3")},
    "copying on the model built by hand": check_copying_by_hand,
    "all scores at once": check_head_scores,
}
