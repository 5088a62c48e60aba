"""From a checkpoint's model and a prompt to text: what `sample.py` prints and training writes at each evaluation."""

from __future__ import annotations

import codecs
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from common.errors import UserError, escape_control_chars
from data.tokenizer import Tokenizer
from model.generate import generate
from model.gpt import GPT
from training.graphs import recorder


@dataclass(frozen=True)
class Sampling:
    """How the next token is drawn."""

    temperature: float = 0.8
    top_k: int = 0
    top_p: float = 1.0


def first_tokens(tokenizer: Tokenizer, prompt: str, documents: bool) -> list[int]:
    """The tokens that the model reads before it writes.

    Where the corpus had documents each began with end-of-text, so a sample does too. In one long text that token was
    hardly ever seen, and a sample without a prompt starts on a new line, if the vocabulary has one.

    Raises:
        UserError: if the vocabulary lacks a character of the prompt (exit code 2).
    """
    if documents:
        return [tokenizer.end_of_text, *tokenizer.encode(prompt).tolist()]
    if prompt:
        return tokenizer.encode(prompt).tolist()
    knows_newline = any(tokenizer.token_bytes(token) == b"\n" for token in range(min(tokenizer.vocab_size, 512)))
    return tokenizer.encode("\n").tolist() if knows_newline else [tokenizer.end_of_text]


def write_text(
    model: GPT,
    tokenizer: Tokenizer,
    start: list[int],
    count: int,
    samples: int,
    seed: int,
    how: Sampling,
    drawn: list[list[int]] | None = None,
) -> Iterator[list[str]]:
    """Yield, token by token, what each of `samples` texts grows by ('' once its text has ended).

    A character that is spread over several tokens appears with the last of them. The tokens themselves are appended to
    `drawn`.
    """
    device = model.token_embedding.weight.device
    generator = torch.Generator(device).manual_seed(seed)
    prompt = torch.tensor(start, device=device).expand(samples, -1)
    decoders = [codecs.getincrementaldecoder("utf-8")("replace") for _ in range(samples)]
    ended = [False] * samples
    drawing = (how.temperature, how.top_k, how.top_p)
    for tokens in generate(model, prompt, count, generator, *drawing, record=recorder(model)):
        pieces = []
        if drawn is not None:
            drawn.append(tokens.tolist())
        for i, token in enumerate(tokens.tolist()):
            ended[i] = ended[i] or token == tokenizer.end_of_text
            pieces.append("" if ended[i] else decoders[i].decode(tokenizer.token_bytes(token)))
        yield pieces
        if all(ended):
            return
    yield [decoder.decode(b"", final=True) for decoder in decoders]


def sample_tokens(model: GPT, tokenizer: Tokenizer, start: list[int], count: int, seed: int) -> list[int]:
    """The tokens of one text, `start` included, up to the end-of-text that closes it."""
    device = model.token_embedding.weight.device
    generator = torch.Generator(device).manual_seed(seed)
    tokens = list(start)
    for (token,) in generate(model, torch.tensor([start], device=device), count, generator, Sampling().temperature):
        tokens.append(int(token))
        if tokens[-1] == tokenizer.end_of_text:
            break
    return tokens


def decoded(tokenizer: Tokenizer, tokens: list[int]) -> str:
    """The text that tokens spell; the end-of-text that closes one has no letters."""
    return b"".join(tokenizer.token_bytes(token) for token in tokens).decode("utf-8", "replace")


def check_prompt(prompt: str) -> None:
    """Raise `UserError` (exit code 2) for a prompt that is no text, as the shell passes bytes that are not UTF-8."""
    try:
        prompt.encode("utf-8")
    except UnicodeEncodeError as error:
        raise UserError(f"the prompt is no UTF-8 text: its character {error.start} is a stray byte") from error


def shown(text: str) -> str:
    """Text as it may reach a terminal: whatever could steer it is escaped, line breaks and tabs stay."""
    return "".join(c if c in "\n\t" else escape_control_chars(c) for c in text)
