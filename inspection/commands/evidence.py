"""`attend.py evidence RUN`: take every head away again, and write evidence, claims, figures and page anew."""

from __future__ import annotations

from dataclasses import dataclass

from inspection.commands.shared import OfRun
from inspection.commands.verify import Origins
from inspection.folder import RunAttention
from inspection.tables import Result, Terminal, paragraph
from runtime.errors import CHECKPOINT, UserError, printable


@dataclass(frozen=True)
class Evidence(OfRun):
    """What changes when each head is taken away, measured anew: for a run that was stopped, or was resumed."""


def run(config: Evidence, terminal: Terminal, origin: Origins) -> Result:
    """Measure the newest step whose checkpoint is kept; what a whole run does at its end."""
    from inspection.observer import Observer

    attention = RunAttention.open(config.run)
    step = attention.step()
    kept = origin(attention.folder, step) if attention.folder.is_dir() else None
    if kept is None:
        message = f"{attention.folder} keeps no whole checkpoint of step {step}, so no head can be taken away"
        raise UserError(message, CHECKPOINT)
    model = kept.model
    watched = attention.watched(model.vocab_size, model.config.context)
    if watched is None:
        raise UserError(f"{attention.folder} does not say what it watched (attention/watched.json)", CHECKPOINT)
    report = Observer(model, watched, kept.token_bytes, attention.folder).report(step, kept.hashes["weights_sha256"])
    lines = [part for line in report.lines for part in (paragraph(printable(line), terminal.width) if line else [""])]
    written = [*report.pictures, report.page]
    data = {"step": step, "lines": report.lines, "written": [str(path) for path in written]}
    return Result([*lines, "", *(f"written  {printable(path)}" for path in written)], data, [data])
