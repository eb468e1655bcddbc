"""``qwen2vl web``: what it says as it begins, what it refuses, and how it ends."""

from __future__ import annotations

import os
import socket
import urllib.request

import pytest
from typer.testing import CliRunner

from qwen2vl import assets
from qwen2vl.cli import app
from qwen2vl.cli import web as command_module
from qwen2vl.errors import install_hint
from qwen2vl.web import server as server_module
from qwen2vl.web.line import Line
from qwen2vl.web.server import listen
from tests.model.test_interrupts import forked, interrupting


@pytest.fixture
def installed():
    pytest.importorskip("starlette", reason="the page needs the extra web")
    pytest.importorskip("uvicorn", reason="the page needs the extra web")


@pytest.fixture
def run(monkeypatch):
    """The command; in the place of serving the line it calls ``visit`` with its engine, once. ``ports``: where it
    listened."""

    def listen_and_say(host, port):
        sock = listen(host, port)
        call.ports.append(sock.getsockname()[1])
        return sock

    def call(*args, visit=lambda engine: None):
        class Over(Exception):
            pass

        def serve(line, meanwhile, every=60.0):
            visit(meanwhile.__self__)
            raise Over

        monkeypatch.setattr(Line, "serve", serve)
        result = CliRunner().invoke(app, ["web", "--port", "0", "--device", "cpu", *map(str, args)])
        if isinstance(result.exception, Over):
            result.exit_code = 0
        return result

    call.ports = []
    monkeypatch.setattr(server_module, "listen", listen_and_say)
    return call


def test_a_missing_package_is_told_before_anything_is_loaded(run, monkeypatch):
    for package in ("starlette", "uvicorn"):
        monkeypatch.setattr(server_module, "find_spec", lambda name, gone=package: None if name == gone else name)
        result = run("--model", "not there")
        assert result.exit_code == 1 and result.stderr.strip() == (
            f"error: the page needs the package {package}; {install_hint(package)}"
        )


def test_it_listens_on_this_machine_alone_and_is_there_where_it_says(run, installed):
    seen = {}

    def visit(engine):
        seen["access"], seen["defaults"] = engine.processor.access, engine.defaults
        seen["kept"] = engine.model.kept_features
        seen["page"] = urllib.request.urlopen(f"http://127.0.0.1:{run.ports[-1]}/", timeout=20).read()

    result = run("--temperature", 0.5, "--stop", "x", visit=visit)
    assert result.exit_code == 0, result.output
    assert result.stdout == f"http://127.0.0.1:{run.ports[-1]}\n" and b"<title>qwen2vl</title>" in seen["page"]
    assert "a toy answers" in result.stderr and "the toy: 4." in result.stderr and "warning" not in result.stderr
    access = seen["access"]
    assert (access.local_files, access.remote, access.roots) == (False, False, ())
    defaults = {name: value for name, value in seen["defaults"].items() if value is not None}
    assert defaults == {"max_new_tokens": assets.MAX_NEW_TOKENS, "temperature": 0.5, "stop": ["x"]}
    assert seen["kept"] is not None


def test_another_address_is_warned_of_and_folders_are_allowed_by_name(run, installed, tmp_path):
    answered = []

    def visit(engine):
        answered.append(engine.processor.access)

    result = run("--host", "0.0.0.0", "--allow-files", tmp_path, "--allow-remote", "-q", visit=visit)
    assert result.exit_code == 0, result.output
    line = " ".join(result.stderr.split())
    assert line.startswith("warning: --host 0.0.0.0: whoever reaches this port") and "no password" in line
    assert (answered[0].local_files, answered[0].remote, answered[0].roots) == (True, True, (tmp_path.resolve(),))
    result = run("--allow-files", tmp_path / "none")
    assert result.exit_code == 1 and "is no folder" in result.stderr


def test_what_cannot_be_is_refused_before_the_model_is_loaded(run, installed):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        result = run("--port", taken.getsockname()[1], "--model", "not there")
    assert result.exit_code == 2 and "Address already in use" in result.stderr
    for host in ("no such host.invalid", "x" * 70):
        result = run("--host", host)
        assert result.exit_code == 2 and host[:20] in result.stderr
    result = run("--top-p", 0.5, "--temperature", 0)
    assert result.exit_code == 0, result.output  # as in chat: the likeliest token is one of any share


def test_of_several_processes_one_listens(run, installed, monkeypatch):
    """The others compute for it: torchrun gives all the same port."""

    class Loaded(Exception):
        pass

    def load(*_, **__):
        raise Loaded

    monkeypatch.setattr(command_module, "load", load)
    for rank, listened in (("0", 1), ("1", 1)):
        for name, value in {"TORCHELASTIC_RUN_ID": "x", "WORLD_SIZE": "2", "RANK": rank}.items():
            monkeypatch.setenv(name, value)
        assert isinstance(run().exception, Loaded) and len(run.ports) == listened


def test_it_listens_to_a_name_and_to_ipv6():
    for host in ("localhost", "::1"):
        try:
            sock = listen(host, 0)
        except OSError:
            assert host == "::1"  # a machine without it
            continue
        with sock:
            assert sock.getsockname()[1] > 0


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system does not fork")
def test_ctrl_c_ends_it(installed, tmp_path):
    """While it waits for who asks; and no thread that serves keeps it."""
    prepare = interrupting("qwen2vl.web.line:Line", "serve_next")
    status, said = forked(["web", "--port", "0", "--quiet", "--device", "cpu"], prepare, tmp_path / "stderr")
    assert (status, said) == (130, "interrupted\n")
