"""The page in headless Chromium: what a visitor does and sees, and no request to any other host."""

from __future__ import annotations

import re
import shutil
from urllib.parse import urlsplit

import pytest

from examples.demo.media import write_video
from qwen2vl import GenerationConfig, generate
from qwen2vl.agents.loop import AgentRun, model_writer
from qwen2vl.samples.skills import play
from qwen2vl.web.engine import MAX_AGENT_STEPS, _data_uri, _described
from tests.web.conftest import drawn

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium is installed to show the page")


@pytest.fixture(scope="module")
def browser():
    driver = pytest.importorskip("playwright.sync_api", reason="the package playwright drives the browser")
    with driver.sync_playwright() as playwright:
        # As root, which tests in a container are, Chromium refuses to start in its sandbox.
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def open_page(browser, server):
    """Opens a tab, all tabs of a test in one window. In the end none had an error of its own, or asked another host."""
    context = browser.new_context(viewport={"width": 1100, "height": 800})
    context.set_default_timeout(60_000)
    wrong, host = [], f"{server.address[0]}:{server.address[1]}"

    def only_ours(route):
        address = urlsplit(route.request.url)
        if address.netloc == host or address.scheme == "data":
            return route.continue_()
        wrong.append(f"asked {route.request.url}")
        return route.abort()

    def heard(message):
        if message.type in ("error", "warning") and "Failed to load resource" not in message.text:
            wrong.append(message.text)

    context.route("**/*", only_ours)

    def opened(**size):
        page = context.new_page()
        if size:
            page.set_viewport_size(size)
        page.on("console", heard)
        page.on("pageerror", lambda error: wrong.append(str(error)))
        page.goto(f"http://{host}/")
        page.wait_for_selector("body[data-ready]")
        return page

    yield opened
    context.close()
    assert not wrong, wrong


def until(page, true):
    """Wait for an expression to be true. Playwright's own way evaluates text inside of the page, which forbids that."""
    for _ in range(3000):
        if page.evaluate(true):
            return
        page.wait_for_timeout(20)
    raise AssertionError(f"never true: {true}")


def attach(page, data, name="picture.png", kind="image/png"):
    before = page.locator("#waiting li").count()
    page.set_input_files("#files", [{"name": name, "mimeType": kind, "buffer": data}])
    page.locator("#waiting li").nth(before).wait_for()


def ask(page, text):
    page.fill("#question", text)
    page.click("#send")


def answer(page):
    """The last answer's words, when it is over."""
    until(page, "!document.getElementById('status').textContent")
    return page.locator(".answer .words").last.inner_text()


def endless(page, server):
    """Let answers go on for long, with letters drawn at random."""
    server.endless = True
    page.click("#settings summary")
    for name, value in (("max_new_tokens", "20000"), ("temperature", "5"), ("seed", "1")):
        page.fill(f"[name={name}]", value)


def test_places_without_a_picture_are_told_alone(open_page):
    page = open_page()
    ask(page, 'Find the text "left".')
    answer(page)
    assert page.locator(".answer figure li").count() == 1, "the toy speaks of a place that it cannot have seen"
    assert page.locator(".answer img").count() == 0


def test_ask_about_a_picture_and_where_something_is(open_page, model, processor):
    page = open_page()
    data, where = drawn("point")
    attach(page, data)
    facts = page.locator("#seen-facts").inner_text()
    question = [{"type": "image", "image": data}, {"type": "text", "text": where}]
    inputs = processor([{"role": "user", "content": question}])
    (info,) = inputs.media
    (height, width), (_, rows, columns) = info.source_size, info.grid_thw
    for line in (f"{width} × {height} pixels", f"1 × {rows} × {columns} (time", f"{info.num_tokens}, and 2 marks"):
        assert line in facts
    ask(page, where)
    wanted = generate(
        model, inputs, tokenizer=processor.tokenizer, config=GenerationConfig.from_model(model, max_new_tokens=96)
    )
    assert answer(page) == wanted.texts[0]
    (place, *_), ((left, top), (right, bottom)) = wanted.places(), wanted.places()[0].place.points
    assert page.locator(".places polygon").first.get_attribute("points") == (
        f"{left},{top} {right},{top} {right},{bottom} {left},{bottom}"
    )
    assert page.locator(".places .label").first.inner_text() == place.label
    picture, layer = page.locator(".canvas img").bounding_box(), page.locator(".canvas svg").bounding_box()
    assert all(picture[side] == pytest.approx(layer[side], abs=0.5) for side in ("x", "y", "width", "height"))
    assert page.locator("#waiting li").count() == 0 and page.input_value("#question") == ""
    page.check("#seen-parts")
    until(page, "document.getElementById('seen-picture').naturalWidth >= 560")  # the grid is drawn enlarged
    ask(page, "And what is it?")
    answer(page)
    assert "of them kept" in page.locator(".answer small").last.inner_text()
    page.click("#clear")
    page.wait_for_selector("#seen-none:visible")
    assert page.locator("#turns li").count() == 0


def test_an_answer_is_read_while_it_is_written_and_can_be_stopped(open_page, server):
    page = open_page()
    endless(page, server)
    ask(page, "hi")
    until(page, "document.querySelector('.answer .words')?.textContent.length > 20")
    assert page.is_enabled("#stop") and page.is_disabled("#send") and page.is_disabled("#clear")
    page.click("#stop")
    text = answer(page)
    assert len(text) > 20 and page.locator(".answer small").inner_text().startswith("stopped · ")
    assert page.is_disabled("#stop") and page.is_enabled("#send")


def test_errors_are_messages_and_end_nothing(open_page):
    page = open_page()
    page.set_input_files("#files", [{"name": "<b>x</b>.png", "mimeType": "image/png", "buffer": b"no picture"}])
    problem = page.locator("#turns .problem")
    problem.wait_for()
    assert "file object '<b>x</b>.png' is not an image" in problem.inner_text()
    assert problem.get_attribute("role") == "alert"
    data, asks = drawn("read")
    attach(page, data, "<i>.png")
    page.click("#settings summary")
    page.fill("[name=top_p]", "3")
    ask(page, asks)
    until(page, "document.querySelectorAll('.problem').length == 2")
    assert "top_p must be in [0, 1], got 3" in problem.last.inner_text()
    # What could not be asked is still there, to be asked otherwise.
    assert page.input_value("#question") == asks and page.locator("#waiting li").count() == 1
    page.fill("[name=top_p]", "")
    page.click("#send")
    assert answer(page) and page.locator(".question").inner_text().endswith(asks)
    ask(page, "<img src=x onerror=alert(1)>")
    answer(page)
    assert page.locator(".question p").last.inner_text() == "<img src=x onerror=alert(1)>"
    page.click("#show-play")
    page.evaluate("document.getElementById('game-seed').value = '-1'")
    page.evaluate("document.getElementById('new-game').noValidate = true")
    page.click("#new-game button")
    assert "want whole numbers" in page.locator("#play-problem .problem").inner_text()


def test_two_tabs_talk_for_themselves_and_wait_for_each_other(open_page, server):
    server.engine.sessions._open.clear()  # those of the tests before
    first, second = open_page(), open_page()
    first.bring_to_front()
    attach(first, drawn("read")[0])
    assert second.locator("#waiting li").count() == 0
    endless(first, server)
    ask(first, "hi")
    until(first, "document.querySelector('.answer .words')?.textContent.length > 0")
    second.bring_to_front()
    second.click("#settings summary")
    second.fill("[name=max_new_tokens]", "2")
    ask(second, "hello")
    second.get_by_text("waiting: 1 ahead in the line").wait_for()
    first.bring_to_front()
    first.click("#stop")
    answer(first), answer(second)
    assert second.locator(".answer small").inner_text().startswith("cut at the longest answer · 2 tokens")
    assert second.locator(".question").inner_text() == "hello" and first.locator(".question").count() == 1
    assert len(server.engine.sessions) == 2
    kept = next(s for s in server.engine.sessions._open.values() if s.attachments)
    first.goto("about:blank")  # as closing it does, which a driver may do without telling the page
    for _ in range(200):
        if kept.ended:
            break
        second.wait_for_timeout(20)
    assert kept.ended and not kept.attachments and len(server.engine.sessions) == 1


def test_a_clip_is_dropped_and_shown_as_the_model_sees_it(open_page, tmp_path):
    write_video(tmp_path / "clip.mp4", width=64, height=48, seconds=2, fps=5)
    page = open_page()
    page.evaluate(
        """(bytes) => {
            const data = new DataTransfer();
            data.items.add(new File([new Uint8Array(bytes)], "clip.mp4", { type: "video/mp4" }));
            document.body.dispatchEvent(new DragEvent("drop", { dataTransfer: data, bubbles: true, cancelable: true }));
        }""",
        list((tmp_path / "clip.mp4").read_bytes()),
    )
    page.locator("#waiting li").wait_for()
    facts = page.locator("#seen-facts").inner_text()
    assert "clip.mp4" in facts and "2.00 s at 5.00 frames per second" in facts
    assert re.search(r"4, at 0\.00, .* s", facts)
    page.locator("#waiting button").click()
    until(page, "!document.querySelectorAll('#waiting li').length")
    assert page.locator("#seen-none").is_visible()


def test_the_agent_plays_step_by_step(open_page, model, processor):
    """As it does by itself: what it wrote, where it tapped, and the screen after."""
    game = play(3, seed=4, languages=("en",))
    config = GenerationConfig.from_model(model, max_new_tokens=96)
    run = AgentRun(model_writer(model, processor, config=config), game, max_steps=MAX_AGENT_STEPS)
    page = open_page()
    page.click("#show-play")
    assert page.is_disabled("#step")
    page.select_option("#level", "3")
    page.fill("#game-seed", "4")
    page.click("#new-game button")
    page.locator("#task").wait_for()
    assert page.locator("#task").inner_text() == f"Task: {game.instruction}"
    first = page.get_attribute("#screen", "src")
    assert first == _data_uri(game.draw())
    page.click("#step")
    until(page, "document.getElementById('play-status').textContent")
    step = run.step()
    assert step is not None and page.locator(".step .words").inner_text().strip() == step.text.strip()
    assert page.locator(".step .tap").count() == len(_described(step)["taps"])
    assert page.locator(".step img").get_attribute("src") == first
    assert page.get_attribute("#screen", "src") == _data_uri(game.draw())
    while run.episode.outcome is None:
        run.step()
    if page.is_enabled("#to-end"):
        page.click("#to-end")
    until(page, "document.getElementById('play-status').textContent.startsWith('After ')")
    assert page.locator(".step").count() == len(run.episode.steps)
    said = page.locator("#play-status").inner_text()
    assert said.startswith(f"After {len(run.episode.steps)} step") and said.endswith("won.") == game.success
    assert page.get_attribute("#screen", "src") == _data_uri(game.draw())
    assert page.is_disabled("#step") and page.is_enabled("#new-game button")


def test_it_fits_a_narrow_window(open_page):
    page = open_page(width=380, height=700)
    data, where = drawn("point")
    attach(page, data, "a-name-that-is-longer-than-any-narrow-window-has-room-for.png")
    ask(page, where)
    answer(page)
    for view in ("chat", "play"):
        page.click(f"#show-{view}")
        assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    page.click("#show-chat")
    buttons = [page.locator(name).bounding_box() for name in ("#clear", "#stop", "#send")]
    assert len({box["y"] for box in buttons}) == 1 and all(box["x"] + box["width"] <= 380 for box in buttons)
