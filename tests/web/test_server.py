"""What the page asks, over HTTP: answers that are the model's, refusals that end nothing, and nothing kept too long."""

from __future__ import annotations

import http.client
import http.server
import io
import json
import threading
import time

import pytest
from PIL import Image

from examples.demo.media import write_video
from qwen2vl import GenerationConfig, Qwen2VL, generate
from qwen2vl.agents.loop import model_writer, run_agent
from qwen2vl.samples.skills import play
from qwen2vl.web import engine as engine_module
from qwen2vl.web import server as server_module
from qwen2vl.web import sessions as sessions_module
from tests.web.conftest import MAX_UPLOAD, drawn, png, served


def reference(model, processor, messages):
    inputs = processor(messages)
    config = GenerationConfig.from_model(model, max_new_tokens=96)
    return generate(model, inputs, tokenizer=processor.tokenizer, config=config)


def written(events):
    return "".join(event["text"] for event in events if event["event"] == "text")


def until(true):
    """Wait for it: looks are counted and not seconds, as the whole process may have been stopped for some."""
    for _ in range(2000):
        if true():
            return
        time.sleep(0.01)
    raise AssertionError("never true")


# ------------------------------------------------------------------------------------------------------------ answers


def test_turns_are_those_of_the_model_and_its_boxes_are_told(server, model, processor):
    session = server.begin()
    (read, asks), (points, where) = drawn("read"), drawn("point")
    facts = server.upload(session, read)
    assert (facts["number"], facts["name"], facts["kind"]) == (1, "picture.png", "image") and facts["tokens"] > 0
    *pieces, first = server.ask(session, asks, [1])
    question = {"role": "user", "content": [{"type": "image", "image": read}, {"type": "text", "text": asks}]}
    wanted = reference(model, processor, [question])
    assert {"event": "prompt", "tokens": wanted.prompt_tokens[0]} in pieces
    assert first["event"] == "answer" and first["text"] == wanted.texts[0] and not first["places"]
    assert written(pieces) == first["text"] and first["cached_tokens"] == 0

    assert server.upload(session, points)["number"] == 2
    *_, second = server.ask(session, where, [2])
    answered = {"role": "assistant", "content": first["text"]}
    again = {"role": "user", "content": [{"type": "image", "image": points}, {"type": "text", "text": where}]}
    wanted = reference(model, processor, [question, answered, again])
    assert second["text"] == wanted.texts[0] and second["cached_tokens"] > 0 and second["shown"] == [1, 2]
    assert second["prompt_tokens"] == wanted.prompt_tokens[0]
    places = wanted.places()
    assert len(places) == len(second["places"]) > 0
    for got, place in zip(second["places"], places, strict=True):
        assert got["label"] == place.label and got["points"] == [list(point) for point in place.place.points]
        assert got["kind"] == "box" and got["media"] is None  # of two pictures it does not say which

    server.post(f"{session}/clear")
    server.upload(session, points)
    *_, alone = server.ask(session, where, [3])
    (place, *_), (width, height) = alone["places"], Image.open(io.BytesIO(points)).size
    assert place["media"] == 3 and alone["shown"] == [3]
    assert place["pixels"] == [[round(x * width / 1000), round(y * height / 1000)] for x, y in place["points"]]


def test_settings_and_the_system_prompt_are_the_answers(server):
    session = server.begin()
    server.endless = True
    assert server.ask(session, "hi")[-1]["new_tokens"] == 96
    short = server.ask(session, "hi", settings={"max_new_tokens": 3, "seed": None})[-1]
    assert short["finish"] == "length" and short["new_tokens"] == 3
    drawn_twice = [
        server.ask(server.begin(), "hi", settings={"temperature": 2.0, "seed": 5, "max_new_tokens": 8})[-1]["text"]
        for _ in range(2)
    ]
    assert drawn_twice[0] == drawn_twice[1]
    server.endless = False
    bare, told = (server.ask(server.begin(), "hi", system=system)[-1] for system in (None, "Be brief, please."))
    assert told["prompt_tokens"] != bare["prompt_tokens"]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"text": "  "}, "text: wants a question"),
        ({"text": 5}, "text: wants a question"),
        ({"text": "\ud800"}, "text"),
        ({"text": "x" * 600_000}, "characters"),
        ({"text": "hi", "media": [7]}, "there is no attachment 7"),
        ({"text": "hi", "media": ["/etc/passwd"]}, "media: wants a list of numbers"),
        ({"text": "hi", "system": {"a": 1}}, "system: wants a text"),
        ({"text": "hi", "settings": {"temperature": -1}}, "temperature must be > 0"),
        ({"text": "hi", "settings": {"temperature": "hot"}}, "temperature: wants float, got str"),
        ({"text": "hi", "settings": {"top_k": True}}, "top_k: wants int, got bool"),
        ({"text": "hi", "settings": {"beams": 4}}, "'beams' is none; there are max_new_tokens"),
        ({"text": "hi", "settings": {"stop": [""]}}, "stop: wants texts"),
        ({"text": "hi", "settings": []}, "settings: wants an object"),
    ],
)
def test_what_cannot_be_asked_is_told_and_the_session_goes_on(server, given, message):
    session = server.begin()
    status, _, body = server.request("POST", f"{session}/ask", json.dumps(given))
    last = json.loads(body.splitlines()[-1])
    assert message in (last["error"] if status == 400 else last["message"]), last
    assert "fault of qwen2vl" not in body.decode() and server.ask(session, "hi")[-1]["event"] == "answer"


def test_an_answer_that_fails_leaves_the_conversation_as_it_was(server, monkeypatch, caplog):
    session = server.begin()
    server.upload(session, drawn("read")[0])
    first = server.ask(session, "hi")[-1]

    def fails(*_, **__):
        raise RuntimeError("a bug")

    for broken in ("generate", "locate"):
        with monkeypatch.context() as patched:
            patched.setattr(engine_module, broken, fails)
            failed = server.ask(session, "Read the text.", [1])[-1]
        assert failed["event"] == "error" and "a fault of qwen2vl (RuntimeError: a bug)" in failed["message"]
    assert "a bug" in caplog.text and "Traceback" in caplog.text
    assert server.ask(session, "Read the text.", [1])[-1]["prompt_tokens"] > first["prompt_tokens"]


def test_out_of_memory_lets_go_of_the_caches_and_is_told(server, monkeypatch):
    kept = [server.begin() for _ in range(2)]
    for session in kept:
        assert server.ask(session, "hi")[-1]["cached_tokens"] == 0

    def fails(*_, **__):
        raise MemoryError

    with monkeypatch.context() as patched:
        patched.setattr(engine_module, "generate", fails)
        assert "out of memory" in server.ask(kept[0], "hi")[-1]["message"]
    assert all(not one.tokens for one in server.engine._cached)
    assert server.ask(kept[0], "and now")[-1]["event"] == "answer"


# --------------------------------------------------------------------------------------------------- stop, line, tabs


class Asking(threading.Thread):
    """A request whose events are read as they come."""

    def __init__(self, server, path, given):
        super().__init__(daemon=True)
        self.connection = http.client.HTTPConnection(*server.address, timeout=60)
        self.events, self.path, self.given = [], path, given
        self.start()

    def run(self):
        self.connection.request("POST", self.path, json.dumps(self.given))
        reply = self.connection.getresponse()
        while line := reply.readline():
            self.events.append(json.loads(line))

    def named(self, name):
        return [event for event in self.events if event["event"] == name]


LONG = {"max_new_tokens": 3000, "temperature": 5.0, "seed": 1}  # of any letters, with no end


def test_a_stopped_answer_stays_as_far_as_it_came_and_who_waits_may_leave(server):
    server.endless = True
    first, second, third = (server.begin() for _ in range(3))
    answering = Asking(server, f"{first}/ask", {"text": "hi", "settings": LONG})
    until(lambda: answering.named("text"))
    assert "is being answered" in server.post(f"{first}/ask", {"text": "more"}, 409)["error"]
    assert "is being answered" in server.post(f"{first}/clear", {}, 409)["error"]
    waiting = Asking(server, f"{second}/ask", {"text": "hi", "settings": {"max_new_tokens": 2}})
    until(lambda: waiting.named("waiting") == [{"event": "waiting", "ahead": 1}])
    leaving = Asking(server, f"{third}/ask", {"text": "hi"})
    until(lambda: leaving.named("waiting") == [{"event": "waiting", "ahead": 2}])
    server.post(f"{third}/stop")
    leaving.join(20)
    assert leaving.events[-1] == {"event": "stopped"} and answering.is_alive()
    server.post(f"{first}/stop")
    answering.join(20), waiting.join(20)
    stopped = answering.events[-1]
    assert stopped["event"] == "answer" and stopped["finish"] == "stopped" and 0 < stopped["new_tokens"] < 3000
    assert stopped["text"] == written(answering.events)
    assert waiting.events[-1]["new_tokens"] == 2
    server.endless = False
    assert server.ask(first, "again")[-1]["cached_tokens"] > 0  # it goes on behind what was kept of it


@pytest.mark.parametrize("leave", ["disconnect", "end"])
def test_nothing_is_computed_for_a_tab_that_is_gone(server, leave):
    server.endless = True
    session = server.begin()
    server.upload(session, drawn("read")[0])
    answering = Asking(server, f"{session}/ask", {"text": "hi", "media": [1], "settings": LONG})
    until(lambda: answering.named("text"))
    found = server.engine.sessions.find(session.removeprefix("/api/"))
    if leave == "disconnect":
        answering.connection.sock.shutdown(2)
    else:
        server.post(f"{session}/end")
    until(lambda: len(server.engine.line) == 0)
    assert len(found.turns) == 2 and len(found.turns[-1]["content"]) < 6000
    if leave == "end":
        until(lambda: not found.conversation.tokens)
        assert found.attachments == {} and server.request("GET", f"{session}/media/1/picture")[0] == 404
        assert "is over" in server.post(f"{session}/ask", {"text": "hi"}, 404)["error"]


def test_two_tabs_share_nothing(server):
    one, other = server.begin(), server.begin()
    assert one != other
    server.upload(one, drawn("read")[0])
    assert server.request("GET", f"{one}/media/1/picture")[0] == 200
    assert server.request("GET", f"{other}/media/1/picture")[0] == 404
    assert "no attachment 1" in server.post(f"{other}/ask", {"text": "hi", "media": [1]}, 400)["error"]
    alone = server.ask(other, "hi")[-1]
    server.ask(one, "Read the text.", [1])
    assert server.ask(server.begin(), "hi")[-1]["prompt_tokens"] == alone["prompt_tokens"]


def test_only_the_latest_caches_stay_and_idle_sessions_end(server, monkeypatch):
    sessions = [server.begin() for _ in range(engine_module.KEPT_CACHES + 2)]
    found = [server.engine.sessions.find(session.removeprefix("/api/")) for session in sessions]
    for session in sessions:
        server.ask(session, "hi")
    kept = [one.conversation.tokens > 0 for one in found]
    assert kept == [False, False] + [True] * engine_module.KEPT_CACHES
    assert server.ask(sessions[0], "more")[-1]["event"] == "answer"
    found[1].seen -= 1 + sessions_module.IDLE_SECONDS
    server.engine.end_idle()
    assert found[1].ended and not found[0].ended
    assert (
        server.post(f"{sessions[0]}/alive") == {} and "is over" in server.post(f"{sessions[1]}/alive", {}, 404)["error"]
    )


def test_there_is_an_end_to_sessions_to_the_line_and_to_what_is_kept(server, monkeypatch):
    session = server.begin()
    with monkeypatch.context() as patched:
        patched.setattr(sessions_module, "MAX_SESSIONS", len(server.engine.sessions))
        assert "pages are open" in server.post("/api/sessions", {}, 400)["error"]
    with monkeypatch.context() as patched:
        patched.setattr(server_module, "MAX_WAITING", 0)
        assert "others wait" in server.post(f"{session}/ask", {"text": "hi"}, 503)["error"]
    picture = png(Image.new("RGB", (56, 56)))
    with monkeypatch.context() as patched:
        patched.setattr(sessions_module, "MAX_KEPT_BYTES", 100)
        assert "MiB; close one" in server.upload(session, picture, status=400)["error"]
    with monkeypatch.context() as patched:
        patched.setattr(server.engine.sessions, "max_tokens", 31)
        assert server.upload(session, picture)["tokens"] == 16
        said = server.upload(session, picture, status=400)["error"]
        assert "would be 32 tokens" in said and "--limit max_prompt_tokens=N" in said
        assert server.post(f"{session}/drop", {"number": 1}) == {}
        assert server.upload(session, picture)["number"] == 2


# ----------------------------------------------------------------------------------------------- files, other machines


def test_uploads_are_limited_and_what_is_none_is_told(server, tmp_path):
    session = server.begin()
    assert "more than the" in server.upload(session, b"x" * (MAX_UPLOAD + 1), status=413)["error"]
    connection = http.client.HTTPConnection(*server.address, timeout=60)  # without saying how much there is
    connection.request("POST", f"{session}/upload?name=a", iter([b"x" * (1 << 18)] * 5), encode_chunked=True)
    assert connection.getresponse().status == 413
    assert "is empty" in server.upload(session, b"", status=400)["error"]
    assert "'a b.png' is not an image" in server.upload(session, b"text", "a%20b.png", 400)["error"]
    huge = png(Image.new("1", (9000, 9000)))
    assert "--limit max_source_pixels=N" in server.upload(session, huge, status=400)["error"]
    write_video(tmp_path / "clip.mp4", width=64, height=48, seconds=2, fps=5)
    clip = server.upload(session, (tmp_path / "clip.mp4").read_bytes(), "clip.mp4", kind="video/mp4")
    assert clip["kind"] == "video" and clip["duration"] == pytest.approx(2) and len(clip["frame_times"]) == 4
    for view in ("picture", "parts"):
        status, headers, body = server.request("GET", f"{session}/media/1/{view}")
        assert status == 200 and headers["content-type"] == "image/png" and body[:4] == b"\x89PNG"
        assert headers["cache-control"] == "no-store"
    assert server.request("GET", f"{session}/media/1/../../../etc/passwd")[0] == 404


class _Pictures(http.server.ThreadingHTTPServer):
    """Another host, which has pictures, one of them larger than an upload may be."""

    def __init__(self):
        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self):
                data = bytes(MAX_UPLOAD + 1) if "large" in self.path else drawn("read")[0]
                self.send_response(200)
                self.send_header("content-length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

            def log_message(self, *_):
                pass

        super().__init__(("127.0.0.1", 0), Handler)
        self.address = f"http://127.0.0.1:{self.server_port}/picture.png"

    def __enter__(self):
        threading.Thread(target=self.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(self, *_):
        self.shutdown()
        self.server_close()


def test_files_of_the_server_and_addresses_are_refused_unless_allowed(server, model, tmp_path):
    from qwen2vl import Processor, assets

    (tmp_path / "in").mkdir(), (tmp_path / "out").mkdir()
    for place in ("in", "out"):
        (tmp_path / place / "a.png").write_bytes(drawn("read")[0])
    inside, outside = (str(tmp_path / place / "a.png") for place in ("in", "out"))
    session, far = server.begin(), _Pictures()
    assert "allow_local_files is False" in server.post(f"{session}/name", {"source": inside}, 400)["error"]
    assert "give --allow-remote" in server.post(f"{session}/name", {"source": "http://x/a.png"}, 400)["error"]
    assert "source: wants" in server.post(f"{session}/name", {"source": ["/etc"]}, 400)["error"]
    processor = Processor.from_pretrained(assets.folder(), roots=[tmp_path / "in"], allow_remote=True)
    with served(model, processor, named=("local", "remote")) as other, far:
        session = other.begin()
        assert other.post(f"{session}/name", {"source": inside})["kind"] == "image"
        assert "outside of the roots" in other.post(f"{session}/name", {"source": outside}, 400)["error"]
        fetched = other.post(f"{session}/name", {"source": far.address})
        assert (fetched["kind"], fetched["name"]) == ("image", far.address)
        large = {"source": f"{far.address}?large"}
        assert "more than the limit of" in other.post(f"{session}/name", large, 400)["error"]


def test_pages_of_others_may_not_ask(server):
    host, port = server.address
    for headers in (
        {"origin": "http://evil.example"},
        {"origin": "null"},
        {"origin": f"http://{host}:{port + 1}"},
        {"host": "evil.example"},
        {"host": f"evil.example:{port}"},
        {"host": ""},
        {"host": "[::1"},
        {"origin": "http://[::1"},
    ):
        status, _, body = server.request("POST", "/api/sessions", b"", headers)
        assert status == 403 and json.loads(body)["error"], headers
    own = {"origin": f"http://{host}:{port}"}
    assert server.request("POST", "/api/sessions", b"", own)[0] == 200
    status, headers, page = server.request("GET", "/")
    assert status == 200 and b"<!DOCTYPE html>" in page
    assert "default-src 'none'" in headers["content-security-policy"] and headers["x-content-type-options"] == "nosniff"
    assert server.request("GET", "/api/sessions")[0] == 405 and server.request("GET", "/docs")[0] == 404
    for body in (b"{", b"[1]", b"[" * 100_000):
        status, _, said = server.request("POST", f"{server.begin()}/ask", body)
        assert status == 400 and "the request" in json.loads(said)["error"]


# --------------------------------------------------------------------------------------------------------- screen game


def test_the_agent_plays_as_run_agent_does(server, model, processor):
    wanted = play(3, seed=4, languages=("en",))
    config = GenerationConfig.from_model(model, max_new_tokens=96)
    episode = run_agent(model_writer(model, processor, config=config), wanted, max_steps=engine_module.MAX_AGENT_STEPS)
    session = server.begin()
    assert server.events(f"{session}/step")[-1]["message"] == "there is no game: begin one"
    for given, said in (
        ({"level": 9}, "difficulty: wants one of 0"),
        ({"level": True}, "difficulty: wants one of 0"),
        ({"language": "tlh"}, "languages: wants"),
        ({"seed": -1}, "want whole numbers"),
        ({"seed": "x"}, "want whole numbers"),
        ({"settings": {"top_p": 7}}, "top_p must be"),
    ):
        assert said in server.post(f"{session}/game", {"level": 3, "language": "en", "seed": 4, **given}, 400)["error"]
    begun = server.post(f"{session}/game", {"level": 3, "language": "en", "seed": 4})
    assert begun["instruction"] == wanted.instruction and begun["outcome"] is None
    for n, step in enumerate(episode.steps):
        *pieces, told = server.events(f"{session}/step")
        assert told["event"] == "step" and told["text"] == step.text and told["steps"] == n + 1
        assert written(pieces) == step.text
        assert [call["name"] for call in told["calls"]] == [call.name for call in step.calls]
        assert told["screen"].startswith("data:image/png;base64,")
    assert told["outcome"] == episode.outcome and told["success"] == wanted.success
    assert "the run is over" in server.events(f"{session}/step")[-1]["message"]


def test_a_stopped_step_has_not_happened(server, model, processor, monkeypatch):
    session = server.begin()
    server.post(f"{session}/game", {"level": 0, "language": "en", "seed": 3})
    began, original = threading.Event(), engine_module._listener

    def held(stop, send):
        ids, pieces, on_token = original(stop, send)

        def told(*token):
            began.set()
            assert stop.wait(20)
            on_token(*token)

        return ids, pieces, told

    with monkeypatch.context() as patched:
        patched.setattr(engine_module, "_listener", held)
        stepping = Asking(server, f"{session}/step", {})
        assert began.wait(20)
        server.post(f"{session}/stop")
        stepping.join(20)
    assert stepping.events[-1] == {"event": "stopped"}
    assert server.events(f"{session}/step")[-1]["steps"] == 1


def test_another_process_that_is_lost_ends_the_server(processor):
    """The others wait in the middle of an answer that nobody goes on with."""

    class Lost:
        busy = True

    model = Qwen2VL.__new__(Qwen2VL)
    object.__setattr__(model, "parallel", Lost())
    engine = engine_module.Engine.__new__(engine_module.Engine)
    engine.model, engine._cached = model, []

    def fails():
        raise RuntimeError("peer is gone")

    with pytest.raises(RuntimeError, match="peer is gone"):
        engine._guarded(None, fails, threading.Event(), lambda event: None)


def test_a_tab_that_goes_while_it_waits_is_not_answered(server):
    server.endless = True
    first, second = server.begin(), server.begin()
    answering = Asking(server, f"{first}/ask", {"text": "hi", "settings": LONG})
    until(lambda: answering.named("text"))
    waiting = Asking(server, f"{second}/ask", {"text": "hi"})
    until(lambda: waiting.named("waiting"))
    waiting.connection.sock.shutdown(2)
    found = server.engine.sessions.find(second.removeprefix("/api/"))
    until(found.stop.is_set)
    server.post(f"{first}/stop")
    until(lambda: len(server.engine.line) == 0)
    assert found.turns == []
