"""`attend.py token RUN` and `compare RUN`: what one token attends to, and how two steps or runs differ."""

import re
from dataclasses import dataclass
from typing import Any

import numpy as np
from tyro.conf import Positional

from common.errors import CONFIG, UserError
from inspection.attention_file import AttentionFile, AttentionRecord
from inspection.commands.shared import Context, OutputOptions, Result, model_shape, parse_head
from inspection.head_scores import value_weighted
from inspection.run_reader import DEFAULT, RunFiles, find_text, match_name
from inspection.terminal import DISCLAIMER, head_name, number, paragraph, quote_token, table, token_text

TOP, TOP_OF_ONE_HEAD = 3, 10  # keys listed for each head, and for the head of `--head`
Rows = list[dict[str, Any]]


# token


@dataclass(frozen=True)
class Token(OutputOptions):
    """What a token attends to."""

    text: str = ""
    """Name of the text; by default the model's sample, else the first text."""
    find: str = ""
    """The token at which this word ends; the last one if there are several."""
    position: int = -1
    """Position of the token, counted from 0; by default the last."""
    step: int = DEFAULT
    """A training step with an attention file; by default the one whose heads were ablated."""
    head: str = ""
    """One head such as L1H2, with its ten strongest keys."""
    value_weighted: bool = False
    """Multiply each weight by the norm of the value vector and normalize (Kobayashi et al. 2020)."""

    def problems(self) -> list[str]:
        both = bool(self.find) and self.position != -1
        return super().problems() + ["--find and --position exclude each other"] * both

    def result(self, context: Context) -> Result:
        """The strongest keys of one query in every head, its loss, and the next-token probabilities."""
        run = RunFiles.open(self.run)
        step = run.step(self.step)
        file = run.read(step)
        text = find_text(file, self.text, f"step {step} of {run.folder}")
        position, notes = self.find_position(text, file.texts)
        rows = self.strongest_keys(text, position)
        top = text.top_tokens[position] if text.top_tokens is not None else None
        data: dict[str, Any] = {
            "run": str(run.folder),
            "step": step,
            "text": text.name,
            "position": position,
            "token": token_text(text.token_bytes[position], " "),
            "loss": float(text.loss[position - 1]) if position else None,
            "value_weighted": self.value_weighted,
            "attention": rows,
            "next_tokens": top and [{"token": token_text(token, " "), "probability": p} for token, p in top],
            "disclaimer": DISCLAIMER,
        }
        where = f"{run.folder}, step {step}, text {text.name!r}"
        return Result([where, *notes, *_token_lines(data, text, context.width), DISCLAIMER], data)

    def find_position(self, text: AttentionRecord, texts: list[AttentionRecord]) -> tuple[int, list[str]]:
        """The position that the options name, and notes on the choice."""
        T, word = len(text.tokens), self.find
        if not word:
            if self.position >= T:
                raise UserError(f"--position is {self.position}; text {text.name!r} has tokens 0 to {T - 1}", CONFIG)
            return self.position % T, []
        positions = word_ends(word, text.token_bytes)
        if not positions:
            elsewhere = [other.name for other in texts if word_ends(word, other.token_bytes)]
            hint = f"the text begins {token_text(b''.join(text.token_bytes), ' ')[:60]!r}"
            hint = f"it is in --text {elsewhere[0]!r}" if elsewhere else hint
            raise UserError(f"{word!r} is not in text {text.name!r}; {hint}", CONFIG)
        note = f"{word!r} ends at tokens {', '.join(map(str, positions))}; this is the last"
        return positions[-1], [note] if len(positions) > 1 else []

    def strongest_keys(self, text: AttentionRecord, position: int) -> Rows:
        """A row for each head and each of its strongest keys."""
        L, H, _ = text.value_norms.shape
        start = position * (position + 1) // 2
        attention = text.pattern_tril[:, :, start : start + position + 1].astype(float)
        if self.value_weighted:
            attention = value_weighted(attention, text.value_norms[:, :, : position + 1])
        rows = []
        for head in [parse_head(self.head, (L, H))] if self.head else np.ndindex(L, H):
            keys = np.argsort(-np.nan_to_num(attention[head]), kind="stable")[: TOP_OF_ONE_HEAD if self.head else TOP]
            for rank, key in enumerate(keys.tolist(), 1):
                row = {
                    "head": head_name(*head),
                    "rank": rank,
                    "key": key,
                    "token": token_text(text.token_bytes[key], " "),
                }
                rows.append({**row, "attention": float(attention[head][key]), "distance": position - key})
        return rows


def word_ends(word: str, token_bytes: list[bytes]) -> list[int]:
    """The positions of the tokens at which a word ends: as a whole word if it occurs as one, else anywhere."""
    pattern, text = re.escape(word.encode("utf-8", "surrogateescape")), b"".join(token_bytes)
    matches = list(re.finditer(rb"(?<!\w)" + pattern + rb"(?!\w)", text)) or list(re.finditer(pattern, text))
    ends = np.cumsum([len(token) for token in token_bytes])
    return sorted({int(np.searchsorted(ends, match.end())) for match in matches})


def _token_lines(data: dict[str, Any], text: AttentionRecord, width: int) -> list[str]:
    """The text around the token, its loss, the next-token probabilities, and a table of what each head attends to."""
    position, tokens = data["position"], [quote_token(token) for token in text.token_bytes]
    around = [token_text(token, " ") for token in text.token_bytes]
    around[position] = f"[{around[position]}]"
    loss = f"loss {data['loss']:.3f} nats" if position else "the first token, which has no loss"
    followed = f", followed by {tokens[position + 1]}" if position + 1 < len(tokens) else ""
    likely = "the next-token probabilities were not kept in this file"
    if text.top_tokens is not None:
        likely = "next: " + ", ".join(f"{quote_token(token)} {p:.1%}" for token, p in text.top_tokens[position])
    cells: dict[str, list[str]] = {}
    for row in data["attention"]:
        distance = f"{row['distance']} back" if row["distance"] else "itself"
        share = "-" if np.isnan(row["attention"]) else f"{row['attention']:.1%}"
        cells.setdefault(row["head"], []).append(f"{tokens[row['key']]} {share} ({distance})")
    rows = [[head, *keys] for head, keys in cells.items()]
    if len(cells) == 1:
        rows = [[head, key] for head, keys in cells.items() for key in keys]
    titles = ["head", "attends to" + (" (weights times value norms)" if data["value_weighted"] else "")]
    lines = ["".join(around[max(0, position - 12) : position + 6]), ""]
    lines += [f"token {position} {tokens[position]}: {loss}{followed}", likely, ""]
    return [*lines, *table(titles + [""] * (len(rows[0]) - 2), rows, max(width, 200)), ""]


# compare


@dataclass(frozen=True)
class Compare(OutputOptions):
    """Differences between two steps of a run, or two runs: the first minus the second."""

    other: Positional[str] = ""
    """The second run; by default the same run."""
    step: int = DEFAULT
    """Step of the first run; by default the one whose heads were ablated."""
    against: int = DEFAULT
    """Step of the second run; by default as for the first, or the oldest of the same run."""
    text: str = ""
    """Compare the patterns of this text only."""

    def result(self, context: Context) -> Result:
        """Differences of scores and patterns, head by head."""
        runs = RunFiles.open(self.run), RunFiles.open(self.other or self.run)
        steps = runs[0].step(self.step), runs[1].step(self.against)
        if not self.other and self.against == DEFAULT:
            steps = steps[0], runs[0].steps[0]
        files = runs[0].read(steps[0]), runs[1].read(steps[1])
        sides = f"{runs[0].folder} step {steps[0]}", f"{runs[1].folder} step {steps[1]}"
        scores, notes = _score_differences(*files, sides)
        patterns, text_notes = _pattern_differences(*files, self.text, sides)
        rows = scores + patterns
        if not rows:
            raise UserError(f"{sides[0]} and {sides[1]} have no score and no text in common", CONFIG)
        identical = not any(row["difference"] for row in rows)
        notes = ["no difference: all numbers are equal"] * identical + notes + text_notes
        first, second = ({"run": str(run.folder), "step": step} for run, step in zip(runs, steps, strict=True))
        data = {"first": first, "second": second, "identical": identical, "differences": rows, "notes": notes}
        lines = [f"{sides[0]} minus {sides[1]}", *notes, "", *_difference_table(scores, patterns, context.width), ""]
        names = ", ".join(dict.fromkeys(row["name"] for row in patterns))
        moved = f"moved: the share of a token's attention that goes elsewhere, over {names or 'no text'}"
        return Result([*lines, *paragraph(moved, context.width), DISCLAIMER], data)


def _score_differences(first: AttentionFile, second: AttentionFile, sides: tuple[str, str]) -> tuple[Rows, list[str]]:
    """A row for each score that both have and each head; a note for the other scores."""
    a, b = model_shape(first), model_shape(second)
    if all(a) and all(b) and a != b:
        shapes = f"{sides[0]} has {a[0]} layers of {a[1]} heads, {sides[1]} has {b[0]} layers of {b[1]} heads"
        raise UserError(f"{shapes}: they cannot be compared head by head", CONFIG)
    rows: Rows = []
    for name in (name for name in first.scores if name in second.scores):
        for head, x in np.ndenumerate(first.scores[name].astype(float)):
            y = float(second.scores[name][head])
            difference = 0.0 if np.isnan(x) and np.isnan(y) else x - y
            rows.append({"kind": "score", "name": name, "head": head_name(*head), "difference": difference})
    unshared = sorted(first.scores.keys() ^ second.scores.keys())
    return rows, [f"only one of the two has the scores {', '.join(unshared)}"] if unshared else []


def _pattern_differences(
    first: AttentionFile, second: AttentionFile, text: str, sides: tuple[str, str]
) -> tuple[Rows, list[str]]:
    """A row for each text that both have, with the same tokens, and each head; notes for the other texts.

    The difference is the share of its attention that a query moves to other keys, averaged over the queries: half the
    sum of absolute differences, 0 for equal patterns and 1 for patterns without a common key.
    """
    a, b = ({record.name: record for record in file.texts} for file in (first, second))
    names = [name for name in a if name in b]
    if text:
        names = [match_name(text, records, "text", side) for records, side in zip((a, b), sides, strict=True)][:1]
    rows: Rows = []
    notes = [] if names else ["the two have no text in common; only scores are compared"]
    for name in names:
        if a[name].token_bytes != b[name].token_bytes:
            notes.append(f"text {name!r} has different tokens; its patterns are not compared")
            continue
        moved = np.abs(a[name].pattern_tril.astype(float) - b[name].pattern_tril.astype(float)).sum(axis=-1)
        for head, value in np.ndenumerate(moved / (2 * len(a[name].tokens))):
            rows.append({"kind": "moved", "name": name, "head": head_name(*head), "difference": value})
    return rows, notes


def _difference_table(scores: Rows, patterns: Rows, width: int) -> list[str]:
    """A row for each head: moved attention, averaged over the texts, then the difference of each score."""
    cells = []
    for head in dict.fromkeys(row["head"] for row in scores or patterns):
        moved = [row["difference"] for row in patterns if row["head"] == head]
        differences = [number(row["difference"], signed=True) for row in scores if row["head"] == head]
        cells.append([head, number(float(np.mean(moved)), 3) if moved else "-", *differences])
    return table(["head", "moved", *dict.fromkeys(row["name"] for row in scores)], cells, width)
