"""Who takes part in an end-to-end table, and in what."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from generation.plan import OURS, Entry
from generation.protocol import MODULES, Setup, Task

from gpu_parts.context import Settings
from gpu_parts.models import Workload

NO_GRAPHS, COMPILED = "ours, no graphs", "torch.compile"
COMPILED_MODULE = "generation.peers.compiled"


@dataclass(frozen=True)
class System:
    """Who generates. `forced` is the acceptance that is forced; None: the output is the model's."""

    name: str
    is_ours: bool = False
    forced: float | None = None

    @property
    def has_graphs(self) -> bool:
        return self.name != NO_GRAPHS


@dataclass(frozen=True)
class Entrant:
    """A system, what its worker loads, and its draft lengths, alone and in a batch: 0 is plain, None its choice."""

    system: System
    setup: Setup
    lengths: tuple[int | None, ...]
    batch_lengths: tuple[int | None, ...] = ()

    def entries(self, prompts: list[list[int]], max_new_tokens: int, *, is_batch: bool) -> list[Entry]:
        kind, lengths = ("batch", self.batch_lengths) if is_batch else ("generate", self.lengths)
        return [Entry(self.system.name, kind, Task(prompts, max_new_tokens, k, is_batch)) for k in lengths]


@dataclass(frozen=True)
class Builder:
    """Makes entrants for the models of a part."""

    settings: Settings
    load: Workload
    target: Path
    draft: Path
    max_batch_size: int

    def real(self) -> list[Entrant]:
        """Ours, and whom it is compared with."""
        load = self.load
        middle = load.k[len(load.k) // 2]
        return [
            self._ours(System(OURS, is_ours=True), (0, *load.k), (0, *load.batch_k)),
            self._ours(System(NO_GRAPHS, is_ours=True), (0, middle), cuda_graphs=False, rounds_ahead=0),
            # Assisted generation takes no batch: there it has a row that says so.
            self._peer("transformers", (0, None, load.assisted_k), (0, load.assisted_k)),
            self._peer(COMPILED, (0,), (0,), module=COMPILED_MODULE),
        ]

    def forced(self) -> list[Entrant]:
        """Our plain decoding, and speculation whose tokens are not the model's."""
        systems = [System(f"ours, FORCED {rate:.2f}", is_ours=True, forced=rate) for rate in self.load.forced]
        speculative = [self._ours(each, self.load.k, forced_acceptance=each.forced) for each in systems]
        return [self._ours(System(OURS, is_ours=True), (0,)), *speculative]

    def _ours(
        self,
        system: System,
        lengths: tuple[int | None, ...],
        batch_lengths: tuple[int | None, ...] = (),
        **engine: object,
    ) -> Entrant:
        defaults = {
            # True and not "auto": a round that cannot be recorded is an error here, not a slow round.
            "cuda_graphs": self.settings.device == "cuda",
            "rounds_ahead": "auto",
            # All sequences of a batch begin to decode in the same step.
            "prefill_chunk_size": self.max_batch_size * self.load.prompt_length,
        }
        setup = self._setup(system.name, MODULES[OURS], speculates=True, engine={**defaults, **engine})
        return Entrant(system, setup, lengths, batch_lengths)

    def _peer(
        self,
        name: str,
        lengths: tuple[int | None, ...],
        batch_lengths: tuple[int | None, ...],
        *,
        module: str | None = None,
    ) -> Entrant:
        setup = self._setup(name, module or MODULES[name], speculates=any(k != 0 for k in lengths), engine={})
        return Entrant(System(name), setup, lengths, batch_lengths)

    def _setup(self, name: str, module: str, *, speculates: bool, engine: dict[str, object]) -> Setup:
        return Setup(
            contestant=name,
            target=str(self.target),
            draft=str(self.draft),
            dtype=self.settings.dtype,
            draft_dtype=self.settings.dtype,
            speculates=speculates,
            num_threads=1 if self.settings.is_rehearsal else self.settings.about["cpus"],
            max_seq_len=self.load.max_seq_len,
            cache=self.settings.cache,
            module=module,
            device=self.settings.device,
            max_batch_size=self.max_batch_size,
            engine=engine,
        )


Enter = Callable[[Builder], list[Entrant]]
