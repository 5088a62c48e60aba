"""The page: a run's attention at every stored step, as one HTML file that opens from disk without a network.

HTML, CSS and JavaScript are in the folder `web/` and are put together here. Data never becomes markup: it is one JSON table
with `<`, `>` and `&` escaped. A content security policy lets only our own script and style run, known by their hashes.
Needs NumPy, not torch.
"""

import base64
import hashlib
import html
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from common.errors import CHECKPOINT, UserError, escape_control_chars
from common.files import write_atomic
from inspection.ablation_results import AblationResults
from inspection.attention_file import AttentionRecord
from inspection.page_data import PageRun, describe_scores, file_scores, finding_tables, numbers, own_text
from inspection.page_encoding import Encoder, as_json
from inspection.page_model import PageModel, encode_model
from inspection.terminal import DISCLAIMER

__all__ = ["PageRun", "write_page"]

PAGE_BYTES = 8_000_000  # of a page, as long as leaving out steps can achieve it
MODEL_SHARE = 3 / 8  # of them for the weights of all steps
MAX_BYTES = 40_000_000  # Bytes that no page exceeds; the beginnings of long texts are left out to achieve it.
FULL_TEXTS = 2  # The first texts keep every step when steps of the other texts are left out.
NO_MODEL = "The model is not in the page: to type your own text, run python attend.py serve RUN."
WEB = Path(__file__).parent / "web"
NAMES = (
    "dom colours data engine tokenizer backend own state attention text matrix grid timeline walkthrough experiments "
    "lesson main"
)
SCRIPTS = [f"{name}.js" for name in NAMES.split()]  # in the order in which they run


def write_page(
    path: Path | str,
    runs: Sequence[PageRun],
    findings: Mapping[str, Any] | None,
    ablations: AblationResults | None,
    title: str,
    budget: int = PAGE_BYTES,
) -> list[str]:
    """Write `build_page`, with the weights in the first run's folder, atomically; returns the notes. Raises UserError as it
    does, and if the file cannot be written (6)."""
    model = encode_model(runs[0], int(budget * MODEL_SHARE))
    page, notes = build_page(runs, findings, ablations, title, model, budget)
    write_atomic(Path(path), [page])
    return notes


def build_page(
    runs: Sequence[PageRun],
    findings: Mapping[str, Any] | None,
    ablations: AblationResults | None,
    title: str,
    model: PageModel = (None, []),
    budget: int = PAGE_BYTES,
) -> tuple[bytes, list[str]]:
    """The page of a run, or of two to compare, and notes on what was left out to stay within `budget` bytes, if that can be.

    `findings`, as in findings.json, `ablations` and `model`, to be run in the page or by a server, are of the first run.
    Raises UserError (4) if there is nothing to show, or the findings are malformed.
    """
    kept = (replace(run, files=[f for f in run.files if f.texts]) for run in runs)
    if not (runs := [run for run in kept if run.files]):
        raise UserError("no attention files with texts: there is nothing to show", CHECKPOINT)
    unsorted = dict.fromkeys(text.name for run in runs for file in run.files for text in file.texts)
    names = sorted(unsorted, key=lambda name: name != "sample")
    if ablations and any(e.shape != runs[0].shape for e in ablations.measures.values()):
        ablations = None  # of another model
    table: dict[str, Any] = {"title": escape_control_chars(title), "model": model[0]}
    table |= {"texts": list(map(escape_control_chars, names)), "scores": describe_scores(runs, ablations)}
    table |= finding_tables(findings, runs[0], table["scores"], names)
    table["own"] = own_text(table["findings"], names, runs[0].files[-1])
    model_bytes = len(as_json({"model": model[0]}))
    for every, tokens, limit in _contents(runs, budget - model_bytes):
        encoder, notes = Encoder(limit, model[1]), _notes(runs, names, every, tokens)
        notes += [NO_MODEL] if runs[0].folder and not model[0] else []
        try:
            table["runs"] = [_run(run, names, every, tokens, encoder) for run in runs]
        except OverflowError:
            continue
        vocabulary = encoder.vocabulary()
        page = _assemble(table | {"vocabulary": vocabulary, "notes": notes})
        if len(page) <= limit + model_bytes + len(as_json({"vocabulary": vocabulary})):
            return page, notes
    raise UserError(f"the page would be larger than {MAX_BYTES:,} bytes; use fewer steps or texts", CHECKPOINT)


def _contents(runs: Sequence[PageRun], budget: int) -> Iterator[tuple[int, int, int]]:
    """What a page may hold, fullest first: (every, tokens, bytes that it may take).

    Texts after the first keep every n-th step, or with 0 only the last; unless 1, queries, keys and values are those of
    the last step, in float16. Each text keeps its last `tokens` tokens without queries, keys and values, or with 0 all.
    """
    for every in (1, 2, 3, 4, 8, 0):
        yield every, 0, budget
    tokens = 0
    longest = max(len(text.tokens) for run in runs for file in run.files for text in file.texts)
    while tokens != 1:
        yield 0, tokens, MAX_BYTES
        tokens = ((tokens or longest) + 1) // 2


def _notes(runs: Sequence[PageRun], names: Sequence[str], every: int, tokens: int) -> list[str]:
    """What was left out, a sentence each."""
    texts = [text for run in runs for file in run.files for text in file.texts]
    starts = {f.metadata.get("weights_sha256") for run in runs for f in run.files if f.metadata.get("step") == "0"}
    notes = ["The runs began with other weights: their head numbers do not correspond."] * (len(starts) > 1)
    if every != 1 and any(len(run.files) > 1 for run in runs):
        if any(text.queries is not None for text in texts):
            notes.append("Queries, keys and values are stored only for the last step.")
        if len(names) > FULL_TEXTS:
            steps = f"for one step in {every}" if every else "only for the last step"
            notes.append(f"Texts after {' and '.join(names[:FULL_TEXTS])} are stored {steps}.")
    if tokens:
        notes.append(f"Only the last {tokens} tokens of longer texts are stored; earlier keys are not shown.")
    return notes


def _run(run: PageRun, names: list[str], every: int, tokens: int, encoder: Encoder) -> dict[str, Any]:
    """One run: its shape and its steps, each with the heads' scores and its texts."""
    layers, heads = run.shape
    steps, last = [], len(run.files) - 1
    for s, file in enumerate(run.files):
        texts = {text.name: text for text in reversed(file.texts)}  # of two with the same name, the first counts
        if s != last and (not every or (last - s) % every):
            texts = {name: texts[name] for name in names[:FULL_TEXTS] if name in texts}
        qkv = "" if tokens or (s != last and every != 1) else "float32" if every == 1 else "float16"
        entries = [_text(texts[name], tokens, qkv, encoder) if name in texts else None for name in names]
        steps.append({"step": run.steps[s], "scores": numbers(file_scores(file)), "texts": entries})
    label = escape_control_chars(run.label)
    return {"label": label, "layers": layers, "heads": heads, "steps": steps, "timeline": run.timeline}


def _text(text: AttentionRecord, tokens: int, qkv: str, encoder: Encoder) -> dict[str, Any]:
    """One text of one step: tokens (T), loss (T), value norms (L, H, T), most likely next tokens (T, N); and for each layer
    the pattern (H, T (T + 1) / 2), and with dtype `qkv` queries, keys, values (H, T, D) and attention output (T, C).

    Only ratios of value norms matter: they are divided by each head's largest to fit into float16.
    """
    T = len(text.tokens)
    first = max(0, T - tokens) if tokens else 0
    norms = np.nan_to_num(np.asarray(text.value_norms, np.float64)[..., first:], posinf=0, neginf=0)
    norms /= np.maximum(norms.max(axis=-1, keepdims=True), np.finfo(np.float32).tiny)
    top = [pair for row in text.top_tokens[first:] for pair in row]
    pattern = text.pattern_tril[..., np.tril_indices(T)[1] >= first]
    layers = [{"pattern": encoder.array(layer, "float16")} for layer in pattern]
    for name in ("queries", "keys", "values", "attn_out"):
        array = getattr(text, name) if qkv else None
        if array is not None:
            dtype = qkv if array.dtype.itemsize > 2 else "float16"
            for layer, values in zip(layers, array, strict=True):
                layer[name] = encoder.array(values, dtype)
    arrays = {
        "tokens": encoder.tokens(text.token_bytes[first:]),
        "loss": encoder.array(np.concatenate([[np.nan], text.loss])[first:], "float32"),
        "value_norms": encoder.array(norms, "float16"),
        "top_tokens": encoder.tokens(token for token, _ in top),
        "top_probs": encoder.array([probability for _, probability in top], "float16"),
    }
    return {"length": T - first, "first": first, "arrays": arrays, "layers": layers}


def _assemble(table: Mapping[str, Any]) -> bytes:
    """The whole file. The template is filled in one pass, so that data cannot act as a placeholder."""
    template, style, *scripts = ((WEB / name).read_text("utf-8") for name in ("page.html", "page.css", *SCRIPTS))
    script = '"use strict";\n' + "\n".join(scripts)
    policy = "default-src 'none'; base-uri 'none'; form-action 'none'; img-src data:"
    if table["model"] and "steps" in table["model"]:  # a server runs it
        policy += "; connect-src 'self'"
    for name, source in (("script", script), ("style", style)):
        policy += f"; {name}-src 'sha256-{base64.b64encode(hashlib.sha256(source.encode()).digest()).decode()}'"
    values = {
        "title": html.escape(table["title"]),
        "disclaimer": html.escape(DISCLAIMER),
        "style": style,
        "script": script,
        "policy": policy,
        "data": as_json(table),
    }
    return re.sub(r"\{\{(\w+)\}\}", lambda match: values[match[1]], template).encode("utf-8", "replace")
