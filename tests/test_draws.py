"""Networks that draw random numbers while they answer: compared all the same, and written as what they are."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import assert_close, images, random_plans
from torch import Tensor, nn
from torch.nn import functional as F

from gnnrl_gym import PrunableNetwork
from gnnrl_gym.export import export_onnx, export_program
from gnnrl_gym.pruning.draws import Still, seeded

X = images(1, 3, 8, 8)


class Drawing(nn.Module):
    """`between` draws; with `counting` a factor is the number of channels, which no rule sees."""

    def __init__(self, between: Callable[[Tensor], Tensor], counting: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.between, self.counting = between, counting
        self.a, self.b, self.head = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 6, 3), nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.between(self.a(x).relu())
        x = x / x.shape[1] if self.counting else x
        return self.head(self.b(x).relu().mean((2, 3)))


DRAWS: dict[str, Callable[[Tensor], Tensor]] = {
    "dropout": lambda x: F.dropout(x, 0.5, training=True),
    "dropout of channels": lambda x: F.dropout2d(x, 0.5, training=True),
    "noise": lambda x: x + torch.randn(1, 1, 8, 8),
    "a mask": lambda x: x * torch.bernoulli(torch.full((1, 1, 8, 8), 0.5)),
    "in place": lambda x: x * torch.empty(1, 1, 8, 8).uniform_(),
    "a generator of its own": lambda x: x + torch.rand(1, 1, 8, 8, generator=torch.Generator()),
}


def warned(make: Callable[[], PrunableNetwork]) -> tuple[PrunableNetwork, list[str]]:
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        network = make()
    return network, [str(w.message) for w in said if "number of channels" in str(w.message)]


OWN = "a generator of its own"
OLD = pytest.mark.skipif(
    torch.torch_version.TorchVersion(torch.__version__) < (2, 14), reason="torch.export of torch 2.11 refuses it"
)


@pytest.mark.parametrize("name", [pytest.param(name, marks=[OLD] if name == OWN else []) for name in DRAWS])
def test_what_is_drawn_neither_freezes_nor_hides_anything(name: str) -> None:
    network, said = warned(lambda: PrunableNetwork(Drawing(DRAWS[name]), X))
    assert network.widths.tolist() == [8, 6] and not said
    network, said = warned(lambda: PrunableNetwork(Drawing(DRAWS[name], counting=True), X))
    assert network.widths.tolist() == [6] and len(said) == 1 and "channels of 'a' (" in said[0]


def test_slim_equals_mask_but_for_what_is_drawn() -> None:
    network = PrunableNetwork(Drawing(DRAWS["noise"]), X)
    for plan in random_plans(network, 4):
        found = []
        for module in (network.slim(plan), network.mask(plan)):
            with torch.no_grad(), seeded([]):
                found.append([module.eval()(X)])
        assert_close(*found, 1e-5)


def test_attention_that_drops_nothing_is_compared() -> None:
    """Its operation might draw, by torch's tags."""
    query = images(1, 2, 5, 4)
    answer = F.scaled_dot_product_attention(query, query, query)
    with torch.no_grad(), Still([]):
        assert_close([F.scaled_dot_product_attention(query, query, query)], [answer], 1e-6)
        assert (F.dropout(query, 0.9, training=True) != 0).all()


def test_draws_are_their_probability_or_a_half() -> None:
    share = torch.tensor([0.1, 0.7])
    with Still([]):
        assert torch.equal(torch.bernoulli(share), share)
        torch.bernoulli(share).zero_()  # a tensor of its own
        assert share.all()
        assert torch.equal(torch.normal(share, 1.0), share)
        assert torch.rand_like(share).tolist() == torch.randn(2).tolist() == [0.5, 0.5]
        assert torch.rand(2, generator=torch.Generator()).tolist() == [0.5, 0.5]
        assert share.clone().exponential_().tolist() == [0.5, 0.5] and torch.randint(9, (2,)).tolist() == [0, 0]


def test_global_randomness_is_left_alone() -> None:
    models = [Drawing(between) for name, between in DRAWS.items() if name != OWN]
    state = torch.get_rng_state()
    for model in models:
        PrunableNetwork(model, X)
    assert torch.equal(torch.get_rng_state(), state)


def test_what_others_draw_is_said() -> None:
    class Numpy(Drawing):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) * float(rng.random())

    rng = np.random.default_rng(0)
    with pytest.warns(UserWarning, match="Numpy gives something else each time, .* Draw random numbers by torch"):
        PrunableNetwork(Numpy(lambda x: x), X)


def test_it_is_exported(tmp_path: Path) -> None:
    model = Drawing(DRAWS["noise"]).eval()
    slim = PrunableNetwork(model, X).slim([3, 2])
    state = torch.get_rng_state()
    export_program(slim, X, tmp_path / "drawing.pt2")
    if find_spec("onnx") and find_spec("onnxscript"):
        assert not export_onnx(slim, X, tmp_path / "drawing.onnx")  # onnxruntime draws in its own way
    assert torch.equal(torch.get_rng_state(), state)
    program: Any = torch.export.load(tmp_path / "drawing.pt2").module()
    answers = []
    for each in (program, slim):
        with seeded([]), torch.no_grad():
            answers.append(each(X))
    assert torch.equal(*answers)
