"""What stands between the tests of kernels and a GPU: a backend that works on copies of its arguments."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple, cast

import pytest
import torch
from kernel_cases import OnDevice
from torch import Tensor

from specengine.ops.backend import Backend


class Plan(NamedTuple):
    start: Tensor
    size: int


@dataclass(frozen=True)
class Packed:
    weight: Tensor
    plan: Plan | None = None


def one() -> Tensor:
    return torch.ones(2, 3)


CONTAINERS = [one(), Plan(one(), 3), (one(), 1), [one(), None], {"a": one()}, Packed(one(), Plan(one(), 7))]


class Stub:
    """Its op gives back what it is given, and remembers it."""

    name = "stub"
    has_padding = True
    seen: Any = None

    def op(self, *values: Any, **named: Any) -> Any:
        self.seen = values, named
        return values[0] if values else None

    def fill(self, holder: Any) -> None:
        self.op(holder)
        holder.weight.fill_(5)


def same(value: Any, other: Any) -> bool:
    """Equal values in containers of the same types."""
    if type(value) is not type(other):
        return False
    if isinstance(value, Tensor):
        return torch.equal(value, other)
    if isinstance(value, Packed):
        return same(vars(value), vars(other))
    if isinstance(value, dict):
        return value.keys() == other.keys() and all(same(each, other[key]) for key, each in value.items())
    if isinstance(value, tuple | list):
        return len(value) == len(other) and all(map(same, value, other))
    return bool(value == other)


@pytest.mark.parametrize("value", CONTAINERS, ids=lambda value: type(value).__name__)
def test_a_container_of_tensors_keeps_its_type_both_ways(value: Any) -> None:
    stub = Stub()
    backend = cast(Any, OnDevice(cast(Backend, stub)))
    result = backend.op(value, named=value)
    (seen,), named = stub.seen
    assert same(seen, value)
    assert same(named["named"], value)
    assert same(result, value)
    assert seen is not value, "the op works on copies"


def test_what_an_op_writes_comes_back_whatever_holds_it() -> None:
    backend = cast(Any, OnDevice(cast(Backend, Stub())))
    columns = torch.zeros(3, 2).t()
    backend.fill(Packed(columns))
    assert torch.equal(columns, torch.full((2, 3), 5.0))


def test_a_tensor_that_is_given_twice_is_one() -> None:
    stub, tensor = Stub(), one()
    cast(Any, OnDevice(cast(Backend, stub))).op(tensor, Packed(tensor))
    first, packed = stub.seen[0]
    assert first is packed.weight
    assert first is not tensor


def test_what_is_no_op_is_the_backends_own() -> None:
    assert cast(Any, OnDevice(cast(Backend, Stub()))).has_padding is True
