"""Small dumps that are true to the formula: weights are the softmax of their queries and keys. No model, no torch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from inspection.attention_file import AttentionFile, AttentionRecord

L, H, D, C = 2, 3, 4, 12
STEPS = (100, 200, 400)
WORDS = [b"", b"Mia", b" met", b" the", b" old", b" fox", b".", b" She", b" said", b"\n", b" hello", b" to", b" him"]
HOSTILE = [
    b"", b"</script><script>window.hurt = 1</script>", b"<!--", b"<script>", b"<img src=x onerror='window.hurt = 1'>",
    b'"', b"'", b"&amp;", b"\x00", b"\x1b[31m", "\u2028".encode(), b"\xf0\x9f", b"\x98\x80", "😀".encode(),
    " שלום".encode(), " עربي".encode(), "\u202e".encode(), b"\n", b"  ", "\u0301".encode(), b"{{about}}", b"\\",
    b"${window.hurt = 1}", b"x" * 70,
]  # fmt: skip


def weights(queries: NDArray[np.float32], keys: NDArray[np.float32]) -> NDArray[np.float64]:
    """softmax(Q Kᵀ / √D + mask) in double precision."""
    scores = queries.astype(np.float64) @ keys.astype(np.float64).swapaxes(-1, -2) / np.sqrt(queries.shape[-1])
    scores = np.where(np.tril(np.ones(scores.shape[-2:], dtype=bool)), scores, -np.inf)
    exp = np.exp(scores - scores.max(axis=-1, keepdims=True))
    return exp / exp.sum(axis=-1, keepdims=True)


def text(
    name: str, words: Sequence[bytes], seed: int, details: bool, shape: tuple[int, ...] = (L, H)
) -> AttentionRecord:
    """A text of random queries, keys and values."""
    draw, T = np.random.default_rng(seed), len(words)
    queries, keys, values = (draw.normal(size=(*shape, T, D)).astype(np.float32) * 1.7 for _ in range(3))
    rows, columns = np.tril_indices(T)
    chances = np.sort(draw.dirichlet(np.ones(5), size=T))[:, ::-1]
    more: dict[str, Any] = {}
    if details:
        attn_out = draw.normal(size=(shape[0], T, C)).astype(np.float32)
        more = {"queries": queries, "keys": keys, "values": values, "attn_out": attn_out}
    return AttentionRecord(
        name,
        np.arange(T, dtype=np.int32),
        list(words),
        draw.gamma(1, 1, T - 1).astype(np.float32),
        draw.gamma(2, 1, (*shape, T)).astype(np.float32),
        weights(queries, keys)[..., rows, columns].astype(np.float16),
        **more,
        top_tokens=[[(words[(t + n + 1) % T], float(p)) for n, p in enumerate(row)] for t, row in enumerate(chances)],
    )


def scores(seed: int) -> dict[str, NDArray[np.float32]]:
    draw = np.random.default_rng(seed)
    found = {
        name: draw.uniform(size=(L, H)).astype(np.float32) for name in ("induction", "entropy", "antecedent.pronoun")
    }
    found["distance"] = draw.uniform(1, 8, size=(L, H)).astype(np.float32)
    found["antecedent.pronoun"][1, 2] = 0.9
    return found


def dumps(steps: Sequence[int] = STEPS, seed: int = 0) -> list[AttentionFile]:
    """A run: a sample of other words at each step, a held-out text of the same ones, and details of the last step."""
    found = []
    for k, step in enumerate(steps):
        last = k == len(steps) - 1
        sample = WORDS[: len(WORDS) - k]
        texts = [
            text("sample", sample, seed + 10 * k + 1, last),
            text("held-out 1", WORDS + WORDS[1:4], seed + 10 * k + 2, last),
            text("pronoun 1", WORDS[:8], seed + 10 * k + 3, False),
        ]
        found.append(AttentionFile(texts, {"step": str(step), "tokens_seen": str(step * 10)}, scores(seed + k)))
    return found


def evidence() -> dict[str, Any]:
    """Taking heads away: L1H2 matters to pronouns, L0H0 clearly does not, L0H1 by one way alone."""
    none = [[[0.1, -0.2, 0.3] for _ in range(H)] for _ in range(L)]
    zero, mean = ([[list(cell) for cell in row] for row in none] for _ in range(2))
    zero[1][2], mean[1][2], zero[0][1] = [2.5, 2.0, 3.0], [1.5, 1.0, 2.0], [0.6, 0.4, 0.8]
    tables = {"zero": zero, "mean": mean, "control_zero": none, "control_mean": none}
    tables |= {"difference_zero": zero, "difference_mean": mean}
    measure = {"unit": "nats", "baseline": 3.1, "count": 32, **tables}
    measures = {"logit_diff.pronoun": measure, "repeats": {**measure, "unit": "nats/token"}}
    return {"format": "glassgpt-ablations-1", "step": 400, "weights_sha256": "0", "seed": 1, "measures": measures}


CLAIMS: dict[str, Any] = {
    "headline": "By step 200 head L1H2 reads the name that a pronoun stands for (0.90).",
    "findings": [
        {
            "head": [1, 2],
            "score": "antecedent.pronoun",
            "value": 0.9,
            "since": 200,
            "label": "supported",
            "is_supported": True,
        },
        {"head": [1, 0], "others": [[1, 1]], "score": "induction", "value": 0.8, "effect": "without them it hurts"},
    ],
}
