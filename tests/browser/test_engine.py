"""The model in the page computes what the model in Python does, on the same rounded weights."""

import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from inspection.ablation import ablated
from inspection.activation_cache import run_with_cache
from inspection.attribution import logit_lens
from model.generate import SamplingParams, generate
from tests.browser.conftest import OpenPage
from tests.browser.model_run import TEXT, make_page, make_tokenizer

pytestmark = pytest.mark.browser
ALPHABET = "abTM the fox's 've 12 3 ½é字🌳\u0301\u200d\n\n  \t\u00a0\u3000\ufeff\x85\u2028'll!?.,<|endoftext|>שלום\x00\x1f\ud800"
RUN = """async ([step, ids, off, layer, query]) => {
  const result = await backend.run({ step, ids, off, layer, query, norms: true });
  return Object.fromEntries(Object.entries(result).map(([name, values]) => [name, Array.from(values)]));
}"""


@pytest.fixture(scope="module", params=["glass char", "gpt2 byte", "qwen3 bpe", "llama bpe", "n-grams char"])
def made(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    preset, kind = request.param.split()
    folder = tmp_path_factory.mktemp("run")
    return (folder / "attention.html", *make_page(folder, preset, kind))


def random_texts(count: int, kind: str) -> list[str]:
    rng, known = random.Random(1), sorted(set(TEXT))
    return [
        "".join(rng.choice(known if kind == "char" else ALPHABET) for _ in range(rng.randint(0, 40)))
        for _ in range(count)
    ]


@pytest.mark.parametrize("kind", ["char", "byte", "bpe"])
def test_token_ids_are_those_of_python(kind: str, open_page: OpenPage, page_path: Path) -> None:
    tokenizer, texts = make_tokenizer(kind), random_texts(400, kind)
    found = open_page(page_path).page.evaluate(
        "([saved, texts]) => { const [encode] = createTokenizer(saved); return texts.map((text) => encode(text)); }",
        [tokenizer.saved, texts],
    )
    assert found == [tokenizer.encode(text).tolist() for text in texts]


def test_logits_patterns_and_ablations(made: Any, open_page: OpenPage) -> None:
    path, model, _, saved = made
    page, rng, L, H = open_page(path).page, np.random.default_rng(1), model.config.n_layers, model.config.n_heads
    heads, mlps = saved["means.heads"].unflatten(1, (H, -1)), saved["means.mlps"]
    for _ in range(50):
        ids = rng.integers(model.vocab_size, size=rng.integers(1, 40)).tolist()
        layer, head, query = int(rng.integers(L)), int(rng.integers(H)), int(rng.integers(len(ids)))
        found = page.evaluate(RUN, [20, ids, None, layer, query])
        cache = run_with_cache(model, torch.tensor(ids), details=True)
        rows, columns = np.tril_indices(len(ids))
        expected = {
            name: getattr(cache, name)[layer] for name in ("queries", "keys", "values", "value_norms", "attn_out")
        }
        expected["pattern"] = cache.pattern[layer, :, rows, columns]
        for name, value in expected.items():
            assert np.ravel(value) == pytest.approx(found[name], abs=1e-4, rel=1e-4), name
        assert query == 0 or found["loss"][query] == pytest.approx(float(cache.loss[query - 1]), abs=1e-4)
        lens = logit_lens(model, torch.tensor(ids))[:, query]
        assert found["logits"] == pytest.approx(lens[-1].tolist(), abs=1e-4, rel=1e-4)
        assert found["lens"] == lens.argmax(dim=-1).tolist()
        for mode, means in (("zero", None), ("mean", heads)):
            off = page.evaluate(RUN, [20, ids, {f"L{layer}H{head}": mode}, -1, query])
            with ablated(model, [(layer, head)], means), torch.no_grad():
                logits = model(torch.tensor([ids]))[0, query]
            assert off["logits"] == pytest.approx(logits.tolist(), abs=1e-3, rel=1e-3), mode
        mlp, mean = model.blocks[layer].mlp, mlps[layer]
        with mlp.register_forward_hook(lambda module, args, out, mean=mean: mean.expand_as(out)), torch.no_grad():
            logits = model(torch.tensor([ids]))[0, query]
        off = page.evaluate(RUN, [20, ids, {f"L{layer} MLP": "mean"}, -1, query])
        assert off["logits"] == pytest.approx(logits.tolist(), abs=1e-3, rel=1e-3)


def test_greedy_text_is_that_of_python(made: Any, open_page: OpenPage) -> None:
    path, model, tokenizer, _ = made
    view = open_page(path)
    ids = [tokenizer.end_of_text, *tokenizer.encode("Mia the fox").tolist()]
    steps = generate(model, torch.tensor([ids]), 128 - len(ids), torch.Generator(), SamplingParams(temperature=0.0))
    expected = [int(token) for token, _ in steps]
    end = expected.index(tokenizer.end_of_text) if tokenizer.end_of_text in expected else len(expected)
    view.page.fill("#own", "Mia the fox")
    view.page.fill("#temperature", "0")
    view.page.click("#write-on")
    view.page.wait_for_function("() => !writing", timeout=20_000)
    assert view.page.evaluate("written.ids") == [*ids[1:], *expected[:end]]


def test_weights_in_8_bits_are_near(made: Any, open_page: OpenPage) -> None:
    page = open_page(made[0]).page
    weights = page.evaluate(
        """async () => { const snapshot = page.model.snapshots.find(({ step }) => step === 0).weights;
        const model = await decodeModel(page.model.config, page.model.vocab_size, snapshot);
        return Array.from(model.weights["blocks.0.attention.out.weight"]); }"""
    )
    from tests.model.helpers import random_model

    changes = {name: getattr(made[1].config, name) for name in ("ngrams", "ngram_rows")}
    model = random_model(made[1].config.preset, seed=0, vocab_size=made[1].vocab_size, context=128, **changes)
    weight = model.blocks[0].attention.out.weight.detach()
    error = (torch.tensor(weights).view_as(weight) - weight).abs()
    assert (error <= weight.abs().amax(dim=1, keepdim=True) / 253).all() and error.max() > 0
