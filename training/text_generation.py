"""From a prompt to text: the generation that `sample.py`, `attend.py` and the samples during training share."""

import codecs
import re
from collections.abc import Callable, Sequence

import torch

from common.errors import DISK_OR_MEMORY, UserError, escape_control_chars, warn
from data.text_files import SEPARATOR
from data.tokenizer import Tokenizer
from model.generate import SamplingParams, generate
from model.gpt import GPT
from training.checkpoint import RunEnvironment

MAX_NEW_TOKENS = 100_000_000  # of all texts; their number takes memory, and more would take days
DEFAULT_PARAMS = SamplingParams(temperature=0.8)


def read_prompt(
    tokenizer: Tokenizer, prompt: str, trained: RunEnvironment, is_typed: bool = True
) -> tuple[str, list[int]]:
    r"""The text that a prompt means, and the tokens that generation starts from; stderr says what differs.

    `<|endoftext|>` at the beginning is the start of a document. Typed `\n` and `\t` are a line break and a tab unless the
    training text has backslashes. Spaces at the end, which belong to the next word's token, are dropped unless it has
    them alone. Tokens that it never had are named. Raises `UserError` as `encode_prompt` does.
    """
    text = prompt.removeprefix(SEPARATOR).replace("\r\n", "\n").replace("\r", "\n")  # as the training text was read
    seen = {tokenizer.end_of_text, *filter(trained.has_token, range(tokenizer.vocab_size))}
    if is_typed and re.search(r"\\[nt]", text) and not any(b"\\" in tokenizer.token_bytes(token) for token in seen):
        text = text.replace("\\n", "\n").replace("\\t", "\t")
        warn(r"note: \n and \t in the prompt are read as a line break and a tab")
    if text.endswith(" ") and int(tokenizer.encode(text)[-1]) not in seen:
        text = text.rstrip(" ")
        warn("note: spaces at the end of the prompt are dropped; they belong to the next word's token")
    is_unknown = not trained.corpus  # of a pretrained model
    tokens = encode_prompt(tokenizer, text, trained.starts_with_eot or (is_unknown and not text))
    if unseen := [token for token in dict.fromkeys(tokens) if token not in seen]:
        words = [tokenizer.token_bytes(token).decode("utf-8", "backslashreplace") for token in unseen[:8]]
        shown = ", ".join(f'"{word}"' for word in words)
        warn(f"note: the training text never had these tokens of the prompt: {shown}")
    return text, tokens


def encode_prompt(tokenizer: Tokenizer, prompt: str, documents: bool) -> list[int]:
    """The tokens that generation starts from; never empty.

    Args:
        documents: whether the training documents began with end-of-text; then the prompt does too. In a model of one
            long text, for which end-of-text is out of distribution, an empty prompt becomes a line break.

    Raises UserError if the prompt is not valid UTF-8, or the vocabulary lacks a character of it (exit code 2).
    """
    try:
        prompt.encode("utf-8")
    except UnicodeEncodeError as error:
        raise UserError(f"the prompt is not valid UTF-8: invalid byte at character {error.start}") from error
    if documents:
        return [tokenizer.end_of_text, *tokenizer.encode(prompt).tolist()]
    if tokenizer.prompt_prefix:
        return [*tokenizer.prompt_prefix, *tokenizer.encode(prompt).tolist()]
    return tokenizer.encode(prompt or "\n").tolist()  # it has lines: else its documents begin with end-of-text


def check_token_count(n_samples: int, max_new_tokens: int) -> None:
    """Raise `UserError` (6) for more than `MAX_NEW_TOKENS` in all."""
    if (total := n_samples * max_new_tokens) > MAX_NEW_TOKENS:
        raise UserError(f"{total:,} tokens are too many: ask for at most {MAX_NEW_TOKENS:,} at once", DISK_OR_MEMORY)


class GeneratedText:
    """A text while it is generated: its tokens, their log-probabilities, and why it ended."""

    def __init__(self, tokenizer: Tokenizer, stops: Sequence[str], show: Callable[[str], object] | None = None) -> None:
        self.tokenizer, self.stops, self.show = tokenizer, stops, show
        self.decoder = codecs.getincrementaldecoder("utf-8")("replace")  # a character may be spread over several tokens
        self.text, self.tokens, self.logprobs = "", list[int](), list[float]()
        self.held = ""  # text that may be the beginning of a stop text
        self.finish_reason = ""  # while it is generated

    def add(self, token: int, logprob: float) -> None:
        self.tokens.append(token)
        self.logprobs.append(logprob)
        self._extend(self.decoder.decode(self.tokenizer.token_bytes(token)))
        if token == self.tokenizer.end_of_text and not self.finish_reason:
            self.finish("end_of_text")

    def finish(self, reason: str) -> None:
        self._extend(self.decoder.decode(b"", final=True), is_last=True)
        self.finish_reason = self.finish_reason or reason

    def _extend(self, text: str, is_last: bool = False) -> None:
        """Add text up to the first stop text, and hold back what may be the beginning of one."""
        self.held += text
        if found := [self.held.index(stop) for stop in self.stops if stop in self.held]:
            end, self.finish_reason = min(found), "stop"
        else:
            starts = (n for stop in self.stops for n in range(1, len(stop)) if self.held.endswith(stop[:n]))
            end = len(self.held) - (0 if is_last else max(starts, default=0))
        shown, self.held = self.held[:end], self.held[end:]
        self.text += shown
        if self.show and shown:
            self.show(shown)


def generate_texts(
    model: GPT,
    prompt: list[int],
    max_new_tokens: int,
    seed: int,
    params: SamplingParams,
    texts: Sequence[GeneratedText],
) -> None:
    """Continue `prompt` once for each of `texts`, until all have ended, and add the tokens to them.

    The log-probabilities are those of the model, before temperature, filters and penalty.
    """
    device = model.token_embedding.weight.device
    generator = torch.Generator("cpu" if device.type == "mps" else device).manual_seed(seed)  # mps has no float64
    batch = torch.tensor(prompt, device=device).expand(len(texts), -1)
    for tokens, logits in generate(model, batch, max_new_tokens, generator, params):
        logprobs = logits.float().log_softmax(dim=-1).gather(-1, tokens[:, None].to(logits.device))[:, 0].tolist()
        for text, token, logprob in zip(texts, tokens.tolist(), logprobs, strict=True):
            if not text.finish_reason:
                text.add(token, logprob)
        if all(text.finish_reason for text in texts):
            return
    for text in texts:
        if not text.finish_reason:
            text.finish("length")


def generate_tokens(
    model: GPT,
    tokenizer: Tokenizer,
    prompt: list[int],
    max_new_tokens: int,
    seed: int,
    params: SamplingParams = DEFAULT_PARAMS,
    n_samples: int = 1,
) -> list[list[int]]:
    """The tokens of `n_samples` continuations of `prompt`, each up to its end-of-text."""
    texts = [GeneratedText(tokenizer, ()) for _ in range(n_samples)]
    generate_texts(model, prompt, max_new_tokens, seed, params, texts)
    return [text.tokens for text in texts]


def escape_text(text: str) -> str:
    """`text` for a terminal: without the CR of CRLF, and with escapes for what could steer it but line breaks and tabs."""
    return escape_control_chars(re.sub(r"\r+(?=\n|\Z)", "", text), keep="\n\t")
