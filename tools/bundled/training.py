"""Training one model: the target on the text, the draft on the text and on the target's logits."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from transformers import GPT2LMHeadModel

log = logging.getLogger(__name__)

SAVE_EVERY = 50
REPORT_EVERY = 20


@dataclass(frozen=True)
class Schedule:
    """How long and how fast to train one model: cycles of warm-up, constant rate and linear cool-down to zero.

    A finished model can be trained on by one more cycle (WSD-S, arXiv:2410.05192), and no step before a cool-down
    depends on where its cycle ends: a run can be lengthened or cut short on the way. Blocks are short until the
    cool-down (attention costs less, and random offsets train every position all the same) and grow to the whole
    context in it. `tokens_per_step` is split into blocks of the current length.
    Where there is a teacher, `distillation_share` of the loss is KL(teacher || model).
    """

    cycle_ends: tuple[int, ...]
    learning_rate: float = 3e-3
    tokens_per_step: int = 4096
    warmup_steps: int = 60
    cooldown_share: float = 0.4
    weight_decay: float = 0.1
    distillation_share: float = 0.0
    seed: int = 0

    @property
    def num_steps(self) -> int:
        """Steps in all."""
        return self.cycle_ends[-1]

    def cycle(self, step: int) -> tuple[int, int]:
        """First and one-past-last step of the cycle that holds `step`."""
        index = sum(end <= step for end in self.cycle_ends)
        return (0, *self.cycle_ends)[index], self.cycle_ends[index]

    def cooled(self, step: int) -> float:
        """How far into its cycle's cool-down `step` is: 0 before it, 1 at the end."""
        first, end = self.cycle(step)
        length = self.cooldown_share * (end - first)
        return max(0.0, (step - (end - length)) / length)

    def rate(self, step: int) -> float:
        """Learning rate at `step`."""
        warmed = min(1.0, (step - self.cycle(step)[0] + 1) / self.warmup_steps)
        return self.learning_rate * warmed * (1.0 - self.cooled(step))

    def length(self, step: int) -> int:
        """Block length at `step`."""
        cooled = self.cooled(step)
        return 256 if cooled == 0.0 else 512 if cooled < 0.6 else 1024


class BlockSampler:
    """Deterministic epochs over the documents: shuffle, join, cut into blocks, shuffle the blocks."""

    def __init__(self, documents: list[np.ndarray], repeats: list[int], seed: int) -> None:
        self._documents = [doc for doc, count in zip(documents, repeats, strict=True) for _ in range(count)]
        self._random = np.random.default_rng(seed)
        self._blocks: list[np.ndarray] = []
        self._length = 0

    def batch(self, count: int, length: int) -> torch.Tensor:
        """`[count, length + 1]` int64 token ids."""
        rows = [self._next(length) for _ in range(count)]
        return torch.from_numpy(np.stack(rows).astype(np.int64))

    def _next(self, length: int) -> np.ndarray:
        if length != self._length or not self._blocks:
            order = self._random.permutation(len(self._documents))
            stream = np.concatenate([self._documents[i] for i in order])[self._random.integers(length) :]
            starts = np.arange(0, len(stream) - length - 1, length)
            self._blocks = [stream[s : s + length + 1] for s in self._random.permutation(starts)]
            self._length = length
        return self._blocks.pop()


def build_optimizers(model: GPT2LMHeadModel, schedule: Schedule) -> list[torch.optim.Optimizer]:
    """Muon for the layers' matrices; AdamW for embeddings, norms and biases (only the embeddings decay).

    Muon's update is scaled to AdamW's root mean square (arXiv:2502.16982), so that both share one learning rate.
    """
    layers = [p for p in model.transformer.h.parameters() if p.ndim == 2]
    embeddings = [model.transformer.wte.weight, model.transformer.wpe.weight]
    vectors = [p for p in model.parameters() if p.ndim == 1]
    rate, decay = schedule.learning_rate, schedule.weight_decay
    muon = torch.optim.Muon(layers, lr=rate, weight_decay=decay, adjust_lr_fn="match_rms_adamw")
    groups = [{"params": embeddings, "weight_decay": decay}, {"params": vectors, "weight_decay": 0.0}]
    return [muon, torch.optim.AdamW(groups, lr=rate, betas=(0.9, 0.95), eps=1e-8, fused=True)]


def forward_logits(model: GPT2LMHeadModel, inputs: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """`[B * T, V]` logits in the autocast dtype."""
    hidden = model.transformer(inputs, position_ids=positions, use_cache=False).last_hidden_state
    return model.lm_head(hidden).flatten(0, 1)


def distillation_loss(
    logits: torch.Tensor, labels: torch.Tensor, teacher_logits: torch.Tensor | None, share: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """(loss, its next-token part), nats per token: `(1 - share) * next token + share * KL(teacher || model)`."""
    log_probs = F.log_softmax(logits.float(), dim=-1)
    next_token = F.nll_loss(log_probs, labels)
    if teacher_logits is None:
        return next_token, next_token.detach()
    teacher = F.log_softmax(teacher_logits.float(), dim=-1)
    divergence = F.kl_div(log_probs, teacher, reduction="batchmean", log_target=True)
    return (1 - share) * next_token + share * divergence, next_token.detach()


def position_ids(length: int, context: int, random: np.random.Generator) -> torch.Tensor:
    """`[1, length]` consecutive positions: from 0 half of the time, else from anywhere they fit."""
    room = context - length
    offset = int(random.integers(room + 1)) if room and random.random() < 0.5 else 0
    return torch.arange(offset, offset + length).unsqueeze(0)


def train(
    model: GPT2LMHeadModel,
    sampler: BlockSampler,
    schedule: Schedule,
    *,
    device: torch.device,
    teacher: GPT2LMHeadModel | None = None,
    state_path: Path | None = None,
) -> float:
    """Train in place; returns the seconds spent. With `state_path` an interrupted run goes on exactly."""
    model.to(device).train()
    if teacher is not None:
        teacher.to(device)
    optimizers = build_optimizers(model, schedule)
    first, earlier = load_state(state_path, model, optimizers)
    started, losses = time.perf_counter() - earlier, []
    for step, tokens, positions in batches(sampler, schedule, model.config.n_positions):
        if step < first:  # done already: only the random draws are repeated
            continue
        set_rate(optimizers, schedule.rate(step))
        loss = step_loss(model, tokens.to(device), positions.to(device), teacher, schedule.distillation_share)
        losses.append(update(model, optimizers, *loss))
        seconds = time.perf_counter() - started
        if (step + 1) % REPORT_EVERY == 0 or step + 1 == schedule.num_steps:
            report(step, schedule, losses[-REPORT_EVERY:], seconds)
        if state_path is not None and (step + 1) % SAVE_EVERY == 0:
            save_state(state_path, model, optimizers, step + 1, seconds)
    model.eval()
    return time.perf_counter() - started


def batches(
    sampler: BlockSampler, schedule: Schedule, context: int
) -> Iterator[tuple[int, torch.Tensor, torch.Tensor]]:
    """(step, `[B, T + 1]` token ids, `[1, T]` positions) for every step of the schedule."""
    random = np.random.default_rng(schedule.seed + 1)
    for step in range(schedule.num_steps):
        length = schedule.length(step)
        tokens = sampler.batch(schedule.tokens_per_step // length, length)
        yield step, tokens, position_ids(length, context, random)


def step_loss(
    model: GPT2LMHeadModel,
    tokens: torch.Tensor,
    positions: torch.Tensor,
    teacher: GPT2LMHeadModel | None,
    share: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(loss to minimise, next-token loss) on `tokens` `[B, T + 1]`."""
    inputs, labels = tokens[:, :-1], tokens[:, 1:].flatten()
    with torch.autocast(tokens.device.type, torch.bfloat16):
        teacher_logits = None
        if teacher is not None:
            with torch.no_grad():
                teacher_logits = forward_logits(teacher, inputs, positions)
        logits = forward_logits(model, inputs, positions)
    return distillation_loss(logits, labels, teacher_logits, share)


def set_rate(optimizers: list[torch.optim.Optimizer], rate: float) -> None:
    """Give every parameter group the learning rate `rate`."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = rate


def update(
    model: GPT2LMHeadModel,
    optimizers: list[torch.optim.Optimizer],
    loss: torch.Tensor,
    next_token: torch.Tensor,
) -> float:
    """One step down the gradient of `loss`; returns `next_token` as a number."""
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    for optimizer in optimizers:
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return next_token.item()


def report(step: int, schedule: Schedule, losses: list[float], seconds: float) -> None:
    """One line of progress."""
    log.info(
        "step %d/%d length %d next-token loss %.3f lr %.2e %.0f tokens/s %.0f s",
        step + 1, schedule.num_steps, schedule.length(step), sum(losses) / len(losses), schedule.rate(step),
        (step + 1) * schedule.tokens_per_step / seconds, seconds,
    )  # fmt: skip


def save_state(
    path: Path, model: GPT2LMHeadModel, optimizers: list[torch.optim.Optimizer], step: int, seconds: float
) -> None:
    """Write weights, optimizers, the number of finished steps and the time they took, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    state = {"step": step, "seconds": seconds, "model": model.state_dict()}
    state["optimizers"] = [optimizer.state_dict() for optimizer in optimizers]
    torch.save(state, path.with_suffix(".new"))
    path.with_suffix(".new").replace(path)


def load_state(
    path: Path | None, model: GPT2LMHeadModel, optimizers: list[torch.optim.Optimizer]
) -> tuple[int, float]:
    """Load what `save_state` wrote, if anything; returns the number of finished steps and their seconds."""
    if path is None or not path.exists():
        return 0, 0.0
    state = torch.load(path, weights_only=True)
    model.load_state_dict(state["model"])
    for optimizer, saved in zip(optimizers, state["optimizers"], strict=True):
        optimizer.load_state_dict(saved)
    return int(state["step"]), float(state["seconds"])
