"""The largest magnitudes over everything that was seen: exact, whatever was seen together."""

import math

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from bitladder.formats.grids import amax_of
from bitladder.measuring.amax import RunningAmax

SEEN = [  # which tensors come in which of several passes, in which order
    pytest.param([["a", "b", "c"]] * 4, id="the same in every pass"),
    pytest.param([["a", "b"], ["b", "c"], ["c", "a", "b"], ["b"]], id="others in every pass"),
    pytest.param([["a", "a", "b"], ["b", "a", "a"]], id="one twice in a pass"),
]


@pytest.mark.parametrize("passes", SEEN)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_largest_of_all_is_kept(passes, dtype):
    generator = torch.Generator().manual_seed(0)
    running, largest = RunningAmax(), {}
    for number, names in enumerate(passes):
        for name in names:
            values = (torch.randn(3, 4, 5, generator=generator) * (number % 3 + 1)).to(dtype)
            running.see(name, amax_of(values))
            largest[name] = max(largest.get(name, 0.0), float(values.abs().max()))
    found = running.values()
    assert {name: float(value) for name, value in found.items()} == largest
    assert {value.dtype for value in found.values()} == {torch.float32}
    assert {name: float(value) for name, value in running.values().items()} == largest  # asking changes nothing


def test_magnitudes_of_rows_and_blocks_go_with_those_of_tensors():
    running = RunningAmax()
    for passed in (1.0, 3.0, 2.0):
        running.see("tensor", torch.tensor(passed))
        running.see("rows", torch.tensor([passed, 2.5, -0.0], dtype=torch.bfloat16))
        running.see("blocks", torch.tensor([[1 / passed]]))
    found = running.values()
    assert {name: value.tolist() for name, value in found.items()} == {
        "tensor": 3.0,
        "rows": [3.0, 2.5, 0.0],
        "blocks": [[1.0]],
    }
    assert {value.dtype for value in found.values()} == {torch.float32}


def test_tensors_of_other_types_go_together():
    running = RunningAmax()
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        running.see(dtype, amax_of(torch.tensor([0.1, -0.7], dtype=dtype)))
    assert {key: float(value) for key, value in running.values().items()} == {
        dtype: float(torch.tensor(0.7, dtype=dtype)) for dtype in (torch.float32, torch.bfloat16, torch.float16)
    }


def test_nan_stays():
    running = RunningAmax()
    for value in (1.0, math.nan, 2.0):
        running.see("a", amax_of(torch.tensor([0.5, value])))
    assert math.isnan(running.values()["a"])


def test_a_pass_is_compared_at_once():
    class Counting(TorchDispatchMode):
        count = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            self.count += 1
            return function(*args, **(kwargs or {}))

    magnitudes, running = torch.ones(100).unbind(), RunningAmax()
    with Counting() as counting:
        for _ in range(10):
            for key, value in enumerate(magnitudes):
                running.see(key, value)
    assert counting.count <= 3 * 10
