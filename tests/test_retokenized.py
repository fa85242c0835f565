"""A draft model that reads the target's text in tokens of its own: what it is fed, what it proposes, who gets it.

That what it proposes changes nothing is every drafter's law (tests/test_every_drafter.py).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import tiny_models
import tokenizers
import torch
import vocabulary_pairs
from law_helpers import DraftedFactory, EngineFactory, Tally, assert_same, make_prompt, plain, spec
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, processors

from specengine import translation
from specengine.drafters import retokenized
from specengine.drafters.host import HostDrafter
from specengine.drafters.retokenized import RetokenizedDrafter, _Cutter
from specengine.engine import Engine
from specengine.errors import InsufficientMemoryError, VocabularyMismatchError
from specengine.tokenizer import Tokenizer, Vocabulary
from specengine.translation import MIN_SHARED, ByText, Translation, translate

SIZE = 320
GREEDY: dict[str, Any] = {"ignore_eos": True, "max_new_tokens": 60}
UNKNOWN = "[UNK]"


def drafter_of(engine: Engine) -> RetokenizedDrafter:
    assert isinstance(engine._drafter, HostDrafter)
    assert isinstance(engine._drafter._drafter, RetokenizedDrafter)
    return engine._drafter._drafter


# -- a text in pieces of one size, and in pieces of another ---------------------------------------------------------


def cut_by(pattern: str, pieces: Sequence[str]) -> tokenizers.Tokenizer:
    """Tokens that are pieces of text; what is none of them is unknown."""
    vocabulary = {piece: index for index, piece in enumerate([tiny_models.END_OF_TEXT, UNKNOWN, *pieces])}
    tokenizer = tokenizers.Tokenizer(models.WordLevel(vocabulary, unk_token=UNKNOWN))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(pattern), behavior="isolated")
    tokenizer.decoder = decoders.Fuse()
    tokenizer.add_special_tokens([AddedToken(tiny_models.END_OF_TEXT, special=True)])
    return tokenizer


def follower(successors: dict[int, int]) -> torch.nn.Module:
    """A model that goes on from each token with one other, whatever came before."""
    model = tiny_models.build_model(
        vocab_size=28, hidden_size=32, max_positions=256, tie_word_embeddings=False
    )
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.fill_(1.0 if "ln" in name and name.endswith("weight") else 0.0)
        model.transformer.wte.weight.copy_(torch.eye(28, 32))
        for token, successor in successors.items():
            model.lm_head.weight[successor, token] = 3.0
    return model


def save_cycle(directory: Path, tokenizer: tokenizers.Tokenizer, pieces: Sequence[str]) -> Path:
    """A model that says these pieces again and again."""
    ids = [tokenizer.token_to_id(piece) for piece in pieces]
    model = follower(dict(zip(ids, [*ids[1:], ids[0]], strict=True)))
    return tiny_models.save_checkpoint(directory, model, tokenizer=tokenizer)


@pytest.mark.parametrize("k", [1, 3, 8])
@pytest.mark.parametrize("temperature", [0.0, 0.7])
def test_the_same_text_cut_otherwise_is_accepted(
    k: int, temperature: float, tmp_path: Path, build_engine: EngineFactory
) -> None:
    """The draft says letter by letter what the target says in pieces of two to five."""
    pieces = ["abc", "de", "fghi", "jk", "lmnop", "qr", "stuv", "wxyz"]
    letters = "".join(pieces)
    shuffled = [letters[5 * index % 26] for index in range(26)]
    engine = build_engine(
        save_cycle(tmp_path / "target", cut_by("|".join(pieces), pieces), pieces),
        save_cycle(tmp_path / "draft", cut_by(".", shuffled), list(letters)),
    )
    assert drafter_of(engine).name == engine.draft_name == str(tmp_path / "draft")
    sampling = {**GREEDY, "temperature": temperature, "acceptance": "rejection", "seed": 1}
    result = spec(engine, "abcde", k, **sampling)
    assert result.text.startswith("fghijklmnopqrstuvwxyzabcde")
    counts = result.metrics.speculative_decoding
    # Where draws end in the middle of a piece, the piece is none.
    assert counts.draft_acceptance_rate > 0.8
    assert counts.mean_acceptance_length > 1 + 0.8 * k - 0.2
    assert_same(spec(engine, "abcde", k, **GREEDY), plain(engine, "abcde", **GREEDY))


# -- what is held is what would be computed -------------------------------------------------------------------------


@pytest.fixture
def by_text(
    tmp_path: Path, build_engine: EngineFactory, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., Engine]:
    """An engine whose draft is the target with noise, with fewer merges of bytes, and reads text in any case."""

    def build(*, num_merges: int = 0, draft_positions: int = 96, **config: Any) -> Engine:
        monkeypatch.setattr(translation, "MIN_SHARED", 2.0)
        size = 257 + num_merges
        target = tiny_models.build_model(vocab_size=SIZE, seed=4, max_positions=96)
        draft = tiny_models.build_model(vocab_size=size, seed=4, max_positions=draft_positions)
        state = {name: value[:size] if "wte" in name or "lm_head" in name else value
                 for name, value in target.state_dict().items()}  # fmt: skip
        state["transformer.wpe.weight"] = state["transformer.wpe.weight"][:draft_positions]
        draft.load_state_dict(state)
        draft, tokenizer = tiny_models.renumbered(draft, tiny_models.build_tokenizer(size), seed=2)
        return build_engine(
            tiny_models.save_checkpoint(
                tmp_path / "target", target, tokenizer=tiny_models.build_tokenizer(SIZE)
            ),
            tiny_models.save_checkpoint(tmp_path / "draft", draft, tokenizer=tokenizer),
            **config,
        )

    return build


Proposed = tuple[list[int], int, list[int]]  # a text, how many drafts were allowed, and the drafts


def check_every_proposal(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever was held of a text, drafted, rejected and drafted again: it proposes what a drafter proposes that
    hears the text for the first time."""
    drafter = drafter_of(engine)
    proposed: list[Proposed] = []
    propose = RetokenizedDrafter.propose

    def spy(self: RetokenizedDrafter, batch: Any) -> Any:
        proposal = propose(self, batch)
        for row, tokens in enumerate(proposal.tokens.tolist()):
            drafts = tokens[: int(proposal.num_tokens[row])]
            proposed.append((batch.committed(row), batch.draft_limits[row], drafts))
        return proposal

    monkeypatch.setattr(RetokenizedDrafter, "propose", spy)
    prompts = [make_prompt(length, 3, SIZE) for length in (2, 9, 40, 70)]
    text = "The dog's naïve café, 你好 🙂🚀 item is None: "
    for k in (3, 5):
        spec(engine, [*prompts, text], k, **{**GREEDY, "temperature": 1.0, "seed": k})
    assert len(proposed) > 100
    assert sum(bool(drafts) for *_, drafts in proposed) > len(proposed) // 4  # the others are no text
    for tokens, limit, drafts in proposed:
        drafter.hear(-1, tokens, len(tokens))
        turn = drafter._plan(-1, 0, limit)
        if turn is not None:
            drafter._draw([turn])
        again = [] if turn is None else drafter._translate(turn)
        drafter.release(-1)
        assert drafts == again, f"{drafts} were proposed after {tokens}, and are {again} anew"


@pytest.mark.parametrize(
    "build",
    [
        {},
        {"num_merges": 40},
        {"draft_positions": 24, "num_merges": 40},
        {"prefill_chunk_size": 3, "num_merges": 63, "max_batch_size": 3},
    ],
    ids=str,
)
def test_a_draft_depends_on_the_text_alone(
    build: dict[str, Any], by_text: Callable[..., Engine], monkeypatch: pytest.MonkeyPatch, tally: Tally
) -> None:
    """With merges and with bytes, with characters that tokens split, with a draft that forgets."""
    check_every_proposal(by_text(**build), monkeypatch)
    tally.check(accepted=build.get("num_merges", 0) > 0)


def test_a_stale_cache_is_noticed(by_text: Callable[..., Engine], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retokenized, "_common_length", lambda first, second: min(len(first), len(second)))
    with pytest.raises(AssertionError, match="anew"):
        check_every_proposal(by_text(num_merges=40), monkeypatch)


def test_a_cut_that_depends_on_the_rounds_is_noticed(
    by_text: Callable[..., Engine], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As would be one wherever a round happens to end."""
    monkeypatch.setattr(retokenized, "_segment_end", lambda text: len(text))
    with pytest.raises(AssertionError, match="anew"):
        check_every_proposal(by_text(num_merges=40), monkeypatch)


def test_only_what_changed_is_computed_again(
    by_text: Callable[..., Engine], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A round feeds the draft a few tokens, not the text."""
    engine = by_text(num_merges=63)
    drafter = drafter_of(engine)
    computed, read = [], 0
    plan = RetokenizedDrafter._plan

    def spy(self: RetokenizedDrafter, *asked: Any) -> Any:
        nonlocal read
        turn = plan(self, *asked)
        if turn is not None:
            computed.append(len(turn.fed) - len(turn.text.held))
            read += len(turn.fed)
        return turn

    monkeypatch.setattr(RetokenizedDrafter, "_plan", spy)
    spec(engine, "The quick brown fox jumps over", 3, ignore_eos=True, max_new_tokens=60)
    assert len(computed) > 20
    assert sum(computed) < read / 8
    assert not drafter._texts


@pytest.mark.parametrize("backend", ["reference", pytest.param("triton", marks=pytest.mark.triton)])
def test_backends_that_draw_one_by_one_draft_the_same(
    backend: str, drafted: DraftedFactory, build_engine: EngineFactory, tally: Tally
) -> None:
    models = drafted("retokenized", seed=1, vocab_size=12)
    sampling = {"ignore_eos": True, "max_new_tokens": 6}
    prompts = [[1, 2, 3, 4, 1, 2], [5, 6]]
    results = [
        spec(
            build_engine(*models, backend=name, device="auto" if name == "triton" else "cpu"),
            prompts,
            2,
            **sampling,
        )
        for name in ("native", backend)
    ]
    for result, expected in zip(*results, strict=True):
        assert result.token_ids == expected.token_ids
        assert result.metrics.speculative_decoding == expected.metrics.speculative_decoding
    tally.check()


# -- how texts are cut ----------------------------------------------------------------------------------------------


BYTES = _Cutter(Tokenizer(tiny_models.build_tokenizer(SIZE)), SIZE)


def sentence_piece(pieces: Sequence[str]) -> _Cutter:
    """Puts a space before a text, whatever it begins with."""
    raw = tokenizers.Tokenizer(
        models.Unigram([("<unk>", 0.0), *((piece, -1.0) for piece in pieces)], unk_id=0)
    )
    raw.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    raw.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    return _Cutter(Tokenizer(raw), len(pieces) + 1)


def texts(cutter: _Cutter, ids: Sequence[int]) -> list[str]:
    return [cutter.tokenizer.token(token) for token in ids]


def test_what_follows_is_cut_as_the_whole_is() -> None:
    the, quick = BYTES.encode("The"), BYTES.encode(" quick")
    assert BYTES.encode_after(the, " quick") == quick
    assert BYTES.encode_after([], "The quick") == the + quick
    assert BYTES.encode_after(the, "") == []


def test_what_would_merge_with_the_text_is_cut_alone() -> None:
    """The text is "dog", said as "do" and "g" or as "d" alone."""
    dog = BYTES.encode(" dog")
    assert len(dog) == 1, texts(BYTES, dog)
    assert BYTES.encode_after(BYTES.encode(" d"), "og") == BYTES.encode("og")
    apart = [*BYTES.encode(" d"), *BYTES.encode("og")]
    assert BYTES.encode_after(apart, " dog") == dog


def test_the_rest_of_a_character_follows_its_beginning() -> None:
    rocket = BYTES.encode("🚀")
    assert len(rocket) > 1
    for count in range(1, len(rocket)):
        assert BYTES.encode_after([*BYTES.encode("a "), *rocket[:count]], "🚀") == rocket[count:]
        assert BYTES.encode_after(rocket[:count], "x") == []
    # A text that starts inside a character says nothing of it.
    assert BYTES.encode_after([*rocket[1:], *BYTES.encode(" dog")], " dog") == BYTES.encode(" dog")


def test_a_space_is_not_put_where_the_text_has_one() -> None:
    cutter = sentence_piece(["▁the", "▁dog", "▁", "s", "▁s"])
    assert texts(cutter, cutter.encode("the dog")) == ["▁the", "▁dog"]
    assert texts(cutter, cutter.encode(" dog")) == ["▁dog"]
    assert texts(cutter, cutter.encode_after(cutter.encode("the"), " dogs")) == ["▁dog", "s"]


def test_segments_end_where_no_later_text_moves_them() -> None:
    text = "word " * 40 + "x" * 600 + " end"
    ends, at = [], 0
    while end := retokenized._segment_end(text[at:]):
        at += end
        ends.append(at)
    assert ends[0] == 64
    assert all(text[end] == " " for end in ends[:2])
    assert max(end - start for start, end in zip([0, *ends], ends, strict=False)) == 256
    for length in range(len(text)):
        assert retokenized._segment_end(text[:length]) in (0, 64)


def test_a_text_begins_as_the_drafts_do_and_ends_as_the_targets(
    tmp_path: Path, build_engine: EngineFactory
) -> None:
    """A draft whose texts begin with a token of their own, and that ends its text after three words."""
    names = ["<s>", "</s>", "ba", "bb", "bc"]
    raw = tokenizers.Tokenizer(models.WordLevel({name: index for index, name in enumerate(names)}))
    raw.pre_tokenizer = pre_tokenizers.Whitespace()
    raw.add_special_tokens([AddedToken(name, special=True) for name in names[:2]])
    raw.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    draft = tiny_models.save_checkpoint(tmp_path / "draft", follower({0: 2, 2: 3, 3: 4, 4: 1}), tokenizer=raw)
    config = '{"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "</s>"}'
    (draft / "tokenizer_config.json").write_text(config)
    target = tiny_models.save_checkpoint(
        tmp_path / "target", follower({1: 2, 2: 3, 3: 0}), tokenizer=vocabulary_pairs.byte_level_words(28)
    )
    engine = build_engine(target, draft)
    drafter = drafter_of(engine)
    drafter.hear(-1, [1], 1)
    turn = drafter._plan(-1, 0, 5)
    assert turn is not None
    assert turn.fed == [0, 2]
    drafter._draw([turn])
    assert turn.drawn[:3] == [3, 4, 1]
    assert drafter._translate(turn) == [2, 3, 0]
    drafter.release(-1)
    result = spec(engine, [1], 4, max_new_tokens=20)
    assert (result.token_ids, result.finish_reason) == ([2, 3, 0], "stop")
    assert result.metrics.speculative_decoding.num_accepted_draft_tokens == 2


# -- who gets it ----------------------------------------------------------------------------------------------------


def shared_words(num_shared: int) -> tuple[Vocabulary, Vocabulary]:
    """Two vocabularies of 40 tokens, of which as many are the same."""
    target, draft = (
        Tokenizer(tokenizers.Tokenizer(models.WordLevel({name: index for index, name in enumerate(names)})))
        for names in (
            [f"w{index}" for index in range(40)],
            [f"w{40 - num_shared + index}" for index in range(40)],
        )
    )
    return Vocabulary("T", 40, target), Vocabulary("D", 40, draft)


def test_too_little_is_less_than_a_share_of_the_targets_tokens() -> None:
    least = int(MIN_SHARED * 40)
    assert isinstance(translate(*shared_words(least)), Translation)
    assert translate(*shared_words(least - 1)) == ByText(least - 1, 40)
    assert translate(*shared_words(0)) == ByText(0, 40)


def test_ids_that_are_no_tokens_count_for_nothing() -> None:
    """A vocabulary with holes."""
    raw = tokenizers.Tokenizer(models.WordLevel({"ba": 0, "bb": 99}))
    target, draft = Tokenizer(raw), Tokenizer(tokenizers.Tokenizer(models.WordLevel({"ba": 0})))
    found = translate(Vocabulary("T", 100, target), Vocabulary("D", 1, draft))
    assert isinstance(found, Translation)
    assert found.num_shared == 1


def test_a_cache_that_does_not_fit_is_refused(drafted: DraftedFactory, build_engine: EngineFactory) -> None:
    models = drafted("retokenized", seed=1, vocab_size=12)
    with pytest.raises(InsufficientMemoryError, match=r"KV"):
        build_engine(*models, kv_cache_bytes=40_000, max_seq_len=8, max_batch_size=64, block_size=8)


def test_its_weights_and_its_memory_are_its_own(drafted: DraftedFactory, build_engine: EngineFactory) -> None:
    engine = build_engine(*drafted("retokenized", seed=1, vocab_size=12), draft_weight_dtype="int8")
    assert len(engine._kv_cache.tensors) == 1
    assert set(engine.weights) == {"target", "draft"}
    assert drafter_of(engine).runner.decoder.weights is engine.weights["draft"]
    assert engine.weights["draft"].layers[0].qkv.weight.dtype == torch.int8  # type: ignore[attr-defined]


def test_a_draft_that_can_write_nothing_of_the_targets_is_refused_with_both_names() -> None:
    target, _ = shared_words(0)
    words = Tokenizer(tokenizers.Tokenizer(models.WordLevel({"no token": 0, "of theirs": 1})))
    with pytest.raises(
        VocabularyMismatchError, match=r"'the-target' and draft 'the-draft' .*can write no text"
    ):
        retokenized.check_texts(
            Vocabulary("the-target", 40, target.tokenizer), Vocabulary("the-draft", 2, words)
        )
