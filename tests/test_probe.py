"""Numbers of channels that only a comparison of slim and mask shows: what is frozen, and what is not for its sake."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from conftest import assert_close, counted_macs, images, random_plans
from test_hostile import Mixer, Small, X, tensors
from torch import Tensor, nn
from torch.nn import functional as F

from gnnrl_gym import PrunableNetwork
from gnnrl_gym.pruning import adapting


def swapped(x: Tensor) -> Tensor:
    return torch.cat([x[:, 4:], x[:, :4]], 1)


class Written(Small):
    """The function `between` in the network's own forward: nothing there is replaced by its traced graph."""

    def forward(self, x: Tensor) -> Any:
        return self.after(self.head(self.second(self.mixer.function(self.first(x))).relu().mean((2, 3))))


def zero(layer: Any) -> None:
    nn.init.zeros_(layer.weight)


class Scaled(nn.Module):
    """Divides by a number of channels, which no operation of the trace holds."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b, self.c = nn.Linear(16, 32), nn.Linear(32, 24), nn.Linear(24, 4)

    def forward(self, x: Tensor) -> Tensor:
        for layer in (self.a, self.b):
            x = (layer(x) / layer.in_features**0.5).relu()
        return self.c(x)


class Branch(nn.Module):
    """A projection where the shapes differ, and none where they agree."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem, self.a, self.down = (nn.Conv2d(i, o, 3, padding=1) for i, o in ((3, 8), (8, 12), (8, 12)))
        self.head = nn.Conv2d(12, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        y = self.a(x)
        return self.head((y + (x if x.shape == y.shape else self.down(x))).relu())


class Counting(nn.Module):
    """`count` computes with how many channels there are; many of them hide it."""

    def __init__(self, count: Callable[[Tensor, int], Tensor]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.count = count
        self.a, self.b, self.head = nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(16, 16, 3), nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x).relu()
        y = self.b(self.count(y, y.shape[1])).relu()
        return self.head(y.mean((2, 3)))


class Positive(Counting):
    """One number of one sample, past a ReLU: zero for every other draw of weights."""

    def __init__(self, sign: int) -> None:
        super().__init__(lambda y, c: y / c)
        self.sign, self.head = sign, nn.Linear(16, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return (self.sign * super().forward(x)).relu()


def interleaved(x: Tensor) -> Tensor:
    return torch.cat([x[:, ::2], x[:, 1::2]], 1)


class Labels(Counting):
    """A label for every position."""

    def __init__(self, between: Callable[[Tensor], Tensor]) -> None:
        super().__init__(lambda y, c: between(y))
        self.head = nn.Conv2d(16, 5, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.b(self.count(self.a(x).relu(), 0)).relu()
        return self.head(y).argmax(1)


def slightly() -> Counting:
    return Counting(lambda y, c: y * c**-0.01)


class Scales(Counting):
    """Boxes in pixels, and beside them small numbers that a count of channels is part of."""

    def __init__(self) -> None:
        super().__init__(lambda y, c: y)
        self.box, self.score = nn.Conv2d(16, 4, 1), nn.Conv2d(16, 5, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.b(self.a(x).relu()).relu()
        return torch.cat([self.box(y) * 1e5, self.score(y / y.shape[1] ** 0.5).sigmoid()], 1)


class Rounded(Counting):
    """Converts to a coarse type on the way: no comparison is exact."""

    def forward(self, x: Tensor) -> Tensor:
        y = self.b(self.a(x).relu()).bfloat16().relu().to(x.dtype)
        return self.head(y.mean((2, 3)))


class Projection(nn.Module):
    """The width of `a` reaches the shape of what `p` makes."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.p = nn.Conv2d(3, 12, 3, padding=1), nn.Linear(12, 12)
        self.b, self.head = nn.Conv2d(12, 6, 3), nn.Conv2d(6, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x)
        n, c, h, w = x.shape
        y = self.p(x.flatten(2).transpose(1, 2)).transpose(1, 2)
        return self.head(self.b(y.reshape(n, c, h, w)))


class Normalised(nn.Module):
    """Noise for input would be NaN."""

    def __init__(self) -> None:
        super().__init__()
        self.net = Small(shuffled)

    def forward(self, x: Tensor) -> Any:
        return self.net(x.log())


def blank(to: Callable[[Tensor], Tensor]) -> nn.Module:
    """Without biases it gives zeros for `to` of a blank example."""
    model = Counting(lambda y, c: y / c)
    model.a, model.b = nn.Conv2d(3, 16, 3, bias=False), nn.Conv2d(16, 16, 3, bias=False)
    return nn.Sequential(Mixer(to), model)


BYTES = torch.zeros(1, 3, 8, 8, dtype=torch.uint8)
ONE_OF_FOUR = torch.eye(4)[:, :3, None, None]
COUNTS = r"Counting computes with the number of channels of 'a' \("
FROZEN_NUMBER = r"Written \(.*test_probe\.py:\d+\) holds a number of channels"

# name: (network, example, widths, what its one warning per line has to match)
PROBED: dict[str, tuple[Callable[[], Any], Any, list[int], list[str]]] = {
    "swapped": (lambda: Written(swapped), X, [6], [FROZEN_NUMBER]),
    "a factor": (Scaled, images(2, 16), [24], [r"Scaled computes with the number of channels of 'a' \("]),
    "a branch": (Branch, X, [8], [r"Branch computes with the number of channels of 'a' \("]),
    "a branch on few": (lambda: Counting(lambda y, c: F.avg_pool2d(y, 2) if c > 8 else y), X, [16], [COUNTS]),
    "a factor of few": (lambda: Counting(lambda y, c: y * 2 if c > 2 else y), X, [16], [COUNTS]),
    "a quotient of many": (lambda: Counting(lambda y, c: y / min(4, c)), X, [16], [COUNTS]),
    "a small factor in bfloat16": (lambda: slightly().bfloat16(), X.bfloat16(), [16], [COUNTS]),
    "a small factor in half precision": (lambda: slightly().half(), X.half(), [16], [COUNTS]),
    "beside large numbers": (Scales, X, [16], ["Scales computes with the number of channels of 'b' "]),
    "a type of its own": (lambda: Rounded(lambda y, c: y), X, [16, 16], []),
    "bytes": (lambda: blank(lambda x: x.float() / 255), BYTES, [16], [r"channels of '1\.a'"]),
    "bytes that are indices": (
        lambda: blank(lambda x: ONE_OF_FOUR.to(x.device)[x[:, 0].long()][..., 0, 0].permute(0, 3, 1, 2)),
        BYTES + 1,
        [16],
        [r"channels of '1\.a'"],
    ),
    "an output of zero": (lambda: Positive(1), X, [16], [r"Positive .* channels of 'a' "]),
    "or of zero the other way round": (lambda: Positive(-1), X, [16], [r"Positive .* channels of 'a' "]),
    "only labels returned": (lambda: Labels(interleaved), X, [16], ["forward of Labels .* holds a number"]),
    "labels in bfloat16": (lambda: Labels(F.relu).bfloat16(), X.bfloat16(), [16, 16], []),
    "another group's shape": (Projection, X, [6], ["Projection .* holds a number", "channels of 'a' "]),
    "labels returned, too": (lambda: Small(shuffled, lambda y: (y, y.argmax(1))), X, [4, 6], []),
    "logarithm": (Normalised, X.abs() + 0.1, [4, 6], []),
}


def shuffled(x: Tensor) -> Tensor:
    return x.view(1, 2, 4, 8, 8).transpose(1, 2).flatten(1, 2)


@pytest.mark.parametrize("name", PROBED)
def test_what_a_probe_finds_is_frozen_and_named(name: str) -> None:
    make, x, widths, expected = PROBED[name]
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        network = PrunableNetwork(make(), x)
    ours = [str(w.message) for w in said if "number" in str(w.message)]
    assert network.widths.tolist() == widths
    assert len(ours) == len(expected) and all(re.search(p, m) for p, m in zip(expected, ours, strict=True)), ours
    for plan in random_plans(network, 4):
        slim = network.slim(plan)
        found, masked = (tensors(net, x)[:1] for net in (slim, network.mask(plan)))
        assert_close(found, masked, 1e-2 if x.element_size() == 2 else 1e-4)
        assert network.macs(plan) == counted_macs(slim, x)


@pytest.mark.filterwarnings("ignore:.*frozen:UserWarning")
def test_where_few_plans_find_nothing_all_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(adapting, "_few", lambda groups: iter(()))
    network = PrunableNetwork(Written(swapped), X)
    assert network.widths.tolist() == [6]


class Deep(nn.Module):
    """Each of its many layers makes four times as much of a difference."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Linear(48, 64)
        self.layers, self.last = nn.ModuleList(nn.Linear(64, 64) for _ in range(60)), nn.Linear(64, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        for layer in self.layers:
            x = torch.tanh(4 * layer(x))
        return self.last(x)


def test_a_network_that_magnifies_rounding_freezes_nothing() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert PrunableNetwork(Deep(), images(2, 48)).widths.tolist() == [64] * 61


def test_one_line_of_many_modules_is_named_once() -> None:
    class Fixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Conv2d(8, 8, 1), nn.Conv2d(8, 8, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.b(swapped(self.a(x)).relu())

    with pytest.warns(UserWarning, match=r"'1' and 2 more \(.*number of channels") as said:
        PrunableNetwork(nn.Sequential(nn.Conv2d(3, 8, 3), Fixed(), Fixed(), Fixed(), nn.Conv2d(8, 4, 1)), X)
    assert len({str(w.message) for w in said if "number of channels" in str(w.message)}) == len(said)


@pytest.mark.filterwarnings("ignore:.*frozen:UserWarning")
@pytest.mark.parametrize("layer", ["head", "second"])
def test_weights_of_zero_hide_nothing(layer: str) -> None:
    model = Written(swapped)
    zero(getattr(model, layer))
    before = getattr(model, layer).weight.clone()
    assert PrunableNetwork(model, X).widths.tolist() == [6]
    assert torch.equal(getattr(model, layer).weight, before)


def test_a_forward_that_changes_its_input_leaves_the_example_alone() -> None:
    model = nn.Sequential(Mixer(lambda x: x.sub_(0.5).mul_(2.0)), Small(shuffled))
    x = images(1, 3, 8, 8)
    assert PrunableNetwork(model, x).widths.tolist() == [4, 6]
    assert torch.equal(x, X)


@pytest.mark.parametrize("samples", [1, 3])
def test_a_random_forward_freezes_nothing(samples: int) -> None:
    model = Small(lambda x: F.dropout(x, 0.5, training=True))
    state = torch.get_rng_state()
    assert PrunableNetwork(model, images(samples, 3, 8, 8)).widths.tolist() == [8, 6]
    assert torch.equal(torch.get_rng_state(), state)


class Gain(nn.Module):
    """Two attributes equal the number of heads; one has nothing to do with them."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.heads, self.gain, self.q, self.o = 4, 4, nn.Linear(16, 48), nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        n, length, _ = x.shape
        q, k, v = self.q(x).view(n, length, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        if self.training:
            x = x * self.gain
        y = (q @ k.transpose(-1, -2)).softmax(-1).matmul(v).transpose(1, 2)
        return self.o(y.reshape(n, length, -1)) + 0 * x


def test_a_number_that_equals_the_heads_by_chance_stays() -> None:
    slim: Any = PrunableNetwork(Gain(), images(2, 10, 16)).slim([2])
    assert (slim.heads, slim.gain) == (2, 4)


class Running(Small):
    """A mean of each channel that only training uses."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(8, 1, 1))

    def forward(self, x: Tensor) -> Any:
        y = self.first(x)
        if self.training:
            y = y - self.mean
        return self.head(self.second(y).relu().mean((2, 3)))


def test_a_buffer_that_only_training_uses_follows() -> None:
    network = PrunableNetwork(Running(), X)
    assert network.widths.tolist() == [8, 6]
    assert network.slim([5, 4]).train()(images(2, 3, 8, 8)).shape == (2, 4)


class NoisyTraining(nn.Module):
    """Noise in training mode, of a number of channels that is written down or asked for."""

    def __init__(self, written: bool) -> None:
        super().__init__()
        self.written, self.body, self.last = written, nn.Conv2d(3, 8, 3), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.body(x)
        if self.training:
            x = x + torch.randn(1, 8 if self.written else x.shape[1], 1, 1)
        return self.last(x.relu().mean((2, 3)))


@pytest.mark.parametrize("written", [True, False])
def test_a_number_that_only_training_uses_is_said_before_the_search(written: bool) -> None:
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        PrunableNetwork(NoisyTraining(written).eval(), X)
    said = [str(each.message) for each in found if "NoisyTraining fails in training mode" in str(each.message)]
    assert len(said) == written
