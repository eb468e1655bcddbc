"""The page's server with the embedded model, in this process, and a client that asks it over HTTP."""

from __future__ import annotations

import http.client
import io
import json
import threading
import time
from contextlib import contextmanager
from dataclasses import replace

import pytest
from PIL import Image

from qwen2vl import Processor, Qwen2VL, assets
from qwen2vl.cli.common import explain, generation_config
from qwen2vl.features import KeptFeatures
from qwen2vl.samples.sample import from_ppm
from qwen2vl.samples.skills import generate as sample

MAX_UPLOAD = 1 << 20


def png(image: Image.Image) -> bytes:
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


def drawn(skill: str, index: int = 0) -> tuple[bytes, str]:
    """A generated picture as a PNG, and what is asked about it in English."""
    made = sample(skill, 0, index=index, languages=("en",), split="held-out")
    question = made.record["messages"][0]["content"].removeprefix("<image>")
    return png(Image.fromarray(from_ppm(made.members["0.ppm"]))), question


class Served:
    """A site, its address and its engine. ``endless``: answers go on to their last token, whatever the model says."""

    def __init__(self, engine, address):
        self.engine, self.address, self.endless = engine, address, False

    def request(self, method, path, body=b"", headers=()):
        """Status, headers and body of a reply."""
        connection = http.client.HTTPConnection(*self.address, timeout=60)
        try:
            connection.request(method, path, body, dict(headers))
            reply = connection.getresponse()
            return reply.status, reply.headers, reply.read()
        finally:
            connection.close()

    def post(self, path, given=None, status=200):
        got, _, body = self.request("POST", path, json.dumps(given or {}))
        assert got == status, body
        return json.loads(body)

    def begin(self) -> str:
        return "/api/" + self.post("/api/sessions")["key"]

    def upload(self, session, data, name="picture.png", status=200, kind="image/png"):
        got, _, body = self.request("POST", f"{session}/upload?name={name}", data, {"content-type": kind})
        assert got == status, body
        return json.loads(body)

    def events(self, path, given=None):
        got, _, body = self.request("POST", path, json.dumps(given or {}))
        assert got == 200, body
        return [json.loads(line) for line in body.splitlines()]

    def ask(self, session, text, media=(), **given):
        return self.events(f"{session}/ask", {"text": text, "media": list(media), **given})


@contextmanager
def served(model, processor, **options):
    """A :class:`Served` whose line is served by a thread."""
    from qwen2vl.web.engine import Engine
    from qwen2vl.web.server import Site, listen, serving

    def configure(model, **settings):
        config = generation_config(model, **settings)
        return replace(config, eos_token_ids=(model.config.text.vocab_size - 1,)) if server.endless else config

    defaults = {"max_new_tokens": assets.MAX_NEW_TOKENS}
    engine = Engine(model, processor, configure=configure, defaults=defaults, explain=explain, options={})
    over = threading.Event()

    def serve():
        while not over.is_set():
            engine.line.serve_next(0.02)

    given = {"about": {"model": "the toy", "notice": ""}, "max_upload": MAX_UPLOAD, "hosts": frozenset({"127.0.0.1"})}
    site = Site(engine, **{**given, **options})
    sock = listen("127.0.0.1", 0)
    server = Served(engine, sock.getsockname())
    worker = threading.Thread(target=serve)
    with serving(site, sock):
        worker.start()
        try:
            yield server
        finally:
            for session in list(engine.sessions._open):
                engine.end(session)
            over.set()
            worker.join()


@pytest.fixture(scope="module")
def model():
    model = Qwen2VL.from_pretrained(assets.folder(), device="cpu", dtype="float32")
    model.kept_features = KeptFeatures()
    return model


@pytest.fixture(scope="module")
def processor():
    return Processor.from_pretrained(assets.folder(), allow_local_files=False)


@pytest.fixture(scope="module")
def module_server(model, processor):
    pytest.importorskip("starlette", reason="the page needs the extra web")
    pytest.importorskip("uvicorn", reason="the page needs the extra web")
    with served(model, processor) as server:
        yield server


@pytest.fixture
def server(module_server, monkeypatch):
    """That of the module. An endless answer is written slowly, as whoever reads it is in this process, too."""
    from qwen2vl.web import engine

    listener = engine._listener

    def slow_listener(stop, send):
        ids, pieces, on_token = listener(stop, send)

        def told(*token):
            if module_server.endless:
                time.sleep(0.01)
            on_token(*token)

        return ids, pieces, told

    monkeypatch.setattr(engine, "_listener", slow_listener)
    yield module_server
    module_server.endless = False
