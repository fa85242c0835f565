"""`specengine verify`: it passes where nothing is lost, and fails where something is, with every planted fault."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import test_law_e_distribution as law_e
import torch
from law_helpers import ALL_DRAFTERS, BACKEND, DraftedFactory, make_prompt
from scripted_drafters import RandomDrafter
from typer.testing import CliRunner

from specengine import SamplingParams, bundled
from specengine.call import prepare_call
from specengine.cli import app
from specengine.engine import Engine
from specengine.measure import law_checks, verify
from specengine.measure.checks import LOSSLESS, NO_POWER, NOT_LOSSLESS
from specengine.measure.records import Record, read_records
from specengine.measure.statistics import chi_square
from specengine.measure.target_law import NextLaw, next_law

Outcomes = dict[str, str]
TINY: dict[str, Any] = {
    "backend": BACKEND,
    "num_threads": 1,
    "block_size": 4,
    "max_new_tokens": 12,
    "ignore_eos": True,
    "temperature": 1.0,
}


def run(
    model: Any,
    drafter: Any,
    prompts: list[list[int]],
    *,
    num_samples: int = 1600,
    num_positions: int = 4,
    ks: tuple[int, ...] = (1, 3),
    **options: Any,
) -> list[Record]:
    call = prepare_call(prompts, {**TINY, "model": model, "draft_model": drafter, **options})
    sizes: dict[str, int] = {"num_samples": num_samples, "num_positions": num_positions}
    plan = verify.make_plan(call, ks=ks, **sizes, with_model_free=False)
    records = list(verify.verify(call, plan))
    assert len(records) == plan.num_checks
    return records


def outcomes(records: list[Record]) -> Outcomes:
    return {record.measured["mode"]: record.measured["outcome"] for record in records}


# What is right passes


@pytest.mark.parametrize("name", ALL_DRAFTERS)
def test_every_drafter_and_every_exact_mode_pass(name: str, drafted: DraftedFactory) -> None:
    """With filters and a penalty, so that these are part of the law."""
    words = make_prompt(5, 3, 12)
    prompts = [words * 4, make_prompt(3, 4, 12) * 3]
    records = run(
        *drafted(name, seed=1, vocab_size=12),
        prompts,
        num_samples=800,
        temperature=1.3,
        top_k=9,
        top_p=0.97,
        presence_penalty=0.3,
    )
    found = {record.measured["mode"]: record.measured["reason"] for record in records}
    assert found == dict.fromkeys(("greedy", "coupled", "rejection", "block"), "")
    for record in records:
        assert record.measured["drafts"]["num_rejected"] > 0


# What is wrong does not

PROMPT = [3, 1, 4, 1, 5, 2]
FILTERS: dict[str, Any] = {"temperature": 1.5, "top_k": 3}
# And which mode notices.
FAULTS: list[tuple[law_e.Mutation, list[str]]] = [
    (law_e.no_mutation, []),
    (law_e.raw_draft_law, ["rejection"]),
    (law_e.residual_drawn_from_target, ["rejection"]),
    (law_e.kv_not_rolled_back, ["greedy", "rejection"]),
    (law_e.draft_law_of_the_row_before, ["rejection"]),
    (law_e.judged_by_the_next_row, ["rejection"]),
]


def plant(fault: law_e.Mutation, patch: pytest.MonkeyPatch) -> None:
    """Into every engine that is verified, and none of the controls'."""
    build = verify.build_engine

    def build_wrong(call: Any, drafter: Any, **changes: Any) -> Engine:
        engine = build(call, drafter, **changes)
        if not changes:
            fault(engine, patch)
        return engine

    patch.setattr(verify, "build_engine", build_wrong)


@pytest.mark.parametrize(("fault", "failing"), FAULTS, ids=lambda value: getattr(value, "__name__", ""))
def test_a_planted_fault_fails(
    fault: law_e.Mutation, failing: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    plant(fault, monkeypatch)
    models = law_e.build_tiny(1), law_e.build_tiny(2)
    found = outcomes(run(*models, [PROMPT], num_samples=3200, **FILTERS, acceptance="rejection"))
    assert [mode for mode, outcome in found.items() if outcome == NOT_LOSSLESS] == failing
    assert NO_POWER not in found.values()


@pytest.mark.parametrize("acceptance", ["threshold", "typical"])
def test_a_lossy_mode_fails_and_says_how_far_it_is(acceptance: str) -> None:
    records = run(law_e.build_tiny(1), law_e.build_tiny(2), [PROMPT], acceptance=acceptance)
    assert outcomes(records) == {"greedy": LOSSLESS, acceptance: NOT_LOSSLESS}
    lossy = records[1].measured
    assert lossy["smallest_p"] < 1e-9
    assert lossy["distance"] > 2 * lossy["distance_by_chance"]


def test_a_lossy_mode_fails_where_it_happens_to_lose_nothing() -> None:
    """Nothing is kept, and so the samples are the target's own: that it need not be so is said all the same."""
    models = law_e.build_tiny(1), law_e.build_tiny(2)
    records = run(*models, [PROMPT], acceptance="threshold", acceptance_threshold=1.0)
    assert records[1].measured["outcome"] == NOT_LOSSLESS
    assert records[1].measured["smallest_p"] > 1e-5
    assert "a lossy mode" in records[1].measured["reason"]


# What shows nothing says so


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"num_samples": 100, "temperature": 0.05}, "too few samples"),
        ({"drafter": "target"}, "no draft was rejected"),
        ({"drafter": "random", "logit_bias": {7: 1000.0}}, "no draft was accepted"),
    ],
)
def test_without_power_nothing_is_shown(options: dict[str, Any], reason: str) -> None:
    target = law_e.build_tiny(1)
    drafters: dict[str, Any] = {
        "target": target,
        "random": RandomDrafter(vocab_size=7),
        "other": law_e.build_tiny(2),
    }
    drafter = drafters[options.pop("drafter", "other")]
    records = run(target, drafter, [PROMPT], **options, acceptance="block")
    assert NO_POWER in outcomes(records).values()
    assert NOT_LOSSLESS not in outcomes(records).values()
    assert any(reason in record.measured["reason"] for record in records)


def test_a_control_that_does_not_fail_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Judged by their own law again, and drafts that are not forced."""
    monkeypatch.setattr(law_checks, "CONTROL_TEMPERATURE", 1.0)
    build = verify.build_engine
    monkeypatch.setattr(verify, "build_engine", lambda call, drafter, **_: build(call, drafter))
    records = run(law_e.build_tiny(1), law_e.build_tiny(2), [PROMPT])
    assert set(outcomes(records).values()) == {NO_POWER}


# The law and the places


def test_the_next_law_is_that_of_law_e() -> None:
    logits = torch.randn(64, 8, generator=torch.Generator().manual_seed(0)) * 2
    num_at_edges = 0
    for filters in law_e.GRID:
        params = SamplingParams(
            temperature=filters.temperature, top_k=filters.top_k, top_p=filters.top_p, min_p=filters.min_p
        )
        expected = law_e.filtered_probs(logits, filters)
        for row, probs in zip(logits, expected, strict=True):
            law = next_law(row, params)
            assert torch.allclose(law.probs, probs, atol=1e-12)
            assert law.allowed[probs > 0].all()
            num_at_edges += int(law.allowed.sum() - (probs > 0).sum())
    assert num_at_edges <= 3


def test_a_token_at_the_edge_of_a_filter_is_no_fault() -> None:
    law = next_law(torch.tensor([2.0, 1.0, 1.0 - 1e-6, 0.0]), SamplingParams(temperature=1.0, top_k=2))
    assert (law.probs > 0).tolist() == [True, True, False, False]
    assert law.allowed.tolist() == [True, True, True, False]
    assert law.place(2, 0.5, {}) == pytest.approx(1.0)
    assert law.place(3, 0.5, {}) is None


def test_places_fill_0_to_1_once_whatever_was_drafted() -> None:
    probs = torch.tensor([0.1, 0.4, 0.0, 0.1, 0.4], dtype=torch.float64)
    law = NextLaw(probs, probs > 0)

    def order(drafted: dict[int, int]) -> list[int]:
        starts = {token: law.place(token, 0.0, drafted) for token in (0, 1, 3, 4)}
        ends = {token: law.place(token, 1.0, drafted) for token in (0, 1, 3, 4)}
        ranked = sorted(starts, key=lambda token: starts[token] or 0.0)
        edges = [0.0, *(ends[token] for token in ranked)]
        assert edges == pytest.approx([*(starts[token] for token in ranked), 1.0])
        return ranked

    assert order({}) == [1, 4, 0, 3]
    assert order({3: 1, 4: 2}) == [3, 4, 1, 0]
    assert order({2: 5, 1: 1}) == [1, 4, 0, 3]


@pytest.mark.slow
def test_a_right_sampler_raises_no_alarm() -> None:
    """p-values of places of samples of many laws, orders and sizes are at least as large as uniform ones."""
    chance, p_values = np.random.default_rng(0), []
    for _ in range(600):
        counts = np.zeros(law_checks.NUM_CELLS, dtype=np.int64)
        for _ in range(8):
            probs = torch.from_numpy(chance.dirichlet(np.full(6, 0.5)))
            law = NextLaw(probs, probs > 0)
            drafted = dict(enumerate(chance.integers(0, 3, size=6).tolist()))
            for token in chance.choice(6, size=25, p=probs.numpy()):
                place = law.place(int(token), chance.random(), drafted)
                assert place is not None
                counts[min(int(place * len(counts)), len(counts) - 1)] += 1
        p_values.append(chi_square(counts.tolist(), [1 / len(counts)] * len(counts))[2])
    for level in (0.3, 0.1, 0.03, 0.01):
        assert np.mean(np.array(p_values) < level) < level + 4 * np.sqrt(level / 600)


# The command

SMALL = [
    "--num-prompts", "1", "--num-samples", "200", "--num-positions", "3", "--max-new-tokens", "8", "-k", "3",
    "--num-threads", "1", "--no-model-free",
]  # fmt: skip


def invoke(*arguments: str) -> tuple[int, str, str]:
    result = CliRunner(env={"COLUMNS": "80"}).invoke(app, ["verify", *arguments])
    return result.exit_code, result.stdout, result.stderr


def test_table_json_page_and_file_say_the_same(tmp_path: Path) -> None:
    out, page = tmp_path / "measured.jsonl", tmp_path / "page.html"
    code, text, err = invoke(*SMALL, "--out", str(out), "--html", str(page))
    assert (code, err) == (0, "")
    records = read_records(out)
    assert [each.measured["mode"] for each in records] == ["greedy", "coupled", "rejection", "block"]
    assert max(map(len, text.splitlines())) <= 80
    assert text.rstrip().endswith("LOSSLESS: all 4 checks passed, and all their controls failed")
    written = page.read_text()
    for record in records:
        for test in record.measured["tests"]:
            assert f"<td>{test['statistic']:.1f}</td>" in written
    assert "LOSSLESS: all 4 checks" in written
    assert "http" not in written.replace("http-equiv", "")

    code, _, err = invoke(*SMALL, "--html", str(page))
    assert (code, err.count("\n")) == (2, 1)
    assert "nothing is overwritten" in err
    assert page.read_text() == written


def test_whatever_can_draft_for_the_target_is_verified_too() -> None:
    def drafters(model: Any, drafter: Any, **asked: bool) -> list[Any]:
        call = prepare_call([PROMPT], {"model": model, "draft_model": drafter})
        return verify.make_plan(call, ks=[1], num_samples=100, num_positions=2, **asked).drafters

    one_layer, bundled_target = law_e.build_tiny(1), bundled.target_path()
    assert drafters(one_layer, "suffix") == ["suffix", "ngram"]
    assert drafters(None, None) == [bundled.draft_path(), "ngram", "self:4", "suffix"]
    assert drafters(bundled_target, None) == ["ngram", "self:4", "suffix"]
    assert drafters(bundled_target, "ngram", with_model_free=False) == ["ngram"]


def test_a_lossy_mode_is_exit_code_1_and_rows_are_appended(tmp_path: Path) -> None:
    out = tmp_path / "measured.jsonl"
    out.write_text("")
    for number in (1, 2):
        code, text, err = invoke(*SMALL, "--acceptance", "threshold", "--json", "--out", str(out))
        answer = json.loads(text)
        assert (code, err, answer["is_complete"], answer["is_lossless"]) == (1, "", True, False)
        records = read_records(out)
        assert [record.to_dict() for record in records[-2:]] == answer["records"]
        assert [record.measured for record in records[-2:]] == answer["checks"]
        assert len({record.run for record in records}) == number
        assert [record.measured["outcome"] for record in records[-2:]] == [LOSSLESS, NOT_LOSSLESS]


def test_an_interruption_keeps_what_was_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(verify, "choose_places", interrupt)
    out, page = tmp_path / "measured.jsonl", tmp_path / "page.html"
    code, text, err = invoke(*SMALL, "--out", str(out), "--html", str(page))
    assert code == 130
    assert f"interrupted: 2 of 4 measurements were made; they are in {out}" in err
    assert "2 of 4 checks were made" in text
    assert "2 of 4 checks were made" in page.read_text()
    assert len(read_records(out)) == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["-k", "0"], "num_speculative_tokens"),
        (["--model", "gpt2", "--no-model-free"], "nothing to verify"),
        (["--draft-model", "self:9"], "only 8 layers"),
        ([*SMALL, "--max-seq-len", "159"], "beyond the context"),
    ],
)
def test_wrong_usage_is_one_line_and_exit_code_2(arguments: list[str], message: str) -> None:
    code, out, err = invoke(*arguments)
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert message in err


@pytest.mark.slow
@pytest.mark.parametrize(
    ("fault", "options"),
    [
        (law_e.raw_draft_law, {"temperature": 1.0, "top_k": 20}),
        (law_e.residual_drawn_from_target, {"temperature": 0.8}),
        (law_e.kv_not_rolled_back, {"temperature": 0.8}),
        (lambda *_: None, {"temperature": 0.8, "acceptance": "threshold"}),
    ],
)
def test_the_bundled_pair_at_the_default_size_shows_faults(
    fault: Callable[..., None], options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    from specengine.measure.bench_prompts import read_prompts

    monkeypatch.setattr(law_e, "VOCAB", 4096)
    plant(fault, monkeypatch)
    call = prepare_call(
        read_prompts(None, None), {"max_new_tokens": 16, "acceptance": "rejection", **options}
    )
    plan = verify.make_plan(call, ks=[1, 4, 8], num_samples=3000, num_positions=4, with_model_free=False)
    assert outcomes(list(verify.verify(call, plan)))[plan.modes[-1]] == NOT_LOSSLESS
