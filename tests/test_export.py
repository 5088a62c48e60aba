"""export.py: what transformers and gguf read is what was trained."""

import json
import logging
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import export
from tests.runs import TINY, error_line, script
from tests.test_pretrained import save_model
from training.device import get_dist_context
from training.pretrained import open_model

TEXT = "\n<|endoftext|>\n".join(
    ["The fox met the hen. The hen saw the fox.", "Ünder the 🌳 a hen ran. The fox met it."] * 40
)
PROMPT = "The hen met"


@pytest.fixture(scope="module", params=["gpt2 bpe", "qwen3 byte", "llama char", "glass bpe", "qwen3 gpt2"])
def run(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    preset, tokenizer = request.param.split()
    folder = tmp_path_factory.mktemp("export")
    (folder / "text.txt").write_text(TEXT, encoding="utf-8")
    options = [
        f"--model.preset={preset}",
        f"--data.tokenizer={tokenizer}",
        "--data.vocab_size=280",
        "--log.attention=off",
    ]
    done = script("train.py", *TINY, *options, f"--data.source={folder / 'text.txt'}", f"--run.dir={folder / 'run'}")
    if "cannot download" in done.stderr:
        pytest.skip("TIKTOKEN_CACHE_DIR has no files of gpt2")
    assert done.returncode == 0, done.stderr
    return folder / "run"


def load_with_transformers(folder: Path, caplog: pytest.LogCaptureFixture) -> tuple[Any, Any]:
    """Model and tokenizer; a warning is a failure."""
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging as transformers_logging

    transformers_logging.enable_propagation()
    trust = "auto_map" in json.loads((folder / "config.json").read_text())
    with warnings.catch_warnings(), caplog.at_level(logging.WARNING):
        warnings.simplefilter("error")
        model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=trust).eval()
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=trust)
    assert not caplog.records, caplog.text
    return model, tokenizer


def test_transformers_writes_the_same_greedy_text(run: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    done = script("export.py", run, tmp_path / "out")
    assert done.returncode == 0 and "the same logits and token ids" in done.stdout, done.stderr
    card = (tmp_path / "out" / "README.md").read_text("utf-8")
    assert "held-out loss, this model: " in card and "trained on `text.txt`" in card and str(run.parent) not in card
    model, tokenizer = load_with_transformers(tmp_path / "out", caplog)
    ids = tokenizer(PROMPT, return_tensors="pt")
    ours = open_model(run).load_model(get_dist_context("fp32"))
    with torch.no_grad():
        assert torch.allclose(model(**ids).logits, ours(ids["input_ids"]), atol=1e-5)
    n_tokens = 16 - ids["input_ids"].shape[1]  # what fits into the context
    written = model.generate(**ids, max_new_tokens=n_tokens, do_sample=False)[0]
    text = script("sample.py", run, f"--prompt={PROMPT}", "--temperature=0", f"--tokens={n_tokens}").stdout
    assert text == tokenizer.decode(written, skip_special_tokens=True) + "\n"
    assert script("sample.py", tmp_path / "out", f"--prompt={PROMPT}", "--tokens=3").returncode == 0


@pytest.mark.parametrize("kind", ["gpt2", "qwen3"])
def test_foreign_weights_go_out_with_equal_bits(kind: str, tmp_path: Path) -> None:
    save_model(tmp_path / "foreign", kind)
    assert script("export.py", tmp_path / "foreign", tmp_path / "out").returncode == 0
    before, after = (load_file(tmp_path / name / "model.safetensors") for name in ("foreign", "out"))
    assert before.keys() == after.keys() and all(before[name].equal(after[name]) for name in before)
    texts = [(tmp_path / name / "tokenizer.json").read_text("utf-8") for name in ("foreign", "out")]
    assert json.loads(texts[0]) == json.loads(texts[1])


@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16"])
def test_gguf_reads_back_equal(run: Path, dtype: str, tmp_path: Path) -> None:
    import gguf

    done, path = script("export.py", run, tmp_path / "m.gguf", "--format=gguf", f"--dtype={dtype}"), tmp_path / "m.gguf"
    preset = json.loads((next((run / "checkpoints").iterdir()) / "state.json").read_text())["config"]["model"]["preset"]
    if preset not in ("gpt2", "qwen3"):
        assert f"no preset {preset}" in error_line(done, 2) and not list(tmp_path.iterdir())
        return
    assert done.returncode == 0 and "read back equal" in done.stdout, done.stderr
    assert script("export.py", run, tmp_path / "out", f"--dtype={dtype}").returncode == 0
    weights, reader = load_file(tmp_path / "out" / "model.safetensors"), gguf.GGUFReader(path)
    names = {tensor.name: tensor for tensor in reader.tensors}
    theirs = names["blk.1.ffn_down.weight"]
    ours = next(
        w.float().numpy() for n, w in weights.items() if n.endswith(("1.mlp.down_proj.weight", "1.mlp.c_proj.weight"))
    )
    assert np.array_equal(gguf.quants.dequantize(theirs.data, theirs.tensor_type), ours.T if preset == "gpt2" else ours)
    assert reader.fields["tokenizer.ggml.pre"].contents() == "gpt-2"
    vocab = json.loads((tmp_path / "out" / "tokenizer.json").read_text("utf-8"))["model"]["vocab"]
    tokens = reader.fields["tokenizer.ggml.tokens"].contents()
    assert {token: i for i, token in enumerate(tokens)} == vocab


def test_nothing_is_left_if_an_export_fails(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "taken").mkdir()
    assert "exists already" in error_line(script("export.py", run, tmp_path / "taken"), 2)
    monkeypatch.setattr("training.export.check_huggingface", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        export.main([str(run), str(tmp_path / "out")])
    assert [path.name for path in tmp_path.iterdir()] == ["taken"]
    assert "out is missing" in error_line(script("export.py", run), 2)


def test_difference_is_found(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from data.tokenizer import ByteTokenizer

    class Shifted(ByteTokenizer):
        def _encode(self, text: str) -> np.ndarray:
            return super()._encode(text)[::-1]

    monkeypatch.setattr("training.export.load_huggingface_tokenizer", lambda folder, size: Shifted())
    assert "gives other token ids" in error_line(script("export.py", run, tmp_path / "out"), 4)
    monkeypatch.setattr("training.export.LOGIT_TOLERANCE", -1.0)
    assert "logits differ by" in error_line(script("export.py", run, tmp_path / "out"), 4)
    assert not list(tmp_path.iterdir())
