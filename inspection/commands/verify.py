"""`attend.py verify RUN`: recompute every attention file of a run from its checkpoint and compare."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike

from common.errors import UserError
from inspection.attention_file import AttentionFile, AttentionRecord
from inspection.commands.shared import Context, LoadedModel, OutputOptions, Result
from inspection.run_reader import DEFAULT, RunFiles
from inspection.terminal import paragraph, table

if TYPE_CHECKING:
    from inspection.eval_texts import EvalTexts
    from model.gpt import GPT

PATTERN_TOLERANCE = {2: 2.0**-11, 4: 1e-6}
"""By item size in bytes: rounding to f16, or the last bits of fp32, which depend on CPU and threads."""
LOSS_TOLERANCE = 1e-4  # nats
SCORE_TOLERANCE = 1e-5  # relative to the largest value of the score, if that is above 1
Check = dict[str, Any]
"""Columns `check`, `ok`, `difference`, `tolerance`, and `where`: the text or score, or what is wrong."""


@dataclass(frozen=True)
class Verify(OutputOptions):
    """Recompute attention files from their checkpoints and compare; the exit code is 4 if something differs."""

    def result(self, context: Context) -> Result:
        """Check the attention files of all steps, or of the step that was opened."""
        run = RunFiles.open(self.run)
        steps = run.steps if run.opened_step == DEFAULT else [run.opened_step]
        rows: list[Check] = []
        without_checkpoint: list[int] = []
        for step in steps:
            loaded = context.load_model(run.folder, step)
            if loaded is None:
                without_checkpoint.append(step)
            rows += [{"step": step, **row} for row in _check_file(run, step, loaded)]
        ok = all(row["ok"] for row in rows)
        data = {"run": str(run.folder), "ok": ok, "steps_without_checkpoint": without_checkpoint, "checks": rows}
        lines = [f"{run.folder}: {len(steps)} attention files", "", *_table(rows, context.width), ""]
        failed = [f"FAIL  step {row['step']}: {row['check']}: {row['where']}" for row in rows if not row["ok"]]
        if without_checkpoint:
            names = ", ".join(map(str, without_checkpoint))
            lines += paragraph(f"not recomputed, as no checkpoint is kept: step {names}", context.width)
        summary = f"{len(failed)} of {len(rows)} checks failed" if failed else "all checks passed"
        return Result([*lines, *failed, summary], data, ok)


def _check_file(run: RunFiles, step: int, loaded: LoadedModel | None) -> list[Check]:
    """The checks of one file; an unreadable file is a failed check."""
    try:
        file = run.read(step)
    except UserError as error:
        return [_check("readable", math.inf, where=str(error))]
    if loaded is None:
        return [_check("readable")]
    texts = run.eval_texts(loaded.model.vocab_size, loaded.model.config.context)
    return [_check("readable"), *verify_attention_file(file, loaded, texts)]


def verify_attention_file(file: AttentionFile, loaded: LoadedModel, texts: EvalTexts | None = None) -> list[Check]:
    """Compare the hashes that a file records, its patterns, losses and scores with the model: one check of each name, that
    with the largest difference.

    Args:
        loaded: the model, and the `weights_sha256` and `tokenizer_sha256` that the file should record.
        texts: on which the heads were scored; without it scores are not recomputed.
    """
    model, metadata = loaded.model, loaded.metadata
    equal = {key: file.metadata.get(key) == metadata[key] for key in ("weights_sha256", "tokenizer_sha256")}
    checks = [_check(key, 0.0 if equal[key] else math.inf, where="" if equal[key] else "differs") for key in equal]
    shape = (model.config.n_layers, model.config.n_heads)
    for text in file.texts:
        fits = text.value_norms.shape[:2] == shape and len(text.tokens) <= model.config.context
        if not fits or text.tokens.min() < 0 or text.tokens.max() >= model.vocab_size:
            return [*checks, _check("shape", math.inf, where=f"{text.name} does not fit the model")]
    checks += [check for text in file.texts for check in _text_checks(text, model)]
    checks += _score_checks(file, loaded, texts) if texts is not None and file.scores else []
    return list({check["check"]: check for check in sorted(checks, key=lambda check: check["difference"])}.values())


def _text_checks(text: AttentionRecord, model: GPT) -> Iterator[Check]:
    import torch

    from inspection.activation_cache import run_with_cache

    cache = run_with_cache(model, torch.from_numpy(text.tokens.astype(np.int64)))
    tolerance = PATTERN_TOLERANCE[text.pattern_tril.itemsize]
    for layer, pattern in enumerate(cache.pattern.numpy()):  # by layer: all layers unpacked at once are large
        yield _check("pattern", _max_difference(text.pattern(layer)[0], pattern), tolerance, text.name)
    yield _check("loss", _max_difference(text.loss, cache.loss), LOSS_TOLERANCE, text.name)


def _score_checks(file: AttentionFile, loaded: LoadedModel, texts: EvalTexts) -> Iterator[Check]:
    from inspection.head_scores import compute_head_scores

    recomputed = compute_head_scores(loaded.model, texts, loaded.token_bytes)
    for name in {**file.scores, **recomputed}:
        difference = math.inf
        if name in file.scores and name in recomputed:
            scale = max(1.0, float(recomputed[name].abs().max()))
            difference = _max_difference(file.scores[name], recomputed[name]) / scale
        yield _check("scores", difference, SCORE_TOLERANCE, name)


def _check(name: str, difference: float = 0.0, tolerance: float = 0.0, where: str = "") -> Check:
    ok = difference <= tolerance
    return {"check": name, "ok": ok, "difference": difference, "tolerance": tolerance, "where": where}


def _max_difference(stored: ArrayLike, recomputed: ArrayLike) -> float:
    """The largest absolute difference; infinite if one of the two has a nan where the other has none."""
    a, b = np.asarray(stored, dtype=np.float64), np.asarray(recomputed, dtype=np.float64)
    if a.shape != b.shape or (np.isnan(a) != np.isnan(b)).any():
        return math.inf
    return float(np.abs(np.nan_to_num(a) - np.nan_to_num(b)).max(initial=0.0))


def _table(rows: list[Check], width: int) -> list[str]:
    """A row for each check, with the largest difference over all files."""
    titles = ("check", "files", "failed", "largest difference", "tolerance", "at step", "where")
    cells = []
    for name in dict.fromkeys(row["check"] for row in rows):
        same = [row for row in rows if row["check"] == name]
        worst = max(same, key=lambda row: row["difference"])
        numbers = f"{worst['difference']:.2g}", f"{worst['tolerance']:.2g}", worst["step"], worst["where"][:40]
        cells.append((name, len(same), sum(not row["ok"] for row in same), *numbers))
    return table(titles, cells, max(width, 140))
