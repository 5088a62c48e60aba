"""`attend.py token RUN` and `compare RUN`: what one token attends to, and how two steps or runs differ."""

import json
import re
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tyro.conf import Positional

from common.errors import CONFIG, UserError
from inspection.attention_file import AttentionFile, AttentionRecord
from inspection.commands.shared import Context, OutputOptions, Result, parse_head
from inspection.head_scores import score_info, value_weighted
from inspection.run_reader import DEFAULT, RunFiles, find_text
from inspection.terminal import DISCLAIMER, head_name, number, paragraph, quote_token, table, token_text

MATCHED = "the runs began with other weights, so head numbers do not correspond: each is matched by its scores"
TOP, TOP_OF_ONE_HEAD = 3, 10  # keys listed for each head, and for the head of `--head`
Rows = list[dict[str, Any]]
Tables = dict[str, NDArray[np.float64]]  # (layers, heads), by name


@dataclass(frozen=True)
class Token(OutputOptions):
    """What a token attends to."""

    text: str = ""  # Name of the text; by default the model's sample, else the first text.
    find: str = ""  # The token at which this word ends; the last one if there are several.
    position: int = -1  # Position of the token, counted from 0; by default the last.
    step: int = DEFAULT  # A training step with an attention file; by default the one whose heads were ablated.
    head: str = ""  # One head such as L1H2, with its ten strongest keys.
    value_weighted: bool = False  # Weights times the norms of the value vectors, normalized (Kobayashi et al. 2020).

    def problems(self) -> list[str]:
        both = bool(self.find) and self.position != -1
        return super().problems() + ["--find and --position exclude each other"] * both

    def result(self, context: Context) -> Result:
        run = RunFiles.open(self.run)
        step = run.step(self.step)
        file = run.read(step)
        text = find_text(file, self.text, f"step {step} of {run.folder}")
        position, notes = self.find_position(text, file.texts)
        rows = self.strongest_keys(text, position)
        data: dict[str, Any] = {
            "run": str(run.folder),
            "step": step,
            "text": text.name,
            "position": position,
            "token": token_text(text.token_bytes[position], " "),
            "loss": float(text.loss[position - 1]) if position else None,
            "value_weighted": self.value_weighted,
            "attention": rows,
            "next_tokens": [
                {"token": token_text(token, " "), "probability": p} for token, p in text.top_tokens[position]
            ],
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
                token, weight = token_text(text.token_bytes[key], " "), float(attention[head][key])
                row = {"head": head_name(*head), "rank": rank, "key": key, "token": token}
                rows.append({**row, "attention": weight, "distance": position - key})
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
    likely = ", ".join(f"{quote_token(token)} {p:.1%}" for token, p in text.top_tokens[position])
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
    lines += [f"token {position} {tokens[position]}: {loss}{followed}", f"next: {likely}", ""]
    return [*lines, *table(titles + [""] * (len(rows[0]) - 2), rows, max(width, 200)), ""]


@dataclass(frozen=True)
class Compare(OutputOptions):
    """Differences between two steps of a run, or two runs: the first minus the second. Heads of other seeds are matched."""

    other: Positional[str] = ""  # The second run; by default the same run.
    step: int = DEFAULT  # Step of the first run; by default the one whose heads were ablated.
    against: int = DEFAULT  # Step of the second run; by default as for the first, or the oldest of the same run.
    against_init: bool = False
    """Compare with the weights that `train.py --model.init` started from: which heads did fine-tuning change?"""

    def problems(self) -> list[str]:
        if self.against_init and (self.other or self.against != DEFAULT):
            return [*super().problems(), "--against_init compares with step 0 of the same run: leave out the other one"]
        return super().problems()

    def result(self, context: Context) -> Result:
        runs, steps = self.sides()
        files = runs[0].read(steps[0]), runs[1].read(steps[1])
        if self.against_init and not json.loads(files[1].metadata.get("config", "{}")).get("init"):
            raise UserError(f"{runs[0].folder} did not start from --model.init; its first step: --against 0", CONFIG)
        sides = f"{runs[0].folder} step {steps[0]}", f"{runs[1].folder} step {steps[1]}"
        if (a := files[0].shape) != (b := files[1].shape):
            shapes = f"{sides[0]} has {a[0]} layers of {a[1]} heads, {sides[1]} has {b[0]} layers of {b[1]} heads"
            raise UserError(f"{shapes}: they cannot be compared head by head", CONFIG)
        shares = [name for name in files[0].scores if name in files[1].scores and score_info(name).is_share]
        first = [file for run in runs if 0 in run.paths and (file := run.read_intact(0))]
        starts = {file.metadata.get("weights_sha256") for file in first} - {None}
        matched = bool(shares) and len(starts) == 2
        second, heads = _match_heads(*files, shares) if matched else (files[1], np.moveaxis(np.indices(a), 0, -1))
        other = {head: head_name(*heads[head].tolist()) for head in np.ndindex(a)}
        scores, moved = _score_differences(files[0], second), _moved_attention(files[0], second)
        if not scores and not moved:
            raise UserError(f"{sides[0]} and {sides[1]} have no score and no text in common", CONFIG)
        names = {name: None for file in files for name in (*file.scores, *(text.name for text in file.texts))}
        left_out = ", ".join(name for name in names if name not in scores and name not in moved)
        notes = [f"only in one of the two, or a text of different tokens: {left_out}"] if left_out else []
        notes += [MATCHED] * matched
        rows = [
            {"kind": kind, "name": name, "head": head_name(*head), "matched": other[head], "difference": float(value)}
            for kind, tables in (("score", scores), ("moved", moved))
            for name, values in tables.items()
            for head, value in np.ndenumerate(values)
        ]
        sources = [{"run": str(run.folder), "step": step} for run, step in zip(runs, steps, strict=True)]
        identical = not any(row["difference"] for row in rows)
        data = {"first": sources[0], "second": sources[1], "identical": identical, "differences": rows, "notes": notes}
        cells, means = [], np.mean(list(moved.values()), axis=0) if moved else np.full(a, np.nan)
        order = sorted(np.ndindex(a), key=lambda head: -means[head] if self.against_init else 0)
        if self.against_init:
            most = ", ".join(f"{head_name(*head)} ({means[head]:.2f})" for head in order[:3])
            notes.append(f"fine-tuning moved the attention of these heads most: {most}")
        for head in order:
            mean = number(float(means[head]), 3) if moved else "-"
            differences = [number(float(table[head]), signed=True) for table in scores.values()]
            cells.append([head_name(*head), *[other[head]] * matched, mean, *differences])
        lines = [f"{sides[0]} minus {sides[1]}", *["all numbers are equal"] * identical, *notes, ""]
        lines += [*table(["head", *["matched"] * matched, "moved", *scores], cells, context.width), ""]
        about = f"moved: the share of a token's attention that goes elsewhere, over {', '.join(moved) or 'no text'}"
        return Result([*lines, *paragraph(about, context.width), DISCLAIMER], data)

    def sides(self) -> tuple[tuple[RunFiles, RunFiles], tuple[int, int]]:
        """The two runs, and the step of each."""
        runs = RunFiles.open(self.run), RunFiles.open(self.other or self.run)
        first, second = runs[0].step(self.step), runs[1].step(self.against)
        if not self.other and self.against == DEFAULT:
            second = runs[0].step(0) if self.against_init else runs[0].steps[0]
        return runs, (first, second)


def _match_heads(
    first: AttentionFile, second: AttentionFile, names: list[str]
) -> tuple[AttentionFile, NDArray[np.int64]]:
    """The second file with its heads in the order of those of the first, each the nearest by these scores (the smallest
    Euclidean distance); and their (layer, head) (L, H, 2)."""
    a, b = (np.nan_to_num([file.scores[name].ravel() for name in names]) for file in (first, second))
    shape, nearest = first.scores[names[0]].shape, np.square(a[:, :, None] - b[:, None]).sum(axis=0).argmin(axis=1)
    heads = np.unravel_index(nearest.reshape(shape), shape)
    texts = [replace(text, pattern_tril=text.pattern_tril[heads]) for text in second.texts]
    scores = {name: table[heads] for name, table in second.scores.items()}
    return replace(second, texts=texts, scores=scores), np.stack(heads, axis=-1)


def _score_differences(first: AttentionFile, second: AttentionFile) -> Tables:
    """First minus second, for each score that both have; 0 where both are nan."""
    tables = {}
    for name in (name for name in first.scores if name in second.scores):
        a, b = first.scores[name].astype(float), second.scores[name].astype(float)
        tables[name] = np.where(np.isnan(a) & np.isnan(b), 0.0, a - b)
    return tables


def _moved_attention(first: AttentionFile, second: AttentionFile) -> Tables:
    """For each text that both have, with the same tokens: the share of its attention that a query moves to other keys,
    averaged over the queries. That is half the sum of absolute differences: 0 for equal patterns, 1 for patterns without a
    common key."""
    others, tables = {text.name: text for text in second.texts}, {}
    for text in first.texts:
        if (other := others.get(text.name)) and other.token_bytes == text.token_bytes:
            differences = np.abs(text.pattern_tril.astype(float) - other.pattern_tril.astype(float))
            tables[text.name] = differences.sum(axis=-1) / (2 * len(text.tokens))
    return tables
