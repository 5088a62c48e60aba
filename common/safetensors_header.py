"""The head of a safetensors file: what both writers of such files, of checkpoints and of attention, share.

A file is eight bytes with the length of a JSON text, that text, and the arrays' bytes one after another
(https://huggingface.co/docs/safetensors, "Format"). It holds numbers and nothing that could be executed.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Iterable, Mapping, Sequence


def file_head(
    arrays: Iterable[tuple[str, str, Sequence[int], int]], metadata: Mapping[str, str] | None = None
) -> bytes:
    """What stands before the bytes of the arrays.

    Args:
        arrays: (name, dtype such as F32, shape, number of bytes), in the order in which their bytes follow. Wide
            numbers first, and each array begins at a multiple of its item's size.
    """
    header: dict[str, object] = {"__metadata__": dict(metadata)} if metadata else {}
    offset = 0
    for name, dtype, shape, size in arrays:
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [offset, offset + size]}
        offset += size
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text
