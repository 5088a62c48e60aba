"""Tokenizers: text to token ids and back.

Ids are 0 to `vocab_size - 1`. `end_of_text` separates documents; text never encodes to it, also not the characters
`<|endoftext|>`. To add one: subclass `Tokenizer`, then extend `check_tokenizer_name`, `train_tokenizer` and `from_dict`; for
exports `tokenizer_export.py`, for the page `inspection/web/tokenizer.js`.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import os
import re
import threading
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from tqdm import tqdm

from common.errors import CONFIG, DATA, UserError
from common.files import read_json, reading

if TYPE_CHECKING:
    import tiktoken

FORMAT = 1  # Version of the saved JSON.
MAX_TOKEN_BYTES = 256  # Maximum length of a trained token; keeps long runs of dashes out of the vocabulary.
MAX_PRETOKEN_BYTES = 252
"""A vocabulary is trained on parts of longer words and runs: its time grows with the square of their length. A multiple
of 2, 3 and 4, so that a run of characters of one length in UTF-8 is cut between them."""
GPT2_PATTERN = r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"""
"""GPT-2's pre-tokenization pattern, with possessive quantifiers as in tiktoken: same matches, faster."""
END_OF_TEXT = ("<|endoftext|>", "<|end_of_text|>", "</s>")  # in foreign files that do not say which token it is


class Tokenizer(ABC):
    name: str
    vocab_size: int
    end_of_text: int
    saved: Mapping[str, Any]  # JSON values from which `from_dict` makes the tokenizer again.
    prompt_prefix: tuple[int, ...] = ()  # What a foreign tokenizer puts before a prompt, such as Llama's `<s>`.

    @abstractmethod
    def _encode(self, text: str) -> np.ndarray:
        """As `encode`, for text without lone surrogates."""

    @abstractmethod
    def _token_bytes(self, token: int) -> bytes:
        """As `token_bytes`, for a token of the vocabulary."""

    def encode(self, text: str) -> np.ndarray:
        """Ids of a text, (n,) int64, never `end_of_text`. Lone surrogates (from undecodable bytes of a command line)
        are encoded as U+FFFD. Raises `UserError` (2) for characters that a `char` vocabulary does not have."""
        return self._encode(text.encode("utf-16", "surrogatepass").decode("utf-16", "replace"))

    def token_bytes(self, token: int) -> bytes:
        """UTF-8 bytes of a token, which may be a part of a character; none for special tokens (`end_of_text`) and unused ids.
        Raises `IndexError` outside the vocabulary."""
        if not 0 <= token < self.vocab_size:
            raise IndexError(f"token {token} is outside the vocabulary of {self.vocab_size}")
        return self._token_bytes(token)

    def decode(self, tokens: Sequence[int] | np.ndarray) -> str:
        """Text of some tokens. Invalid UTF-8 becomes U+FFFD; `end_of_text` becomes nothing."""
        return b"".join(self.token_bytes(int(token)) for token in tokens).decode("utf-8", "replace")

    def to_json(self) -> bytes:
        """The saved form: JSON, one value a line."""
        return json.dumps({"format": FORMAT, **self.saved}, ensure_ascii=False, indent=0).encode() + b"\n"

    def fingerprint(self) -> str:
        """sha256 of the saved form: equal for tokenizers that encode alike."""
        return hashlib.sha256(self.to_json()).hexdigest()


class CharTokenizer(Tokenizer):
    """One id per character, in code point order; the last id is end-of-text."""

    name = "char"

    def __init__(self, characters: str) -> None:
        if characters != "".join(sorted(set(characters))):
            raise ValueError("its characters are not a sorted set")
        self.characters, self.saved = characters, {"kind": "char", "characters": characters}
        self.end_of_text = len(characters)
        self.vocab_size = self.end_of_text + 1
        self._ids = np.full(0x110000, -1, np.int32)
        self._ids[_code_points(characters)] = np.arange(len(characters))

    def _encode(self, text: str) -> np.ndarray:
        ids = self._ids[_code_points(text)].astype(np.int64)
        if unknown := np.flatnonzero(ids < 0).tolist():
            places = ", ".join(f"'{text[i]}' at position {i}" for i in unknown[:5])
            more = f" and {len(unknown) - 5} more" if len(unknown) > 5 else ""
            raise UserError(
                f"characters that are not in the vocabulary: {places}{more}; leave them out, or train with "
                "--data.tokenizer byte or bpe, which encode every character"
            )
        return ids

    def _token_bytes(self, token: int) -> bytes:
        return self.characters[token : token + 1].encode()


class ByteTokenizer(Tokenizer):
    """Ids 0 to 255 are the bytes of UTF-8; 256 is end-of-text."""

    name = "byte"
    vocab_size = 257
    end_of_text = 256
    saved: Mapping[str, Any] = {"kind": "byte"}

    def _encode(self, text: str) -> np.ndarray:
        return np.frombuffer(text.encode(), np.uint8).astype(np.int64)

    def _token_bytes(self, token: int) -> bytes:
        return bytes([token]) if token < 256 else b""


class BPETokenizer(Tokenizer):
    """Byte-level byte-pair encoding (Sennrich et al. 2016, arXiv:1508.07909; Radford et al. 2019), by tiktoken.

    Encoding repeatedly merges the adjacent pair that forms the token with the smallest id. `end_of_text` is the
    encoding's own, not necessarily the last id.
    """

    def __init__(self, encoding: tiktoken.Encoding, saved: dict[str, Any]) -> None:
        self.name, self.vocab_size, self.end_of_text = encoding.name, encoding.n_vocab, encoding.eot_token
        self._encoding, self.saved = encoding, saved
        self.pattern: str = encoding._pat_str  # of pre-tokens; tiktoken has no public name for it
        self._special = {encoding.encode_single_token(special) for special in encoding.special_tokens_set}

    @classmethod
    def from_merged(cls, merged: Sequence[bytes]) -> BPETokenizer:
        """Ids 0 to 255 are the bytes, then come the merged tokens in the order learned; the last id is end-of-text."""
        import tiktoken

        if len(set(merged)) < len(merged) or not all(1 < len(token) <= MAX_TOKEN_BYTES for token in merged):
            raise ValueError(f"its merged tokens are not distinct, of 2 to {MAX_TOKEN_BYTES} bytes")
        ranks = {token: rank for rank, token in enumerate([*(bytes([b]) for b in range(256)), *merged])}
        special = {"<|endoftext|>": len(ranks)}
        encoding = tiktoken.Encoding("bpe", pat_str=GPT2_PATTERN, mergeable_ranks=ranks, special_tokens=special)
        # Latin-1 maps each byte to the character of the same number, so plain words stay readable in the file.
        return cls(encoding, {"kind": "bpe", "merged": [token.decode("latin-1") for token in merged]})

    @classmethod
    def from_tiktoken(cls, name: str) -> BPETokenizer:
        """An encoding from tiktoken's cache, downloaded the first time. Raises `UserError` (2, 3)."""
        import tiktoken

        check_tokenizer_name(name)
        try:
            encoding = tiktoken.get_encoding(name)
        except Exception as error:
            raise UserError(
                f"cannot download the encoding {name} ({type(error).__name__}): run once with a network connection, or "
                "set TIKTOKEN_CACHE_DIR to a folder with its files (copied from another machine)",
                DATA,
            ) from error
        sizes = {"vocab_size": encoding.n_vocab, "end_of_text": encoding.eot_token}
        return cls(encoding, {"kind": "tiktoken", "name": name, **sizes})

    def _encode(self, text: str) -> np.ndarray:
        try:
            return self._encoding.encode_to_numpy(text, disallowed_special=()).astype(np.int64)
        except ValueError:
            # The regex runs out of stack in hundreds of thousands of blanks in a row; half as many may work.
            if len(text) < 2:
                raise
            middle = len(text) // 2
            return np.concatenate([self._encode(text[:middle]), self._encode(text[middle:])])

    def _token_bytes(self, token: int) -> bytes:
        try:
            return b"" if token in self._special else self._encoding.decode_single_token_bytes(token)
        except KeyError:  # an unused id
            return b""


class HuggingFaceTokenizer(Tokenizer):
    """The tokenizer of a `tokenizer.json`: byte-level BPE (GPT-2, Qwen, Llama 3), or of pieces with "▁" for a space (Llama 2).

    Text never encodes to special tokens, so that `encode` equals that of `tokenizers` without them.

    Args:
        text: the content of `tokenizer.json`.
        vocab_size: the model's, which may be larger than the tokenizer's.
        end_of_text: the id of the end-of-text token, which Hugging Face calls `eos_token`.
    """

    name = "huggingface"

    def __init__(self, text: str, vocab_size: int, end_of_text: int) -> None:
        from tokenizers import Tokenizer as HFTokenizer

        try:
            self._tokenizer = HFTokenizer.from_str(text)
        except BaseException as error:  # a panic of the package is no Exception
            if isinstance(error, (KeyboardInterrupt, SystemExit)):
                raise
            raise ValueError(str(error)) from error
        self.saved = {"kind": "huggingface", "tokenizer": text, "vocab_size": vocab_size, "end_of_text": end_of_text}
        self.vocab_size, self.end_of_text = vocab_size, end_of_text
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        if (n_ids := max(self._tokenizer.get_vocab().values(), default=-1) + 1) > vocab_size:
            raise ValueError(f"it has {n_ids} tokens, the model {vocab_size}")
        if not 0 <= end_of_text < vocab_size:
            raise ValueError(f"end-of-text is token {end_of_text} of {vocab_size}")
        content = json.loads(text)
        parts = str([content.get(part) for part in ("normalizer", "pre_tokenizer", "decoder")])
        self._is_byte_level, self._has_marks = "ByteLevel" in parts, "▁" in parts
        if (kind := content["model"].get("type")) not in ("BPE", "Unigram"):
            raise ValueError(f"it is of kind {kind}; only BPE and Unigram are supported")
        self._bytes = gpt2_byte_decoder()
        self._added = self._tokenizer.get_added_tokens_decoder()
        plain = self._tokenizer.encode("a", add_special_tokens=False).ids
        marked = self._tokenizer.encode("a", add_special_tokens=True).ids
        self.prompt_prefix = tuple(marked[: marked.index(plain[0])]) if plain and plain[0] in marked else ()
        self._tokenizer.encode_special_tokens = True

    def _encode(self, text: str) -> np.ndarray:
        return np.array(self._tokenizer.encode_batch_fast([text], add_special_tokens=False)[0].ids, np.int64)

    def _token_bytes(self, token: int) -> bytes:
        if (added := self._added.get(token)) is not None:
            return b"" if added.special else added.content.encode()
        if token == self.end_of_text or (piece := self._tokenizer.id_to_token(token)) is None:
            return b""
        if self._is_byte_level:
            return bytes(self._bytes[character] for character in piece)
        if self._has_marks and re.fullmatch("<0x[0-9A-F]{2}>", piece):
            return bytes([int(piece[3:5], 16)])
        return (piece.replace("▁", " ") if self._has_marks else piece).encode()


def check_tokenizer_name(name: str) -> None:
    """Raises `UserError` (2), which names the nearest ones, if there is neither such a tokenizer nor a folder of the name."""
    known = ["char", "byte", "bpe"]
    if os.path.isdir(name):
        return
    if name not in known:
        import tiktoken

        known += tiktoken.list_encoding_names()
    if name not in known:
        nearest = difflib.get_close_matches(name, known, 3, 0.5) or known
        raise UserError(f"there is no tokenizer '{name}'; nearest are: {', '.join(nearest)}", CONFIG)


def train_tokenizer(name: str, vocab_size: int, texts: Iterable[str], progress: bool = False) -> Tokenizer:
    """The tokenizer of that name, trained on `texts` if it is `char` or `bpe`; the same texts give the same tokenizer.

    `char` takes all characters of the texts: give it the validation text too, or text with an unknown character could
    not be evaluated. `bpe` should see training text alone; it learns `vocab_size - 257` merges, or as many as there
    are pairs that occur twice.

    Raises `UserError`: unknown name (2), an encoding that cannot be downloaded (3).
    """
    if os.path.isdir(name):
        return tokenizer_of_folder(Path(name), vocab_size)
    if name == "byte":
        return ByteTokenizer()
    if name == "char":
        characters: set[str] = set()
        for text in texts:
            characters.update(text)
        return CharTokenizer("".join(sorted(characters)))
    if name == "bpe":
        return BPETokenizer.from_merged(_train_bpe(texts, vocab_size, progress))
    return BPETokenizer.from_tiktoken(name)


def tokenizer_of_folder(folder: Path, vocab_size: int) -> Tokenizer:
    """The tokenizer of a run, of a checkpoint, or of a Hugging Face folder. Raises `UserError` (4): none, or damaged."""
    if found := [*folder.glob("vocabulary.json"), *sorted(folder.glob("checkpoints/*/vocabulary.json"))]:
        return load_tokenizer(found[-1])
    return load_huggingface_tokenizer(folder, vocab_size)


def load_tokenizer(path: Path) -> Tokenizer:
    """Read what `to_json` wrote. Raises `UserError`: missing or damaged (4), an encoding that cannot be downloaded (3)."""
    with reading(path, "tokenizer", "use another checkpoint"):
        return from_dict(read_json(path))


def load_huggingface_tokenizer(folder: Path, vocab_size: int) -> HuggingFaceTokenizer:
    """The tokenizer of a Hugging Face folder. Raises `UserError` (4): none, damaged, or more tokens than `vocab_size`."""
    path = folder / "tokenizer.json"
    with reading(path, "Hugging Face tokenizer", f"save {path.name} there with transformers: save_pretrained"):
        if not path.is_file():
            raise ValueError("there is no such file")
        text = path.read_text("utf-8")
        return HuggingFaceTokenizer(text, vocab_size, _find_end_of_text(folder, text))


def _find_end_of_text(folder: Path, text: str) -> int:
    """The id of `eos_token`, which one of several files names."""
    ids = {entry["content"]: int(entry["id"]) for entry in json.loads(text).get("added_tokens", [])}
    ids |= {token: i for token, i in json.loads(text)["model"]["vocab"].items() if token in END_OF_TEXT}
    settings: dict[str, Any] = {}
    for name in ("config.json", "generation_config.json", "tokenizer_config.json"):
        if (folder / name).is_file():
            settings |= read_json(folder / name)
    token, number = settings.get("eos_token"), settings.get("eos_token_id")
    token = token.get("content") if isinstance(token, dict) else token
    number = number[0] if isinstance(number, list) and number else number
    known = [ids[name] for name in END_OF_TEXT if name in ids]
    for found in (ids.get(token), number, *known):
        if isinstance(found, int):
            return found
    raise ValueError("no file names its end-of-text token (eos_token)")


def from_dict(saved: Any) -> Tokenizer:
    """A tokenizer from its saved JSON. Raises ValueError, TypeError, KeyError or AttributeError for invalid values."""
    tokenizer: Tokenizer
    match saved["kind"]:
        case "byte":
            tokenizer = ByteTokenizer()
        case "char":
            tokenizer = CharTokenizer(saved["characters"])
        case "bpe":
            tokenizer = BPETokenizer.from_merged([token.encode("latin-1") for token in saved["merged"]])
        case "tiktoken":
            import tiktoken

            if saved["name"] not in tiktoken.list_encoding_names():
                raise ValueError(f"tiktoken has no encoding {saved['name']!r}")
            tokenizer = BPETokenizer.from_tiktoken(saved["name"])
        case "huggingface":
            tokenizer = HuggingFaceTokenizer(saved["tokenizer"], saved["vocab_size"], saved["end_of_text"])
        case kind:
            raise ValueError(f"unknown kind {kind!r}")
    if {"format": FORMAT, **tokenizer.saved} != saved:  # another format, or tiktoken has changed the encoding
        raise ValueError(f"it differs from what {tokenizer.name} is saved as now")
    return tokenizer


def _code_points(text: str) -> np.ndarray:
    return np.frombuffer(text.encode("utf-32-le"), "<u4")


def _train_bpe(texts: Iterable[str], vocab_size: int, progress: bool) -> list[bytes]:
    """The merged tokens in the order learned, by `tokenizers`.

    The pairs need not be kept: a token's bytes are always merged in the same order, so each token has one pair of
    parts, and merging by token rank (tiktoken) equals merging by listed pair (`tokenizers`).
    """
    from tokenizers import Regex, models, pre_tokenizers, trainers
    from tokenizers import Tokenizer as HFTokenizer

    byte_of = gpt2_byte_decoder()
    trained = HFTokenizer(models.BPE())
    words = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    parts = pre_tokenizers.Split(Regex(f".{{{MAX_PRETOKEN_BYTES}}}"), "isolated")
    trained.pre_tokenizer = pre_tokenizers.Sequence([words, parts])
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - 1,
        min_frequency=2,
        initial_alphabet=sorted(byte_of),
        max_token_length=MAX_TOKEN_BYTES,
        show_progress=False,
    )
    sample = []
    with progress_bar("training the vocabulary", None, progress) as bar:
        for text in texts:
            sample.append(text)
            bar.update(0)
        # In a thread, because a signal is handled when a call returns; a daemon, so that the program can end before it.
        thread = threading.Thread(target=trained.train_from_iterator, args=(sample, trainer), daemon=True)
        thread.start()
        while thread.is_alive():
            thread.join(0.1)
            bar.update(0)
    ids = trained.get_vocab(with_added_tokens=False)
    tokens = [bytes(byte_of[character] for character in token) for token in sorted(ids, key=ids.__getitem__)]
    assert all(len(token) == 1 for token in tokens[:256]), "the bytes come first"
    return tokens[256:]


def progress_bar(description: str, n_bytes: int | None, progress: bool) -> tqdm:
    """A bar on the terminal for what takes more than two seconds; without `n_bytes` it shows the time."""
    disable = None if progress else True  # with None, tqdm prints nothing if stderr is not a terminal
    shown = None if n_bytes else "{desc}: {elapsed}"
    options: dict[str, Any] = {"leave": False, "delay": 2, "miniters": 0, "unit": "B", "unit_scale": True}
    return tqdm(None, description, n_bytes, disable=disable, bar_format=shown, **options)


def gpt2_byte_decoder() -> dict[str, int]:
    """GPT-2's mapping of visible characters to bytes, which `tokenizers` uses: visible Latin-1 characters are
    themselves, the other bytes are U+0100 and following."""
    visible = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = [byte for byte in range(256) if byte not in visible]
    return {chr(b): b for b in visible} | {chr(256 + i): b for i, b in enumerate(others)}
