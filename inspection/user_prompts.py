"""The user's own lines to watch while a model learns: texts, and questions with a right and a wrong answer.

A file in UTF-8, a line for each. `text` alone is shown at every step. A line of three or four columns, separated by
tabs, is a question as well:

    prompt <TAB> right continuation <TAB> wrong continuation [<TAB> the word that decides]

The prompt breaks off where the answer is due; spaces belong to the continuations, as ` he`. Without a fourth column,
every earlier mention of the right continuation decides.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from pathlib import Path

from common.errors import CONFIG, UserError, escape_control_chars
from inspection.contrast_pairs import ContrastPair, Span, locate

MOST_TEXTS = 8
Encode = Callable[[str], Sequence[int]]


def user_prompts(
    path: Path, encode: Encode, token_bytes: Callable[[int], bytes], end_of_text: int, context: int
) -> tuple[list[tuple[str, tuple[int, ...]]], list[ContrastPair]]:
    """The texts, at most `MOST_TEXTS` of them, and the questions of a file.

    Args:
        encode: a text's tokens; raises `UserError` where the vocabulary lacks a character.
        context: tokens that the model reads at most; longer texts are cut, longer questions refused.

    Raises:
        UserError: naming the line that can't be used (exit code 2).
    """
    try:
        rows = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is no UTF-8 text"
        raise UserError(f"cannot read the lines to watch in {escape_control_chars(path)}: {reason}", CONFIG) from error
    texts: list[tuple[str, tuple[int, ...]]] = []
    probes: list[ContrastPair] = []
    for number, row in enumerate(rows, 1):
        if not row.strip():
            continue
        columns = row.split("\t")
        where = f"{escape_control_chars(path)}, line {number}"
        try:
            if len(columns) == 1:
                texts.append((f"line {number}", (end_of_text, *encode(row))[:context]))
            else:
                probes.append(_question(columns, encode, token_bytes, end_of_text))
        except ValueError as error:
            raise UserError(f"{where}: {error}", CONFIG) from error
        if probes and probes[-1].length > context:
            raise UserError(f"{where}: {probes[-1].length} tokens, more than the context of {context}", CONFIG)
    if len(texts) > MOST_TEXTS:
        raise UserError(
            f"{escape_control_chars(path)} has {len(texts)} texts; at most {MOST_TEXTS} can be watched", CONFIG
        )
    if not texts and not probes:
        raise UserError(f"{escape_control_chars(path)} has no lines to watch", CONFIG)
    return texts, probes


def _question(
    columns: list[str], encode: Encode, token_bytes: Callable[[int], bytes], end_of_text: int
) -> ContrastPair:
    if len(columns) not in (3, 4):
        raise ValueError(f"{len(columns)} columns; write a text, or prompt, right, wrong and perhaps what decides")
    prompt, right, wrong, *decider = columns
    word = decider[0] if decider else right.strip()
    spans: list[Span] = [match.span() for match in re.finditer(re.escape(word), prompt)] if word else []
    if not right or not spans:
        raise ValueError(f"{word!r} does not stand in the prompt; name the word that decides in a fourth column")
    text = prompt + right
    answer = (len(prompt), len(text))
    return locate("own", text, answer, spans, wrong, encode, token_bytes, end_of_text)
