"""Is the slim network the masked one, and does it cost what was said?"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.registry import Benchmark, Options, markdown_table, of_model
from gnnrl_gym import PrunableNetwork
from gnnrl_gym.zoo import load_model
from gnnrl_gym.zoo.models import input_shape_for

NETWORKS = (
    "digits-resnet", "resnet20", "resnet32", "resnet44", "resnet56", "resnet110", "vgg11_bn", "vgg16_bn",
    "mobilenet_v2", "resnet18", "resnet50", "shufflenet_v2_x1_0",
)  # fmt: skip
PLANS = 20


def run(options: Options) -> dict[str, Any]:
    """Every network named above, with random BatchNorm statistics, at random plans of any cost."""
    names = [options.model] if options.model else NETWORKS
    return {"plans": PLANS, "rows": [_measure(name, options.seed) for name in names]}


def _measure(name: str, seed: int) -> dict[str, Any]:
    torch.manual_seed(seed)
    model = load_model(name, weights="random", seed=seed)
    randomise_statistics(model)
    channels, size, _ = input_shape_for(name)
    x = torch.randn(1, channels, min(size, 64), min(size, 64))
    network, rng = PrunableNetwork(model, x), np.random.default_rng(seed)
    full, dense_macs = network.widths, network.macs(network.widths)
    checks = [_check(network, rng.integers(1, full + 1), x) for _ in range(PLANS)]
    with torch.no_grad():
        same = torch.equal(network.slim(full).eval()(x), model(x))
    return {
        "network": name,
        "groups": len(full),
        "units": int(full.sum()),
        "prunable_macs_share": 1 - network.macs(np.ones_like(full)) / dense_macs,
        "largest_relative_error": max(error for error, _, _ in checks),
        "macs_mismatches": sum(not macs for _, macs, _ in checks),
        "params_mismatches": sum(not params for _, _, params in checks),
        "full_widths_identical": same,
    }


@torch.no_grad()
def _check(network: PrunableNetwork, plan: np.ndarray, x: torch.Tensor) -> tuple[float, bool, bool]:
    """Relative error of slim against mask; whether MACs and parameters are those of the built network."""
    slim, mask = network.slim(plan).eval(), network.mask(plan).eval()
    expected = mask(x)
    with FlopCounterMode(display=False) as counter:
        found = slim(x)
    error = float((found - expected).abs().max() / expected.abs().max())
    params = sum(p.numel() for p in slim.parameters())
    return error, counter.get_total_flops() == 2 * network.macs(plan), params == network.params(plan)


def randomise_statistics(model: nn.Module) -> None:
    """Fresh BatchNorms are the identity and would hide mistakes in their vectors."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, std=0.1)
            module.running_mean.normal_(0, 0.1)  # type: ignore[union-attr]
            module.running_var.uniform_(0.5, 2)  # type: ignore[union-attr]


def table(record: dict[str, Any]) -> str:
    """A row per network."""
    header = ["network", "groups", "units", "MACs in reach", "largest error", "MACs off", "params off", "full = dense"]
    rows = [
        [
            row["network"],
            str(row["groups"]),
            str(row["units"]),
            f"{row['prunable_macs_share']:.1%}",
            f"{row['largest_relative_error']:.1e}",
            f"{row['macs_mismatches']} of {record['plans']}",
            f"{row['params_mismatches']} of {record['plans']}",
            "yes" if row["full_widths_identical"] else "NO",
        ]
        for row in record["rows"]
    ]
    return markdown_table(header, rows)


BENCHMARK = Benchmark("slimming-exactness", "slim against mask, cost against a counter", run, table, of_model)
