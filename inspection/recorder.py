"""What is watched while a model learns: the same texts at every evaluation, and, at the end, what its heads do.

`write` makes a dump of the moment. `report` takes every head away once, weighs what may be said of it, and puts it all
before the reader: words, pictures, and a page.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from common.errors import UserError, escape_control_chars
from common.files import remove_temporary_files
from inspection import findings as claims
from inspection import record
from inspection.ablation import GroupEffect, effects, group_effect
from inspection.ablation_results import AblationResults
from inspection.activation_cache import run_with_cache_batch
from inspection.antecedent_score import AntecedentScore, relations, sentence
from inspection.attention_file import read_attention_file
from inspection.eval_texts import EvalTexts
from inspection.page_builder import PageRun, write_page
from inspection.plots import draw_figures
from inspection.run_reader import RunFiles, find_attention_files
from inspection.scores import head_scores
from inspection.terminal import DISCLAIMER
from model.gpt import GPT

QUESTIONS = 128
"""Of each kind, asked without each head: with 32 the intervals hid what a head does beyond the others of its layer."""
Texts = Sequence[tuple[str, Sequence[int]]]


@dataclass(frozen=True)
class Report:
    """What is told at the end of a run."""

    lines: list[str]
    """What may be said of one head, then what each family of questions showed."""
    pictures: list[Path]
    page: Path | None
    """None where there was no text to show."""


class AttentionRecorder:
    """Writes a dump of fixed texts whenever it is asked, and says what the heads do.

    Args:
        model: is read at each call, in whatever state it then is.
        watched: what is looked at; kept beside the dumps.
        token_bytes: the bytes of a token.
        run: the run's folder; dumps go into its folder `attention`, as `000400.safetensors`.
    """

    def __init__(self, model: GPT, watched: EvalTexts, token_bytes: Callable[[int], bytes], run: Path) -> None:
        self.model, self.watched, self.token_bytes, self.run = model, watched, token_bytes, run
        self.folder = run / "attention"

    def begin(self, step: int) -> None:
        """Start, or go on from `step`: what was watched before is watched again, and later dumps are written anew.

        What is damaged, or was left half-written, stops no training: it is named and put aside.
        """
        file = self.folder / "eval_texts.json"
        for folder in (self.folder, self.run):
            remove_temporary_files(folder)
        if step and file.is_file():
            try:
                self.watched = EvalTexts.load(file, self.model.vocab_size, self.model.config.context)
            except UserError as damage:
                print(f"{escape_control_chars(damage)}; other texts are watched from here on", file=sys.stderr)
        self.watched.save(file)
        for at, path in find_attention_files(self.folder).items():
            if at > step:
                path.unlink()
                continue
            try:
                read_attention_file(path)
            except UserError as damage:
                print(f"{escape_control_chars(damage)}; that step is left out", file=sys.stderr)
                path.replace(path.with_suffix(".damaged"))

    def has(self, step: int) -> bool:
        """Whether the step has its dump."""
        return self.dump(step).is_file()

    def dump(self, step: int) -> Path:
        """Where the dump of a step lies."""
        return self.folder / f"{step:06d}.safetensors"

    def write(self, step: int, metadata: Mapping[str, str], sample: Sequence[int] = ()) -> Path:
        """Write the dump of a step, with what the model has just written, if anything; its path."""
        path = self.dump(step)
        own = [("sample", list(sample)[-self.model.config.context :])] if sample else []
        scores = {name: table.numpy() for name, table in head_scores(self.model, self.watched).items()}
        write_dump(path, self.model, self.watched.shown(), self.token_bytes, metadata, detailed=own, scores=scores)
        return path

    def report(self, step: int, weights_sha256: str) -> Report:
        """What the heads do, in words, pictures and a page, all in the run's folder."""
        found = relations(self.model, self.watched.probes)
        evidence = self.without_each_head(step, weights_sha256)
        seen = RunFiles.open(self.run)
        told = self.weigh(seen, evidence, found)
        if not seen.attention_files[step].texts:  # a context of one token, and no sample
            return Report([claims.sentence(told), DISCLAIMER], [], None)
        pictures = draw_figures(seen, self.run, "png", step)
        page = self.run / "attention.html"
        whole = PageRun(self.run.name, list(seen.attention_files.values()))
        write_page(page, [whole], seen.findings, seen.ablation, self.run.name)
        lines = [claims.sentence(told)]
        if found:
            lines += ["", "what decides, and which head reads it", *("  " + line for line in sentence(found))]
        return Report([*lines, DISCLAIMER], pictures, page)

    def without_each_head(self, step: int, weights_sha256: str) -> AblationResults:
        """What changes when each head is taken away, kept in `ablations.json`."""
        with tqdm(unit="pass", desc="taking heads away", delay=3, leave=False, disable=None) as bar:

            def progress(done: int, whole: int) -> None:
                bar.total = whole
                bar.update(done - bar.n)

            evidence = effects(self.model, self.watched, QUESTIONS, 1, step, weights_sha256, progress)
        evidence.save(self.folder / "ablations.json")
        return evidence

    def weigh(
        self, seen: RunFiles, evidence: AblationResults, found: Sequence[AntecedentScore]
    ) -> list[claims.Finding]:
        """What may be said of the heads, kept in `findings.json`."""
        over_time = {step: seen.attention_files[step].scores for step in seen.steps if step <= evidence.step}
        readings = {
            f"antecedent.{one.kind}": (one.head, one.weight, max(one.offset_weight, one.nearest_weight or 0.0))
            for one in found
        }

        def together(measure: str, heads: Sequence[claims.Head]) -> GroupEffect:
            return group_effect(self.model, self.watched, heads, measure, per_kind=QUESTIONS)

        told = claims.claims(over_time, evidence, readings, together)
        claims.save(self.folder / "findings.json", told)
        return told


def write_dump(
    path: Path,
    model: GPT,
    texts: Texts,
    token_bytes: Callable[[int], bytes],
    metadata: Mapping[str, str],
    dtype: str = "f16",
    detailed: Texts = (),
    scores: Mapping[str, NDArray[np.float32]] | None = None,
) -> None:
    """ActivationCache texts and write them as one attention file, with the versions of what computed them.

    Args:
        detailed: texts, written before the others, with queries, keys, values and the likeliest next tokens.

    Raises:
        UserError: if the file cannot be written (exit code 6).
    """
    seen = run_with_cache_batch(model, [tokens for _, tokens in detailed], details=True) if detailed else []
    seen += run_with_cache_batch(model, [tokens for _, tokens in texts]) if texts else []
    rows = [
        (name, one, [token_bytes(token) for token in tokens])
        for (name, tokens), one in zip([*detailed, *texts], seen, strict=True)
    ]
    about = {**metadata, "versions": record.package_versions()}
    record.write_attention_file(path, rows, about, dtype, scores, token_bytes, details="f32")
