"""Stop strings in streamed text, those that hold special tokens included."""

from __future__ import annotations

import pytest
import tokenizers
from law_helpers import CheckpointFactory, EngineFactory

from specengine.runtime.text import TextStream
from specengine.tokenizer import Tokenizer

END = "<|im_end|>"


@pytest.fixture
def tokenizer(checkpoint: CheckpointFactory) -> Tokenizer:
    file = checkpoint("gpt2", with_tokenizer=True) / "tokenizer.json"
    made = tokenizers.Tokenizer.from_file(str(file))
    made.add_special_tokens([END, "<|im_end|>s"])
    return Tokenizer(made)


def streamed(tokenizer: Tokenizer, text: str, stop: str, **options: bool) -> tuple[str, str, str | None]:
    """What was shown bit by bit, the text at the end, and the stop string that ended it."""
    stream = TextStream(tokenizer, [1], stop=(stop,), **{"include_stop": False, **options})
    shown, matched = "", None
    for token_id in tokenizer.encode(text):
        matched = stream.push(token_id, may_stop=True)
        assert stream.text.startswith(shown)
        shown = stream.text[: max(len(shown), stream.num_final)]
        if matched is not None:
            break
    stream.close(may_stop=True)
    return shown, stream.text, matched


@pytest.mark.parametrize(
    ("text", "stop", "expected"),
    [
        (f"ab{END}cd", END, "ab"),
        (f"ab{END}cd", f"b{END}c", "a"),
        (f"ab{END}\n{END}cd", f"{END}c", "ab\n"),
        (f"ab{END}s cd", f"{END}s", "ab"),
        (f"ab{END}cd", "cd", "ab"),
        ("ab cd", f"b{END}", None),
    ],
)
def test_a_stop_string_may_hold_special_tokens(
    tokenizer: Tokenizer, text: str, stop: str, expected: str | None
) -> None:
    shown, final, matched = streamed(tokenizer, text, stop)
    assert matched == (stop if expected is not None else None)
    assert final == (text if expected is None else expected)
    assert final.startswith(shown)


def test_a_kept_stop_string_is_kept_as_it_was_given(tokenizer: Tokenizer) -> None:
    assert streamed(tokenizer, f"ab{END}cd", f"b{END}", include_stop=True)[1] == f"ab{END}"


def test_a_special_token_that_is_spelled_out_in_bytes_stops_too(tokenizer: Tokenizer) -> None:
    stream = TextStream(tokenizer, [1], stop=(END,), include_stop=False)
    pieces = [tokenizer.encode(character)[0] for character in "ab" + END]
    assert [stream.push(token_id, may_stop=True) for token_id in pieces][-1] == END
    assert stream.text == "ab"


def test_a_request_stops_at_a_special_token(
    checkpoint: CheckpointFactory, build_engine: EngineFactory, tokenizer: Tokenizer
) -> None:
    ((special, name), *_) = tokenizer.special_tokens.items()
    engine = build_engine(checkpoint("gpt2", with_tokenizer=True))
    result = engine.generate(
        "abc", max_new_tokens=5, ignore_eos=True, stop=name, logit_bias={special: 1000.0}
    )
    output = result.outputs[0]
    assert (output.token_ids, output.text, output.stop_reason) == ([special], "", name)
