"""What is watched while a model learns, chosen once and kept for the whole run.

The same texts, repeats and questions at every step: so two of a run's dumps differ by the model alone. The set is
written into the run folder, where `attend.py` finds it again without the corpus.
"""

from __future__ import annotations

import dataclasses
import json
import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common.errors import CHECKPOINT, UserError
from common.files import write_atomic
from inspection.contrast_pairs import ContrastPair
from model.config import ModelConfig

FORMAT = "glassgpt-eval-texts-1"
Texts = Sequence[tuple[str, Sequence[int]]]

HELD_OUT = "held-out"
"""With this begin the names of texts that are held out; others are the user's own."""
LONGEST = 256
"""Tokens of a watched text, at most."""
DUMP_BYTES = 64_000_000
"""A dump's weights stay below this: texts are watched by their beginnings where a model has very many heads."""
SHOWN = 2
"""Held-out texts that dumps hold; the others only serve to measure."""
REPEATS, REPEATED = 8, 50
"""How many sequences of random tokens are said twice, and the tokens of each."""


def watched_length(config: ModelConfig, texts: int) -> int:
    """How many tokens of each of so many texts are watched.

    f16 weights of T tokens take L H T (T + 1) bytes.
    """
    room = DUMP_BYTES / (config.n_layers * config.n_heads * max(1, texts))
    return min(config.context, LONGEST, max(8, int(math.sqrt(room))))


def repeated(tokens: Sequence[int], first: int, length: int, seed: int) -> tuple[tuple[int, ...], ...]:
    """Sequences of random tokens, each said twice: `first, r1 .. rn, r1 .. rn`.

    Nothing but the first saying tells what comes next in the second, so they show induction by itself (Olsson et
    al. 2022, "Argument 4"). The tokens of a sequence are distinct where there are enough of them.

    Args:
        tokens: to draw from: those that the corpus uses; a model knows nothing about the others.
        first: the token that begins a text.
        length: of a whole sequence, at most.
    """
    pool = [token for token in tokens if token != first]
    n = min(REPEATED, (length - 1) // 2)
    if n < 2 or len(pool) < 2:
        return ()
    draw = random.Random(f"repeats {seed}")
    said = [draw.sample(pool, n) if len(pool) >= n else draw.choices(pool, k=n) for _ in range(REPEATS)]
    return tuple((first, *sequence, *sequence) for sequence in said)


@dataclass(frozen=True)
class EvalTexts:
    """Texts that are shown, random repeats and questions on which heads are measured."""

    texts: tuple[tuple[str, tuple[int, ...]], ...] = ()
    """(name, tokens) of held-out texts and the user's own lines."""
    repeats: tuple[tuple[int, ...], ...] = ()
    """See `repeated`; all of one length."""
    probes: tuple[ContrastPair, ...] = ()

    def shown(self) -> list[tuple[str, tuple[int, ...]]]:
        """What a dump holds besides the sample of the moment: the texts, one repeat, a question of each kind."""
        kinds: dict[str, ContrastPair] = {}
        for probe in self.probes:
            kinds.setdefault(probe.kind, probe)
        questions = [(f"{kind} 1", probe.tokens) for kind, probe in kinds.items()]
        held_out = [text for text in self.texts if text[0].startswith(HELD_OUT)][:SHOWN]
        own = [text for text in self.texts if not text[0].startswith(HELD_OUT)]
        return [*own, *held_out, *(("repeat 1", tokens) for tokens in self.repeats[:1]), *questions]

    def save(self, path: Path) -> None:
        """Write the set as JSON.

        Raises:
            UserError: if the file cannot be written (exit code 6).
        """
        write_atomic(path, [json.dumps({"format": FORMAT, **dataclasses.asdict(self)}).encode()])

    @staticmethod
    def load(path: Path, vocab_size: int, context: int) -> EvalTexts:
        """The set that `save` wrote. Every token is checked against the model that is to read it.

        Raises:
            UserError: if the file is missing or damaged (exit code 4).
        """
        try:
            table = json.loads(path.read_text(encoding="utf-8"))
            if not isinstance(table, dict) or table.get("format") != FORMAT:
                raise ValueError(f"it is no {FORMAT} file")
            texts = tuple((_name(name), _tokens(tokens, vocab_size, context)) for name, tokens in table["texts"])
            repeats = tuple(_tokens(tokens, vocab_size, context) for tokens in table["repeats"])
            if len({len(tokens) for tokens in repeats}) > 1:
                raise ValueError("its repeats differ in length")
            probes = tuple(_probe(entry, vocab_size, context) for entry in table["probes"])
        except OSError as error:
            raise UserError(f"cannot read {path}: {error.strerror}", CHECKPOINT) from error
        except (ValueError, TypeError, KeyError, RecursionError) as error:
            reason = f"it lacks {error}" if isinstance(error, KeyError) else str(error)
            raise UserError(f"{path} is no list of watched texts that can be read: {reason}", CHECKPOINT) from error
        return EvalTexts(texts, repeats, probes)


def _name(value: Any) -> str:
    if not isinstance(value, str):
        raise ValueError("a name is no text")
    return value


def _tokens(values: Any, below: int, most: int) -> tuple[int, ...]:
    """1 to `most` whole numbers from 0 to `below` - 1."""
    whole = isinstance(values, list) and all(type(value) is int and 0 <= value < below for value in values)
    if not whole or not 1 <= len(values) <= most:
        raise ValueError(f"it holds a list that is not 1 to {most} numbers below {below}")
    return tuple(values)


def _probe(entry: Any, vocab_size: int, context: int) -> ContrastPair:
    if not isinstance(entry, dict):
        raise ValueError("a probe is no table")
    tokens = _tokens(entry["tokens"], vocab_size, context)
    evidence, nearest = (
        _tokens(entry[key], len(tokens), len(tokens)) if entry[key] else () for key in ("evidence", "nearest")
    )
    right, wrong = (_tokens(entry[key], vocab_size, context) for key in ("right", "wrong"))
    return ContrastPair(_name(entry["kind"]), tokens, evidence, right, wrong, nearest)
