"""`attend.py token RUN`: what one token attends to in each head, its loss, and the model's next-token probabilities."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

import numpy as np

from common.errors import CONFIG, UserError
from inspection.attention_file import AttentionRecord
from inspection.commands.shared import Context, OutputOptions, Result, parse_head
from inspection.head_scores import value_weighted
from inspection.run_reader import NEWEST, RunFiles, find_text
from inspection.terminal import DISCLAIMER, head_name, quote_token, table, token_text

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
        both = bool(self.find) and self.position != -1
        return super().problems() + ["--find and --position exclude each other"] * both


def run(options: Token, context: Context) -> Result:
    """The strongest keys of one query in every head."""
    files = RunFiles.open(options.run)
    step = files.step(options.step)
    file = files.read(step)
    text = find_text(file, options.text, f"step {step} of {files.folder}")
    position, notes = _find_position(options, text, file.texts)
    L, H, _ = text.value_norms.shape
    start = position * (position + 1) // 2
    attention = text.pattern_tril[:, :, start : start + position + 1].astype(float)
    if options.value_weighted:
        attention = value_weighted(attention, text.value_norms[:, :, : position + 1])
    rows = []
    for head in [parse_head(options.head, (L, H))] if options.head else np.ndindex(L, H):
        strongest = np.argsort(-np.nan_to_num(attention[head]), kind="stable")
        for rank, key in enumerate(strongest[: TOP_OF_ONE_HEAD if options.head else TOP].tolist(), 1):
            row = {"head": head_name(*head), "rank": rank, "key": key, "token": token_text(text.token_bytes[key], " ")}
            rows.append({**row, "attention": float(attention[head][key]), "distance": position - key})
    pairs = text.top_tokens[position] if text.top_tokens is not None else None
    data: dict[str, Any] = {
        "run": str(files.folder),
        "step": step,
        "text": text.name,
        "position": position,
        "token": token_text(text.token_bytes[position], " "),
        "loss": float(text.loss[position - 1]) if position else None,
        "value_weighted": options.value_weighted,
        "attention": rows,
        "next_tokens": pairs and [{"token": token_text(token, " "), "probability": p} for token, p in pairs],
        "disclaimer": DISCLAIMER,
    }
    where = f"{files.folder}, step {step}, text {text.name!r}"
    return Result([where, *notes, *_lines(data, text, context.width), DISCLAIMER], data)


def _find_position(options: Token, text: AttentionRecord, texts: list[AttentionRecord]) -> tuple[int, list[str]]:
    """The position that the options name, and notes on the choice."""
    T, word = len(text.tokens), options.find
    if not word:
        if options.position >= T:
            raise UserError(f"--position is {options.position}; text {text.name!r} has tokens 0 to {T - 1}", CONFIG)
        return options.position % T, []
    positions = word_ends(word, text.token_bytes)
    if not positions:
        elsewhere = [other.name for other in texts if word_ends(word, other.token_bytes)]
        hint = f"the text begins {token_text(b''.join(text.token_bytes), ' ')[:60]!r}"
        hint = f"it is in --text {elsewhere[0]!r}" if elsewhere else hint
        raise UserError(f"{word!r} is not in text {text.name!r}; {hint}", CONFIG)
    note = f"{word!r} ends at tokens {', '.join(map(str, positions))}; this is the last"
    return positions[-1], [note] if len(positions) > 1 else []


def word_ends(word: str, token_bytes: list[bytes]) -> list[int]:
    """The positions of the tokens at which a word ends: as a whole word if it occurs as one, else anywhere."""
    pattern, text = re.escape(word.encode("utf-8", "surrogateescape")), b"".join(token_bytes)
    matches = list(re.finditer(rb"(?<!\w)" + pattern + rb"(?!\w)", text)) or list(re.finditer(pattern, text))
    ends = np.cumsum([len(token) for token in token_bytes])
    return sorted({int(np.searchsorted(ends, match.end())) for match in matches})


def _lines(data: dict[str, Any], text: AttentionRecord, width: int) -> list[str]:
    """The text around the token, its loss, the next-token probabilities, and a table of what each head attends to."""
    position, tokens = data["position"], [quote_token(token) for token in text.token_bytes]
    around = [token_text(token, " ") for token in text.token_bytes]
    before, after = around[max(0, position - 12) : position], around[position + 1 : position + 6]
    loss = f"loss {data['loss']:.3f} nats" if position else "the first token, which has no loss"
    followed = f", followed by {tokens[position + 1]}" if position + 1 < len(tokens) else ""
    lines = [f"{''.join(before)}[{around[position]}]{''.join(after)}", ""]
    lines.append(f"token {position} {tokens[position]}: {loss}{followed}")
    if text.top_tokens is None:
        lines += ["the next-token probabilities were not kept in this file", ""]
    else:
        lines += ["next: " + ", ".join(f"{quote_token(token)} {p:.1%}" for token, p in text.top_tokens[position]), ""]
    cells: dict[str, list[str]] = {}
    for row in data["attention"]:
        distance = f"{row['distance']} back" if row["distance"] else "itself"
        share = "-" if np.isnan(row["attention"]) else f"{row['attention']:.1%}"
        cells.setdefault(row["head"], []).append(f"{tokens[row['key']]} {share} ({distance})")
    rows = [[head, *keys] for head, keys in cells.items()]
    if len(cells) == 1:
        rows = [[head, key] for head, keys in cells.items() for key in keys]
    titles = ["head", "attends to" + (" (weights times value norms)" if data["value_weighted"] else "")]
    return [*lines, *table(titles + [""] * (len(rows[0]) - 2), rows, max(width, 200)), ""]
