"""README and docs: their code and commands run, their links lead somewhere, and their GPU numbers are the results'.

A fenced block of ``bash`` or ``python`` has a comment before it: ``<!-- run -->``, or ``<!-- not run: REASON -->`` for
what needs a GPU, a download, a server or hours. What is run finds ``photo.jpg``, ``clip.mp4`` and ``asked.jsonl`` in
its folder, and the small model of the package stands in for the released checkpoint. The Python of one page shares its
names.
"""

from __future__ import annotations

import json
import pkgutil
import re
import shlex
from dataclasses import dataclass
from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

import benchmarks.__main__ as benchmarks
from benchmarks import report
from benchmarks.run import RESULTS
from qwen2vl import assets
from qwen2vl.cli import app, stack
from qwen2vl.supported import SUPPORTED
from qwen2vl_kernels import varlen_attention
from qwen2vl_kernels.core.backends import PREFERENCE
from qwen2vl_kernels.integrations import sglang, transformers, vllm
from qwen2vl_kernels.integrations._switch import STACKS, VARIABLE, parse
from tests.integrations.fakes.sglang import install_sglang
from tests.integrations.fakes.vllm import install_vllm
from tests.integrations.fakes.vlmeval import install_vlmeval

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
CHECKPOINT = "Qwen/Qwen2-VL-2B-Instruct"
_FENCE = re.compile(r"(?:^<!-- ([^\n]*) -->\n)?^```(\w*)\n(.*?)^```$", re.DOTALL | re.MULTILINE)


@dataclass(frozen=True)
class Block:
    marker: str
    language: str
    code: str


def blocks(page: Path) -> list[Block]:
    return [Block(*found) for found in _FENCE.findall(page.read_text(encoding="utf-8"))]


def page_names(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


@pytest.mark.parametrize("page", PAGES, ids=page_names)
def test_every_block_is_run_or_says_why_not(page):
    found = blocks(page)
    assert page.read_text(encoding="utf-8").count("\n```") == 2 * len(found), "a fence that is not understood"
    for block in found:
        assert block.language in ("bash", "python", "toml", "json"), block
        if block.language in ("bash", "python"):
            assert re.fullmatch(r"run|not run: \w.*", block.marker), f"<!-- run --> or <!-- not run: why --> of {block}"
    assert any(block.marker == "run" for block in found), "a page without anything that is tested"


def test_every_backend_of_attention_is_told_of():
    page = (ROOT / "docs" / "kernels.md").read_text(encoding="utf-8")
    for name in {name for names in PREFERENCE["varlen_attention"].values() for name in names}:
        assert f"\n| `{name}` | " in page and f'``"{name}"``' in (varlen_attention.__doc__ or ""), name


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Where the pages are followed: a photo, a clip, stand-ins of the servers, and nothing switched on."""
    for variable in (VARIABLE, "QWEN2VL_KERNELS_DISABLE", "VLLM_PLUGINS", "SGLANG_PLUGINS"):
        monkeypatch.delenv(variable, raising=False)
    versions = {"vllm": "0.33.0", "sglang": "0.5.23"}
    found = stack.installed_version
    monkeypatch.setattr(stack, "installed_version", lambda name: versions.get(name) or found(name))
    install_vllm(monkeypatch), install_sglang(monkeypatch), install_vlmeval(monkeypatch)
    for adapter in (vllm, sglang):
        adapter._patches.cache_clear()
    monkeypatch.chdir(tmp_path)
    ramp = np.linspace(0, 255, 112 * 84 * 3).astype(np.uint8).reshape(84, 112, 3)
    Image.fromarray(ramp).save("photo.jpg")
    Path("asked.jsonl").write_text('{"id": 1, "image": "photo.jpg", "prompt": "What is it?"}\n')
    write_clip("clip.mp4", [np.roll(ramp, 12 * n, axis=1) for n in range(8)])
    yield tmp_path
    for adapter in (vllm, sglang, transformers):
        adapter.restore()
    for adapter in (vllm, sglang):
        adapter._patches.cache_clear()


def write_clip(path: str, frames: list[np.ndarray]) -> None:
    """Two seconds of video, four frames each."""
    with av.open(path, "w") as file:
        stream = file.add_stream("libx264", rate=4)
        stream.height, stream.width, stream.pix_fmt = *frames[0].shape[:2], "yuv420p"
        for frame in frames:
            file.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        file.mux(stream.encode())


def run_command(line: str) -> None:
    """A line of a shell: ``NAME=value ... qwen2vl ...`` or ``python -m benchmarks ...``, in this process."""
    words = shlex.split(line, comments=True)
    environment = {}
    while words and re.match(r"\w+=", words[0]):
        name, _, environment[name] = words.pop(0).partition("=")
    if not words:
        return
    if words[0] == "qwen2vl":
        command, words = app, words[1:]
    else:
        assert words[:3] == ["python", "-m", "benchmarks"], f"this test cannot run {line!r}"
        command, words = benchmarks.app, words[3:]
    result = CliRunner().invoke(command, words, env=environment, catch_exceptions=False)
    assert result.exit_code == 0, f"{line}\n{result.output}"
    assert result.stdout.strip(), f"{line} says nothing"


@pytest.mark.parametrize("page", PAGES, ids=page_names)
def test_what_a_page_says_runs(page, folder):
    names: dict = {"__name__": "page"}
    for block in blocks(page):
        if block.marker != "run":
            continue
        code = block.code.replace(CHECKPOINT, str(assets.FOLDER))
        if block.language == "python":
            exec(compile(code, page_names(page), "exec"), names)
        else:
            for line in code.replace("\\\n", " ").splitlines():
                run_command(line)


# ------------------------------------------------------------------------------------------------------ what they say


def anchors(page: Path) -> set[str]:
    text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    headings = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", [*PAGES, ROOT / "CONTRIBUTING.md"], ids=page_names)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8")):
        assert "://" not in target, "pages stand by themselves"
        name, _, anchor = target.partition("#")
        path = (page.parent / name) if name else page
        assert path.is_file(), f"{target} is not there"
        assert not anchor or anchor in anchors(path), f"{target} has no such heading"


def test_the_readme_is_read_in_a_minute_and_leads_to_every_page():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 142
    for page in PAGES[1:]:
        assert f"]({page_names(page)})" in text


def test_what_is_supported_is_in_the_readme_and_shown_by_tests():
    text = (ROOT / "README.md").read_text(encoding="utf-8").split("## What is supported")[1].split("\n## ")[0]
    told = re.findall(r"^\| (\w.*) \| (.*) \| `(.*)` \|$", text, re.MULTILINE)
    assert told == [tuple(row) for row in SUPPORTED]
    for _, _, test in told:
        file, _, name = test.partition("::")
        assert re.search(rf"^def {name}\(", (ROOT / "tests" / file).read_text(encoding="utf-8"), re.MULTILINE), test


def test_modules_and_commands_that_are_named_exist():
    for page in [*PAGES, ROOT / "CONTRIBUTING.md"]:
        text = page.read_text(encoding="utf-8")
        for name in set(re.findall(r"\b((?:qwen2vl|qwen2vl_kernels|benchmarks|examples)(?:\.\w+)+)\b", text)):
            pkgutil.resolve_name(name)  # or it raises, and says what is missing
        rooms = "qwen2vl|qwen2vl_kernels|benchmarks|examples|tests|docs|csrc|hub"
        for path in set(re.findall(rf"`((?:{rooms})/[\w/.]*)`", text)) - {"benchmarks/plots/"}:
            assert (ROOT / path).exists(), f"{page.name}: {path}"


def test_make_targets_that_are_named_exist():
    made = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    for page in [*PAGES, ROOT / "CONTRIBUTING.md"]:
        named = set(re.findall(r"(?:`|^)make ([a-z-]+)", page.read_text(encoding="utf-8"), re.MULTILINE))
        assert named <= made, f"{page.name}: {named - made}"


def test_the_page_on_serving_has_every_feature_and_no_wrong_value():
    text = (ROOT / "docs" / "serving.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (vLLM|SGLang) \| `(\w+)` \| (yes|) ?\|", text, re.MULTILINE)
    for name in ("vllm", "sglang"):
        known = STACKS[name]
        told = {feature: default == "yes" for who, feature, default in rows if who.lower() == name}
        assert told == {feature: feature in known.default for feature in known.features}
    values = re.findall(r"^\| `([\w:,]+)` \| [^|]+ \|$", text, re.MULTILINE)
    values += re.findall(rf"{VARIABLE}=([\w:,]+)", text)
    assert len(values) > 9 and [parse(value)[1] for value in values] == [[]] * len(values)


def test_the_page_on_transformers_has_every_feature():
    text = (ROOT / "docs" / "drop-ins.md").read_text(encoding="utf-8")
    assert tuple(re.findall(r"^\| `(\w+)` \|", text, re.MULTILINE)) == transformers.FEATURES
    values = re.findall(rf"{VARIABLE}=([\w:,]+)", text)
    assert len(values) > 4 and [parse(value)[1] for value in values] == [[]] * len(values)


def test_the_table_of_ops_is_complete():
    import qwen2vl_kernels

    text = (ROOT / "docs" / "kernels.md").read_text(encoding="utf-8").split("What every op promises")[0]
    named = {name for row in re.findall(r"^\| (`.*?) \|", text, re.MULTILINE) for name in re.findall(r"`(\w+)`", row)}
    assert named == set(qwen2vl_kernels.__all__) - {"BackendError", "TilePlan", "use_backend"}


def test_the_numbers_of_a_gpu_are_those_of_its_results():
    result = json.loads((RESULTS / "nvidia-h200" / "attention.json").read_text(encoding="utf-8"))
    rows = {row["workload"]: row for row in result["rows"] if row["provider"] == "triton"}
    text = (ROOT / "docs" / "measuring.md").read_text(encoding="utf-8").split("## On a GPU")[1].split("\n## ")[0]
    told = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if " of " in line[:12]]
    assert len(told) == 5
    for segments, forward, *cells in told:
        ahead, back = (rows[f"{segments}, 16 heads of 80{way}"] for way in ("", ", backward"))
        peers = [(ahead, "torch varlen"), (ahead, "flash-attn 3"), (ahead, "cuDNN")]
        peers += [(back, "torch varlen"), (back, "cuDNN")]
        ratios = [f"{r['ratios'][peer]['median']:.2f}x" if peer in r["ratios"] else "–" for r, peer in peers]
        assert forward == report.value(ahead["median"], "s")
        assert cells == [*ratios[:3], report.value(back["median"], "s"), *ratios[3:]]
    readme = (ROOT / "README.md").read_text(encoding="utf-8").replace("**", "")
    for way, segments in (("forward, 64 segments of 256 rows", 0), ("forward, 1 segment of 16384", 3)):
        (row,) = re.findall(rf"attention {way} \| (.*?) \| [^|]*? \| (.*?) \|", readme)
        assert row == (told[segments][1], "; ".join(told[segments][2:5]))
    (row,) = re.findall(r"attention backward, 4 segments of 4096 \| (.*?) \| [^|]*? \| (.*?) \|", readme)
    assert row == (told[2][5], "; ".join(told[2][6:8]))
