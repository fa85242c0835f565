"""What clients get is what the library says: OpenAI's own client, against the same model without a server."""

from __future__ import annotations

import json
import threading
from typing import Any

import openai
import pytest
from running_server import Running, events_of

from specengine.engine import Engine

PROMPT = "def add(a, b):"
CONVERSATION: Any = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi!"}]


def test_a_completion_is_the_librarys(server: Running, library: Engine) -> None:
    answer = server.client().completions.create(
        model="tiny", prompt=PROMPT, max_tokens=20, temperature=0, extra_body={"return_token_ids": True}
    )
    result = library.generate(PROMPT, max_new_tokens=20)
    choice = answer.choices[0]
    assert choice.text == result.text
    assert choice.finish_reason == result.finish_reason == "length"
    assert choice.model_extra is not None
    assert choice.model_extra["token_ids"] == result.token_ids
    assert choice.model_extra["prompt_token_ids"] == result.prompt_token_ids
    assert answer.usage is not None
    assert answer.usage.prompt_tokens == len(result.prompt_token_ids)
    assert answer.usage.completion_tokens == 20
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + 20


def test_defaults_are_those_of_openais_clients(server: Running, library: Engine) -> None:
    """16 tokens at temperature 1."""
    answer = server.complete(prompt=PROMPT, seed=4)
    assert (
        answer["choices"][0]["text"]
        == library.generate(PROMPT, max_new_tokens=16, temperature=1.0, seed=4).text
    )
    assert answer["usage"]["completion_tokens"] == 16
    assert answer["metrics"]["seed"] == 4


@pytest.mark.parametrize(
    "sampling",
    [
        {"temperature": 0.8, "top_p": 0.9, "seed": 7},
        {"temperature": 1.3, "top_k": 9, "min_p": 0.02, "seed": 2**64 - 1},
        {"temperature": 0, "presence_penalty": 1.5, "frequency_penalty": 0.5},
        {"temperature": 0, "repetition_penalty": 1.4, "logit_bias": {"70": 4.5, "71": -100}},
        {"temperature": 0.9, "seed": 3, "bad_words": ["a", [72, 73]], "ignore_eos": True},
    ],
    ids=str,
)
@pytest.mark.parametrize("k", [0, 1, 5, "auto"])
def test_options_mean_what_they_mean_in_the_library(
    server: Running, library: Engine, sampling: dict[str, Any], k: int | str
) -> None:
    """Whatever drafts: the text depends on the seed only."""
    answer = server.complete(prompt=PROMPT, max_tokens=24, num_speculative_tokens=k, **sampling)
    bias = {int(token): value for token, value in sampling.get("logit_bias", {}).items()}
    result = library.generate(PROMPT, max_new_tokens=24, **{**sampling, "logit_bias": bias or None})
    assert answer["choices"][0]["text"] == result.text


@pytest.mark.parametrize("stream", [False, True])
def test_samples_have_keys_of_their_own(server: Running, library: Engine, stream: bool) -> None:
    body = {"prompt": [PROMPT, "x ="], "n": 3, "seed": 5, "max_tokens": 12}
    result: Any = library.generate(body["prompt"], n=3, seed=5, temperature=1.0, max_new_tokens=12)
    expected = [output.text for each in result for output in each.outputs]
    if stream:
        texts = [""] * 6
        for chunk in server.client().completions.create(model="tiny", stream=True, **body):  # type: ignore[call-overload]
            for choice in chunk.choices:
                texts[choice.index] += choice.text
    else:
        choices = server.complete(**body)["choices"]
        assert [choice["index"] for choice in choices] == list(range(6))
        texts = [choice["text"] for choice in choices]
    assert texts == expected
    assert len(set(texts)) == 6


def test_ids_are_a_prompt_too(server: Running, library: Engine) -> None:
    ids = library.generate(PROMPT, max_new_tokens=1).prompt_token_ids
    bodies: list[Any] = [PROMPT, ids, [ids], [PROMPT]]
    texts = [server.complete(prompt=prompt, temperature=0)["choices"][0]["text"] for prompt in bodies]
    assert len(set(texts)) == 1


@pytest.mark.parametrize("stream", [False, True])
def test_a_stop_string_ends_the_text(server: Running, library: Engine, stream: bool) -> None:
    whole = library.generate(PROMPT, max_new_tokens=30).text
    stop = whole[5:7]
    expected = library.generate(PROMPT, max_new_tokens=30, stop=stop)
    body = {"prompt": PROMPT, "max_tokens": 30, "temperature": 0, "stop": [stop, "never there"]}
    if stream:
        chunks = list(server.client().completions.create(model="tiny", stream=True, **body))  # type: ignore[call-overload]
        text, last = "".join(chunk.choices[0].text for chunk in chunks), chunks[-1].choices[0]
        assert last.finish_reason == "stop"
        assert last.model_extra["stop_reason"] == stop
    else:
        choice = server.complete(**body)["choices"][0]
        text = choice["text"]
        assert (choice["finish_reason"], choice["stop_reason"]) == ("stop", stop)
    assert text == expected.text == whole[: whole.index(stop)]


def test_logprobs_are_the_librarys(server: Running, library: Engine) -> None:
    answer = server.client().completions.create(
        model="tiny", prompt=PROMPT, max_tokens=10, temperature=0, logprobs=3
    )
    expected = library.generate(PROMPT, max_new_tokens=10, logprobs=3).outputs[0].logprobs
    found = answer.choices[0].logprobs
    assert found is not None
    assert expected is not None
    assert found.token_logprobs == [entry.logprob for entry in expected]
    assert found.top_logprobs is not None
    assert [sorted(each.values()) for each in found.top_logprobs] == [
        sorted({**entry.top, entry.token_id: entry.logprob}.values()) for entry in expected
    ]


def test_a_stream_has_the_logprobs_of_its_tokens(server: Running) -> None:
    body = {"prompt": PROMPT, "max_tokens": 12, "temperature": 0, "logprobs": 2, "echo": True}
    whole = server.complete(**body)["choices"][0]["logprobs"]
    pieces: dict[str, list[Any]] = {name: [] for name in whole}
    for chunk in server.client().completions.create(model="tiny", stream=True, **body):  # type: ignore[call-overload]
        for name, values in pieces.items():
            values += getattr(chunk.choices[0].logprobs, name)
    assert pieces == whole


def test_what_an_evaluation_harness_asks_for(server: Running, library: Engine) -> None:
    """Its `local-completions`: lists of ids, echoed with their log-probabilities, one new token."""
    prompts = [library.generate(text, max_new_tokens=1).prompt_token_ids for text in ("one two", "three")]
    answer = server.complete(prompt=prompts, echo=True, logprobs=1, max_tokens=1, seed=1234, temperature=0)
    for choice, ids in zip(answer["choices"], prompts, strict=True):
        expected = library.generate(ids, max_new_tokens=1, prompt_logprobs=1, logprobs=1)
        entries = [*(expected.prompt_logprobs or []), *(expected.outputs[0].logprobs or [])]
        logprobs = choice["logprobs"]
        assert logprobs["token_logprobs"] == [entry and entry.logprob for entry in entries]
        assert logprobs["top_logprobs"][0] is None
        assert len(logprobs["top_logprobs"]) == len(logprobs["tokens"]) == len(ids) + 1
        for entry, top in zip(entries[1:], logprobs["top_logprobs"][1:], strict=True):
            assert entry is not None
            is_greedy = entry.logprob == max(top.values())
            assert is_greedy == (entry.token_id in entry.top)
        assert choice["text"] == (library.tokenizer.decode(ids) if library.tokenizer else "") + expected.text


def test_a_prompt_alone_can_be_scored(server: Running) -> None:
    choice = server.complete(prompt=PROMPT, echo=True, max_tokens=0, logprobs=0)["choices"][0]
    assert choice["text"] == PROMPT
    assert choice["logprobs"]["token_logprobs"][0] is None
    assert all(value < 0 for value in choice["logprobs"]["token_logprobs"][1:])


def test_a_chat_is_the_librarys(server: Running, library: Engine) -> None:
    answer = server.client().chat.completions.create(
        model="tiny", messages=CONVERSATION, max_completion_tokens=15, temperature=0
    )
    result: Any = library.chat(CONVERSATION, max_new_tokens=15)
    assert answer.choices[0].message.content == result.text
    assert answer.choices[0].message.role == "assistant"
    assert answer.usage is not None
    assert answer.usage.prompt_tokens == len(result.prompt_token_ids)


def test_a_chat_streams(server: Running, library: Engine) -> None:
    stream = server.client().chat.completions.create(
        model="tiny",
        messages=CONVERSATION,
        max_tokens=15,
        seed=3,
        n=2,
        logprobs=True,
        top_logprobs=2,
        stream=True,
        stream_options={"include_usage": True},
    )
    result: Any = library.chat(CONVERSATION, max_new_tokens=15, seed=3, n=2, temperature=1.0, logprobs=2)
    texts, logprobs, reasons, roles, usage = ["", ""], [[], []], {}, {}, None  # type: ignore[var-annotated]
    for chunk in stream:
        usage = chunk.usage or usage
        for choice in chunk.choices:
            texts[choice.index] += choice.delta.content or ""
            roles.setdefault(choice.index, choice.delta.role)
            assert choice.logprobs is not None
            logprobs[choice.index] += [each.logprob for each in choice.logprobs.content or []]
            reasons[choice.index] = choice.finish_reason
    assert texts == [output.text for output in result.outputs]
    assert logprobs == [[entry.logprob for entry in output.logprobs] for output in result.outputs]
    assert roles == {0: "assistant", 1: "assistant"}
    assert reasons == {0: "length", 1: "length"}
    assert usage is not None
    assert usage.completion_tokens == 30


def test_a_stream_says_who_wrote_what(server: Running) -> None:
    """The pieces are the text, and the sources those of the plain answer."""
    body = {
        "prompt": "abab" * 8, "max_tokens": 40, "temperature": 0, "num_speculative_tokens": 3,
        "return_token_source": True, "return_rounds": True, "return_token_ids": True,
    }  # fmt: skip
    status, _, content = server.ask("POST", "/v1/completions", {**body, "stream": True})
    *chunks, done = events_of(content)
    assert (status, done) == (200, "[DONE]")
    choices = [chunk["choices"][0] for chunk in chunks]
    for choice in choices:
        assert "".join(piece["text"] for piece in choice["token_source"]) == choice["text"]
    pieces = [piece for choice in choices for piece in choice["token_source"]]
    rounds = [each for choice in choices for each in choice["rounds"]]
    whole = server.complete(**body)["choices"][0]
    assert "".join(choice["text"] for choice in choices) == whole["text"]
    assert sum(len(choice["token_ids"]) for choice in choices) == 40
    assert {piece["source"] for piece in pieces} == {"draft", "target"}
    assert sum(each["num_tokens"] for each in rounds) == 39
    assert any(each["num_accepted_tokens"] < each["num_draft_tokens"] for each in rounds)
    assert all(len(each["draft_texts"]) == each["num_draft_tokens"] for each in rounds)


def test_statistics_have_the_names_that_benchmark_clients_read(server: Running) -> None:
    body = {"prompt": "abab" * 8, "max_tokens": 30, "temperature": 0, "num_speculative_tokens": 4}
    found = server.complete(**body)["metrics"]["speculative_decoding"]
    assert set(found) == {
        *("mean_acceptance_length", "draft_acceptance_rate", "acceptance_histogram", "num_spec_steps"),
        *("num_accepted_draft_tokens", "num_draft_tokens", "num_spec_tokens"),
    }
    assert found["num_spec_tokens"] == 4
    assert found["num_draft_tokens"] > found["num_accepted_draft_tokens"] > 0
    content = server.ask(
        "POST", "/v1/completions", {**body, "stream": True, "stream_options": {"include_usage": True}}
    )[2]
    *_, last, done = events_of(content)
    assert done == "[DONE]"
    assert last["choices"] == []
    assert last["usage"]["completion_tokens"] == 30
    assert last["metrics"]["speculative_decoding"].keys() == found.keys()
    assert server.complete(**{**body, "n": 2})["metrics"]["speculative_decoding"] is None


def test_usage_so_far_can_be_in_every_event(server: Running) -> None:
    body = {
        "prompt": PROMPT,
        "max_tokens": 9,
        "ignore_eos": True,
        "stream": True,
        "stream_options": {"continuous_usage_stats": True},
    }
    *chunks, _ = events_of(server.ask("POST", "/v1/completions", body)[2])
    counts = [chunk["usage"]["completion_tokens"] for chunk in chunks]
    assert counts == sorted(counts)
    assert counts[-1] == 9


def test_a_request_may_name_its_drafter(start: Any, library: Engine) -> None:
    """One of those that the server was started with, and no other: a name is no path."""
    server = start(["suffix", "ngram"])
    (model,) = server.client().models.list()
    assert model.model_dump()["draft_models"] == ["suffix", "ngram"]
    body = {"prompt": "abab" * 8, "max_tokens": 20, "temperature": 0, "num_speculative_tokens": 3}
    expected = library.generate("abab" * 8, max_new_tokens=20).text
    for name in ("suffix", "ngram"):
        answer = server.complete(**body, draft_model=name)
        assert answer["choices"][0]["text"] == expected
        assert answer["metrics"]["speculative_decoding"]["num_accepted_draft_tokens"] > 0
    chat = {"messages": CONVERSATION}
    for path, asked in (("/v1/completions", body), ("/v1/chat/completions", chat)):
        status, answer = server.post(path, {**asked, "draft_model": "/etc/passwd"})
        assert (status, answer["error"]["param"]) == (400, "draft_model")
        expected_message = "draft_model='/etc/passwd' is none of this server's: 'suffix', 'ngram'"
        assert answer["error"]["message"] == expected_message


def test_lossy_acceptance_says_so(server: Running) -> None:
    with pytest.warns(UserWarning, match="lossy"):
        answer = server.complete(acceptance="threshold", temperature=1.0)
    assert answer["metrics"]["lossless"] is False
    assert server.complete(acceptance="block", temperature=1.0)["metrics"]["lossless"] is True


def test_events_at_a_fixed_interval_are_the_same_text(start: Any, library: Engine) -> None:
    """And there are fewer of them than rounds: their sizes tell of time, not of drafts."""
    server = start(server_options={"stream_period": 0.2})
    body = {
        "prompt": "abab" * 8,
        "max_tokens": 60,
        "temperature": 0,
        "num_speculative_tokens": 0,
        "stream": True,
    }
    *chunks, _ = events_of(server.ask("POST", "/v1/completions", body)[2])
    assert (
        "".join(chunk["choices"][0]["text"] for chunk in chunks)
        == library.generate("abab" * 8, max_new_tokens=60).text
    )
    assert len(chunks) < 30


def test_tokens_and_back(server: Running, library: Engine) -> None:
    status, answer = server.post("/tokenize", {"prompt": PROMPT})
    ids = library.generate(PROMPT, max_new_tokens=1).prompt_token_ids
    assert (status, answer) == (200, {"count": len(ids), "max_model_len": library.max_seq_len, "tokens": ids})
    assert server.post("/tokenize", {"prompt": PROMPT, "add_special_tokens": False})[1]["tokens"] == ids[1:]
    assert server.post("/tokenize", {"messages": CONVERSATION})[1]["tokens"] == library.apply_chat_template(
        CONVERSATION
    )
    assert server.post("/detokenize", {"tokens": ids}) == (200, {"prompt": PROMPT})
    assert server.post("/detokenize", {"tokens": [library.vocab_size]})[0] == 400


def test_the_model_has_a_name(server: Running) -> None:
    assert [model.id for model in server.client().models.list()] == ["tiny"]
    status, version = server.ask("GET", "/version")[::2]
    assert status == 200
    assert json.loads(version)["version"]


def test_errors_are_the_clients_classes(server: Running) -> None:
    client = server.client()
    with pytest.raises(openai.BadRequestError, match="top_p must be above 0, up to 1, got 2") as bad:
        client.completions.create(model="tiny", prompt="x", top_p=2)
    assert bad.value.param == "top_p"
    assert bad.value.type == "invalid_request_error"
    with pytest.raises(openai.NotFoundError, match="no model is called 'gpt-9' here"):
        client.chat.completions.create(model="gpt-9", messages=CONVERSATION)
    with pytest.raises(openai.NotFoundError):
        client.embeddings.create(model="tiny", input="x")
    with pytest.raises(openai.BadRequestError, match="unknown field 'tools'"):
        client.chat.completions.create(
            model="tiny", messages=CONVERSATION, tools=[{"type": "function", "function": {"name": "f"}}]
        )


def test_many_clients_at_once_get_their_own(server: Running, library: Engine) -> None:
    prompts = [
        f"{word} = " for word in ("alpha", "beta", "gamma", "delta", "epsilon", "zeta", "eta", "theta")
    ] * 3
    texts: list[str] = [""] * len(prompts)

    def ask(place: int) -> None:
        answer = server.complete(prompt=prompts[place], max_tokens=20, seed=place)
        texts[place] = answer["choices"][0]["text"]

    threads = [threading.Thread(target=ask, args=(place,)) for place in range(len(prompts))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for place, prompt in enumerate(prompts):
        assert texts[place] == library.generate(prompt, max_new_tokens=20, temperature=1.0, seed=place).text
