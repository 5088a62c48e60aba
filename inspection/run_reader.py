"""What a run folder holds of attention: dumps by step, what was watched, what was found by taking heads away.

Between the files of a run and whatever shows them: the commands of `attend.py`, the page, the figures. Needs numpy
alone, apart from `watched`.

    attention/000400.safetensors   a dump for each evaluation (`dump.py`)
    attention/eval_texts.json         what all of them look at (`watch.py`)
    attention/ablations.json        effects of taking each head away (`evidence.py`)
    attention/findings.json          what may be said of the heads (`claims.py`)
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from common.errors import CHECKPOINT, CONFIG, UserError
from common.files import read_metrics
from inspection.ablation_results import AblationResults
from inspection.attention_file import AttentionFile, read_attention_file

if TYPE_CHECKING:
    from inspection.eval_texts import EvalTexts

DUMPS = "attention"
LARGEST_JSON = 1 << 28
NEWEST = -1
"""The step that stands for the last one there is."""


class AttentionFiles(Mapping[int, AttentionFile]):
    """Attention files by step, in their order. Each is read when it is asked for, and not kept: together they can be large."""

    def __init__(self, paths: Mapping[int, Path]) -> None:
        self.paths = dict(sorted(paths.items()))

    def __getitem__(self, step: int) -> AttentionFile:
        return read_attention_file(self.paths[step])

    def __contains__(self, step: object) -> bool:
        return step in self.paths  # without reading the file

    def __iter__(self) -> Iterator[int]:
        return iter(self.paths)

    def __len__(self) -> int:
        return len(self.paths)


@dataclass(frozen=True)
class RunFiles:
    """The attention files of one run."""

    folder: Path
    """Of the run; the file itself where a single one was opened."""
    attention_files: AttentionFiles
    asked: int = NEWEST
    """The step that the opened path names: that of a checkpoint or of a single file."""

    @staticmethod
    def open(path: Path | str) -> RunFiles:
        """The run that `path` names: its folder, its attention folder, one of its checkpoints or of its dumps.

        Raises:
            UserError: if that is no run, or one without attention files (exit code 4).
        """
        path = Path(path)
        of_step = path.suffix == ".safetensors" and _is_step(path.stem) and path.parent.name == DUMPS
        if path.is_file() and not of_step:
            step = read_attention_file(path).metadata.get("step", "")
            number = int(step) if _is_step(step) else 0
            return RunFiles(path, AttentionFiles({number: path}), number)
        folder = path.parent.parent if of_step else run_of(path)
        dumps = find_attention_files(folder / DUMPS)
        if not dumps:
            raise UserError(_nothing_in(folder), CHECKPOINT)
        run = RunFiles(folder, AttentionFiles(dumps))
        if of_step:
            return replace(run, asked=run.step(int(path.stem)))
        asked = int(path.name) if folder != path and _is_step(path.name) else NEWEST
        return replace(run, asked=asked if asked in dumps else NEWEST)

    @property
    def steps(self) -> list[int]:
        """The steps with a dump, first to last."""
        return list(self.attention_files)

    def step(self, wanted: int = NEWEST) -> int:
        """`wanted`, or the newest step.

        Raises:
            UserError: if there is no dump of that step, naming the nearest ones (exit code 2).
        """
        if wanted == NEWEST:
            return self.steps[-1] if self.asked == NEWEST else self.asked
        if wanted in self.attention_files:
            return wanted
        near = sorted(sorted(self.steps, key=lambda step: abs(step - wanted))[:3])
        message = f"{self.folder} has no attention file of step {wanted}; the nearest are {', '.join(map(str, near))}"
        raise UserError(message, CONFIG)

    def scores(self) -> dict[str, NDArray[np.float32]]:
        """Every score of every head over the steps, (S, L, H) by name; nan at steps where a score is missing.

        Raises:
            UserError: if a dump is damaged, or has other heads than the one before it (exit code 4).
        """
        found = [self.attention_files[step].scores for step in self.steps]
        shapes = {table.shape for tables in found for table in tables.values()}
        if len(shapes) > 1:
            raise UserError(f"the attention files in {self.folder} are of models with different heads", CHECKPOINT)
        names = dict.fromkeys(name for tables in reversed(found) for name in tables)
        empty = np.full(next(iter(shapes), (0, 0)), np.nan, dtype=np.float32)
        return {name: np.stack([tables.get(name, empty) for tables in found]) for name in names}

    @property
    def ablation(self) -> AblationResults | None:
        """What taking heads away has shown; None where it was not measured.

        Raises:
            UserError: if the file is damaged (exit code 4).
        """
        path = self.folder / DUMPS / "ablations.json"
        return AblationResults.load(path) if path.is_file() else None

    @property
    def findings(self) -> dict[str, Any] | None:
        """What may be said of the heads: `sentence` and `claims`, as `findings.json` holds them; None without the file.

        Raises:
            UserError: if the file is damaged (exit code 4).
        """
        path = self.folder / DUMPS / "findings.json"
        if not path.is_file():
            return None
        table = read_table(path)
        if not isinstance(table.get("headline"), str) or not isinstance(table.get("findings"), list):
            raise UserError(f"{path} holds no claims that can be read; delete it to go on without", CHECKPOINT)
        return table

    def eval_texts(self, vocab_size: int, context: int) -> EvalTexts | None:
        """What the run looked at throughout; None where that was not kept. Loads torch.

        Raises:
            UserError: if the file is damaged (exit code 4).
        """
        from inspection.eval_texts import EvalTexts

        path = self.folder / DUMPS / "eval_texts.json"
        return EvalTexts.load(path, vocab_size, context) if path.is_file() else None

    def metrics(self) -> list[dict[str, Any]]:
        """The lines of the run's `metrics.jsonl`; none if there is no such file."""
        return read_metrics(self.folder / "metrics.jsonl")


def find_attention_files(folder: Path) -> dict[int, Path]:
    """The dumps of a run's steps; texts that `attend.py` was given have other names and are left out."""
    found = folder.glob("*.safetensors") if folder.is_dir() else ()
    return {int(path.stem): path for path in found if _is_step(path.stem)}


def _is_step(name: str) -> bool:
    return name.isascii() and name.isdecimal() and len(name) < 19


def run_of(path: Path) -> Path:
    """The run folder that `path` is, or that it belongs to: as its attention folder, or one of its checkpoints.

    Raises:
        UserError: if it is no folder (exit code 4).
    """
    if not path.is_dir():
        near = difflib.get_close_matches(path.name, [run.name for run in _runs_in(path.parent)], n=1)
        hint = f"did you mean {path.parent / near[0]}?" if near else "give a run folder such as runs/quickstart"
        raise UserError(f"{path} is no folder; {hint}", CHECKPOINT)
    whole = path.resolve()
    if not find_attention_files(path / DUMPS) and find_attention_files(whole.parent / DUMPS):
        return _short(whole.parent)  # a folder inside a run, such as its attention folder
    if (path / "manifest.json").is_file() or (path / "state.json").is_file():
        return _short(whole.parents[1])
    return path


def _short(path: Path) -> Path:
    """Relative to where the user stands, if it lies below."""
    here = Path.cwd()
    return path.relative_to(here) if path.is_relative_to(here) else path


def _runs_in(folder: Path) -> list[Path]:
    """The folders in `folder` that hold attention files."""
    try:
        return sorted(path for path in folder.iterdir() if find_attention_files(path / DUMPS))
    except OSError:
        return []


def _nothing_in(folder: Path) -> str:
    """What is said of a folder without dumps: whether it is a run, and which runs are near."""
    inside = _runs_in(folder)
    if inside:
        names = ", ".join(str(run) for run in inside[:5])
        return f"{folder} is no run but holds {len(inside)}: give one of them, such as {names}"
    if (folder / "config.toml").is_file():
        return (
            f"{folder} holds no attention files; a run writes one at each evaluation: train with "
            "python train.py, or look at one text with: python attend.py RUN --prompt TEXT"
        )
    near = _runs_in(folder.resolve().parent)
    hint = f"; near it lies the run {_short(near[0])}" if near else ""
    return f"{folder} holds no attention files; train with python train.py, which makes a run folder{hint}"


def read_table(path: Path) -> dict[str, Any]:
    """A JSON file that holds a table.

    Raises:
        UserError: if it cannot be read or is none (exit code 4).
    """
    try:
        if path.stat().st_size > LARGEST_JSON:
            raise ValueError("it is far too large")
        table = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(table, dict):
            raise ValueError("it is no table")
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}", CHECKPOINT) from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} cannot be read ({error}); delete it to go on without", CHECKPOINT) from error
    return table
