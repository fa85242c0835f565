"""One GGUF file, ours and llama.cpp's, in turn on the same machine, threads and prompts.

    specengine fetch smollm2
    make bench-gguf
    make bench-gguf BENCH_FLAGS="--repetitions 7 --results benchmarks/results/gguf_epyc.jsonl"

Three workloads: a prompt of 100 tokens continued by 128; the first token after a prompt of 1,000; and two chats whose
answers copy much of the question (code to edit, a text to summarise), plain and with drafts looked up in what was said
(`suffix`). The chats' answers are shorter than what the model would say, so that every token timed is the model's
answer. Ours must generate the tokens of our plain decoding however it drafts, or nothing is reported.

llama.cpp is built for this processor (`generation/llama_builds.py`) and tried before anything is timed: the build
and the instructions that it says it uses stand in its rows, or why it is missing.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
from contextlib import ExitStack
from dataclasses import dataclass
from datetime import date
from pathlib import Path

import gguf
import torch  # noqa: F401 - before specengine's extension, which needs its libraries
from bench_generate import Defaults, between, file_path, say
from generation import contest, table, trial
from generation.plan import OURS, Entry, Options
from generation.process import Worker
from generation.protocol import Setup, Task
from generation.rows import Record, Row
from measure import ROOT, Report, append_rows, machine_name

from specengine import SpecEngineError
from specengine.conversations import ChatTemplate
from specengine.fetched import require_fetched
from specengine.models.checkpoints import Checkpoint, open_checkpoint

LLAMA = "llama.cpp"
PROMPT_LENGTH, NEW_TOKENS, LONG_LENGTH = 100, 128, 1000
CHAT_TOKENS = 112  # SmolLM2's shorter answer has 113, its end included
DRAFT_LENGTHS: tuple[int | None, ...] = (None, 4, 8)
DRAFT_ROOM = 64
LICENSE = ROOT / "LICENSE"
CODE = """\
```python
class Inventory:
    def __init__(self):
        self.items = {}

    def add(self, name, count):
        if name not in self.items:
            self.items[name] = 0
        self.items[name] += count

    def remove(self, name, count):
        if self.items.get(name, 0) < count:
            raise ValueError("not enough of " + name)
        self.items[name] -= count
        if self.items[name] == 0:
            del self.items[name]

    def total(self):
        return sum(self.items.values())
```"""
TEXT = """\
The lighthouse on the northern cape was built in 1871, after three ships had been lost on the rocks in a single \
winter. Its tower is thirty-four metres high and was made of granite from a quarry on the mainland, which was brought \
over in flat boats whenever the sea was calm. For more than a hundred years a keeper and his family lived in the small \
house beside it. They kept the lamp burning through every night, wound the clockwork that turned the lens every four \
hours, and rang a bell in fog. In 1979 the light was made automatic, and the last keeper moved to the town. The house \
stood empty for a long time. Today it is a museum, which is open from May to September, and visitors can climb the one \
hundred and ninety-six steps to the gallery, from where they see the whole bay."""
CHATS = (
    f"Add a docstring to each method of this class. Write the whole class.\n\n{CODE}",
    f"Summarize this text:\n\n{TEXT}",
)


@dataclass(frozen=True)
class Workload:
    """What both do, compared with our plain decoding of the same."""

    title: str
    entries: list[Entry]


def main(arguments: list[str] | None = None) -> int:
    # So that a terminated benchmark also closes its workers.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    try:
        options = parse(arguments)
        rows = run(options)
    except contest.NotExactError as error:
        print(f"bench_gguf.py: ours is not exact: {error}", file=sys.stderr)
        return 1
    except SpecEngineError as error:
        print(f"bench_gguf.py: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("bench_gguf.py: interrupted", file=sys.stderr)
        return 130
    if options.results is not None:
        append_rows((row.to_json() for row in rows), options.results)
    show(rows, options)
    return 0


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="One GGUF file, ours and llama.cpp's, in turn.",
        formatter_class=Defaults,
    )
    add = parser.add_argument
    add("--gguf", type=Path, metavar="FILE", help="the model; default: SmolLM2, as it was fetched")
    add("--repetitions", type=between(1, 1000), default=5, metavar="N", help="turns of each")
    add("--threads", type=between(1, 1024), default=len(os.sched_getaffinity(0)), metavar="N", help="of each")
    add("--results", type=file_path, metavar="PATH", help="append the rows to this file, as JSON lines")
    given = parser.parse_args(arguments)
    if given.gguf is None:
        given.gguf = require_fetched("smollm2")
    return given


def run(options: argparse.Namespace) -> list[Row]:
    """The rows of all workloads. Raises `NotExactError`; leaves no process behind, whatever happens."""
    path = options.gguf.resolve()
    workloads = build_workloads(open_checkpoint(path))
    setups = build_setups(path, workloads, options)
    report = Report(options.threads)
    with ExitStack() as stack:
        short, long = (workload.entries[0].task.prompts[0] for workload in workloads[:2])
        workers, reasons = contest.start(setups, stack, say, tasks=trial.tasks(short, long))
        rows = []
        for workload in workloads:
            say(f"{path.name}: {workload.title}")
            rows += take_turns(workload, path, workers, reasons, report, options)
    return rows


def build_workloads(checkpoint: Checkpoint) -> list[Workload]:
    """Prompts by their tokens, the same for everybody; those without a chat are the beginning of the licence."""
    tokenizer, source = checkpoint.tokenizer, checkpoint.chat_template
    assert tokenizer is not None, "a GGUF file that can be loaded has a tokenizer"
    if source is None:
        raise SpecEngineError(f"{checkpoint.name} has no chat template, and chats are measured too")
    template = ChatTemplate(source, checkpoint.name, tokenizer.roles)
    text = tokenizer.encode(LICENSE.read_text(encoding="utf-8"))
    assert len(text) >= LONG_LENGTH, "the licence is longer than the longest prompt"
    chats = [
        tokenizer.encode_part(template.render([{"role": "user", "content": question}])) for question in CHATS
    ]
    both = (OURS, LLAMA)
    plain = [Entry(name, "generate", Task([text[:PROMPT_LENGTH]], NEW_TOKENS)) for name in both]
    first = [Entry(name, "prefill", Task([text[:LONG_LENGTH]], 1)) for name in both]
    copying = [Entry(name, "generate", Task(chats, CHAT_TOKENS)) for name in both]
    drafted = [Entry(OURS, "generate", Task(chats, CHAT_TOKENS, k)) for k in DRAFT_LENGTHS]
    return [
        Workload(f"{PROMPT_LENGTH} tokens, {NEW_TOKENS} new", plain),
        Workload(f"first token after {LONG_LENGTH}", first),
        Workload("chats that copy", [*copying, *drafted]),
    ]


def build_setups(path: Path, workloads: list[Workload], options: argparse.Namespace) -> list[Setup]:
    tasks = [entry.task for workload in workloads for entry in workload.entries]
    longest = max(len(prompt) + task.max_new_tokens for task in tasks for prompt in task.prompts)
    return [
        Setup(
            contestant=name,
            target=str(path),
            draft="suffix",
            dtype="auto",
            draft_dtype="auto",
            speculates=name == OURS,
            num_threads=options.threads,
            max_seq_len=longest + DRAFT_ROOM,
            cache="",
        )
        for name in (OURS, LLAMA)
    ]


def take_turns(
    workload: Workload,
    path: Path,
    workers: dict[str, Worker],
    reasons: dict[str, str],
    report: Report,
    options: argparse.Namespace,
) -> list[Row]:
    num_bytes = streamed_bytes(path)
    records = []
    for entry in workload.entries:
        about = workers[entry.contestant].about if entry.contestant in workers else {}
        records.append(
            Record(
                entry,
                settings=about.get("settings", ""),
                instruction_set=about.get("instruction_set", ""),
                versions=about.get("versions", {}),
                target_bytes=num_bytes,
                reason=reasons.get(entry.contestant),
            )
        )
    running = contest.Contest(workers, records, report, say)
    running.warm_up()
    running.take_turns(options.repetitions)
    limits = Options(contestants=(OURS, LLAMA), num_threads=options.threads)
    return contest.build_rows(records, f"{path.name}, {workload.title}", "as stored", limits)


def streamed_bytes(path: Path) -> float:
    """Bytes of the weights that a forward over one token reads: all but a token table that is not the head too."""
    sizes = {tensor.name: int(tensor.n_bytes) for tensor in gguf.GGUFReader(path).tensors}
    return float(sum(sizes.values()) - ("output.weight" in sizes) * sizes["token_embd.weight"])


def show(rows: list[Row], options: argparse.Namespace) -> None:
    print(f"{machine_name(options.threads)}; medians of {options.repetitions} in turn; {date.today()}")
    print("\n".join(table.text(rows)))


if __name__ == "__main__":
    sys.exit(main())
