"""What strangers may hand us to be parsed: config files, command lines, lines to watch, tokenizers, attention files.

Some 6,000 cases, damaged and made up. Whatever they hold, they are read, or refused by a `UserError`, with a line for
each problem, in memory that the file's own size bounds. And a run folder from a stranger may hold links that lead out
of it: nothing is written there.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import string
import tomllib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from common.errors import CHECKPOINT, CONFIG, DATA, DISK_OR_MEMORY, UserError
from data import tokenizer
from data.tokenizer import CharTokenizer
from inspection.eval_texts import read_user_prompts
from tests.runs import TINY, process, said, script
from training.cli import option_types
from training.config import RunConfig, from_saved, parse_train, read_toml, to_toml

MANY = {
    "deadline": None,
    "suppress_health_check": [HealthCheck.function_scoped_fixture, HealthCheck.too_slow, HealthCheck.data_too_large],
}
GOOD = to_toml(RunConfig())
OPTIONS = sorted(option_types(RunConfig))
SECTIONS = sorted({name.split(".")[0] for name in OPTIONS})

odd = st.text(max_size=12) | st.sampled_from(
    ["", "\n", "\x00", "../..", "--help", "a=b", "\x1b[2J", "nan", "inf", "1e400"]
)
number = (
    st.integers() | st.floats() | st.sampled_from([2**31, 2**63, 2**64, -(2**63), 10**30, 10**400, 1e308, -0.0, 0.1])
)
value = st.booleans() | number | odd
key = st.sampled_from([name.split(".")[1] for name in OPTIONS]) | odd
option = st.sampled_from(OPTIONS) | odd


def toml(thing: Any) -> str:
    """A value as TOML; integers of any length, floats that are not finite, nested lists and tables."""
    if isinstance(thing, bool):
        return "true" if thing else "false"
    if isinstance(thing, dict):
        return "{" + ", ".join(f"{json.dumps(k)} = {toml(v)}" for k, v in thing.items()) + "}"
    if isinstance(thing, list):
        return "[" + ", ".join(map(toml, thing)) + "]"
    return json.dumps(thing) if isinstance(thing, str) else repr(thing)


nested = st.recursive(
    value, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(odd, inner, max_size=3), max_leaves=8
)
tables = st.dictionaries(
    st.sampled_from(SECTIONS) | odd, st.dictionaries(key, value | nested, max_size=4) | nested, max_size=4
)
spliced = st.tuples(st.integers(0, len(GOOD)), st.integers(0, 60), st.text(string.printable, max_size=20))
"""A place in a good file, how much is cut out there, and what is put in."""


@pytest.fixture
def survives() -> Callable[..., Any]:
    """Runs something; a `UserError` with one of some exit codes is well, anything else is not."""

    def attempt(do: Callable[[], Any], *codes: int, lines: int | None = 1) -> Any:
        found = None
        try:
            found = do()
        except UserError as error:
            message = str(error)
            assert error.exit_code in codes and message.strip(), (error.exit_code, message)
            assert lines is None or len(message.splitlines()) <= lines, message
        return found

    return attempt


def put(path: Path, content: bytes | str) -> Path:
    path.write_bytes(content.encode("utf-8", "surrogatepass") if isinstance(content, str) else content)
    return path


# Config files and command lines.


@given(tables)
@settings(max_examples=600, **MANY)
def test_no_table_makes_the_reader_of_config_files_stumble(tmp_path: Path, survives: Any, table: dict) -> None:
    text = "\n".join(f"{json.dumps(name)} = {toml(entries)}" for name, entries in table.items())
    file = put(tmp_path / "config.toml", text)
    survives(lambda: read_toml(file), CONFIG)


@given(st.lists(spliced, min_size=1, max_size=3) | st.binary(max_size=60))
@settings(max_examples=600, **MANY)
def test_no_damage_makes_the_reader_of_config_files_stumble(tmp_path: Path, survives: Any, damage: Any) -> None:
    text = damage if isinstance(damage, bytes) else GOOD
    for place, cut, new in damage if isinstance(damage, list) else ():
        text = text[:place] + new + text[place + cut :]
    survives(lambda: read_toml(put(tmp_path / "config.toml", text)), CONFIG)


@pytest.mark.parametrize(
    "text",
    [
        "a = " + "[" * 100_000,
        "a = " + "{b = " * 100_000,
        "[" + "a." * 5_000 + "a]",
        "[train]\nsteps = " + "9" * 100_000,
        "[train]\nsteps = 0x" + "f" * 100_000,
        "[train]\nsteps = 0000-99-99",
        "[train]\nsteps = 2024-01-01T00:00:00+99:99",
        "[run]\ndir = 'a\\\n",
        "\ufeff[train]\nsteps = 1",
        "[train]\n" * 2,
        "[train]\nsteps = 1\nsteps = 2",
        '[model]\n"a\\nb" = 1',
        "\r\r\r",
        "\x00",
        b"\xff\xfe\x00",
    ],
    ids=lambda text: repr(text[:24]),
)
def test_a_file_that_is_made_to_break_a_reader_is_one_line(text: str | bytes, tmp_path: Path, survives: Any) -> None:
    survives(lambda: parse_train([str(put(tmp_path / "config.toml", text))]), CONFIG)


@given(st.dictionaries(st.sampled_from(OPTIONS), value, max_size=4))
@settings(max_examples=50, **MANY)
def test_no_saved_config_makes_resuming_stumble(tmp_path: Path, survives: Any, entries: dict[str, Any]) -> None:
    """As `config.toml` of a run folder, and as the config within a checkpoint."""
    table: dict[str, dict[str, Any]] = {}
    for name, entry in entries.items():
        table.setdefault(name.split(".")[0], {})[name.split(".")[1]] = entry
    text = "\n".join(f"{name} = {toml(section)}" for name, section in table.items())
    put(tmp_path / "config.toml", text)
    found = survives(lambda: parse_train([f"--run.resume={tmp_path}"]), CONFIG, lines=len(entries) + 3)
    if found is not None:
        config, _ = found
        assert config.run.resume == config.run.dir == str(tmp_path)  # whatever the file says
        config = replace(config, run=replace(config.run, resume=""))
        assert parse_train([str(put(tmp_path / "again.toml", to_toml(config)))])[0] == config
    survives(lambda: from_saved(table, "state.json"), CHECKPOINT)


@given(st.lists(st.builds("--{}={}".format, option, value) | odd | option.map("--{}".format), max_size=2))
@settings(max_examples=60, **MANY)
def test_no_command_line_makes_the_parser_stumble(survives: Any, argv: list[str]) -> None:
    argv = [word.replace("\x00", "") for word in argv]  # which no system passes on

    def parse() -> None:
        with contextlib.suppress(SystemExit) if {"-h", "--help"} & {*argv} else contextlib.nullcontext():
            parse_train(argv)

    survives(parse, CONFIG, CHECKPOINT, lines=len(argv) + 3)


@pytest.mark.parametrize("option", ["run.resume", "log.prompts", "run.dir", "data.source"])
@pytest.mark.parametrize("name", ["x" * 5000, "a/" * 5000, "\udc80", "a\nb"], ids=lambda name: repr(name[:4]))
def test_no_name_of_a_file_makes_the_parser_stumble(option: str, name: str, survives: Any) -> None:
    survives(lambda: parse_train([f"--{option}={name}"]), CONFIG, CHECKPOINT)


@pytest.mark.parametrize("name", ["run.dir", "run.resume", "log.prompts", "data.source"])
def test_a_file_may_name_no_file_with_a_zero_in_it(name: str, tmp_path: Path, survives: Any) -> None:
    section, entry = name.split(".")
    put(tmp_path / "zero.toml", f'[{section}]\n{entry} = "a\\u0000b"\n')
    done = script("train.py", tmp_path / "zero.toml", "--train.steps=1")
    assert done.returncode in (CONFIG, DATA, CHECKPOINT) and "Traceback" not in done.stderr
    survives(lambda: None)


def test_a_config_file_does_not_resume_by_itself(tmp_path: Path) -> None:
    """Else a shared config would go on with some run of the reader's, or write into the folder where they stand."""
    put(tmp_path / "mine.toml", f'[run]\nresume = "{tmp_path}"\n')
    said(script("train.py", tmp_path / "mine.toml", "--train.steps=1"), CONFIG)


# Lines to watch and tokenizers.


line = st.text("fox hen", max_size=30) | st.text(max_size=30)


@given(st.lists(line | st.lists(line, max_size=5).map("\t".join), max_size=12))
@settings(max_examples=500, **MANY)
def test_no_lines_to_watch_make_their_reader_stumble(tmp_path: Path, survives: Any, rows: list[str]) -> None:
    own_file(put(tmp_path / "lines", "\n".join(rows)), survives)


@given(st.binary(max_size=100))
@settings(max_examples=200, **MANY)
def test_no_bytes_to_watch_make_their_reader_stumble(tmp_path: Path, survives: Any, raw: bytes) -> None:
    own_file(put(tmp_path / "lines", raw), survives)


def own_file(path: Path, survives: Any) -> None:
    words = CharTokenizer("\n abcdefghijklmnopqrstuvwxyz")
    context = 16
    found = survives(lambda: read_user_prompts(path, words, context), CONFIG)
    for _, tokens in found[0] if found else ():
        assert len(tokens) <= context


TOKENIZERS = [json.loads(one.to_json()) for one in (CharTokenizer(" abc\n"), tokenizer.ByteTokenizer())]
TOKENIZERS += [
    {"format": 1, "kind": "bpe", "merged": ["ab", "abc", "ca"]},
    {"format": 1, "kind": "tiktoken", "name": "gpt2"},
]
merged = st.lists(st.text("abc\xff\u0100", min_size=0, max_size=4), max_size=5)


@given(
    st.sampled_from(TOKENIZERS),
    st.dictionaries(
        st.sampled_from(["format", "kind", "characters", "merged", "name", "sha256", "extra"]),
        st.none() | st.integers() | st.text(max_size=4) | st.lists(st.integers(), max_size=3) | merged,
        max_size=3,
    ),
)
@settings(max_examples=700, **MANY)
def test_no_tokenizer_makes_its_reader_stumble(tmp_path: Path, survives: Any, saved: dict, changes: dict) -> None:
    read_tokenizer(put(tmp_path / "tokenizer.json", json.dumps(saved | changes)), survives)


@given(st.sampled_from(TOKENIZERS), st.integers(0, 80), st.binary(max_size=6))
@settings(max_examples=300, **MANY)
def test_no_damaged_tokenizer_makes_its_reader_stumble(
    tmp_path: Path, survives: Any, saved: dict, place: int, new: bytes
) -> None:
    raw = json.dumps(saved).encode()
    read_tokenizer(put(tmp_path / "tokenizer.json", raw[:place] + new + raw[place + len(new) :]), survives)


@pytest.mark.parametrize(
    "raw",
    [
        b"[" * 100_000,
        b'{"format": 1, "kind": ' + b"[" * 100_000,
        b'{"format": 1, "kind": "char", "characters": "\\ud800"}',
        b'{"format": 1, "kind": "bpe", "merged": [' + b'"ab",' * 100_000 + b'"ab"]}',
        b'{"format": 1, "kind": "bpe", "merged": ["' + b"a" * 1_000_000 + b'"]}',
        b'{"format": ' + b"9" * 5_000 + b"}",
        b"\x80\x04.",
    ],
    ids=lambda raw: repr(raw[:40]),
)
def test_a_tokenizer_that_is_made_to_break_a_reader_is_one_line(raw: bytes, tmp_path: Path, survives: Any) -> None:
    read_tokenizer(put(tmp_path / "tokenizer.json", raw), survives)


def read_tokenizer(path: Path, survives: Any) -> None:
    found = survives(lambda: tokenizer.load_tokenizer(path), CHECKPOINT, DATA)
    if found is not None and found.name != "gpt2":
        text = found.decode(range(found.vocab_size))
        with contextlib.suppress(UserError):  # a character that is not in the vocabulary
            assert all(0 <= token < found.vocab_size for token in found.encode(text + "a b"))


# A run folder from a stranger.


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("stranger")
    (root / "fox.txt").write_text("The quick brown fox jumps over the lazy dog. " * 40)
    done = script("train.py", *TINY, f"--data.source={root / 'fox.txt'}", f"--run.dir={root / 'run'}")
    assert done.returncode == 0, done.stderr
    return root / "run"


LINKS = [
    "attention",
    "attention/000003.safetensors",
    "attention/000006.safetensors",
    "attention/ablations.json",
    "attention.html",
    "checkpoints",
    "checkpoints/000003",
    "checkpoints/000009",
    "checkpoints/000006/state.json",
    "samples.txt",
    "metrics.jsonl",
    "metrics.writing",
    "config.writing",
    "loss.png",
    "lock",
    "wandb",
    "figures",
]
"""Names in a run folder at which something is written sooner or later."""


def planted(run: Path, tmp_path: Path, name: str, target: str = "") -> tuple[Path, Path]:
    """A copy of the run with a link at `name`, and the folder beside it that the link leads to, filled."""
    folder, outside = tmp_path / "run", tmp_path / "outside"
    shutil.copytree(run, folder)
    outside.mkdir()
    (outside / "precious").write_text("as it was")
    place = folder / name
    if place.is_dir():
        shutil.copytree(place, outside / "kept")
        shutil.rmtree(place)
        aim = outside / "kept"
    elif place.is_file():
        aim = outside / "kept"
        place.replace(aim)
    else:
        aim = outside if name in ("wandb", "figures", "checkpoints/000009") else outside / "precious"
    place.symlink_to(target or aim)
    return folder, outside


def content(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("name", LINKS)
def test_training_writes_through_no_link(name: str, run: Path, tmp_path: Path) -> None:
    folder, outside = planted(run, tmp_path, name)
    before = content(outside)
    done = script("train.py", f"--run.resume={folder}", "--train.steps=7")
    assert content(outside) == before
    assert name.split("/")[0] in said(done, CHECKPOINT)


@pytest.mark.parametrize("name", ["attention", "attention.html", "figures", "attention/ablations.json", "loss.png"])
@pytest.mark.parametrize("command", [("page",), ("figures",), ("evidence",), ()], ids=str)
def test_looking_writes_through_no_link(command: tuple[str, ...], name: str, run: Path, tmp_path: Path) -> None:
    folder, outside = planted(run, tmp_path, name)
    before = content(outside)
    done = script("attend.py", *command, folder)
    assert content(outside) == before
    said(done, CHECKPOINT)


@pytest.mark.parametrize("target", ["samples.txt", "nowhere", "/", "/nowhere/at/all", "/dev/zero"])
def test_links_to_nowhere_and_in_circles_are_refused(target: str, run: Path, tmp_path: Path) -> None:
    """`samples.txt -> samples.txt` leads to itself. A link within the folder, to nowhere, is no danger."""
    folder, _ = planted(run, tmp_path, "samples.txt", target)
    done = script("train.py", f"--run.resume={folder}", "--train.steps=7")
    codes = (0,) if target == "nowhere" else (CHECKPOINT, DISK_OR_MEMORY)
    assert "Traceback" not in done.stderr and done.returncode in codes, done.stderr


@pytest.mark.parametrize(
    "name", ["samples.txt", "metrics.jsonl", "attention/000006.safetensors", "attention/findings.json"]
)
@pytest.mark.parametrize("kind", ["pipe", "folder"])
def test_what_is_no_file_does_not_hang_a_reader(kind: str, name: str, run: Path, tmp_path: Path) -> None:
    """A pipe, which nobody ever writes into, or a folder where a file belongs."""
    folder = tmp_path / "run"
    shutil.copytree(run, folder)
    (folder / name).unlink()
    os.mkfifo(folder / name) if kind == "pipe" else (folder / name).mkdir()
    for argv in (("attend.py", "summary", folder), ("attend.py", "page", folder)):
        done = script(*argv)
        assert done.returncode in (0, CHECKPOINT) and "Traceback" not in done.stderr, done.stderr


@pytest.mark.parametrize("name", ["samples.txt", "metrics.jsonl", "lock", "attention/eval_texts.json"])
@pytest.mark.parametrize("kind", ["pipe", "folder"])
def test_what_is_no_file_does_not_hang_training(kind: str, name: str, run: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    shutil.copytree(run, folder)
    (folder / name).unlink()
    os.mkfifo(folder / name) if kind == "pipe" else (folder / name).mkdir()
    done = process("train.py", f"--run.resume={folder}", "--train.steps=7", timeout=60)
    assert done.returncode in (CHECKPOINT, DISK_OR_MEMORY) and "Traceback" not in done.stderr, done.stderr


def test_the_good_config_is_good() -> None:
    """Else damage to it would prove nothing."""
    assert {f"{section}.{name}" for section, entries in tomllib.loads(GOOD).items() for name in entries} == {*OPTIONS}
