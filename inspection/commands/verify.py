"""`attend.py verify RUN`: is every attention file of a run what it says it is?

The checks are `inspection/verify.py`'s. Whoever calls gives a way to the checkpoint of a step, as this part of the
house knows nothing of checkpoints.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from common.errors import UserError, escape_control_chars
from inspection.attention_file import read_attention_file
from inspection.commands.shared import Told
from inspection.run_reader import NEWEST, RunFiles
from inspection.terminal import Column, Result, Terminal, paragraph, table

if TYPE_CHECKING:
    from inspection.verify import CheckResult
    from model.gpt import GPT


@dataclass(frozen=True)
class Verify(Told):
    """Check every attention file of a run; the exit code is 4 if a check fails."""


@dataclass(frozen=True)
class Origin:
    """Where a dump says that it comes from, as far as it is still there."""

    model: GPT
    step: int
    metadata: Mapping[str, str]
    """What a dump says of it, its hashes among that."""
    token_bytes: Callable[[int], bytes]


Origins = Callable[[Path, int], Origin | None]
"""From a run's folder and a step to the model, of the newest checkpoint for `NEWEST`; None where it is not kept."""


def run(config: Verify, terminal: Terminal, origin: Origins) -> Result:
    """Every check of every dump."""
    attention = RunFiles.open(config.run)
    records: list[dict[str, Any]] = []
    without: list[int] = []
    paths = attention.attention_files.paths
    if attention.asked != NEWEST:
        paths = {attention.asked: paths[attention.asked]}
    for step, path in paths.items():
        source = origin(attention.folder, step)
        if source is None:
            without.append(step)
        records += [{"step": step, **finding} for finding in _findings(attention, path, source)]
    failed = [one for one in records if not one["ok"]]
    data = {"run": str(attention.folder), "ok": not failed, "without_checkpoint": without, "checks": records}
    lines = [
        f"{escape_control_chars(attention.folder)}: attention files checked: {len(paths)}",
        "",
        *_table(records, terminal),
        "",
    ]
    lines += [f"FAIL  step {one['step']}: {one['check']}: {_shown(one)}" for one in failed]
    if without:
        steps = ", ".join(map(str, without))
        said = f"no checkpoint is kept of step {steps}: nothing was computed again there"
        lines += paragraph(said, terminal.width)
    lines.append("all checks hold" if not failed else f"{len(failed)} of {len(records)} checks fail")
    return Result(lines, data, records, ok=not failed)


def _findings(attention: RunFiles, path: Path, source: Origin | None) -> list[dict[str, Any]]:
    """The findings on one file; that it can't be read is one too."""
    from inspection.verify import CheckResult, verify_dump

    try:
        dump = read_attention_file(path)
    except UserError as error:
        return [_plain(CheckResult("the file can be read", False, 1, 0, str(error)))]
    found = [CheckResult("the file can be read", True, 0, 0)]
    if source is None:
        return [_plain(one) for one in [*found, *verify_dump(dump)]]
    watched = attention.eval_texts(source.model.vocab_size, source.model.config.context)

    def scores(model: GPT) -> dict[str, Any]:
        from inspection.scores import head_scores

        assert watched is not None
        return {name: table.numpy() for name, table in head_scores(model, watched).items()}

    again = scores if watched is not None else None
    hashes = {key: source.metadata[key] for key in ("weights_sha256", "tokenizer_sha256")}
    found += verify_dump(dump, source.model, hashes, source.token_bytes, again)
    return [_plain(one) for one in found]


def _plain(finding: CheckResult) -> dict[str, Any]:
    """A finding with stable names; numbers are numbers, hashes are text."""
    measured, bound = (float(v) if isinstance(v, int | float) else v for v in (finding.measured, finding.bound))
    return {
        "check": finding.name,
        "ok": bool(finding.ok),
        "measured": measured,
        "bound": bound,
        "where": finding.where,
    }


def _shown(one: dict[str, Any]) -> str:
    measured, bound = (
        f"{v:.2g}" if isinstance(v, float) else escape_control_chars(v)[:16] for v in (one["measured"], one["bound"])
    )
    where = f" ({escape_control_chars(one['where'])})" if one["where"] else ""
    return f"{measured}, bound {bound}{where}"


def _table(records: list[dict[str, Any]], terminal: Terminal) -> list[str]:
    """A row for each check: on how many files it was made, and how far off it was where it was furthest."""
    columns = [Column("check", side="left"), Column("files"), Column("fail")]
    columns += [Column("furthest off"), Column("bound"), Column("at step"), Column("where", side="left")]
    rows = []
    for name in dict.fromkeys(one["check"] for one in records):
        mine = [one for one in records if one["check"] == name]
        worst = max(mine, key=_distance)
        measured, bound = (
            f"{v:.2g}" if isinstance(v, float) else escape_control_chars(v)[:8]
            for v in (worst["measured"], worst["bound"])
        )
        fails = sum(not one["ok"] for one in mine)
        rows.append((name, len(mine), fails, measured, bound, worst["step"], escape_control_chars(worst["where"])[:40]))
    return table(columns, rows, max(terminal.width, 140), fixed=1)


def _distance(one: dict[str, Any]) -> float:
    """How far a check is from its bound; a failure is further than anything."""
    if not one["ok"]:
        return math.inf
    if isinstance(one["measured"], float) and isinstance(one["bound"], float):
        return float(one["measured"] / one["bound"]) if one["bound"] else one["measured"]
    return 0.0
