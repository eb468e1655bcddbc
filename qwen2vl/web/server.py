"""The page and what it asks, over HTTP: uploads, questions whose answers stream, the screen game.

Answers and steps are lines of JSON, an event each, the last of which is the answer. Every other reply is one JSON
object, with an ``error`` in words where the status is not 200. Starlette and uvicorn, the extra ``web``, are imported
when a server is made.
"""

from __future__ import annotations

import asyncio
import json
import socket
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from ..errors import PromptError, Qwen2VLError, install_hint
from ..media.sources import open_source
from .attachments import Upload, read_attachment
from .engine import Engine, Event
from .sessions import Session

if TYPE_CHECKING:
    from starlette.requests import Request
    from starlette.responses import Response

MAX_WAITING = 32  # answers that are waited for; whoever comes then is sent away
UPLOADS_AT_ONCE = 4
_PAGE = Path(__file__).parent / "page"
_FILES = {"/": "index.html"} | {f"/{name}": name for name in ("page.css", "page.js", "server.js", "chat.js", "play.js")}
_TYPES = {".html": "text/html", ".js": "text/javascript", ".css": "text/css"}
_HEADERS = {
    # Nothing from another host, nothing inline, in no other page's frame; a data: picture is the game's screen.
    "content-security-policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; "
    "connect-src 'self'; frame-ancestors 'none'; base-uri 'none'; form-action 'none'",
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cross-origin-resource-policy": "same-origin",
    "cache-control": "no-store",  # a browser keeps no picture of a conversation that is over
}


def require_web() -> None:
    """Raises Qwen2VLError, with the command that installs it, where a package of the extra ``web`` is missing."""
    hints = {"starlette": install_hint("starlette"), "uvicorn": install_hint("uvicorn")}
    for package, hint in hints.items():
        if find_spec(package) is None:
            raise Qwen2VLError(f"the page needs the package {package}; {hint}")


class _Refused(Exception):
    """A reply of that status, with that message."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


class _Events:
    """Events from the model's thread to one reply, whose event loop made this."""

    def __init__(self) -> None:
        self._loop, self._queue = asyncio.get_running_loop(), asyncio.Queue[Event | None]()

    def send(self, event: Event | None) -> None:
        """Any thread may call it; None is the end."""
        with suppress(RuntimeError):  # the loop is closed, and nobody listens
            self._loop.call_soon_threadsafe(self._queue.put_nowait, event)

    async def lines(self, ended: Callable[[], None]) -> AsyncIterator[bytes]:
        """One for each event; ``ended`` is called when there are no more, or the browser has gone."""
        try:
            while (event := await self._queue.get()) is not None:
                yield json.dumps(event).encode() + b"\n"
        finally:
            ended()


class Site:
    """What the page may ask of an engine.

    Args:
        about: what the page shows of the model.
        max_upload: bytes of one file.
        hosts: the names that this server may be asked by, None for any. A page of another site that has its name point
            here, to read answers in the browser of who visits it, asks by its own.
        named: which files the page may name that are not uploaded: "remote" addresses, "local" files, both or none.
    """

    def __init__(
        self,
        engine: Engine,
        *,
        about: Mapping[str, Any],
        max_upload: int,
        hosts: frozenset[str] | None,
        named: tuple[str, ...] = (),
    ) -> None:
        from ..samples.skills import LEVELS

        self.engine, self.hosts, self.max_upload = engine, hosts, max_upload
        self._about = {
            **about,
            "settings": engine.defaults,
            "system": engine.system or "",
            "max_upload": max_upload,
            "named": named,
            "levels": list(LEVELS),
        }
        self._files = {path: (_PAGE / name).read_bytes() for path, name in _FILES.items()}
        self._uploads = asyncio.Semaphore(UPLOADS_AT_ONCE)
        self._reading = threading.Lock()  # one file is decoded at a time

    def application(self) -> Callable:
        """An ASGI application."""
        from starlette.applications import Starlette
        from starlette.routing import Route

        posts = {
            "/api/sessions": self._begin,
            "/api/{key}/alive": self._alive,
            "/api/{key}/end": self._end,
            "/api/{key}/upload": self._upload,
            "/api/{key}/name": self._name,
            "/api/{key}/drop": self._drop,
            "/api/{key}/clear": self._clear,
            "/api/{key}/ask": self._ask,
            "/api/{key}/stop": self._stop,
            "/api/{key}/game": self._game,
            "/api/{key}/step": self._step,
        }
        gets = dict.fromkeys(_FILES, self._file) | {
            "/api/about": self._tell,
            "/api/{key}/media/{number:int}/{view}": self._picture,
        }
        routes = [Route(path, self._replying(reply), methods=["POST"]) for path, reply in posts.items()]
        routes += [Route(path, self._replying(reply), methods=["GET"]) for path, reply in gets.items()]
        return self._guarding(Starlette(routes=routes))

    # ------------------------------------------------------------------------------------------------ every request

    def _guarding(self, app: Callable) -> Callable:
        """The application for requests of our own page, each of whose replies has our headers."""
        from starlette.datastructures import Headers, MutableHeaders
        from starlette.responses import JSONResponse

        async def guarded(scope: Any, receive: Any, send: Any) -> None:
            if scope["type"] != "http":
                return

            async def send_guarded(message: Any) -> None:
                if message["type"] == "http.response.start":
                    MutableHeaders(scope=message).update(_HEADERS)
                await send(message)

            headers = Headers(scope=scope)
            if why := self._stranger(headers.get("host", ""), headers.get("origin")):
                await JSONResponse({"error": why}, 403)(scope, receive, send_guarded)
            else:
                await app(scope, receive, send_guarded)

        return guarded

    def _stranger(self, host: str, origin: str | None) -> str:
        """Why a request is not our page's; "" where it may be."""
        try:
            name, asking = urlsplit(f"//{host}").hostname or "", host if origin is None else urlsplit(origin).netloc
        except ValueError:  # half an address of IPv6
            return "the request names no host"
        if self.hosts is not None and name not in self.hosts:
            return f"this server is asked as {' or '.join(sorted(self.hosts))}, not as {name!r}"
        return "" if asking == host else f"a page of {origin} may not ask here"

    def _replying(self, reply: Callable) -> Callable:
        """A handler whose errors become replies, and end nothing else."""
        from starlette.requests import ClientDisconnect
        from starlette.responses import JSONResponse, Response

        async def handler(request: Request) -> Response:
            try:
                said = await reply(request)
                return said if isinstance(said, Response) else JSONResponse(said)
            except _Refused as refused:
                return JSONResponse({"error": str(refused)}, refused.status)
            except ClientDisconnect:
                return Response(status_code=400)  # which nobody reads
            except Exception as error:
                return JSONResponse({"error": self.engine.message(error)}, 400)

        return handler

    def _session(self, request: Request) -> Session:
        session = self.engine.sessions.find(request.path_params["key"])
        if session is None:
            raise _Refused(404, "this conversation is over, and what was attached to it is gone: reload the page")
        return session

    async def _body(self, request: Request) -> dict[str, Any]:
        """The JSON object of a request."""
        most = 8 * self.engine.processor.tokenizer.max_characters + (1 << 16)
        parts, size = [], 0
        async for part in request.stream():
            size += len(part)
            if size > most:
                raise _Refused(413, f"the request has more than {most} bytes")
            parts.append(part)
        try:
            given = json.loads(b"".join(parts))
        except (ValueError, RecursionError) as error:
            raise PromptError(f"the request is no JSON: {error}") from None
        if not isinstance(given, dict):
            raise PromptError(f"the request wants a JSON object, got {type(given).__name__}")
        return given

    # ------------------------------------------------------------------------------------------- page and sessions

    async def _file(self, request: Request) -> Response:
        from starlette.responses import Response

        path = request.url.path
        return Response(self._files[path], media_type=_TYPES[Path(_FILES[path]).suffix])

    async def _tell(self, request: Request) -> dict[str, Any]:
        return self._about

    async def _begin(self, request: Request) -> dict[str, Any]:
        return {"key": self.engine.sessions.begin()[0]}

    async def _alive(self, request: Request) -> dict[str, Any]:
        self._session(request)
        return {}

    async def _end(self, request: Request) -> dict[str, Any]:
        self.engine.end(request.path_params["key"])
        return {}

    async def _clear(self, request: Request) -> dict[str, Any]:
        session = self._session(request)
        self._check_free(session)
        self.engine.sessions.clear(session)
        return {}

    # ------------------------------------------------------------------------------------------------------- media

    async def _upload(self, request: Request) -> dict[str, Any]:
        session = self._session(request)
        name = request.query_params.get("name", "")[:200] or "upload"
        clip = request.headers.get("content-type", "").startswith("video/")
        too_much = _Refused(413, f"{name} has more than the {self.max_upload} bytes of an upload; see --max-upload")
        declared = request.headers.get("content-length", "")
        if declared.isdigit() and int(declared) > self.max_upload:
            raise too_much
        async with self._uploads:
            with Upload(name) as file:
                size = 0
                async for part in request.stream():
                    size += len(part)
                    if size > self.max_upload:
                        raise too_much
                    file.write(part)
                if not size:
                    raise PromptError(f"{name} is empty (0 bytes)")
                return await asyncio.to_thread(self._attach, session, file, name, clip)

    async def _name(self, request: Request) -> dict[str, Any]:
        session = self._session(request)
        source = (await self._body(request)).get("source")
        if not isinstance(source, str) or not source:
            raise PromptError("source: wants an address or a path")

        def read() -> dict[str, Any]:
            access = self.engine.processor.access
            with open_source(source, max_bytes=self.max_upload, access=access) as file:
                return self._attach(session, file, source[:200], False)

        async with self._uploads:
            return await asyncio.to_thread(read)

    def _attach(self, session: Session, file: Any, name: str, clip: bool) -> dict[str, Any]:
        engine = self.engine
        with self._reading:
            attachment = read_attachment(engine.processor, file, name, engine.options, clip=clip)
        return {"number": engine.sessions.keep(session, attachment), **attachment.facts()}

    async def _drop(self, request: Request) -> dict[str, Any]:
        session = self._session(request)
        self._check_free(session)
        number = (await self._body(request)).get("number")
        if type(number) is not int:
            raise PromptError("number: wants that of an attachment")
        self.engine.sessions.drop(session, number)
        return {}

    async def _picture(self, request: Request) -> Response:
        from starlette.responses import Response

        attachment = self._session(request).attachments.get(request.path_params["number"])
        view = request.path_params["view"]
        if attachment is None or view not in ("picture", "parts"):
            raise _Refused(404, "there is no such picture")
        return Response(await asyncio.to_thread(getattr, attachment, view), media_type="image/png")

    # --------------------------------------------------------------------------------------------------- the model

    async def _ask(self, request: Request) -> Response:
        session, given = self._session(request), await self._body(request)
        text, media, system = given.get("text"), given.get("media", []), given.get("system")
        if not isinstance(text, str) or not text.strip():
            raise PromptError("text: wants a question")
        if not isinstance(media, list) or not all(type(number) is int for number in media):
            raise PromptError("media: wants a list of numbers of attachments")
        if not isinstance(system, str | None):
            raise PromptError(f"system: wants a text, got {type(system).__name__}")
        session.attached(media)
        config = self.engine.settings(given.get("settings", {}))
        asked = {"text": text, "media": media, "config": config, "system": system or None}
        return self._in_line(session, lambda stop, send: self.engine.answer(session, stop, send, **asked))

    async def _stop(self, request: Request) -> dict[str, Any]:
        session = self._session(request)
        session.stop.set()
        if (asked := session.asked) is not None and self.engine.line.leave(asked):
            asked()  # nothing is computed for who does not wait for it
        return {}

    async def _game(self, request: Request) -> Event:
        session, given = self._session(request), await self._body(request)
        self._check_free(session)
        config = self.engine.settings(given.get("settings", {}))
        wanted = given.get("level"), given.get("language"), given.get("seed")
        return await asyncio.to_thread(self.engine.new_game, session, *wanted, config)

    async def _step(self, request: Request) -> Response:
        session = self._session(request)
        return self._in_line(session, lambda stop, send: self.engine.step(session, stop, send))

    def _check_free(self, session: Session) -> None:
        if session.asked is not None:
            raise _Refused(409, "this page is being answered: stop that, or wait for it")

    def _in_line(self, session: Session, work: Callable[[threading.Event, Callable[[Event], None]], None]) -> Response:
        """The reply to what the model has to compute: events, of places in the line before all others."""
        from starlette.responses import StreamingResponse

        self._check_free(session)
        line = self.engine.line
        if len(line) >= MAX_WAITING:
            raise _Refused(503, f"{MAX_WAITING} others wait for an answer: try again later")
        events, stop = _Events(), threading.Event()

        def asked() -> None:
            try:
                work(stop, events.send)
            finally:
                session.asked = None
                events.send(None)

        session.asked, session.stop = asked, stop
        line.join(asked, lambda ahead: events.send({"event": "waiting", "ahead": ahead}))
        return StreamingResponse(events.lines(stop.set), media_type="application/x-ndjson")


def listen(host: str, port: int) -> socket.socket:
    """A socket that takes connections; port 0 is any that is free. Raises OSError where it cannot be had."""
    family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    return socket.create_server(address[:2], family=family)


@contextmanager
def serving(site: Site, sock: socket.socket) -> Iterator[None]:
    """Inside, a thread answers requests on ``sock``; the engine's line is the caller's to serve. In the end no
    connection is waited for, and ``sock`` is closed."""
    import uvicorn

    config = uvicorn.Config(
        site.application(), http="h11", ws="none", loop="asyncio", lifespan="off", log_config=None, access_log=False
    )
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [sock]}, name="qwen2vl web", daemon=True)
    with sock:
        thread.start()
        while not server.started and thread.is_alive():
            time.sleep(0.01)
        try:
            yield
        finally:
            server.should_exit = server.force_exit = True
            thread.join(0.4)
