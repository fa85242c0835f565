"""The models of measure/renumbered.py are what it says: the same function with other ids, also as an OPT.
And law E for the bundled pair, GPT-2's kind of tokenizer and all, when the target's ids are permuted."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import foreign_vocabulary
import numpy as np
import pytest
import torch
import transformers
from law_helpers import plain, spec
from test_law_e_distribution import ALPHA, p_value

from specengine import SamplingParams
from specengine.engine import Engine
from specengine.measure import renumbered
from specengine.measure.widened import BUNDLED, Shape

SHAPE = Shape(num_features=384, num_layers=9, num_heads=6, vocab_size=4200)
TEXT = "def binary_search(items, x):\n    low"


@torch.no_grad()
def logits_of(path: Path, ids: list[int]) -> torch.Tensor:
    model = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    return model(torch.tensor([ids])).logits[0]


@pytest.mark.parametrize("shape", [None, SHAPE], ids=["as it is", "opt"])
def test_a_renumbered_model_computes_the_same_function(shape: Shape | None, tmp_path: Path) -> None:
    out = tmp_path / "target"
    order = renumbered.build_foreign(out, shape, torch.float32)
    ids = transformers.AutoTokenizer.from_pretrained(BUNDLED / "target")(TEXT).input_ids
    new_ids = transformers.AutoTokenizer.from_pretrained(out)(TEXT).input_ids
    assert new_ids == [order[token] for token in ids] != ids
    found, expected = logits_of(out, new_ids), logits_of(BUNDLED / "target", ids)
    torch.testing.assert_close(found[:, order], expected, atol=1e-4, rtol=0.0)
    config = json.loads((out / "config.json").read_text())
    assert config["model_type"] == ("opt" if shape else "gpt2")
    assert config["eos_token_id"] == order[0]


def test_gpt2_drafts_for_an_opt_with_other_ids(tmp_path: Path) -> None:
    """As exactly as for the model that it came from."""
    out = tmp_path / "opt"
    order = renumbered.build_foreign(out, SHAPE, torch.float32)
    with (
        Engine(out, BUNDLED / "draft", dtype="float32") as engine,
        Engine(BUNDLED / "target", BUNDLED / "draft", dtype="float32") as usual,
    ):
        results = [
            spec(each, prompt, 4, max_new_tokens=40, ignore_eos=True)
            for each, prompt in ((engine, TEXT), (usual, TEXT))
        ]
        assert results[0].token_ids == plain(engine, TEXT, max_new_tokens=40, ignore_eos=True).token_ids
    assert results[0].token_ids == [order[token] for token in results[1].token_ids]
    found, expected = (result.metrics.speculative_decoding for result in results)
    assert found.num_accepted_draft_tokens == expected.num_accepted_draft_tokens > 0
    assert found.num_draft_tokens == expected.num_draft_tokens


def test_how_far_threshold_is_is_measured(tmp_path: Path) -> None:
    """Nothing is kept at 1, so nothing is lost; at 0.1 something is."""
    order = renumbered.permutation(4096)
    out = tmp_path / "target"
    assert renumbered.build_foreign(out, None, torch.float32) == order
    with Engine(out, dtype="float32") as engine:
        results = [plain(engine, TEXT, max_new_tokens=20, temperature=0.8, seed=1)]
    assert 0.01 < foreign_vocabulary.threshold_distance(results, order) < 0.9
    assert foreign_vocabulary.threshold_distance(results, order, threshold=1.0) == pytest.approx(
        0.0, abs=1e-9
    )


# -- law E ----------------------------------------------------------------------------------------------------------

NUM_LIKELY, NUM_JUDGED = 5, 3
Cell = tuple[int, ...]  # likely tokens, one after another; -1 for any other, which ends it


def cell_of(tokens: list[int], law: dict[Cell, float]) -> Cell:
    for length in range(1, NUM_JUDGED + 1):
        if (cell := tuple(tokens[:length])) in law:
            return cell
        if not any(other[:length] == cell for other in law):
            return (*cell[:-1], -1)
    raise AssertionError("unreachable")


@torch.no_grad()
def law_of_cells(path: Path, prompt: list[int]) -> dict[Cell, float]:
    """The likeliest texts of three tokens, and what is left out at each place."""
    model = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float64).eval()
    law: dict[Cell, float] = {}
    open_cells: dict[Cell, float] = {(): 1.0}
    for _ in range(NUM_JUDGED):
        longer: dict[Cell, float] = {}
        for cell, weight in open_cells.items():
            probs, tokens = model(torch.tensor([[*prompt, *cell]])).logits[0, -1].softmax(-1).topk(NUM_LIKELY)
            law[(*cell, -1)] = weight * (1 - float(probs.sum()))
            for token, prob in zip(tokens.tolist(), probs.tolist(), strict=True):
                longer[(*cell, token)] = weight * prob
        open_cells = longer
    return law | open_cells


@pytest.mark.slow
@pytest.mark.parametrize("acceptance", ["rejection", "coupled"])
def test_the_bundled_draft_for_a_permuted_target_samples_its_law(acceptance: str, tmp_path: Path) -> None:
    """At temperature 1, four at a time: the first token is the prompt's, the next two are drafted."""
    out = tmp_path / "target"
    renumbered.build_foreign(out, None, torch.float32)
    prompt = transformers.AutoTokenizer.from_pretrained(out)("import os\nimport").input_ids
    law = law_of_cells(out, prompt)
    assert abs(sum(law.values()) - 1) < 1e-9
    counts: Counter[Cell] = Counter()
    num_accepted = num_rejected = 0
    with Engine(out, BUNDLED / "draft", dtype="float32", max_batch_size=4) as engine:
        params = [
            SamplingParams(
                temperature=1.0,
                seed=seed,
                acceptance=acceptance,
                max_new_tokens=NUM_JUDGED + 1,
                num_speculative_tokens=2,
                ignore_eos=True,
            )
            for seed in range(5_000)
        ]
        for result in engine.generate([prompt] * len(params), params):
            counts[cell_of(result.token_ids, law)] += 1
            num_accepted += result.metrics.speculative_decoding.num_accepted_draft_tokens
            num_rejected += sum(result.metrics.speculative_decoding.rejection_positions)
    assert min(num_accepted, num_rejected) > 0
    cells = sorted(law)
    value = p_value(np.array([counts[cell] for cell in cells]), np.array([law[cell] for cell in cells]))
    assert value > ALPHA, f"chi-square p = {value:.3g}"
    permuted = np.array([law[cell] for cell in cells[1:] + cells[:1]])
    assert p_value(np.array([counts[cell] for cell in cells]), permuted) < ALPHA
