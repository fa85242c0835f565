"""What `specengine verify` found, in words, for a terminal and as a page."""

from __future__ import annotations

import html
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from specengine.measure.checks import FALSE_ALARM, LOSSLESS, NO_POWER
from specengine.measure.law_checks import CONTROL_TEMPERATURE, NUM_CELLS
from specengine.measure.records import Record
from specengine.measure.report import document, table

TITLES = ("drafter", "judged by", "outcome", "kept", "least p", "off (chance)", "control")


def row(record: Record) -> list[str]:
    """A check under `TITLES`."""
    found = record.measured
    drafts = found["drafts"]
    kept = f"{drafts['num_accepted'] / drafts['num_drafted']:.0%}" if drafts["num_drafted"] else "-"
    p, off = "bits", "-"
    if found["tests"]:
        p = probability(found["smallest_p"])
    if found["distance"] is not None:
        off = f"{found['distance']:.3f} ({found['distance_by_chance']:.3f})"
    return [short_name(found["drafter"]), found["mode"], found["outcome"], kept, p, off, found["control"]]


def probability(p: float) -> str:
    return "0" if p == 0 else f"{p:.1g}"


def short_name(drafter: str) -> str:
    """Of directories the last part; a list's drafters are joined by +."""
    return "+".join(Path(part).name for part in drafter.split("+"))


def is_lossless(records: Sequence[Record]) -> bool:
    return all(record.measured["outcome"] == LOSSLESS for record in records)


def verdict(records: Sequence[Record], total: int) -> str:
    """One line."""
    outcomes = [record.measured["outcome"] for record in records]
    if len(records) < total:
        return f"{len(records)} of {total} checks were made, {outcomes.count(LOSSLESS)} of them show losslessness"
    if is_lossless(records):
        return f"LOSSLESS: all {total} checks passed, and all their controls failed"
    bad = total - outcomes.count(LOSSLESS) - outcomes.count(NO_POWER)
    if not bad:
        return f"NOTHING SHOWN by {outcomes.count(NO_POWER)} of {total} checks: they have no power; the others passed"
    return f"NOT LOSSLESS: {bad} of {total} checks failed"


def reasons(records: Sequence[Record]) -> list[str]:
    """Of every check that is not lossless, a line."""
    return [
        f"{short_name(found['drafter'])}, {found['mode']}: {found['outcome']}: {found['reason']}"
        for found in (record.measured for record in records)
        if found["outcome"] != LOSSLESS
    ]


def explanation(records: Sequence[Record]) -> list[str]:
    """Sentences that say what the columns are."""
    lines = [
        "kept: the share of drafts that were accepted. Greedy and coupled text is compared with plain decoding's: "
        "tokens, text and the bits of log-probabilities; control: the texts that change when every draft is accepted.",
    ]
    laws = [record for record in records if record.measured["tests"]]
    if laws:
        first = laws[0].settings
        lines.append(
            f"Of the other modes {first['num_samples']} samples of {first['num_positions']} tokens each are drawn. "
            f"Where each token lies in the target's own distribution must fill {NUM_CELLS} equal cells equally: least "
            "p is the smallest p-value of a chi-square test by position, and fails below "
            f"{first['significance']:.1g}, so that a right engine fails one run in {1 / FALSE_ALARM:,.0f}. off: total "
            "variation of the cells' shares from equal ones, and what it stays below by chance in 95 of 100 cases. "
            "control: the p-value of the same samples by the law of "
            f"{CONTROL_TEMPERATURE:g} times the temperature, which must fail."
        )
    return lines


def page(records: Sequence[Record], total: int) -> str:
    """Everything as one HTML page that needs no network."""
    first = records[0]
    facts: list[tuple[str, Any]] = [
        ("target", first.pair["model"]),
        *((name, first.pair[name]) for name in ("dtype", "weight_dtype", "device", "backend")),
        *(
            (name, first.settings[name])
            for name in ("temperature", "top_k", "top_p", "min_p", "num_speculative_tokens", "num_prompts")
        ),
        ("run", first.run),
    ]
    known = "\n".join(
        f"<div><dt>{html.escape(name)}</dt><dd>{html.escape(str(value))}</dd></div>" for name, value in facts
    )
    sentences = "\n".join(f"<p>{html.escape(line)}</p>" for line in explanation(records))
    bad = "\n".join(f"<li>{html.escape(line)}</li>" for line in reasons(records))
    tests = [_test_row(record, test) for record in records for test in record.measured["tests"]]
    heads = ("drafter", "judged by", "tokens", "number", "chi-square", "degrees", "p")
    every = f"<h2>Every test</h2>\n{table(heads, tests, 'Every test')}" if tests else ""
    return document(
        "Is it lossless?",
        f"""<header>
<h1>Is it lossless?</h1>
<p><strong>{html.escape(verdict(records, total))}.</strong></p>
<dl>{known}</dl>
</header>
{table(TITLES, [row(record) for record in records], "Checks")}
{f"<ul>{bad}</ul>" if bad else ""}
{sentences}
{every}""",
    )


def _test_row(record: Record, test: dict[str, Any]) -> list[str]:
    return [
        short_name(record.measured["drafter"]),
        record.measured["mode"],
        test["name"],
        str(test["num_tokens"]),
        "∞" if test["statistic"] is None else f"{test['statistic']:.1f}",
        str(test["degrees"]),
        probability(test["p_value"]),
    ]
