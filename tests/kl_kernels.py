"""What the Triton kernels for the KL of logits must give: `check(...)`, and, run as a script, several calls of it.

Nothing here is a test: `test_gpu.py` calls `check` on a GPU; `test_compiled.py` runs the script on a CPU, in Triton's
interpreter, which has to be asked for before Triton is imported.
"""

import torch

from bitladder.measuring import kernels


def check(logits: torch.Tensor, others: torch.Tensor) -> None:
    """Compare the kernels with float64 on two sets of logits, [rows, vocabulary]."""
    p, q = (torch.log_softmax(values.double(), -1) for values in (logits, others))
    normaliser = kernels.normalisers(logits)
    torch.testing.assert_close(normaliser.double(), logits.double().logsumexp(-1), rtol=1e-6, atol=1e-6)
    found = kernels.kl_of_rows(logits, normaliser, others)
    torch.testing.assert_close(found, (p.exp() * (p - q)).sum(-1), rtol=1e-5, atol=0)
    turned, others_turned = (values.t().contiguous().t() for values in (logits, others))  # otherwise in memory
    assert torch.equal(kernels.normalisers(turned), normaliser)
    assert torch.equal(kernels.kl_of_rows(turned, normaliser, others_turned), found)


if __name__ == "__main__":
    generator = torch.Generator().manual_seed(0)
    for difference in (1e-2, 1.0, 30.0, 200.0):
        for dtype in (torch.float32, torch.bfloat16):
            logits = (5 * torch.randn(3, 9001, generator=generator)).to(dtype)
            check(logits, (logits + difference * torch.randn(3, 9001, generator=generator)).to(dtype))
