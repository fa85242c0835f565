"""A draft whose head has only the most frequent tokens: which these are, and that no output changes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tiny_models
import torch
from kernel_cases import DEVICE, NATIVE
from law_helpers import (
    ALL_DRAFTERS,
    CheckpointFactory,
    DraftedFactory,
    EngineFactory,
    Tally,
    assert_idle,
    assert_same,
    make_prompt,
    plain,
)
from scripted_drafters import PerfectDrafter
from test_law_e_distribution import (
    NUM_SAMPLES,
    Filters,
    build_pair,
    build_tiny,
    check_distribution,
    check_tally,
    exact_law,
    sample_rounds,
)

from specengine import Engine, EngineConfig, SamplingParams, bundled
from specengine.draft_vocabulary import choose_tokens, count_tokens
from specengine.engine import assembly
from specengine.models import loader
from specengine.models.checkpoints import open_checkpoint
from specengine.outputs import GenerationResult
from specengine.tokenizer import Tokenizer, Vocabulary
from specengine.weight_formats import WEIGHT_FORMATS

NUM_IDS = 320
MODES: dict[str, dict[str, Any]] = {
    "greedy": {},
    "coupled": {"temperature": 1.0, "seed": 5, "acceptance": "coupled"},
    "coupled, filtered": {"temperature": 0.8, "seed": 6, "acceptance": "coupled", "top_k": 40, "top_p": 0.95},
    "penalties": {"repetition_penalty": 1.3, "frequency_penalty": 0.4, "logit_bias": {0: 4.0, 17: -3.0}},
    "coupled, penalties": {"temperature": 1.0, "seed": 7, "acceptance": "coupled", "presence_penalty": 0.5},
    "confident": {"draft_confidence": 0.02},
    "rejection": {"temperature": 1.0, "seed": 8, "acceptance": "rejection"},
    "rejection, filtered": {"temperature": 0.9, "seed": 9, "acceptance": "rejection", "top_p": 0.9},
    "block": {"temperature": 1.0, "seed": 10, "acceptance": "block"},
}
# What the target says, whatever drafts.
EXACT = [name for name, mode in MODES.items() if mode.get("acceptance") not in ("rejection", "block")]


def params(mode: str, k: int, **more: Any) -> SamplingParams:
    asked = {"max_new_tokens": 24, "ignore_eos": True, "logprobs": 1, "return_rounds": True}
    return SamplingParams(**{**asked, **MODES[mode], **more}, num_speculative_tokens=k)


def prompts_of(count: int) -> list[list[int]]:
    return [make_prompt(3 + row % 4, row, NUM_IDS) for row in range(count)]


def kept_by(engine: Engine) -> set[int]:
    """The tokens that the draft's head has."""
    weights: Any = engine.weights["draft"]
    return set(weights.head_token_ids.tolist())


def drafted_by(results: list[GenerationResult]) -> set[int]:
    rounds = [each for result in results for each in result.outputs[0].rounds or []]
    return {token for each in rounds for token in each.draft_token_ids}


# -- which tokens -------------------------------------------------------------------------------------------------


def vocabulary(tokenizer: Tokenizer | None = None, num_rows: int = NUM_IDS, name: str = "m") -> Vocabulary:
    return Vocabulary(name, num_rows, tokenizer)


def choose(count: int, text: str | Path | None, of: Vocabulary) -> tuple[int, ...]:
    return choose_tokens(count, None if text is None else str(text), target=of, draft=of, translation=None)


def test_the_most_frequent_tokens_of_a_text_then_the_lowest_ids(tmp_path: Path) -> None:
    tokenizer, text = Tokenizer(tiny_models.build_tokenizer(NUM_IDS)), tmp_path / "text"
    text.write_text("zq" * 3 + "~" * 5 + "Q", encoding="utf-8")
    (z, q), tilde, single = (tokenizer.encode_part(each) for each in ("zq", "~", "Q"))
    counts = count_tokens(tokenizer, str(text))
    assert (counts[tilde[0]], counts[z], counts[q], counts[single[0]]) == (5, 3, 3, 1)
    of = vocabulary(tokenizer)
    assert choose(1, text, of) == (tilde[0],)
    assert choose(2, text, of) == tuple(sorted((tilde[0], min(z, q))))
    assert choose(6, text, of) == tuple(sorted((tilde[0], z, q, single[0], 0, 1)))
    assert choose(NUM_IDS, text, of) == tuple(range(NUM_IDS))


def test_without_a_text_the_bundled_prompts_are_counted() -> None:
    checkpoint = open_checkpoint(bundled.target_path())
    tokenizer = checkpoint.tokenizer
    assert tokenizer is not None
    counts = count_tokens(tokenizer, None)
    assert counts.total() > 20_000
    kept = choose(500, None, vocabulary(tokenizer, checkpoint.spec.vocab_size))
    assert min(counts[token] for token in kept) >= max(counts[token] for token in set(counts) - set(kept))
    assert sum(counts[token] for token in kept) > 0.6 * counts.total()


def test_without_a_tokenizer_these_are_the_lowest_ids() -> None:
    assert choose(3, None, vocabulary(num_rows=8)) == (0, 1, 2)


def test_only_tokens_that_both_models_use() -> None:
    """Rows beyond the tokenizer's ids are padding, and so are the draft's beyond the target's."""
    tokenizer = Tokenizer(tiny_models.build_tokenizer(NUM_IDS))
    target, draft = vocabulary(tokenizer), vocabulary(tokenizer, NUM_IDS + 7, "d")
    pair = {"target": target, "draft": draft, "translation": None}
    assert max(choose_tokens(NUM_IDS, None, **pair)) == NUM_IDS - 1
    with pytest.raises(ValueError, match=f"draft_vocab_size={NUM_IDS + 1}: of draft 'd' only {NUM_IDS}"):
        choose_tokens(NUM_IDS + 1, None, **pair)


# -- what is refused ----------------------------------------------------------------------------------------------


def test_texts_that_cannot_be_counted_are_refused_by_name(tmp_path: Path) -> None:
    binary, of = tmp_path / "binary", vocabulary(Tokenizer(tiny_models.build_tokenizer(NUM_IDS)))
    binary.write_bytes(b"\xff\xfe\x00")
    for path in (binary, tmp_path / "missing", tmp_path):
        with pytest.raises(ValueError, match=r"draft_vocab_text='.*': cannot be read as UTF-8 text"):
            choose(2, path, of)
    with pytest.raises(ValueError, match="draft_vocab_text='x': the models have no tokenizer"):
        choose(2, "x", vocabulary())


@pytest.mark.parametrize("size", [0, -1, 2.5, 2**40, True, "all"])
def test_sizes_that_cannot_be(size: object) -> None:
    with pytest.raises((ValueError, TypeError), match="draft_vocab_size"):
        EngineConfig(draft_vocab_size=size)


def test_a_text_without_a_size_is_refused() -> None:
    with pytest.raises(ValueError, match=r"draft_vocab_text='words' says .* give draft_vocab_size"):
        EngineConfig(draft_vocab_text="words")


def test_more_than_there_are_and_drafters_without_a_model_are_refused_before_loading(
    checkpoint: CheckpointFactory, build_engine: EngineFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = checkpoint("gpt2", vocab_size=64)
    monkeypatch.setattr(assembly, "load_model", lambda *_, **__: pytest.fail("something was loaded"))
    for draft in (path, "self:1", ["ngram", path]):
        with pytest.raises(ValueError, match=r"draft_vocab_size=65: of draft .* only 64 tokens"):
            build_engine(path, draft, draft_vocab_size=65)
    for drafter, name in (
        ("ngram", "ngram"),
        (["ngram", "suffix"], "ngram, suffix"),
        (PerfectDrafter(vocab_size=64), "Perfect"),
    ):
        with pytest.raises(ValueError, match=f"draft_vocab_size=8: {name}.* drafts without a model"):
            build_engine(path, drafter, draft_vocab_size=8)


@pytest.mark.parametrize("tokens", [(), (1, 1), (2, 1), (-1, 2), (3, NUM_IDS)])
def test_a_head_of_tokens_that_do_not_ascend_is_refused(
    tokens: tuple[int, ...], checkpoint: CheckpointFactory
) -> None:
    with pytest.raises(ValueError, match="head_tokens"):
        load(checkpoint("gpt2", vocab_size=NUM_IDS), head_tokens=tokens)


# -- the head -----------------------------------------------------------------------------------------------------


def load(path: Path, **options: Any) -> Any:
    source = open_checkpoint(path)
    return loader.load_model(
        source, device=torch.device("cpu"), backend=NATIVE, dtype=torch.float32, **options
    ).decoder.weights


@pytest.mark.parametrize("head_dtype", ["auto", *WEIGHT_FORMATS])
@pytest.mark.parametrize("is_tied", [True, False])
def test_the_heads_rows_are_gathered_and_all_else_stays(
    is_tied: bool, head_dtype: str, tmp_path: Path
) -> None:
    sizes = {"hidden_size": 64, "intermediate_size": 96, "vocab_size": 300}
    model = tiny_models.build_model("llama", tie_word_embeddings=is_tied, **sizes)
    path = tiny_models.save_checkpoint(tmp_path / "m", model)
    kept = [0, 3, 4, 127, 128, 299]
    whole, short = load(path, head_dtype=head_dtype), load(path, head_dtype=head_dtype, head_tokens=kept)
    assert whole.head_token_ids is None
    assert short.head_token_ids.tolist() == kept
    assert short.head.out_features == len(kept)
    assert torch.equal(short.token_table, whole.token_table)
    assert torch.equal(short.layers[0].qkv.weight, whole.layers[0].qkv.weight)
    rows = model.get_output_embeddings().weight[kept]
    expected = NATIVE.pack_linear(rows.detach(), None, WEIGHT_FORMATS.get(head_dtype))
    assert torch.equal(short.head.weight, expected.weight)


# -- no output changes --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1, 40, NUM_IDS])
@pytest.mark.parametrize("model_type", ["gpt2", "llama"])
def test_every_mode_says_what_plain_decoding_says(
    model_type: str, size: int, checkpoint: CheckpointFactory, build_engine: EngineFactory, tally: Tally
) -> None:
    """All modes in one batch; text and the log-probabilities' bits."""
    models = [
        checkpoint(model_type, seed=3, vocab_size=NUM_IDS, with_tokenizer=True, noise=noise)
        for noise in (0.0, 0.05)
    ]
    engine = build_engine(*models, draft_vocab_size=size, max_batch_size=len(EXACT))
    kept, num_free = kept_by(engine), engine.num_free_blocks
    assert len(kept) == size
    prompts = prompts_of(len(EXACT))
    expected = [
        plain(engine, prompt, max_new_tokens=24, ignore_eos=True, logprobs=1, **MODES[mode])
        for prompt, mode in zip(prompts, EXACT, strict=True)
    ]
    for k in (1, 4):
        results = engine.generate(prompts, [params(mode, k) for mode in EXACT])
        for result, one in zip(results, expected, strict=True):
            assert_same(result, one)
        assert drafted_by(results) <= kept
    assert_idle(engine, num_free)
    if size > 1:
        tally.check()


@pytest.mark.parametrize("draft", ALL_DRAFTERS)
def test_whatever_drafts(draft: str, drafted: DraftedFactory, build_engine: EngineFactory) -> None:
    """Layers of the target's, lists, and drafts of another vocabulary, whose own tokens are counted."""
    models = drafted(draft, seed=1, vocab_size=NUM_IDS, with_tokenizer=True)
    if draft in ("ngram", "suffix", "ngram+suffix"):
        with pytest.raises(ValueError, match="without a model"):
            build_engine(*models, draft_vocab_size=30)
        return
    engine = build_engine(*models, draft_vocab_size=30)
    prompts = [[token % engine.vocab_size for token in prompt] for prompt in prompts_of(len(MODES))]
    asked = [params(mode, 3) for mode in MODES]
    together = engine.generate(prompts, asked)
    for mode, prompt, one, result in zip(MODES, prompts, asked, together, strict=True):
        if "+" not in draft or mode in EXACT:
            assert_same(engine.generate(prompt, one), result)
        if mode in EXACT:
            expected = plain(engine, prompt, max_new_tokens=24, ignore_eos=True, logprobs=1, **MODES[mode])
            assert_same(result, expected)


def check_what_is_rejected(engine: Engine, modes: list[str], k: int, **asked: Any) -> None:
    """A draft that is the target but for its head draws what the target draws, where its head has that token."""
    kept = kept_by(engine)
    prompts = prompts_of(len(modes))
    results = engine.generate(prompts, [params(mode, k, **asked) for mode in modes])
    num_accepted = num_rejected = 0
    for result in results:
        at = 1
        for each in result.outputs[0].rounds or []:
            said = result.token_ids[at : at + each.num_tokens]
            for drafted, token in zip(each.draft_token_ids, said, strict=False):
                num_accepted += drafted == token
                num_rejected += drafted != token
                assert drafted == token or token not in kept
            at += each.num_tokens
    assert num_accepted > 0, "nothing was accepted"
    assert num_rejected > 0, "nothing was rejected"


DRAWN_ALIKE = ["greedy", "coupled", "coupled, penalties"]


def short_twins(
    checkpoint: CheckpointFactory, build_engine: EngineFactory, text: Path, **config: Any
) -> Engine:
    """A model that drafts for itself with half of its tokens, which lie anywhere."""
    sizes = {"num_layers": 1, "num_heads": 2} if config.get("backend") == "triton" else {}
    path = checkpoint("gpt2", seed=4, vocab_size=NUM_IDS, with_tokenizer=True, logit_scale=1.0, **sizes)
    text.write_bytes(bytes(range(160, 30, -1)).decode("latin-1").encode() * 2)
    return build_engine(path, path, draft_vocab_size=160, draft_vocab_text=str(text), **config)


@pytest.mark.parametrize("backend", ["native", "reference", pytest.param("triton", marks=pytest.mark.triton)])
def test_the_noise_of_a_token_is_the_targets(
    backend: str, checkpoint: CheckpointFactory, build_engine: EngineFactory, tmp_path: Path
) -> None:
    device = str(DEVICE) if backend == "triton" else "cpu"
    engine = short_twins(checkpoint, build_engine, tmp_path / "t", backend=backend, device=device)
    kept = kept_by(engine)
    assert kept != set(range(len(kept)))
    check_what_is_rejected(engine, DRAWN_ALIKE, 3, max_new_tokens=8 if backend == "triton" else 60)


@pytest.mark.parametrize("fault", ["the noise of the columns", "columns for tokens"])
def test_a_fault_in_which_tokens_these_are_is_noticed(
    fault: str,
    checkpoint: CheckpointFactory,
    build_engine: EngineFactory,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    engine = short_twins(checkpoint, build_engine, tmp_path / "t", backend="reference")
    runner: Any = engine._drafter.runner  # type: ignore[attr-defined]
    backend, ids = runner.backend, engine.weights["draft"].head_token_ids  # type: ignore[attr-defined]
    columns = torch.arange(ids.numel(), dtype=torch.int32)
    head_draw = backend.head_draw

    def faulty(*given: Any, token_ids: Any, **options: Any) -> Any:
        if token_ids is None:
            return head_draw(*given, token_ids=None, **options)
        tokens, error = head_draw(*given, token_ids=columns, **options)
        return (tokens if fault == "columns for tokens" else ids[tokens.long()]), error

    monkeypatch.setattr(backend, "head_draw", faulty, raising=False)
    mode = "greedy" if fault == "columns for tokens" else "coupled"
    with pytest.raises(AssertionError):
        check_what_is_rejected(engine, [mode], 3, max_new_tokens=60)


@pytest.mark.parametrize("mode", list(MODES))
def test_with_all_tokens_the_draft_drafts_as_ever(
    mode: str, checkpoint: CheckpointFactory, build_engine: EngineFactory
) -> None:
    models = [checkpoint("gpt2", seed=3, vocab_size=NUM_IDS, noise=noise) for noise in (0.0, 0.1)]
    as_ever, whole = build_engine(*models), build_engine(*models, draft_vocab_size=NUM_IDS)
    for k in (1, 4):
        ours, theirs = (each.generate(prompts_of(3), params(mode, k)) for each in (whole, as_ever))
        for result, other in zip(ours, theirs, strict=True):
            assert_same(result, other)
            assert result.outputs[0].rounds == other.outputs[0].rounds


def test_a_row_drafts_the_same_whatever_runs_beside_it(
    checkpoint: CheckpointFactory, build_engine: EngineFactory, tmp_path: Path
) -> None:
    engine = short_twins(checkpoint, build_engine, tmp_path / "t")
    prompts, asked = prompts_of(len(MODES)), [params(mode, 3) for mode in MODES]
    together = engine.generate(prompts, asked)
    for prompt, one, result in zip(prompts, asked, together, strict=True):
        alone = engine.generate(prompt, one)
        assert_same(alone, result)
        assert alone.outputs[0].rounds == result.outputs[0].rounds


def test_ends_and_stops_are_plains(
    checkpoint: CheckpointFactory, build_engine: EngineFactory, tmp_path: Path
) -> None:
    """Law C with each token of a text as its end, whether or not the draft has it."""
    engine = short_twins(checkpoint, build_engine, tmp_path / "t")
    kept, prompt = kept_by(engine), make_prompt(5, 1, NUM_IDS)
    tokens = plain(engine, prompt, max_new_tokens=24, **MODES["coupled"]).token_ids
    assert any(token in kept for token in tokens)
    assert not all(token in kept for token in tokens)
    for token in tokens:
        asked = {"stop_token_ids": [token], "logprobs": 1, "max_new_tokens": 24, **MODES["coupled"]}
        for k in (1, 5):
            result = engine.generate(prompt, num_speculative_tokens=k, **asked)
            assert_same(result, plain(engine, prompt, **asked))


@pytest.mark.parametrize(
    ("acceptance", "num_tokens"), [("rejection", 1), ("rejection", 5), ("block", 5), ("coupled", 5)]
)
def test_it_samples_the_targets_law(
    acceptance: str, num_tokens: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Law E, penalties and filters included; tokens that the draft lacks come from the target alone."""
    kept = (1, 2, 4, 6, 7)[-num_tokens:]
    monkeypatch.setattr(assembly, "choose_tokens", lambda *_, **__: kept)
    target, filters = build_tiny(1), Filters(1.3, 6, 0.97, 0.01, repetition_penalty=1.2)
    with build_pair(target, build_tiny(2), draft_vocab_size=num_tokens) as engine:
        samples = sample_rounds(engine, filters, acceptance, NUM_SAMPLES // 8)
    check_tally(samples)
    check_distribution(samples, exact_law(target, filters))


def test_a_token_that_was_not_drawn_by_its_law_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Columns for tokens: proposed is another one than was drawn."""
    kept = torch.tensor([1, 2, 4, 6, 7], dtype=torch.int32)
    monkeypatch.setattr(assembly, "choose_tokens", lambda *_, **__: tuple(kept.tolist()))
    target = build_tiny(1)
    with build_pair(target, build_tiny(2), draft_vocab_size=5) as engine:
        backend: Any = engine._target.backend
        sample_rows = backend.sample_rows

        def faulty(*given: Any) -> Any:
            tokens, log_probs = sample_rows(*given)
            return torch.searchsorted(kept, tokens).int(), log_probs

        monkeypatch.setattr(backend, "sample_rows", faulty)
        samples = sample_rounds(engine, Filters(), "rejection", NUM_SAMPLES // 10)
    with pytest.raises(AssertionError):
        check_distribution(samples, exact_law(target, Filters()))
