"""`attend.py ablate RUN`: take every head away again, and write evidence, claims, figures and page anew."""

from __future__ import annotations

from dataclasses import dataclass

from common.errors import CHECKPOINT, UserError, escape_control_chars
from inspection.commands.shared import OfRun
from inspection.commands.verify import Origins
from inspection.run_reader import NEWEST, RunFiles
from inspection.terminal import Result, Terminal, paragraph


@dataclass(frozen=True)
class Ablate(OfRun):
    """What changes when each head is taken away, measured anew: for a run that was stopped, or was resumed."""


def run(config: Ablate, terminal: Terminal, origin: Origins) -> Result:
    """Measure the newest checkpoint, as a whole run does at its end; a step without a dump gets one."""
    from inspection.recorder import AttentionRecorder

    attention = RunFiles.open(config.run)
    kept = origin(attention.folder, NEWEST) if attention.folder.is_dir() else None
    if kept is None:
        raise UserError(f"{attention.folder} is no run folder, so it keeps no model to take heads from", CHECKPOINT)
    model, step = kept.model, kept.step
    watched = attention.eval_texts(model.vocab_size, model.config.context)
    if watched is None:
        raise UserError(f"{attention.folder} does not say what it watched (attention/eval_texts.json)", CHECKPOINT)
    observer = AttentionRecorder(model, watched, kept.token_bytes, attention.folder)
    if step not in attention.attention_files:
        observer.write(step, kept.metadata)
    report = observer.report(step, kept.metadata["weights_sha256"])
    lines = [
        part
        for line in report.lines
        for part in (paragraph(escape_control_chars(line), terminal.width) if line else [""])
    ]
    written = [*report.pictures, *([report.page] if report.page else [])]
    data = {"step": step, "lines": report.lines, "written": [str(path) for path in written]}
    return Result([*lines, "", *(f"written  {escape_control_chars(path)}" for path in written)], data, [data])
