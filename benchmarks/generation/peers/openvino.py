"""OpenVINO GenAI: `LLMPipeline`, plain and with `draft_model`, exported by optimum-intel."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import openvino as ov
import openvino_genai as genai

from generation.files import cached
from generation.protocol import Answer, Arrivals, Counts, Setup, Task, UnavailableError, answer_one_by_one

DISTRIBUTIONS = ("openvino-genai", "openvino", "optimum-intel", "nncf")
# Weights of 8 bits are decompressed or multiplied as such; the rest runs in what is this processor's default.
PRECISIONS = {"float32": "f32", "bfloat16": "bf16", "int8": "bf16"}
CACHE_GIGABYTES = 1


def export(source: Path, path: Path, *, is_int8: bool) -> None:
    """The checkpoint as OpenVINO's IR, with its tokenizer; int8 is symmetric, a scale per output channel."""
    # Tracing is heavy, and only the process that exports pays for it.
    from openvino_tokenizers import convert_tokenizer
    from optimum.intel import OVModelForCausalLM, OVWeightQuantizationConfig
    from transformers import PreTrainedTokenizerFast

    quantization: dict[str, Any] = (
        {"quantization_config": OVWeightQuantizationConfig(bits=8, sym=True)}
        if is_int8
        else {"load_in_8bit": False}
    )
    model = OVModelForCausalLM.from_pretrained(source, export=True, compile=False, **quantization)
    model.save_pretrained(path)
    names = json.loads((source / "tokenizer_config.json").read_text(encoding="utf-8"))
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_file=str(source / "tokenizer.json"),
        bos_token=names["bos_token"],
        eos_token=names["eos_token"],
    )
    for converted, name in zip(
        convert_tokenizer(tokenizer, with_detokenizer=True),
        ("openvino_tokenizer.xml", "openvino_detokenizer.xml"),
        strict=True,
    ):
        ov.save_model(converted, path / name)


def exported(directory: str, dtype: str, cache: str) -> Path:
    """The export's directory; written where it is not there yet."""

    def write(source: Path, path: Path) -> None:
        export(source, path, is_int8=dtype == "int8")

    return cached(directory, cache, "openvino-int8" if dtype == "int8" else "openvino", write)


def prepare(setup: Setup) -> None:
    for dtype in (setup.dtype, setup.draft_dtype if setup.speculates else setup.dtype):
        if dtype not in PRECISIONS:
            raise UnavailableError(f"not measured in {dtype}")
    exported(setup.target, setup.dtype, setup.cache)
    if setup.speculates:
        exported(setup.draft, setup.draft_dtype, setup.cache)


class TokenClock(genai.StreamerBase):
    """Notes when tokens come."""

    def __init__(self) -> None:
        super().__init__()
        self.arrivals = Arrivals()

    def write(self, token: int | Sequence[int]) -> genai.StreamingStatus:
        self.arrivals.add(1 if isinstance(token, int) else len(token))
        return genai.StreamingStatus.RUNNING

    def end(self) -> None:
        """Nothing is buffered."""


class OpenVINO:
    """A plain pipeline, and one with the draft."""

    def __init__(self, setup: Setup) -> None:
        self.instruction_set = f"what it finds, which computes {capabilities()}"
        properties = {"INFERENCE_NUM_THREADS": setup.num_threads}
        target = exported(setup.target, setup.dtype, setup.cache)
        hint = {"INFERENCE_PRECISION_HINT": PRECISIONS[setup.dtype], **properties}
        self._plain = genai.LLMPipeline(target, "CPU", scheduler_config=scheduler(setup), **hint)
        self.settings = (
            f"inference precision {PRECISIONS[setup.dtype]}, paged attention, keys and values in u8"
        )
        if setup.speculates:
            draft = genai.draft_model(
                exported(setup.draft, setup.draft_dtype, setup.cache),
                "CPU",
                INFERENCE_PRECISION_HINT=PRECISIONS[setup.draft_dtype],
                **properties,
            )
            self._speculative = genai.LLMPipeline(
                target, "CPU", scheduler_config=scheduler(setup), draft_model=draft, **hint
            )
            self.settings += f", draft {setup.draft_dtype}"

    def generate(self, task: Task) -> Answer:
        return answer_one_by_one(task, lambda prompt: self._generate_one(prompt, task))

    def _generate_one(self, prompt: list[int], task: Task) -> tuple[list[int], Arrivals, Counts | None]:
        config = genai.GenerationConfig()
        config.max_new_tokens = task.max_new_tokens
        config.ignore_eos = True
        config.do_sample = False
        is_plain = task.num_speculative_tokens == 0
        if not is_plain and task.num_speculative_tokens is not None:
            config.num_assistant_tokens = task.num_speculative_tokens
        ids = np.array([prompt], dtype=np.int64)
        inputs = genai.TokenizedInputs(ov.Tensor(ids), ov.Tensor(np.ones_like(ids)))
        clock = TokenClock()
        pipeline = self._plain if is_plain else self._speculative
        result = pipeline.generate(inputs, config, clock)
        return result.tokens[0], clock.arrivals, None if is_plain else counts(result.extended_perf_metrics)


def capabilities() -> str:
    """Formats that it says this processor has instructions for; which instructions, it does not say."""
    known = ov.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")
    return " ".join(name for name in known if name not in ("BIN", "EXPORT_IMPORT")).lower()


def counts(metrics: genai.SDPerModelsPerfMetrics) -> Counts:
    return Counts(
        num_rounds=len(metrics.main_model_metrics.raw_metrics.m_durations) - 1,
        num_drafted=metrics.get_num_draft_tokens(),
        num_accepted=metrics.get_num_accepted_tokens(),
    )


def scheduler(setup: Setup) -> genai.SchedulerConfig:
    """As the pipeline's own default, which reads a prompt at once; but that would also keep prompts, and here every
    repetition pays for its own."""
    config = genai.SchedulerConfig()
    config.enable_prefix_caching = False
    config.max_num_batched_tokens = setup.max_seq_len
    config.cache_size = CACHE_GIGABYTES
    return config


def load(setup: Setup) -> OpenVINO:
    return OpenVINO(setup)
