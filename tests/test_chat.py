"""Conversations: templates write what transformers has them write, none can hurt, and answers are exact."""

from __future__ import annotations

import json
import resource
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import chat_templates
import pytest
import tiny_models
import transformers
from chat_templates import CHATML, LLAMA_2, LLAMA_3, MISTRAL, TEMPLATES, save_chat_model

import specengine
from specengine import ChatTemplateError, Engine, ModelLoadError, SamplingParams, conversations
from specengine.conversations import ChatTemplate, advised_sampling, check_conversations
from specengine.engine import stepper
from specengine.models.checkpoints import open_checkpoint
from specengine.template_worker import MAX_ADDRESS_SPACE
from specengine.tokenizer import Tokenizer

USER, SYSTEM = {"role": "user", "content": "Hi!"}, {"role": "system", "content": "Be brief."}
CONVERSATIONS = {
    "one turn": [USER],
    "system": [SYSTEM, {"role": "user", "content": " naïve café?\n\n你好 🙂 "}],
    "three turns": [
        SYSTEM,
        USER,
        {"role": "assistant", "content": "  Hello.\nHow can I help?  "},
        {"role": "user", "content": "def f(x):\n\treturn {'a': [x]}\n"},
        {"role": "assistant", "content": "<think>\nno\n</think>\n\nIt returns a dict."},
        {"role": "user", "content": "Thanks"},
    ],
    "special tokens in content": [
        {"role": "user", "content": "What does <|im_end|>\n<|im_start|>system</s>[INST] mean? <s>"}
    ],
    "more in a message": [{**USER, "name": "Ann", "tool_calls": None}],
}
TALK = CONVERSATIONS["three turns"]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_chat_model(tmp_path_factory.mktemp("chat") / "model")


@pytest.fixture(scope="module")
def engine(model: Path) -> Iterator[Engine]:
    with Engine(model, "suffix") as engine:
        yield engine


# Templates


@pytest.mark.parametrize("conversation", CONVERSATIONS)
@pytest.mark.parametrize("name", TEMPLATES)
def test_ids_are_those_of_transformers(
    engine: Engine, model: Path, name: str, conversation: str, oracle: dict[str, Any]
) -> None:
    messages = CONVERSATIONS[conversation]
    theirs = oracle["tokenizer"].apply_chat_template(
        messages, chat_template=TEMPLATES[name], add_generation_prompt=True, return_dict=False
    )
    assert engine.apply_chat_template(messages, chat_template=TEMPLATES[name]) == list(theirs)


@pytest.fixture(scope="module")
def oracle(model: Path) -> dict[str, Any]:
    return {"tokenizer": transformers.AutoTokenizer.from_pretrained(model)}


def test_the_first_token_is_not_doubled(engine: Engine) -> None:
    """This tokenizer puts a token before every text; a template says itself what a conversation begins with."""
    assert engine.tokenizer is not None
    first = engine.tokenizer.encode("x")[0]
    ids = engine.apply_chat_template([USER], chat_template=LLAMA_3)
    assert engine.tokenizer.token(ids[0]) == "<s>"
    assert first not in ids


def test_where_templates_come_from(model: Path, tmp_path: Path) -> None:
    """tokenizer_config.json, by name where it has several; chat_template.jinja before it; none of either."""
    directory = save_chat_model(tmp_path / "m")
    settings = json.loads((directory / "tokenizer_config.json").read_text())

    def template(value: object) -> str | None:
        (directory / "tokenizer_config.json").write_text(json.dumps({**settings, "chat_template": value}))
        return open_checkpoint(directory).chat_template

    assert template(CHATML) == CHATML
    named = [{"name": "tool_use", "template": "no"}, {"name": "default", "template": MISTRAL}]
    assert template(named) == MISTRAL
    assert template(None) is None
    for wrong in (
        [{"name": "tool_use", "template": "no"}],
        5,
        ["default"],
        [{"name": "default", "template": 1}],
    ):
        with pytest.raises(ModelLoadError, match=r"tokenizer_config\.json: chat_template: "):
            template(wrong)
    (directory / "chat_template.jinja").write_text(LLAMA_2)
    assert template(CHATML) == LLAMA_2
    (directory / "chat_template.jinja").write_bytes(b"\xff")
    with pytest.raises(ModelLoadError, match=r"chat_template\.jinja: not UTF-8"):
        template(CHATML)


def test_a_malformed_template_file_is_for_those_who_chat(tmp_path: Path) -> None:
    directory = save_chat_model(tmp_path / "m", template=5)  # type: ignore[arg-type]
    with Engine(directory) as engine:
        assert engine.generate("a", max_new_tokens=1, ignore_eos=True).token_ids
        with pytest.raises(ModelLoadError, match="5 is no template"):
            engine.chat([USER])


def test_a_template_of_ones_own(model: Path, tmp_path: Path, oracle: dict[str, Any]) -> None:
    """As text, as a file, and with a tokenizer that is given."""
    file = tmp_path / "mine.jinja"
    file.write_text("{{ messages[0].content }}!")
    for given in ("{{ messages[0].content }}!", file, str(file)):
        result = specengine.chat([USER], model=model, chat_template=given, max_new_tokens=2)
        assert result.prompt == "Hi!!"
    plain = save_chat_model(tmp_path / "m", template=None)
    with pytest.raises(ChatTemplateError, match="m has no chat template"):
        specengine.chat([USER], model=plain)
    for tokenizer in (model, oracle["tokenizer"]):
        result = specengine.chat([USER], model=plain, tokenizer=tokenizer, max_new_tokens=2)
        assert result.prompt == ChatTemplate(CHATML, "", {}).render([USER])


def test_a_template_that_refuses_says_why() -> None:
    twice = [USER, USER]
    with pytest.raises(
        ChatTemplateError, match="m: the chat template refuses: Conversation roles must alternate"
    ):
        ChatTemplate(LLAMA_2, "m", {"bos_token": "<s>", "eos_token": "</s>"}).render(twice)


BOMBS = {
    "a long loop": "{% for i in range(10**9) %}{% endfor %}",
    "nested loops": "{% for i in range(99999) %}{% for j in range(99999) %}{{ '' }}{% endfor %}{% endfor %}",
    "endless": "{% macro f(x) %}{% for i in x %}{{ f(x) }}{% endfor %}{% endmacro %}{{ f([1, 2]) }}",
    "a long string": "{{ 'a' * 10**10 }}",
    "doubled strings": "{% set ns = namespace(x='a' * 9999) %}{% for i in range(99) %}{% set ns.x = ns.x + ns.x %}"
    "{% endfor %}{{ ns.x }}",
    "padding": "{{ 'a'.ljust(10**10) }}",
    "a format": "{{ '%09999999999d' % 1 }}",
    "a power": "{{ (10 ** (10 ** 9)) % 7 }}",
    "many characters": "{% for i in range(99999) %}{{ 'a' * 1000 }}{% endfor %}",
    "a list": "{{ ([1] * 10**10)[0] }}",
    "a block": "{% set x %}{% for i in range(99999) %}{{ 'a' * 99999 }}{% endfor %}{% endset %}",
    "a filter": "{{ messages | batch(10**9, 'x') | list | length }}",
}
ESCAPES = {
    "a class": "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "by filter": "{{ (''|attr('__class__')).x }}",
    "by format": "{{ '{0.__class__.__mro__}'.format('') }}",
    "of a function": "{{ raise_exception.__globals__.x }}",
    "of a cycler": "{{ cycler.__init__.__globals__.os }}",
    "changing what is given": "{{ messages.append(1) }}",
    "a file": "{% include '/etc/passwd' %}",
}
MALFORMED = {
    "open": ("{% for m in messages %}", r"is no valid template \(line 1"),
    "unknown tag": ("{% tools %}", "is no valid template"),
    "deep": ("{{" + "(" * 5000 + "1" + ")" * 5000 + "}}", "deeply"),
    "undefined": ("{{ nobody.name }}", "'nobody' is undefined"),
    "a type": ("{{ 1 + 'a' }}", "failed: TypeError"),
    "too large": ("{{ 1 }}" + "a" * (1 << 20), "more than 1048576"),
}


@pytest.mark.parametrize("bomb", BOMBS)
def test_no_template_takes_over_time_or_memory(bomb: str) -> None:
    """Each ends with one error, and the next template is served. What it may take, the operating system counts."""
    with pytest.raises(ChatTemplateError, match=r"^m: the chat template ") as caught:
        ChatTemplate(BOMBS[bomb], "m").render([USER])
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 600
    assert ChatTemplate(CHATML, "m").render([USER])
    process = conversations._worker._process
    assert process is not None
    assert resource.prlimit(process.pid, resource.RLIMIT_AS) == (MAX_ADDRESS_SPACE, MAX_ADDRESS_SPACE)


def test_a_template_that_is_late_is_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    """By its own timer, which counts the processor's seconds; where a machine gives it none, by the caller."""
    monkeypatch.setattr(conversations, "_PATIENCE_SECONDS", 0.0)
    with pytest.raises(ChatTemplateError, match="takes too long"):
        ChatTemplate(BOMBS["nested loops"], "m").render([USER])


@pytest.mark.parametrize("escape", ESCAPES)
def test_no_template_leaves_the_sandbox(escape: str) -> None:
    """Each asks for something beyond, which is an error, if its first step was not (Jinja has nothing there)."""
    with pytest.raises(ChatTemplateError, match=r"^m: the chat template ") as caught:
        ChatTemplate(ESCAPES[escape], "m").render([USER])
    assert "takes too" not in str(caught.value)


@pytest.mark.parametrize("name", MALFORMED)
def test_what_is_no_template_is_one_clear_error(name: str) -> None:
    source, said = MALFORMED[name]
    with pytest.raises(ChatTemplateError, match=said):
        ChatTemplate(source, "m").render([USER])


def test_templates_render_from_several_threads_at_once() -> None:
    """Each gets its own text, though some end the process that renders."""
    texts: dict[int, str] = {}

    def render(number: int) -> None:
        if number % 5 == 4:
            with pytest.raises(ChatTemplateError, match="too much memory"):
                ChatTemplate(BOMBS["a long string"], "m").render([USER])
        texts[number] = ChatTemplate(CHATML, "m").render([{**USER, "content": str(number)}])

    threads = [threading.Thread(target=render, args=(number,)) for number in range(10)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(f"user\n{number}<|im_end|>" in text for number, text in texts.items())
    assert len(texts) == 10


# Messages

WRONG = {
    "text": ("Hi!", TypeError, "messages must be a list of messages"),
    "nothing": ([], ValueError, "messages must be a list of messages"),
    "a message": (USER, TypeError, "messages must be a list"),
    "a text in it": ([USER, "Hi!"], TypeError, r"messages\[1\] must be a mapping"),
    "no role": ([{"content": "x"}], ValueError, r"messages\[0\] has no 'role'"),
    "no content": ([[USER], [{"role": "user"}]], ValueError, r"messages\[1\]\[0\] has no 'content'"),
    "an empty role": (
        [{"role": "", "content": "x"}],
        ValueError,
        r"messages\[0\]\['role'\] must not be empty",
    ),
    "content in parts": ([{"role": "user", "content": [{"type": "text"}]}], TypeError, r"must be a string"),
    "half a character": ([{"role": "user", "content": "\ud800"}], ValueError, "surrogate"),
    "no JSON": ([{**USER, "x": {1, 2}}], ValueError, "JSON"),
    "no number": ([{**USER, "x": float("nan")}], ValueError, "JSON"),
    "a key": ([{**USER, 1: 2}], TypeError, r"messages\[0\] must have texts as keys, got 1"),
    "an empty one": ([[USER], []], ValueError, r"messages\[1\] must be a list"),
}


@pytest.mark.parametrize("name", WRONG)
def test_messages_are_checked_before_a_model_is_loaded(name: str) -> None:
    messages, kind, said = WRONG[name]
    with pytest.raises(kind, match=said):
        specengine.chat(messages, model="no/such/model")
    with pytest.raises(kind, match=said):
        specengine.stream_chat(messages, model="no/such/model")


def test_a_conversation_has_a_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(conversations, "MAX_CONVERSATION_LENGTH", 50)
    with pytest.raises(ValueError, match="messages must be below 50 characters as JSON, got 1"):
        check_conversations([{"role": "user", "content": "a" * 1000}])


def test_options_are_checked_before_a_model_is_loaded() -> None:
    for options, kind, said in (
        ({"temperature": -1}, ValueError, "temperature"),
        ({"temprature": 1}, TypeError, "did you mean 'temperature'"),
        ({"chat_template": "{% for"}, ChatTemplateError, "is no valid template"),
        ({"chat_template": "no/such.jinja"}, ValueError, "chat_template: no/such.jinja: No such file"),
        ({"chat_template": 5}, TypeError, "chat_template must be a string"),
        ({"generation_config": 1}, TypeError, "generation_config must be True or False"),
        ({"streamer": 1}, TypeError, "streamer"),
    ):
        with pytest.raises(kind, match=said):
            specengine.chat([USER], model="no/such/model", **options)  # type: ignore[arg-type]


def test_one_conversation_or_several() -> None:
    assert check_conversations([USER]) == ([[USER]], True)
    assert check_conversations(((USER,), TALK)) == ([[USER], TALK], False)


# Answers


def test_a_chat_is_its_prompt_continued(engine: Engine, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options = {"max_new_tokens": 12, "ignore_eos": True}
    both = engine.chat([TALK, [USER]], **options)
    assert isinstance(both, list)
    for messages, result in zip([TALK, [USER]], both, strict=True):
        ids = engine.apply_chat_template(messages)
        assert result.prompt_token_ids == ids
        assert result.prompt is not None
        assert result.prompt.endswith("<|im_start|>assistant\n")
        assert result.token_ids == engine.generate(ids, **options).token_ids
    assert engine.chat(TALK, SamplingParams(**options)).token_ids == both[0].token_ids
    assert specengine.chat(TALK, model=model, draft_model="suffix", **options).text == both[0].text
    streamed = specengine.stream_chat([TALK, [USER]], model=model, draft_model="suffix", **options)
    text = ["", ""]
    for event in streamed:
        text[event.index] += event.text_delta
    assert text == [both[0].text, both[1].text]
    monkeypatch.setattr(stepper, "UNREAD_SECONDS_A_ROUND", 60.0)
    plain = {**options, "num_speculative_tokens": 0}
    seldom = list(engine.stream_chat(TALK, stream_interval=8, **plain))
    assert "".join(event.text_delta for event in seldom) == both[0].text
    assert len(seldom) < len(list(engine.stream_chat(TALK, **plain)))


@pytest.mark.parametrize("sampling", [{}, {"temperature": 0.9, "seed": 7, "top_p": 0.9}])
def test_drafts_and_the_prefix_cache_change_no_answer(tmp_path: Path, sampling: dict[str, Any]) -> None:
    """Three turns with all, each computing only what is new, and the same without any of it.

    The tokenizer has bytes only, and answers are letters, so that they are read as they were written.
    """
    model = save_chat_model(tmp_path / "m", vocab_size=257)
    letters = Tokenizer(tiny_models.build_tokenizer(257)).encode_part("abcdefghijklmnop")
    sampling = {**sampling, "logit_bias": dict.fromkeys(letters, 100.0), "logprobs": 0, "max_new_tokens": 40}
    talks = []
    for draft, cached in (("suffix", True), (None, False)):
        with Engine(model, draft, enable_prefix_cache=cached) as engine:
            messages, said = list(TALK[:2]), []
            known: list[int] = []
            for _ in range(3):
                result = engine.chat(messages, **sampling)
                said.append((result.token_ids, result.outputs[0].logprobs))
                if cached and known:
                    assert result.prompt_token_ids[: len(known)] == known
                    # Blocks are shared as a whole, and the last token of what is known was never fed.
                    assert result.metrics.num_cached_tokens == (len(known) - 1) // 16 * 16 > 0
                known = result.prompt_token_ids + result.token_ids
                messages += [{"role": "assistant", "content": result.text}, USER]
            talks.append(said)
    assert talks[0] == talks[1]


def test_any_of_the_end_tokens_ends_an_answer(tmp_path: Path) -> None:
    """Those of config.json or generation_config.json, and the tokenizer's, which `generate` does not know."""
    size = len(chat_templates.MARKS)
    directory = save_chat_model(tmp_path / "m", generation={"eos_token_id": [3, 4]})
    with Engine(directory) as engine:
        tokenizer = engine.tokenizer
        assert isinstance(tokenizer, Tokenizer)
        assert size < tokenizer.vocab_size
        end = tokenizer.eos_token_id
        assert end not in (None, 3, 4)
        for token in (3, 4, end):
            result = engine.chat([USER], logit_bias={token: 1e4}, max_new_tokens=5)
            assert (result.token_ids, result.finish_reason, result.text) == ([token], "stop", "")
            assert result.outputs[0].stop_reason is None
        plain = engine.generate("Hi!", logit_bias={end: 1e4}, max_new_tokens=5)
        assert plain.token_ids == [end] * 5
        assert (
            engine.chat([USER], logit_bias={3: 1e4}, max_new_tokens=5, ignore_eos=True).token_ids == [3] * 5
        )


# generation_config.json


@pytest.mark.parametrize(
    ("generation", "given", "expected"),
    [
        ({"do_sample": True, "temperature": 0.2, "top_p": 0.9}, {}, {"temperature": 0.2, "top_p": 0.9}),
        ({"do_sample": True, "temperature": 0.2, "top_p": 0.9}, {"top_p": 0.5}, {"temperature": 0.2}),
        ({"do_sample": True, "top_k": 40, "min_p": 0.1}, {}, {"temperature": 1.0, "top_k": 40, "min_p": 0.1}),
        ({"do_sample": True, "top_k": 40, "temperature": 0.6}, {"temperature": 0.0}, {}),
        ({"temperature": 0.2, "top_p": 0.9, "repetition_penalty": 1.1}, {}, {"repetition_penalty": 1.1}),
        ({"do_sample": False, "max_new_tokens": 7, "top_k": None}, {}, {"max_new_tokens": 7}),
        ({"do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0}, {}, {"temperature": 1.0}),
        ({"eos_token_id": 2, "transformers_version": "5"}, {}, {}),
    ],
)
def test_what_is_taken_from_generation_config(
    generation: dict[str, Any], given: dict[str, Any], expected: dict[str, Any]
) -> None:
    assert advised_sampling(generation, given, where="m") == expected


def test_generation_config_is_told_and_can_be_turned_off(tmp_path: Path) -> None:
    advice = {"do_sample": True, "temperature": 0.7, "top_k": 5, "max_new_tokens": 6}
    directory = save_chat_model(tmp_path / "m", generation=advice)
    taken = {"temperature": 0.7, "top_k": 5, "max_new_tokens": 6}
    with Engine(directory) as engine:
        advised = engine.chat([USER], seed=3, ignore_eos=True)
        assert advised.generation_defaults == taken == advised.to_dict()["generation_defaults"]
        ids = engine.apply_chat_template([USER])
        same = engine.generate(ids, seed=3, ignore_eos=True, **taken)
        assert advised.token_ids == same.token_ids
        assert same.generation_defaults == {}
        plain = engine.chat([USER], generation_config=False, ignore_eos=True)
        greedy = engine.generate(ids, ignore_eos=True)
        assert plain.token_ids == greedy.token_ids
        assert (plain.generation_defaults, len(plain.token_ids)) == ({}, 128)
        params = SamplingParams(max_new_tokens=4, ignore_eos=True)
        assert engine.chat([USER], params).token_ids == greedy.token_ids[:4]
    broken = save_chat_model(tmp_path / "n", generation={"do_sample": True, "temperature": "hot"})
    with Engine(broken) as engine:
        with pytest.raises(ModelLoadError, match=r"generation_config\.json: temperature must be a number"):
            engine.chat([USER])
        assert engine.chat([USER], generation_config=False, max_new_tokens=1).outputs


def test_a_model_without_template_is_not_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("it was loaded")

    monkeypatch.setattr("specengine.engine.assembly.load", refuse)
    with pytest.raises(ChatTemplateError, match="target has no chat template"):
        specengine.chat([USER])
