"""The page: what the heads read at every step of training, as one HTML file that opens from disk and asks for nothing.

Last in the flow of inspection: dumps (`dump.py`), evidence and claims → `write_page` → attention.html. The page's own
source lies in the folder `page/`, HTML, CSS and JavaScript as they are written, and is put together here. Needs numpy
alone.

What was measured goes into the file as data, never as markup: a table in JSON with `<`, `>` and `&` escaped, and
blocks of numbers in base64 (`packing.py`), which the page unpacks when they are looked at. A policy in the file lets
nothing run but our own script, known by its hash.
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

import numpy as np
from numpy.typing import ArrayLike, NDArray

from common.errors import CHECKPOINT, UserError, escape_control_chars
from common.files import write_atomic
from inspection.attention_file import AttentionFile, AttentionRecord
from inspection.findings import measure_for_score
from inspection.page_data import FIRST_TEXTS, HALF, Blocks, Plan, TooLarge, Vocabulary, as_json, plain, table
from inspection.registry import HeadScore, score_info

BUDGET = 5_000_000
"""Bytes that a page takes at most, as long as something less than a whole text can be left out."""
MOST = 40_000_000
"""Bytes that no page exceeds."""
ROOM_FOR_NOTES = 2_000
"""Bytes for what is said of what was left out, which is known last."""
SOURCE = Path(__file__).parent / "web"
SCRIPTS = ("data", "colours", "state", "scene", "parts", "sample", "matrix", "grid", "timeline", "steps", "download")
"""The JavaScript files in the order in which they run; `main` is the last."""
SHARPNESS = HeadScore(
    "sharpness",
    "how much of its weight goes to one token",
    "mean over i ≥ 1 of the largest A[i, j]",
    low=0.0,
    high=1.0,
    source="taken from the weights, for these files hold no scores",
    texts="the texts shown",
)


@dataclass(frozen=True)
class PageRun:
    """One run: what it is called, and its dumps in the order of their steps."""

    label: str
    dumps: list[AttentionFile]


@dataclass(frozen=True)
class PageReport:
    """What was written, and in words what was left out to keep it small."""

    path: Path
    bytes: int
    notes: list[str]


def write_page(
    path: Path | str,
    runs: Sequence[PageRun],
    claims: Mapping[str, Any] | None,
    evidence: Mapping[str, Any] | None,
    title: str,
) -> PageReport:
    """Write the page of a run; `path` is replaced whole or not at all.

    Args:
        runs: the run shown; a second one is compared with it.
        claims: as `claims.as_json` gives them; its sentence stands at the head of the page.
        evidence: as `AblationResults.as_json` gives it: what taking heads away does.
        title: what the page is called.

    Raises:
        UserError: if there is nothing to show (exit code 4), or the file cannot be written (6).
    """
    runs = [PageRun(run.label, [dump for dump in run.dumps if dump.texts]) for run in runs]
    runs = [run for run in runs if run.dumps]
    if not runs:
        raise UserError("no attention files with texts in them: there is nothing to show", CHECKPOINT)
    path = Path(path)
    frame = {"title": html.escape(escape_control_chars(title)), "style": _source("page.css"), "script": _script()}
    told = {
        "title": escape_control_chars(title),
        "headline": str((claims or {}).get("headline") or ""),
        "findings": plain(list((claims or {}).get("findings") or [])),
        "evidence": plain(dict(evidence)) if evidence else None,
    }
    empty = len(_assemble(frame, told, []).encode("utf-8", "replace"))
    about, blocks, plan = _fitting(runs, empty + ROOM_FOR_NOTES)
    coarse = any(text and text["eight"] for run in about["runs"] for step in run["steps"] for text in step["texts"])
    notes = _notes(plan, runs, coarse)
    page = _assemble(frame, told | about | {"notes": notes}, blocks).encode("utf-8", "replace")
    write_atomic(path, [page])
    return PageReport(path, len(page), notes)


def _fitting(runs: Sequence[PageRun], taken: int) -> tuple[dict[str, Any], list[str], Plan]:
    """The table of contents and the blocks of the fullest page that is small enough, `taken` bytes being used up."""
    blocks, words = Blocks(), Vocabulary()
    for plan, limit in _plans(runs):
        blocks.begin(limit - taken)
        try:
            about = _contents(runs, plan, blocks, words)
        except TooLarge:
            continue
        if blocks.size + len(as_json(about)) <= blocks.limit:
            return about, blocks.kept, plan
    raise UserError(
        f"a page of this model would be larger than {MOST:,} bytes: give it fewer steps or texts", CHECKPOINT
    )


def _plans(runs: Sequence[PageRun]) -> Iterator[tuple[Plan, int]]:
    """From everything to ever less, with the bytes that each may take; the first that fits is taken."""
    thinner = (2, 3, 4) if len(_names(runs)) > FIRST_TEXTS and any(len(run.dumps) > 2 for run in runs) else ()
    yield from ((plan, BUDGET) for plan in (Plan(), Plan("last"), Plan("last", half=True)))
    for details in ("last", "few"):
        yield from ((Plan(details, True, every), BUDGET) for every in (1, *thinner))
    for eight in ("some", "all"):
        yield from ((Plan("few", True, every, eight), BUDGET) for every in (1, *thinner, 8, 0))
    least = Plan("few", True, 0, eight="all")
    yield least, MOST
    layers, heads = _shape(runs)
    longest = max(len(text.tokens) for run in runs for dump in run.dumps for text in dump.texts)
    yield from ((plan, MOST) for plan in least.smaller(longest, layers, heads))


def _notes(plan: Plan, runs: Sequence[PageRun], coarse: bool) -> list[str]:
    """What the plan leaves out, a sentence each; `coarse` says whether some weights are kept in 8 bits."""
    texts = [text for run in runs for dump in run.dumps for text in dump.texts]
    names = _names(runs)
    first = " and ".join(names[:FIRST_TEXTS])
    said = []
    if plan.details != "all" and any(text.queries is not None for text in texts):
        which = "" if plan.details == "last" or len(names) <= FIRST_TEXTS else f", of {first}"
        said.append(f"Queries, keys and values are kept of the last step alone{which}.")
    if plan.every != 1 and len(names) > FIRST_TEXTS and any(len(run.dumps) > 1 for run in runs):
        steps = f"one step in {plan.every}" if plan.every else "the last step alone"
        said.append(f"Texts after {first} are kept of {steps}.")
    if coarse:
        whose = "" if plan.eight == "all" else f"; exactly at the last step, and in {first}"
        said.append(f"Weights are kept in 8 bits, each within 0.004, those below 0.25 within 0.002{whose}.")
    elif any(text.pattern_tril.dtype.itemsize > 2 for text in texts):
        said.append("Weights are kept in 16 bits, each within 0.00025.")
    if plan.tokens:
        said.append(f"Of longer texts the last {plan.tokens} tokens are kept; what they read before is out of sight.")
    layers, heads = _shape(runs)
    for kept, whole, what in ((plan.layers, layers, "layers"), (plan.heads, heads, "heads of a layer")):
        if kept:
            said.append(f"Of {whole} {what} the first {kept} are kept.")
    return said


def _shape(runs: Sequence[PageRun]) -> tuple[int, int]:
    """Layers and heads of the largest run."""
    shapes = [text.value_norms.shape for run in runs for dump in run.dumps for text in dump.texts]
    return max(shape[0] for shape in shapes), max(shape[1] for shape in shapes)


def _names(runs: Sequence[PageRun]) -> list[str]:
    """The names of all texts in the order in which they first come; the model's own sample before them."""
    names = list(dict.fromkeys(text.name for run in runs for dump in run.dumps for text in dump.texts))
    return sorted(names, key=lambda name: name != "sample")


def _contents(runs: Sequence[PageRun], plan: Plan, blocks: Blocks, words: Vocabulary) -> dict[str, Any]:
    """The table of what the page holds and in which block; fills the blocks."""
    names = _names(runs)
    found = [_run(r, run, names, plan, blocks, words) for r, run in enumerate(runs)]
    scores = dict.fromkeys(name for run in found for step in run["steps"] for name in step["scores"])
    return {
        "texts": names,
        "runs": found,
        "scores": {name: _described(name) for name in scores},
        "words": words.table(),
    }


def _run(r: int, run: PageRun, names: list[str], plan: Plan, blocks: Blocks, words: Vocabulary) -> dict[str, Any]:
    """One run: its shape and its steps, each with the heads' scores and where its texts' numbers are."""
    L, H, _ = run.dumps[-1].texts[0].value_norms.shape
    layers, heads = min(plan.layers or L, L), min(plan.heads or H, H)
    steps, last = [], len(run.dumps) - 1
    for s, dump in enumerate(run.dumps):
        texts: list[Any] = [None] * len(names)
        for text in reversed(dump.texts):  # of two texts of one name, the first counts
            k = names.index(text.name)
            if text.value_norms.shape[:2] == (L, H) and plan.keeps(k, s, last):
                texts[k] = _text((r, s, k), last, text, plan, blocks, words)
        scores: Mapping[str, ArrayLike] = dump.scores or {SHARPNESS.name: _sharpness(dump)}
        steps.append(
            {
                "step": _whole(dump.metadata.get("step"), s),
                "seen": _whole(dump.metadata.get("tokens_seen"), -1),
                "scores": {name: table(score, layers, heads) for name, score in scores.items()},
                "texts": texts,
            }
        )
    return {"label": escape_control_chars(run.label), "layers": layers, "heads": heads, "steps": steps}


def _text(
    where: tuple[int, int, int], last: int, text: AttentionRecord, plan: Plan, blocks: Blocks, words: Vocabulary
) -> dict[str, Any]:
    """One text of one step: its length, and the numbers of its blocks. `where` is run, step and text."""
    _, step, k = where
    coarse, explained = plan.coarse(k, step, last), plan.explains(k, step, last)
    layers = range(plan.layers or len(text.pattern_tril))
    first = plan.first_token(text)
    form = (first, coarse, plan.heads)
    found: dict[str, Any] = {
        "tokens": len(text.tokens) - first,
        "first": first,
        "eight": coarse,
        "likely": len(text.top_tokens[0]) if text.top_tokens else 0,
        "side": blocks.add((where, first, plan.layers, plan.heads), partial(plan.side, text, words)),
        "layers": [blocks.add((where, layer, form), partial(plan.pattern, text, layer, coarse)) for layer in layers],
    }
    if explained and text.queries is not None and text.keys is not None and text.values is not None:
        kind = plan.details_kind(text)
        names = [(where, "details", layer, kind, form) for layer in layers]
        found["details"] = {
            "blocks": [blocks.add(name, partial(plan.explained, text, name[2], kind)) for name in names],
            "width": text.queries.shape[-1],
            "stream": text.attn_out.shape[-1] if text.attn_out is not None else 0,
            "half": kind == HALF,
        }
    return found


def _sharpness(dump: AttentionFile) -> NDArray[np.float64]:
    """`SHARPNESS` of each head over the texts of a dump, (L, H); nan if none has two tokens."""
    rows = []
    shape = dump.texts[0].value_norms.shape[:2]
    for text in (text for text in dump.texts if text.value_norms.shape[:2] == shape):
        queries = np.arange(1, len(text.tokens))
        if len(queries):
            largest = np.maximum.reduceat(text.pattern_tril, queries * (queries + 1) // 2, axis=-1)
            rows.append(largest.astype(np.float64))
    return np.concatenate(rows, axis=-1).mean(axis=-1) if rows else np.full(shape, np.nan)


def _described(name: str) -> dict[str, Any]:
    """What a score means, for its selector and its scale."""
    try:
        score = SHARPNESS if name == SHARPNESS.name else score_info(name)
    except KeyError:
        score = HeadScore(name, name, formula="", low=0.0, high=None, source="", texts="")
    return {
        "title": escape_control_chars(score.title),
        "formula": score.formula,
        "source": score.source,
        "on": score.texts,
        "low": score.low,
        "high": score.high,
        "measure": measure_for_score(name),
        "weight": name.startswith("antecedent.")
        or name in ("previous_token", "duplicate_token", "induction", "first_token"),
    }


def _whole(text: str | None, otherwise: int) -> int:
    return int(text) if text and re.fullmatch("[0-9]{1,15}", text) else otherwise


def _source(name: str) -> str:
    return (SOURCE / name).read_text("utf-8")


def _script() -> str:
    return '"use strict";\n' + "\n".join(_source(f"{name}.js") for name in (*SCRIPTS, "main"))


def _assemble(frame: Mapping[str, str], about: Mapping[str, Any], blocks: Sequence[str]) -> str:
    """The whole file. The template is filled in one pass, so that no filling is taken for a gap."""
    policy = "default-src 'none'; base-uri 'none'; form-action 'none'; img-src data: blob:"
    for name in ("script", "style"):
        policy += f"; {name}-src 'sha256-{base64.b64encode(hashlib.sha256(frame[name].encode()).digest()).decode()}'"
    data = "\n".join(f'<script type="text/plain" id="block-{k}">{block}</script>' for k, block in enumerate(blocks))
    filling = {**frame, "policy": policy, "about": as_json(about), "blocks": data}
    return re.sub(r"\{\{(\w+)\}\}", lambda gap: filling[gap[1]], _source("page.html"))
