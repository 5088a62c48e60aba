"""`attend.py serve`: a page whose model is run by Python on this machine, for models that are too large for the page itself.

The server listens on 127.0.0.1, in a path that begins with a random word; what comes from another host or from a page of
another origin is refused.
"""

import json
import secrets
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Lock
from typing import Any

import numpy as np
import torch
from torch import Tensor

from common.errors import UserError
from inspection.ablation import Head, ablated, mean_outputs
from inspection.activation_cache import blocks_of, inference_mode, run_layers, run_with_cache
from inspection.attention_file import DETAILS, LoadedModel
from inspection.page_encoding import Encoder

MAX_BODY = 1 << 20  # bytes of a request
Answer = Callable[[dict[str, Any]], Any]


class Backend:
    """Answers what `web/backend.js` asks. `models` are by step; means for ablation are taken over `texts`."""

    def __init__(self, models: Mapping[int, Callable[[], LoadedModel]], texts: Sequence[Sequence[int]]) -> None:
        self.load, self.texts, self.lock = models, texts, Lock()
        self.loaded: dict[int, LoadedModel] = {}
        self.means: dict[int, tuple[Tensor, Tensor]] = {}
        self.answers: dict[str, Answer] = {"encode": self.encode, "decode": self.decode, "run": self.run}

    def model(self, step: int) -> LoadedModel:
        if step not in self.loaded:
            self.loaded[step] = self.load[step]()
        return self.loaded[step]

    def encode(self, request: dict[str, Any]) -> list[int]:
        """The token ids of `text`."""
        ids: list[int] = self.model(max(self.load)).tokenizer.encode(str(request["text"])).tolist()
        return ids

    def decode(self, request: dict[str, Any]) -> str:
        """The text of `ids`."""
        return self.model(max(self.load)).tokenizer.decode([int(token) for token in request["ids"]])

    def run(self, request: dict[str, Any]) -> dict[str, list[str]]:
        """`run` of `web/backend.js`: arrays by name."""
        step, layer, query = (int(request[name]) for name in ("step", "layer", "query"))
        tokens, model = torch.tensor([int(token) for token in request["ids"]]), self.model(step).model
        with self.lock, ExitStack() as stack, inference_mode(model):
            self.switch_off(step, request["off"] or {}, stack)
            layers = [(each.resid_pre[0, query], each.resid_post[0, query]) for each in run_layers(model, tokens[None])]
            stages = [layers[0][0], *(resid_post for _, resid_post in layers)]
            lens = model.lm_head(model.final_norm(torch.stack(stages))).cpu()
            cache = run_with_cache(model, tokens, details=True) if layer >= 0 else None
        arrays: dict[str, Any] = {"logits": lens[-1], "lens": lens.argmax(dim=-1)}
        if cache is not None:
            rows, columns = np.tril_indices(len(tokens))
            arrays |= {name: getattr(cache, name)[layer] for name in (*DETAILS, "value_norms")}
            arrays |= {"pattern": cache.pattern[layer, :, rows, columns], "loss": np.append(np.nan, cache.loss)}
        encoder = Encoder(1 << 30)
        kinds = {name: "uint32" if name == "lens" else "float32" for name in arrays}
        return {name: encoder.array(array, kinds[name]) for name, array in arrays.items()}

    def switch_off(self, step: int, off: Mapping[str, str], stack: ExitStack) -> None:
        """Replace heads and MLPs, such as {"L1H3": "zero", "L0 MLP": "mean"}, until the stack is closed."""
        model = self.model(step).model
        if "mean" in off.values() and step not in self.means:
            self.means[step] = mean_outputs(model, self.texts)
        for name, mode in off.items():
            heads, mlps = self.means[step] if mode == "mean" else (None, None)
            layer, _, head = name.removeprefix("L").removesuffix(" MLP").partition("H")
            if head:
                chosen: Head = int(layer), int(head)
                stack.enter_context(ablated(model, [chosen], heads))
            elif (mlp := blocks_of(model)[int(layer)].mlp) is not None:
                mean = torch.zeros(()) if mlps is None else mlps[int(layer)]
                stack.enter_context(
                    mlp.register_forward_hook(lambda m, args, out, mean=mean: mean.to(out).expand_as(out))
                )


class PageServer(ThreadingHTTPServer):
    """Serves the page and the backend's answers on 127.0.0.1; `port` 0 is a free one. Raises OSError."""

    def __init__(self, page: bytes, backend: Backend, port: int = 0) -> None:
        super().__init__(("127.0.0.1", port), Handler)
        self.page, self.answers = page, backend.answers
        self.host, self.base = f"127.0.0.1:{self.server_port}", f"/{secrets.token_urlsafe(16)}/"
        self.address = f"http://{self.host}{self.base}"


class Handler(BaseHTTPRequestHandler):
    """A request to a `PageServer`."""

    server: PageServer
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        if self.path == self.server.base and self.is_ours():
            self.send(200, self.server.page, "text/html; charset=utf-8")
        else:
            self.send(404, b"there is nothing here")

    def do_POST(self) -> None:
        length = int(self.headers.get("Content-Length") or 0)
        answer = self.server.answers.get(self.path.removeprefix(self.server.base))
        if not self.is_ours() or answer is None or not 0 < length <= MAX_BODY:
            self.close_connection = True  # the body is not read
            self.send(403, b"this is no request of the page")
            return
        try:
            body = json.dumps(answer(json.loads(self.rfile.read(length)))).encode()
        except (UserError, ValueError, KeyError, TypeError, IndexError) as error:  # it does not fit the model
            self.send(400, f"it cannot be computed: {error}".partition("\n")[0].encode())
        else:
            self.send(200, body, "application/json")

    def is_ours(self) -> bool:
        """Whether the request is of this address, and not of a page of another one."""
        own = self.server.host
        return self.headers.get("Host") == own and self.headers.get("Origin") in (None, f"http://{own}")

    def send(self, status: int, body: bytes, kind: str = "text/plain; charset=utf-8") -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("Cache-Control", "no-store")
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *args: object) -> None:
        """Print nothing."""
