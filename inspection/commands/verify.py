"""`attend.py verify RUN`: recompute every attention file of a run from its checkpoint and compare."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike

from common.errors import RemovedError, UserError
from inspection.attention_file import AttentionFile
from inspection.commands.shared import Context, DeviceOptions, LoadedModel, OutputOptions, Result
from inspection.run_reader import DEFAULT, RunFiles
from inspection.terminal import paragraph

if TYPE_CHECKING:
    from inspection.eval_texts import EvalTexts

PATTERN_TOLERANCE = {2: 2.0**-11, 4: 1e-6}
"""By item size in bytes: rounding to f16, or the last bits of fp32, which depend on CPU and threads."""
LOSS_TOLERANCE = 1e-4  # nats
SCORE_TOLERANCE = 1e-5  # relative to the largest value of the score, if that is above 1
Check = dict[str, Any]  # `check`, `ok`, `difference`, `tolerance`, and `where`: the text or score, or what is wrong.


@dataclass(frozen=True)
class Verify(OutputOptions, DeviceOptions):
    """Recompute attention files from their checkpoints and compare; the exit code is 4 if something differs."""

    def result(self, context: Context) -> Result:
        run = RunFiles.open(self.run)
        root = run.folder if run.folder.is_dir() else run.folder.parent.parent  # of the attention file of a prompt
        checks: list[Check] = []
        without_checkpoint: list[int] = []
        for step in run.steps if run.opened_step == DEFAULT else [run.step()]:
            try:
                file = run.read(step)
            except RemovedError:  # by a run that was resumed
                continue
            except UserError as error:
                checks.append({"step": step, **_check("readable", math.inf, where=str(error))})
                continue
            checks.append({"step": step, **_check("readable")})
            try:
                loaded = context.load_model(root, str(step))
            except UserError:
                without_checkpoint.append(step)
                continue
            texts = run.eval_texts(loaded.model.vocab_size, loaded.model.config.context)
            checks += [{"step": step, **check} for check in verify_attention_file(file, loaded, texts)]
        failed = [check for check in checks if not check["ok"]]
        lines = [f"FAIL  step {c['step']}: {c['check']} {c['difference']:.2g}: {c['where']}" for c in failed]
        if without_checkpoint:
            steps = ", ".join(map(str, without_checkpoint))
            lines += paragraph(f"not recomputed, as no intact checkpoint is kept: step {steps}", context.width)
        lines.append(f"{len(failed)} of {len(checks)} checks failed" if failed else "all checks passed")
        data = {"run": str(run.folder), "ok": not failed, "steps_without_checkpoint": without_checkpoint}
        return Result([str(run.folder), *lines], {**data, "checks": checks}, not failed)


def verify_attention_file(file: AttentionFile, loaded: LoadedModel, texts: EvalTexts | None = None) -> Iterator[Check]:
    """Compare with a model the hashes that a file records and, if they are equal, its patterns, losses and scores.

    Without `texts`, on which the heads were scored, scores are not recomputed.
    """
    import torch

    from inspection.activation_cache import run_with_cache
    from inspection.compute_scores import compute_head_scores

    hashes = [key for key in ("weights_sha256", "tokenizer_sha256") if file.metadata.get(key) != loaded.metadata[key]]
    yield _check("hashes", math.inf if hashes else 0.0, where=", ".join(hashes))
    if hashes:
        return
    for text in file.texts:
        cache = run_with_cache(loaded.model, torch.from_numpy(text.tokens.astype(np.int64)))
        layers = enumerate(cache.pattern.numpy())  # one at a time: all layers unpacked at once are large
        difference = max(_max_difference(text.pattern(layer)[0], pattern) for layer, pattern in layers)
        yield _check("pattern", difference, PATTERN_TOLERANCE[text.pattern_tril.itemsize], text.name)
        yield _check("loss", _max_difference(text.loss, cache.loss), LOSS_TOLERANCE, text.name)
    recomputed = compute_head_scores(loaded.model, texts, loaded.token_bytes) if texts and file.scores else {}
    for name, table in recomputed.items():
        scale = max(1.0, float(table.abs().max()))
        difference = _max_difference(file.scores.get(name, np.array(math.inf)), table) / scale
        yield _check("scores", difference, SCORE_TOLERANCE, name)


def _check(name: str, difference: float = 0.0, tolerance: float = 0.0, where: str = "") -> Check:
    ok = difference <= tolerance
    return {"check": name, "ok": ok, "difference": difference, "tolerance": tolerance, "where": where}


def _max_difference(stored: ArrayLike, recomputed: ArrayLike) -> float:
    """The largest absolute difference; infinite if the shapes differ, or one of the two has a nan where the other has none."""
    a, b = np.asarray(stored, dtype=np.float64), np.asarray(recomputed, dtype=np.float64)
    if a.shape != b.shape or (np.isnan(a) != np.isnan(b)).any():
        return math.inf
    return float(np.abs(np.nan_to_num(a) - np.nan_to_num(b)).max(initial=0.0))
