"""Law C: an end-of-text token, stop id or stop string inside an accepted run ends the output as in plain decoding."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import tiny_models
import torch
from law_helpers import EngineFactory, Tally, assert_idle, assert_same, plain
from scripted_drafters import AdversarialDrafter, KnowingDrafter, PerfectDrafter

from specengine import metrics
from specengine.config import SamplingParams
from specengine.engine import Engine, record
from specengine.outputs import GenerationResult
from specengine.runtime.sequence import Sequence
from specengine.runtime.text import TextStream

HOLDS_FOR_REPLAYED_ROUNDS = True
NUM_TOKENS = 20
NUM_BEYOND = 12  # tokens that PERFECT knows beyond the longest stop: what an accepted run would go on with
KS = (1, 2, 3, 8)
VOCAB = 320
PROMPT = "for item in"


@dataclass(frozen=True)
class Stop:
    """A way to end the output, and what plain decoding must make of it."""

    name: str
    params: dict[str, Any]
    eos: int | None
    expected_tokens: list[int]
    expected_text: str
    stop_reason: str | int | None


class Lab:
    """An engine, the text it would write if nothing stopped it, and every stop that can be declared in it."""

    def __init__(self, engine: Engine, drafter: KnowingDrafter, sampling: dict[str, Any]) -> None:
        assert engine.tokenizer is not None
        self.engine = engine
        self.drafter = drafter
        self.sampling = {**sampling, "logprobs": 1}
        self.free = plain(
            engine,
            PROMPT,
            max_new_tokens=NUM_TOKENS + NUM_BEYOND,
            ignore_eos=True,
            **self.sampling,
        )
        self.tokens = self.free.token_ids[:NUM_TOKENS]
        drafter.forget()
        drafter.learn(self.free)
        decode = engine.tokenizer.decode
        self.pieces = [decode([token]) for token in self.tokens]
        assert "".join(self.pieces) == decode(self.tokens), "every token stands for whole characters"

    def stops_at(self, index: int) -> list[Stop]:
        """The token at `index` as EOS and stop id; its text, and strings around it, as stop strings."""
        token, piece = self.tokens[index], self.pieces[index]
        first = self.tokens.index(token)
        before = "".join(self.pieces[:first])
        stops = [
            Stop("eos", {}, token, self.tokens[: first + 1], before, None),
            Stop("id", {"stop_token_ids": [token]}, None, self.tokens[: first + 1], before, token),
            self._string("whole", piece),
        ]
        if index > 0:
            previous = self.pieces[index - 1]
            stops.append(self._string("spanning", previous[-1] + piece[0]))
            stops.append(self._string("spanning all", previous + piece))
        if len(piece) > 1:
            following = self.pieces[index + 1][0] if index + 1 < len(self.pieces) else ""
            stops.append(self._string("inside", piece[1:]))
            stops.append(self._string("inside and on", piece[1:] + following))
        return stops

    def _string(self, name: str, string: str) -> Stop:
        ends = [sum(map(len, self.pieces[: count + 1])) for count in range(len(self.pieces))]
        at = "".join(self.pieces).index(string)
        num_tokens = next(count for count, end in enumerate(ends, 1) if end >= at + len(string))
        text = "".join(self.pieces)[:at]
        return Stop(name, {"stop": [string]}, None, self.tokens[:num_tokens], text, string)


def check_stops(lab: Lab, ks: tuple[int, ...] = KS, indices: range = range(NUM_TOKENS)) -> None:
    """Plain stops where it must, and speculation gives plain's bits with statistics that end there too."""
    num_free = lab.engine.num_free_blocks
    original_eos = lab.engine._intake.eos_token_ids
    for index in indices:
        stops = lab.stops_at(index)
        for is_eos in (True, False):
            chosen = [stop for stop in stops if (stop.eos is not None) == is_eos]
            lab.engine._intake.eos_token_ids = tuple(stop.eos for stop in chosen if stop.eos is not None)
            check_stops_together(lab, chosen, ks)
    lab.engine._intake.eos_token_ids = original_eos
    assert_idle(lab.engine, num_free)


def check_stops_together(lab: Lab, stops: list[Stop], ks: tuple[int, ...]) -> None:
    def build(stop: Stop, k: int) -> SamplingParams:
        sampling = {**lab.sampling, **stop.params}
        return SamplingParams(max_new_tokens=NUM_TOKENS + NUM_BEYOND, num_speculative_tokens=k, **sampling)

    expected = lab.engine.generate([PROMPT] * len(stops), [build(stop, 0) for stop in stops])
    for stop, truth in zip(stops, expected, strict=True):
        assert truth.token_ids == stop.expected_tokens, stop.name
        assert truth.text == stop.expected_text, stop.name
        assert truth.finish_reason == "stop", stop.name
        assert truth.outputs[0].stop_reason == stop.stop_reason, stop.name
        assert truth.metrics.num_generated_tokens == len(stop.expected_tokens)
        assert [entry.token_id for entry in truth.outputs[0].logprobs] == stop.expected_tokens
    asked = [(stop, k) for stop in stops for k in ks]
    results = lab.engine.generate([PROMPT] * len(asked), [build(stop, k) for stop, k in asked])
    truths = [truth for truth in expected for _ in ks]
    for (stop, k), result, truth in zip(asked, results, truths, strict=True):
        assert_same(result, truth)
        assert len(result.outputs[0].token_source) == len(stop.expected_tokens)
        check_statistics(lab.drafter, result, k)


def check_statistics(drafter: KnowingDrafter, result: GenerationResult, k: int) -> None:
    """Exactly what a drafter of that kind does to the emitted tokens; what came after a stop does not count."""
    counts = result.metrics.speculative_decoding
    accepted_a_round = k if isinstance(drafter, PerfectDrafter) else min(k, drafter.wrong_at)  # type: ignore[attr-defined]
    remaining = len(result.token_ids) - 1
    rounds = accepted = drafted = trimmed = 0
    while remaining > 0:
        kept = min(remaining, accepted_a_round + 1)
        is_trimmed = kept <= accepted_a_round
        rounds += 1
        trimmed += is_trimmed
        accepted += min(kept, accepted_a_round)
        drafted += kept if is_trimmed else k
        remaining -= kept
    assert counts.num_rounds == rounds
    assert counts.num_accepted_draft_tokens == accepted == result.outputs[0].token_source.count("draft")
    assert counts.num_draft_tokens == drafted
    assert counts.num_trimmed_tokens == trimmed


def save_readable(directory: Path, eos_token_id: int = 0, model_type: str = "gpt2", **sizes: int) -> Path:
    """A model that writes printable ASCII, longer tokens preferred: text in which strings can be found."""
    tokenizer = tiny_models.build_tokenizer(VOCAB)
    model = tiny_models.build_model(
        model_type,
        vocab_size=VOCAB,
        seed=5,
        tie_word_embeddings=False,
        eos_token_id=eos_token_id,
        **sizes,
    )
    with torch.no_grad():
        make_first_feature_constant(model)
        for token in range(VOCAB):
            text = tokenizer.decode([token])
            is_readable = bool(text) and text.isascii() and text.isprintable()
            model.lm_head.weight[token, 0] = (1.5 if len(text) > 1 else -1.0) if is_readable else -1000.0
    return tiny_models.save_checkpoint(directory, model, tokenizer=tokenizer)


def make_first_feature_constant(model: Any) -> None:
    """What the head reads as feature 0 is 1; where the last norm has no bias, about as much, and positive."""
    if hasattr(model, "transformer"):
        model.transformer.ln_f.weight[0], model.transformer.ln_f.bias[0] = 0.0, 1.0
        return
    model.model.embed_tokens.weight[:, 0] = model.model.embed_tokens.weight.std()
    for layer in model.model.layers:
        layer.self_attn.o_proj.weight[0] = layer.mlp.down_proj.weight[0] = 0.0
    model.model.norm.weight[0] = 1.0


@pytest.fixture(scope="module")
def readable(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_readable(tmp_path_factory.mktemp("readable") / "model")


COUPLED: dict[str, Any] = {"temperature": 4.0, "seed": 3, "acceptance": "coupled"}


@pytest.fixture
def build_lab(readable: Path, build_engine: EngineFactory) -> Callable[..., Lab]:
    def build(drafter: KnowingDrafter, sampling: dict[str, Any] = COUPLED) -> Lab:
        return Lab(build_engine(readable, drafter, max_batch_size=32), drafter, sampling)

    return build


def test_every_stop_at_every_index_ends_an_accepted_run_as_plain_ends(
    build_lab: Callable[..., Lab], tally: Tally
) -> None:
    lab = build_lab(PerfectDrafter(vocab_size=VOCAB))
    assert len(set(lab.tokens)) > NUM_TOKENS // 2, "a text that repeats stops early and tests little"
    check_stops(lab)
    tally.check(rejected=False)


@pytest.mark.parametrize("wrong_at", [0, 1, 2])
def test_every_stop_ends_a_run_with_rejections_as_plain_ends(
    wrong_at: int, build_lab: Callable[..., Lab], tally: Tally
) -> None:
    lab = build_lab(AdversarialDrafter(vocab_size=VOCAB, wrong_at=wrong_at))
    check_stops(lab, ks=(2, 4), indices=range(0, NUM_TOKENS, 3))
    tally.check(accepted=wrong_at > 0)


def test_every_stop_of_greedy_decoding(build_lab: Callable[..., Lab], tally: Tally) -> None:
    check_stops(build_lab(PerfectDrafter(vocab_size=VOCAB), {}), ks=(3, 5), indices=range(8))
    tally.check(rejected=False)


@pytest.mark.parametrize("model_type", ["llama", "qwen3"])
def test_every_stop_of_an_architecture_without_biases(
    model_type: str, tmp_path: Path, build_engine: EngineFactory, tally: Tally
) -> None:
    drafter = AdversarialDrafter(vocab_size=VOCAB, wrong_at=2)
    engine = build_engine(save_readable(tmp_path, model_type=model_type), drafter, max_batch_size=32)
    check_stops(Lab(engine, drafter, COUPLED), ks=(2, 4), indices=range(0, NUM_TOKENS, 3))
    tally.check()


@pytest.mark.parametrize(
    ("model_type", "weight_dtype", "wrong_at"),
    [("llama", "int4", 2), ("qwen3", "int4_min", 1), ("gpt2", "int8_group", None)],
)
def test_every_stop_of_a_model_with_weights_by_group(
    model_type: str,
    weight_dtype: str,
    wrong_at: int | None,
    tmp_path: Path,
    build_engine: EngineFactory,
    tally: Tally,
) -> None:
    drafter = PerfectDrafter(vocab_size=VOCAB)
    if wrong_at is not None:
        drafter = AdversarialDrafter(vocab_size=VOCAB, wrong_at=wrong_at)
    path = save_readable(tmp_path, model_type=model_type, **tiny_models.IN_GROUPS.get(model_type, {}))
    lab = Lab(build_engine(path, drafter, max_batch_size=32, weight_dtype=weight_dtype), drafter, COUPLED)
    check_stops(lab, ks=(2, 4), indices=range(0, NUM_TOKENS, 3))
    tally.check(rejected=wrong_at is not None)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(5))
def test_the_whole_grid(seed: int, build_lab: Callable[..., Lab], tally: Tally) -> None:
    sampling = {**COUPLED, "seed": seed}
    check_stops(build_lab(PerfectDrafter(vocab_size=VOCAB), sampling), ks=tuple(range(1, 17)))
    for wrong_at in range(6):
        drafter = AdversarialDrafter(vocab_size=VOCAB, wrong_at=wrong_at)
        check_stops(build_lab(drafter, sampling), ks=(1, 2, 3, 5, 8))
    tally.check()


@pytest.mark.parametrize("k", [1, 3, 8])
def test_minimum_length_kept_stop_strings_and_ignored_eos_are_plains(
    k: int, build_lab: Callable[..., Lab], tally: Tally
) -> None:
    """min_new_tokens bans ids and overlooks strings; a kept stop string ends the text; ignore_eos ignores."""
    lab = build_lab(AdversarialDrafter(vocab_size=VOCAB, wrong_at=2))
    prompts, params = [], []
    for index in (2, 5, 9, 14):
        whole, token = lab.pieces[index], lab.tokens[index]
        for extra in (
            {"stop": [whole], "min_new_tokens": index + 1},
            {"stop": [whole], "min_new_tokens": index + 2},
            {"stop_token_ids": [token], "min_new_tokens": index},
            {"stop_token_ids": [token], "min_new_tokens": index + 3},
            {"stop": [whole[:1], whole], "include_stop_str_in_output": True},
            {"stop": ["never occurs", lab.pieces[index - 1] + whole[:1]]},
            {"stop": [whole], "max_new_tokens": index + 1},
            {"stop_token_ids": [token], "max_new_tokens": index + 1},
        ):
            prompts.append(PROMPT)
            params.append({"max_new_tokens": NUM_TOKENS, **lab.sampling, **extra})
    lab.engine._intake.eos_token_ids = (lab.tokens[4],)
    params += [{**params[0], "ignore_eos": is_ignored} for is_ignored in (True, False)]
    prompts += [PROMPT, PROMPT]
    both = [
        lab.engine.generate(prompts, [SamplingParams(num_speculative_tokens=n, **one) for one in params])
        for n in (0, k)
    ]
    for truth, result in zip(*both, strict=True):
        assert_same(result, truth)
    tally.check()


@pytest.mark.parametrize("k", [0, 1, 4, 8])
def test_streamed_text_adds_up_to_the_text_before_the_stop(
    k: int, build_lab: Callable[..., Lab], tally: Tally
) -> None:
    lab = build_lab(AdversarialDrafter(vocab_size=VOCAB, wrong_at=min(k // 2, 3)))
    stops = [stop for index in range(1, NUM_TOKENS, 2) for stop in lab.stops_at(index) if stop.eos is None]
    params = [
        SamplingParams(
            num_speculative_tokens=k,
            max_new_tokens=NUM_TOKENS + NUM_BEYOND,
            **{**lab.sampling, **stop.params},
        )
        for stop in stops
    ]
    texts, tokens = [""] * len(stops), [list[int]() for _ in stops]
    for event in lab.engine.stream([PROMPT] * len(stops), params):
        texts[event.index] += event.text_delta
        tokens[event.index] += event.token_ids
        if event.result is not None:
            assert event.result.text == texts[event.index]
            assert event.result.token_ids == tokens[event.index]
    assert texts == [stop.expected_text for stop in stops]
    assert tokens == [stop.expected_tokens for stop in stops]
    tally.check(accepted=k > 1, rejected=k > 0)


def test_an_eos_that_the_checkpoint_names_ends_an_accepted_run(
    build_lab: Callable[..., Lab], tmp_path: Path, build_engine: EngineFactory, tally: Tally
) -> None:
    """The same model once more, its config.json now naming a token of its own text."""
    lab = build_lab(PerfectDrafter(vocab_size=VOCAB))
    token = lab.tokens[7]
    path = save_readable(tmp_path / "model", eos_token_id=token)
    drafter = PerfectDrafter(vocab_size=VOCAB)
    drafter.learn(lab.free)
    engine = build_engine(path, drafter)
    result = engine.generate(PROMPT, num_speculative_tokens=5, max_new_tokens=NUM_TOKENS, **lab.sampling)
    assert result.token_ids == lab.tokens[: lab.tokens.index(token) + 1]
    assert result.finish_reason == "stop"
    tally.check(rejected=False)


# -- planted faults -----------------------------------------------------------------------------------------------


def look_for_stops_in_the_last_token_of_a_round_only(monkeypatch: pytest.MonkeyPatch) -> None:
    extend, find_ending, last = record.extend, record.find_ending, 0

    def faulty_extend(sequence: Sequence, tokens: list[int], *given: Any, **flags: Any) -> None:
        nonlocal last
        last = sequence.settled.num_tokens + len(tokens)
        extend(sequence, tokens, *given, **flags)

    def faulty(sequence: Sequence, token: int, num_tokens: int) -> record.Ending:
        ending = find_ending(sequence, token, num_tokens)
        return ending if num_tokens == last or ending.reason == "length" else record.Ending()

    monkeypatch.setattr(record, "extend", faulty_extend)
    monkeypatch.setattr(record, "find_ending", faulty)


def count_what_came_after_the_stop(monkeypatch: pytest.MonkeyPatch) -> None:
    record_rounds = metrics.record_rounds

    def faulty(own: Any, **counts: int) -> None:
        record_rounds(own, **{**counts, "num_kept": counts["num_accepted"] + 1})

    monkeypatch.setattr(metrics, "record_rounds", faulty)


def keep_the_rest_of_the_accepted_run(monkeypatch: pytest.MonkeyPatch) -> None:
    extend = record.extend

    def faulty(sequence: Sequence, tokens: list[int], *given: Any, **flags: Any) -> None:
        before = sequence.settled.num_tokens
        extend(sequence, tokens, *given, **flags)
        settled = sequence.settled
        if settled.stop_reason is None and settled.finish_reason == "stop":
            sequence.output_ids += tokens[settled.num_tokens - before :] or tokens[-1:]
            sequence.settled = settled._replace(num_tokens=len(sequence.output_ids))

    monkeypatch.setattr(record, "extend", faulty)


def search_stop_strings_within_one_token_only(monkeypatch: pytest.MonkeyPatch) -> None:
    append = TextStream._append

    def faulty(self: TextStream, piece: str, *, may_stop: bool) -> str | None:
        return append(self, piece, may_stop=may_stop and any(string in piece for string in self._stop))

    monkeypatch.setattr(TextStream, "_append", faulty)


@pytest.mark.parametrize(
    "plant",
    [
        look_for_stops_in_the_last_token_of_a_round_only,
        count_what_came_after_the_stop,
        keep_the_rest_of_the_accepted_run,
        search_stop_strings_within_one_token_only,
    ],
)
def test_the_law_notices(
    plant: Callable[[pytest.MonkeyPatch], None],
    build_lab: Callable[..., Lab],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    lab = build_lab(PerfectDrafter(vocab_size=VOCAB))
    plant(monkeypatch)
    with pytest.raises(AssertionError):
        check_stops(lab, ks=(3,), indices=range(2, 6))
