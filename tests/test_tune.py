"""`specengine tune`: it finds what an exhaustive search finds, says why, and keeps what was measured."""

from __future__ import annotations

import itertools
import json
import random
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import tiny_models
from law_helpers import CheckpointFactory
from typer.testing import CliRunner

from specengine import Engine
from specengine.cli import app
from specengine.cli.tune import read_precisions
from specengine.config import EngineConfig
from specengine.measure import runs, tune
from specengine.measure.predictions import MOST_DRAFTS, merge_rounds, summarize_rounds
from specengine.measure.records import read_records
from specengine.measure.theory import expected_tokens
from specengine.measure.tune import LOOKUP_DRAFTS, NUM_FINALISTS, Candidate, Setup, Tuner
from specengine.profiles import read_profile

DRAFT, QUANTIZED, SUFFIX, NGRAM = Setup("draft"), Setup("draft", "int8"), Setup("suffix"), Setup("ngram")
SETUPS = [DRAFT, QUANTIZED, SUFFIX, NGRAM]
PLAIN_SECONDS, ROW, TOKENS = 1.0, 0.02, 6400


@dataclass(frozen=True)
class World:
    """What every way to draft costs and how often it is right. costs: of a draft, in plain rounds; chances: of a draft
    that follows accepted ones; found: the share of a lookup's rounds that find anything"""

    costs: dict[str, float]
    chances: dict[str, float]
    found: float = 1.0
    noise: float = 0.02
    slow: float = 1.0  # an "auto" that is worse than the best constant

    def round_of(self, setup: Setup, k: int) -> tuple[float, float]:
        """Tokens, seconds; with drafts."""
        name = str(setup.draft_model) + setup.draft_weight_dtype.replace("auto", "")
        seconds = PLAIN_SECONDS + (k * (self.costs[name] + ROW) if k else 0.0)
        return expected_tokens([self.chances[name]] * k), seconds

    def speed(self, setup: Setup, k: int | str) -> float:
        if isinstance(setup.draft_model, tuple):
            return max(self.speed(Setup(each), "auto") for each in setup.draft_model)
        if k == "auto":
            return self.slow * max(self.speed(setup, each) for each in range(MOST_DRAFTS + 1))
        assert isinstance(k, int)
        tokens, seconds = self.round_of(setup, k)
        share = self.found if setup.is_lookup else 1.0
        return (
            (1 + share * (tokens - 1)) * PLAIN_SECONDS / (PLAIN_SECONDS + share * (seconds - PLAIN_SECONDS))
        )

    def exhaustive(self) -> float:
        return max(
            self.speed(setup, k)
            for setup in SETUPS
            for k in (LOOKUP_DRAFTS if setup.is_lookup else range(17))
        )


@dataclass(frozen=True, eq=False)
class SimulatedCase:
    """Generates nothing, and takes what the world says, by a clock that is off by a little."""

    world: World
    candidate: Candidate
    rng: random.Random
    is_watched: bool
    batch_size: int = 1
    name: str = ""

    @property
    def pair(self) -> dict[str, Any]:
        return {}

    @property
    def settings(self) -> dict[str, Any]:
        return {"num_speculative_tokens": self.candidate.num_speculative_tokens}

    def warm_up(self, prompts: Sequence[Any]) -> None:
        return None

    def measure(self, prompts: Sequence[Any]) -> dict[str, Any]:
        setup, k = self.candidate.setup, self.candidate.num_speculative_tokens
        noise = 1 + self.rng.uniform(-self.world.noise, self.world.noise)
        noise /= 1.5 if setup.weight_dtype == "int8" else 1.0
        seconds = TOKENS / self.world.speed(setup, k) * noise
        row: dict[str, Any] = {"seconds": seconds, "tokens": TOKENS, "tokens_per_second": TOKENS / seconds}
        if not self.is_watched:
            return row
        assert isinstance(k, int)
        share = self.world.found if setup.is_lookup else 1.0
        tokens, took = self.world.round_of(setup, k)
        chance = self.world.chances[str(setup.draft_model) + setup.draft_weight_dtype.replace("auto", "")]
        num_rounds = round(TOKENS / (1 + share * (tokens - 1)))
        reached = [round(share * num_rounds * chance**j) for j in range(k + 1)]
        counts = {
            "num_accepted_by_position": reached[1:],
            "rejection_positions": [a - b for a, b in itertools.pairwise(reached)],
            "num_accepted_draft_tokens": sum(reached[1:]),
            "num_rounds": num_rounds,
        }
        cost = self.world.costs[str(setup.draft_model) + setup.draft_weight_dtype.replace("auto", "")]
        drafted = round(10 * share)
        rounds = [(1, k, k + 1, took * noise, k * cost * noise, took - k * cost)] * drafted
        rounds += [(1, 0, 1, PLAIN_SECONDS * noise, None, PLAIN_SECONDS)] * (10 - drafted)
        return {**row, "metrics": {"speculative_decoding": counts}, "rounds": summarize_rounds(rounds)}


@dataclass(frozen=True)
class SimulatedStand:
    world: World
    setup: Setup
    rng: random.Random

    def case(self, candidate: Candidate, *, is_watched: bool) -> SimulatedCase:
        assert candidate.setup == self.setup
        return SimulatedCase(self.world, candidate, self.rng, is_watched)

    def describe(self) -> tuple[str | None, str | None]:
        return str(self.setup.draft_model), None

    def origin(self) -> dict[str, Any]:
        return {"identity": "i", "machine": {}, "precision": {"dtype": self.setup.dtype}}


def search(world: World, **changed: Any) -> Tuner:
    rng = random.Random(1)

    @contextmanager
    def open_stand(setup: Setup) -> Iterator[SimulatedStand]:
        yield SimulatedStand(world, setup, rng)

    tuner = Tuner(model="m", setups=SETUPS, open=open_stand, prompts=["a", "b", "c"], **changed)
    records = list(tuner.run())
    assert NUM_FINALISTS / 2 < len(tuner.finalists) <= NUM_FINALISTS + 1 + 2 * len(tuner.precisions)
    assert len(records) <= tuner.num_records
    assert {record.kind for record in records} == {"tune"}
    return tuner


COSTS = {"draft": 0.25, "draftint8": 0.12, "suffix": 0.0, "ngram": 0.0}
WORLDS = {
    "copy-heavy": World(COSTS, {"draft": 0.8, "draftint8": 0.8, "suffix": 0.93, "ngram": 0.9}, found=0.8),
    "code": World(COSTS, {"draft": 0.75, "draftint8": 0.74, "suffix": 0.5, "ngram": 0.4}, found=0.2),
    "alike": World({**COSTS, "draftint8": 0.02}, dict.fromkeys(COSTS, 0.97), found=0.05),
    "auto": World(COSTS, {"draft": 0.6, "draftint8": 0.6, "suffix": 0.2, "ngram": 0.2}, found=0.1, slow=1.3),
    "random draft": World(COSTS, {"draft": 0.01, "draftint8": 0.01, "suffix": 0.0, "ngram": 0.0}, found=0.3),
    "dear draft": World({**COSTS, "draft": 1.3, "draftint8": 1.1}, dict.fromkeys(COSTS, 0.1), found=0.1),
}


@pytest.mark.parametrize("name", WORLDS)
def test_within_3_percent_of_an_exhaustive_search(name: str) -> None:
    world = WORLDS[name]
    best = search(world).best().candidate
    found = world.speed(best.setup, best.num_speculative_tokens) if best.num_speculative_tokens else 1.0
    assert found >= 0.97 * world.exhaustive(), best.label
    assert (best.num_speculative_tokens == "auto") == (name == "auto"), best.label
    assert (best.num_speculative_tokens == 0) == (name in ("random draft", "dear draft")), best.label


def test_why_it_does_not_pay() -> None:
    """Too few accepted, or too dear: each way with its own reason, and numbers that are the world's."""
    tuner = search(WORLDS["random draft"])
    reasons = "\n".join(tuner.reasons(tuner.best()))
    assert "draft (int8), k = 1: a draft costs 0.12 of a plain round," in reasons
    assert re.search(r"draft \(int8\).*: too few are accepted, 1% where 1[2-6]% are needed", reasons)
    assert "the text repeats itself too little" in reasons
    tuner = search(WORLDS["dear draft"])
    profile = tuner.profile()
    assert "too dear, it would not pay if every draft were accepted" in profile.recommendation.reason
    advice = profile.recommendation
    assert (advice.draft_model, advice.num_speculative_tokens, advice.speedup) == (None, 0, None)


def test_the_profile_has_what_was_measured() -> None:
    profile = search(WORLDS["code"]).profile()
    plain, draft, *others = profile.drafters
    assert plain.draft_model is None
    assert [each.draft_model for each in (draft, *others)] == ["draft", "draft", "suffix", "ngram"]
    assert [each.k for each in plain.rounds] == [0]
    assert plain.rounds[0].seconds == pytest.approx(PLAIN_SECONDS, rel=0.03)
    assert [each.k for each in draft.rounds] == [1, 2, 4, 8]
    assert draft.rounds[2].seconds == pytest.approx(1 + 4 * (0.25 + ROW), rel=0.03)
    assert draft.rounds[2].draft == pytest.approx(1.0, rel=0.03)
    assert draft.acceptance == pytest.approx([0.75] * 8, abs=0.01)
    gain = profile.recommendation.speedup
    assert gain is not None
    assert gain.low <= gain.median <= gain.high
    assert gain.median == pytest.approx(WORLDS["code"].exhaustive(), rel=0.04)


def test_what_changes_the_model_is_tried_only_if_it_is_allowed() -> None:
    """And then says so; its times are those of the precision that is recommended."""
    world = WORLDS["code"]
    changed = search(world, precisions=[("auto", "int8")])
    assert {each.is_changed for each in changed.finalists} == {False, True}
    assert not any(each.is_changed for each in search(world).finalists)
    best = changed.best()
    assert best.candidate.is_changed
    assert "target int8" in best.candidate.label
    assert best.speedup.median == pytest.approx(1.5 * world.exhaustive(), rel=0.05)
    profile = changed.profile()
    assert profile.recommendation.weight_dtype == "int8"
    assert profile.drafters[0].rounds[0].seconds == pytest.approx(PLAIN_SECONDS / 1.5, rel=0.03)


def test_how_weights_may_be_stored(checkpoint: CheckpointFactory, tmp_path: Path) -> None:
    """A draft's in 4 bits too, where its widths are whole groups; a target's as it is asked for."""
    config = EngineConfig()
    whole = str(checkpoint(hidden_size=64, seed=1))
    ragged = tiny_models.save_checkpoint(tmp_path / "m", "llama", hidden_size=64, intermediate_size=100)
    assert {"auto", "int8", "int4"} <= set(tune.draft_dtypes(whole, config))
    assert "int4" not in tune.draft_dtypes(str(ragged), config)
    assert tune.draft_dtypes("suffix", config) == ["auto"]
    assert tune.draft_dtypes(whole, EngineConfig(draft_weight_dtype="int8")) == ["int8"]
    asked = read_precisions(["int4", "int8_group", "float16"], config)
    assert asked == [("auto", "int4"), ("auto", "int8_group"), ("float16", "auto")]


def test_of_equals_the_mean_and_of_rounds_the_median() -> None:
    rounds = summarize_rounds(
        [(1, 4, 5, s, 0.1, None) for s in (1.0, 2.0, 9.0)] + [(1, 0, 1, 3.0, None, None)]
    )
    assert [(each["k"], each["count"], each["seconds"], each["draft"]) for each in rounds] == [
        (0, 1, 3.0, None),
        (4, 3, 2.0, 0.1),
    ]
    assert merge_rounds([]) == []


# With engines


@pytest.fixture
def pair(checkpoint: CheckpointFactory, tmp_path: Path) -> list[str]:
    tiny: dict[str, Any] = {"seed": 1, "vocab_size": 320, "with_tokenizer": True}
    models = ["--model", str(checkpoint(**tiny)), "--draft-model", str(checkpoint(noise=0.1, **tiny))]
    (tmp_path / "prompts.txt").write_text("def f(x):\nfor item in items:\n")
    models += ["--prompts", str(tmp_path / "prompts.txt")]
    return [*models, "--repeats", "3", "--max-new-tokens", "10", "--ignore-eos"]


def invoke(*arguments: str) -> tuple[int, str, str]:
    result = CliRunner().invoke(app, ["tune", *arguments])
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result.exit_code, result.stdout, result.stderr


def test_a_profile_of_ones_own_pair(pair: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whole at 80 columns; never written over silently; whatever generates with it says the same."""
    monkeypatch.setenv("COLUMNS", "80")
    path, out = tmp_path / "profile.json", tmp_path / "measured.jsonl"
    code, text, err = invoke(*pair, "--write", str(path), "--out", str(out))
    assert code == 0, err
    assert f"profile written to {path}" in err
    assert max(map(len, text.splitlines())) <= 80
    assert "…" not in text
    assert "Recommended: " in text or "does not pay" in text
    profile = read_profile(path)
    records = read_records(out)
    assert {record.run for record in records} == {profile.run}
    assert all(each.rounds for each in profile.drafters[:2])
    assert profile.drafters[1].identity != profile.identity
    assert all(each.seconds > 0 for drafter in profile.drafters for each in drafter.rounds)

    code, _, err = invoke(*pair, "--write", str(path))
    assert (code, "--force writes over it" in err) == (2, True)
    with Engine(profile=path) as engine, Engine(pair[1]) as plain:
        wanted = plain.generate("def f(x):", max_new_tokens=20, ignore_eos=True).token_ids
        assert engine.generate("def f(x):", max_new_tokens=20, ignore_eos=True).token_ids == wanted

    code, text, _ = invoke(*pair, "--write", str(path), "--force", "--json", "--out", str(out))
    assert code == 0
    answer = json.loads(text)
    assert answer["is_complete"]
    assert answer["profile"] == json.loads(path.read_text())
    assert [record.to_dict() for record in read_records(out)[len(records) :]] == answer["records"]


def test_an_interruption_keeps_what_was_measured(
    pair: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    measured, out, path = runs.measured, tmp_path / "measured.jsonl", tmp_path / "profile.json"
    calls: list[Any] = []

    def interrupt(results: Any, **given: Any) -> dict[str, Any]:
        calls.append(given)
        if len(calls) == 13:
            raise KeyboardInterrupt
        return measured(results, **given)

    monkeypatch.setattr(runs, "measured", interrupt)
    code, text, err = invoke(*pair, "--write", str(path), "--out", str(out))
    assert code == 130, err
    assert "12 of " in err
    assert f"they are in {out}" in err
    assert "no profile was written" in err
    assert "draft" in text or "model" in text
    assert len(read_records(out)) == 12
    assert not path.exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--write", "/no/such/directory/p.json"], "no such directory"),
        (["--write", "/tmp"], "it is not a file"),
        (["--try-dtype", "int3"], "--try-dtype"),
        (["--forced-acceptance", "0.5"], "nothing to tune"),
    ],
)
def test_wrong_usage_is_one_line_and_exit_code_2(
    arguments: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    code, out, err = invoke(*arguments)
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert message in err


def test_what_a_profile_cannot_name_is_refused(checkpoint: CheckpointFactory) -> None:
    from specengine.call import prepare_call
    from specengine.measure.tune import build_tuner

    class Mine:
        name = "mine"
        propose = observe = release = Callable

    call = prepare_call("x", {"model": str(checkpoint(seed=1, vocab_size=320)), "draft_model": Mine()})
    with pytest.raises(ValueError, match="Mine has no name"):
        build_tuner(call)
