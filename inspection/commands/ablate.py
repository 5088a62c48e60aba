"""`attend.py ablate RUN`: measure the effect of ablating each head, and rewrite findings, figures and page."""

from __future__ import annotations

from dataclasses import dataclass

from common.errors import CHECKPOINT, UserError
from inspection.commands.shared import Context, Result, RunOptions
from inspection.run_reader import NEWEST, RunFiles
from inspection.terminal import paragraph


@dataclass(frozen=True)
class Ablate(RunOptions):
    """Ablate each head of the newest checkpoint, as training does at its end; for a run that was stopped early."""


def run(options: Ablate, context: Context) -> Result:
    """Measure the newest checkpoint; a step without an attention file gets one."""
    from inspection.recorder import AttentionRecorder, report_heads

    files = RunFiles.open(options.run)
    folder = files.folder
    loaded = context.load_model(folder, NEWEST) if folder.is_dir() else None
    if loaded is None:
        raise UserError(f"{folder} is an attention file; ablation needs a run folder with a checkpoint", CHECKPOINT)
    texts = files.eval_texts(loaded.model.vocab_size, loaded.model.config.context)
    if texts is None:
        raise UserError(f"{folder} has no attention/eval_texts.json to ablate on", CHECKPOINT)
    if loaded.step not in files.steps:
        recorder = AttentionRecorder(texts, loaded.token_bytes, folder)
        recorder.write(loaded.model, loaded.step, dict(loaded.metadata))
    report = report_heads(loaded.model, texts, folder, loaded.step, loaded.metadata["weights_sha256"])
    lines = [part for line in report.lines for part in paragraph(line, context.width) or [""]]
    written = [*report.figures, *([report.page] if report.page else [])]
    return Result([*lines, "", *(f"written  {path}" for path in written)])
