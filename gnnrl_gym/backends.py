"""GPUs: which ones something is on, and what torch's libraries may do there for a while."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves


def gpus_of(values: Iterable[Any]) -> list[int]:
    """Numbers of the GPUs among `values`, however nested: of devices themselves, and of tensors that are on one."""
    devices = [x.device if isinstance(x, Tensor) else x for x in tree_leaves(list(values))]
    found = {x.index for x in devices if isinstance(x, torch.device) and x.type == "cuda"}
    return sorted({torch.cuda.current_device() if index is None else index for index in found})


@contextmanager
def without_cudnn(model: nn.Module | None = None) -> Iterator[None]:
    """Recurrent layers by torch's own operations. cuDNN's can't be counted or traced without memory, have no gradient
    in eval mode, and no second one. A `model` that has none of them keeps it."""
    cudnn: Any = torch.backends.cudnn
    usual = cudnn.enabled
    cudnn.enabled = usual and model is not None and not any(isinstance(m, nn.RNNBase) for m in model.modules())
    try:
        yield
    finally:
        cudnn.enabled = usual


@contextmanager
def full_precision(gpus: list[int]) -> Iterator[None]:
    """No TF32 on `gpus`, where there are any: it would be used for some widths and not for others, and round like a
    mistake."""
    cudnn: Any = torch.backends.cudnn
    parts: Any = (cudnn.conv, cudnn.rnn, torch.backends.cuda.matmul) if gpus else ()
    precisions, strict = [part.fp32_precision for part in parts], cudnn.deterministic
    try:
        for part in parts:  # cudnn.flags would raise where the caller has set these
            part.fp32_precision = "ieee"
        cudnn.deterministic = strict or bool(gpus)
        yield
    finally:
        for part, precision in zip(parts, precisions, strict=True):
            part.fp32_precision = precision
        cudnn.deterministic = strict
