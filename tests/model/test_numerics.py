"""How exactly the numbers agree: the model with itself, written in other ways.

| what                                                             | tolerance                      | tested in        |
|------------------------------------------------------------------|--------------------------------|------------------|
| gradients against finite differences, whole tiny model, fp64     | atol 1e-6, rtol 1e-4           | here             |
| fused kernels against written-out ones, logits                   | fp32 1e-5; bf16 2e-2 relative  | here             |
| the same, gradients in fp32                                      | 1e-5 relative                  | here             |
| the same, each operation alone, by value                         | fp32 1e-5; bf16 2e-2           | test_ops.py      |
| cache against none: in pieces, batch > 1, up to the context      | 1e-5                           | here             |
| cache against none: at and past the context; greedy, 256 tokens  | 1e-5; equal ids                | test_generate.py |
| compiled against eager, logits                                   | 1e-5                           | here             |
| an edit at t changes logits before t                             | exactly 0, written-out kernels | here             |
| micro-batches, two and four processes against one                | 1e-6                           | parallel/        |
| resumed against not interrupted; evaluating, logging on and off  | equal bits                     | test_resume.py   |

In bf16 whole logits are measured by their size: eight bits of precision, rounded a dozen times on the way, are off by
more than 2e-2 in single logits of size 3, whichever kernels compute them (up to 9e-2 against fp32).
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.func import functional_call

from model.config import ATTENTION_IMPLEMENTATIONS, AttentionImplementation, ModelConfig
from model.gpt import GPT
from tests.model.checks import (
    PRESETS,
    SHAPES,
    Preset,
    check_cache,
    check_causality,
    random_model,
    random_tokens,
    relative_difference,
    same,
)
from tests.runs import ROOT
from training.device import DistContext, compile_model

SEEDS = (1, 2, 3)


@pytest.mark.parametrize("face", ["eager", *(pytest.param(f, marks=pytest.mark.slow) for f in ("sdpa", "chunked"))])
@pytest.mark.parametrize("preset", PRESETS)
def test_gradients_are_the_slopes_of_the_loss(preset: Preset, face: AttentionImplementation) -> None:
    """Every parameter of a tiny model, in double precision, against finite differences."""
    kv_heads = 1 if preset == "qwen3" else 2
    shape: dict[str, Any] = {"n_layers": 1, "n_heads": 2, "n_kv_heads": kv_heads, "d_model": 4, "d_mlp": 6}
    model = GPT(ModelConfig(preset, context=3, attention=face, **shape), 5).double()
    names = [name for name, _ in model.named_parameters()]
    generator = torch.Generator().manual_seed(7)
    values = [torch.randn(p.shape, generator=generator, dtype=torch.double) for p in model.parameters()]
    tokens = torch.tensor([[1, 4, 2], [3, 0, 3]])

    def losses(*parameters: Tensor) -> Tensor:
        state = dict(zip(names, parameters, strict=True))
        if "lm_head.weight" not in state:
            state["lm_head.weight"] = state["token_embedding.weight"]
        logits = functional_call(model, state, (tokens,))
        return F.cross_entropy(logits.flatten(0, 1), tokens.roll(-1).flatten(), reduction="none")

    assert torch.autograd.gradcheck(losses, [v.requires_grad_() for v in values], atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("preset", PRESETS)
def test_the_faces_agree_in_logits_and_gradients(preset: Preset, seed: int) -> None:
    models = [random_model(preset, face, seed) for face in ATTENTION_IMPLEMENTATIONS]
    tokens = random_tokens(3, SHAPES[preset].context + 1, seed)
    logits = [losses_of(model, tokens) for model in models]
    for other in (1, 2):
        same(logits[0], logits[other], 1e-5)
        same_gradients(models[0], models[other], 1e-5)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("preset", PRESETS)
def test_the_faces_agree_in_bf16(preset: Preset, seed: int) -> None:
    """As training computes (fp32 weights, bf16 products), and with everything in bf16."""
    models = [random_model(preset, face, seed) for face in ATTENTION_IMPLEMENTATIONS]
    tokens = random_tokens(3, SHAPES[preset].context, seed)
    with torch.no_grad():
        with torch.autocast("cpu", torch.bfloat16):
            mixed = [model(tokens) for model in models]
        assert all(relative_difference(mixed[0].float(), other.float()) <= 2e-2 for other in mixed[1:])
        assert not torch.equal(mixed[0].float(), models[0](tokens))  # it was bf16
        short = [model.bfloat16()(tokens) for model in models]
        assert {logits.dtype for logits in short} == {torch.bfloat16}
        assert all(relative_difference(short[0].float(), other.float()) <= 2e-2 for other in short[1:])


@pytest.mark.parametrize("face", ATTENTION_IMPLEMENTATIONS)
@pytest.mark.parametrize("preset", PRESETS)
def test_reading_in_pieces_is_reading_at_once(preset: str, face: AttentionImplementation) -> None:
    check_cache(preset, face)


@pytest.mark.parametrize("preset", PRESETS)
def test_an_edit_changes_nothing_before_it(preset: Preset) -> None:
    check_causality(preset)


@pytest.mark.slow
@pytest.mark.skipif(not any(map(shutil.which, ("g++", "clang++", "c++"))), reason="torch.compile needs a C++ compiler")
@pytest.mark.parametrize(("preset", "face"), [("glass", "eager"), ("gpt2", "sdpa"), ("qwen3", "chunked")])
def test_a_compiled_model_computes_the_same(preset: Preset, face: AttentionImplementation) -> None:
    """In a process of its own, without the checks of shapes, which the compiler can't look into."""
    program = f"from tests.model.test_numerics import check_compiled; check_compiled({preset!r}, {face!r})"
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr


def check_compiled(preset: Preset, face: AttentionImplementation) -> None:
    """Logits, and the gradients with which it is trained; several weights and texts through one compilation."""
    plain, stepped = (random_model(preset, face, n_layers=1) for _ in range(2))
    fast = torch.compile(stepped)
    for seed in SEEDS:
        for model in (plain, stepped):
            model.load_state_dict(random_model(preset, face, seed, n_layers=1).state_dict())
            model.zero_grad(set_to_none=True)
        tokens = random_tokens(3, plain.config.context + 1, seed)
        same(losses_of(fast, tokens), losses_of(plain, tokens), 1e-5)
        same_gradients(stepped, plain, 1e-5)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1, "it was not compiled, or in pieces"


@pytest.mark.slow
@pytest.mark.skipif(not any(map(shutil.which, ("g++", "clang++", "c++"))), reason="torch.compile needs a C++ compiler")
def test_a_compiled_model_has_the_same_gradient_each_time() -> None:
    """To the last bit, on two threads, with few tokens in the vocabulary that are met often."""
    program = "from tests.model.test_numerics import check_compiled_again; check_compiled_again()"
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr


def check_compiled_again() -> None:
    torch.set_num_threads(2)
    model, tokens = random_model("glass", "eager", n_layers=1, context=128), random_tokens(16, 129)
    fast, _ = compile_model(model, tokens[:, :-1], DistContext(torch.device("cpu"), torch.float32))
    assert fast is not model
    gradients = []
    for _ in range(8):
        model.zero_grad(set_to_none=True)
        losses_of(fast, tokens)
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]))
    assert all(torch.equal(gradients[0], other) for other in gradients)


def losses_of(model: Any, tokens: Tensor) -> Tensor:
    """The logits of all tokens but the last; the gradient of the mean loss stays in the parameters."""
    logits = model(tokens[:, :-1])
    F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten()).backward()
    return logits.detach()


def same_gradients(model: GPT, other: GPT, most: float) -> None:
    """Each parameter's gradient differs by `most` of its size."""
    for (name, a), b in zip(model.named_parameters(), other.parameters(), strict=True):
        assert a.grad is not None and b.grad is not None
        assert relative_difference(a.grad, b.grad) <= most, name
