"""`specengine report`: numbers that are the engine's, and a page that a browser has nothing to say against."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Iterator
from pathlib import Path
from statistics import fmean
from typing import Any

import browser
import pytest
from typer.testing import CliRunner

from specengine.cli import app
from specengine.measure import report_run
from specengine.measure.findings import Findings, find
from specengine.measure.records import Record, read_records
from specengine.measure.report import Chapter, Section, page
from specengine.measure.report_page import build_page
from specengine.measure.summary import plain_of
from specengine.measure.theory import Costs, expected_tokens
from specengine.measure.token_view import SCRIPT, token_view

SMALL = [
    *("-k", "1,2,4", "--temperature", "0,1", "--num-prompts", "2", "--repeats", "2"),
    *("--max-new-tokens", "8", "--ignore-eos"),
]
FIGURES = {
    "plain-against-speculative",
    "acceptance-by-k",
    "throughput-by-k",
    "acceptance-by-temperature",
    "acceptance-map",
    "rejection-positions",
    "acceptance-by-position",
    "speed-up-by-acceptance",
    "speed-up-by-k",
    "time-by-phase",
    "acceptance-by-similarity",
    "k-over-time",
}


def invoke(*arguments: str) -> tuple[int, str, str]:
    result = CliRunner().invoke(app, ["report", *arguments])
    return result.exit_code, result.stdout, result.stderr


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with report.html, rows.jsonl, answer.json and figures/ of one run."""
    directory = tmp_path_factory.mktemp("report")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(report_run, "TRACED_TOKENS", 40)
        where = ["--html", str(directory / "report.html"), "--figures", str(directory / "figures")]
        code, text, err = invoke(*SMALL, *where, "--out", str(directory / "rows.jsonl"), "--json")
    assert (code, err.count("\n")) == (0, 1), err
    (directory / "answer.json").write_text(text)
    return directory


@pytest.fixture(scope="module")
def records(made: Path) -> list[Record]:
    return read_records(made / "rows.jsonl")


@pytest.fixture(scope="module")
def chromium() -> Iterator[Any]:
    with browser.browser() as launched:
        yield launched


def speculation(record: Record) -> dict[str, Any]:
    found: dict[str, Any] = record.measured["metrics"]["speculative_decoding"]
    return found


# -- numbers -------------------------------------------------------------------------------------------------------


def test_the_findings_are_the_engines_metrics(records: list[Record], made: Path) -> None:
    """Counted again from the rows, by other code."""
    [found] = find(records)
    grid = [record for record in records if record.kind == "report"]
    assert len(grid) == 2 * 4 * 2 * 2
    for temperature in (0.0, 1.0):
        for k in (1, 2, 4):
            rows = [
                record
                for record in grid
                if (record.settings["temperature"], record.settings["num_speculative_tokens"])
                == (temperature, k)
            ]
            drafted = [speculation(row)["num_draft_tokens"] for row in rows]
            accepted = [speculation(row)["num_accepted_draft_tokens"] for row in rows]
            rates = [a / d for a, d in zip(accepted, drafted, strict=True) if d]
            assert found.acceptance[temperature][k] == pytest.approx(rates)
            [row] = [each for each in found.rows if (each.temperature, each.k) == (temperature, k)]
            assert row.summary.acceptance_rate == pytest.approx(sum(accepted) / sum(drafted))
            for place, row_of in enumerate(rows):
                [plain] = [
                    each
                    for each in grid
                    if each.settings["num_speculative_tokens"] == 0
                    and each.settings["temperature"] == temperature
                    and (each.prompt_index, each.repeat) == (row_of.prompt_index, row_of.repeat)
                ]
                ratio = plain.measured["metrics"]["total_time"] / plain.measured["tokens"]
                ratio /= row_of.measured["metrics"]["total_time"] / row_of.measured["tokens"]
                assert found.speedups[temperature][k][place] == pytest.approx(ratio)
    largest = [speculation(row) for row in grid if row.settings["num_speculative_tokens"] == 4]
    assert found.positions is not None
    assert sum(found.positions.num_accepted) == sum(each["num_accepted_draft_tokens"] for each in largest)
    assert sum(found.positions.num_drafted) == sum(each["num_draft_tokens"] for each in largest)
    rejections = sum(sum(each["rejection_positions"]) for each in largest)
    assert sum(found.positions.rejected) == rejections
    assert found.positions.num_fully_accepted == sum(each["num_spec_steps"] for each in largest) - rejections
    answer = json.loads((made / "answer.json").read_text())
    assert answer["is_complete"]
    assert answer["findings"] == [json.loads(json.dumps(found.to_dict()))]


def test_traces_tell_k_by_round_and_the_text(records: list[Record]) -> None:
    [found] = find(records)
    traces = [record for record in records if record.kind == "trace"]
    assert [record.settings["num_speculative_tokens"] for record in traces] == ["auto", "auto", 5, 5]
    for record in traces:
        tokens, drafted = record.measured["tokens"], record.measured["drafted_by_round"]
        assert len(tokens) == 40
        assert "".join(token["text"] for token in tokens) == record.measured["text"]
        assert sum(drafted) == speculation(record)["num_draft_tokens"]
        assert len(drafted) == speculation(record)["num_rounds"]
        assert record.measured["similarity"] == pytest.approx(fmean(token["similarity"] for token in tokens))
    assert found.choices == {f"prompt {at}": traces[at].measured["drafted_by_round"] for at in (0, 1)}
    assert sorted(found.similarity) == sorted(trace.measured["similarity"] for trace in traces[2:])


def synthetic(costs: Costs, alpha: float, ks: list[int]) -> list[Record]:
    """Rows of rounds that take k c + v and give as many tokens as α says."""
    rows = []
    for k in (0, *ks):
        rounds, seconds = 1000, 1000 * 0.01 * costs.round(k)
        accepted = round(rounds * (expected_tokens([alpha] * k) - 1))
        metrics = {
            "num_prompt_tokens": 3,
            "num_cached_tokens": 0,
            "prompt_time": 0.0,
            "decode_time": seconds,
            "speculative_decoding": {
                "num_rounds": rounds,
                "num_spec_steps": rounds if k else 0,
                "num_draft_tokens": k * rounds,
                "num_accepted_draft_tokens": accepted,
                "draft_acceptance_rate": accepted / (k * rounds) if k else 0.0,
                "num_drafted_by_position": [rounds] * k,
                "num_accepted_by_position": [round(rounds * alpha**at) for at in range(1, k + 1)],
                "rejection_positions": [0] * k,
            },
        }
        measured = {
            "seconds": seconds,
            "time_to_first_token": 0.0,
            "tokens": rounds + accepted,
            "tokens_per_second": (rounds + accepted) / seconds,
            "target_forwards": rounds,
            "peak_bytes": None,
            "shares": None,
            "metrics": metrics,
        }
        settings = {"num_speculative_tokens": k, "temperature": 0.0, "drafter": "d", "batch_size": 1}
        rows.append(Record("sweep", "run", {}, {"model": "m"}, settings, 0, 0, measured))
    return rows


def test_costs_and_points_are_found_again() -> None:
    costs = Costs(0.15, 1.2)
    [found] = find(synthetic(costs, 0.7, [1, 2, 4, 8]))
    assert found.theory is not None
    assert (found.theory.costs.draft, found.theory.costs.verify) == pytest.approx((0.15, 1.2))
    for alpha, k, speed in found.theory.points:
        assert alpha == pytest.approx(0.7, abs=1e-3)
        assert speed == pytest.approx(expected_tokens([0.7] * k) / costs.round(k), rel=1e-3)
    assert find(synthetic(costs, 0.7, [4]))[0].theory is None


def test_what_differs_in_more_than_k_and_temperature_is_another_chapter() -> None:
    rows = synthetic(Costs(0.1), 0.5, [2])
    other = [Record(**{**vars(row), "settings": {**row.settings, "top_k": 50}}) for row in rows]
    found = find([*rows, *other])
    assert [each.setup.get("top_k") for each in found] == [None, 50]
    text = build_page(found, {})
    assert text.count('id="1-acceptance-by-k"') == text.count('id="2-acceptance-by-k"') == 1


def test_faults_in_findings_would_be_noticed(
    records: list[Record], made: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A pair of another repeat, and drafts counted without those that were rejected."""
    from specengine.measure import findings

    seconds = findings.seconds_a_token
    monkeypatch.setattr(findings, "seconds_a_token", lambda record: seconds(record) * (1 + record.repeat))
    monkeypatch.setattr(
        findings, "plain_of", lambda rows: {(at, 1 - to): row for (at, to), row in plain_of(rows).items()}
    )
    with pytest.raises(AssertionError):
        test_the_findings_are_the_engines_metrics(records, made)


# -- the command ---------------------------------------------------------------------------------------------------


def test_files_that_were_measured_make_the_same_page(made: Path, tmp_path: Path) -> None:
    again = tmp_path / "again.html"
    code, text, _ = invoke(str(made / "rows.jsonl"), "--html", str(again), "--json")
    assert code == 0
    assert again.read_text() == (made / "report.html").read_text()
    assert json.loads(text)["findings"] == json.loads((made / "answer.json").read_text())["findings"]


def test_every_figure_is_a_file_in_both_styles(made: Path) -> None:
    names = {path.name for path in (made / "figures").iterdir()}
    assert names == {
        f"{name}{style}.{end}" for name in FIGURES for style in ("", "-dark") for end in ("png", "svg")
    }


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--html", "{made}/report.html"], "is there already"),
        (["--html", "{made}/no/such/report.html"], "no such directory"),
        (["no-such-file.jsonl"], "no-such-file.jsonl cannot be read"),
        (["{made}/answer.json"], "not a measured row"),
        (["{made}/rows.jsonl", "--out", "{tmp}/x"], "--out is for what is measured"),
        (["{made}/rows.jsonl", "--figures", "{made}/figures"], "--figures: "),
        (["-k", "0"], "num_speculative_tokens"),
        (["-k", "auto"], "'auto' is not an integer"),
        (["--temperature", "warm"], "'warm' is not a number"),
        (["--model", "m"], "needs a draft_model"),
    ],
)
def test_wrong_usage_is_one_line_and_exit_code_2(
    arguments: list[str], message: str, made: Path, tmp_path: Path
) -> None:
    given = [each.format(made=made, tmp=tmp_path) for each in arguments]
    page = [] if "--html" in given else ["--html", str(tmp_path / "r.html")]
    code, out, err = invoke(*given, *page)
    assert (code, out, err.count("\n")) == (2, "", 1), err
    assert message in err
    assert not (tmp_path / "r.html").exists()


def test_an_interruption_shows_what_was_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from specengine.measure import runs

    measured, calls = runs.measured, [0]

    def interrupt(results: Any, **given: Any) -> dict[str, Any]:
        calls[0] += 1
        if calls[0] == 11:
            raise KeyboardInterrupt
        return measured(results, **given)

    monkeypatch.setattr(runs, "measured", interrupt)
    where = ["--html", str(tmp_path / "r.html"), "--out", str(tmp_path / "rows.jsonl")]
    code, text, err = invoke(*SMALL, *where, "--json")
    assert code == 130
    assert "10 of 36 measurements were made" in err
    assert not json.loads(text)["is_complete"]
    assert "Not shown" in (tmp_path / "r.html").read_text()
    assert len(read_records(tmp_path / "rows.jsonl")) == 10


# -- the page ------------------------------------------------------------------------------------------------------


def check_quiet(opened: browser.Opened) -> None:
    assert opened.complaints == []
    assert [address for address in opened.requests if not address.startswith(("file:", "data:"))] == []
    assert sum(address.startswith("file:") for address in opened.requests) == 1


@browser.needs_chromium
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [390, 1280])
def test_a_browser_finds_nothing_wrong(made: Path, chromium: Any, scheme: str, width: int) -> None:
    """No complaint, no request, every figure drawn and told in words, enough contrast, nothing wider than the page."""
    opened = browser.open_page(chromium, made / "report.html", width=width, scheme=scheme)
    check_quiet(opened)
    shown = opened.page.evaluate(
        "() => [...document.images].map(i => [i.closest('section').id, i.naturalWidth, i.alt, i.clientWidth])"
    )
    assert {name for name, *_ in shown} == FIGURES
    for name, natural, alternative, width_shown in shown:
        assert natural > 100, name
        assert len(alternative) > 40, name
        assert width_shown > 300, name
    dark = opened.page.evaluate("() => document.images[0].currentSrc") != opened.page.evaluate(
        "() => document.images[0].src"
    )
    assert dark == (scheme == "dark")
    ratio, text = opened.page.evaluate(browser.LOWEST_CONTRAST)
    assert ratio >= 4.5, text
    assert opened.page.evaluate("() => document.documentElement.scrollWidth") <= width
    opened.page.close()


@browser.needs_chromium
def test_contrast_that_is_too_low_is_noticed(chromium: Any, tmp_path: Path) -> None:
    path = tmp_path / "pale.html"
    path.write_text('<body style="background:#fff"><p style="color:#999">pale</p></body>')
    ratio, text = browser.open_page(chromium, path).page.evaluate(browser.LOWEST_CONTRAST)
    assert (ratio < 3, text) == (True, "pale")


@browser.needs_chromium
def test_numbers_on_the_page_are_the_findings(made: Path, chromium: Any, records: list[Record]) -> None:
    [found] = find(records)
    opened = browser.open_page(chromium, made / "report.html")
    rows = opened.page.evaluate(
        "() => [...document.querySelectorAll('#settings tbody tr')].map(r => [...r.cells].map(c => c.textContent))"
    )
    assert len(rows) == len(found.rows) == 8
    for cells, row in zip(rows, found.rows, strict=True):
        assert cells[0] == f"{row.temperature:g}"
        assert cells[1] == ("plain" if row.k == 0 else str(row.k))
        assert float(cells[2]) == pytest.approx(row.summary.seconds.median * 1e3, abs=0.051)
        assert float(cells[8]) == pytest.approx(row.summary.mean_acceptance_length, abs=0.0051)
    words = opened.page.evaluate("() => document.querySelector('#acceptance-by-k img').alt")
    for temperature, by_k in found.acceptance.items():
        line = re.search(rf"T = {temperature:g}: ([^;]*)", words)
        assert line
        expected = ", ".join(f"{k}: {fmean(values):.3g}" for k, values in by_k.items())
        assert line.group(1) == expected
    opened.page.close()


@browser.needs_chromium
def test_everything_is_reached_by_keyboard(made: Path, chromium: Any, records: list[Record]) -> None:
    """Tab comes to every link, table, text and summary, and arrows to every token."""
    opened = browser.open_page(chromium, made / "report.html")
    page = opened.page
    wanted = page.evaluate(
        "() => document.querySelectorAll('nav a, .scrolls, [role=listbox], summary, input').length"
    )
    reached = set()
    for _ in range(wanted + 3):
        page.keyboard.press("Tab")
        reached.add(
            page.evaluate(
                """() => { const at = document.activeElement;
                  return at.tagName + [...document.querySelectorAll('*')].indexOf(at) }"""
            )
        )
    assert len({each for each in reached if not each.startswith("BODY")}) == wanted
    told = page.locator(".detail")
    page.locator("[role=listbox]").focus()
    tokens = json.loads(page.evaluate("() => document.querySelector('.token-view script').textContent"))
    trace = max(
        (record for record in records if record.kind == "trace"),
        key=lambda each: sum(bool(token["rejected"]) for token in each.measured["tokens"]),
    )
    assert tokens == trace.measured["tokens"]
    page.keyboard.press("End")
    for key, at in (
        ("Home", 0),
        ("ArrowRight", 1),
        ("ArrowDown", 11),
        ("ArrowLeft", 10),
        ("End", len(tokens) - 1),
    ):
        page.keyboard.press(key)
        text = told.inner_text()
        assert f"id {tokens[at]['token_id']}\n" in text, key
        assert f"{100 * tokens[at]['target_prob']:.3g}"[:3] in text
    recovered = next(at for at, token in enumerate(tokens) if token["rejected"])
    page.locator(f"#token-{recovered}").click()
    assert json.dumps(tokens[recovered]["rejected"][0]["text"])[1:-1] in told.inner_text()
    page.evaluate("() => { document.querySelector('.detail span').textContent = 'four    spaces' }")
    assert "four    spaces" in told.inner_text()
    assert not page.locator("del").first.is_visible()
    page.locator(".token-view input").check()
    assert page.locator("del").first.is_visible()
    assert page.locator("[role=listbox]").get_attribute("aria-activedescendant") == f"token-{recovered}"
    opened.page.close()


def many_tokens(count: int) -> list[dict[str, Any]]:
    chance = random.Random(0)
    sources = ("draft", "draft", "recovered", "bonus", "target")
    tokens = []
    for at in range(count):
        source = chance.choice(sources)
        rejected = [
            {"token_id": 9, "text": "</script><b>", "target_prob": 0.1, "draft_prob": None},
            {"token_id": 8, "text": "\n", "target_prob": None, "draft_prob": None},
        ]
        tokens.append(
            {
                "token_id": at,
                "text": chance.choice(["a", " word", "\n", "", "<i>", "🙂", "\t"]),
                "source": source,
                "round": at // 3,
                "target_prob": chance.random(),
                "draft_prob": None if at % 7 == 0 else chance.random(),
                "rejected": rejected if source == "recovered" else [],
            }
        )
    return tokens


@browser.needs_chromium
def test_the_token_view_holds_five_thousand_tokens(chromium: Any, tmp_path: Path) -> None:
    tokens = many_tokens(5000)
    path = tmp_path / "long.html"
    body = Section("tokens", "Tokens", token_view("token", tokens, "<prompt>" + "x" * 150), is_long=True)
    path.write_text(page("Long", [Chapter("", sections=[body])], scripts=[SCRIPT]), encoding="utf-8")
    opened = browser.open_page(chromium, path, width=390)
    check_quiet(opened)
    view = opened.page
    assert view.locator(".t").count() == 5000
    view.locator("[role=listbox]").focus()
    view.keyboard.press("Home")
    for _ in range(49):
        view.keyboard.press("PageDown")
    assert "id 4900\n" in view.locator(".detail").inner_text()
    assert view.locator("#token-4900").is_visible()
    view.keyboard.press("End")
    assert "id 4999\n" in view.locator(".detail").inner_text()
    assert view.locator("b, i").count() == 0, "text of tokens became markup"
    assert view.evaluate("() => document.documentElement.scrollWidth") <= 390
    view.close()


@browser.needs_chromium
def test_no_figure_is_cut_in_print(made: Path, chromium: Any, tmp_path: Path) -> None:
    """Each figure's picture, drawn as paper has it, is whole on one page: pages are laid out, and none is crossed."""
    opened = browser.open_page(chromium, made / "report.html", width=718)
    view = opened.page
    view.emulate_media(media="print")
    heights = view.evaluate(
        """() => [...document.querySelectorAll('section')].filter(s => s.querySelector('img')).map(s =>
             [s.id, s.getBoundingClientRect().height, getComputedStyle(s).breakInside])"""
    )
    assert {name for name, *_ in heights} == FIGURES
    page_height = 1123 - 2 * 38  # A4 at 96 dots an inch, without margins of 1 cm
    for name, height, rule in heights:
        assert height < page_height, name
        assert rule == "avoid", name
    assert not view.locator("nav").first.is_visible()
    assert not view.locator(".detail").first.is_visible()
    pdf = view.pdf(format="A4", path=tmp_path / "report.pdf")
    assert pdf.startswith(b"%PDF")
    view.close()


def test_findings_without_rows_show_their_traces_only(records: list[Record]) -> None:
    [found] = find([record for record in records if record.kind == "trace"])
    assert isinstance(found, Findings)
    assert found.rows == []
    text = build_page([found], records[0].environment)
    assert "token-view" in text
    assert "plain against speculative by prompt: speculative rows beside plain ones." in text
