"""Checkpoints: whole or absent, verified before anything older goes, and never trusted when they are read."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from common.errors import CHECKPOINT, UserError, escape_control_chars
from data.tokenizer import CharTokenizer
from model.gpt import GPT
from tests.training.checkpoints import ENVIRONMENT, SHAPE, bounded_memory, changed, saved, tensors, vouch
from training import checkpoint, device
from training.checkpoint import FILES, MANIFEST, RunEnvironment, list_checkpoints, open_checkpoint
from training.config import RunConfig

MACHINE = device.DistContext(torch.device("cpu"), torch.float32)


def test_a_checkpoint_comes_back_as_it_was(tmp_path: Path) -> None:
    folder = saved(tmp_path)
    found = open_checkpoint(tmp_path)
    assert found.folder == folder and found.state.step == 3 and found.environment == ENVIRONMENT and found.documents
    assert found.config == RunConfig(model=SHAPE)
    weights, moments = tensors()
    for now, before in ((found.weights(), weights), (found.optimizer_state(), moments)):
        assert now.keys() == before.keys() and all(torch.equal(now[k], before[k]) for k in now)
    model = found.load_model(MACHINE)
    assert checkpoint.sha256_of_weights(model) == checkpoint.sha256_of_weights(GPT(SHAPE, found.vocab_size))
    assert model.lm_head.weight is model.token_embedding.weight and not model.training
    assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == ["000003"]


@pytest.mark.parametrize("name", [*FILES, "manifest.json"])
def test_a_flipped_bit_or_a_cut_in_any_file_is_noticed(name: str, tmp_path: Path) -> None:
    good = saved(tmp_path, 3)
    bad = saved(tmp_path, 4) / name
    content = bad.read_bytes()
    for damaged in (content[:-1], content[: len(content) // 2], b""):
        bad.write_bytes(damaged)
        assert open_checkpoint(tmp_path).folder == good
    if name != "manifest.json":
        flipped = bytearray(content)
        flipped[len(flipped) // 2] ^= 1
        bad.write_bytes(flipped)
        assert open_checkpoint(tmp_path).folder == good


def refused(run: Path) -> str:
    """The one line that says why nothing can be made of a run's checkpoints, up to their weights and tokenizer."""
    with pytest.raises(UserError) as caught:
        found = open_checkpoint(run)
        found.tokenizer()
        found.optimizer_state()
        found.load_model(MACHINE)
    line = str(caught.value)
    assert caught.value.exit_code == CHECKPOINT and line == escape_control_chars(line), line
    return line


HUGE = 10**12
ABSURD = (
    *({"model": {name: value}} for name in ("n_layers", "d_model", "n_heads", "d_mlp") for value in (3, 10**9, HUGE)),
    *({"model": {"context": value}} for value in (HUGE, 10**18, 10**30)),
    *({"model": change} for change in ({"n_layers": -4}, {"preset": "gpt2"}, {"d_head": 4})),
    *({"vocab_size": value} for value in (0, -1, 256, HUGE, 10**30, "many", None, True, 257.0)),
    *({"state": {"step": value}} for value in (-1, "3", True, 3.0, None, 4, 10**30)),
    *({"state": {"best_loss": value}} for value in (float("nan"), float("inf"), "1", 10**400)),
    {"state": {"tokens_seen": True}},
    *({"state": {name: -1}} for name in ("tokens_seen", "best_step", "stale", "skipped")),
    *({"origin": {name: 7}} for name in ("documents", "data", "how")),
    *({"origin": {"how": {"device": 7}}}, {"state": {"bogus": 1}}, {"optim": {"lr": -1}}),
    *({name: value} for name in ("config", "state", "origin", "format") for value in (7, None, [1])),
    {"format": 2},
)


@pytest.mark.parametrize("change", ABSURD, ids=str)
def test_an_absurd_state_takes_neither_time_nor_memory(change: dict[str, object], tmp_path: Path) -> None:
    """What the manifest vouches for may still be a lie: nothing is built before it is held against the weights."""
    folder = saved(tmp_path)
    changed(folder, **change)
    with bounded_memory():
        refused(tmp_path)


def test_a_context_that_only_the_config_shows_is_bounded(tmp_path: Path) -> None:
    """`KVCache` takes memory for all of it; a million tokens of a small model are still believed."""
    folder = saved(tmp_path)
    changed(folder, model={"context": 1 << 20})
    assert open_checkpoint(tmp_path).config.model.context == 1 << 20
    changed(folder, model={"context": 1 << 30})
    assert "context of 1,073,741,824 tokens" in refused(tmp_path)


def replaced(name: str, change: Callable[[dict[str, Tensor]], object], folder: Path) -> None:
    """Change the tensors of a file, and vouch for it."""
    found = load_file(folder / name)
    change(found)
    save_file(found, folder / name)
    vouch(folder)


NORM, UP = "final_norm.weight", "blocks.1.mlp.up.weight"
CHANGES: dict[str, Callable[[dict[str, Tensor]], object]] = {
    "is nan": lambda t: t[f"{UP}"].view(-1)[5:6].fill_(float("nan")),
    "is infinite": lambda t: t[f"{NORM}"].fill_(-float("inf")),
    "is missing": lambda t: t.pop(UP),
    "is one too many": lambda t: t.update({"blocks.2.mlp.up.weight": torch.zeros(2)}),
    "has another name": lambda t: t.update({"blocks.01.mlp.up.weight": t.pop(UP)}),
    "has an unprintable name": lambda t: t.update({"\x1b[31m\n": t.pop(UP)}),
    "has another shape": lambda t: t.update({UP: t[UP].T.contiguous()}),
    "has no dimension": lambda t: t.update({UP: torch.tensor(1.0)}),
    "is half": lambda t: t.update({NORM: t[NORM].half()}),
    "is double": lambda t: t.update({NORM: t[NORM].double()}),
    "is whole": lambda t: t.update({NORM: t[NORM].long()}),
}


@pytest.mark.parametrize("change", CHANGES)
def test_weights_that_are_not_the_models_are_refused(change: str, tmp_path: Path) -> None:
    replaced("model.safetensors", CHANGES[change], saved(tmp_path))
    assert "model.safetensors" in refused(tmp_path)


@pytest.mark.parametrize("change", sorted(set(CHANGES) - {"is missing", "has no dimension"}))
def test_moments_that_are_not_the_models_are_refused(change: str, tmp_path: Path) -> None:
    """Which of them there are is the optimizer's to say."""

    def moments(tensors: dict[str, Tensor]) -> None:
        entries = {
            name: tensors.pop(f"{name}/exp_avg") for name in [n.partition("/")[0] for n in tensors if "/exp" in n]
        }
        CHANGES[change](entries)
        tensors.update({f"{name}/exp_avg": value for name, value in entries.items()})

    replaced("optimizer.safetensors", moments, saved(tmp_path))
    assert "optimizer.safetensors" in refused(tmp_path)


def test_a_tokenizer_of_another_size_is_refused(tmp_path: Path) -> None:
    folder = saved(tmp_path)
    CharTokenizer("abc").save(folder / "vocabulary.json")
    vouch(folder)
    assert "4 tokens" in refused(tmp_path)


@pytest.mark.parametrize("name", [*FILES, "manifest.json"])
@pytest.mark.parametrize("how", ["link", "pipe", "folder", "missing"])
def test_a_file_that_is_none_is_neither_followed_nor_waited_for(name: str, how: str, tmp_path: Path) -> None:
    folder = saved(tmp_path)
    path = folder / name
    path.rename(tmp_path / "elsewhere")
    if how == "link":
        path.symlink_to(tmp_path / "elsewhere")
    elif how == "pipe":
        os.mkfifo(path)
    elif how == "folder":
        path.mkdir()
    if name != MANIFEST and how != "missing":  # the manifest knows how long a link is
        manifest = json.loads((folder / MANIFEST).read_text())
        manifest["files"][name]["bytes"] = path.lstat().st_size
        (folder / MANIFEST).write_text(json.dumps(manifest))
    assert "no checkpoint" in refused(tmp_path)


@pytest.mark.parametrize("name", ["manifest.json", "state.json"])
@pytest.mark.parametrize("content", ["[" * 100_000, " " * (1 << 23), "{}", "[]", "7", '{"files": 7}', "\0", "1" * 5000])
def test_json_that_is_none_of_ours_is_refused(name: str, content: str, tmp_path: Path) -> None:
    folder = saved(tmp_path)
    (folder / name).write_text(content)
    if name == "state.json":
        vouch(folder)
    refused(tmp_path)


def test_a_state_too_large_to_be_one_is_not_read(tmp_path: Path) -> None:
    folder = saved(tmp_path)
    with (folder / "state.json").open("a") as file:
        file.write(" " * (5 << 20))
    vouch(folder)
    assert "bytes of JSON" in refused(tmp_path)


def test_a_folder_named_after_another_step_is_refused(tmp_path: Path) -> None:
    """The steps that come after it would be taken for newer; under any other name it is welcome."""
    folder = saved(tmp_path, 3)
    shutil.copytree(folder, tmp_path / "the best")
    assert open_checkpoint(tmp_path / "the best").state.step == 3
    folder.rename(folder.with_name("000007"))
    assert "holds step 3" in refused(tmp_path)


@pytest.mark.parametrize("path", ["x" * 5000, "nowhere\x1b[31m", "a\0b", "/dev/null"])
def test_a_path_that_is_no_folder_is_refused(path: str) -> None:
    assert refused(Path(path)).isprintable()


def test_only_whole_steps_are_steps(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    root = saved(tmp_path, 3).parent
    for name in ("00040\x1b[31m", "7", "0000007", "٠٠٠٠٠٤", "-00001", "1e1000", ".writing-000009", "9" * 200):
        (root / name).mkdir()
    (root / "000009").write_text("a file")
    assert [path.name for path in list_checkpoints(root)] == ["000003"] and open_checkpoint(tmp_path).state.step == 3
    assert capfd.readouterr().err == ""


def test_what_verifies_but_cannot_be_used_is_passed_over_by_name(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run\x1b[31m"
    saved(run, 3)
    changed(saved(run, 4), vocab_size=10**9)
    assert open_checkpoint(run).state.step == 3
    said = capfd.readouterr().err
    assert said.startswith("passing over") and "000004" in said and "\x1b" not in said and said.count("\n") == 1


def test_a_checkpoint_from_before_origins_is_read(tmp_path: Path) -> None:
    folder = saved(tmp_path)
    state = json.loads((folder / "state.json").read_text())
    del state["origin"], state["state"]["evaluated"]
    (folder / "state.json").write_text(json.dumps({**state, "documents": False}))
    vouch(folder)
    found = open_checkpoint(tmp_path)
    assert found.environment == RunEnvironment(False) and found.state.last_eval_step == -1


def test_tensors_outlive_their_file(tmp_path: Path) -> None:
    """A run that was resumed rotates out the checkpoint that it came from, perhaps on a disk that is not its own."""
    found = open_checkpoint(saved(tmp_path))
    weights = found.weights()
    (found.folder / "model.safetensors").write_bytes(b"")
    assert all(torch.equal(weights[name], value) for name, value in tensors()[0].items())
