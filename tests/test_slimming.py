"""Cutting and masking where it is easy to get wrong: buffers that are weights, networks that change after they were
traced, numbers of channels in other people's code."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from conftest import assert_close, exact_network, images, old_export, outputs, random_plans, randomise
from torch import Tensor, nn

from gnnrl_gym import PrunableNetwork

X = images(1, 3, 8, 8)


class Fixed(nn.Module):
    """A projection that isn't trained."""

    def __init__(self, *shape: int, function: Callable[[Tensor, Tensor], Tensor] = F.linear) -> None:
        super().__init__()
        self.register_buffer("w", images(*shape))
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x, self.w)  # type: ignore[arg-type]


# what makes its channels anything but zero, and what reads them
FIXED: dict[str, Callable[[], list[nn.Module]]] = {
    "linear": lambda: [nn.Linear(16, 12), nn.Sigmoid(), Fixed(8, 12), nn.ReLU(), nn.Linear(8, 4)],
    "after a norm": lambda: [nn.Linear(16, 12), nn.BatchNorm1d(12, affine=False), Fixed(8, 12), nn.Linear(8, 4)],
    "convolution": lambda: [
        nn.Unflatten(1, (1, 4, 4)), nn.Conv2d(1, 6, 3), nn.Sigmoid(), Fixed(5, 6, 1, 1, function=F.conv2d),
        nn.Flatten(), nn.Linear(20, 4),
    ],
    "transposed": lambda: [
        nn.Unflatten(1, (1, 4, 4)), nn.Conv2d(1, 6, 3), nn.Sigmoid(), Fixed(6, 5, 1, 1, function=F.conv_transpose2d),
        nn.Flatten(), nn.Linear(20, 4),
    ],
}  # fmt: skip


@pytest.mark.parametrize("name", FIXED)
def test_a_buffer_that_reads_channels_is_masked_too(name: str) -> None:
    torch.manual_seed(0)
    network = exact_network(nn.Sequential(*FIXED[name]()), images(3, 16))
    assert len(network.widths) == 2


def convolutions() -> nn.Sequential:
    torch.manual_seed(0)
    parts = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 6, 3), nn.Flatten(), nn.Linear(96, 4)
    return nn.Sequential(*parts)


class RunningMean(nn.Module):
    """Training gives it another buffer."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(channels, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.mean = self.mean * 0.9 + 0.1 * x.detach().mean((0, 2, 3))[:, None, None]
        return x - self.mean


def test_a_network_that_was_converted_is_cut_as_it_is_now() -> None:
    model = randomise(convolutions())
    network = PrunableNetwork(model, X)
    model.double()
    for plan in random_plans(network, 4):
        slim = network.slim(plan)
        assert all(tensor.dtype == torch.float64 for tensor in slim.parameters())
        assert_close(outputs(slim, X.double()), outputs(network.mask(plan), X.double()), 1e-9)


@pytest.mark.parametrize(("kind", "form"), [(2, torch.channels_last), (3, torch.channels_last_3d)])
def test_channels_stay_last_in_memory(kind: int, form: torch.memory_format) -> None:
    convolution = {2: nn.Conv2d, 3: nn.Conv3d}[kind]
    model = nn.Sequential(convolution(3, 8, 3), nn.ReLU(), convolution(8, 4, 3))
    x = images(1, 3, *[6] * kind)
    for last in (True, False):
        network = PrunableNetwork(model.to(memory_format=form if last else torch.contiguous_format), x)
        for plan in ([5], [8]):
            slim: Any = network.slim(plan)
            assert [slim[i].weight.is_contiguous(memory_format=form) for i in (0, 2)] == [last, last]


def test_a_buffer_that_training_reassigned_is_cut() -> None:
    model = convolutions()
    model[1] = RunningMean(8)
    network = PrunableNetwork(model, X)
    model.train()(X)
    for plan in random_plans(network, 4):
        slim: Any = network.slim(plan)
        assert len(slim[1].mean) == plan[0] and slim[1].mean.any()
        assert_close(outputs(slim, X), outputs(network.mask(plan), X))


class Numbered(nn.Conv2d):
    """A subclass with a number of channels in its forward."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).view(-1, 6, 8, 8)


class Renamed(nn.Conv2d):
    """A subclass whose forward is torch's."""


# ---- importance ---------------------------------------------------------------------------------------------------


class TrainingHead(nn.Module):
    """A head that only training uses."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second, self.head, self.extra = (
            nn.Conv2d(3, 8, 3), nn.Conv2d(8, 6, 3), nn.Linear(6, 4), nn.Linear(8, 4),
        )  # fmt: skip

    def forward(self, x: Tensor) -> Any:
        y = self.first(x).relu()
        z = self.head(self.second(y).mean((2, 3)))
        return (z, self.extra(y.mean((2, 3)))) if self.training else z


def transposed() -> nn.Module:
    torch.manual_seed(0)
    parts = nn.Conv2d(3, 8, 3), nn.ReLU(), nn.ConvTranspose2d(8, 6, 3), nn.ReLU(), nn.Conv2d(6, 5, 3)
    return nn.Sequential(*parts, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(5, 4))


TAYLOR: dict[str, Callable[[], nn.Module]] = {
    "a transposed convolution reads": transposed,
    "a head of training reads": TrainingHead,
    "weights that are not trained": lambda: TrainingHead().requires_grad_(False),
}


@pytest.mark.parametrize("name", TAYLOR)
def test_taylor_scores_every_unit(name: str) -> None:
    model = TAYLOR[name]()
    trained = [p.requires_grad for p in model.parameters()]
    network = PrunableNetwork(model, X, "taylor", batch=(images(40, 3, 8, 8), torch.arange(40) % 4))
    for group in range(len(network.widths)):
        assert len(set(network.importance[network.groups.group_of == group].tolist())) > 1
    assert [p.requires_grad for p in model.parameters()] == trained and all(p.grad is None for p in model.parameters())


class InPlace(nn.Sequential):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.mul_(2))


def test_taylor_leaves_the_images_as_they_are() -> None:
    given, labels = images(40, 3, 8, 8), torch.arange(40) % 4
    model = InPlace(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(288, 4))
    PrunableNetwork(model, X, "taylor", batch=(given, labels))
    assert torch.equal(given, images(40, 3, 8, 8))


# ---- numbers of channels ------------------------------------------------------------------------------------------


def test_a_number_in_a_subclass_of_a_convolution_is_found() -> None:
    torch.manual_seed(0)
    parts = nn.Conv2d(3, 8, 3, padding=1), Numbered(8, 6, 3, padding=1), nn.Conv2d(6, 5, 3), nn.Flatten()
    network = exact_network(nn.Sequential(*parts, nn.Linear(180, 4)), X, warns="'1'.*holds a number of channels")
    assert network.widths.tolist() == [8, 5]


def test_hooks_with_numbers_are_found_too() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 6, 3, padding=1), nn.Conv2d(6, 5, 3))
    model[1].register_forward_hook(lambda module, given, found: found.view(-1, 6, 8, 8))
    network = exact_network(model, X, warns="holds a number of channels")
    assert network.widths.tolist() == [8]


def test_grouped_subclasses_stay_prunable() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), Renamed(8, 8, 3, groups=4), nn.Flatten(), nn.Linear(128, 4))
    assert exact_network(model, X).widths.tolist() == [4]


# ---- foreign modules: kept, replaced or frozen --------------------------------------------------------------------


class Foreign(nn.Module):
    def __init__(self, function: Callable[[Any, Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self, x)


def shuffled(module: Any, x: Tensor) -> Tensor:
    n, c, h, w = x.shape
    return x.view(n, 2, c // 2, h, w).transpose(1, 2).reshape(n, c, h, w)


def shuffled_by_number(module: Any, x: Tensor) -> Tensor:
    n, _, h, w = x.shape
    return x.view(n, 2, 4, h, w).transpose(1, 2).reshape(n, 8, h, w)


def zeros_by_number(module: Any, x: Tensor) -> Tensor:
    return torch.cat([x[:, 3:7], torch.zeros(x.shape[0], 4, *x.shape[2:])], 1)


def parts_swapped(module: Any, x: Tensor) -> Tensor:
    return torch.cat(x.split([3, 5], 1)[::-1], 1)


def parts_dropped(module: Any, x: Tensor) -> Tensor:
    return F.dropout(parts_swapped(module, x), 0.5, module.training)


def shuffled_and_dropped(module: Any, x: Tensor) -> Tensor:
    return F.dropout(shuffled(module, x), 0.5, module.training)


# name: (its function, widths around it, what becomes of the module)
FOREIGN: dict[str, tuple[Callable[[Any, Tensor], Tensor], list[int], str]] = {
    "computes from shapes": (shuffled, [4, 6], "Foreign"),
    "computes from shapes, drops": (shuffled_and_dropped, [4, 6], "Foreign"),
    "numbers": (parts_swapped, [8, 6], "GraphModule"),
    "numbers and image sizes": (shuffled_by_number, [6], "Foreign"),
    "numbers and batch sizes": (zeros_by_number, [6], "Foreign"),
    "numbers, drops": (parts_dropped, [6], "Foreign"),
}


@pytest.mark.filterwarnings("ignore:.*frozen:UserWarning")
@pytest.mark.parametrize("name", FOREIGN)
def test_a_foreign_module_does_the_same_on_other_sizes_and_in_training(name: str) -> None:
    function, widths, becomes = FOREIGN[name]
    torch.manual_seed(0)
    parts = nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), Foreign(function), nn.Conv2d(8, 6, 3), nn.AdaptiveAvgPool2d(1)
    network = PrunableNetwork(nn.Sequential(*parts, nn.Flatten(), nn.Linear(6, 4)), X)
    assert network.widths.tolist() == widths
    for plan in random_plans(network, 4):
        slim: Any = network.slim(plan)
        assert type(slim[2]).__name__.startswith(becomes)
        for shape in ((1, 3, 8, 8), (3, 3, 8, 8), (2, 3, 16, 16), (2, 3, 12, 8)):
            assert_close(outputs(slim, images(*shape)), outputs(network.mask(plan), images(*shape)))
        slim.train()
        assert torch.equal(slim(X), slim(X)) == ("drops" not in name)


class Clamped(nn.Module):
    """The forward changes a parameter in place."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b, self.c, self.d = (nn.Linear(i, o) for i, o in ((6, 8), (8, 8), (8, 7), (7, 4)))

    def forward(self, x: Tensor) -> Any:
        with torch.no_grad():
            self.b.weight.clamp_(-0.1, 0.1)
        return self.d(self.c(self.b(self.a(x).relu()).relu()).relu())


def test_a_parameter_that_is_changed_in_place_is_frozen() -> None:
    assert exact_network(Clamped(), images(2, 6), warns="linear in 'b'").widths.tolist() == [7]


class Keeps(nn.Module):
    """Keeps what it computed, as a network does whose loss, or a plot of it, needs that."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b = nn.Conv2d(3, 6, 3), nn.Conv2d(6, 4, 3)
        self.last: Any = None

    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x).relu()
        self.last = {"features": [y]}
        return self.b(y)


@old_export
def test_a_network_that_keeps_activations_is_cut_after_a_step_of_training() -> None:
    network = PrunableNetwork(Keeps(), X)
    network.model(X).sum().backward()
    slim, mask = network.slim([3]), network.mask([3])
    assert_close(outputs(slim, X), outputs(mask, X))
    assert network.model.last["features"][0].grad_fn is not None


class CastAndPad(nn.Module):
    """A shortcut of other people's code: no parameter, the channels that it adds in its forward, and a cast."""

    def forward(self, x: Tensor) -> Tensor:
        return F.pad(x[:, :, ::2, ::2].float(), (0, 0, 0, 0, 2, 2))


class Shortcut(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.conv, self.short = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 12, 3, 2, padding=1), CastAndPad()
        self.head = nn.Conv2d(12, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x).relu()
        return self.head((self.conv(x) + self.short(x)).relu())


@torch.no_grad()
def test_a_cut_module_that_casts_runs_in_any_precision() -> None:
    network = exact_network(Shortcut(), X)
    plan = network.widths // 2
    slim, mask = network.slim(plan), network.mask(plan)
    with torch.autocast("cpu", torch.bfloat16):
        assert slim(X).dtype == torch.bfloat16
    assert slim.half().double().to("meta")(X.double().to("meta")).shape == mask(X).shape
