"""Checkpoints written by somebody who means harm, or by nobody at all: ten thousand of them, and pickles in disguise.

Each file of a good checkpoint is changed in all the ways that hypothesis thinks of, and the manifest is made to vouch
for it. Whatever comes of that is a `UserError` of one escape_control_chars line with exit code 4, or a checkpoint that is used to
its end, within a bounded memory.
"""

from __future__ import annotations

import copy
import dataclasses
import io
import json
import os
import pickle
import shutil
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from common.errors import CHECKPOINT, UserError, escape_control_chars
from tests.runs import script
from tests.training.checkpoints import bounded_memory, saved, vouch
from training.checkpoint import FILES, MANIFEST, Checkpoint, open_checkpoint
from training.device import DistContext

MACHINE = DistContext(torch.device("cpu"), torch.float32)
MEMORY = 1 << 30
"""Far more than a checkpoint of 50 kB needs, far less than any of its lies asks for."""
CASES = {"manifest": 2500, "state": 1000, "tokenizer": 2500, "header": 3300, "bytes": 700}


def thorough(kind: str) -> Any:
    """The settings of one of the property tests; together they try 10,000 cases."""
    checks = [HealthCheck.too_slow, HealthCheck.function_scoped_fixture, HealthCheck.data_too_large]
    return settings(
        max_examples=CASES[kind],
        deadline=None,
        suppress_health_check=checks,
        database=None,
    )


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint that nobody has touched."""
    return saved(tmp_path_factory.mktemp("good"))


@pytest.fixture
def folder(good: Path, tmp_path: Path) -> Iterator[Path]:
    """A copy of it, in a process that may not take much more memory than it has."""
    copied = Path(shutil.copytree(good, tmp_path / "checkpoints" / good.name))
    use(copied)  # what is imported late is there by now
    with bounded_memory(MEMORY):
        yield copied


def use(folder: Path) -> None:
    """Do with a checkpoint what sampling and resuming do."""
    found = open_checkpoint(folder.parent.parent)
    tokenizer = found.tokenizer()
    tokenizer.decode(tokenizer.encode("One day"))
    found.optimizer_state()
    found.load_model(MACHINE)(torch.zeros(1, 4, dtype=torch.long))


def survives(folder: Path) -> bool:
    """Whether it ends in one of the two ways."""
    return ends_well(lambda: use(folder))


def ends_well(action: Any) -> bool:
    try:
        action()
    except UserError as error:
        assert error.exit_code == CHECKPOINT, error
        assert str(error) == escape_control_chars(error), error
    return True


NUMBERS = st.one_of(
    st.integers(-2, 20),
    st.sampled_from([2**31, 2**32 - 1, 2**53, 2**63 - 1, 2**63, 2**64, 10**12, 10**30, -(10**18)]),
    st.floats(),
    st.booleans(),
)
TEXTS = st.one_of(st.text(max_size=20), st.sampled_from(["../../../etc/passwd", "\x1b[31m", "a" * 5000, "F32", "byte"]))
PLAIN = st.one_of(st.none(), NUMBERS, TEXTS)
VALUES = st.recursive(
    PLAIN, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(TEXTS, inner, max_size=4), max_leaves=8
)


def places(tree: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The way to every value in a tree of JSON."""
    found = [path]
    inside = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    for key, value in inside:
        found += places(value, (*path, key))
    return found


@st.composite
def damaged(draw: st.DrawFn, tree: Any) -> Any:
    """The same tree with some of its values replaced, removed, doubled under other names, or exchanged."""
    tree = copy.deepcopy(tree)
    for _ in range(draw(st.integers(1, 3))):
        if not (found := places(tree)[1:]):
            break
        *way, last = draw(st.sampled_from(found))
        parent = tree
        for key in way:
            parent = parent[key]
        what = draw(st.sampled_from(["replace", "nudge", "remove", "rename"]))
        if what == "remove":
            del parent[last]
        elif what == "rename" and isinstance(parent, dict):
            parent[draw(TEXTS)] = parent.pop(last)
        elif what == "nudge" and type(parent[last]) is int:
            parent[last] += draw(st.integers(-3, 3))
        else:
            parent[last] = draw(VALUES)
    return tree


@st.composite
def spoiled(draw: st.DrawFn, content: bytes) -> bytes:
    """Bytes with bits flipped, cut short, made longer, or replaced."""
    content = bytearray(content)
    for _ in range(draw(st.integers(1, 3))):
        what = draw(st.sampled_from(["flip", "cut", "extend", "insert", "replace"]))
        at = draw(st.integers(0, max(0, len(content) - 1)) | st.integers(0, min(2000, max(0, len(content) - 1))))
        some = draw(st.binary(min_size=1, max_size=16))
        if what == "flip" and content:
            content[at] ^= 1 << draw(st.integers(0, 7))
        elif what == "cut":
            del content[at:]
        elif what == "extend":
            content += some
        elif what == "insert":
            content[at:at] = some
        else:
            content[at : at + len(some)] = some
    return bytes(content)


def dumped(tree: Any) -> bytes:
    """As JSON."""
    return json.dumps(tree).encode()


def restored(folder: Path, good: Path) -> None:
    """Undo what the last case did."""
    for name in (*FILES, MANIFEST):
        if (folder / name).read_bytes() != (good / name).read_bytes():
            shutil.copy(good / name, folder / name)


def test_hostile_manifests(folder: Path, good: Path, figures: Any) -> None:
    whole = json.loads((good / MANIFEST).read_bytes())

    @thorough("manifest")
    @given(damaged(whole).map(dumped) | VALUES.map(dumped) | spoiled((good / MANIFEST).read_bytes()))
    def holds(content: bytes) -> None:
        (folder / MANIFEST).write_bytes(content)
        figures.add(tried=1, survived=survives(folder))

    holds()


def test_hostile_states(folder: Path, good: Path, figures: Any) -> None:
    whole = json.loads((good / "state.json").read_bytes())

    @thorough("state")
    @given(damaged(whole).map(dumped) | VALUES.map(dumped) | spoiled((good / "state.json").read_bytes()))
    def holds(content: bytes) -> None:
        (folder / "state.json").write_bytes(content)
        vouch(folder)
        figures.add(tried=1, survived=survives(folder))

    holds()


TOKENIZERS: list[dict[str, Any]] = [
    {"format": 1, "kind": "byte"},
    {"format": 1, "kind": "char", "characters": "abc"},
    {"format": 1, "kind": "bpe", "merged": ["th", "the", "\xc3\xa9"]},
    {"format": 1, "kind": "tiktoken", "name": "gpt9", "sha256": "0" * 64},  # gpt2 would be fetched from the network
]


def test_hostile_tokenizers(folder: Path, good: Path, figures: Any) -> None:
    found = open_checkpoint(folder)

    @thorough("tokenizer")
    @given(
        st.sampled_from(TOKENIZERS).flatmap(damaged).map(dumped)
        | VALUES.map(dumped)
        | spoiled((good / "vocabulary.json").read_bytes())
    )
    def holds(content: bytes) -> None:
        (folder / "vocabulary.json").write_bytes(content)
        figures.add(tried=1, survived=ends_well(found.tokenizer))

    holds()


def parted(content: bytes) -> tuple[dict[str, Any], bytes]:
    """A safetensors file's header and the bytes after it."""
    length = int.from_bytes(content[:8], "little")
    return json.loads(content[8 : 8 + length]), content[8 + length :]


LENGTHS = st.sampled_from([0, 1, 7, 8, 2**22, 2**22 + 1, 100_000_000, 2**31, 2**32, 2**63, 2**64 - 1])
SHAPES = st.lists(st.integers(0, 40) | st.sampled_from([2**20, 2**32, 2**62, 2**63, 2**64 - 1]), max_size=5)
DTYPES = st.sampled_from(
    ["BOOL", "U8", "F8_E4M3", "F8_E8M0", "F4", "F16", "BF16", "F32", "I64", "F64", "C64", "O", "f32"]
)


@st.composite
def lying_entries(draw: st.DrawFn, header: dict[str, Any]) -> dict[str, Any]:
    """A header whose entries lie about types, shapes, and where their bytes are."""
    header = copy.deepcopy(header)
    for name in draw(st.lists(st.sampled_from(sorted(header)), min_size=1, max_size=3, unique=True)):
        entry = header[name]
        what = draw(st.sampled_from(["dtype", "shape", "overlap", "offsets", "empty", "metadata"]))
        if what == "dtype":
            entry["dtype"] = draw(DTYPES)
        elif what == "shape":
            entry["shape"] = draw(SHAPES)
        elif what == "overlap":
            entry["data_offsets"] = header[draw(st.sampled_from(sorted(header)))]["data_offsets"]
        elif what == "offsets":
            entry["data_offsets"] = draw(st.lists(NUMBERS, max_size=3))
        elif what == "empty":
            entry.update(shape=[0], data_offsets=[entry["data_offsets"][0]] * 2)
        else:
            header["__metadata__"] = draw(st.dictionaries(TEXTS, PLAIN, max_size=3))
            break
    return header


@st.composite
def hostile_file(draw: st.DrawFn, content: bytes) -> bytes:
    """A safetensors file with another header, another length of it, or other bytes behind it."""
    header, data = parted(content)
    text = dumped(draw(lying_entries(header) | damaged(header) | st.just(header)))
    length = draw(st.just(len(text)) | LENGTHS | st.integers(0, len(text) + 9))
    data = draw(st.just(data) | st.integers(0, len(data)).map(lambda cut: data[:cut]) | st.just(data + b"\0" * 4))
    return length.to_bytes(8, "little") + text + data


def tensors_of(found: Checkpoint) -> None:
    """What a header decides: model and moments."""
    found.optimizer_state()
    found.build_model(dataclasses.replace(found.config.model, attention="eager"))


def test_hostile_headers(folder: Path, good: Path, figures: Any) -> None:
    found = open_checkpoint(folder)
    files = {name: (good / name).read_bytes() for name in FILES if name.endswith(".safetensors")}
    cases = st.one_of([st.tuples(st.just(name), hostile_file(content)) for name, content in files.items()])

    @thorough("header")
    @given(cases)
    def holds(case: tuple[str, bytes]) -> None:
        name, content = case
        restored(folder, good)
        (folder / name).write_bytes(content)
        figures.add(tried=1, survived=ends_well(lambda: tensors_of(found)))

    holds()


def test_hostile_bytes(folder: Path, good: Path, figures: Any) -> None:
    """Any file, spoiled anywhere, and vouched for."""
    cases = st.sampled_from(FILES).flatmap(
        lambda name: st.tuples(st.just(name), spoiled((good / name).read_bytes()) | st.binary(max_size=200))
    )

    @thorough("bytes")
    @given(cases)
    def holds(case: tuple[str, bytes]) -> None:
        name, content = case
        restored(folder, good)
        (folder / name).write_bytes(content)
        vouch(folder)
        figures.add(tried=1, survived=survives(folder))

    holds()


class Harmful:
    """Makes a file when it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, tuple[Any, ...]]:
        return os.mkdir, (str(self.marker),)


def disguises(marker: Path) -> dict[str, bytes]:
    """A pickle that does harm, alone and in what it usually comes in."""
    plain = pickle.dumps(Harmful(marker))
    written = {"pickle": plain, "an old pickle": pickle.dumps(Harmful(marker), 0)}
    for name, new in (("torch.save", True), ("an old torch.save", False)):
        file = io.BytesIO()
        torch.save(Harmful(marker), file, _use_new_zipfile_serialization=new)
        written[name] = file.getvalue()
    file = io.BytesIO()
    np.save(file, np.array([Harmful(marker)], dtype=object), allow_pickle=True)
    written["npy"] = file.getvalue()
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("data.pkl", plain)
    written["zip"] = file.getvalue()
    written["behind a length"] = len(plain).to_bytes(8, "little") + plain
    return written


@pytest.mark.parametrize(
    "how", ["pickle", "an old pickle", "torch.save", "an old torch.save", "npy", "zip", "behind a length"]
)
def test_pickles_in_disguise_are_never_opened(how: str, good: Path, tmp_path: Path, figures: Any) -> None:
    """In the place of every file of a checkpoint, beside them, and behind a tensor, through all three scripts."""
    marker, content = tmp_path / "executed", disguises(tmp_path / "executed")[how]
    (tmp_path / "home").mkdir()
    pickle.loads(content) if "pickle" in how else marker.mkdir()  # it does what it says it does
    assert marker.is_dir()
    marker.rmdir()
    for number, name in enumerate((*FILES, MANIFEST, "weights.pt", "training_args.bin", "behind")):
        run = tmp_path / str(number)
        folder = Path(shutil.copytree(good, run / "checkpoints" / good.name))
        if name == "behind":
            weights = folder / "model.safetensors"
            weights.write_bytes(weights.read_bytes() + content)
        else:
            (folder / name).write_bytes(content)
        if name != MANIFEST:
            vouch(folder)
        ends_well(lambda folder=folder: use(folder))
        commands = [("sample.py", run, "--tokens=2"), ("attend.py", run, "--prompt=a")]
        for command in commands if name in (*FILES, MANIFEST) else commands[:1]:  # a page takes its time
            done = script(*command)
            assert done.returncode in (0, CHECKPOINT) and "Traceback" not in done.stderr, done.stderr
        executed = marker.exists()
        figures.add(tried=1, survived=not executed, pickles=int(executed))
        assert not executed


@pytest.mark.parametrize("file", ["model.safetensors", "optimizer.safetensors"])
def test_a_header_as_large_as_memory_is_not_read(file: str, folder: Path, figures: Any) -> None:
    """A sparse file takes no room on the disk, and claims a header of a terabyte; another has one of nine megabytes."""
    found = open_checkpoint(folder)
    with (folder / file).open("r+b") as opened:
        opened.write((2**40 - 8).to_bytes(8, "little"))
        opened.truncate(2**40)
    figures.add(tried=1, survived=ends_well(lambda: tensors_of(found)))
    many = {f"{k}{'a' * (1 << 20)}": {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]} for k in range(9)}
    header = dumped(many)
    (folder / file).write_bytes(len(header).to_bytes(8, "little") + header)
    with pytest.raises(UserError, match="bytes of JSON"):
        tensors_of(found)
