"""Which precision candidates are scored in."""

from __future__ import annotations

import torch

from gnnrl_gym.evaluation.threads import SMALL
from gnnrl_gym.pruning.network import PrunableNetwork

PRECISIONS = ("auto", "float32", "bfloat16")


def fitting_dtype(precision: str, network: PrunableNetwork, device: torch.device) -> torch.dtype:
    """ "auto" is bfloat16 where the processor computes in it and the network is not tiny: scores then move by a few
    tenths of a percent, less than the sampling error of the images, and cost a good half (ResNet-20 on an EPYC:
    0.49 s for 0.82 s).

    Raises:
        ValueError: an unknown precision.
    """
    if precision not in PRECISIONS:
        raise ValueError(f"Unknown precision {precision!r}: choose one of {', '.join(PRECISIONS)}.")
    if precision != "auto":
        return torch.bfloat16 if precision == "bfloat16" else torch.float32
    worth = network.macs(network.widths) >= SMALL and _has_bfloat16(device)
    return torch.bfloat16 if worth else torch.float32


def _has_bfloat16(device: torch.device) -> bool:
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return bool(getattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)())
