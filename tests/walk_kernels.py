"""What the Triton kernel for compensated rounding must give: `check(...)`, and, run as a script, calls of both checks.

Nothing here is a test: `test_gpu.py` calls `check` on a GPU; `test_compiled.py` runs the script on a CPU, in Triton's
interpreter, which has to be asked for before Triton is imported.
"""

from unittest import mock

import torch

from bitladder.formats import FORMATS
from bitladder.formats.base import AS_STORED, Arithmetic
from bitladder.measuring import rounding, walking


def check(
    name: str,
    rows: int,
    width: int,
    device: str,
    least_equal: float = 1.0,
    size: float = 1.0,
    arithmetic: Arithmetic = AS_STORED,
) -> None:
    """Walk a weight [rows, width] by the kernel and by torch.

    Args:
        name: of the format.
        rows: of the weight.
        width: columns of the weight.
        device: on which.
        least_equal: this share of what is stored at least is the same; the error of the output is the same within 1%.
        size: standard deviation of the weight.
        arithmetic: of the device that will serve.
    """
    format_, generator = FORMATS[name].on(arithmetic), torch.Generator().manual_seed(1)
    weight = torch.randn(rows, width, generator=generator) * size
    weight[1] = 0
    weight[2] *= 1e-7  # beside scales of E4M3
    x = torch.randn(1000, width, generator=generator).cumsum(1)
    weight, products = weight.to(device), (x.t() @ x).to(device)
    amax = format_.amax_of(weight)
    columns = format_.columns(amax, rows)
    parts, errors = [], []
    nearest = format_.decode(format_.encode(weight, amax))
    for walk in (walking.walked, rounding.walked):
        with mock.patch.object(rounding, "walk_on", return_value=walk):
            found = rounding.compensated(weight, products, columns, 0.1)
            rounded = rounding.nearest(weight, columns)
        stored = columns.parts(rounded.values, rounded.scales) | format_.tensor_scales(amax)
        assert torch.equal(format_.decode(stored), nearest), (name, walk)
        parts.append(columns.parts(found.values, found.scales))
        errors += rounding.output_errors(weight, [found.values], x.to(device))
    for part, ours in parts[0].items():
        same = ours.view(torch.uint8) == parts[1][part].view(torch.uint8)
        assert float(same.float().mean()) >= least_equal, (name, part, float(same.float().mean()))
    assert abs(errors[0] / errors[1] - 1) < 0.01, (name, errors)


def check_order(name: str) -> None:
    """Walk a block on a CPU whose tensors lie otherwise in memory: the same, to the bit."""
    generator = torch.Generator().manual_seed(1)
    format_ = FORMATS[name]
    size = 2 * (format_.group_size or 16)  # columns of two groups, where there are any
    block = torch.randn(size, 3, generator=generator)
    local = torch.randn(size, size, generator=generator).triu() / 8 + torch.eye(size)
    weight = block.t()
    amax = format_.amax_of(weight)
    columns = format_.columns(amax, len(weight))
    apart = columns.knowing(torch.stack([columns.known] * 3, -1)[..., 1])  # each beside what isn't meant

    def turned(tensor: torch.Tensor) -> torch.Tensor:
        return tensor.mT.contiguous().mT

    factors = torch.tensor(columns.factors)
    chosen = walking.walked(block.clone(), local, columns, factors, None)
    given = walking.walked(block.clone(), local, columns, factors, chosen[2])
    for wanted, scales in ((chosen, None), (given, turned(chosen[2]))):
        found = walking.walked(turned(block), turned(local), apart, factors, scales)
        assert all(torch.equal(one, other) for one, other in zip(found, wanted, strict=True)), (name, scales)
    torch_ = rounding.walked(block.clone(), local, columns, factors, chosen[2])
    assert torch.allclose(given[0], torch_[0]), name


if __name__ == "__main__":
    for name in ("fp8_pc_pt", "int4_w4a16_asym_g64"):
        check_order(name)
    check("fp8", 17, 136, "cpu")
    # Whole groups, and few columns more than are walked at once.
    for name, width in (("fp8_pc_pt", 136), ("int8", 136), ("nvfp4", 144), ("mxfp8", 160)):
        check(name, 8, width, "cpu")
    for name in ("int4_w4a16_g64", "int4_w4a16_asym_g64"):
        check(name, 8, 192, "cpu")
    for size in (2.0**-80, 2.0**80):  # whose squares are no numbers
        check("int4_w4a16_g64", 3, 64, "cpu", size=size)
