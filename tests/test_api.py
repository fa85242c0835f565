"""`generate`, `stream` and `clear_cache`: names, checks before any loading, kept engines, streamers."""

from __future__ import annotations

import gc
import itertools
import os
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import specengine
from specengine import EngineConfig, GenerationResult, SamplingParams, StreamEvent, api, bundled
from specengine.errors import InsufficientMemoryError
from specengine.outputs import CompletionOutput, GenerationMetrics

PROMPT = "def binary_search(items, x):\n"


class FakeTokenizer:
    def encode(self, text: str) -> list[int]:
        return [ord(character) for character in text]


class FakeEngine:
    """Answers every prompt with "ab", and remembers what it was asked."""

    built: list[FakeEngine]
    failures: list[Exception]

    def __init__(
        self, model: Any, draft_model: Any = None, *, config: EngineConfig, progress: bool | None
    ) -> None:
        if self.failures:
            raise self.failures.pop()
        self.model, self.draft_model, self.config, self.progress = model, draft_model, config, progress
        self.tokenizer = FakeTokenizer()
        self.calls: list[tuple[Any, SamplingParams]] = []
        self.is_closed = False
        self.num_open_streams = 0
        self.built.append(self)

    def generate(self, prompts: Any, params: SamplingParams, *, progress: Any, streamer: Any) -> Any:
        results = []
        for event in self.stream(prompts, params):
            if streamer is not None:
                streamer(event)
            if event.result is not None:
                results.append(event.result)
        return results if isinstance(prompts, list) and not isinstance(prompts[0], int) else results[0]

    def stream(
        self, prompts: Any, params: SamplingParams, *, stream_interval: int = 1
    ) -> Iterator[StreamEvent]:
        assert not self.is_closed, "a closed engine was used"
        self.calls.append((prompts, params))
        is_list = isinstance(prompts, list) and not isinstance(prompts[0], int)
        self.num_open_streams += 1
        try:
            for index, prompt in enumerate(prompts if is_list else [prompts]):
                yield StreamEvent(index, 0, [97], "a", ["target"])
                yield StreamEvent(index, 0, [98], "b", ["draft"], "length", fake_result(prompt))
        finally:
            self.num_open_streams -= 1

    def close(self) -> None:
        self.is_closed = True


def fake_result(prompt: Any) -> GenerationResult:
    output = CompletionOutput(0, [97, 98], "ab", "length", None, None, None, ["target", "draft"], seed=0)
    text = prompt if isinstance(prompt, str) else None
    return GenerationResult([1], [output], GenerationMetrics(), prompt=text)


@pytest.fixture
def engines(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[FakeEngine]]:
    """The fake engines that were built, in order."""
    FakeEngine.built, FakeEngine.failures = [], []
    monkeypatch.setattr(api, "Engine", FakeEngine)
    monkeypatch.setattr(api, "_engines", api.EngineCache(api.MAX_CACHED_ENGINES))
    return FakeEngine.built


@pytest.fixture
def no_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the test does must not get as far as loading a model."""

    def refuse(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("a model was loaded before the arguments were checked")

    monkeypatch.setattr(api, "Engine", refuse)


# Names


@pytest.mark.parametrize(
    ("alias", "value", "name"),
    [("max_tokens", 3, "max_new_tokens"), ("stop_strings", ["x"], "stop"), ("num_assistant_tokens", 2, None)],
)
def test_aliases(engines: list[FakeEngine], alias: str, value: Any, name: str | None) -> None:
    specengine.generate(PROMPT, **{alias: value})
    _, params = engines[0].calls[0]
    expected = tuple(value) if isinstance(value, list) else value
    assert getattr(params, name or "num_speculative_tokens") == expected


def test_assistant_model_is_the_draft_model(engines: list[FakeEngine]) -> None:
    specengine.generate(PROMPT, model="a", assistant_model="b")
    assert (engines[0].model, engines[0].draft_model) == ("a", "b")


@pytest.mark.parametrize(
    ("given", "temperature"),
    [
        ({}, 0.0),
        ({"do_sample": None}, 0.0),
        ({"do_sample": True}, 1.0),
        ({"do_sample": True, "temperature": 0.7}, 0.7),
        ({"do_sample": False}, 0.0),
        ({"do_sample": False, "temperature": 0.0}, 0.0),
    ],
)
def test_do_sample(engines: list[FakeEngine], given: dict[str, Any], temperature: float) -> None:
    specengine.generate(PROMPT, **given)
    assert engines[0].calls[0][1].temperature == temperature


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"max_tokens": 3, "max_new_tokens": 4}, ["max_tokens=3", "max_new_tokens=4"]),
        ({"max_tokens": 3, "max_new_tokens": 128}, ["max_tokens=3", "max_new_tokens=128"]),
        ({"num_assistant_tokens": 3, "num_speculative_tokens": "auto"}, ["num_assistant_tokens=3", "'auto'"]),
        ({"stop": "a", "stop_strings": "b"}, ["stop='a'", "stop_strings='b'"]),
        (
            {"model": "m", "draft_model": "a", "assistant_model": "b"},
            ["draft_model='a'", "assistant_model='b'"],
        ),
        ({"do_sample": True, "temperature": 0.0}, ["do_sample=True", "temperature=0.0"]),
        ({"do_sample": False, "temperature": 0.5}, ["do_sample=False", "temperature=0.5"]),
    ],
)
@pytest.mark.usefixtures("no_engine")
def test_contradictions_name_both(given: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(ValueError) as caught:
        specengine.generate(PROMPT, **given)
    assert all(word in str(caught.value) for word in words), str(caught.value)


def test_an_alias_may_repeat_the_main_name(engines: list[FakeEngine]) -> None:
    specengine.generate(PROMPT, max_tokens=5, max_new_tokens=5)
    assert engines[0].calls[0][1].max_new_tokens == 5


@pytest.mark.parametrize(
    ("name", "closest"),
    [
        ("temprature", "temperature"),
        ("max_token", "max_tokens"),
        ("max_new_token", "max_new_tokens"),
        ("draft", "draft_model"),
        ("num_speculative_token", "num_speculative_tokens"),
        ("do_samples", "do_sample"),
        ("prompts", "prompt"),
    ],
)
@pytest.mark.parametrize("function", [specengine.generate, specengine.stream])
@pytest.mark.usefixtures("no_engine")
def test_an_unknown_name_is_answered_with_the_closest(
    function: Callable[..., Any], name: str, closest: str
) -> None:
    with pytest.raises(TypeError, match=f"'{name}'.*did you mean '{closest}'"):
        function(PROMPT, **{name: 1})


@pytest.mark.usefixtures("no_engine")
def test_a_name_like_no_other() -> None:
    with pytest.raises(TypeError, match=r"unknown argument 'qqqq'$"):
        specengine.generate(PROMPT, qqqq=1)


# Values


@pytest.mark.parametrize("function", [specengine.generate, specengine.stream])
@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        ({"temperature": float("nan")}, ValueError, "temperature must be finite, got nan"),
        ({"temperature": -1}, ValueError, "temperature .* got -1"),
        ({"top_p": 2.0}, ValueError, "top_p .* got 2"),
        ({"max_new_tokens": 0}, ValueError, "max_new_tokens .* got 0"),
        ({"max_new_tokens": 2**31}, ValueError, f"max_new_tokens .* got {2**31}"),
        ({"num_speculative_tokens": -1}, ValueError, "num_speculative_tokens .* got -1"),
        ({"num_speculative_tokens": 10**6}, ValueError, "num_speculative_tokens .* got 1000000"),
        ({"n": 10**6}, ValueError, "n must .* got 1000000"),
        ({"stop": ["x"] * 10_000}, ValueError, "stop .* got 10000"),
        ({"backend": "gpu"}, ValueError, "backend .* got 'gpu'"),
        ({"dtype": "float8"}, ValueError, "dtype .* got 'float8'"),
        ({"progress": "yes"}, TypeError, "progress .* got 'yes'"),
        ({"model": ""}, ValueError, "model .* got ''"),
        (
            {"model": "m", "num_speculative_tokens": 3},
            ValueError,
            "num_speculative_tokens=3 needs a draft_model",
        ),
        ({"draft_model": "d"}, ValueError, "draft_model='d' needs a model"),
        ({"draft_model": Path("d")}, ValueError, "draft_model='d' needs a model"),
    ],
)
@pytest.mark.usefixtures("no_engine")
def test_values_are_checked_before_a_model_is_loaded(
    function: Callable[..., Any], given: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        function(PROMPT, **given)


@pytest.mark.parametrize(
    ("prompt", "error"),
    [
        ("", ValueError),
        ([], ValueError),
        (["a", ""], ValueError),
        ([[1], []], ValueError),
        ([-1], ValueError),
        ([2**31], ValueError),
        ([1, "a"], TypeError),
        ([1.5], TypeError),
        ([True, False], TypeError),
        (None, TypeError),
        (7, TypeError),
        (b"bytes", TypeError),
        ({"prompt": "x"}, TypeError),
        (["a", None], TypeError),
    ],
)
@pytest.mark.usefixtures("no_engine")
def test_prompts_that_are_none(prompt: Any, error: type[Exception]) -> None:
    with pytest.raises(error, match="prompt"):
        specengine.generate(prompt)


def test_one_prompt_gives_one_result_and_a_list_gives_a_list(engines: list[FakeEngine]) -> None:
    single = [PROMPT, [1, 2, 3], (1, 2), torch.tensor([1, 2])]
    several = [["a", "b"], ["a", [1, 2]], [[1], [2]], torch.tensor([[1, 2], [3, 4]]), [PROMPT]]
    for prompt in single:
        assert isinstance(specengine.generate(prompt), GenerationResult)
    for prompts in several:
        results = specengine.generate(prompts)
        assert isinstance(results, list)
        assert len(results) == len(prompts)
    assert len(engines) == 1


def test_without_a_model_the_bundled_pair_is_used(engines: list[FakeEngine]) -> None:
    specengine.generate(PROMPT)
    assert (engines[0].model, engines[0].draft_model) == (bundled.target_path(), bundled.draft_path())


def test_a_model_without_draft_decodes_plainly(engines: list[FakeEngine]) -> None:
    specengine.generate(PROMPT, model="m", num_speculative_tokens=0)
    specengine.generate(PROMPT, model="m")
    assert engines[0].draft_model is None
    assert len(engines) == 1


def test_a_drafter_works_with_the_bundled_target(engines: list[FakeEngine]) -> None:
    drafter = SilentDrafter()
    specengine.generate(PROMPT, draft_model=drafter)
    assert (engines[0].model, engines[0].draft_model) == (bundled.target_path(), drafter)


class SilentDrafter:
    """Not a torch module, and nothing that names a checkpoint."""

    name = "silent"


# Engines that are kept


def test_equal_arguments_share_an_engine(engines: list[FakeEngine]) -> None:
    for _ in range(3):
        specengine.generate(PROMPT, model="a", draft_model="b", device=torch.device("cpu"))
    specengine.generate(PROMPT, model="a", draft_model="b", device="cpu", temperature=1.0)
    list(specengine.stream(PROMPT, model="a", draft_model="b", device="cpu"))
    assert len(engines) == 1


@pytest.mark.parametrize(
    "other", [{"model": "c"}, {"draft_model": "c"}, {"block_size": 8}, {"dtype": "float32"}]
)
def test_other_arguments_get_another_engine(engines: list[FakeEngine], other: dict[str, Any]) -> None:
    given = {"model": "a", "draft_model": "b"}
    specengine.generate(PROMPT, **given)
    specengine.generate(PROMPT, **{**given, **other})
    assert len(engines) == 2


def test_the_least_recently_used_engine_goes(engines: list[FakeEngine]) -> None:
    names = [f"model-{index}" for index in range(api.MAX_CACHED_ENGINES)]
    for name in [*names, names[0], "one-more"]:
        specengine.generate(PROMPT, model=name)
    assert [engine.model for engine in engines if engine.is_closed] == [names[1]]
    specengine.clear_cache()
    assert all(engine.is_closed for engine in engines)


def test_an_engine_in_use_outlives_its_place(engines: list[FakeEngine]) -> None:
    events = specengine.stream(PROMPT, model="a")
    next(events)
    specengine.clear_cache()
    assert not engines[0].is_closed
    assert next(events).text_delta == "b"
    list(events)
    assert engines[0].is_closed


def test_a_closed_stream_gives_its_engine_back(engines: list[FakeEngine]) -> None:
    events = specengine.stream(PROMPT, model="a")
    next(events)
    events.close()
    assert engines[0].num_open_streams == 0
    specengine.clear_cache()
    assert engines[0].is_closed


def test_a_stream_that_is_never_read_costs_nothing(engines: list[FakeEngine]) -> None:
    specengine.stream(PROMPT, model="a").close()
    assert engines == []


def test_threads_build_an_engine_once(engines: list[FakeEngine]) -> None:
    barrier = threading.Barrier(8)

    def call() -> None:
        barrier.wait()
        specengine.generate(PROMPT, model="a")

    threads = [threading.Thread(target=call) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(engines) == 1
    assert len(engines[0].calls) == 8


def test_threads_with_more_models_than_places(engines: list[FakeEngine]) -> None:
    """Nobody's engine is closed under him, whatever is evicted meanwhile."""
    names = itertools.cycle(f"model-{index}" for index in range(api.MAX_CACHED_ENGINES + 2))
    calls = [next(names) for _ in range(60)]
    failures: list[BaseException] = []

    def work(mine: list[str]) -> None:
        try:
            for name in mine:
                assert specengine.generate(PROMPT, model=name).text == "ab"
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(calls[start::6],)) for start in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    specengine.clear_cache()
    assert all(engine.is_closed for engine in engines)


def test_memory_of_idle_engines_is_used_before_giving_up(engines: list[FakeEngine]) -> None:
    specengine.generate(PROMPT, model="a")
    FakeEngine.failures = [InsufficientMemoryError("too large")]
    specengine.generate(PROMPT, model="b")
    assert engines[0].is_closed
    assert not engines[1].is_closed


def test_a_failed_load_is_tried_again(engines: list[FakeEngine]) -> None:
    FakeEngine.failures = [OSError("the disk said no")]
    with pytest.raises(OSError, match="the disk said no"):
        specengine.generate(PROMPT, model="a")
    assert specengine.generate(PROMPT, model="a").text == "ab"


def test_a_model_in_memory_is_known_by_identity(engines: list[FakeEngine]) -> None:
    models = [torch.nn.Linear(2, 2), torch.nn.Linear(2, 2)]
    for model in [*models, *models]:
        specengine.generate(PROMPT, model=model)
    assert [engine.model for engine in engines] == models


def test_a_model_trained_further_is_loaded_again(engines: list[FakeEngine]) -> None:
    model = torch.nn.Linear(2, 2)
    specengine.generate(PROMPT, model=model)
    with torch.no_grad():
        model.weight.add_(1)
    specengine.generate(PROMPT, model=model)
    assert len(engines) == 2


def test_a_deleted_model_does_not_keep_its_engine(engines: list[FakeEngine]) -> None:
    model = torch.nn.Linear(2, 2)
    specengine.generate(PROMPT, model=model)
    engines[0].model = None  # a real engine copies the weights
    del model
    gc.collect()
    specengine.generate(PROMPT, model="another")
    assert engines[0].is_closed


def test_the_drafters_of_a_list_are_known_one_by_one(engines: list[FakeEngine]) -> None:
    drafts = [torch.nn.Linear(2, 2), torch.nn.Linear(2, 2)]
    given = [
        ["ngram", drafts[0]],
        ("ngram", drafts[0]),
        [drafts[0], "ngram"],
        ["ngram", drafts[1]],
        ["ngram"],
    ]
    for draft_model in given:
        specengine.generate(PROMPT, model="a", draft_model=draft_model)
    assert [engine.draft_model for engine in engines] == [tuple(each) for each in given[1:]]
    with torch.no_grad():
        drafts[1].weight.add_(1)
    specengine.generate(PROMPT, model="a", draft_model=["ngram", drafts[1]])
    assert len(engines) == 5
    for engine in engines:
        engine.draft_model = None  # a real engine copies the weights
    del draft_model, given, drafts
    gc.collect()
    specengine.generate(PROMPT, model="another")
    assert [engine.is_closed for engine in engines] == [True, True, True, False, True, False]


def test_a_directory_written_again_is_loaded_again(engines: list[FakeEngine], tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    specengine.generate(PROMPT, model=tmp_path)
    specengine.generate(PROMPT, model=str(tmp_path))
    assert len(engines) == 1
    (tmp_path / "config.json").write_text('{"new": 1}')
    specengine.generate(PROMPT, model=tmp_path)
    assert len(engines) == 2


def test_a_home_directory_is_known_by_its_files(
    engines: list[FakeEngine], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "ckpt").mkdir()
    for text in ("{}", '{"new": 1}'):
        (tmp_path / "ckpt" / "config.json").write_text(text)
        specengine.generate(PROMPT, model="~/ckpt")
        specengine.generate(PROMPT, model=tmp_path / "ckpt")
    assert len(engines) == 2


def test_a_directory_of_links_is_known_by_what_they_point_to(
    engines: list[FakeEngine], tmp_path: Path
) -> None:
    """As the Hub's cache is made: the same size and time, but another file or other contents behind the link."""
    (tmp_path / "model").mkdir()
    link, first, second = (tmp_path / name for name in ("model/config.json", "first", "second"))
    first.write_text("1")
    second.write_text("2")
    for blob in (first, second):
        os.utime(blob, ns=(0, 0))
    link.symlink_to(first)
    specengine.generate(PROMPT, model=tmp_path / "model")
    link.unlink()
    link.symlink_to(second)
    specengine.generate(PROMPT, model=tmp_path / "model")
    second.write_text("3")
    specengine.generate(PROMPT, model=tmp_path / "model")
    specengine.generate(PROMPT, model=tmp_path / "model")
    assert len(engines) == 3


# Streamers


class Recorder:
    """The protocol of transformers' streamers."""

    def __init__(self) -> None:
        self.calls: list[Any] = []

    def put(self, value: torch.Tensor) -> None:
        self.calls.append(value.tolist())

    def end(self) -> None:
        self.calls.append("end")


@pytest.mark.usefixtures("engines")
def test_a_put_and_end_streamer_gets_the_prompt_then_the_tokens() -> None:
    recorder = Recorder()
    specengine.generate("hi", streamer=recorder)
    assert recorder.calls == [[[104, 105]], [97], [98], "end"]
    recorder = Recorder()
    specengine.generate([5, 6], streamer=recorder)
    assert recorder.calls[0] == [[5, 6]]


@pytest.mark.usefixtures("engines")
def test_a_put_and_end_streamer_hears_of_the_end_of_a_call_that_fails(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Its reader, another thread as a rule, would wait for ever."""
    too_late, unloadable, broken = Recorder(), Recorder(), Recorder()
    with pytest.raises(ValueError, match="temperature"):
        specengine.generate("hi", streamer=too_late, temperature=-1)
    assert too_late.calls == ["end"]
    FakeEngine.failures = [OSError("the disk said no")]
    with pytest.raises(OSError, match="the disk"):
        specengine.generate("hi", streamer=unloadable)
    assert unloadable.calls == ["end"]

    def fail(*_: Any, **__: Any) -> Any:
        raise RuntimeError("the engine said no")

    monkeypatch.setattr(FakeEngine, "stream", fail)
    with pytest.raises(RuntimeError, match="the engine"):
        specengine.generate("hi", streamer=broken)
    assert broken.calls == [[[104, 105]], "end"]


@pytest.mark.usefixtures("engines")
def test_a_function_gets_every_event() -> None:
    events: list[StreamEvent] = []
    results = specengine.generate(["a", "b"], streamer=events.append)
    assert [event.index for event in events] == [0, 0, 1, 1]
    assert [event.result for event in events if event.result] == results


@pytest.mark.parametrize(
    ("given", "error"),
    [({"streamer": 3}, TypeError), ({"streamer": Recorder(), "n": 2}, ValueError)],
)
@pytest.mark.usefixtures("no_engine")
def test_streamers_that_cannot_be(given: dict[str, Any], error: type[Exception]) -> None:
    with pytest.raises(error, match="streamer"):
        specengine.generate(PROMPT, **given)


@pytest.mark.usefixtures("no_engine")
def test_a_put_and_end_streamer_takes_one_prompt() -> None:
    with pytest.raises(ValueError, match="2 prompts"):
        specengine.generate(["a", "b"], streamer=Recorder())


# With the real engine and the bundled pair


def test_the_bundled_pair_speculates_and_changes_nothing() -> None:
    given: dict[str, Any] = {"max_new_tokens": 40, "logprobs": 0}
    plain = specengine.generate(PROMPT, num_speculative_tokens=0, **given)
    speculative = specengine.generate(PROMPT, num_speculative_tokens=4, **given)
    assert speculative.token_ids == plain.token_ids
    assert speculative.outputs[0].logprobs == plain.outputs[0].logprobs
    assert speculative.text == plain.text
    statistics = speculative.metrics.speculative_decoding
    assert statistics.num_accepted_draft_tokens > 0
    assert plain.metrics.speculative_decoding.num_draft_tokens == 0


def test_a_seed_decides_the_text_with_and_without_speculation() -> None:
    given: dict[str, Any] = {"max_new_tokens": 24, "temperature": 0.9, "seed": 7}
    texts = {specengine.generate(PROMPT, num_speculative_tokens=k, **given).text for k in (0, 2, 5)}
    assert len(texts) == 1


def test_streamed_text_adds_up() -> None:
    events = list(specengine.stream([PROMPT, "import os\n"], max_new_tokens=16))
    for index in range(2):
        mine = [event for event in events if event.index == index]
        result = mine[-1].result
        assert result is not None
        assert "".join(event.text_delta for event in mine) == result.text
        assert [token for event in mine for token in event.token_ids] == result.token_ids
        assert [event.finish_reason for event in mine[:-1]] == [None] * (len(mine) - 1)


def test_transformers_text_streamer(capsys: pytest.CaptureFixture[str]) -> None:
    transformers = pytest.importorskip("transformers")
    tokenizer = transformers.AutoTokenizer.from_pretrained(bundled.target_path())
    streamer = transformers.TextStreamer(tokenizer, skip_prompt=True)
    result = specengine.generate(PROMPT, max_new_tokens=12, streamer=streamer)
    assert capsys.readouterr().out.rstrip("\n") == result.text.rstrip("\n")


def test_mixed_prompts_and_ids() -> None:
    text, ids = specengine.generate([PROMPT, [300, 14]], max_new_tokens=4)
    assert text.prompt == PROMPT
    assert ids.prompt is None
    assert ids.prompt_token_ids == [300, 14]
    assert specengine.generate(PROMPT, max_new_tokens=4).token_ids == text.token_ids
