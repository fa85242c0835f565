"""Decides what an engine is made of: device, dtypes, sizes, models, cache."""

from __future__ import annotations

import math
import os
import reprlib
import warnings
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from specengine.config import EngineConfig
from specengine.draft_vocabulary import choose_tokens
from specengine.drafters import registry
from specengine.drafters.base import Drafter, DrafterContext, RoundDrafter
from specengine.drafters.draft_model import DraftModelDrafter
from specengine.drafters.host import HostDrafter
from specengine.drafters.no_draft import NoDrafter
from specengine.drafters.retokenized import RetokenizedDrafter, check_texts
from specengine.drafters.several import SeveralDrafters
from specengine.engine.intake import level_of_caller
from specengine.errors import ChatTemplateError, InsufficientMemoryError, ModelLoadError
from specengine.kinds import AUTO, Drafting
from specengine.models.checkpoints import Checkpoint, open_checkpoint
from specengine.models.checkpoints.given_tokenizer import given_chat_template, open_tokenizer
from specengine.models.decoder import DecoderSpec
from specengine.models.loader import LoadedModel, load_model
from specengine.ops.backend import Backend
from specengine.runtime.graphs import CudaRecorder, Recorder
from specengine.runtime.kv_cache import DRAFT, KVCache, bytes_per_token, limit_to_budget, plan_num_blocks
from specengine.runtime.model_runner import ModelRunner
from specengine.tokenizer import Tokenizer, Vocabulary, check_compatible, num_usable_ids
from specengine.translation import ByText, Translation, translate

Model = str | Path | torch.nn.Module
DraftModel = Model | Drafter | Collection[Model | Drafter] | None
# Of a draft with a vocabulary of its own, tokens for one of the target's that its cache has room for, if it has as many
# positions.
_MAX_DRAFT_TOKENS_EACH = 4


def build_config(config: EngineConfig | None, config_fields: dict[str, Any]) -> EngineConfig:
    """An `EngineConfig` from either form; `TypeError` for both forms at once."""
    if config is not None and config_fields:
        raise TypeError(f"give config or its fields, not both: {', '.join(sorted(config_fields))}")
    return config or EngineConfig(**config_fields)


def name_drafter(drafter: Model | Drafter) -> str:
    """What an engine was given, as requests call it."""
    if isinstance(drafter, str | os.PathLike):
        return os.fspath(drafter)
    return str(getattr(drafter, "name", type(drafter).__name__))


def list_drafters(draft_model: DraftModel) -> tuple[Model | Drafter, ...]:
    """What drafts, checked: nothing, one thing, or all that a list has. Refuses what drafts nothing, and arguments that
    no drafter has."""
    if draft_model is None:
        return ()
    checked = Drafting().check("draft_model", draft_model)
    parts: tuple[Model | Drafter, ...] = checked if isinstance(checked, tuple) else (checked,)
    for part in parts:
        registry.check(part)
        # A class that has a Drafter's methods is not a Drafter.
        if isinstance(part, type) or not isinstance(part, str | os.PathLike | torch.nn.Module | Drafter):
            raise TypeError(
                "draft_model must be a directory, a .gguf file, a name on the Hub, a transformers model or a Drafter "
                f"object, or a list of these, got {reprlib.repr(part)}"
            )
    return parts


def resolve_device(name: str) -> torch.device:
    """`auto` is CUDA where there is one."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ValueError(f"device must be 'auto', 'cpu' or 'cuda[:n]', got {name!r}") from None
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"device must be 'auto', 'cpu' or 'cuda[:n]', got {name!r}")
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"device={name!r}: no CUDA device is available")
    return device


def plan_max_seq_len(config: EngineConfig, spec: DecoderSpec) -> int:
    """The longest sequence: what is asked for, but never past the target's positions."""
    if config.max_seq_len is None:
        return spec.max_positions
    if config.max_seq_len > spec.max_positions:
        raise ValueError(
            f"max_seq_len={config.max_seq_len} exceeds the model's context of {spec.max_positions}"
        )
    return config.max_seq_len


def shared_vocab_size(target: LoadedModel, drafts: Collection[LoadedModel]) -> int:
    """Ids that may be emitted: the target's, never more than its tokenizer has, and every draft must agree."""
    num_shared = [check_compatible(target.vocabulary, draft.vocabulary) for draft in drafts]
    return min([num_usable_ids(target.vocabulary), *num_shared])


def open_model(source: Model, config: EngineConfig) -> Checkpoint:
    """A model's checkpoint, whose config has been read and checked."""
    checkpoint = open_checkpoint(source, revision=config.revision, allow_pickle=config.allow_pickle)
    _ = checkpoint.spec
    return checkpoint


def open_draft(draft_model: Model | Drafter, config: EngineConfig) -> Checkpoint | None:
    """The same for a draft model; None for whatever else drafts."""
    if isinstance(draft_model, Drafter) or registry.names_a_drafter(draft_model):
        return None
    return open_model(draft_model, config)


def plan_translation(
    target: Checkpoint, tokenizer: Tokenizer | None, draft: Checkpoint | None
) -> Translation | ByText | None:
    """What makes a draft model speak the target's vocabulary, if it has another, or `ByText`: it speaks its own;
    refuses a pair that cannot work.

    tokenizer: the target's, where it is not its checkpoint's
    """
    if draft is None:
        return None
    vocabulary = Vocabulary(target.name, target.spec.vocab_size, tokenizer or target.tokenizer)
    draft_vocabulary = Vocabulary(draft.name, draft.spec.vocab_size, draft.tokenizer)
    translation = translate(vocabulary, draft_vocabulary)
    if translation is None:
        check_compatible(vocabulary, draft_vocabulary)
    if isinstance(translation, ByText):
        check_texts(vocabulary, draft_vocabulary)
    return translation


def drafts_with_a_model(draft_model: Model | Drafter) -> bool:
    """Whether it has a head: a model, or layers of the target's."""
    if isinstance(draft_model, str) and registry.names_a_drafter(draft_model):
        return registry.split(draft_model)[0] not in registry.lookups()
    return not isinstance(draft_model, Drafter)


def config_for(config: EngineConfig, draft_model: DraftModel) -> EngineConfig:
    """Where many things draft in turn: without the options that say nothing of this one, which has no head."""
    if any(map(drafts_with_a_model, list_drafters(draft_model))):
        return config
    return replace(config, draft_vocab_size=None, draft_vocab_text=None)


def plan_heads(
    config: EngineConfig,
    drafters: Collection[Model | Drafter],
    target: Checkpoint,
    tokenizer: Tokenizer | None,
    drafts: Collection[Checkpoint | None],
    translations: Collection[Translation | ByText | None],
) -> list[tuple[int, ...] | None]:
    """The tokens that each drafter's head keeps, where the configuration leaves it some; None: all, or it has no head.

    tokenizer: the target's, where it is not its checkpoint's
    """
    size = config.draft_vocab_size
    if size is None:
        return [None] * len(drafters)
    if drafters and not any(map(drafts_with_a_model, drafters)):
        names = ", ".join(each if isinstance(each, str) else type(each).__name__ for each in drafters)
        raise ValueError(f"draft_vocab_size={size}: {names} drafts without a model, and so without a head")
    vocabulary = Vocabulary(target.name, target.spec.vocab_size, tokenizer or target.tokenizer)
    heads: list[tuple[int, ...] | None] = []
    for drafter, draft, translation in zip(drafters, drafts, translations, strict=True):
        if not drafts_with_a_model(drafter):
            heads.append(None)
            continue
        own = vocabulary
        if draft is not None:
            own = Vocabulary(draft.name, draft.spec.vocab_size, draft.tokenizer)
        pair = {"target": vocabulary, "draft": own}
        heads.append(choose_tokens(size, config.draft_vocab_text, **pair, translation=translation))
    return heads


def open_given_tokenizer(config: EngineConfig) -> Tokenizer | None:
    """The tokenizer that the configuration names; None leaves the target its own."""
    if config.tokenizer is None:
        return None
    return open_tokenizer(config.tokenizer, revision=config.revision)


def find_chat_template(checkpoint: Checkpoint, config: EngineConfig) -> str | ModelLoadError | None:
    """The template that a given tokenizer brings along, else the checkpoint's. What is wrong with its file is for those
    to hear who want to chat."""
    try:
        given = None
        if config.tokenizer is not None:
            given = given_chat_template(config.tokenizer, revision=config.revision)
        return checkpoint.chat_template if given is None else given
    except ModelLoadError as error:
        return error


def check_has_chat_template(model: Model, config: EngineConfig) -> None:
    """Raises what a chat with the model would, before it is loaded."""
    checkpoint = open_model(model, config)
    template = find_chat_template(checkpoint, config)
    if not isinstance(template, str):
        raise template or no_chat_template(checkpoint.name)


def no_chat_template(name: str) -> ChatTemplateError:
    """What is wrong with a model that cannot chat."""
    return ChatTemplateError(
        f"{name} has no chat template: it was not made for conversations; give one (chat_template=, --chat-template), "
        "or a model that has one"
    )


def load(
    checkpoint: Checkpoint,
    config: EngineConfig,
    *,
    weight_dtype: str,
    head_dtype: str,
    device: torch.device,
    backend: Backend,
    progress: Callable[[int, int], None],
    tokenizer: Tokenizer | None = None,
    num_layers: int | None = None,
    translation: Translation | None = None,
    head_tokens: Sequence[int] | None = None,
) -> LoadedModel:
    """Loads a model as an engine's configuration says; `weight_dtype="auto"` means the configuration's `dtype`."""
    return load_model(
        checkpoint,
        dtype="auto" if config.dtype == AUTO else getattr(torch, config.dtype),
        weight_dtype=weight_dtype,
        head_dtype=head_dtype,
        device=device,
        backend=backend,
        progress=progress,
        tokenizer=tokenizer,
        num_layers=num_layers,
        translation=translation,
        head_tokens=head_tokens,
    )


def build_kv_cache(
    target: LoadedModel,
    drafts: Collection[LoadedModel],
    config: EngineConfig,
    *,
    max_seq_len: int,
    device: torch.device,
) -> KVCache:
    """One cache for all models: the same block ids, a tensor each, the target's first.

    A context that nobody asked for is what there is memory for, if that is less than the model's.
    """
    models = [target, *drafts]
    dtypes = [model.decoder.weights.token_table.dtype for model in models]
    if config.kv_dtype != "auto":
        dtypes = [getattr(torch, config.kv_dtype)] * len(models)
    specs = [model.decoder.spec for model in models]
    if config.max_seq_len is None:
        block_bytes = config.block_size * sum(map(bytes_per_token, specs, dtypes))
        longest = max_seq_len
        max_seq_len, budget = limit_to_budget(longest, config, block_bytes, device)
        if budget:
            enough = (math.ceil(longest / config.block_size) + 1) * block_bytes
            warnings.warn(
                f"{target.name}: the context is {max_seq_len:,} tokens of the model's {longest:,}: more do not fit "
                f"into {budget}; kv_cache_bytes={enough:,} would do",
                stacklevel=level_of_caller(),
            )
    return KVCache(specs, dtypes, config, max_seq_len=max_seq_len, device=device)


def build_own_kv_cache(
    draft: LoadedModel, config: EngineConfig, *, max_seq_len: int, device: torch.device
) -> KVCache:
    """A cache for a draft that counts its own tokens. Each slot has room for as many as the draft has positions, as a
    text of the target's max_seq_len tokens takes, or as there is memory for."""
    dtype = draft.decoder.weights.token_table.dtype
    if config.kv_dtype != "auto":
        dtype = getattr(torch, config.kv_dtype)
    spec, size = draft.decoder.spec, config.block_size
    any_number, block_bytes = replace(config, num_blocks=None), size * bytes_per_token(spec, dtype)
    longest = min(spec.max_positions, _MAX_DRAFT_TOKENS_EACH * max_seq_len)
    longest, _ = limit_to_budget(longest, any_number, block_bytes, device)
    most = plan_num_blocks(any_number, block_bytes, longest, device)
    blocks = min(math.ceil(longest / size), (most - 1) // config.max_batch_size)
    if not blocks:
        raise InsufficientMemoryError(
            f"draft {draft.name!r} has a vocabulary of its own and so a KV cache of its own: {most} blocks are not "
            f"enough for max_batch_size={config.max_batch_size}"
        )
    own = replace(
        config, num_blocks=1 + blocks * config.max_batch_size, kv_cache_bytes=None, enable_prefix_cache=False
    )
    cache = KVCache([spec], [dtype], own, max_seq_len=min(longest, blocks * size), device=device)
    cache.reserve_all()
    return cache


@dataclass(frozen=True)
class DraftLoader:
    """Loads whatever drafts: see `LoadModel`.

    checkpoint, target: where the target was loaded from, and what came of it
    head_tokens: those that the drafter's head keeps (`plan_heads`)
    """

    checkpoint: Checkpoint
    target: LoadedModel
    config: EngineConfig
    device: torch.device
    backend: Backend
    progress: Callable[[int, int], None]
    head_tokens: Sequence[int] | None = None

    def __call__(self, source: Model) -> LoadedModel:
        """From a directory, a file, a Hub name or memory."""
        config = self.config
        return self._load(open_model(source, config), config.draft_weight_dtype, config.draft_head_dtype)

    def first_layers(self, num_layers: int) -> LoadedModel | None:
        """See `LoadModel`; "auto" is how the target has them."""
        config = self.config
        has_its_weights = config.draft_weight_dtype in (AUTO, self.target.weight_dtype)
        has_its_head = self.head_tokens is None and config.draft_head_dtype in (AUTO, config.head_dtype)
        if has_its_weights and has_its_head:
            return None
        weight_dtype, head_dtype = config.draft_weight_dtype, config.draft_head_dtype
        if has_its_weights:
            weight_dtype = config.weight_dtype
            head_dtype = config.head_dtype if head_dtype == AUTO else head_dtype
        return self._load(self.checkpoint, weight_dtype, head_dtype, self.target.tokenizer, num_layers)

    def _load(
        self,
        checkpoint: Checkpoint,
        weight_dtype: str,
        head_dtype: str,
        tokenizer: Tokenizer | None = None,
        num_layers: int | None = None,
    ) -> LoadedModel:
        return load(
            checkpoint,
            self.config,
            weight_dtype=weight_dtype,
            head_dtype=head_dtype,
            device=self.device,
            backend=self.backend,
            progress=self.progress,
            tokenizer=tokenizer,
            num_layers=num_layers,
            head_tokens=self.head_tokens,
        )


def build_contexts(
    given: Collection[Model | Drafter],
    drafts: Collection[LoadedModel | None],
    translations: Collection[Translation | ByText | None],
    describe: Callable[..., DrafterContext],
) -> list[DrafterContext]:
    """What each drafter may be built of. describe: a `DrafterContext` but for what differs from one to the next."""
    contexts: list[DrafterContext] = []
    for place, (each, draft, translation) in enumerate(zip(given, drafts, translations, strict=True)):
        name = each if isinstance(each, str) else ""
        index = DRAFT + sum(context.draft is not None for context in contexts)
        argument = registry.split(name)[1]
        own, foreign = (None, draft) if isinstance(translation, ByText) else (draft, None)
        models = {"draft": own, "foreign": foreign, "model_index": index}
        contexts.append(describe(name=name, argument=argument, place=place, **models))
    return contexts


def build_drafters(
    given: Collection[Model | Drafter], contexts: Collection[DrafterContext], config: EngineConfig
) -> RoundDrafter:
    """What drafts in the engine's rounds: the one, several as one, or nobody."""
    parts = [build_drafter(*each, config) for each in zip(given, contexts, strict=True)]
    if len(parts) > 1:
        return SeveralDrafters(parts)
    return parts[0] if parts else NoDrafter()


def build_drafter(given: Model | Drafter, context: DrafterContext, config: EngineConfig) -> RoundDrafter:
    """The drafter of a name or for a draft model, or the caller's own, which is checked from now on."""
    if context.foreign is not None:
        own = _build_retokenized(context.foreign, context, config)
        return HostDrafter(own, vocab_size=context.vocab_size)
    if isinstance(given, str) and registry.names_a_drafter(given):
        named = registry.build(given, context)
        return named if isinstance(named, RoundDrafter) else HostDrafter(named, vocab_size=context.vocab_size)
    if context.draft is not None:
        runner = ModelRunner(
            context.draft.decoder,
            context.kv_cache,
            model_index=context.model_index,
            vocab_size=context.vocab_size,
        )
        return DraftModelDrafter(
            runner,
            name=context.draft.name,
            chunk_size=context.chunk_size,
            place=context.place,
            is_recorded=context.is_recorded,
        )
    assert isinstance(given, Drafter), f"draft_model {given!r} was checked"
    return HostDrafter(given, vocab_size=context.vocab_size)


def _build_retokenized(
    draft: LoadedModel, context: DrafterContext, config: EngineConfig
) -> RetokenizedDrafter:
    target, tokenizer = context.target.tokenizer, draft.tokenizer
    assert target is not None, "what reads a text has a tokenizer"
    assert tokenizer is not None, "what reads a text has a tokenizer"
    cache = build_own_kv_cache(draft, config, max_seq_len=context.max_seq_len, device=context.kv_cache.device)
    sizes = {"vocab_size": context.vocab_size, "chunk_size": context.chunk_size}
    return RetokenizedDrafter(draft, tokenizer, target, cache, **sizes)


def build_recorder(config: EngineConfig, device: torch.device, backend_name: str) -> Recorder | None:
    """What records rounds, or None where they run from Python; `ValueError` where graphs are asked for in vain."""
    has_graphs = device.type == "cuda" and backend_name == "triton"
    if config.cuda_graphs is True and not has_graphs:
        raise ValueError(
            f"cuda_graphs=True needs backend='triton' on a CUDA device, got backend={backend_name!r} on {str(device)!r}"
        )
    return CudaRecorder(device) if has_graphs and config.cuda_graphs is not False else None


def resolve_rounds_ahead(config: EngineConfig, device: torch.device) -> int:
    """`auto`: one on CUDA, so that the device never waits for Python; none on a CPU, which does both."""
    if config.rounds_ahead == AUTO:
        return 1 if device.type == "cuda" else 0
    return int(config.rounds_ahead)
