"""TokenizedCorpus folders from failing disks and from strangers: nothing but `DamagedShards` may come of opening one.

Every manifest here carries its own right sha256 (`seal`), as a hostile one would.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import pickle
import shutil
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

import data.token_dataset
from common.errors import DATA, UserError
from data.config import DataConfig
from data.held import DamagedShards
from data.manifest import load_shards, seal, unseal
from data.prepare import TokenizedCorpus, prepare

TEXT = "\n<|endoftext|>\n".join(f"fox number {i} jumps over the lazy dog" for i in range(12))
SHARD, STARTS = "train-00000.npy", "train-documents.npy"
many = {"deadline": None, "suppress_health_check": [HealthCheck.function_scoped_fixture, HealthCheck.too_slow]}


@pytest.fixture
def made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> TokenizedCorpus:
    """A small prepared folder, in a cache of its own."""
    monkeypatch.setenv("GLASSGPT_CACHE", str(tmp_path / "cache"))
    (tmp_path / "text.txt").write_text(TEXT)
    return again(tmp_path)


def again(tmp_path: Path) -> TokenizedCorpus:
    return prepare(DataConfig(source=str(tmp_path / "text.txt"), tokenizer="bpe", vocab_size=280), progress=False)


def files_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture
def whole(made: TokenizedCorpus) -> dict[str, bytes]:
    """The files of `made` before anything is done to them."""
    return files_of(made.folder)


def restore(made: TokenizedCorpus, whole: dict[str, bytes]) -> None:
    """Hypothesis tries all its examples on one folder, and each must find it whole."""
    for name, content in whole.items():
        (made.folder / name).write_bytes(content)


def described(folder: Path) -> dict[str, Any]:
    manifest: dict[str, Any] = unseal((folder / "manifest.json").read_bytes())
    del manifest["sha256"]
    return manifest


def put(folder: Path, name: str, content: bytes, manifest: dict[str, Any]) -> None:
    """Another file, and a manifest that vouches for it."""
    (folder / name).write_bytes(content)
    manifest["files"][name] = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    (folder / "manifest.json").write_bytes(seal(manifest))


@contextlib.contextmanager
def nothing_outside(folder: Path) -> Iterator[None]:
    """Assert that no file is opened but those in a folder."""
    opened: list[Path] = []
    real = os.open

    def watch(path: Any, *arguments: Any, **options: Any) -> int:
        opened.append(Path(path))
        return real(path, *arguments, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "open", watch)
        yield
    assert opened and {path.parent for path in opened} == {folder}, opened


def accepted(made: TokenizedCorpus) -> bool:
    """Whether a folder is taken for whole; if so, its splits must be fit for use."""
    try:
        with nothing_outside(made.folder):
            stored = load_shards(made.folder, made.fingerprint)
            stored.verify()
    except DamagedShards as damage:
        assert len(str(damage)) < 2_000
        return False
    for split in stored.splits.values():
        starts = split.document_starts.tolist()
        assert starts == sorted({*starts}) and starts[0] == 0 and starts[-1] < len(split) - 1
        try:
            assert len(split.read(0, len(split))) == len(split) and split.read(0, len(split)).max() < split.vocab_size
        except UserError as error:
            assert error.exit_code == DATA and str(made.folder) in str(error)
    return True


numbers = st.sampled_from([0, 1, -1, 2, 12, 257, 280, 65_536, 65_537, 2**31, 2**62, 2**63, 2**64, 10**400, -(10**400)])
texts = st.one_of(
    st.text(max_size=12),
    st.sampled_from(
        ["../train-00000.npy", "/etc/passwd", "..", "", "train-00001.npy", SHARD, STARTS, "\ud800", "a\0b"]
    ),
    st.sampled_from(["<u2", "<u4", ">u2", "<i8", "|O", "train", "val", "\x1b[2J", "x" * 5_000, "tokenizer.json"]),
)
plain = st.one_of(numbers, texts, st.booleans(), st.none(), st.floats())
anything = st.recursive(plain, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(texts, inner, max_size=4))


def places(value: Any) -> Iterator[tuple[Any, Any]]:
    """Every (container, key) in a JSON value."""
    for key in value if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ():
        yield value, key
        yield from places(value[key])


@settings(max_examples=1_500, **many)
@given(choose=st.data())
def test_a_hostile_manifest_is_only_damage(
    made: TokenizedCorpus, whole: dict[str, bytes], choose: st.DataObject
) -> None:
    """One to three entries replaced, removed, renamed or doubled."""
    restore(made, whole)
    manifest = described(made.folder)
    for _ in range(choose.draw(st.integers(1, 3))):
        container, key = choose.draw(st.sampled_from(list(places(manifest))))
        change = choose.draw(st.sampled_from(["replace", "replace", "remove", "rename", "double"]))
        old = container.pop(key)
        if change == "replace":
            new = choose.draw(anything)
            container.insert(key, new) if isinstance(container, list) else container.update({key: new})
        elif change != "remove" and isinstance(container, dict):
            container[choose.draw(texts)] = old
            container.update({key: old} if change == "double" else {})
        elif change == "double":
            container[key:key] = [old, old]
    (made.folder / "manifest.json").write_bytes(seal(manifest or {"x": 0}))
    accepted(made)


@settings(max_examples=300, **many)
@given(st.dictionaries(st.sampled_from(["format", "key", "tokenizer", "splits", "files"]), anything), st.binary())
def test_anything_in_the_place_of_a_manifest_is_only_damage(
    made: TokenizedCorpus, whole: dict[str, bytes], values: dict[str, Any], noise: bytes
) -> None:
    restore(made, whole)
    manifest = described(made.folder)
    for content in (
        noise,
        seal({**manifest, **values, "x": 0}),
        seal({"format": 2, "key": made.fingerprint, **values}),
    ):
        (made.folder / "manifest.json").write_bytes(content)
        accepted(made)


DESCR = ["'<u2'", "'<u4'", "'>u2'", "'|O'", "'<f8'", "'|V2'", "'<U1'", "[('a', '<u2')]", "'<i8'", "2", "[" * 300, "'O'"]
SHAPE = [
    "({n},)",
    "({n})",
    "(-{n},)",
    "({n}, 1)",
    "()",
    "(1{n}000000000000,)",
    "({n}0000000000000000000000,)",
    "(True,)",
]
SHAPE += [
    "(__import__('os').system('touch {mark}'),)",
    "(open('{mark}', 'w') and {n},)",
    "(" * 2_000,
    "-" * 9_000,
    "{n}.",
]
ORDER = ["'fortran_order'", "'order'", "'shape'"]


@settings(max_examples=1_500, **many)
@given(
    name=st.sampled_from([SHARD, STARTS]),
    descr=st.sampled_from(DESCR),
    fortran=st.sampled_from(["False", "False", "True", "0", "None"]),
    shape=st.sampled_from(SHAPE),
    magic=st.sampled_from(
        [b"\x93NUMPY\x01\x00"] * 5 + [b"\x93NUMPY\x02\x00", b"\x93NUMPY\x03\x00", b"PK\x03\x04", b""]
    ),
    size=st.sampled_from([None, None, None, 0, 1, 65_535]),
    noise=st.none() | st.none() | st.binary(max_size=300),
    padding=st.integers(0, 70),
)
def test_a_header_that_lies_is_only_damage(
    made: TokenizedCorpus, whole: dict[str, bytes], tmp_path: Path, name: str, descr: str, fortran: str,
    shape: str, magic: bytes, size: int | None, noise: bytes | None, padding: int,
) -> None:  # fmt: skip
    """Nothing that it says is executed, and only the one header that is written here is taken."""
    restore(made, whole)
    original, manifest = whole[name], described(made.folder)
    mark, data = tmp_path / "executed", original[128:]
    length = len(data) // (2 if name == SHARD else 8)
    shape = shape.replace("{n}", str(length)).replace("{mark}", str(mark))
    header = f"{{'descr': {descr}, 'fortran_order': {fortran}, 'shape': {shape}, }}".encode() + b" " * padding + b"\n"
    told = (len(header) if size is None else size).to_bytes(2, "little")
    put(made.folder, name, magic + told + header + data if noise is None else noise + data, manifest)
    if accepted(made):
        assert (descr, fortran) == ("'<u2'" if name == SHARD else "'<i8'", "False")
        assert noise is None and magic == original[:8]
        assert header.split(b"}")[0] == original[10:].split(b"}")[0]
    assert not mark.exists()


@settings(max_examples=500, **many)
@given(
    st.lists(st.integers(-(2**63), 2**63 - 1), max_size=6)
    | st.lists(st.integers(0, 500), min_size=1, max_size=30).map(lambda starts: sorted({0, *starts}))
    | st.lists(st.integers(0, 500), max_size=8)
)
@example([0, 5, 5, 9])
@example([0, 2, 4, 3, 6])
@example([0, 2, 4, 4, 6])
@example([0, 2**63 - 1, -(2**63)])
def test_document_starts_ascend_from_0_and_lie_within(
    made: TokenizedCorpus, whole: dict[str, bytes], starts: list[int]
) -> None:
    """In pieces of three numbers here."""
    restore(made, whole)
    manifest = described(made.folder)
    entry = manifest["splits"]["train"]
    written = io.BytesIO()
    np.lib.format.write_array(written, np.array(starts, "<i8"), version=(1, 0))
    entry["documents"] = len(starts)
    put(made.folder, STARTS, written.getvalue(), manifest)
    good = starts[:1] == [0] and starts == sorted({*starts}) and starts[-1] < entry["tokens"] - 1
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(data.token_dataset, "_PIECE", 3)
        assert accepted(made) == good


def test_a_manifest_and_files_that_differ_in_one_thing_are_damage(
    made: TokenizedCorpus, whole: dict[str, bytes]
) -> None:
    manifest = described(made.folder)
    train, val = manifest["splits"]["train"], manifest["splits"]["val"]
    changes: list[tuple[Any, Any, list[Any]]] = [
        (train["shards"][0], "name", ["val-00000.npy", "train-00001.npy", 0]),
        (train["shards"][0], "tokens", [train["tokens"] - 1, train["tokens"] + 1, float(train["tokens"]), 0, -1]),
        (train, "tokens", [train["tokens"] - 1, float(train["tokens"]), str(train["tokens"])]),
        (train, "document_starts", ["val-documents.npy", None]),
        (train, "dtype", ["<u4", ">u2", "<i2", "|O"]),
        (train, "text_bytes", [-1, 1.5, True, "1", 1 << 63]),
        (val, "documents", [True, 0, -1, 1 << 62]),
        (manifest["tokenizer"], "vocab_size", [True, 0, 280.0, 65_537]),
        (manifest["files"][SHARD], "bytes", [0, -1, float(len(whole[SHARD])), len(whole[SHARD]) + 1]),
        (manifest["files"][SHARD], "sha256", ["0" * 64, None, manifest["files"][STARTS]["sha256"]]),
        (manifest, "format", [1, "2", None]),
        (manifest, "key", ["", made.fingerprint + "0", None]),
    ]
    for container, key, values in changes:
        old = container[key]
        for container[key] in values:
            (made.folder / "manifest.json").write_bytes(seal(manifest))
            assert not accepted(made), (key, container[key])
        container[key] = old
    other_format = whole[SHARD].replace(b"NUMPY\x01", b"NUMPY\x02")
    for content in (whole[SHARD] + b"\0\0", whole[SHARD][:-2], whole[SHARD][:9], b"", other_format):
        put(made.folder, SHARD, content, manifest)
        assert not accepted(made)
    put(made.folder, SHARD, whole[SHARD], manifest)
    assert accepted(made)
    listed = manifest["files"].pop("tokenizer.json")
    for more in ({}, {"tokenizer.json": listed, "extra.npy": listed}):
        (made.folder / "extra.npy").write_bytes(whole["tokenizer.json"])
        put(made.folder, SHARD, whole[SHARD], {**manifest, "files": {**manifest["files"], **more}})
        assert not accepted(made)


def test_a_name_that_leads_out_of_the_folder_is_damage(made: TokenizedCorpus) -> None:
    """Even where the files that it leads to are just what the manifest says."""
    manifest = described(made.folder)
    away = made.folder.parent / "away"
    shutil.copytree(made.folder, away)
    for split in ("../away/train", str(away / "train"), "./train", "train\0", "trän", ""):
        moved = json.loads(json.dumps(manifest).replace("train", "TRAIN").replace("TRAIN", json.dumps(split)[1:-1]))
        (made.folder / "manifest.json").write_bytes(seal(moved))
        assert not accepted(made), split


class Trap:
    """What a pickle would run."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.mark,)


def test_a_pickle_in_any_disguise_is_not_executed(
    made: TokenizedCorpus, whole: dict[str, bytes], tmp_path: Path
) -> None:
    trap = Trap(tmp_path / "executed")
    disguises = [io.BytesIO() for _ in range(3)]
    disguises[0].write(pickle.dumps(trap))
    np.save(disguises[1], np.array([trap], object), allow_pickle=True)
    np.savez(disguises[2], np.array([trap], object))
    for disguise in disguises:
        for name in whole.keys() - {"manifest.json"}:
            put(made.folder, name, disguise.getvalue(), described(made.folder))
            assert files_of(again(tmp_path).folder) == whole
    assert not trap.mark.exists()


def test_what_claims_to_be_huge_takes_no_memory(made: TokenizedCorpus) -> None:
    """A manifest of a terabyte, one nested a million deep, a number of ten thousand digits, terabytes of starts."""
    manifest = described(made.folder)
    empty = b'{"format": 2, "key": ' + json.dumps(made.fingerprint).encode()

    def of(body: bytes) -> Callable[[], object]:
        sealed = body + f',\n "sha256": "{hashlib.sha256(body).hexdigest()}"\n}}\n'.encode()
        return lambda: (made.folder / "manifest.json").write_bytes(sealed)

    def starts() -> None:
        n, size = 10**11, 128 + 8 * 10**11
        header = f"{{'descr': '<i8', 'fortran_order': False, 'shape': ({n},), }}".encode().ljust(117) + b"\n"
        (made.folder / STARTS).write_bytes(b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header)
        os.truncate(made.folder / STARTS, size)
        manifest["splits"]["train"]["documents"], manifest["files"][STARTS]["bytes"] = n, size
        (made.folder / "manifest.json").write_bytes(seal(manifest))

    cases = [of(empty + b', "splits": ' + b"[" * 10**6), of(empty + b', "splits": ' + b'{"a":' * 10**5)]
    cases += [of(empty + b', "tokenizer": {"vocab_size": ' + b"9" * 10_000 + b"}")]
    cases += [of(empty + b', "splits": [' + b"[]," * 1_300_000 + b"[]]"), starts]
    cases += [lambda: os.truncate(made.folder / "manifest.json", 10**12)]
    for case in cases:
        case()
        tracemalloc.start()
        assert not accepted(made)
        assert tracemalloc.get_traced_memory()[1] < 200e6
        tracemalloc.stop()


def test_every_flipped_bit_is_noticed(made: TokenizedCorpus, whole: dict[str, bytes]) -> None:
    """One bit in every byte of every file, the manifest's own included."""
    for name, content in whole.items():
        for at in range(len(content)):
            damaged = bytearray(content)
            damaged[at] ^= 1 << at % 8
            (made.folder / name).write_bytes(damaged)
            assert not accepted(made), (name, at)
        (made.folder / name).write_bytes(content)
    assert accepted(made)


def test_damage_is_named_and_prepared_again_to_the_same_bytes(
    made: TokenizedCorpus, whole: dict[str, bytes], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, content in whole.items():
        cuts = [content[:at] for at in (0, 1, 9, 10, 127, 128, len(content) // 2, len(content) - 1)] + [content + b"\0"]
        flips = [content[:at] + bytes([content[at] ^ 4]) + content[at + 1 :] for at in range(0, len(content), 97)]
        for damaged in [*cuts, *flips]:
            if damaged == content:
                continue
            (made.folder / name).write_bytes(damaged)
            assert files_of(again(tmp_path).folder) == whole
            assert f"{made.folder} is damaged" in capsys.readouterr().err
