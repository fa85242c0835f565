"""What a prompt costs: the time to the first token by the prompt's length, and of a follow-up with the prefix cache.

    python benchmarks/long_prompts.py                                     # random weights in SmolLM2-135M's shape
    python benchmarks/long_prompts.py --model path/to/model --dtype bfloat16,float32 --results out.jsonl

Two tables, decoded plainly, one prompt at a time, random tokens. First, by prompt length: ms to the first token, prompt
tokens a second, and ms a token afterwards, medians over the repetitions; lengths take turns within a repetition. Then a
conversation of 6,000 tokens that goes on: ms to the first token of each turn of --turn tokens, with the prefix cache
and, beside it, without. Before anything is timed, a prompt in chunks of 100 must give the tokens and log-probabilities
of one in a single chunk.
"""

from __future__ import annotations

import argparse
import random
import statistics
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import transformers
from measure import append_rows, machine_name

from specengine import Engine, GenerationResult

# SmolLM2-135M.
SHAPE = {
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "vocab_size": 49152,
    "max_position_embeddings": 8192,
    "tie_word_embeddings": True,
}
CONVERSATION = 6000
NUM_TURNS = 4


@dataclass(frozen=True)
class Row:
    """cached: tokens found in the prefix cache; first, decode: ms to the first token, ms a token after it."""

    dtype: str
    case: str
    prompt: int
    cached: int
    first: float
    prompt_tokens_per_second: float
    decode: float


def write_random_model(directory: Path) -> None:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(**SHAPE)
    transformers.LlamaForCausalLM(config).save_pretrained(directory)


def make_prompt(length: int, seed: int, vocab_size: int) -> list[int]:
    return random.Random(f"{length} {seed}").choices(range(3, vocab_size), k=length)


def generate(engine: Engine, prompt: list[int], max_new_tokens: int) -> GenerationResult:
    return engine.generate(prompt, max_new_tokens=max_new_tokens, ignore_eos=True, logprobs=0)


def build_row(dtype: str, case: str, results: list[GenerationResult]) -> Row:
    """Medians of generations of one kind."""
    metrics = [result.metrics for result in results]
    return Row(
        dtype,
        case,
        metrics[0].num_prompt_tokens,
        metrics[0].num_cached_tokens,
        statistics.median(each.time_to_first_token for each in metrics) * 1e3,
        statistics.median(each.prompt_tokens_per_second for each in metrics),
        statistics.median(each.decode_time / max(1, each.num_generated_tokens - 1) for each in metrics) * 1e3,
    )


def check(open_engine: dict[str, object], model: Path, dtype: str) -> None:
    """Chunks change no bit."""
    found = []
    for chunk in (100, 4096):
        config = {**open_engine, "prefill_chunk_size": chunk}
        with Engine(model, dtype=dtype, enable_prefix_cache=False, **config) as engine:
            result = generate(engine, make_prompt(700, 0, engine.vocab_size), 4)
            found.append((result.token_ids, result.outputs[0].logprobs))
    assert found[0] == found[1], f"{dtype}: chunks change the result"


def measure_lengths(engine: Engine, dtype: str, lengths: list[int], given: argparse.Namespace) -> list[Row]:
    results: dict[int, list[GenerationResult]] = {length: [] for length in lengths}
    generate(engine, make_prompt(50, 0, engine.vocab_size), 4)
    for repetition in range(given.repetitions):
        for length in lengths:
            prompt = make_prompt(length, repetition, engine.vocab_size)
            results[length].append(generate(engine, prompt, given.max_new_tokens))
    return [build_row(dtype, "prompt", results[length]) for length in lengths]


def measure_turns(engine: Engine, dtype: str, case: str, given: argparse.Namespace) -> list[Row]:
    said = make_prompt(CONVERSATION, 0, engine.vocab_size)
    rows = []
    for turn in range(NUM_TURNS + 1):
        result = generate(engine, said, given.max_new_tokens)
        rows.append(build_row(dtype, f"{case}, turn {turn}", [result]))
        said = said + result.token_ids + make_prompt(given.turn, turn + 1, engine.vocab_size)
    return rows


def measure(model: Path, given: argparse.Namespace) -> list[Row]:
    open_engine: dict[str, object] = {"num_threads": given.threads, "max_batch_size": 1}
    lengths = [int(length) for length in given.lengths.split(",")]
    rows = []
    for dtype in given.dtype.split(","):
        check(open_engine, model, dtype)
        with Engine(model, dtype=dtype, enable_prefix_cache=False, **open_engine) as engine:
            rows += measure_lengths(engine, dtype, lengths, given)
            rows += measure_turns(engine, dtype, "conversation", given)
        with Engine(model, dtype=dtype, **open_engine) as engine:
            rows += measure_turns(engine, dtype, "conversation, prefix cache", given)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", type=Path)
    parser.add_argument("--dtype", default="float32,bfloat16")
    parser.add_argument("--lengths", default="256,1000,4000")
    parser.add_argument("--turn", type=int, default=50)
    parser.add_argument("--max-new-tokens", type=int, default=32)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--results", type=Path)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        if given.model is None:
            write_random_model(Path(directory))
        rows = measure(given.model or Path(directory), given)
    print(f"{machine_name()}; {given.model or 'random weights in the shape of SmolLM2-135M'}")
    for row in rows:
        print(
            f"{row.dtype:<9} {row.case:<35} {row.prompt:5} tokens ({row.cached:5} cached)  "
            f"first token {row.first:8.1f} ms  {row.prompt_tokens_per_second:7.0f} prompt tokens/s  "
            f"then {row.decode:6.2f} ms a token"
        )
    if given.results is not None:
        append_rows(({"kind": "long_prompts", **asdict(row)} for row in rows), given.results)


if __name__ == "__main__":
    main()
