"""A profile: what it says stands where the caller says nothing, "auto" starts from it, and no bit of a text changes."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from law_helpers import CheckpointFactory, assert_same, make_prompt
from test_adaptive import MIDDLING, World, build_rows
from typer.testing import CliRunner

from specengine import call
from specengine.adaptive import Acceptance, Known, KnownRound
from specengine.call import prepare_call
from specengine.cli import app
from specengine.engine import Engine, profiled
from specengine.models.checkpoints import open_checkpoint
from specengine.profiles import read_profile

VOCAB = 320
TINY: dict[str, Any] = {"seed": 1, "vocab_size": VOCAB}
GREEDY: dict[str, Any] = {"max_new_tokens": 24, "ignore_eos": True, "logprobs": 1}


def round_of(k: int, *, draft: float = 0.1, row: float = 0.01) -> dict[str, Any]:
    return {
        "batch_size": 1,
        "k": k,
        "rows": k + 1,
        "seconds": draft * k + 1 + row * k,
        "draft": draft * k,
        "verify": 1 + row * k,
    }


@pytest.fixture
def profile(checkpoint: CheckpointFactory, tmp_path: Path) -> Callable[..., Path]:
    """profile(k, draft=…): of a tiny target on this machine, with a draft model and a lookup that were measured."""
    target, draft = checkpoint(**TINY), checkpoint(noise=0.2, **TINY)

    def write(k: int | str = 3, *, drafts: Any = "draft", acceptance: str = "auto", **changed: Any) -> Path:
        sources = {"draft": str(draft), "suffix": "suffix", None: None}
        drafters = [
            {
                "draft_model": source,
                "name": source,
                "identity": profiled.identify(open_checkpoint(draft)) if name == "draft" else None,
                "draft_weight_dtype": dtype,
                "acceptance": [] if source is None else [0.9, 0.8, 0.7],
                "num_judged": 40,
                "rounds": [round_of(each) for each in ((0,) if source is None else (2, 8))],
            }
            for name, source, dtype in (
                (None, None, "auto"),
                ("draft", str(draft), "int8"),
                ("draft", str(draft), "auto"),
                ("suffix", "suffix", "auto"),
            )
        ]
        with Engine(target) as engine:
            machine = profiled.describe_machine(engine.device, None)
            precision = profiled.describe_precision(
                engine.config, engine.weight_dtype, engine.device, engine.backend_name
            )
        content = {
            "version": 1,
            "run": "now",
            "model": str(target),
            "identity": profiled.identify(open_checkpoint(target)),
            "machine": machine,
            "precision": precision,
            "drafters": drafters,
            "recommendation": {
                "draft_model": [sources[each] for each in drafts]
                if isinstance(drafts, list)
                else sources[drafts],
                "num_speculative_tokens": k,
                "dtype": "auto",
                "weight_dtype": "auto",
                "draft_weight_dtype": "auto",
                "acceptance": acceptance,
                "speedup": {"median": 1.5, "low": 1.4, "high": 1.6},
                "reason": "it was the fastest",
            },
        }
        path = tmp_path / "profile.json"
        path.write_text(json.dumps({**content, **changed}))
        return path

    return write


def test_options_that_were_given_win(profile: Callable[..., Path], checkpoint: CheckpointFactory) -> None:
    path, other = profile(3, acceptance="block"), checkpoint(noise=0.5, **TINY)
    target, draft = str(checkpoint(**TINY)), str(checkpoint(noise=0.2, **TINY))

    def resolved(**given: Any) -> tuple[Any, ...]:
        made = prepare_call("x", {**given, "profile": path})
        params = made.params
        return str(made.model), str(made.draft_model), params.num_speculative_tokens, params.acceptance

    assert resolved() == (target, draft, 3, "block")
    assert resolved(num_speculative_tokens="auto") == (target, draft, "auto", "block")
    assert resolved(acceptance="rejection") == (target, draft, 3, "rejection")
    assert resolved(seed=1) == (target, draft, 3, "auto")  # a seed's text stays what it is
    assert resolved(draft_model=str(other)) == (target, str(other), "auto", "auto")
    assert prepare_call("x", {"profile": path, "dtype": "float16"}).config.dtype == "float16"


def test_on_the_command_line_defaults_are_not_given(
    profile: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[Any] = []

    def note(*given: Any) -> None:
        calls.append(prepare_call(*given))
        raise ValueError("enough has been seen")

    monkeypatch.setattr(call, "prepare_call", note)
    path = str(profile(3))
    for arguments in ([], ["-k", "auto"], ["-k", "5", "--max-new-tokens", "128"]):
        assert CliRunner().invoke(app, ["generate", "x", "--profile", path, *arguments]).exit_code == 2
    assert [each.params.num_speculative_tokens for each in calls] == [3, "auto", 5]


@pytest.mark.parametrize("drafts", ["draft", "suffix", ["draft", "suffix"], None])
def test_an_engine_drafts_as_recommended_and_says_the_same(profile: Callable[..., Path], drafts: Any) -> None:
    path, prompt = profile(0 if drafts is None else 3, drafts=drafts), make_prompt(9, 1, VOCAB)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with Engine(profile=path) as engine:
            found = engine.generate(prompt, **GREEDY)
            plain = engine.generate(prompt, num_speculative_tokens=0, **GREEDY)
            auto = engine.generate(prompt, num_speculative_tokens="auto", **GREEDY)
            assert engine.has_drafter == (drafts is not None)
    assert_same(found, plain)
    assert_same(auto, plain)
    speculation = found.metrics.speculative_decoding
    assert speculation.num_spec_tokens == (0 if drafts is None else 3)
    if drafts == "draft":
        assert 0 < speculation.num_accepted_draft_tokens < speculation.num_draft_tokens


def test_auto_starts_where_the_profile_ended() -> None:
    """Without trials: its first round drafts as many as its last did; a fault in what it starts from shows."""
    chances = [0.95] * 16
    measured = [
        KnownRound(1, k, k + 1, MIDDLING(1, k, k), 0.15 * k, MIDDLING(1, k, k) - 0.15 * k) for k in (4, 8)
    ]
    plain = KnownRound(1, 0, 1, 1.0, None, 1.0)
    begun = {}
    for name, share, slower in (
        ("right", chances, 1.0),
        ("hopeless", [0.05] * 16, 1.0),
        ("dear", chances, 20.0),
    ):
        world = World(MIDDLING, draft=0.15)
        rounds = [
            each._replace(draft=slower * each.draft, seconds=each.seconds + (slower - 1) * each.draft)
            for each in measured
            if each.draft is not None
        ]
        world.chooser.begin_with({None: [plain], 0: rounds}, {0: Known(share, 200)})
        world.run(build_rows(0.95), 30)
        begun[name] = world.ks[0]
    assert begun["right"] >= 8
    assert begun["hopeless"] == begun["dear"] == 0
    fresh = World(MIDDLING, draft=0.15)
    fresh.run(build_rows(0.95), 30)
    assert fresh.ks[0] == 0


def test_what_is_known_of_later_positions_is_a_guess_that_gives_way() -> None:
    known = Acceptance(0.5, [0.5, 0.9, 0.2])
    assert known.rates == [0.5, 0.9, 0.2]
    for _ in range(200):
        known.note(2, 2, 0.5)
    assert known.rates[0] > 0.9
    assert known.rates[1] > 0.9
    assert known.rates[2] == pytest.approx(0.2)
    assert Acceptance(0.5).rates == [0.5]


def test_of_another_model_it_is_refused(profile: Callable[..., Path], checkpoint: CheckpointFactory) -> None:
    with pytest.raises(ValueError, match=r"profile is of another model .*specengine tune"):
        Engine(checkpoint(**{**TINY, "seed": 2}), profile=profile())
    draft = checkpoint(noise=0.2, **TINY)
    path = profile()
    content = json.loads(path.read_text())
    for each in content["drafters"][1:3]:
        each["identity"] = "0" * 32
    path.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=f"another draft model than what is in {draft}"):
        Engine(profile=path)


def test_of_another_machine_or_dtype_its_times_are_not_used(profile: Callable[..., Path]) -> None:
    path = profile(machine={"processor": "a faster one", "threads": "64"})
    with (
        pytest.warns(UserWarning, match=r"processor: a faster one, here .*times are not used"),
        Engine(profile=path) as engine,
    ):
        assert not engine._stepper.chooser.costs.knows_plain
    with (
        pytest.warns(UserWarning, match="dtype: float32, here bfloat16"),
        Engine(profile=profile(), dtype="bfloat16") as engine,
    ):
        assert not engine._stepper.chooser.costs.knows_plain
    with Engine(profile=profile()) as engine:
        assert engine._stepper.chooser.costs.knows_plain
        assert engine._stepper.chooser.costs.plain(1) == pytest.approx(1.0)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"version": 2}, "has the version 2, not 1"),
        ({"drafters": []}, "drafters: "),
        ({"model": 3}, "model: "),
        ({"surprise": 1}, "surprise: "),
    ],
)
def test_what_is_no_profile_is_refused_before_models_load(
    profile: Callable[..., Path], changed: dict[str, Any], message: str
) -> None:
    path = profile(**changed)
    with pytest.raises(ValueError, match=message):
        prepare_call("x", {"profile": path})
    with pytest.raises(ValueError, match="no such file"):
        read_profile(path.with_name("none.json"))
    with pytest.raises(TypeError, match="needs a model"):
        Engine()
