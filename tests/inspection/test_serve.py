"""attend.py serve: the answers are the model's, and only the page that was served gets them."""

import base64
import http.client
import json
import threading
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import attend
from inspection.ablation import ablated, mean_outputs
from inspection.activation_cache import run_with_cache
from inspection.serve import MAX_BODY, Backend, PageServer
from tests.runs import error_line, script


@pytest.fixture(scope="module")
def served(trained: Path) -> Iterator[Any]:
    """The address of a server of a run, and its model."""
    loaded, page = attend.load_model(trained, "best"), b"<html>the page</html>"
    texts = [loaded.encode("The hen met the fox.")]
    server = PageServer(page, Backend({loaded.step: lambda: loaded}, texts))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server.address, loaded, texts
    server.shutdown()
    server.server_close()


def ask(address: str, name: str, body: bytes | None, **headers: str) -> tuple[int, bytes]:
    """Status and content of a request; GET without a body."""
    host, _, path = address.removeprefix("http://").partition("/")
    connection = http.client.HTTPConnection(host, timeout=20)
    method = "GET" if body is None else "POST"
    connection.request(method, f"/{path}{name}", body, {"Host": host, **{k.title(): v for k, v in headers.items()}})
    response = connection.getresponse()
    return response.status, response.read()


def run(address: str, **request: Any) -> dict[str, np.ndarray]:
    status, body = ask(address, "run", json.dumps(request).encode())
    assert status == 200, body
    kinds = {"float32": "<f4", "uint32": "<u4"}
    return {
        name: np.frombuffer(zlib.decompress(base64.b64decode(data)), kinds[kind])
        for name, (kind, data) in json.loads(body).items()
    }


def test_answers_are_those_of_the_model(served: Any) -> None:
    address, loaded, texts = served
    text = "The fox met"
    ids = loaded.encode(text)
    encoded = json.loads(ask(address, "encode", json.dumps({"text": text}).encode())[1])
    assert ids[-len(encoded) :] == encoded
    assert json.loads(ask(address, "decode", json.dumps({"ids": encoded}).encode())[1]) == text
    found = run(address, step=loaded.step, ids=ids, off=None, layer=1, query=len(ids) - 1)
    cache = run_with_cache(loaded.model, torch.tensor(ids), details=True)
    rows, columns = np.tril_indices(len(ids))
    assert np.allclose(found["pattern"], np.ravel(cache.pattern[1, :, rows, columns]), atol=1e-6)
    for name in ("queries", "keys", "values", "value_norms", "attn_out"):
        assert np.allclose(found[name], np.ravel(getattr(cache, name)[1]), atol=1e-6), name
    assert np.isnan(found["loss"][0]) and np.allclose(found["loss"][1:], cache.loss, atol=1e-5)
    heads = mean_outputs(loaded.model, texts)[0]
    for off, means in (({"L1H0": "zero"}, None), ({"L1H0": "mean"}, heads)):
        with ablated(loaded.model, [(1, 0)], means), torch.no_grad():
            logits = loaded.model(torch.tensor([ids]))[0, -1]
        found = run(address, step=loaded.step, ids=ids, off=off, layer=-1, query=len(ids) - 1)
        assert np.allclose(found["logits"], logits, atol=1e-4) and found.keys() == {"logits", "lens"}
    whole = run(address, step=loaded.step, ids=ids, off=None, layer=-1, query=len(ids) - 1)["logits"]
    off = run(address, step=loaded.step, ids=ids, off={"L0 MLP": "mean"}, layer=-1, query=len(ids) - 1)["logits"]
    assert not np.allclose(off, whole) and np.allclose(
        whole, loaded.model(torch.tensor([ids]))[0, -1].detach(), atol=1e-4
    )


def test_others_get_nothing(served: Any) -> None:
    address = served[0]
    host = address.split("/")[2]
    body = json.dumps({"text": "The"}).encode()
    assert ask(address, "", None) == (200, b"<html>the page</html>")
    assert ask(address, "encode", body, origin=f"http://{host}")[0] == 200
    for headers in ({"origin": "http://example.org"}, {"origin": "null"}, {"host": "example.org"}):
        assert ask(address, "encode", body, **headers)[0] == 403, headers
        assert ask(address, "", None, **headers)[0] == 404, headers
    other = f"http://{host}/another/"
    assert ask(other, "", None)[0] == 404 and ask(other, "encode", body)[0] == 403
    assert ask(address, "missing", body)[0] == 403
    assert ask(address, "encode", b"x", **{"content-length": str(MAX_BODY + 1)})[0] == 403


@pytest.mark.parametrize(
    "request_", [b"{", b"[]", b'{"text": 1}', b'{"step": 1, "ids": [], "off": null, "layer": 0, "query": 0}']
)
def test_bad_requests_are_a_line(served: Any, request_: bytes) -> None:
    status, body = ask(served[0], "run", request_)
    assert status == 400 and body.startswith(b"it cannot be computed") and b"\n" not in body


def test_command_refuses_what_is_no_model(tmp_path: Path) -> None:
    assert "is not a folder" in error_line(script("attend.py", "serve", tmp_path / "nothing"), 4)
    assert "--port is -1" in error_line(script("attend.py", "serve", tmp_path, "--port=-1"), 2)
