"""`attend.py token RUN`: what one token attends to in each head, its loss, and the model's next-token probabilities."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from common.errors import CONFIG, UserError, escape_control_chars
from inspection.attention_file import AttentionRecord
from inspection.commands.shared import OutputOptions, parse_head
from inspection.head_scores import value_weighted as value_weighted_attention
from inspection.run_reader import NEWEST, RunFiles, find_text
from inspection.terminal import DISCLAIMER, Column, Result, Terminal, head_name, quote_token, table, token_text

TOP, TOP_OF_ONE_HEAD = 3, 10
"""Keys listed for each head, and for the head of `--head`."""


@dataclass(frozen=True)
class Token(OutputOptions):
    """What a token attends to."""

    text: str = ""
    """Name of the text; by default the model's sample, else the first text."""
    find: str = ""
    """The token at which this word ends; the last one if there are several."""
    position: int = -1
    """Position of the token, counted from 0; by default the last."""
    step: int = NEWEST
    """A training step with an attention file; -1 is the newest."""
    head: str = ""
    """One head such as L1H2, with its ten strongest keys."""
    value_weighted: bool = False
    """Multiply each weight by the norm of the value vector and normalize (Kobayashi et al. 2020)."""

    def problems(self) -> list[str]:
        problems = super().problems()
        if self.find and self.position != -1:
            problems.append("--find and --position exclude each other")
        if self.position < -1:
            problems.append(f"--position is {self.position}; tokens are counted from 0")
        return problems


def run(options: Token, terminal: Terminal) -> Result:
    """The strongest keys of one query in every head."""
    files = RunFiles.open(options.run)
    step = files.step(options.step)
    file = files.attention_files[step]
    text = find_text(file, options.text, f"step {step} of {files.folder}")
    position, notes = _find_position(options, text, file.texts)
    L, H, _ = text.value_norms.shape
    heads = [parse_head(options.head, L, H)] if options.head else list(np.ndindex(L, H))
    weights = query_attention(text, position, options.value_weighted)
    top = TOP_OF_ONE_HEAD if options.head else TOP
    rows = [row for layer, head in heads for row in _strongest_keys(text, weights, layer, head, top)]
    next_tokens = None
    if text.top_tokens is not None:
        pairs = text.top_tokens[position]
        next_tokens = [{"token": token_text(token, space=" "), "probability": p} for token, p in pairs]
    data: dict[str, Any] = {
        "run": str(files.folder),
        "step": step,
        "text": text.name,
        "position": position,
        "token": token_text(text.token_bytes[position], space=" "),
        "loss": float(text.loss[position - 1]) if position else None,
        "value_weighted": options.value_weighted,
        "attention": rows,
        "next_tokens": next_tokens,
        "disclaimer": DISCLAIMER,
    }
    return Result(_lines(data, text, notes, terminal), data, rows)


def query_attention(text: AttentionRecord, position: int, value_weighted: bool) -> NDArray[np.float64]:
    """The attention of one query in every head, (L, H, position + 1).

    Value-weighted: A[i, j] |v_j W_O| divided by its sum over j (Kobayashi et al. 2020); nan where the sum is 0.
    """
    start = position * (position + 1) // 2
    weights = text.pattern_tril[:, :, start : start + position + 1].astype(np.float64)
    if value_weighted:
        return value_weighted_attention(weights, text.value_norms[:, :, : position + 1])
    return weights


def _strongest_keys(
    text: AttentionRecord, weights: NDArray[np.float64], layer: int, head: int, top: int
) -> list[dict[str, Any]]:
    row = weights[layer, head]
    return [
        {
            "head": head_name(layer, head),
            "rank": rank,
            "key": int(j),
            "token": token_text(text.token_bytes[j], space=" "),
            "attention": float(row[j]),
            "distance": len(row) - 1 - int(j),
        }
        for rank, j in enumerate(np.argsort(-np.nan_to_num(row), kind="stable")[:top], 1)
    ]


def _find_position(options: Token, text: AttentionRecord, texts: list[AttentionRecord]) -> tuple[int, list[str]]:
    """The position that the options name, and notes on the choice."""
    T, name = len(text.tokens), escape_control_chars(text.name)
    if not options.find:
        if options.position >= T:
            raise UserError(f"--position is {options.position}; text {name!r} has tokens 0 to {T - 1}", CONFIG)
        return options.position % T, []
    word, positions = escape_control_chars(options.find), word_ends(options.find, text.token_bytes)
    if not positions:
        elsewhere = [other.name for other in texts if word_ends(options.find, other.token_bytes)]
        hint = f"the text begins {token_text(b''.join(text.token_bytes), space=' ')[:60]!r}"
        if elsewhere:
            hint = f"it is in --text {escape_control_chars(elsewhere[0])!r}"
        raise UserError(f"{word!r} is not in text {name!r}; {hint}", CONFIG)
    note = f"{word!r} ends at tokens {', '.join(map(str, positions))}; this is the last"
    return positions[-1], [note] if len(positions) > 1 else []


def word_ends(word: str, token_bytes: list[bytes]) -> list[int]:
    """The positions of the tokens at which a word ends: as a whole word if it occurs as one, else anywhere."""
    pattern, text = re.escape(word.encode("utf-8", "surrogateescape")), b"".join(token_bytes)
    matches = list(re.finditer(rb"(?<!\w)" + pattern + rb"(?!\w)", text)) or list(re.finditer(pattern, text))
    ends = np.cumsum([len(token) for token in token_bytes])
    return sorted({int(np.searchsorted(ends, match.end())) for match in matches})


def _lines(data: dict[str, Any], text: AttentionRecord, notes: list[str], terminal: Terminal) -> list[str]:
    position, encoding = data["position"], terminal.encoding
    tokens = [quote_token(token, encoding) for token in text.token_bytes]
    loss = f"loss {data['loss']:.3f} nats" if position else "the first token, which has no loss"
    followed = f", followed by {tokens[position + 1]}" if position + 1 < len(tokens) else ""
    cells: dict[str, list[str]] = {}
    for row in data["attention"]:
        distance = f"{row['distance']} back" if row["distance"] else "itself"
        share = "-" if np.isnan(row["attention"]) else f"{row['attention']:.1%}"
        cells.setdefault(row["head"], []).append(f"{tokens[row['key']]} {share} ({distance})")
    if len(cells) == 1:
        rows = [[head, cell] for head, keys in cells.items() for cell in keys]
    else:
        rows = [[head, *keys] for head, keys in cells.items()]
    titles = ["head", "attends to" + (" (weights times value norms)" if data["value_weighted"] else "")]
    columns = [Column(title, align="left") for title in titles + [""] * (len(rows[0]) - 2)]
    expected = "the next-token probabilities were not kept in this file"
    if text.top_tokens is not None:
        expected = "next: " + ", ".join(
            f"{quote_token(token, encoding)} {p:.1%}" for token, p in text.top_tokens[position]
        )
    where = f"{escape_control_chars(data['run'])}, step {data['step']}, text {escape_control_chars(text.name)!r}"
    lines = [where, *notes, _context(text, position, terminal), ""]
    lines += [f"token {position} {tokens[position]}: {loss}{followed}", expected, ""]
    return [*lines, *table(columns, rows, max(terminal.width, 200)), "", DISCLAIMER]


def _context(text: AttentionRecord, position: int, terminal: Terminal) -> str:
    """The text around the token, which is in brackets."""
    start, stop = max(0, position - 12), min(len(text.tokens), position + 6)
    parts = [token_text(token, terminal.encoding, space=" ") for token in text.token_bytes[start:stop]]
    parts[position - start] = f"[{parts[position - start]}]"
    return "".join(["..." if start else "", *parts, "..." if stop < len(text.tokens) else ""])
