"""Compressed files, `.gz` and `.zst`, copied into the cache once."""

import gzip
import hashlib
import zlib
from collections.abc import Iterator
from pathlib import Path

from common.errors import DATA, UserError
from common.files import write_atomic
from data.text_files import BLOCK_BYTES, COMPRESSED, import_pyarrow, open_text
from data.tokenizer import progress_bar


def decompress(path: Path, cache: Path) -> Path:
    """The file itself, or if it is compressed its copy without the suffix. Raises `UserError`: damaged (3), no space (6)."""
    if path.suffix.lower() not in COMPRESSED:
        return path
    with open_text(path) as file:
        key = hashlib.file_digest(file, "sha256").hexdigest()[:20]
    copy = cache / f"text-{key}" / path.stem
    if not copy.exists():
        write_atomic(copy, _read(path))
    return copy


def _read(path: Path) -> Iterator[bytes]:
    with open_text(path) as raw, progress_bar("decompressing", path.stat().st_size, True) as bar:
        is_gzip = path.suffix.lower() == ".gz"
        try:
            with gzip.open(raw) if is_gzip else import_pyarrow(path).input_stream(raw, compression="zstd") as file:
                while block := file.read(BLOCK_BYTES):
                    bar.update(raw.tell() - bar.n)
                    yield block
        except (OSError, EOFError, zlib.error) as error:
            raise UserError(f"{path} is damaged: {error}; get it again", DATA) from error
