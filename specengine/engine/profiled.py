"""An engine that starts from a profile: is it of this model, and what of it holds on this machine."""

from __future__ import annotations

import hashlib
import platform
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from specengine.adaptive import Chooser, Known, KnownRound
from specengine.config import EngineConfig
from specengine.kernels.types.grouped import numbers
from specengine.models.checkpoints import Checkpoint
from specengine.ops.threads import default_num_threads
from specengine.profiles import Measured, Profile, key_of, read_profile, with_models

# Rows of the one matrix that counts for a checkpoint's identity.
_NUM_ROWS = 64


def identify(checkpoint: Checkpoint) -> str:
    """The same for the same weights, wherever they lie: a digest of the config, all vectors, and rows of one matrix."""
    source = checkpoint.tensors
    digest = hashlib.sha256(repr(checkpoint.spec).encode())
    floats = {name: info for name, info in source.tensors.items() if info.dtype is not None}
    vectors = sorted(name for name, info in floats.items() if len(info.shape) == 1)
    matrices = sorted((info.num_bytes, name) for name, info in floats.items() if len(info.shape) == 2)
    for name in [*vectors, *(name for _, name in matrices[:1])]:
        digest.update(name.encode())
        rows = source.load(name)[slice(_NUM_ROWS if name not in vectors else None)]
        digest.update(numbers(rows).detach().float().contiguous().cpu().numpy().tobytes())
    return digest.hexdigest()[:32]


def describe_machine(device: torch.device, num_threads: int | None) -> dict[str, str]:
    """What times depend on. num_threads: as in `EngineConfig`"""
    threads = default_num_threads() if num_threads is None else num_threads
    machine = {"processor": _processor(), "threads": str(threads)}
    if device.type == "cuda":
        machine["gpu"] = torch.cuda.get_device_name(device)
    return machine


def _processor() -> str:
    path = Path("/proc/cpuinfo")
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines() if path.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def describe_precision(
    config: EngineConfig, weight_dtype: str, device: torch.device, backend: str
) -> dict[str, str]:
    """How the target computes. weight_dtype: of its linear layers, as loaded"""
    return {"dtype": weight_dtype, "kv_dtype": config.kv_dtype, "device": device.type, "backend": backend}


def apply(
    config: EngineConfig | None, model: Any, draft_model: Any, config_fields: dict[str, Any]
) -> tuple[Profile | None, Any, Any, dict[str, Any]]:
    """The profile that an engine is given, if it is, and the engine's arguments with what it recommends. A `config` is
    complete: nothing is added to it, nor is there another drafter than was given with it."""
    path = config_fields.get("profile") if config is None else config.profile
    if path is None:
        return None, model, draft_model, config_fields
    path = EngineConfig(profile=path).profile
    assert path is not None, "it was checked"
    profile = read_profile(path)
    if config is not None:
        return profile, model, draft_model, config_fields
    options = with_models(profile, {**config_fields, "model": model, "draft_model": draft_model})
    return profile, options.pop("model"), options.pop("draft_model"), options


def keys_of(names: Sequence[str], checkpoints: Sequence[Checkpoint | None]) -> list[str]:
    """By which a profile knows an engine's drafters: see `profiles.key_of`."""
    pairs = zip(names, checkpoints, strict=True)
    return [name if checkpoint is None else identify(checkpoint) for name, checkpoint in pairs]


def check(profile: Profile, target: Checkpoint, drafts: Sequence[Checkpoint | None]) -> None:
    """Raises `ValueError` where the profile is of another target, or where a measured draft model has other weights by
    now."""
    if identify(target) != profile.identity:
        raise ValueError(
            f"the profile is of another model ({profile.model}) than {target.name}: their weights differ; make one for "
            "this model with `specengine tune`"
        )
    for draft in drafts:
        same_place = [each for each in profile.drafters if draft is not None and each.name == draft.name]
        if draft is not None and same_place and identify(draft) not in {each.identity for each in same_place}:
            raise ValueError(
                f"the profile is of another draft model than what is in {draft.name} now: their weights differ; make "
                "it again with `specengine tune`"
            )


def list_differences(profile: Profile, machine: Mapping[str, str], precision: Mapping[str, str]) -> list[str]:
    """What differs from where the profile was made, in words."""
    pairs = [(profile.machine, machine), (profile.precision, precision)]
    return [
        f"{name.replace('_', ' ')}: {there.get(name, 'none')}, here {here.get(name, 'none')}"
        for there, here in pairs
        for name in sorted({*there, *here})
        if there.get(name) != here.get(name)
    ]


def begin(
    chooser: Chooser,
    profile: Profile,
    keys: Sequence[str],
    *,
    draft_weight_dtype: str,
    machine: Mapping[str, str],
    precision: Mapping[str, str],
) -> None:
    """ "auto" starts from the profile: from its costs where they hold here, with a warning where not, and from its
    acceptance.

    keys: of the engine's drafters, in their order: see `profiles.key_of`
    """
    found: dict[int, Measured] = {}
    for part, key in enumerate(keys):
        same = [each for each in profile.drafters if each.draft_model and key_of(each) == key]
        same.sort(key=lambda each: each.draft_weight_dtype != draft_weight_dtype)
        if same:
            found[part] = same[0]
    rounds: dict[int | None, list[KnownRound]] = {}
    if differences := list_differences(profile, machine, precision):
        warnings.warn(
            f"the profile was made elsewhere ({'; '.join(differences)}): its times are not used, and what it "
            "recommends may not be the best here; make one with `specengine tune`",
            stacklevel=4,
        )
    else:
        rounds[None] = _rounds(profile.drafters[0])
        rounds.update(
            {
                part: _rounds(measured)
                for part, measured in found.items()
                if measured.draft_weight_dtype == draft_weight_dtype
            }
        )
    known = {part: Known(each.acceptance, each.num_judged) for part, each in found.items()}
    chooser.begin_with(rounds, known)


def _rounds(measured: Measured) -> list[KnownRound]:
    return [
        KnownRound(each.batch_size, each.k, each.rows, each.seconds, each.draft, each.verify)
        for each in measured.rounds
    ]
