"""The page: what it is answered with, and what a browser sees of it."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from browser import LOWEST_CONTRAST, Opened, browser, needs_chromium, open_address, open_page
from law_helpers import choose_ways
from running_server import Running, wait_until

from specengine.server.page import PATHS, POLICY

# Settings that are sent as they are shown.
PROMPT = "ab ab ab"


@pytest.fixture(scope="module")
def launched() -> Iterator[Any]:
    with browser() as opened:
        yield opened


def visit(launched: Any, server: Running, **window: Any) -> Opened:
    opened = open_address(launched, f"http://127.0.0.1:{server.port}/", **window)
    opened.page.wait_for_selector("body[data-ready]")
    return opened


def set_slider(page: Any, name: str, value: float) -> None:
    page.eval_on_selector(
        f"#{name}",
        "(slider, value) => { slider.value = value; slider.dispatchEvent(new Event('input', {bubbles: true})) }",
        value,
    )


def generate(page: Any, prompt: str = PROMPT) -> None:
    """Asks by keyboard, and waits for the end."""
    page.fill("#prompt", prompt)
    page.press("#prompt", "Enter")
    page.wait_for_selector(".transcript[aria-busy=false]")


def check_innocent(opened: Opened, server: Running) -> None:
    """Nothing was asked of another host, and the console is empty."""
    own = f"http://127.0.0.1:{server.port}/"
    assert [each for each in opened.requests if not each.startswith(own)] == []
    assert opened.complaints == []


def sent(opened: Opened) -> list[dict[str, Any]]:
    """The bodies that the page sends from here on."""
    bodies: list[dict[str, Any]] = []

    def note(request: Any) -> None:
        if request.method == "POST":
            bodies.append(json.loads(request.post_data))

    opened.page.on("request", note)
    return bodies


# What is answered


@pytest.mark.parametrize("path", PATHS)
def test_files_need_no_key_and_load_nothing_from_elsewhere(start: Callable[..., Running], path: str) -> None:
    server = start(server_options={"api_key": "secret"})
    status, headers, content = server.ask("GET", path)
    assert status == 200
    assert headers["content-security-policy"] == POLICY
    assert headers["x-content-type-options"] == "nosniff"
    kinds = {"html": "text/html", "css": "text/css", "js": "text/javascript", "svg": "image/svg+xml"}
    assert (
        headers["content-type"].partition(";")[0] == kinds[path.rpartition(".")[2].replace("/", "") or "html"]
    )
    assert not re.search(rb"https?://(?!www\.w3\.org/2000/svg)", content)
    assert server.ask("GET", "/v1/models")[0] == 401


def test_the_policy_lets_no_script_run_but_the_servers() -> None:
    rules = dict(rule.split(" ", 1) for rule in POLICY.split("; "))
    assert rules["default-src"] == "'none'"
    assert {rules[name] for name in ("script-src", "style-src", "connect-src")} == {"'self'"}
    assert "unsafe" not in POLICY


def test_the_page_is_no_part_of_the_interface(server: Running) -> None:
    described = json.loads(server.ask("GET", "/openapi.json")[2])
    assert not set(PATHS) & set(described["paths"])
    assert server.ask("GET", "/page/../page.py")[0] == 404
    assert server.ask("GET", "/page/index.html")[0] == 404
    assert server.ask("POST", "/", {})[0] == 405


def test_a_thousand_ranges_are_one_answer(server: Running) -> None:
    ranges = "bytes=" + ",".join(["0-"] * 1000)
    whole = server.ask("GET", "/")[2]
    seconds = []
    for _ in range(5):
        began = time.perf_counter()
        status, _, content = server.ask("GET", "/", headers={"Range": ranges})
        seconds.append(time.perf_counter() - began)
        assert (status, content) == (200, whole)
    assert min(seconds) <= 0.05


def test_models_say_what_the_page_must_know(start: Callable[..., Running]) -> None:
    def card(server: Running) -> dict[str, Any]:
        return dict(json.loads(server.ask("GET", "/v1/models")[2])["data"][0])

    drafted, plain = card(start()), card(start(None))
    assert (drafted["draft_models"], drafted["has_chat_template"]) == (["suffix"], True)
    assert plain["draft_models"] == []


# What a browser sees


@needs_chromium
def test_a_completion_is_streamed_token_by_token(server: Running, launched: Any) -> None:
    opened = visit(launched, server)
    page, bodies = opened.page, sent(opened)
    page.check("[name=mode][value=completion]")
    page.uncheck("#k-auto")
    set_slider(page, "k", 3)
    set_slider(page, "temperature", 0)
    set_slider(page, "tokens", 40)
    page.fill("#seed", "5")
    generate(page)
    [body] = bodies
    assert (body["prompt"], body["num_speculative_tokens"], body["temperature"]) == (PROMPT, 3, 0)
    assert (body["max_tokens"], body["seed"], body["acceptance"]) == (40, 5, "coupled")
    asked = {"prompt": PROMPT, "max_tokens": 40, "temperature": 0, "seed": 5, "num_speculative_tokens": 3}
    answer = server.complete(**asked, return_rounds=True, return_token_source=True)
    [choice] = answer["choices"]
    assert page.text_content(".answer .given") == PROMPT
    shown = page.eval_on_selector_all(
        ".answer .text .t", "all => all.map(each => [each.textContent, each.className.split(' ')[1]])"
    )
    assert "".join(text for text, _ in shown) == choice["text"]
    pieces = [(each["text"], each["source"]) for each in choice["token_source"]]
    assert [(text, "draft" if kind == "draft" else "target") for text, kind in shown if text] == pieces
    # Every draft that was rejected stands before the token that took its place.
    fallen = page.eval_on_selector_all(".answer .fallen del", "all => all.map(each => each.textContent)")
    rejected = [
        "".join(each["draft_texts"][each["num_accepted_tokens"] :])
        for each in choice["rounds"]
        if each["num_accepted_tokens"] < each["num_draft_tokens"]
    ]
    assert fallen == [text.replace("\n", "↵").replace("\t", "⇥") for text in rejected]
    assert rejected, "nothing was rejected: this shows nothing"
    replaced = page.eval_on_selector_all(
        ".answer .fallen", "all => all.map(each => each.nextElementSibling.className)"
    )
    assert set(replaced) == {"t recovered"}
    speculation = answer["metrics"]["speculative_decoding"]
    counts = (
        f"{speculation['num_accepted_draft_tokens']} of {speculation['num_draft_tokens']} drafts accepted"
    )
    assert counts in page.inner_text(".outcome")
    check_innocent(opened, server)


@needs_chromium
def test_several_drafters_are_told_apart(start: Callable[..., Running], launched: Any) -> None:
    server = start(["self:1", "suffix"])
    choose_ways(server.engine)
    opened = visit(launched, server)
    page = opened.page
    assert page.inner_text(".server") == "model tiny · drafter self:1 + suffix"
    page.check("[name=mode][value=completion]")
    page.uncheck("#k-auto")
    set_slider(page, "tokens", 120)
    page.fill("#seed", "1")
    generate(page)
    drafted = page.eval_on_selector_all(
        ".answer .t.draft", "all => all.map(each => Number(/by-(\\d)/.exec(each.className)[1]))"
    )
    asked = {"prompt": PROMPT, "max_tokens": 120, "temperature": 0, "seed": 1, "num_speculative_tokens": 4}
    rounds = server.complete(**asked, return_rounds=True)["choices"][0]["rounds"]
    assert drafted == [place for each in rounds for place in each["drafters"][: each["num_accepted_tokens"]]]
    assert set(drafted) == {0, 1}
    styles = {
        page.eval_on_selector(f".legend .by-{place}", "each => getComputedStyle(each).textDecorationStyle")
        for place in (0, 1)
    }
    assert len(styles) == 2
    check_innocent(opened, server)


@needs_chromium
@pytest.mark.parametrize(("place", "name"), [(0, "self:1"), (1, "suffix")])
def test_one_of_several_drafters_can_be_chosen(
    start: Callable[..., Running], launched: Any, place: int, name: str
) -> None:
    server = start(["self:1", "suffix"])
    opened = visit(launched, server)
    page = opened.page
    page.check("[name=mode][value=completion]")
    page.uncheck("#k-auto")
    set_slider(page, "tokens", 120)
    page.select_option("#drafter", label=f"only {name}")
    generate(page)
    drafted = page.eval_on_selector_all(
        ".answer .t.draft", "all => all.map(each => Number(/by-(\\d)/.exec(each.className)[1]))"
    )
    assert set(drafted) == {place}
    check_innocent(opened, server)


@needs_chromium
def test_text_arrives_before_the_end(start: Callable[..., Running], launched: Any) -> None:
    """And a stop leaves what there is, and ends the server's work."""
    server = start(step_seconds=0.05)
    opened = visit(launched, server)
    page = opened.page
    page.check("[name=mode][value=completion]")
    set_slider(page, "tokens", 1024)
    set_slider(page, "temperature", 1)
    page.select_option("#drafter", "")
    page.fill("#prompt", PROMPT)
    page.press("#prompt", "Enter")
    page.wait_for_selector(".answer.is-running .t:nth-of-type(3)")
    assert page.is_enabled("#stop")
    page.keyboard.press("Escape")
    page.wait_for_selector(".transcript[aria-busy=false]")
    assert "stopped" in page.inner_text(".outcome")
    assert page.text_content("#status") == "Stopped."
    wait_until(lambda: server.service.is_idle and not server.engine.has_work)
    server.check_clean()
    check_innocent(opened, server)


@needs_chromium
def test_plain_and_speculative_are_identical_side_by_side(server: Running, launched: Any) -> None:
    opened = visit(launched, server)
    page, bodies = opened.page, sent(opened)
    page.check("[name=mode][value=completion]")
    page.uncheck("#k-auto")
    set_slider(page, "temperature", 0.8)
    set_slider(page, "tokens", 48)
    page.check("#beside")
    generate(page)
    _, plain, speculative = bodies
    assert (plain["num_speculative_tokens"], speculative["num_speculative_tokens"]) == (0, 4)
    assert plain["seed"] == speculative["seed"]
    number = re.fullmatch(r"identical: yes, all (\d+) tokens", page.inner_text(".verdict .yes"))
    assert number is not None
    one, other = page.eval_on_selector_all(
        ".answer .text",
        "all => all.map(each => [...each.querySelectorAll('.t')].map(t => t.textContent).join(''))",
    )
    assert one == other
    clocks = page.eval_on_selector_all(".answer .clock", "all => all.map(each => each.textContent)")
    assert all(re.fullmatch(r"first token \d+ ms( · [\d.]+ tokens/s)?", each) for each in clocks)
    # The race shows the same again.
    page.click(".verdict button")
    page.wait_for_selector(".verdict button:enabled")
    again = page.eval_on_selector_all(
        ".answer .text",
        "all => all.map(each => [...each.querySelectorAll('.t')].map(t => t.textContent).join(''))",
    )
    assert again == [one, other]
    check_innocent(opened, server)


@needs_chromium
def test_what_is_not_identical_is_said_to_be_not(server: Running, launched: Any) -> None:
    """The verdict comes from the tokens: of another text for the speculative half it says no, and where."""
    opened = visit(launched, server)
    page = opened.page

    def change_seed(route: Any) -> None:
        body = json.loads(route.request.post_data)
        if body["num_speculative_tokens"] != 0:
            body["seed"] += 1
        route.continue_(post_data=json.dumps(body))

    page.route("**/v1/completions", change_seed)
    page.check("[name=mode][value=completion]")
    page.uncheck("#k-auto")
    set_slider(page, "temperature", 2)
    page.check("#beside")
    generate(page)
    assert re.fullmatch(r"identical: no, from token \d+ on", page.inner_text(".verdict .no"))


@needs_chromium
def test_charts_move(server: Running, launched: Any) -> None:
    opened = visit(launched, server)
    page = opened.page
    names = ("positions", "speed", "k", "cache")

    def drawn() -> list[str]:
        return [page.inner_html(f"#chart-{name} svg") for name in names]

    empty = drawn()
    page.check("[name=mode][value=completion]")
    page.uncheck("#k-auto")
    set_slider(page, "tokens", 200)
    generate(page)
    wait_until(lambda: all(one != other for one, other in zip(empty, drawn(), strict=True)))
    assert re.fullmatch(r"\d+ % of \d+", page.inner_text("#chart-positions b"))
    assert page.locator("#chart-k rect").count() >= 2
    assert all(page.get_attribute(f"#chart-{name} svg", "aria-label") for name in names)
    check_innocent(opened, server)


@needs_chromium
def test_a_chat_remembers_what_was_said(server: Running, launched: Any) -> None:
    opened = visit(launched, server)
    page, bodies = opened.page, sent(opened)
    assert page.is_checked("[name=mode][value=chat]")
    set_slider(page, "tokens", 16)
    generate(page, "one")
    generate(page, "two")
    said = page.eval_on_selector(
        ".answer .text", "each => [...each.querySelectorAll('.t')].map(t => t.textContent).join('')"
    )
    roles = [{"role": "user", "content": "one"}, {"role": "assistant", "content": said}]
    assert bodies[1]["messages"] == [*roles, {"role": "user", "content": "two"}]
    page.click("#clear")
    assert page.locator(".turn").count() == 0
    check_innocent(opened, server)


@needs_chromium
def test_errors_are_told_in_words(start: Callable[..., Running], launched: Any) -> None:
    server = start(
        server_options={"api_key": "secret", "max_queued_requests": 0}, max_batch_size=1, step_seconds=0.05
    )
    opened = open_address(launched, f"http://127.0.0.1:{server.port}/")
    page = opened.page
    page.wait_for_selector("#key:focus")
    assert "wants an API key" in page.inner_text("#error")
    page.fill("#key", "wrong")
    page.press("#key", "Enter")
    page.wait_for_selector("#error:has-text('does not know this API key')")
    page.fill("#key", "secret")
    page.press("#key", "Enter")
    page.wait_for_selector("body[data-ready]")
    assert page.is_hidden("#error")
    assert page.evaluate("[localStorage.length, sessionStorage.length, document.cookie]") == [0, 0, ""]
    page.check("[name=mode][value=completion]")
    endless: dict[str, Any] = {"prompt": "a", "max_tokens": 1000, "extra_body": {"ignore_eos": True}}
    with server.client().completions.create(model="tiny", stream=True, **endless) as stream:
        next(iter(stream))
        generate(page)
        assert re.search(r"The server is full. Try again in \d+ seconds", page.inner_text("#error"))
        assert page.input_value("#prompt") == PROMPT
    server.__exit__()
    generate(page)
    assert page.is_visible("#error")
    assert page.inner_text("#error") == "The server does not answer. Does it still run?"


@needs_chromium
def test_a_session_is_saved_as_one_page(server: Running, launched: Any, tmp_path: Path) -> None:
    opened = visit(launched, server)
    page = opened.page
    page.check("[name=mode][value=completion]")
    page.uncheck("#k-auto")
    page.check("#beside")
    prompt, fallen = "</script><b>&amp;", "</script><script>"

    def spoil(route: Any) -> None:
        """Drafts that would end the script in which the report keeps them."""
        answer = route.fetch()
        spoiled = answer.text().replace('"draft_texts":["', f'"draft_texts":["{fallen}')
        route.fulfill(response=answer, body=spoiled)

    page.route("**/v1/completions", spoil)
    set_slider(page, "tokens", 64)
    generate(page, prompt)
    with page.expect_download() as download:
        page.click("#save")
    path = tmp_path / download.value.suggested_filename
    download.value.save_as(path)
    check_innocent(opened, server)
    saved = open_page(launched, path)
    assert saved.page.inner_text("code") == prompt
    assert "identical: yes" in saved.page.inner_text("body")
    said = page.eval_on_selector(
        ".answer:last-child .text",
        "each => [...each.querySelectorAll('.t')].map(t => t.textContent).join('')",
    )
    told = json.loads(saved.page.text_content(".token-view script"))
    assert "".join(token["text"] for token in told) == said
    assert any(each["text"].startswith(fallen) for token in told for each in token["rejected"])
    saved.page.click(".token-view .t >> nth=1")
    assert f"id {told[1]['token_id']}" in saved.page.inner_text(".detail")
    assert saved.page.locator("svg[role=img]").count() == 3
    assert saved.requests == [path.as_uri()]
    assert saved.complaints == []


@needs_chromium
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1280, 360])
def test_it_can_be_read_and_used(server: Running, launched: Any, scheme: str, width: int) -> None:
    """Contrast of 4.5 at least, nothing wider than the window, every control with a name and large enough to touch."""
    opened = visit(launched, server, width=width, scheme=scheme)
    page = opened.page
    page.check("[name=mode][value=completion]")
    page.check("#beside")
    page.uncheck("#k-auto")
    set_slider(page, "tokens", 64)
    generate(page)
    ratio, text = page.evaluate(LOWEST_CONTRAST)
    assert ratio >= 4.5, text
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    named = page.eval_on_selector_all(
        "button, input, select, textarea",
        "all => all.filter(each => !each.labels?.length && !each.textContent.trim()).map(each => each.id)",
    )
    assert named == []
    check_innocent(opened, server)


@needs_chromium
def test_the_theme_can_be_chosen_against_the_systems(server: Running, launched: Any) -> None:
    opened = visit(launched, server, scheme="light")
    page = opened.page
    paper = "getComputedStyle(document.body).backgroundColor"
    light = page.evaluate(paper)
    for _ in range(2):
        page.click("#theme")
    assert page.inner_text("#theme") == "Theme: dark"
    assert page.evaluate(paper) != light
    page.reload()
    page.wait_for_selector("body[data-ready]")
    assert page.evaluate(paper) != light, "it was forgotten"


@needs_chromium
def test_a_listener_is_not_told_every_token(server: Running, launched: Any) -> None:
    """Live regions are the status, which says the beginning and the end, and the alert."""
    opened = visit(launched, server)
    page = opened.page
    live = "[aria-live], [role=status], [role=alert], [role=log], output"
    assert (
        page.eval_on_selector_all(live, "all => all.filter(each => each.querySelector('.text')).length") == 0
    )
    page.check("[name=mode][value=completion]")
    page.evaluate(
        "window.told = [], new MutationObserver(() => told.push(document.getElementById('status').textContent))"
        ".observe(document.getElementById('status'), {childList: true})"
    )
    generate(page)
    told = page.evaluate("told")
    assert told[0] == "Generating"
    assert len(told) == 2
    assert told[1].startswith("Finished. ")
