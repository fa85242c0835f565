"""Every instruction set of the processor is tested; the default one comes back afterwards."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from kernel_cases import INSTRUCTION_SETS

from specengine import _C


@pytest.fixture(params=INSTRUCTION_SETS)
def instruction_set(request: pytest.FixtureRequest) -> Iterator[str]:
    _C.set_instruction_set(request.param)
    yield request.param
    _C.set_instruction_set("auto")
