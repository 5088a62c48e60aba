"""`attend.py token RUN`: what one token reads in every head, how surprising it was, and what the model expects next."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from common.errors import CONFIG, UserError, escape_control_chars
from inspection.attention_file import AttentionRecord
from inspection.commands.shared import Told, text_of
from inspection.run_reader import NEWEST, RunFiles
from inspection.terminal import DISCLAIMER, Column, Result, Terminal, head_name, table, token_text

TOP, TOP_OF_ONE = 3, 10
"""Readings that are told of each head, and of the one that was asked for."""


@dataclass(frozen=True)
class Token(Told):
    """What a token reads."""

    text: str = ""
    """Name of the text; by default the model's own sample, else the first one."""
    find: str = ""
    """The token at which this word ends; of several places the last."""
    position: int = -1
    """The token's number, counted from 0; by default the last one."""
    step: int = NEWEST
    """A step of training with an attention file; -1 is the newest."""
    head: str = ""
    """One head such as L1H2, with its ten strongest readings."""
    value_weighted: bool = False
    """Multiply each weight with the length of what is read there, and scale the row back to a sum of 1."""

    def problems(self) -> list[str]:
        found = super().problems()
        if self.find and self.position != -1:
            found.append("--find and --position do not go together")
        if self.position < -1:
            found.append(f"--position is {self.position}; tokens are counted from 0")
        if self.head and not re.fullmatch(r"L\d{1,6}H\d{1,6}", self.head):
            found.append(f"--head is {self.head!r}; it takes a layer and a head, such as L1H2")
        return found


def run(config: Token, terminal: Terminal) -> Result:
    """What the token reads, in words or numbers."""
    attention = RunFiles.open(config.run)
    step = attention.step(config.step)
    dump = attention.attention_files[step]
    text = text_of(dump, config.text, f"step {step} of {attention.folder}")
    position, notes = _position(config, text, dump.texts)
    L, H, _ = text.value_norms.shape
    heads = [(layer, head) for layer in range(L) for head in range(H)]
    if config.head:
        layer, head = map(int, re.findall(r"\d+", config.head))
        if layer >= L or head >= H:
            raise UserError(f"--head is {config.head}; the model has L0H0 to L{L - 1}H{H - 1}", CONFIG)
        heads = [(layer, head)]
    rows = read_row(text, position, config.value_weighted)
    top = TOP_OF_ONE if config.head else TOP
    readings = [one for layer, head in heads for one in _readings(text, rows[layer, head], (layer, head), top)]
    data: dict[str, Any] = {
        "run": str(attention.folder),
        "step": step,
        "text": text.name,
        "position": position,
        "token": token_text(text.token_bytes[position], space=" "),
        "loss": float(text.loss[position - 1]) if position else None,
        "value_weighted": config.value_weighted,
        "reads": readings,
        "next": _expected(text, position),
        "disclaimer": DISCLAIMER,
    }
    return Result(_lines(data, text, notes, terminal, attention), data, readings)


def read_row(text: AttentionRecord, position: int, value_weighted: bool) -> NDArray[np.float64]:
    """What a query reads, (L, H, position + 1), without unpacking the whole pattern.

    Value weighted: A[i, j] |v_j W_O| over its sum (Kobayashi et al. 2020); nan where all of them are 0.
    """
    begin = position * (position + 1) // 2
    row = text.pattern_tril[:, :, begin : begin + position + 1].astype(np.float64)
    if value_weighted:
        row = row * text.value_norms[:, :, : position + 1]
        total = row.sum(axis=-1, keepdims=True)
        row = np.divide(row, total, out=np.full_like(row, np.nan), where=total > 0)
    return row


def _position(config: Token, text: AttentionRecord, others: list[AttentionRecord]) -> tuple[int, list[str]]:
    """The token that is asked for, and what has to be said about the choice."""
    T = len(text.tokens)
    if config.find:
        places = places_of(config.find, text.token_bytes)
        if not places:
            raise UserError(_not_there(config.find, text, others), CONFIG)
        if len(places) > 1:
            return places[-1], [f"{config.find!r} ends at tokens {', '.join(map(str, places))}; the last one is shown"]
        return places[-1], []
    if config.position >= T:
        raise UserError(
            f"--position is {config.position}; text {escape_control_chars(text.name)!r} has tokens 0 to {T - 1}", CONFIG
        )
    return (T - 1 if config.position == -1 else config.position), []


def places_of(word: str, token_bytes: list[bytes]) -> list[int]:
    """The tokens at which a word ends, in order: as a whole word where it stands as one, else wherever it stands."""
    wanted, whole = re.escape(word.encode("utf-8", "surrogateescape")), b"".join(token_bytes)
    found = list(re.finditer(rb"(?<!\w)" + wanted + rb"(?!\w)", whole)) or list(re.finditer(wanted, whole))
    ends = np.cumsum([len(token) for token in token_bytes])
    return sorted({int(np.searchsorted(ends, match.end())) for match in found})


def _not_there(word: str, text: AttentionRecord, others: list[AttentionRecord]) -> str:
    """Where else the word stands, or how the text reads."""
    elsewhere = [other.name for other in others if places_of(word, other.token_bytes)]
    if elsewhere:
        hint = f"it stands in --text {escape_control_chars(elsewhere[0])!r}"
    else:
        hint = f"the text begins {token_text(b''.join(text.token_bytes), space=' ')[:60]!r}"
    return f"{escape_control_chars(word)!r} is not in text {escape_control_chars(text.name)!r}; {hint}"


def _readings(text: AttentionRecord, row: NDArray[np.float64], head: tuple[int, int], top: int) -> list[dict[str, Any]]:
    """The strongest readings of one head, strongest first."""
    query = len(row) - 1
    order = np.argsort(-np.nan_to_num(row), kind="stable")[:top]
    return [
        {
            "head": head_name(*head),
            "rank": rank,
            "key": int(j),
            "token": token_text(text.token_bytes[j], space=" "),
            "weight": float(row[j]),
            "back": query - int(j),
        }
        for rank, j in enumerate(order, 1)
    ]


def _expected(text: AttentionRecord, position: int) -> list[dict[str, Any]] | None:
    """The likeliest next tokens; None where the file has not kept them."""
    if text.top_tokens is None:
        return None
    return [{"token": token_text(token, space=" "), "probability": p} for token, p in text.top_tokens[position]]


def _lines(
    data: dict[str, Any], text: AttentionRecord, notes: list[str], terminal: Terminal, attention: RunFiles
) -> list[str]:
    position, encoding = data["position"], terminal.encoding

    def quoted(index: int) -> str:
        return '"' + token_text(text.token_bytes[index], encoding, space=" ").replace('"', '\\"') + '"'

    loss = f"its loss {data['loss']:.3f} nats" if position else "the first token, so it has no loss"
    came = f"; then comes {quoted(position + 1)}" if position + 1 < len(text.tokens) else ""
    kind = "weight times the length of what is read" if data["value_weighted"] else "weight"
    lines = [
        f"{escape_control_chars(attention.folder)}, step {data['step']}, text {escape_control_chars(text.name)!r}",
        *notes,
    ]
    lines += [_context(text, position, terminal), "", f"token {position} is {quoted(position)}: {loss}{came}", ""]
    heads: dict[str, list[str]] = {}
    for one in data["reads"]:
        back = "itself" if one["back"] == 0 else f"{one['back']} back"
        share = "-" if one["weight"] != one["weight"] else f"{one['weight']:.1%}".replace("%", " %")
        heads.setdefault(one["head"], []).append(f"{quoted(one['key'])} {share} ({back})")
    most = max(map(len, heads.values()))
    if len(heads) == 1:
        rows = [[name, cell] for name, cells in heads.items() for cell in cells]
    else:
        rows = [[name, *cells, *[""] * (most - len(cells))] for name, cells in heads.items()]
    titles = ["head", f"reads, by {kind}", *[""] * (len(rows[0]) - 2)]
    lines += table([Column(title, side="left") for title in titles], rows, max(terminal.width, 200))
    if text.top_tokens is None:
        lines += ["", "the likeliest next tokens were not kept in this file"]
    else:
        likely = ", ".join(
            f'"{token_text(token, encoding, space=" ")}" {p:.1%}'.replace("%", " %")
            for token, p in text.top_tokens[position]
        )
        lines += ["", f"expects next: {likely}"]
    return [*lines, "", DISCLAIMER]


def _context(text: AttentionRecord, position: int, terminal: Terminal) -> str:
    """The text around the token, which stands in brackets."""
    around = range(max(0, position - 12), min(len(text.tokens), position + 6))
    parts = [token_text(text.token_bytes[k], terminal.encoding, space=" ") for k in around]
    parts[position - around[0]] = f"[{parts[position - around[0]]}]"
    dots = ("..." if around[0] else "", "..." if around[-1] + 1 < len(text.tokens) else "")
    return "".join([dots[0], *parts, dots[1]])
