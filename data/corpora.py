"""Where text comes from: the embedded corpora, Tiny Shakespeare, a file, a folder, or a glob.

Where this stands: first in the flow. `open_corpus` turns `--data.source` into stretches of files, held out or
not, and reads no more of them than it must: `files.py` finds files, `named.py` has the corpora that go by a
name. `prepare.py` then streams the stretches with `jobs` and `read_documents` (`documents.py`).

    stories        generated stories whose entropy is known, written to the cache once
    repeats        random letters said twice, whose entropy is known too; `repeats.py` says what they are for
    shakespeare    Tiny Shakespeare, 1.1 MB, downloaded once
    book.txt       any one file of UTF-8 text
    texts/         the prose below a folder: .txt .text .md .markdown .rst .tex .org, nothing hidden
    'src/**/*.py'  whatever files a glob matches, whatever their names end in

A file or folder that is called like a named corpus is reached as `./stories`.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from common.errors import DATA, UserError, escape_control_chars
from data.documents import (
    DOCUMENT_SEPARATOR,
    Piece,
    Span,
    character_start,
    has_text,
    jobs,
    read_documents,
    sample,
    separators,
    split_span,
)
from data.named import GENERATED, generated_entropy, generated_files, shakespeare_file
from data.text_files import find_files, whole_file

__all__ = ["DOCUMENT_SEPARATOR", "Corpus", "Piece", "Span", "jobs", "open_corpus", "read_documents"]
__all__ += ["sample", "split_span"]

SHAKESPEARE_VAL_FRACTION = 0.1
"""The last tenth is held out, as in nanoGPT, so that losses can be compared."""

_STEP_BYTES = 1024 * 1024


@dataclass(frozen=True)
class Corpus:
    """Text to train on and text that is held out."""

    name: str
    train: tuple[Span, ...]
    val: tuple[Span, ...]
    nats_per_document: float | None
    """Entropy of a document, where it is known: no model can reach a lower mean loss per document."""


def open_corpus(source: str, val_fraction: float, cache: Path) -> Corpus:
    """Find the text of `--data.source` and hold out `val_fraction` (0 to 1) of its bytes.

    Several files: whole files are held out, drawn by a hash of their names, so that the choice depends on
    neither the file system nor the folder's place. One file with separator lines: its last documents. Else
    the end of the text. A named corpus has a split of its own. `cache` is the folder for what is generated
    or downloaded. Raises `UserError`: no text, or none that can be read (3); a cache that cannot be
    written (6).
    """
    if source in GENERATED:
        train, val = map(whole_file, generated_files(source, cache))
        return Corpus(source, (train,), (val,), generated_entropy(source))
    if source == "shakespeare":
        train, val = _split_file(whole_file(shakespeare_file(cache)), SHAKESPEARE_VAL_FRACTION)
        return Corpus(source, (train,), (val,), None)
    spans = [whole_file(path) for path in find_files(source)]
    if len(spans) == 1:
        train, val = _split_file(spans[0], val_fraction)
        return Corpus(source, (train,), (val,), None)
    held_out = _held_out(spans, val_fraction)
    rest = tuple(span for span in spans if span not in held_out)
    return Corpus(source, rest, tuple(span for span in spans if span in held_out), None)


def _held_out(spans: Sequence[Span], val_fraction: float) -> set[Span]:
    """Some of several files, never none and never all, with about `val_fraction` of the bytes."""
    common = os.path.commonpath([span.path.parent for span in spans])

    def draw(span: Span) -> bytes:
        name = Path(os.path.relpath(span.path, common)).as_posix()
        return hashlib.sha256(name.encode("utf-8", "surrogateescape")).digest()

    def size(span: Span) -> int:
        return span.end - span.start

    missing = val_fraction * sum(map(size, spans))
    drawn: list[Span] = []
    for span in sorted(spans, key=draw):
        # Taken when it brings the sum nearer to what is wanted, and another file is left to train on.
        if size(span) < 2 * missing and len(drawn) < len(spans) - 1:
            drawn.append(span)
            missing -= size(span)
    return set(drawn or [min(spans, key=size)])


def _split_file(span: Span, val_fraction: float) -> tuple[Span, Span]:
    """One file: its last documents are held out, or the end of its only document."""
    position = span.start + int((span.end - span.start) * (1 - val_fraction))
    if line := _separator_near(span, position):
        return replace(span, end=line[0]), replace(span, start=line[1])
    only = _only_document(span)
    cut = character_start(only.path, only.start + int((only.end - only.start) * (1 - val_fraction)))
    train, val = replace(only, end=cut), replace(only, start=cut)
    if not (has_text(train) and has_text(val)):
        problem = f"{escape_control_chars(span.path)} is too short to hold out a part of it: give it more text"
        raise UserError(problem, DATA)
    return train, val


def _separator_near(span: Span, position: int) -> tuple[int, int] | None:
    """Where the separator line nearest to a position begins and ends; one that has text on either side."""

    def divides(line: tuple[int, int]) -> bool:
        return has_text(replace(span, start=line[1])) and has_text(replace(span, end=line[0]))

    ahead = (
        line
        for low in range(position, span.end, _STEP_BYTES)
        for line in separators(span, low, min(span.end, low + _STEP_BYTES))
    )
    after = next(filter(divides, ahead), None)
    nearer = max(span.start, 2 * position - after[0]) if after else span.start
    behind = (
        line
        for high in range(position, nearer, -_STEP_BYTES)
        for line in reversed(separators(span, max(nearer, high - _STEP_BYTES), high))
    )
    return next(filter(divides, behind), after)


def _only_document(span: Span) -> Span:
    """The stretch with text of a file that has one such stretch between its separator lines."""
    lines = [
        line
        for low in range(span.start, span.end, _STEP_BYTES)
        for line in separators(span, low, min(span.end, low + _STEP_BYTES))
    ]
    starts, ends = [span.start, *(end for _, end in lines)], [*(start for start, _ in lines), span.end]
    for start, end in zip(starts, ends, strict=True):
        if has_text(stretch := replace(span, start=start, end=max(start, end))):
            return stretch
    problem = f"{escape_control_chars(span.path)} holds nothing but white space: there is no text to train on"
    raise UserError(problem, DATA)
