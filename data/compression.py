"""Compressed files, `.gz` and `.zst`, copied into the cache once."""

import gzip
import hashlib
import zlib
from collections.abc import Iterator
from pathlib import Path

from common.errors import DATA, UserError, escape_control_chars
from common.files import write_atomic
from data.text_files import BLOCK_BYTES, COMPRESSED, open_text
from data.tokenizer import progress_bar


def decompress(path: Path, cache: Path) -> Path:
    """The file itself, or if it is compressed its copy without the suffix. Raises `UserError`: damaged (3), no space (6)."""
    if path.suffix.lower() not in COMPRESSED:
        return path
    with open_text(path) as file:
        key = hashlib.file_digest(file, "sha256").hexdigest()[:20]
    copy = cache / f"text-{key}" / path.stem
    if not copy.exists():
        write_atomic(copy, _gzip(path) if path.suffix.lower() == ".gz" else _zstd(path))
    return copy


def _gzip(path: Path) -> Iterator[bytes]:
    with open_text(path) as raw:
        try:
            with gzip.open(raw) as file:
                while block := file.read(BLOCK_BYTES):
                    yield block
        except (gzip.BadGzipFile, EOFError, zlib.error) as error:
            raise _damaged(path, error) from error


def _zstd(path: Path) -> Iterator[bytes]:
    try:
        import zstandard
    except ImportError as error:
        message = f"{escape_control_chars(path)} needs the package zstandard: pip install zstandard"
        raise UserError(message, DATA) from error
    decoder, is_open = zstandard.ZstdDecompressor().decompressobj(), False
    with open_text(path) as file, progress_bar("decompressing", path.stat().st_size, True) as bar:
        while block := file.read(BLOCK_BYTES):
            bar.update(len(block))
            while block:
                try:
                    yield decoder.decompress(block)
                except zstandard.ZstdError as error:
                    raise _damaged(path, error) from error
                block, is_open = decoder.unused_data if decoder.eof else b"", not decoder.eof
                if decoder.eof:  # another frame may follow
                    decoder = zstandard.ZstdDecompressor().decompressobj()
    if is_open:
        raise _damaged(path, ValueError("its last frame is cut"))


def _damaged(path: Path, error: Exception) -> UserError:
    return UserError(escape_control_chars(f"{path} is damaged: {error}; get it again"), DATA)
