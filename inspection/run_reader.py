"""Reads what a run folder holds about attention. The commands of `attend.py`, the page and the plots all use it.

    metrics.jsonl                  head scores at each evaluation
    attention/000400.safetensors   an attention file (`attention_file.py`) of some evaluations
    attention/eval_texts.json      the texts that all of them show (`eval_texts.py`)
    attention/ablations.json       effects of ablating each head (`ablation_results.py`)
    attention/findings.json        what the scores and effects show of each head (`findings.py`)

Needs NumPy only, apart from `RunFiles.eval_texts`.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from common.errors import CHECKPOINT, CONFIG, RemovedError, UserError, quote_arg, warn
from common.files import read_json, read_metrics, reading
from inspection.ablation_results import AblationResults
from inspection.attention_file import AttentionFile, AttentionRecord, read_attention_file
from inspection.findings import Head
from inspection.head_scores import SCORES

if TYPE_CHECKING:
    from inspection.eval_texts import EvalTexts

FOLDER = "attention"
Named = dict[str, tuple[Head, float]]  # a head by score, and its value
DEFAULT = -1  # as a step: the one of `RunFiles.reported_step`


@dataclass(frozen=True)
class RunFiles:
    """The files of one run."""

    folder: Path  # the file itself where the attention file of a prompt was opened
    paths: dict[int, Path]  # attention files by step
    opened_step: int = DEFAULT  # the step that the opened path names, if it is a checkpoint or an attention file

    @staticmethod
    def open(path: Path | str) -> RunFiles:
        """Open a run folder, or the run of a checkpoint or an attention file. `UserError` if it has no attention files (exit
        code 4)."""
        folder, opened = Path(path), DEFAULT
        if folder.parent.name in (FOLDER, "checkpoints") and _is_step(folder.stem) and os.path.exists(folder):
            folder, opened = folder.parents[1], int(folder.stem)
        elif os.path.isfile(folder):  # not Path.is_file, which raises for a folder that may not be read
            step = read_attention_file(folder).metadata.get("step", "")
            opened = int(step) if _is_step(step) else 0
            return RunFiles(folder, {opened: folder}, opened)
        paths = find_attention_files(folder / FOLDER)
        if not paths:
            raise UserError(_not_a_run(folder), CHECKPOINT)
        return RunFiles(folder, paths, opened)

    @property
    def base_folder(self) -> Path:
        """Where files about the run are written."""
        return self.folder if self.folder.is_dir() else self.folder.parent

    @property
    def steps(self) -> list[int]:
        """The steps that have an attention file, in order."""
        return list(self.paths)

    @property
    def reported_step(self) -> int:
        """The step whose heads were ablated, which is the best one at the end of training; else the newest."""
        results = self.ablation
        return results.step if results and results.step in self.paths else self.steps[-1]

    def history(self, step: int) -> tuple[list[AttentionFile], list[dict[str, Any]]]:
        """Attention files and evaluations up to a step, without earlier files that are damaged or removed."""
        files = [file for each in self.steps if each < step and (file := self.read_intact(each))]
        return [*files, self.read(step)], [line for line in self.evaluations() if line["step"] <= step]

    def step(self, step: int = DEFAULT) -> int:
        """`step`, or the one that was opened, or `reported_step`; raises `UserError` without a file of it (exit code 2)."""
        step = self.opened_step if step == DEFAULT else step
        if step == DEFAULT:
            return self.reported_step
        if step in self.paths:
            return step
        nearest = sorted(sorted(self.steps, key=lambda other: abs(other - step))[:3])
        steps = ", ".join(map(str, nearest))
        raise UserError(f"{self.folder} has no attention file of step {step}; the nearest are {steps}", CONFIG)

    def read(self, step: int) -> AttentionFile:
        """The attention file of a step, its scores in order of definition."""
        file = read_attention_file(self.paths[step])
        order = [*(name for name in SCORES if name in file.scores), *file.scores]
        return replace(file, scores={name: file.scores[name] for name in order})

    def read_intact(self, step: int) -> AttentionFile | None:
        """The attention file of a step; None, and the step is left out from here on, if it is damaged (a line) or removed."""
        try:
            return self.read(step)
        except UserError as error:
            del self.paths[step]
            if not isinstance(error, RemovedError):
                warn(f"skipping a damaged attention file: {error}")
            return None

    @cached_property
    def head_scores(self) -> tuple[list[int], dict[str, NDArray[np.float32]]]:
        """Steps (S,), and the scores (S, L, H) by name, nan at a step without the score.

        They are those of metrics.jsonl, and of attention files for other steps, such as 0. `UserError` if they are
        of models of different shape (exit code 4).
        """
        tables = {line["step"]: line["head_scores"] for line in self.evaluations()}
        tables |= {s: file.scores for s in self.steps if s not in tables and (file := self.read_intact(s))}
        arrays = {step: {k: np.asarray(v, np.float32) for k, v in t.items()} for step, t in sorted(tables.items())}
        shapes = {array.shape for scores in arrays.values() for array in scores.values()}
        if len(shapes) > 1:
            raise UserError(f"the head scores of {self.folder} are of models of different shape", CHECKPOINT)
        missing = np.full(next(iter(shapes), (0, 0)), np.nan, dtype=np.float32)
        names = dict.fromkeys(name for scores in reversed(arrays.values()) for name in scores)
        series = {name: np.stack([scores.get(name, missing) for scores in arrays.values()]) for name in names}
        return list(arrays), series

    @property
    def ablation(self) -> AblationResults | None:
        """The effects of ablating heads; None where they were not measured."""
        path = self.folder / FOLDER / "ablations.json"
        return AblationResults.load(path) if path.is_file() else None

    @property
    def findings(self) -> dict[str, Any] | None:
        """The contents of findings.json: `headline`, `findings`, `antecedents`; None without the file."""
        path = self.folder / FOLDER / "findings.json"
        if not path.is_file():
            return None
        with reading(path, "file of findings", "delete it to continue without it"):
            findings: dict[str, Any] = read_json(path)
            if not isinstance(findings["headline"], str) or not isinstance(findings["findings"], list):
                raise ValueError("no headline or no list of findings")
            named = findings.get("antecedents", {}).items()
            findings["antecedents"] = {name: (tuple(map(int, one["head"])), float(one["value"])) for name, one in named}
        return findings

    def named_heads(self, step: int, scores: Mapping[str, NDArray[np.float32]]) -> Named:
        """For each score (L, H) of a step its best head and value; for antecedent scores what the report on it names."""
        named = {name: (head, float(each[head])) for name, each in scores.items() if (head := best_head(name, each))}
        reported = (self.findings or {}) if step == self.reported_step else {}
        return named | {name: found for name, found in reported.get("antecedents", {}).items() if name in named}

    def eval_texts(self, vocab_size: int, context: int) -> EvalTexts | None:
        """The texts on which heads are scored and ablated; None where they were not kept. Loads torch."""
        from inspection.eval_texts import EvalTexts

        path = self.folder / FOLDER / "eval_texts.json"
        return EvalTexts.load(path, vocab_size, context) if path.is_file() else None

    def evaluations(self) -> list[dict[str, Any]]:
        """The lines of metrics.jsonl that have head scores, without those that are malformed."""
        return [line for line in read_metrics(self.folder / "metrics.jsonl") if _has_scores(line)]


def find_attention_files(folder: Path) -> dict[int, Path]:
    """The attention files of a run's steps, in order. Files of prompts, which `attend.py` writes, have other names."""
    paths = folder.glob("*.safetensors") if os.path.isdir(folder) else ()
    return dict(sorted((int(path.stem), path) for path in paths if _is_step(path.stem)))


def _has_scores(line: Mapping[str, Any]) -> bool:
    try:
        tables = [np.asarray(table) for table in line["head_scores"].values()]
    except (KeyError, AttributeError, ValueError):
        return False
    return all(table.ndim == 2 and table.dtype.kind in "fi" for table in tables)


def _is_step(name: str) -> bool:
    return name.isascii() and name.isdecimal() and len(name) < 19


def _not_a_run(path: Path) -> str:
    if not os.path.isdir(path):
        return f"{path} is not a folder; give a run folder such as runs/quickstart"
    if inside := sorted(path.glob(f"*/{FOLDER}")):
        return f"{path} is not a run but contains {len(inside)}; give one of them, such as {inside[0].parent}"
    if (path / "config.toml").is_file():
        hint = f"look at a prompt with: python attend.py {quote_arg(path)} --prompt TEXT"
        return f"{path} has no attention files (it was trained with --log.attention off); {hint}"
    if (path / "config.json").is_file():
        command = f"python attend.py ablate {quote_arg(path)}"
        return f"{path} is a Hugging Face folder without recorded attention; record it with: {command}"
    return f"{path} is not a run folder; python train.py makes a run folder"


# Choosing by name


def match_name(name: str, names: Iterable[str], what: str, where: str) -> str:
    """`name` if it is among `names`; else `UserError` with all of them (exit code 2)."""
    known = list(names)
    if name in known:
        return name
    options = f"it has {', '.join(known)}" if known else f"it has no {what}"
    raise UserError(f"{where} has no {what} {name!r}; {options}", CONFIG)


def find_text(file: AttentionFile, name: str, where: str) -> AttentionRecord:
    """The text of that name; without a name the model's sample, else the first text. `UserError` if there is none."""
    if not file.texts:
        raise UserError(f"{where} has no texts", CHECKPOINT)
    texts = {text.name: text for text in reversed(file.texts)}
    if not name:
        return texts.get("sample", file.texts[0])
    return texts[match_name(name, (text.name for text in file.texts), "text", where)]


def best_head(score: str, values: NDArray[np.float32]) -> Head | None:
    """(layer, head) with the highest of the values (L, H), for `entropy` the lowest; None if all are nan."""
    if not np.isfinite(values).any():
        return None
    index = np.nanargmin(values) if score == "entropy" else np.nanargmax(values)
    layer, head = divmod(int(index), values.shape[1])
    return layer, head
