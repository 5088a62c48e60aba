"""Single tokens by a recording: the same text, by the same operations on the same memory."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from inspection.activation_cache import eager_attention
from model.generate import generate, last_logits
from model.gpt import GPT
from model.kv_cache import KVCache, OnePosition
from model.recorded import RecordedReading, Step, reach_of
from tests.model.checks import PRESETS, VOCAB, random_model, random_tokens, same
from training import graphs


def again(step: Step) -> Step:
    """A recording as plain as can be: what was called once is called each time."""
    return step


def written(model: GPT, prompt: Tensor, count: int, **how: Any) -> Tensor:
    generator = torch.Generator(prompt.device).manual_seed(3)
    return torch.stack(list(generate(model, prompt, count, generator, **how)), dim=1)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("length", [1, 5, 40])
@pytest.mark.parametrize("preset", PRESETS)
def test_a_recording_writes_the_same_text(preset: str, length: int, temperature: float) -> None:
    """From a short prompt and from one beyond the context, and over many contexts."""
    model, prompt = random_model(preset, "sdpa"), random_tokens(3, length)
    recorded = written(model, prompt, 70, temperature=temperature, record=again)
    assert torch.equal(recorded, written(model, prompt, 70, temperature=temperature))
    assert len(recorded.unique()) > 3


@pytest.mark.parametrize("preset", PRESETS)
def test_every_step_has_the_logits_of_the_whole_text(preset: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a reach that grows on the way, and memory that was full of NaN."""
    monkeypatch.setattr("model.recorded.LEAST", 4)
    model, text = random_model(preset, "sdpa", context=40), random_tokens(2, 100)
    cache = KVCache(model.config, 2, model.token_embedding.weight)
    cache.keys.fill_(torch.nan)
    cache.values.fill_(torch.nan)
    reading = RecordedReading(model, cache, again)
    with torch.no_grad():
        for length in range(3, 101):
            same(last_logits(model, text[:, :length], cache, reading), last_logits(model, text[:, :length]), 1e-5)
            assert reading.reach <= 40


def test_what_is_recorded_never_moves() -> None:
    """A replay knows addresses alone: the token, the place, the keys and values stay where they are."""
    model, text = random_model("qwen3", "sdpa"), random_tokens(2, 60)
    cache, recordings, places = KVCache(model.config, 2, model.token_embedding.weight), [], set()

    def record(step: Step) -> Step:
        recordings.append(step)
        return step

    reading = RecordedReading(model, cache, record)
    with torch.no_grad():
        for length in range(3, 61):
            last_logits(model, text[:, :length], cache, reading)
            if length == 3:
                continue  # the prompt
            memory = (reading.token, reading.one.place, reading.one.keys, reading.one.values)
            places.add(tuple(x.data_ptr() for x in memory))
    assert len(recordings) == len(places) == 1
    assert reading.one.keys.data_ptr() == cache.keys.data_ptr()


def test_a_recording_is_asked_only_for_single_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    """The prompt and, when the window moves, half a context are read as ever."""
    model, read = random_model("glass", "sdpa", context=16), []
    asked = RecordedReading.__call__
    monkeypatch.setattr(RecordedReading, "__call__", lambda self, new: (read.append(new.shape[1]), asked(self, new))[1])
    written(model, random_tokens(1, 5), 28, record=again)
    assert read == [1] * (11 + 7 + 7)


@pytest.mark.parametrize(
    ("length", "context", "reach"),
    [
        (0, 1024, 128),
        (127, 1024, 128),
        (128, 1024, 256),
        (511, 1024, 512),
        (700, 1024, 1024),
        (700, 800, 800),
        (3, 9, 9),
    ],
)
def test_a_recording_reaches_to_the_next_power_of_two(length: int, context: int, reach: int) -> None:
    assert reach_of(length, context) == reach


def test_written_out_attention_is_not_recorded() -> None:
    model = random_model("glass", "eager")
    with pytest.raises(ValueError, match="kernels = sdpa"):
        written(model, random_tokens(1, 3), 4, record=again)


def test_a_position_that_is_not_there_yet_is_never_read() -> None:
    """Whatever stands in the memory behind the place, the logits are the same."""
    model, token = random_model("gpt2", "sdpa"), random_tokens(1, 1)
    cache = KVCache(model.config, 1, model.token_embedding.weight)
    with torch.no_grad():
        model(random_tokens(1, 6), cache)
        one = OnePosition(cache, 20)
        first = model(token, one)
        one.keys[:, :, :, 7:], one.values[:, :, :, 7:] = 50.0, -30.0
        assert torch.equal(model(token, one), first)
        one.values[:, :, :, 5] = -30.0
        assert not torch.equal(model(token, one), first)


def test_nothing_that_is_watched_is_recorded() -> None:
    model = random_model("glass", "sdpa")
    assert graphs.may_record(model)
    with eager_attention(model):
        assert not graphs.may_record(model)
    for watch in (model.blocks[1].register_forward_hook, model.final_norm.register_forward_pre_hook):
        handle = watch(lambda *_: None)
        assert not graphs.may_record(model)
        handle.remove()
    assert graphs.may_record(model)
    assert graphs.recorder(model) is None  # a processor has nothing to record


@pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA graphs need a GPU")
@pytest.mark.parametrize("preset", PRESETS)
def test_cuda_graphs_write_the_same_text(preset: str) -> None:
    model, prompt = random_model(preset, "sdpa", context=300).cuda(), random_tokens(2, 5).cuda()
    assert graphs.recorder(model) is graphs.cuda_graph
    recorded = written(model, prompt, 500, temperature=0.0, record=graphs.cuda_graph)
    assert torch.equal(recorded, written(model, prompt, 500, temperature=0.0))
    assert recorded.max() < VOCAB
