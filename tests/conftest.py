"""What several test files share: one thread, weights that make comparisons real, plans, a small environment."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from gnnrl_gym import PrunableNetwork

torch.set_num_threads(1)  # tests run side by side, and results don't depend on how many cores there are

Network = PrunableNetwork


def randomise(model: nn.Module, seed: int = 0) -> Any:
    """Random BatchNorm statistics and affine parameters, in place. Freshly made ones (mean 0, variance 1, scale 1,
    bias 0) hide a channel that is normalised with another's statistics."""
    generator = torch.Generator().manual_seed(seed)
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            for tensor, low, high in (
                (module.running_mean, -0.5, 0.5), (module.running_var, 0.5, 1.5),
                (module.weight, 0.5, 1.5), (module.bias, -0.5, 0.5),
            ):  # fmt: skip
                if tensor is not None:
                    tensor.data.uniform_(low, high, generator=generator)
    return model


def images(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def random_plans(network: Network, count: int, seed: int = 0) -> np.ndarray:
    """Plans [count, A]: one unit of everything, all but one unit, then random ones."""
    rng, full = np.random.default_rng(seed), network.widths
    plans = rng.integers(1, full + 1, (count, len(full)))
    plans[0], plans[1 % count] = 1, np.maximum(full - 1, 1)
    return plans


@torch.no_grad()
def outputs(module: nn.Module, *x: Tensor) -> list[Tensor]:
    """All output tensors in eval mode."""
    return list(tree_leaves(module.eval()(*x)))


def assert_close(found: list[Tensor], expected: list[Tensor], tolerance: float = 1e-4) -> None:
    """Equal but for rounding, relative to the largest value of each tensor."""
    for a, b in zip(found, expected, strict=True):
        assert a.shape == b.shape
        assert (a - b).abs().max() <= tolerance * b.abs().max() + 1e-7


# torch 2.11 and older pass over it
_NOT_KNOWN_TO_OLD = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: lambda q, k, v, *_, **__: (
        2 * q[0] * q[1] * q[2] * k[2] * (q[3] + v[3])
    )
}


@torch.no_grad()
def counted_macs(module: nn.Module, *x: Tensor) -> int:
    """Half of what PyTorch's own counter finds."""
    with FlopCounterMode(display=False, custom_mapping=_NOT_KNOWN_TO_OLD) as counter:
        module.eval()(*x)
    return int(counter.get_total_flops()) // 2


def count_params(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


# torch 2.9 traces no network that assigns tensors to attributes of its own, and not every `*inputs`
old_export = pytest.mark.skipif(
    torch.torch_version.TorchVersion(torch.__version__) < (2, 10), reason="torch.export of torch 2.9 refuses these"
)


def exact_network(model: nn.Module, *x: Tensor, plans: int = 8, warns: str | None = None, **settings: Any) -> Network:
    """A `PrunableNetwork` of `model` on which slim equals mask, and costs equal those of the slim network, on random
    plans. `warns`: what its warning has to match; without it, it may not warn."""
    randomise(model)
    if warns:
        with pytest.warns(UserWarning, match=warns):
            network = PrunableNetwork(model, x, **settings)
    else:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            network = PrunableNetwork(model, x, **settings)
    for plan in random_plans(network, plans):
        slim = network.slim(plan)
        assert_close(outputs(slim, *x), outputs(network.mask(plan), *x))
        assert network.macs(plan) == counted_macs(slim, *x)
        assert network.params(plan) == count_params(slim)
    return network


@pytest.fixture(scope="session")
def digits_env() -> Iterator[gym.Env[Any, Any]]:
    """The default environment with few images. Tests leave it with no budget option of theirs."""
    env = gym.make("GNNRL-Prune-v0", search_images=100, recalibration_images=64, device="cpu")
    yield env
    env.close()
