"""`attend.py verify RUN`: recompute every attention file of a run from its checkpoint and compare."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from common.errors import UserError
from inspection.attention_file import read_attention_file
from inspection.commands.shared import LoadedModel, LoadModel, OutputOptions
from inspection.run_reader import NEWEST, RunFiles
from inspection.terminal import Result, Terminal, paragraph, table


@dataclass(frozen=True)
class Verify(OutputOptions):
    """Recompute attention files from their checkpoints and compare; the exit code is 4 if something differs."""


def run(options: Verify, terminal: Terminal, load_model: LoadModel) -> Result:
    """Check the attention files of all steps, or of the step that was opened."""
    files = RunFiles.open(options.run)
    steps = files.steps if files.opened_step == NEWEST else [files.opened_step]
    rows: list[dict[str, Any]] = []
    without_checkpoint: list[int] = []
    for step in steps:
        loaded = load_model(files.folder, step)
        if loaded is None:
            without_checkpoint.append(step)
        rows += [{"step": step, **row} for row in _check_file(files, step, loaded)]
    failed = [row for row in rows if not row["ok"]]
    data = {"run": str(files.folder), "ok": not failed, "steps_without_checkpoint": without_checkpoint, "checks": rows}
    lines = [f"{files.folder}: {len(steps)} attention files", "", *_table(rows, terminal), ""]
    lines += [f"FAIL  step {row['step']}: {row['check']}: {_describe(row)}" for row in failed]
    if without_checkpoint:
        names = ", ".join(map(str, without_checkpoint))
        lines += paragraph(f"not recomputed, as no checkpoint is kept: step {names}", terminal.width)
    lines.append(f"{len(failed)} of {len(rows)} checks failed" if failed else "all checks passed")
    return Result(lines, data, rows, ok=not failed)


def _check_file(files: RunFiles, step: int, loaded: LoadedModel | None) -> list[dict[str, Any]]:
    """The checks of one file; an unreadable file is a failed check."""
    from inspection.verify import Check, verify_attention_file

    try:
        file = read_attention_file(files.attention_files.paths[step])
    except UserError as error:
        return [asdict(Check("readable", False, where=str(error)))]
    checks = [Check("readable", True)]
    if loaded is not None:
        texts = files.eval_texts(loaded.model.vocab_size, loaded.model.config.context)
        checks += verify_attention_file(file, loaded.model, loaded.metadata, texts)
    return [asdict(check) for check in checks]


def _describe(row: dict[str, Any]) -> str:
    if row["difference"] is None:
        return row["where"] or "differs"
    return f"largest difference {row['difference']:.2g}, tolerance {row['tolerance']:.2g} ({row['where']})"


def _table(rows: list[dict[str, Any]], terminal: Terminal) -> list[str]:
    """A row for each check, with the largest difference over all files."""
    titles = ("check", "files", "failed", "largest difference", "tolerance", "at step", "where")
    cells = []
    for name in dict.fromkeys(row["check"] for row in rows):
        same = [row for row in rows if row["check"] == name]
        worst = max(same, key=lambda row: (not row["ok"], row["difference"] or 0.0))
        numbers = ["-" if worst[key] is None else f"{worst[key]:.2g}" for key in ("difference", "tolerance")]
        failed = sum(not row["ok"] for row in same)
        cells.append((name, len(same), failed, *numbers, worst["step"], worst["where"][:40]))
    return table(titles, cells, max(terminal.width, 140))
