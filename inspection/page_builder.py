"""The page: a run's attention at every stored step, as one HTML file that opens from disk without a network.

HTML, CSS and JavaScript are in the folder `web/` and are put together here. Data never becomes markup: it is a JSON table
with `<`, `>` and `&` escaped, and blocks of numbers in base64 (`page_data.py`). A content security policy lets only our
own script and style run, known by their hashes. Needs NumPy, not torch.
"""

from __future__ import annotations

import base64
import hashlib
import html
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from common.errors import CHECKPOINT, UserError, escape_control_chars
from common.files import write_atomic
from inspection.ablation_results import AblationResults
from inspection.attention_file import AttentionFile, AttentionRecord
from inspection.findings import measure_for_score
from inspection.page_data import (
    FULL_TEXTS,
    Blocks,
    Content,
    PageTooLarge,
    Vocabulary,
    ablation_labels,
    ablation_tables,
    as_json,
    number,
    score_table,
)
from inspection.registry import ANTECEDENT, HeadScore, score_info

BUDGET = 5_000_000
"""Bytes of a page, as long as leaving out steps, precision, queries and keys can achieve it."""
MAX_BYTES = 40_000_000
"""Bytes that no page exceeds; the beginnings of long texts are left out to achieve it."""
NOTES_BYTES = 2_000
"""Bytes reserved for the notes, which are known last."""
WEB = Path(__file__).parent / "web"
SCRIPTS = (
    "dom",
    "colours",
    "data",
    "state",
    "attention",
    "text",
    "matrix",
    "download",
    "grid",
    "timeline",
    "walkthrough",
)
"""The JavaScript files in the order in which they run; `main` is the last."""
PATTERN_SCORES = ("previous_token", "duplicate_token", "induction", "first_token")
"""Scores that are attention weights, as are those of antecedents."""
MAX_ATTENTION = HeadScore(
    "max_attention",
    "attention to the most attended token",
    "mean over i ≥ 1 of the largest A[i, j]",
    low=0.0,
    high=1.0,
    source="computed from the patterns, because these files contain no scores",
    texts="the texts shown",
)
NO_FINDINGS: Mapping[str, Any] = {"headline": "What each attention head attends to, token by token.", "findings": []}


@dataclass(frozen=True)
class PageRun:
    """One run: its name, its attention files by step, and optionally its evaluations from metrics.jsonl.

    The evaluations, each with `step` and `head_scores`, give the timeline more steps than there are files.
    """

    label: str
    files: Sequence[AttentionFile]
    evaluations: Sequence[Mapping[str, Any]] = field(default=())

    @property
    def shape(self) -> tuple[int, int]:
        """Layers and heads."""
        layers, heads, _ = self.files[-1].texts[0].value_norms.shape
        return layers, heads


@dataclass(frozen=True)
class PageReport:
    """What was written, and notes on what was left out to keep the page small."""

    path: Path
    bytes: int
    notes: list[str]


def write_page(
    path: Path | str,
    runs: Sequence[PageRun],
    findings: Mapping[str, Any] | None,
    ablations: AblationResults | None,
    title: str,
) -> PageReport:
    """Write the page of a run, atomically.

    Args:
        runs: the run to show, and optionally a second one to compare it with.
        findings: as in findings.json; its headline becomes the headline of the page.
        ablations: the effects of ablating heads of the first run.

    Raises:
        UserError: if there is nothing to show or the findings are malformed (exit code 4), or the file cannot be
            written (6).
    """
    runs = [PageRun(run.label, [f for f in run.files if f.texts], run.evaluations) for run in runs]
    runs = [run for run in runs if run.files]
    if not runs:
        raise UserError("no attention files with texts: there is nothing to show", CHECKPOINT)
    path, names = Path(path), _text_names(runs)
    table: dict[str, Any] = {
        "title": escape_control_chars(title),
        "texts": [escape_control_chars(name) for name in names],
        "ablation": ablation_tables(ablations, runs[0].shape),
        "scores": _score_infos(runs, ablations),
    }
    table |= _findings(findings or NO_FINDINGS, table["scores"], names, runs[0])
    empty = len(_assemble(table, []))
    contents, blocks, content = _fit(runs, names, empty + NOTES_BYTES)
    notes = _notes(content, runs, names)
    page = _assemble(table | contents | {"notes": notes}, blocks).encode("utf-8", "replace")
    write_atomic(path, [page])
    return PageReport(path, len(page), notes)


def _fit(runs: Sequence[PageRun], names: list[str], used: int) -> tuple[dict[str, Any], list[str], Content]:
    """The fullest content that fits, `used` bytes being taken: its table, its blocks, and what it holds."""
    blocks, vocabulary = Blocks(), Vocabulary()
    for content, limit in _contents(runs):
        blocks.begin(limit - used)
        try:
            table: dict[str, Any] = {
                "runs": [_run(r, run, names, content, blocks, vocabulary) for r, run in enumerate(runs)]
            }
        except PageTooLarge:
            continue
        table["vocabulary"] = vocabulary.table()
        if blocks.size + len(as_json(table)) <= blocks.limit:
            return table, blocks.blocks, content
    raise UserError(
        f"a page of this model would be larger than {MAX_BYTES:,} bytes; use fewer steps or texts", CHECKPOINT
    )


def _contents(runs: Sequence[PageRun]) -> Iterator[tuple[Content, int]]:
    """Contents from everything to ever less, each with the bytes that it may take."""
    yield Content(), BUDGET
    for qkv in ("last", "few"):
        yield from ((Content(qkv, half, every), BUDGET) for half, every in ((False, 1), (True, 1), (True, 2)))
        yield from ((Content(qkv, True, every), BUDGET) for every in (3, 4, 8))
    yield from ((Content("few", True, every, sqrt8=True), BUDGET) for every in (1, 4, 0))
    tokens = 0
    longest = max(len(text.tokens) for run in runs for file in run.files for text in file.texts)
    while tokens != 1:
        yield Content("few", True, 0, sqrt8=True, tokens=tokens), MAX_BYTES
        tokens = ((tokens or longest) + 1) // 2


def _notes(content: Content, runs: Sequence[PageRun], names: Sequence[str]) -> list[str]:
    """What was left out, a sentence each."""
    texts = [text for run in runs for file in run.files for text in file.texts]
    first = " and ".join(names[:FULL_TEXTS])
    several_steps = any(len(run.files) > 1 for run in runs)
    notes = []
    if content.qkv != "all" and several_steps and any(text.queries is not None for text in texts):
        which = f" of {first}" if content.qkv == "few" and len(names) > FULL_TEXTS else ""
        notes.append(f"Queries, keys and values are stored only for the last step{which}.")
    if content.every != 1 and several_steps and len(names) > FULL_TEXTS:
        steps = f"for one step in {content.every}" if content.every else "only for the last step"
        notes.append(f"Texts after {first} are stored {steps}.")
    if content.sqrt8:
        notes.append("Attention is stored in 8 bits, within 0.004, and within 0.002 below 0.25.")
    elif any(text.pattern_tril.dtype.itemsize > 2 for text in texts):
        notes.append("Attention is stored in 16 bits, within 0.00025.")
    if content.tokens:
        notes.append(f"Only the last {content.tokens} tokens of longer texts are stored; earlier keys are not shown.")
    return notes


def _text_names(runs: Sequence[PageRun]) -> list[str]:
    """The names of all texts in the order of their first use; the model's own sample first."""
    names = list(dict.fromkeys(text.name for run in runs for file in run.files for text in file.texts))
    return sorted(names, key=lambda name: name != "sample")


def _run(
    r: int, run: PageRun, names: list[str], content: Content, blocks: Blocks, vocabulary: Vocabulary
) -> dict[str, Any]:
    """One run: its shape and its steps, each with the heads' scores and the blocks of its texts."""
    layers, heads = run.shape
    steps, last = [], len(run.files) - 1
    for s, file in enumerate(run.files):
        texts: list[Any] = [None] * len(names)
        for text in reversed(file.texts):  # of two texts with the same name, the first counts
            k = names.index(text.name)
            if text.value_norms.shape[:2] == run.shape and content.has_text(k, s, last):
                with_qkv = text.queries is not None and content.has_qkv(k, s, last)
                texts[k] = _text((r, s, k), text, content, with_qkv, blocks, vocabulary)
        tables = {name: score_table(scores) for name, scores in _scores(file).items()}
        steps.append({"step": _step(file, s), "scores": tables, "texts": texts})
    timeline = [
        {"step": line["step"], "scores": {name: score_table(scores) for name, scores in line["head_scores"].items()}}
        for line in run.evaluations
        if line.get("head_scores")
    ]
    return {
        "label": escape_control_chars(run.label),
        "layers": layers,
        "heads": heads,
        "steps": steps,
        "timeline": timeline,
    }


def _text(
    key: tuple[int, int, int],
    text: AttentionRecord,
    content: Content,
    with_qkv: bool,
    blocks: Blocks,
    vocabulary: Vocabulary,
) -> dict[str, Any]:
    """One text of one step: its length and its blocks. `key`: the numbers of run, step and text, for the cache."""
    first = content.first_token(text)
    layers = range(len(text.pattern_tril))
    entry: dict[str, Any] = {
        "tokens": len(text.tokens) - first,
        "first": first,
        "dtype": "sqrt8" if content.sqrt8 else "float16",
        "top_k": len(text.top_tokens[0]) if text.top_tokens else 0,
        "block": blocks.add((key, first), partial(content.token_arrays, text, vocabulary)),
        "layers": [
            blocks.add((key, layer, content.sqrt8, first), partial(content.pattern_arrays, text, layer))
            for layer in layers
        ],
    }
    if with_qkv and text.queries is not None:
        dtype = content.qkv_dtype(text)
        entry["qkv"] = {
            "blocks": [
                blocks.add((key, "qkv", layer, dtype), partial(content.qkv_arrays, text, layer, dtype))
                for layer in layers
            ],
            "d_head": text.queries.shape[-1],
            "d_model": text.attn_out.shape[-1] if text.attn_out is not None else 0,
            "dtype": dtype,
        }
    return entry


def _step(file: AttentionFile, otherwise: int) -> int:
    text = file.metadata.get("step") or ""
    return int(text) if re.fullmatch("[0-9]{1,15}", text) else otherwise


def _scores(file: AttentionFile) -> Mapping[str, NDArray[np.floating[Any]]]:
    """The head scores of a file; if it has none, the mean attention to the most attended token, (L, H)."""
    if file.scores:
        return file.scores
    shape = file.texts[0].value_norms.shape[:2]
    largest = [np.full((*shape, 0), np.nan)]
    for text in file.texts:
        queries = np.arange(1, len(text.tokens))
        if text.value_norms.shape[:2] == shape and len(queries):
            rows = np.maximum.reduceat(text.pattern_tril, queries * (queries + 1) // 2, axis=-1)
            largest.append(rows.astype(np.float64))
    every = np.concatenate(largest, axis=-1)
    return {MAX_ATTENTION.name: every.mean(axis=-1) if every.shape[-1] else np.full(shape, np.nan)}


def _score_infos(runs: Sequence[PageRun], ablations: AblationResults | None) -> dict[str, Any]:
    """What each score means, its limits, and for each head whether ablation supports it."""
    tables: dict[str, list[NDArray[np.floating[Any]]]] = {}
    for run in runs:
        for file in run.files:
            for name, scores in _scores(file).items():
                tables.setdefault(name, []).append(np.asarray(scores))
    of_step = {_step(file, s): _scores(file) for s, file in enumerate(runs[0].files)}
    infos = {}
    for name, values in tables.items():
        info, measure = _score_info(name), measure_for_score(name)
        high = info.high if info.high is not None else max(float(np.nanmax(table, initial=0)) for table in values)
        effects = ablations.measures.get(measure) if ablations else None
        labels = None
        if ablations and effects and (len(effects.zero), len(effects.zero[0])) == runs[0].shape:
            is_attention = name.startswith(ANTECEDENT) or name in PATTERN_SCORES
            measured = of_step.get(ablations.step, of_step[max(of_step)]).get(name)
            labels = ablation_labels(effects, measured if is_attention else None)
        about = (info.formula, f"measured on {info.texts}" if info.texts else "", info.source)
        infos[name] = {
            "title": escape_control_chars(info.title),
            "description": "; ".join(part for part in about if part),
            "low": info.low,
            "high": number(high) if high > info.low else info.low + 1,
            "measure": measure,
            "labels": labels,
        }
    return infos


def _score_info(name: str) -> HeadScore:
    try:
        return MAX_ATTENTION if name == MAX_ATTENTION.name else score_info(name)
    except KeyError:
        return HeadScore(name, name, formula="", low=0.0, high=None, source="", texts="")


def _findings(
    findings: Mapping[str, Any], scores: Mapping[str, Any], names: Sequence[str], run: PageRun
) -> dict[str, Any]:
    """The headline, the findings, and the head and score with which the page starts."""
    try:
        entries = [_finding(entry, scores, names) for entry in findings["findings"]]
        headline = str(findings["headline"])
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"the findings are malformed ({error!r}); delete findings.json", CHECKPOINT) from error
    layers, heads = run.shape
    entries = [e for e in entries if all(0 <= layer < layers and 0 <= head < heads for layer, head in e["heads"])]
    last = _scores(run.files[-1])
    start = next((entry for entry in entries if entry["supported"]), entries[0] if entries else None)
    score = start["score"] if start and start["score"] in last else next(iter(last))
    best = np.unravel_index(np.argmax(np.nan_to_num(last[score], nan=-np.inf)), run.shape)
    layer, head = start["heads"][0] if start else (int(best[0]), int(best[1]))
    return {"headline": headline, "findings": entries, "start": {"layer": layer, "head": head, "score": score}}


def _finding(entry: Mapping[str, Any], scores: Mapping[str, Any], names: Sequence[str]) -> dict[str, Any]:
    """A finding with the text on which the page shows it."""
    score = str(entry["score"])
    name = f"{score.removeprefix(ANTECEDENT)} 1" if score.startswith(ANTECEDENT) else "repeat 1"
    return {
        "heads": [[int(layer), int(head)] for layer, head in (entry["head"], *entry["others"])],
        "score": score if score in scores else next(iter(scores)),
        "title": _score_info(score).title.split(":")[0],
        "attention": number(float(entry["value"])),
        "supported": bool(entry["is_supported"]),
        "summary": str(entry["summary"]),
        "effect": str(entry["effect"]),
        "text": names.index(name) if name in names else None,
        "at_end": score.startswith(ANTECEDENT),  # the query of a contrast pair is its last token
    }


def _assemble(table: Mapping[str, Any], blocks: Sequence[str]) -> str:
    """The whole file. The template is filled in one pass, so that data cannot act as a placeholder."""
    style, script = (WEB / "page.css").read_text("utf-8"), _script()
    policy = "default-src 'none'; base-uri 'none'; form-action 'none'; img-src data: blob:"
    for name, source in (("script", script), ("style", style)):
        policy += f"; {name}-src 'sha256-{base64.b64encode(hashlib.sha256(source.encode()).digest()).decode()}'"
    values = {
        "title": html.escape(table["title"]),
        "style": style,
        "script": script,
        "policy": policy,
        "data": as_json(table),
        "blocks": "\n".join(f'<script type="text/plain" id="block-{k}">{b}</script>' for k, b in enumerate(blocks)),
    }
    return re.sub(r"\{\{(\w+)\}\}", lambda match: values[match[1]], (WEB / "page.html").read_text("utf-8"))


def _script() -> str:
    return '"use strict";\n' + "\n".join((WEB / f"{name}.js").read_text("utf-8") for name in (*SCRIPTS, "main"))
