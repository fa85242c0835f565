"""What `specengine tune` recommends beside the best that an exhaustive search finds, on three workloads.

    python benchmarks/tune.py                                     # the bundled pair; minutes
    python benchmarks/tune.py --pair distilgpt2:gpt2 --max-new-tokens 48 --ks 0 2 4 8 16

copy:   prompts that ask for an edit of given code
code:   the bundled prompts
random: the same with an untrained draft of the draft's shape

First tune searches, then every drafter with every k takes turns, and at last the best of these, what tune recommends
and plain decoding once more, so that luck among many is no advantage. Speeds are medians of ratios to plain decoding.
Wanted: at least 0.95 of the best. What is finished lies in --results, and another run with the same arguments goes on
from there.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections import defaultdict
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from auto_k import build_random
from bench_strategies import write_texts
from cpu_timing import about_processor, machine_name
from measure import ROOT
from pairs import build_pair

from specengine import bundled
from specengine.call import Call, prepare_call
from specengine.measure.bench_prompts import read_prompts
from specengine.measure.runs import Run, measure
from specengine.measure.statistics import ratio_interval
from specengine.measure.summary import seconds_a_token
from specengine.measure.tune import Candidate, Setup, Tuner, build_tuner, open_engine

WORKLOADS = ("copy", "code", "random")
WANTED = 0.95
NUM_LAST = 4

Times = dict[Candidate, list[float]]


def read_workload(name: str, options: argparse.Namespace) -> Call:
    """The pair and its prompts."""
    if options.pair == "bundled":
        target, draft = bundled.target_path(), bundled.draft_path()
    else:
        shapes = options.pair.split(":")
        target, draft = build_pair(shapes[1], shapes[0], options.out, getattr(torch, options.dtype))
    if name == "random":
        options.out.mkdir(parents=True, exist_ok=True)
        draft = build_random(draft, options.out / f"random-{options.pair.replace(':', '-')}")
    copies = [text.prompt for text in write_texts("copy")]
    prompts = copies if name == "copy" else read_prompts(None, options.num_prompts)
    given = {"max_new_tokens": options.max_new_tokens, "dtype": options.dtype, "enable_prefix_cache": False}
    return prepare_call(
        prompts, {**given, "model": target, "draft_model": draft, "num_speculative_tokens": "auto"}
    )


def all_candidates(tuner: Tuner, choice: Candidate, ks: Sequence[int]) -> list[Candidate]:
    """Plain decoding, every drafter with every k and "auto", pairs of a model and a lookup, and the choice."""
    models = [setup for setup in tuner.setups if not setup.is_lookup]
    lookups = [setup for setup in tuner.setups if setup.is_lookup]
    pairs = [
        replace(model, draft_model=(str(model.draft_model), str(lookup.draft_model)))
        for model in models[-1:]
        for lookup in lookups
    ]
    found = [Candidate(tuner.setups[0], 0)]
    found += [Candidate(setup, k) for setup in tuner.setups for k in (*ks, "auto") if k != 0]
    found += [Candidate(setup, k) for setup in pairs for k in (4, 8, "auto")]
    return list(dict.fromkeys([*found, choice]))


def race(call: Call, candidates: Sequence[Candidate], *, repeats: int) -> Times:
    """Seconds a token of each, prompt by prompt and repeat by repeat, all in turn."""
    times: defaultdict[Candidate, list[float]] = defaultdict(list)
    with ExitStack() as opened:
        stands = {
            setup: opened.enter_context(open_engine(call, setup, 1))
            for setup in dict.fromkeys(each.setup for each in candidates)
        }
        cases = [stands[each.setup].case(each, is_watched=False) for each in candidates]
        of_case = {id(case): each for case, each in zip(cases, candidates, strict=True)}
        order: list[Candidate] = []
        noted = [Noted(case, of_case[id(case)], order) for case in cases]
        for record in measure(Run.start("tune"), noted, call.prompts, repeats=repeats):
            times[order[-1]].append((record.repeat, record.prompt_index, seconds_a_token(record)))  # type: ignore[arg-type]
    return {each: [seconds for *_, seconds in sorted(rows)] for each, rows in times.items()}  # type: ignore[misc]


class Noted:
    """A case that notes whose turn it is."""

    def __init__(self, case: Any, candidate: Candidate, order: list[Candidate]) -> None:
        self._case, self._candidate, self._order = case, candidate, order

    def __getattr__(self, name: str) -> Any:
        return getattr(self._case, name)

    def measure(self, prompts: Sequence[Any]) -> dict[str, Any]:
        self._order.append(self._candidate)
        row: dict[str, Any] = self._case.measure(prompts)
        return row


def pack(candidate: Candidate) -> dict[str, Any]:
    setup = candidate.setup
    return {
        "draft_model": setup.source,
        "draft_weight_dtype": setup.draft_weight_dtype,
        "dtype": setup.dtype,
        "k": candidate.num_speculative_tokens,
    }


def unpack(row: dict[str, Any]) -> Candidate:
    source = row["draft_model"]
    setup = Setup(
        tuple(source) if isinstance(source, list) else source, row["draft_weight_dtype"], row["dtype"]
    )
    return Candidate(setup, row["k"])


class Notes:
    """What is finished, a JSON object a line."""

    def __init__(self, path: Path, key: dict[str, Any]) -> None:
        self._path, self._key = path, key
        rows = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
        self._rows = {(row["workload"], row["stage"]): row for row in rows if row["key"] == key}

    def find(self, workload: str, stage: str) -> Any:
        row = self._rows.get((workload, stage))
        return None if row is None else row["value"]

    def add(self, workload: str, stage: str, value: Any) -> None:
        row = {
            "workload": workload,
            "stage": stage,
            "key": self._key,
            "machine": machine_name(),
            **about_processor(),
            "value": value,
        }
        self._rows[workload, stage] = row
        self._path.parent.mkdir(parents=True, exist_ok=True)
        with self._path.open("a") as file:
            file.write(json.dumps(row) + "\n")


def run_workload(name: str, options: argparse.Namespace, notes: Notes) -> float:
    """The share of the best speed that tune's choice has."""
    call = read_workload(name, options)
    tuner = build_tuner(call, repeats=options.tune_repeats)
    chosen = notes.find(name, "tune")
    if chosen is None:
        for _ in tuner.run():
            pass
        best = tuner.best()
        reasons = [
            *tuner.reasons(best),
            *(f"{each.candidate.label}: {each.speedup.median:.2f}×" for each in tuner.scores()),
        ]
        chosen = {**pack(best.candidate), "speedup": best.speedup.model_dump(), "reasons": reasons}
        notes.add(name, "tune", chosen)
    plain = Candidate(tuner.setups[0], 0)
    choice = unpack(chosen) if chosen["k"] else plain
    swept = notes.find(name, "sweep")
    if swept is None:
        times = race(call, all_candidates(tuner, choice, options.ks), repeats=options.repeats)
        swept = [{**pack(each), "speedup": speed_of(times, each, plain)} for each in times]
        swept.sort(key=lambda row: -row["speedup"])
        notes.add(name, "sweep", swept)
    last = notes.find(name, "last")
    if last is None:
        runners = list(dict.fromkeys([plain, choice, *map(unpack, swept[:NUM_LAST])]))
        times = race(call, runners, repeats=options.last_repeats)
        last = [{**pack(each), "seconds": rows} for each, rows in times.items()]
        notes.add(name, "last", last)
    return show(name, choice, chosen, swept, {unpack(row): row["seconds"] for row in last})


def speed_of(times: Times, each: Candidate, plain: Candidate) -> float:
    return statistics.median(ours / theirs for ours, theirs in zip(times[plain], times[each], strict=True))


def show(
    name: str, choice: Candidate, chosen: dict[str, Any], swept: list[dict[str, Any]], last: Times
) -> float:
    plain = next(each for each in last if each.num_speculative_tokens == 0)
    best = max(last, key=lambda each: speed_of(last, each, plain))
    share, low, high = ratio_interval(last[best], last[choice])
    print(f"\n{name}: tune recommends {choice.label}; the best of {len(swept)} is {best.label}")
    for reason in chosen["reasons"]:
        print(f"  tune: {reason}")
    for each in sorted(last, key=lambda each: -speed_of(last, each, plain)):
        rows = last[each]
        speed, speed_low, speed_high = ratio_interval(last[plain], rows)
        mark = " <- tune" if each == choice else ""
        print(f"  {each.label:32} {speed:.2f}× plain [{speed_low:.2f}, {speed_high:.2f}]{mark}")
    verdict = "as wanted" if share >= WANTED else "TOO LITTLE"
    print(f"  tune / best: {share:.3f} [{low:.3f}, {high:.3f}], wanted {WANTED}: {verdict}")
    return share


def main() -> None:
    parser = argparse.ArgumentParser(description="tune's choice beside an exhaustive search")
    parser.add_argument("--pair", default="bundled", help='"bundled", or shapes of draft and target')
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--workloads", nargs="+", choices=WORKLOADS, default=list(WORKLOADS))
    parser.add_argument("--ks", nargs="+", type=int, default=[1, 2, 3, 4, 5, 6, 8, 10, 12, 16])
    parser.add_argument("--num-prompts", type=int, default=6, help="of code and random; copy has 3")
    parser.add_argument("--max-new-tokens", type=int, default=64)
    parser.add_argument("--tune-repeats", type=int, default=6, help="as --repeats of specengine tune")
    parser.add_argument("--repeats", type=int, default=5, help="of the sweep")
    parser.add_argument("--last-repeats", type=int, default=20, help="of the best few")
    parser.add_argument("--out", type=Path, default=ROOT / "build" / "pairs")
    parser.add_argument("--results", type=Path, default=ROOT / "build" / "tune.jsonl")
    options = parser.parse_args()
    key = {
        name: str(value)
        for name, value in vars(options).items()
        if name not in ("workloads", "out", "results")
    }
    notes = Notes(options.results, key)
    shares = {name: run_workload(name, options, notes) for name in options.workloads}
    print("\n" + ", ".join(f"{name} {share:.3f}" for name, share in shares.items()))
    if min(shares.values()) < WANTED:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
