"""The page: a run's attention at every stored step, as one HTML file that opens from disk without a network.

HTML, CSS and JavaScript are in the folder `web/` and are put together here. Data never becomes markup: it is a JSON table
with `<`, `>` and `&` escaped, and blocks of numbers in base64 (`page_encoding.py`). A content security policy lets only our
own script and style run, known by their hashes. Needs NumPy, not torch.
"""

from __future__ import annotations

import base64
import hashlib
import html
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from common.errors import CHECKPOINT, UserError, escape_control_chars
from common.files import write_atomic
from inspection.ablation_results import AblationResults
from inspection.attention_file import AttentionRecord
from inspection.page_data import (
    PageRun,
    ablation_tables,
    describe_scores,
    file_scores,
    finding_tables,
    score_tables,
)
from inspection.page_encoding import FULL_TEXTS, Blocks, Content, PageTooLarge, as_json
from inspection.terminal import DISCLAIMER

__all__ = ["PageReport", "PageRun", "write_page"]

BUDGET = 5_000_000
"""Bytes of a page, as long as leaving out steps, precision, queries and keys can achieve it."""
MAX_BYTES = 40_000_000
"""Bytes that no page exceeds; the beginnings of long texts are left out to achieve it."""
NOTES_BYTES = 2_000
"""Bytes reserved for the notes, which are known last."""
WEB = Path(__file__).parent / "web"
SCRIPTS = (
    "dom", "colours", "data", "state", "attention", "text", "matrix", "download", "grid", "timeline", "walkthrough"
)  # fmt: skip
"""The JavaScript files in the order in which they run; `main` is the last."""


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
    if ablations and any(e.shape != runs[0].shape for e in ablations.measures.values()):
        ablations = None  # of another model
    table: dict[str, Any] = {
        "title": escape_control_chars(title),
        "texts": [escape_control_chars(name) for name in names],
        "ablation": ablation_tables(ablations),
        "scores": describe_scores(runs, ablations),
    }
    table |= finding_tables(findings, runs[0], table["scores"], names)
    empty = len(_assemble(table, []))
    contents, blocks, content = _fit(runs, names, empty + NOTES_BYTES)
    notes = _notes(content, runs, names)
    page = _assemble(table | contents | {"notes": notes}, blocks).encode("utf-8", "replace")
    write_atomic(path, [page])
    return PageReport(path, len(page), notes)


def _fit(runs: Sequence[PageRun], names: list[str], used: int) -> tuple[dict[str, Any], list[str], Content]:
    """The fullest content that fits, `used` bytes being taken: its table, its blocks, and what it holds."""
    blocks = Blocks()
    for content, limit in _contents(runs):
        blocks.begin(limit - used)
        try:
            table: dict[str, Any] = {"runs": [_run(r, run, names, content, blocks) for r, run in enumerate(runs)]}
        except PageTooLarge:
            continue
        table["vocabulary"] = blocks.vocabulary()
        if blocks.size + len(as_json(table)) <= blocks.limit:
            return table, blocks.blocks, content
    raise UserError(
        f"a page of this model would be larger than {MAX_BYTES:,} bytes; use fewer steps or texts", CHECKPOINT
    )


def _contents(runs: Sequence[PageRun]) -> Iterator[tuple[Content, int]]:
    """Contents, fullest first, each with the bytes that it may take."""
    less_qkv = [Content(qkv, every) for qkv in ("last", "few") for every in (1, 2, 3, 4, 8)]
    sqrt8 = [Content("few", every, sqrt8=True) for every in (1, 4, 0)]
    yield from ((content, BUDGET) for content in (Content(), *less_qkv, *sqrt8))
    tokens = 0
    longest = max(len(text.tokens) for run in runs for file in run.files for text in file.texts)
    while tokens != 1:
        yield Content("few", 0, sqrt8=True, tokens=tokens), MAX_BYTES
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


def _run(r: int, run: PageRun, names: list[str], content: Content, blocks: Blocks) -> dict[str, Any]:
    """One run: its shape and its steps, each with the heads' scores and the blocks of its texts."""
    layers, heads = run.shape
    steps, last = [], len(run.files) - 1
    for s, file in enumerate(run.files):
        texts: list[Any] = [None] * len(names)
        for text in reversed(file.texts):  # of two texts with the same name, the first counts
            k = names.index(text.name)
            if text.value_norms.shape[:2] == run.shape and content.has_text(k, s, last):
                with_qkv = text.queries is not None and content.has_qkv(k, s, last)
                texts[k] = _text((r, s, k), text, content, with_qkv, blocks)
        steps.append({"step": run.step(s), "scores": score_tables(file_scores(file)), "texts": texts})
    return {
        "label": escape_control_chars(run.label),
        "layers": layers,
        "heads": heads,
        "steps": steps,
        "timeline": run.timeline,
    }


def _text(
    key: tuple[int, int, int], text: AttentionRecord, content: Content, with_qkv: bool, blocks: Blocks
) -> dict[str, Any]:
    """One text of one step: its length and its blocks. `key`: the numbers of run, step and text, for the cache."""
    first = content.first_token(text)
    layers = range(len(text.pattern_tril))
    entry: dict[str, Any] = {
        "tokens": len(text.tokens) - first,
        "first": first,
        "dtype": "sqrt8" if content.sqrt8 else "float16",
        "top_k": len(text.top_tokens[0]) if text.top_tokens else 0,
        "block": blocks.add((key, first), partial(content.token_arrays, text, blocks.token_id)),
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


def _assemble(table: Mapping[str, Any], blocks: Sequence[str]) -> str:
    """The whole file. The template is filled in one pass, so that data cannot act as a placeholder."""
    style, script = (WEB / "page.css").read_text("utf-8"), _script()
    policy = "default-src 'none'; base-uri 'none'; form-action 'none'; img-src data: blob:"
    for name, source in (("script", script), ("style", style)):
        policy += f"; {name}-src 'sha256-{base64.b64encode(hashlib.sha256(source.encode()).digest()).decode()}'"
    values = {
        "title": html.escape(table["title"]),
        "disclaimer": html.escape(DISCLAIMER),
        "style": style,
        "script": script,
        "policy": policy,
        "data": as_json(table),
        "blocks": "\n".join(f'<script type="text/plain" id="block-{k}">{b}</script>' for k, b in enumerate(blocks)),
    }
    return re.sub(r"\{\{(\w+)\}\}", lambda match: values[match[1]], (WEB / "page.html").read_text("utf-8"))


def _script() -> str:
    return '"use strict";\n' + "\n".join((WEB / f"{name}.js").read_text("utf-8") for name in (*SCRIPTS, "main"))
