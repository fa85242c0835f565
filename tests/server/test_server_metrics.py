"""What Prometheus is told adds up: to what each request was told of itself."""

from __future__ import annotations

import re
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families
from running_server import Running, wait_until

NAMES = {
    "counter": (
        *("spec_decode_num_drafts", "spec_decode_num_draft_tokens", "spec_decode_num_accepted_tokens"),
        *("spec_decode_num_accepted_tokens_per_pos", "num_preemptions", "prompt_tokens", "generation_tokens"),
        *("request_success", "admission_rejections", "corrupted_requests", "rollback_blocks"),
    ),
    "gauge": ("num_requests_running", "num_requests_waiting", "kv_cache_usage_perc"),
    "histogram": (
        *("time_to_first_token_seconds", "time_per_output_token_seconds", "e2e_request_latency_seconds"),
        *("request_queue_time_seconds", "request_prefill_time_seconds", "request_decode_time_seconds"),
        *("request_prompt_tokens", "request_generation_tokens", "draft_time_seconds", "verify_time_seconds"),
    ),
}


def families(server: Running) -> dict[str, Any]:
    text = server.ask("GET", "/metrics")[2].decode()
    return {
        each.name.removeprefix("specengine:"): each
        for each in text_string_to_metric_families(text)
        if each.samples
    }


def test_every_name_is_there_with_its_formula(server: Running) -> None:
    server.complete(prompt="abab" * 8, max_tokens=20, num_speculative_tokens=3)
    found = families(server)
    assert set(found) == {name for names in NAMES.values() for name in names}
    for kind, names in NAMES.items():
        for name in names:
            assert found[name].type == kind
            assert found[name].documentation
            assert all(sample.labels["model_name"] == "tiny" for sample in found[name].samples)
    text = server.ask("GET", "/metrics")[2].decode()
    suffixed = set(re.findall(r"^(specengine:\w+?)(?:_bucket|_sum|_count)?\{", text, re.MULTILINE))
    assert {f"specengine:{name}_total" for name in NAMES["counter"]} <= suffixed


def test_names_may_be_vllms(start: Callable[..., Running]) -> None:
    """Its benchmark client reads lines that begin with `vllm:spec_decode`."""
    server = start(server_options={"metrics_prefix": "vllm"})
    server.complete(prompt="abab" * 8, max_tokens=20, num_speculative_tokens=3, temperature=0)
    text = server.ask("GET", "/metrics")[2].decode()
    names = set(re.findall(r"^(\w+:\w+?)(?:_bucket|_sum|_count)?\{", text, re.MULTILINE))
    totals = {f"vllm:{name}_total" for name in NAMES["counter"]}
    assert names == totals | {f"vllm:{name}" for name in (*NAMES["gauge"], *NAMES["histogram"])}
    (drafted,) = re.findall(r"^vllm:spec_decode_num_draft_tokens_total\{.*\} (\S+)$", text, re.MULTILINE)
    assert float(drafted) > 0


def test_sums_of_what_requests_say_are_the_counters(start: Callable[..., Running]) -> None:
    """Exactly, whatever k, and with requests that were aborted in the middle."""
    server = start(step_seconds=0.002)

    def ask(place: int) -> dict[str, Any]:
        body: dict[str, Any] = {
            "prompt": "abcab" * (place % 5 + 1),
            "max_tokens": 40,
            "ignore_eos": place % 2 == 0,
            "seed": place,
            "num_speculative_tokens": (0, 1, 4, "auto")[place % 4],
        }
        if place % 16 == 7:  # more than can be done in a second
            body |= {"timeout": 1.0, "max_tokens": 1900, "ignore_eos": True, "num_speculative_tokens": 0}
        return server.complete(**body)

    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(ask, range(48)))
    drafts = [answer["metrics"]["speculative_decoding"] for answer in answers]
    usage = [answer["usage"] for answer in answers]
    reasons = [answer["choices"][0]["finish_reason"] for answer in answers]
    assert set(reasons) == {"length", "stop", "abort"}
    found = families(server)

    def total(name: str) -> float:
        return sum(sample.value for sample in found[name].samples)

    assert total("spec_decode_num_drafts") == sum(each["num_spec_steps"] for each in drafts) > 0
    assert total("spec_decode_num_draft_tokens") == sum(each["num_draft_tokens"] for each in drafts)
    accepted = sum(each["num_accepted_draft_tokens"] for each in drafts)
    assert total("spec_decode_num_accepted_tokens") == accepted > 0
    assert total("spec_decode_num_accepted_tokens_per_pos") == accepted
    num_drafted = sum(each["num_draft_tokens"] for each in drafts)
    assert total("rollback_blocks") == pytest.approx((num_drafted - accepted) / 4)
    assert total("prompt_tokens") == sum(each["prompt_tokens"] for each in usage)
    assert total("generation_tokens") == sum(each["completion_tokens"] for each in usage)
    by_reason = {
        sample.labels["finished_reason"]: sample.value for sample in found["request_success"].samples
    }
    assert by_reason == {reason: reasons.count(reason) for reason in set(reasons)}
    by_position = [
        sum(
            count
            for each in drafts
            for length, count in enumerate(each["acceptance_histogram"])
            if length > position
        )
        for position in range(max(len(each["acceptance_histogram"]) for each in drafts) - 1)
    ]
    told = {
        int(sample.labels["position"]): sample.value
        for sample in found["spec_decode_num_accepted_tokens_per_pos"].samples
    }
    assert [told.get(position, 0) for position in range(len(by_position))] == by_position
    for name in ("request_prompt_tokens", "request_generation_tokens"):
        sums = {s.name.rpartition("_")[2]: s.value for s in found[name].samples if "le" not in s.labels}
        assert sums == {"count": 48, "sum": total(name.removeprefix("request_"))}
    for name in NAMES["histogram"]:
        assert next(s.value for s in found[name].samples if s.name.endswith("_count")) > 0, name


def test_gauges_tell_of_now(start: Callable[..., Running]) -> None:
    server = start(step_seconds=0.01, max_batch_size=1)

    def gauges() -> list[float]:
        found = families(server)
        return [found[name].samples[0].value for name in NAMES["gauge"]]

    assert gauges() == [0, 0, 0]
    body = {"prompt": "x", "max_tokens": 100, "ignore_eos": True}
    with ThreadPoolExecutor() as pool:
        asked = [pool.submit(server.complete, **body) for _ in range(3)]
        wait_until(lambda: server.engine.num_running == 1 and server.engine.num_waiting == 2)
        running, waiting, usage = gauges()
        assert (running, waiting) == (1, 2)
        assert 0 < usage < 1
        for each in asked:
            each.result()
    assert gauges() == [0, 0, 0]
