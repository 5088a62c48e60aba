"""Head scores: closed forms on a model with known heads, brute force, and mutants that the checks must notice."""

import math
from collections.abc import Callable
from dataclasses import replace
from functools import cache, partial
from typing import Any

import pytest
import torch
from torch import Tensor

from inspection import head_scores
from inspection.activation_cache import run_with_cache
from inspection.compute_scores import compute_head_scores, uniform_scores
from inspection.contrast_pairs import ContrastPair
from inspection.eval_texts import EvalTexts
from inspection.head_scores import REPEATS, SCORES
from model.gpt import GPT
from tests.inspection.handmade import INDUCTION, PREVIOUS, handmade, repeats
from tests.model.helpers import SHAPES, random_model

Patch = pytest.MonkeyPatch
N = 25
T = 2 * N + 1
UNIFORM_ONE = sum(1 / (i + 1) for i in range(1, T)) / (T - 1)
"""Mean over i >= 1 of uniform attention to one key."""
UNIFORM_MATCH = sum(1 / (i + 1) for i in range(N + 1, T)) / N
"""The same over the queries of the second copy."""
# Uniform heads, previous-token head, induction head; on token 0 and N others, repeated.
EXPECTED = {
    "previous_token": (UNIFORM_ONE, 1.0, 1 / (T - 1)),
    "first_token": (UNIFORM_ONE, 1 / (T - 1), N / (T - 1)),
    "duplicate_token": (UNIFORM_MATCH, 0.0, 0.0),
    "induction": (UNIFORM_MATCH, 0.0, 1.0),
    "entropy": (1.0, 0.0, 0.0),
    "distance": ((T - 1) / 4, (T - 1) / T, (sum(range(N + 1)) + N * (N - 1)) / T),
}


def close(actual: Tensor, expected: Tensor | float, atol: float = 1e-6) -> None:
    torch.testing.assert_close(actual, torch.as_tensor(expected).expand_as(actual), atol=atol, rtol=0)


def table(uniform: float, previous: float, induction: float) -> Tensor:
    """A value for each head of the handmade model."""
    values = torch.full((2, 3), uniform)
    values[PREVIOUS], values[INDUCTION] = previous, induction
    return values


@cache
def handmade_pattern() -> tuple[Tensor, Tensor]:
    tokens = torch.tensor(repeats(1, N)[0])
    return run_with_cache(handmade(), tokens).pattern, tokens


def uniform_pattern(length: int) -> Tensor:
    return torch.ones(length, length).tril() / torch.arange(1, length + 1)[:, None]


def compute(name: str, *args: Any) -> Tensor:
    function = SCORES[name].compute
    assert function is not None
    result: Tensor = function(*args)
    return result if name == "copying" else result.mean(dim=-1)


def check_closed_form(name: str) -> None:
    close(compute(name, *handmade_pattern()), table(*EXPECTED[name]))


def check_ambiguous_text() -> None:
    """A A B B A with uniform attention: tokens twice in a row, and three times."""
    tokens, pattern = torch.tensor([5, 5, 7, 7, 5]), uniform_pattern(5)
    close(compute("induction", pattern, tokens), 2 / 5)  # query 4 matches keys 1 and 2; 1 and 3 only themselves
    close(compute("duplicate_token", pattern, tokens), (1 / 2 + 1 / 4 + 2 / 5) / 3)


def copying_by_hand(
    model: GPT, fold: bool = True, center: bool = True, keys: bool = False, signs: bool = True
) -> Tensor:
    """`copying` from the V x V matrix, one head at a time in double precision; the switches make it wrong."""
    config, p = model.config, {name: parameter.detach().double() for name, parameter in model.named_parameters()}
    E, H, G, D = p["token_embedding.weight"], config.n_heads, config.n_kv_heads, config.d_head

    def norm(x: Tensor, name: str) -> Tensor:
        if center and config.architecture.norm == "layer":
            x = x - x.mean(dim=-1, keepdim=True)
        return x * p.get(name, torch.ones(())) if fold else x

    scores = torch.zeros(config.n_layers, H)
    for layer in range(config.n_layers):
        block = f"blocks.{layer}."
        for head in range(H):
            start = ((H if keys else H + G) + head // (H // G)) * D
            W_V = p[block + "attention.qkv.weight"][start : start + D]
            W_O = p[block + "attention.out.weight"][:, head * D : (head + 1) * D]
            written = norm(E, block + "norm1.weight") @ W_V.T @ W_O.T
            eigenvalues = torch.linalg.eigvals(norm(written, "final_norm.weight") @ p.get("lm_head.weight", E).T)
            total = eigenvalues.abs().sum()
            real = eigenvalues.real.sum() if signs else eigenvalues.real.abs().sum()
            scores[layer, head] = real / total if total > 1e-9 else 0.0
    return scores


def check_copying(preset: str) -> None:
    model = random_model(preset)
    scores = compute("copying", model)
    close(scores, copying_by_hand(model), atol=1e-4)
    assert scores.std() > 0.05


def check_copying_of_known_heads() -> None:
    model = handmade()
    attention = model.blocks[0].attention
    per_head = attention.qkv.weight.view(3, 3, attention.d_head, -1)
    with torch.no_grad():  # head 2 of layer 0 writes the negative of the attended token
        per_head[2, 2, :30, :30] = torch.eye(30)
        attention.out.weight.view(-1, 3, attention.d_head)[:30, 2, :30] = -torch.eye(30)
    expected = table(0.0, 0.0, 1.0)
    expected[0, 2] = -1.0
    close(compute("copying", model), expected)


def token_bytes(token: int) -> bytes:
    return b" %d." % token if token else b""


def eval_texts() -> EvalTexts:
    """Texts of three lengths, the last with nothing to attend to; repeats; pairs that the two heads solve."""
    long, other = (tuple(text) for text in repeats(2, N))
    texts = (("long", long), ("other", other), ("short", tuple(repeats(1, 10, seed=5)[0])), ("one", (0,)))
    sequences = [tuple(text) for text in repeats(8, N, seed=3)]
    prompts = [text[: N + 3 + k] for k, text in enumerate(sequences)]  # each ends within the second copy
    match = [ContrastPair("match", p, (len(p) - N,), (sequences[k][len(p)],), (0,)) for k, p in enumerate(prompts)]
    before = [ContrastPair("before", p[: 9 + k], (7 + k,), (1, 2), (3,)) for k, p in enumerate(prompts)]
    return EvalTexts(texts, tuple(sequences[:3]), (*match, *before))


def check_all_scores() -> None:
    scores = compute_head_scores(handmade(), eval_texts(), token_bytes)
    for name in ("previous_token", "duplicate_token", "induction"):
        close(scores[name], table(*EXPECTED[name]))
    close(scores["text.previous_token"][PREVIOUS], 1.0)
    close(scores["text.induction"][INDUCTION], 1.0)
    uniform = uniform_scores(eval_texts(), token_bytes)
    assert {"induction", "text.previous_token", "text.induction"} - set(uniform) == {"induction", "text.induction"}
    for name, value in uniform.items():
        close(scores[name][0, 1:], value, atol=1e-5)  # these heads attend uniformly
    short = sum(1 / (i + 1) for i in range(1, 21))
    close(scores["first_token"], table((100 * UNIFORM_ONE + short) / 120, 3 / 120, 1 / 2))  # of 50 + 50 + 20 queries
    close(scores["copying"], table(0.0, 0.0, 1.0))
    close(scores["antecedent.match"], table(sum(1 / (N + 3 + k) for k in range(8)) / 8, 0.0, 1.0))
    close(scores["antecedent.before"], table(sum(1 / (9 + k) for k in range(8)) / 8, 1.0, 0.0))


CHECKS: dict[str, Callable[[], None]] = {
    **{name: partial(check_closed_form, name) for name in EXPECTED},
    "ambiguous": check_ambiguous_text,
    **{f"copying, {preset}": partial(check_copying, preset) for preset in SHAPES},
    "copying, known": check_copying_of_known_heads,
    "all": check_all_scores,
}


@pytest.mark.parametrize("name", CHECKS)
def test_score_has_its_known_value(name: str) -> None:
    CHECKS[name]()


def attention_to(shift: int, diagonal: int = -1, all_queries: bool = False) -> Callable[[Tensor, Tensor], Tensor]:
    """Attention to the keys j with tokens[j + shift] = tokens[i], over queries that have any or over all."""

    def score(pattern: Tensor, tokens: Tensor) -> Tensor:
        keys = tokens[:, None] == tokens.roll(-shift)
        keys[:, :-shift] = False
        keys = keys.tril(diagonal)
        attention = (pattern * keys).sum(-1)
        return attention if all_queries else attention[..., keys.any(-1)]

    return score


def entropy_by_ln_T(pattern: Tensor, tokens: Tensor) -> Tensor:
    return (torch.special.entr(pattern).sum(-1) / math.log(T))[..., 1:]


MUTANTS: dict[str, tuple[str, Callable[..., Tensor], list[str]]] = {
    "query and key swapped": ("induction", lambda p, t: head_scores.induction(p.mT, t), ["induction"]),
    "itself": ("previous_token", lambda p, t: p.diagonal(0, -2, -1), ["previous_token"]),
    "over all T": ("previous_token", lambda p, t: p.diagonal(-1, -2, -1) * (T - 1) / T, ["previous_token"]),
    "all queries": ("induction", attention_to(-1, all_queries=True), ["induction", "ambiguous"]),
    "own position": ("induction", attention_to(-1, diagonal=0), ["ambiguous"]),
    "the match itself": ("induction", attention_to(0), ["induction"]),
    "duplicate: all queries": ("duplicate_token", attention_to(0, all_queries=True), ["ambiguous"]),
    "by ln T": ("entropy", entropy_by_ln_T, ["entropy"]),
    "norm weights": ("copying", partial(copying_by_hand, fold=False), ["copying, glass", "copying, qwen3"]),
    "mean": ("copying", partial(copying_by_hand, center=False), ["copying, gpt2"]),
    "keys": ("copying", partial(copying_by_hand, keys=True), ["copying, gpt2"]),
    "signs": ("copying", partial(copying_by_hand, signs=False), ["copying, known"]),
}
CASES = [(name, check) for name, (_, _, checks) in MUTANTS.items() for check in checks]


@pytest.mark.parametrize(("name", "check"), CASES)
def test_wrong_formula_fails_a_check(name: str, check: str, monkeypatch: Patch) -> None:
    score, wrong, _ = MUTANTS[name]
    monkeypatch.setitem(SCORES, score, replace(SCORES[score], compute=wrong))
    with pytest.raises(AssertionError):
        CHECKS[check]()


def test_copying_of_zero_or_broken_heads() -> None:
    model = GPT(random_model("glass").config, 61)  # initialized with outputs of zero
    close(compute("copying", model), 0.0)
    with torch.no_grad():
        model.blocks[1].attention.qkv.weight.fill_(torch.nan)
    assert "copying" not in compute_head_scores(model, EvalTexts(), token_bytes)


def test_scores_without_texts_are_left_out() -> None:
    model = handmade()
    one_token, distinct = EvalTexts((("a", (0,)),)), EvalTexts((), ((0, 1, 2, 3, 4),))
    assert set(compute_head_scores(model, EvalTexts(), token_bytes)) == {"copying"}
    assert set(compute_head_scores(model, one_token, token_bytes)) == {"copying", "distance"}
    assert set(compute_head_scores(model, distinct, token_bytes)) == {"copying", "previous_token"}


def test_decorated_function_is_a_new_score(monkeypatch: Patch) -> None:
    for name in ("itself", "text.itself"):
        monkeypatch.setitem(SCORES, name, None)  # removed again at the end of the test

    @head_scores.head_score(title="attends to itself", formula="mean of A[i, i]", source="none", texts=REPEATS)
    def itself(pattern: Tensor, tokens: Tensor) -> Tensor:
        return pattern.diagonal(0, -2, -1)

    found = compute_head_scores(handmade(), eval_texts(), token_bytes)
    close(found["itself"], table((UNIFORM_ONE * (T - 1) + 1) / T, 1 / T, 1 / T))


SPLIT = [bytes([byte]) for byte in "你。「好」".encode()]  # 3 bytes a character; the last byte completes it
WORDS = [word.encode() for word in ("He (", "the “", "big", " one” said", "). ", "Yes")]
# Texts in tokens, and the keys of each query; `|` is end-of-text, which has no bytes.
TARGETS: list[tuple[Callable[..., Any], str | list[bytes], list[str]]] = [
    (head_scores._starts, "ab\n  cd\ne", [*".....2", "25", "25", "7"]),  # the line break and the first letter
    (head_scores._starts, 'a." B c', [*"....1", "14", "14"]),
    (head_scores._starts, "|ab", [".", "0", "01"]),
    (head_scores._starts, "3.14, a", [*"......."]),
    (head_scores._starts, SPLIT, [*"........5", *["58"] * 6]),
    (head_scores._open_brackets, 'a(b[c]d)"e"', [*"..1.311..8."]),  # the innermost one that is open after the query
    (head_scores._open_brackets, "(a\n\nb", [*".00.."]),
    (head_scores._open_brackets, "(a|b)", [*".0..."]),
    (head_scores._open_brackets, "a) [b}", [*"....33"]),
    (head_scores._open_brackets, WORDS, [*"..10.."]),
    (head_scores._open_brackets, SPLIT, [*".........88888."]),
]


@pytest.mark.parametrize(("find", "text", "expected"), TARGETS)
def test_targets_in_text(find: Callable[..., Any], text: str | list[bytes], expected: list[str]) -> None:
    pieces = [b"" if c == "|" else c.encode() for c in text] if isinstance(text, str) else text
    found = head_scores._targets(tuple(pieces), find)
    assert found.tolist() == [[str(key) in keys for key in range(len(pieces))] for keys in expected]


def test_score_counts_only_queries_with_a_target() -> None:
    pieces = tuple(c.encode() for c in "a (bc) d")
    pattern = torch.rand(3, 8, 8, generator=torch.Generator().manual_seed(1)).tril()
    expected = [(A[3, 2] + A[4, 2]) / 2 for A in pattern]
    close(compute("open_bracket", pattern, pieces), torch.stack(expected))
    for name in ("line_start", "open_bracket"):
        assert compute(name, pattern[:, :2, :2], pieces[:2]).isnan().all()
