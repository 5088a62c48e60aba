"""GlassGPT: train a small GPT, and see what it learned; for Python and notebooks. `docs/python.md` shows how.

Importing it loads no torch. Shapes: L layers, H heads, T tokens, C model width, D head size, V vocabulary.
"""

from __future__ import annotations

import html
import importlib.util
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from numpy import ndarray

    from inspection.eval_texts import EvalTexts
    from inspection.patching import PatchingResult
    from training.checkpoint import Checkpoint

__version__ = "0.1.0"
ROOT = Path(__file__).resolve().parent
Text = str | Sequence[int]  # A text, which `Run.tokens` turns into tokens, or its tokens.


def _check_not_hidden(*names: str) -> None:
    """Raise ImportError if other modules would be imported in place of ours; a folder of data files hides nothing."""
    for name in names:
        spec = importlib.util.find_spec(name)
        if spec and spec.origin and ROOT not in Path(spec.origin).resolve().parents[:2]:
            raise ImportError(
                f"{spec.origin} hides GlassGPT's own {name!r}: rename it, or start Python in another folder"
            )


_check_not_hidden("common", "data", "inspection", "model", "training")


def open(path: str | Path, step: int | str | None = None) -> Run:
    """A run folder, a checkpoint folder, a Hugging Face folder, or a name on its hub as a `Run`, at one of its steps, or
    "last"; by default of the lowest validation loss. Raises UserError: no such step (exit code 2), or no intact one (4)."""
    from training.pretrained import open_model

    return Run(open_model(Path(path).expanduser(), "best" if step is None else str(step)))


def train(config: str | Path = "", options: Mapping[str, Any] | None = None, callbacks: Sequence[object] = ()) -> Run:
    """Train as `train.py` does, and open the run.

    Args:
        config: a config file or a text; by default the quickstart.
        options: those of the command line, such as `{"train.steps": 20}`.
        callbacks: objects with some of the methods of `training.trainer.Callback`.

    Raises UserError as the command does; SystemExit after Ctrl-C, once the checkpoint is written.
    """
    _check_not_hidden("train")
    from train import main

    words = [str(config)] if str(config) else []
    return open(main([*words, *(f"--{name}={value}" for name, value in (options or {}).items())], callbacks))


class Run:
    """A trained model with its tokenizer: `model`, `tokenizer`, `checkpoint`, `folder`, `step`."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        from training.device import get_dist_context

        self.checkpoint, self.tokenizer = checkpoint, checkpoint.tokenizer()
        self.model = checkpoint.load_model(get_dist_context("fp32"))
        self.step, self.folder = checkpoint.state.step, checkpoint.run_dir.resolve()

    def __repr__(self) -> str:
        shape = self.model.config
        return f"<Run {self.folder}, step {self.step}: {shape.n_layers} layers of {shape.n_heads} heads>"

    @property
    def steps(self) -> list[int]:
        """The steps that have a checkpoint, in order."""
        from training.checkpoint import list_checkpoints

        return [int(folder.name) for folder in list_checkpoints(self.folder / "checkpoints")]

    def at(self, step: int) -> Run:
        """The same run at another of its `steps`."""
        return open(self.folder, step)

    @property
    def eval_texts(self) -> EvalTexts:
        """The texts on which training scored the heads: `repeats`, `held_out()`, `contrast_pairs`. UserError (4) without."""
        from inspection.eval_texts import EvalTexts

        path = self.folder / "attention" / "eval_texts.json"
        return EvalTexts.load(path, self.model.vocab_size, self.model.config.context)

    def tokens(self, text: str, start: bool = True) -> list[int]:
        """The tokens of a text, after end-of-text if the training documents began with it (without it the model predicts
        badly); `start=False` leaves it out."""
        from training.text_generation import encode_prompt

        return encode_prompt(self.tokenizer, text, self.checkpoint.environment.starts_with_eot and start)

    def _ids(self, text: Text) -> Any:
        """The tokens of a text as a tensor (T,)."""
        import torch

        return torch.tensor(self.tokens(text) if isinstance(text, str) else list(text))

    def logits(self, text: Text) -> ndarray:
        """The logits (T, V) of the token after each one. Raises ValueError if the text is longer than the context."""
        from inspection.activation_cache import check_tokens, inference_mode

        tokens = self._ids(text)[None]
        check_tokens(self.model, tokens)
        with inference_mode(self.model):
            return self.model(tokens.to(self.model.token_embedding.weight.device))[0].cpu().numpy()

    def attention(self, text: Text) -> dict[str, ndarray]:
        """What the model computes on a text, by name; ValueError if it is longer than the context.

        `tokens` (T,); `pattern` (L, H, T, T), how much each query attends to each key; `queries`, `keys` and `values`
        (L, H, T, D), after QK norm and rotary embedding; `head_outputs` (L, H, T, C), what each head adds to the residual
        stream; `residual` (L + 1, T, C), the residual stream before the first layer and after each.
        """
        import torch

        from inspection.activation_cache import blocks_of, inference_mode, run_layers

        model, tokens, H = self.model, self._ids(text), self.model.config.n_heads
        with inference_mode(model):
            layers = list(run_layers(model, tokens[None]))
            weights = [block.attention.out.weight.unflatten(1, (H, -1)) for block in blocks_of(model)]
            heads = [layer.z[0].unflatten(-1, (H, -1)) for layer in layers]
            outputs = [torch.einsum("thd,chd->htc", *each) for each in zip(heads, weights, strict=True)]
        residual = [layers[0].resid_pre[0], *(layer.resid_post[0] for layer in layers)]
        names = ("pattern", "queries", "keys", "values")
        arrays = {"tokens": tokens}
        arrays |= {name: torch.stack([getattr(layer, name)[0] for layer in layers]) for name in names}
        arrays |= {"head_outputs": torch.stack(outputs), "residual": torch.stack(residual)}
        return {name: array.cpu().numpy() for name, array in arrays.items()}

    def sample(self, prompt: str = "", **options: Any) -> str:
        """The prompt and its continuation. `options` are those of `sample.py`, such as `tokens`, `temperature`, `top_k`, `top_p`,
        `stop` (a tuple) and `seed`; the same seed gives the same text. Raises UserError for a bad value."""
        _check_not_hidden("sample")
        from common.errors import UserError
        from sample import SampleConfig, sampling_params
        from training.text_generation import GeneratedText, check_token_count, generate_texts

        config = SampleConfig(str(self.folder), prompt=prompt, **options)
        if problems := config.problems():
            raise UserError("; ".join(problems))
        check_token_count(1, config.tokens)
        text = GeneratedText(self.tokenizer, config.stop)
        start = self.tokens(prompt)[-self.model.config.context :]
        generate_texts(self.model, start, config.tokens, config.seed, sampling_params(config), [text])
        return prompt + text.text

    @contextmanager
    def ablate(self, *heads: str, mode: Literal["zero", "mean"] = "zero") -> Iterator[Run]:
        """Everything in the body sees the model without these heads, such as "L1H3"; can be nested. In place of a head's
        output is 0, or its mean over the run's held-out texts (without: repeated tokens).

        Raises UserError for a head that the model does not have (exit code 2); mean ablation, without `eval_texts` (4).
        """
        from common.errors import UserError
        from inspection.ablation import ablated, mean_head_outputs
        from inspection.commands.shared import parse_heads

        if mode not in ("zero", "mean"):
            raise UserError(f"mode is {mode!r}; it must be 'zero' or 'mean'")
        shape, means = self.model.config, None
        chosen = parse_heads(heads, (shape.n_layers, shape.n_heads))
        if mode == "mean":  # of the whole model, which a surrounding `ablate` has changed here
            texts = [text for _, text in self.eval_texts.held_out()] or list(self.eval_texts.repeats)
            means = mean_head_outputs(Run(self.checkpoint).model, texts)
        with ablated(self.model, chosen, means):
            yield self

    def patch(self, clean: str, corrupt: str, *, right: str, wrong: str) -> PatchingResult:
        """Which activations of the clean text bring the right answer back on the corrupt one, each with a control; see
        `inspection/patching.py`."""
        from inspection.patching import patch_texts

        return patch_texts(self.model, self.tokens, clean, corrupt, right, wrong)

    def attribution(self, text: Text) -> tuple[str, dict[str, float]]:
        """The most likely next token, and its logit as a sum over embeddings, heads and MLPs (direct logit attribution)."""
        from inspection.attribution import direct_logit_attribution

        token, parts = direct_logit_attribution(self.model, self._ids(text))
        return self.tokenizer.decode([token]), parts

    def head_scores(
        self, score: Callable[..., Any] | None = None, texts: Sequence[Text] | None = None
    ) -> dict[str, ndarray] | ndarray:
        """Every score of `inspection/head_scores.py`, (L, H) by name; or `score` of each head, (L, H).

        Args:
            score: as the functions there, from (pattern (H, T, T), tokens (T,)) to a value for each query (H, Q).
            texts: those on which `score` is measured; by default the run's held-out ones.
        """
        from inspection.compute_scores import compute_head_score, compute_head_scores

        if score is None:
            scores = compute_head_scores(self.model, self.eval_texts, self.tokenizer.token_bytes)
            return {name: table.numpy() for name, table in scores.items()}
        chosen = self.eval_texts.scored_texts() if texts is None else [self._ids(text).tolist() for text in texts]
        return compute_head_score(self.model, chosen, score).numpy()

    def _repr_html_(self) -> str:
        """The run's page, in a sandboxed frame of a notebook."""
        page = self.folder / "attention.html"
        if not page.is_file():
            return f"<code>{html.escape(repr(self))}</code>: no attention.html; python attend.py page RUN writes it"
        source = html.escape(page.read_text(encoding="utf-8"))
        style = "width: 100%; height: 900px; border: 0"
        return f'<iframe sandbox="allow-scripts" style="{style}" srcdoc="{source}"></iframe>'
