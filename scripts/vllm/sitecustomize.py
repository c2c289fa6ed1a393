"""Makes `import torchvision` work beside a CPU torch where torchvision is a CUDA build, whose extension can't load.

`make vllm-env` copies this file into vLLM's environment if it is needed there. torchvision registers meta kernels for
operators that its extension declares; declaring them is enough for its image transforms.
"""

import contextlib

with contextlib.suppress(ImportError):
    import torch

    for _operator in ("nms", "qnms"):
        torch.library.define(f"torchvision::{_operator}", "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
