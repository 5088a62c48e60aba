"""Recording promises: each row is the one that produced the next token, and recording changes no token."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from common.errors import CONFIG, DISK_OR_MEMORY, UserError
from inspection import generation
from inspection.attention_file import read_attention_file
from inspection.generation import Generated, attention_file, check_size, recording, triangle
from inspection.verify import verify_dump
from model.config import ATTENTION_IMPLEMENTATIONS, AttentionImplementation, ModelConfig
from model.generate import generate, window_start
from model.gpt import GPT, AttentionWeights
from model.gpt import CausalSelfAttention as Attention
from tests.model.checks import PRESETS, VOCAB, modules_of, random_model, random_tokens, recorded
from tests.runs import TINY, said, script

CONTEXT = 12
HASHES = {"weights_sha256": "w", "tokenizer_sha256": "t"}


def write_and_record(
    model: GPT, prompt: Tensor, count: int, dtype: str = "f32", use_cache: bool = True
) -> tuple[list[int], Generated]:
    """What was written after the prompt, and what was seen on the way."""
    generator = torch.Generator().manual_seed(3)
    with recording(model, prompt[0].tolist(), count, dtype) as recorder:
        for tokens in generate(model, prompt, count, generator, use_cache=use_cache):
            recorder.drawn.append(tokens.tolist())
    return [tokens[0] for tokens in recorder.drawn], recorder.generated()


def full(packed: np.ndarray, T: int) -> np.ndarray:
    whole = np.zeros((*packed.shape[:2], T, T), dtype=np.float32)
    whole[:, :, *np.tril_indices(T)] = packed
    return whole


@torch.no_grad()
def read_anew(model: GPT, window: list[int]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Weights (L, H, T, T), value norms (L, H, T) and log p (T, V), by hooks of the test's own."""
    values: list[Tensor] = []
    hooks = [m.qkv.register_forward_hook(lambda m, x, out: values.append(out[0])) for m in modules_of(model, Attention)]
    with recorded(model) as seen:
        logits = model(torch.tensor([window]))[0]
    for hook in hooks:
        hook.remove()
    norms = torch.zeros(model.config.n_layers, model.config.n_heads, len(window))
    for layer, attention in enumerate(modules_of(model, Attention)):
        H, G, D = attention.n_heads, attention.n_kv_heads, attention.d_head
        v = values[layer][:, (H + G) * D :].unflatten(-1, (G, D))
        for head in range(H):
            handed = v[:, head * G // H] @ attention.out.weight[:, head * D : (head + 1) * D].T
            norms[layer, head] = handed.norm(dim=-1)
    return torch.stack(seen)[:, 0].numpy(), norms.numpy(), logits.log_softmax(-1).numpy()


def row_by_row(model: GPT, text: list[int], prompt: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The same of a whole text, its window read anew for each token.

    The prompt's rows are those of its first reading. Nothing before that reading's window is there.
    """
    begin = window_start(prompt, model.config.context)
    T, heads = len(text) - begin, (model.config.n_layers, model.config.n_heads)
    weights, norms, chances = np.zeros((*heads, T, T)), np.zeros((*heads, T)), np.zeros((T, model.vocab_size))
    for end in range(prompt, len(text) + 1):
        start = window_start(end, model.config.context)
        first = begin if end == prompt else end - 1
        pattern, lengths, log_p = read_anew(model, text[start:end])
        weights[..., first - begin : end - begin, start - begin : end - begin] = pattern[..., first - start :, :]
        norms[..., first - begin : end - begin] = lengths[..., first - start :]
        chances[first - begin : end - begin] = log_p[first - start :]
    return weights, norms, chances


READINGS = [(preset, prompt, count, True) for preset in PRESETS for prompt, count in ((3, 6), (3, 28), (30, 8))]


@pytest.mark.parametrize(("preset", "prompt", "count", "use_cache"), [*READINGS, ("gpt2", 12, 12, False)])
def test_each_row_is_that_of_reading_the_window_anew(preset: str, prompt: int, count: int, use_cache: bool) -> None:
    """Within the context of 12, far past it (and the window has just moved), and after a prompt longer than it."""
    model, start = random_model(preset, context=CONTEXT), random_tokens(1, prompt)
    written, seen = write_and_record(model, start, count, use_cache=use_cache)
    text = start[0].tolist() + written
    weights, norms, log_p = row_by_row(model, text, prompt)
    T = len(weights[0, 0])
    assert seen.tokens.tolist() == text[-T:] and len(written) == count
    assert np.abs(full(seen.pattern_tril, T) - weights).max() <= 1e-5
    np.testing.assert_allclose(seen.value_norms, norms, rtol=1e-5)
    expected = -log_p[np.arange(T - 1), seen.tokens[1:]]
    np.testing.assert_allclose(seen.loss, expected, atol=2e-5)
    np.testing.assert_allclose(seen.top_p, np.sort(np.exp(log_p), axis=-1)[:, :-6:-1], atol=1e-5)
    np.testing.assert_allclose(np.exp(log_p)[np.arange(T)[:, None], seen.top], seen.top_p, atol=1e-5)
    starts = [
        window_start(max(end, prompt), CONTEXT) - (len(text) - T) for end in range(len(text) - T + 1, len(text) + 1)
    ]
    assert [max(s for q, s in seen.windows if q <= i) for i in range(T)] == starts
    assert weights.max() > 0.5


@pytest.mark.parametrize("face", ATTENTION_IMPLEMENTATIONS)
@pytest.mark.parametrize("preset", PRESETS)
def test_recording_changes_no_token_and_leaves_no_trace(preset: str, face: AttentionImplementation) -> None:
    model, prompt = random_model(preset, face, context=CONTEXT, dropout=0.5), random_tokens(1, 3)
    model.blocks[1].train()

    def state() -> list[object]:
        parts = [(m.training, m.__dict__.get("sdpa"), len(m._forward_hooks)) for m in model.modules()]
        return [parts, len(model._forward_pre_hooks), torch.get_rng_state().tolist()]

    before = state()
    written, _ = write_and_record(model, prompt, 20)
    assert state() == before
    model.eval()
    for block in model.blocks:
        block.attention.fused = False
    plain = generate(model, prompt, 20, torch.Generator().manual_seed(3))
    assert written == [int(token) for (token,) in plain]


def test_an_error_on_the_way_leaves_no_trace() -> None:
    model = random_model("glass", context=CONTEXT)
    with pytest.raises(KeyError), recording(model, [1, 2], 5):
        raise KeyError
    assert not model._forward_hooks and not model._forward_pre_hooks
    assert not any(weights._forward_hooks for weights in modules_of(model, AttentionWeights))


def test_one_text_at_a_time() -> None:
    model = random_model("glass", context=CONTEXT)
    with pytest.raises(ValueError, match="2 texts"):
        write_and_record(model, random_tokens(2, 3), 4)


def test_without_a_token_to_write_the_prompt_is_recorded() -> None:
    model, prompt = random_model("gpt2", context=CONTEXT), random_tokens(1, 5)
    written, seen = write_and_record(model, prompt, 0)
    weights, _, _ = row_by_row(model, prompt[0].tolist(), 5)
    assert not written and np.abs(full(seen.pattern_tril, 5) - weights).max() <= 1e-5


def metadata(model: GPT) -> dict[str, str]:
    from dataclasses import asdict

    config = json.dumps(asdict(model.config))
    return {"config": config, "vocab_size": str(VOCAB), "step": "8", "tokens_seen": "64", **HASHES}


@pytest.mark.parametrize(("dtype", "count"), [("f16", 25), ("f32", 6)])
def test_the_file_is_an_attention_file_that_verifies(tmp_path: Path, dtype: str, count: int) -> None:
    model = random_model("qwen3", context=CONTEXT)
    written, seen = write_and_record(model, random_tokens(1, 3), count, dtype)
    generation.write(tmp_path / "file", seen, lambda token: b"%d " % token, metadata(model))
    dump = read_attention_file(tmp_path / "file")
    (text,) = dump.texts
    assert text.name == "sample" and text.tokens[3:].tolist() == written
    assert text.token_bytes == [b"%d " % token for token in text.tokens]
    assert text.pattern_tril.shape == (2, 6, triangle(count + 3)) and 8 * text.pattern_tril.itemsize == int(dtype[1:])
    assert text.top is not None and text.top[0][0][0] == b"%d " % seen.top[0, 0]
    assert {"config", "weights_sha256", "versions", "windows"} <= set(dump.metadata)
    findings = verify_dump(dump, model, HASHES)
    assert all(finding.ok for finding in findings), [f for f in findings if not f.ok]
    assert "attention recomputed" in {finding.name for finding in findings}


def test_too_long_a_text_is_refused_with_what_would_fit() -> None:
    config = ModelConfig(n_layers=12, n_heads=12, d_model=768, context=1024)
    with pytest.raises(UserError, match=r"take --tokens (\d+) or fewer") as caught:
        check_size(config, 100, 10_000, "f16")
    assert caught.value.exit_code == CONFIG
    fitting = int(str(caught.value).split("--tokens ")[1].split()[0])
    check_size(config, 100, fitting, "f16")
    assert 144 * 2 * triangle(100 + fitting) <= 2 * 2**30
    with pytest.raises(UserError):
        check_size(config, 100, fitting + 2, "f16")
    check_size(config, 5000, 1000, "f16")  # of a long prompt the end is read


def test_the_name_of_the_file(tmp_path: Path) -> None:
    assert attention_file(f"{tmp_path}/a/b") == tmp_path / "a" / "b.safetensors"
    assert attention_file(f"{tmp_path}/c.safetensors") == tmp_path / "c.safetensors"
    assert (tmp_path / "a").is_dir()


def test_names_that_cannot_be_written_are_refused(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"somebody's weights")
    for name, words, code in (
        ("weights.json", "weights.safetensors", CONFIG),
        ("model", "no attention file", CONFIG),
        ("", "a folder", CONFIG),
        ("model.safetensors/x", "cannot write into", DISK_OR_MEMORY),
    ):
        with pytest.raises(UserError, match=words) as caught:
            attention_file(f"{tmp_path}/{name}")
        assert caught.value.exit_code == code
    assert (tmp_path / "model.safetensors").read_bytes() == b"somebody's weights"


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("generation")
    (root / "text.txt").write_text("The fox met the hen. The hen met the fox. " * 30)
    done = script("train.py", *TINY, f"--data.source={root / 'text.txt'}", f"--run.dir={root / 'run'}")
    assert done.returncode == 0, done.stderr
    return root / "run"


def test_sample_prints_the_same_text_and_writes_the_file(run: Path, tmp_path: Path) -> None:
    options = ("--prompt=The fox", "--tokens=40", "--temperature=1.5")
    plain, attended = (script("sample.py", run, *options, *more) for more in ((), (f"--attend={tmp_path / 'file'}",)))
    assert attended.returncode == 0, attended.stderr
    assert attended.stdout == plain.stdout and str(tmp_path / "file.safetensors") in attended.stderr
    dump = read_attention_file(tmp_path / "file.safetensors")
    (text,) = dump.texts
    assert b"".join(text.token_bytes).decode() == plain.stdout[:-1]
    assert dump.metadata["step"] == "6"
    again = script("sample.py", run, *options, f"--attend={tmp_path / 'file'}")
    assert again.returncode == 0, "an attention file may be replaced"


def test_sample_refuses_what_cannot_be_recorded(run: Path, tmp_path: Path) -> None:
    assert "--samples is 3" in said(script("sample.py", run, f"--attend={tmp_path / 'x'}", "--samples=3"), 2)
    assert "cannot write into" in said(script("sample.py", run, "--attend=/proc/nowhere/x"), 6)
    assert "--tokens" in said(script("sample.py", run, f"--attend={tmp_path / 'x'}", "--tokens=90000"), 2)
    assert not list(tmp_path.iterdir())
