"""A small example run whose patterns are exactly the softmax of its queries and keys. Needs neither model nor torch."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from inspection.ablation_results import AblationEffects, AblationResults
from inspection.attention_file import AttentionFile, AttentionRecord

L, H, D, C = 2, 3, 4, 12
STEPS = (100, 200, 400)
WORDS = [b"", b"Mia", b" met", b" the", b" old", b" fox", b".", b" She", b" said", b"\n", b" hello", b" to", b" him"]
HOSTILE = [
    b"", b"</script><script>window.hacked = 1</script>", b"<!--", b"<script>",
    b"<img src=x onerror='window.hacked = 1'>", b'"', b"'", b"&amp;", b"\x00", b"\x1b[31m", "\u2028".encode(),
    b"\xf0\x9f", b"\x98\x80", "😀".encode(), " שלום".encode(), " عربي".encode(), "\u202e".encode(), b"\n", b"  ",
    "\u0301".encode(), b"{{data}}", b"\\", b"${window.hacked = 1}", b"x" * 70,
]  # fmt: skip


def softmax_pattern(queries: NDArray[np.float32], keys: NDArray[np.float32]) -> NDArray[np.float64]:
    """softmax(Q Kᵀ / √D + mask) in double precision."""
    scores = queries.astype(np.float64) @ keys.astype(np.float64).swapaxes(-1, -2) / np.sqrt(queries.shape[-1])
    scores = np.where(np.tril(np.ones(scores.shape[-2:], dtype=bool)), scores, -np.inf)
    exp = np.exp(scores - scores.max(axis=-1, keepdims=True))
    return exp / exp.sum(axis=-1, keepdims=True)


def record(name: str, words: Sequence[bytes], seed: int, qkv: bool, shape: tuple[int, int] = (L, H)) -> AttentionRecord:
    """A text with random queries, keys and values."""
    rng, T = np.random.default_rng(seed), len(words)
    queries, keys, values = (rng.normal(size=(*shape, T, D)).astype(np.float32) * 1.7 for _ in range(3))
    rows, columns = np.tril_indices(T)
    probs = np.sort(rng.dirichlet(np.ones(5), size=T))[:, ::-1]
    attn_out = rng.normal(size=(shape[0], T, C)).astype(np.float32)
    optional = {"queries": queries, "keys": keys, "values": values, "attn_out": attn_out} if qkv else {}
    return AttentionRecord(
        name,
        dict(enumerate(words)),
        np.arange(T, dtype=np.int32),
        rng.gamma(1, 1, T - 1).astype(np.float32),
        rng.gamma(2, 1, (*shape, T)).astype(np.float32),
        softmax_pattern(queries, keys)[..., rows, columns].astype(np.float16),
        **optional,
        top_ids=((np.arange(T)[:, None] + np.arange(1, 6)) % T).astype(np.int32),
        top_probs=probs.astype(np.float32),
    )


def scores(seed: int) -> dict[str, NDArray[np.float32]]:
    rng = np.random.default_rng(seed)
    largest = {"induction": 1, "entropy": 1, "antecedent.pronoun": 1, "distance": 8}
    tables = {name: rng.uniform(0, high, (L, H)).astype(np.float32) for name, high in largest.items()}
    tables["antecedent.pronoun"][1, 2], tables["antecedent.pronoun"][0, 1] = 0.9, 0.8
    return tables


def files(seed: int = 0) -> list[AttentionFile]:
    """A run: a sample that differs at each step, a held-out text and a contrast pair; queries and keys at the end."""
    result = []
    for k, step in enumerate(STEPS):
        texts = [
            record("sample", WORDS[: len(WORDS) - k], seed + 10 * k + 1, step == STEPS[-1]),
            record("held-out 1", WORDS + WORDS[1:4], seed + 10 * k + 2, step == STEPS[-1]),
            record("pronoun 1", WORDS[:8], seed + 10 * k + 3, False),
        ]
        result.append(AttentionFile(texts, {"step": str(step)}, scores(seed + k)))
    return result


def ablations() -> AblationResults:
    """Ablation supports L1H2 for pronouns; L0H1 is disputed; the other heads have no effect."""
    zero, mean, control = (np.full((L, H, 3), [0.1, -0.2, 0.3]) for _ in range(3))
    zero[1, 2], zero[0, 1], mean[1, 2] = [2.5, 2.0, 3.0], [0.6, 0.4, 0.8], [1.5, 1.0, 2.0]
    tables = {"zero": zero, "mean": mean, "control_zero": control, "control_mean": control}
    tables |= {"difference_zero": zero, "difference_mean": mean}
    units = {"logit_diff.pronoun": "nats", "repeats": "nats/token"}
    measures = {name: AblationEffects(unit, 3.1, 32, tables) for name, unit in units.items()}
    return AblationResults(400, "0" * 64, 1, measures)


def finding(head: list[int], score: str, value: float, supported: bool, summary: str) -> dict[str, Any]:
    return {"head": head, "score": score, "value": value, "is_supported": supported, "summary": summary}


FINDINGS: dict[str, Any] = {
    "headline": "Since step 200, head L1H2 attends to a pronoun's antecedent (0.90).",
    "findings": [
        finding([1, 2], "antecedent.pronoun", 0.9, True, "Ablating it lowers the logit difference"),
        finding([1, 0], "induction", 0.8, False, "Ablating it raises the loss"),
    ],
}
