"""Where the bytes of an image or a video come from: paths, URLs, data URIs, bytes and file objects.

Nothing is guessed: a string is a URL when it carries a scheme, and a path otherwise. Which files may be opened, and
whether anything may be fetched, is said by :class:`qwen2vl.media.options.Access`.
"""

from __future__ import annotations

import base64
import binascii
import contextlib
import functools
import http.client
import io
import os
import re
import socket
import tempfile
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import IO, Any, BinaryIO, cast

from PIL import Image

from qwen2vl.errors import MediaError
from qwen2vl.files import open_regular
from qwen2vl.media.options import ANYWHERE, Access

REMOTE_TIMEOUT = 30.0  # seconds, for one socket operation
REMOTE_DEADLINE = 600.0  # seconds, for a whole download: connecting, redirects, headers and body
_SPOOL_BYTES = 64 << 20  # what is read from a stream stays in memory up to this size, then goes to a temporary file
_CHUNK_BYTES = 1 << 20
_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]+)://")  # two letters at least, so that C:\ stays a path
_REMOTE_SCHEMES = ("http", "https")


def describe_source(source: object) -> str:
    """A short name for messages: paths and URLs as they are, everything else by kind and length."""
    if isinstance(source, str):
        if source[:5].lower() == "data:":
            kind = re.split("[;,]", source[5:64], maxsplit=1)[0] or "no media type"
            return f"data URI ({kind}, {len(source)} characters)"
        return repr(source) if len(source) <= 200 else f"{source[:60]!r}... ({len(source)} characters)"
    if isinstance(source, os.PathLike):
        return repr(os.fspath(source))
    if isinstance(source, (bytes, bytearray, memoryview)):
        return f"{type(source).__name__} of length {len(source)}"
    if hasattr(source, "read"):
        name = getattr(source, "name", None)
        return f"file object {name!r}" if isinstance(name, str) else f"file object of type {type(source).__name__}"
    if isinstance(source, Mapping):
        return f"dict with {', '.join(map(repr, source)) or 'no keys'}"
    if isinstance(source, Image.Image):
        return f"{type(source).__name__} (mode {source.mode}, size {source.width} x {source.height})"
    return f"object of type {type(source).__name__}"


def unwrap_source(source: object) -> object:
    """What ``{"bytes": ..., "path": ...}`` stands for, the form in which Hugging Face's datasets hold a file: its bytes
    where there are some, else its path. Anything else is returned as it is.

    Raises:
        MediaError: other keys, or a value of another type.
    """
    if not isinstance(source, Mapping):
        return source
    given = {key: value for key, value in source.items() if value is not None}
    if not given or not given.keys() <= {"bytes", "path"}:
        raise MediaError(f"{describe_source(source)}: wants 'bytes', 'path' or both, and nothing else")
    name, wanted = ("bytes", (bytes, bytearray, memoryview)) if "bytes" in given else ("path", (str, os.PathLike))
    if not isinstance(given[name], wanted):
        raise MediaError(f"{describe_source(source)}: {name!r} holds a {type(given[name]).__name__}")
    return given[name]


@contextlib.contextmanager
def open_source(source: object, *, max_bytes: int, access: Access = ANYWHERE, also: str = "") -> Iterator[BinaryIO]:
    """Open ``source`` as a seekable binary stream that starts at position 0.

    Args:
        source: path (``str`` or ``os.PathLike``), ``file://`` URL, base64 ``data:`` URI, ``bytes``, ``bytearray``,
            ``memoryview`` or binary file object (read from where it stands, left open), an ``http://`` or
            ``https://`` URL, or one of these as ``unwrap_source`` takes it.
        max_bytes: the most bytes read from a network or from a stream that has to be copied.
        also: what else the caller takes, for the message about a source that is none of it.
        access: which of these may be opened. File objects are taken in any case: the program opened them.

    Raises:
        MediaError: the source is missing, unreadable, malformed, empty, too large, of a type that is none of the above,
            or is one that ``access`` forbids.
    """
    source = unwrap_source(source)
    label = describe_source(source)
    with contextlib.ExitStack() as stack:
        if isinstance(source, (bytes, bytearray, memoryview)):
            stream: IO[bytes] = io.BytesIO(source)
        elif hasattr(source, "read"):
            stream = _from_file_object(source, label, max_bytes, stack)
        elif isinstance(source, str) and source[:5].lower() == "data:":
            stream = io.BytesIO(_decode_data_uri(source, label))
        elif isinstance(source, str) and (scheme := _SCHEME.match(source)):
            name = scheme.group(1).lower()
            if name == "file":
                path = _local_path(_file_url_path(source, label), label, access)
                stream = stack.enter_context(_open_path(path, label))
            elif name in _REMOTE_SCHEMES:
                if not access.remote:
                    raise MediaError(f"{label} is a remote address: pass allow_remote=True to fetch it")
                stream = _download(source, label, max_bytes, stack)
            else:
                raise MediaError(f"{label}: scheme {name!r} is not supported, want file, http or https")
        elif isinstance(source, (str, os.PathLike)):
            path = _local_path(cast("str | os.PathLike[str]", source), label, access)
            stream = stack.enter_context(_open_path(path, label))
        else:
            raise MediaError(
                "source must be a path, URL, data URI, bytes, a binary file object, "
                f"a dict with 'bytes' or 'path'{also}, got an {label}"
            )
        if not stream.read(1):
            raise MediaError(f"{label} is empty (0 bytes)")
        stream.seek(0)
        yield cast(BinaryIO, stream)


def _local_path(path: str | os.PathLike[str], label: str, access: Access) -> str | os.PathLike[str]:
    """The path to open for a file of this machine, resolved where there are roots.

    What is refused is refused before the file is looked for, so that nobody learns what exists. Where there are roots
    the resolved path is opened, so that a link that changes afterwards leads nowhere else.
    """
    if not access.local_files:
        raise MediaError(f"{label} names a file of this machine, and allow_local_files is False")
    if access.base is not None:
        path = access.base / path
    if access.roots is None:
        return path
    try:
        resolved = Path(path).resolve()
    except (OSError, ValueError, RuntimeError) as error:  # a null byte, or links that go in a circle
        raise MediaError(f"{label} cannot be read: {error}") from error
    if not any(resolved.is_relative_to(root) for root in access.roots):
        roots = ", ".join(repr(str(root)) for root in access.roots) or "none"
        raise MediaError(f"{label} lies outside of the roots that files of this machine are read from: {roots}")
    return resolved


def _open_path(path: str | os.PathLike[str], label: str) -> BinaryIO:
    try:
        if not os.path.exists(path):
            raise MediaError(f"no such file: {label}")
        if not os.path.isfile(path):
            raise MediaError(f"{label} is not a regular file")
        return open_regular(path)
    except OSError as error:  # no permission, or vanished in between
        raise MediaError(f"{label} cannot be read: {error.strerror or error}") from error


def _file_url_path(url: str, label: str) -> str:
    # By hand: urllib.parse drops tabs and line ends, and with them names another file.
    host, slash, path = url.partition("://")[2].partition("/")
    if host.lower() not in ("", "localhost"):
        raise MediaError(f"{label}: a file URL must name this machine, got host {host!r}")
    # A "#" or "?" begins what belongs to no path. Whoever leaves it as it is means a file of that name: the file with
    # the shorter name would be another one.
    for mark in "#?":
        if mark in path:
            raise MediaError(
                f"{label}: a {mark!r} in the name of a file is written {urllib.parse.quote(mark)} in a URL"
            )
    return urllib.request.url2pathname(slash + path)


def data_uri_frames(source: object) -> list[bytes] | None:
    """The frames of ``data:video/jpeg;base64,F1,F2,...``, as clients of servers write a clip of JPEG pictures, or None
    for any other source.

    Raises:
        MediaError: it is not base64, or a frame is malformed or empty.
    """
    if not isinstance(source, str) or not re.match("data:video/jpeg[;,]", source[:16], re.IGNORECASE):
        return None
    label = describe_source(source)
    frames = _data_uri_payload(source, label).split(",")
    return [_decode_base64(frame, f"frame {n} of {label}") for n, frame in enumerate(frames)]


def _decode_data_uri(uri: str, label: str) -> bytes:
    return _decode_base64(_data_uri_payload(uri, label), label)


def _data_uri_payload(uri: str, label: str) -> str:
    header, comma, payload = uri[5:].partition(",")
    if not comma:
        raise MediaError(f"{label} has no comma between its header and its data")
    if header.split(";")[-1].strip().lower() != "base64":
        raise MediaError(f"{label} is not base64: want data:<type>;base64,<data>")
    return "".join(urllib.parse.unquote(payload).split())


def _decode_base64(text: str, label: str) -> bytes:
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError) as error:
        hint = "; frames joined by commas are taken as data:video/jpeg" if "," in text else ""
        raise MediaError(f"{label} holds malformed base64: {error}{hint}") from error


def _from_file_object(source: Any, label: str, max_bytes: int, stack: contextlib.ExitStack) -> IO[bytes]:
    try:
        if not isinstance(source.read(0), bytes):
            raise MediaError(f"{label} is opened in text mode, want binary")
        if hasattr(source, "seekable") and source.seekable() and source.tell() == 0:
            return source
        spool = stack.enter_context(_spool())
        _copy(source.read, spool, label, max_bytes)
    except MediaError:
        raise
    except (
        OSError,
        ValueError,
        TypeError,
        AttributeError,
    ) as error:  # closed, write-only, or not quite a file
        raise MediaError(f"{label} cannot be read: {error}") from error
    return spool


def _spool() -> IO[bytes]:
    return cast("IO[bytes]", tempfile.SpooledTemporaryFile(max_size=_SPOOL_BYTES))


def _copy(read: Callable[[int], bytes], target: Any, label: str, max_bytes: int) -> None:
    """Copy all that ``read`` gives to ``target`` and rewind the latter; refuse more than ``max_bytes``."""
    total = 0
    while chunk := read(_CHUNK_BYTES):
        total += len(chunk)
        if total > max_bytes:
            raise MediaError(f"{label} holds more than the limit of {max_bytes} bytes")
        target.write(chunk)
    target.seek(0)


class _CheckedRedirects(urllib.request.HTTPRedirectHandler):
    """A server must not be able to send us to a local file or to another protocol."""

    def redirect_request(self, req, fp, code, msg, headers, newurl):
        scheme = urllib.parse.urlsplit(newurl).scheme.lower()
        if scheme not in _REMOTE_SCHEMES:
            raise MediaError(f"{req.full_url!r} redirects to scheme {scheme!r}, want http or https")
        return super().redirect_request(req, fp, code, msg, headers, newurl)


def _patience(deadline: float) -> float:
    """Seconds that the next socket operation may take."""
    left = deadline - time.monotonic()
    if left <= 0:
        raise TimeoutError("timed out")
    return min(REMOTE_TIMEOUT, left)


class _TimedReader(io.RawIOBase):
    """A socket read with the time left as the timeout of every operation: a trickle cannot outlast the deadline."""

    def __init__(self, sock: socket.socket, deadline: float):
        self._socket, self._deadline = sock, deadline
        self._raw = sock.makefile("rb", buffering=0)  # keeps the socket open until the response is closed

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int | None:
        self._socket.settimeout(_patience(self._deadline))
        return self._raw.readinto(buffer)

    def close(self) -> None:
        self._raw.close()
        super().close()


class _TimedSocket:
    """What a response asks of its socket: a buffered file."""

    def __init__(self, sock: socket.socket, deadline: float):
        self._socket, self._deadline = sock, deadline

    def makefile(self, mode: str) -> io.BufferedReader:
        return io.BufferedReader(_TimedReader(self._socket, self._deadline))


class _TimedConnection(http.client.HTTPConnection):
    """Connects, and reads headers and body, within ``deadline`` (of ``time.monotonic``)."""

    def __init__(self, *args: Any, deadline: float, **options: Any):
        super().__init__(*args, **options)
        self._deadline = deadline
        # urllib and a proxy's tunnel both make their responses through this attribute.
        self.response_class = functools.partial(_timed_response, deadline)  # type: ignore[assignment]

    def connect(self) -> None:
        self.timeout = _patience(self._deadline)
        super().connect()


class _TimedTLSConnection(_TimedConnection, http.client.HTTPSConnection):
    """The same over TLS, with the default context's checks."""


def _timed_response(deadline: float, sock: socket.socket, *args: Any, **options: Any) -> http.client.HTTPResponse:
    return http.client.HTTPResponse(cast(socket.socket, _TimedSocket(sock, deadline)), *args, **options)


class _TimedHandler(urllib.request.HTTPHandler, urllib.request.HTTPSHandler):
    """Serves http and https with connections that keep to ``deadline``."""

    def __init__(self, deadline: float):
        super().__init__()
        self._deadline = deadline

    def http_open(self, req: urllib.request.Request) -> Any:
        return self.do_open(_TimedConnection, req, deadline=self._deadline)  # type: ignore[arg-type]

    def https_open(self, req: urllib.request.Request) -> Any:
        return self.do_open(_TimedTLSConnection, req, deadline=self._deadline)  # type: ignore[arg-type]


def _download(url: str, label: str, max_bytes: int, stack: contextlib.ExitStack) -> IO[bytes]:
    deadline = time.monotonic() + REMOTE_DEADLINE
    # Built by hand: urllib's default opener would also serve file:, ftp: and data: addresses.
    opener = urllib.request.OpenerDirector()
    for handler in (
        urllib.request.ProxyHandler(),
        _TimedHandler(deadline),
        urllib.request.HTTPDefaultErrorHandler(),
        urllib.request.HTTPErrorProcessor(),
        _CheckedRedirects(),
        urllib.request.UnknownHandler(),
    ):
        opener.add_handler(handler)
    spool = stack.enter_context(_spool())
    try:
        request = urllib.request.Request(url, headers={"User-Agent": "qwen2vl", "Accept": "*/*"})
        with opener.open(request, timeout=REMOTE_TIMEOUT) as response:
            declared = response.headers.get("Content-Length", "")
            if declared.isdigit() and int(declared) > max_bytes:
                raise MediaError(f"{label} declares {declared} bytes, more than the limit of {max_bytes}")
            # read1 gives what has arrived: read would wait for a whole chunk.
            _copy(response.read1, spool, label, max_bytes)
    except MediaError:
        raise
    except (OSError, ValueError, http.client.HTTPException) as error:  # URLError and timeouts are OSErrors
        if time.monotonic() >= deadline:
            raise MediaError(f"{label} took longer than {REMOTE_DEADLINE:g} s to arrive") from error
        raise MediaError(f"{label} could not be fetched: {error}") from error
    return spool
