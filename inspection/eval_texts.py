"""The texts on which attention is recorded and measured, chosen once and kept for the whole run.

They are the same at every evaluation, so that two attention files of a run differ by the model alone. The run folder
keeps them, so that `attend.py` needs no corpus.
"""

from __future__ import annotations

import dataclasses
import json
import math
import random
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from common.errors import CONFIG, UserError
from common.files import read_json, reading, write_atomic
from data.tokenizer import Tokenizer
from inspection.contrast_pairs import ContrastPair, make_contrast_pair
from model.config import ModelConfig

FORMAT = "glassgpt-eval-texts-1"
NamedText = tuple[str, tuple[int, ...]]  # (name, tokens)
LETTER = r"[^\W\u0e00-\u0eff\u3040-\u30ff\u3400-\u9fff]"  # of a script with spaces: not Thai, Lao, Japanese, Chinese
OWN = "own"  # the kind of the user's contrast pairs
HELD_OUT = "held-out"  # prefix of the names of held-out texts; the others are the user's
MIN_HELD_OUT = 128  # a short split is cut into more texts, of at least so many tokens
HELD_OUT_TEXTS = 32, 64  # at most: of MIN_HELD_OUT tokens or more, and shorter ones
HELD_OUT_TOKENS = 4096  # at most, which bounds the time of ablation: 64 texts of 64 tokens, 32 of 128 or 16 of 256
SCORED_HELD_OUT = 12  # of these for head scores at each evaluation; heads are ablated on all
RECORDED_HELD_OUT = 2  # of these in an attention file
MAX_USER_TEXTS = 8
N_REPEATS, REPEAT_LENGTH = 8, 50  # repeated sequences, and tokens of each copy
LARGE, LARGE_REPEATS, LARGE_LENGTH = 30_000_000, 2, 41  # parameters of pretrained blocks; sequences and tokens for more
MAX_TOKENS = 256  # of a recorded text
MAX_FILE_BYTES = 64_000_000  # of the patterns in an attention file: models with very many heads get shorter texts


def max_text_length(config: ModelConfig, n_texts: int) -> int:
    """The number of tokens of each of so many texts, so that an attention file stays below `MAX_FILE_BYTES`."""
    budget = MAX_FILE_BYTES / (config.n_layers * config.n_heads * max(1, n_texts))  # T (T + 1) bytes in f16
    return min(config.context, MAX_TOKENS, max(8, int(math.sqrt(budget))))


def held_out_texts(tokens: np.ndarray, document_starts: np.ndarray, length: int) -> list[NamedText]:
    """Evenly spaced parts of the validation tokens, at most `length` of each and about `HELD_OUT_TOKENS` in all. Each begins
    with a document where one is near, and ends with it unless that is short."""
    length = min(length, max(MIN_HELD_OUT, len(tokens) // HELD_OUT_TEXTS[0]))
    bounds, texts, end = np.append(document_starts, len(tokens)), [], 0
    n_texts = HELD_OUT_TEXTS[length < MIN_HELD_OUT]
    for part in range(0, len(tokens), max(length, math.ceil(len(tokens) / n_texts))):
        first = max(part, end)
        near = int(bounds[np.searchsorted(bounds, first)])
        start = near if near < first + length else first
        end = min(start + length, int(bounds[np.searchsorted(bounds[:-1], start + 1 + length // 4)]))
        if end - start > 1:
            texts.append(tuple(tokens[start:end].tolist()))
    n = min(len(texts), HELD_OUT_TOKENS * len(texts) // max(1, sum(map(len, texts))))
    return [(f"{HELD_OUT} {k + 1}", texts[k * len(texts) // n]) for k in range(n)]


def repeated_sequences(tokens: Sequence[int], first: int, length: int, seed: int) -> tuple[tuple[int, ...], ...]:
    """Sequences of random tokens, repeated once: `first, r1 .. rn, r1 .. rn`.

    The second copy can be predicted from the first one only, so they measure induction alone (Olsson et al. 2022,
    "Argument 4"). They are drawn from `tokens`, those of the corpus, as a model knows nothing about others, and are
    distinct where there are enough of them. A sequence has at most `length` tokens.
    """
    pool = [token for token in tokens if token != first]
    n = min(REPEAT_LENGTH, (length - 1) // 2)
    if n < 2 or len(pool) < 2:
        return ()
    rng = random.Random(f"repeats {seed}")
    copies = [rng.sample(pool, n) if len(pool) >= n else rng.choices(pool, k=n) for _ in range(N_REPEATS)]
    return tuple((first, *copy, *copy) for copy in copies)


@dataclass(frozen=True)
class EvalTexts:
    """Texts whose attention is recorded, repeated sequences, and contrast pairs."""

    texts: tuple[NamedText, ...] = ()  # held-out texts and the user's
    repeats: tuple[tuple[int, ...], ...] = ()  # see `repeated_sequences`; all of one length
    contrast_pairs: tuple[ContrastPair, ...] = ()

    def held_out(self) -> list[NamedText]:
        return [text for text in self.texts if text[0].startswith(HELD_OUT)]

    def prompts(self) -> list[NamedText]:
        """The user's texts."""
        return [text for text in self.texts if not text[0].startswith(HELD_OUT)]

    def scored_texts(self) -> list[tuple[int, ...]]:
        """The texts on which heads are scored: the user's, and `SCORED_HELD_OUT` evenly spaced held-out ones."""
        held_out = self.held_out()
        n = min(SCORED_HELD_OUT, len(held_out))
        return [tokens for _, tokens in (*self.prompts(), *(held_out[k * len(held_out) // n] for k in range(n)))]

    def pairs_by_kind(self) -> dict[str, list[ContrastPair]]:
        kinds: dict[str, list[ContrastPair]] = {}
        for pair in self.contrast_pairs:
            kinds.setdefault(pair.kind, []).append(pair)
        return kinds

    def recorded_texts(self) -> list[NamedText]:
        """What an attention file holds: the user's texts, some held-out ones, one repeat, one prompt of each kind."""
        others = [("repeat 1", tokens) for tokens in self.repeats[:1]]
        others += [(f"{kind} 1", pairs[0].tokens) for kind, pairs in self.pairs_by_kind().items()]
        return [*self.prompts(), *self.held_out()[:RECORDED_HELD_OUT], *others]

    def save(self, path: Path) -> None:
        """Write the texts as JSON, atomically; raises UserError (exit code 6) if that fails."""
        write_atomic(path, [json.dumps({"format": FORMAT, **dataclasses.asdict(self)}).encode()])

    @staticmethod
    def load(path: Path, vocab_size: int, context: int) -> EvalTexts:
        """Read the texts that `save` wrote. Raises UserError (exit code 4) if they are missing, damaged or of another model."""
        with reading(path, "file of evaluation texts"):
            data = read_json(path)
            if data["format"] != FORMAT:
                raise ValueError(f"its format is not {FORMAT}")
            texts = tuple((str(name), tuple(map(int, tokens))) for name, tokens in data["texts"])
            repeats = tuple(tuple(map(int, tokens)) for tokens in data["repeats"])
            parts = ("tokens", "antecedent", "right", "wrong", "nearest_noun")
            pairs = tuple(
                ContrastPair(entry["kind"], *(tuple(entry[part]) for part in parts)) for entry in data["contrast_pairs"]
            )
            for tokens in (*(tokens for _, tokens in texts), *repeats, *(pair.tokens for pair in pairs)):
                if not 1 <= len(tokens) <= context or not all(0 <= token < vocab_size for token in tokens):
                    raise ValueError("it has a text that does not fit the model")
        return EvalTexts(texts, repeats, pairs)


def pretrained_texts(tokenizer: Tokenizer, config: ModelConfig, prompts: str = "") -> EvalTexts:
    """Texts for a model whose training text is not at hand: repeated random tokens, and a user's prompts.

    A model of more than `LARGE` parameters in its blocks gets few and short ones, so that ablation takes minutes. Raises
    UserError as `read_user_prompts` does.
    """
    own: tuple[list[NamedText], list[ContrastPair]] = ([], [])
    if prompts:
        own = read_user_prompts(Path(prompts), tokenizer, config.context, has_backslashes=False)
    words = [token for token in range(tokenizer.vocab_size) if tokenizer.token_bytes(token).strip()]
    is_large = 12 * config.n_layers * config.d_model**2 > LARGE
    first = [*tokenizer.prompt_prefix, tokenizer.end_of_text][0]
    length = min(max_text_length(config, len(own[0]) + 2), LARGE_LENGTH if is_large else MAX_TOKENS)
    repeats = repeated_sequences(words, first, length, seed=1)[: LARGE_REPEATS if is_large else N_REPEATS]
    return EvalTexts(tuple((name, tokens[:length]) for name, tokens in own[0]), repeats, tuple(own[1]))


def read_user_prompts(
    path: Path, tokenizer: Tokenizer, context: int, has_backslashes: bool
) -> tuple[list[NamedText], list[ContrastPair]]:
    """The texts, at most `MAX_USER_TEXTS`, and the contrast pairs of a user's UTF-8 file; longer texts are cut.

    A line is a text, or a contrast pair of three or four tab-separated columns:

        prompt <TAB> right answer <TAB> wrong answer [<TAB> antecedent]

    A line begins a document, with or without `<|endoftext|>`; spaces at the end of a text are left out, as by `sample.py`.
    `\\n` in it is a line break unless the training text `has_backslashes`.
    The prompt ends where the answer is due; spaces belong to the answers, as in ` he`. Without a fourth column, every
    earlier mention of the right answer is the antecedent; without any, only the answers are scored.

    Raises UserError (exit code 2) naming the line that can't be used.
    """
    try:
        rows = [row.removeprefix("<|endoftext|>") for row in path.read_text(encoding="utf-8-sig").splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8"
        raise UserError(f"cannot read prompts from {path}: {reason}", CONFIG) from error
    texts: list[NamedText] = []
    pairs: list[ContrastPair] = []
    for number, row in enumerate(rows, 1):
        row = row if has_backslashes else row.replace("\\n", "\n")
        try:
            if "\t" in row:
                pairs.append(_user_pair(row.split("\t"), tokenizer, context))
            elif row.strip():
                tokens = tokenizer.encode(row.rstrip(" ")).tolist()
                texts.append((f"line {number}", (tokenizer.end_of_text, *tokens)[:context]))
        except (ValueError, UserError) as error:
            raise UserError(f"{path}, line {number}: {error}", CONFIG) from error
    if len(texts) > MAX_USER_TEXTS:
        raise UserError(f"{path} has {len(texts)} texts; at most {MAX_USER_TEXTS} can be recorded", CONFIG)
    if not texts and not pairs:
        raise UserError(f"{path} has no prompts", CONFIG)
    return texts, pairs


def _user_pair(columns: list[str], tokenizer: Tokenizer, context: int) -> ContrastPair:
    """The contrast pair in the columns of a line; raises ValueError."""
    if len(columns) not in (3, 4):
        raise ValueError(f"{len(columns)} columns; write a text, or prompt, right answer, wrong answer[, antecedent]")
    prompt, right, wrong, *word = columns
    antecedent = word[0] if word else right.strip()
    part = re.escape(antecedent)
    if not word:  # the answer is a word of the prompt, not a part of one
        part = f"(?:(?<!{LETTER})|(?!{LETTER})){part}(?:(?!{LETTER})|(?<!{LETTER}))"
    spans = [match.span() for match in re.finditer(part, prompt)] if antecedent else []
    if not right or (word and not spans):
        raise ValueError(f"{antecedent!r} is not in the prompt" if right else "the right answer is empty")
    pair = make_contrast_pair(tokenizer, OWN, prompt + right, (len(prompt), len(prompt + right)), spans, wrong)
    if pair.length > context:
        raise ValueError(f"{pair.length} tokens, more than the context of {context}")
    return pair
