"""Operations between two convolutions: the ones whose channels can be followed, and the ones that are frozen and named.
How channels are tied is in `test_channels.py`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from conftest import exact_network, images
from test_channels import Foreign, Net, conv
from torch import Tensor, nn

from gnnrl_gym import PrunableNetwork, UnsupportedOperation


class Divided(nn.Module):
    """By a parameter of `shape`."""

    def __init__(self, *shape: int) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.rand(shape) + 1)

    def forward(self, x: Tensor) -> Tensor:
        return x / self.scale


def between(step: Callable[[Tensor], Tensor]) -> nn.Module:
    """Eight channels -> `step` -> six."""
    return Net(lambda n, x: n.a(n.p(x)), 6, a=conv(8, 6), p=step if isinstance(step, nn.Module) else Foreign(step))


# name: (step, sorted widths)
FOLLOWED: dict[str, tuple[Callable[[Tensor], Tensor], list[int]]] = {
    # one channel stays, beside that of the group: the dimension of a last one would go
    "squeeze": (lambda x: x.mean((2, 3), True).squeeze()[None, :, None, None], [6, 7]),
    "squeeze of positions": (lambda x: x.mean((2, 3), True).squeeze((2, 3))[..., None, None], [6, 8]),
    "another type and back": (lambda x: x.double().float(), [6, 8]),
    # quotients that are finite in a removed channel
    "divided by a norm": (lambda x: x / (x.norm(dim=(2, 3), keepdim=True) + 1e-6), [6, 8]),
    "normalised": (lambda x: F.normalize(x.flatten(2), dim=-1).view(x.shape), [6, 8]),
    "standardised": (
        lambda x: (x - x.mean((2, 3), True)) / (x.pow(2).mean((2, 3), True) + 1e-6) ** 0.5, [6, 8]
    ),
    "softmax by hand": (lambda x: x.exp() / x.exp().sum((2, 3), keepdim=True), [6, 8]),
    "silu by hand": (lambda x: x / (1 + (-x).exp()), [6, 8]),
    "hard swish by hand": (lambda x: x * F.relu6(x + 3) / 6, [6, 8]),
    "divided by a temperature": (Divided(1), [6, 8]),
    "divided by a root": (lambda x: x * (x.square().mean((2, 3), True) + 1e-6).rsqrt(), [6, 8]),
    # elementwise
    "log1p": (lambda x: x.relu().log1p(), [6, 8]),
    "sign": (lambda x: x * (x - 1).sign(), [6, 8]),
    "round": (lambda x: x + (x * 4).round() / 4, [6, 8]),
    "celu": (lambda x: F.celu(x - 1), [6, 8]),
    "log sigmoid": (F.logsigmoid, [6, 8]),
    "softshrink": (F.softshrink, [6, 8]),
    "threshold": (lambda x: F.threshold(x, 0.1, 2.0), [6, 8]),
    "lerp": (lambda x: torch.lerp(x, x.exp(), 0.3), [6, 8]),
    "lerp by channels": (lambda x: torch.lerp(x, x.exp(), x.tanh()), [6, 8]),
    "addcmul": (lambda x: torch.addcmul(x, x, x.tanh(), value=0.5), [6, 8]),
    "the larger of two": (lambda x: torch.max(x, 1 - x), [6, 8]),
    "the smaller of two": (lambda x: torch.min(x, x.square()), [6, 8]),
    "waves": (lambda x: x.sin() + x.cos() + (x / 9).tan(), [6, 8]),
    "snake": (lambda x: x + x.sin() ** 2, [6, 8]),
    "hyperbolic": (lambda x: x.sinh() + x.cosh() + x.asinh() + x.atan(), [6, 8]),
    "error functions": (lambda x: x.erf() + torch.special.erf(x) + torch.special.expit(x), [6, 8]),
    "exponentials": (lambda x: x.expm1() + x.exp2() + torch.special.expm1(x), [6, 8]),
    "logarithms": (lambda x: (x + 1).log() + (x + 2).log2() + (x + 3).log10(), [6, 8]),
    "reciprocal": (lambda x: 1 / (1 + (-x).exp()), [6, 8]),
    "steps": (lambda x: x + (4 * x).floor() + (4 * x).ceil() + (4 * x).trunc() + (4 * x).frac(), [6, 8]),
    "remainders": (lambda x: x.fmod(0.4) + x % 0.3 + x // 0.2 + x % (1 + x.exp()), [6, 8]),
    "bounds": (lambda x: x.clamp_max(0.3) + x.clamp_min(0.2) + x.clip(0.1, 0.4), [6, 8]),
    "shrinks": (lambda x: F.hardshrink(x - 0.5, 0.2) + F.tanhshrink(x), [6, 8]),
    "random slopes": (lambda x: F.rrelu(x - 0.5), [6, 8]),
    "alpha dropout": (nn.AlphaDropout(0.3), [6, 8]),
    "equal or not": (lambda x: x * (x == x.amax((2, 3), keepdim=True)) + (x != 0), [6, 8]),
    "finite or not": (lambda x: x.masked_fill(x.isnan() | x.isinf(), 1.0) * x.isfinite(), [6, 8]),
    "numbers for others": (lambda x: x.nan_to_num(0.0), [6, 8]),
    "logic": (
        lambda x: torch.logical_and(x > 0, x < 1) * x + torch.logical_or(x > 1, x.logical_not()) * x
        + torch.logical_xor(x > 2, x < 1), [6, 8],
    ),
    "bits": (lambda x: x * ((x > 0) & (x < 1)) + x * (~(x > 0.5) | (x < 0.2)) + ((x > 0.1) ^ (x > 0.3)), [6, 8]),
    "bits by name": (
        lambda x: x * torch.bitwise_and(x > 0, x < 1) + torch.bitwise_or(x > 1, x < 0.5)
        + torch.bitwise_xor(x > 0, x > 1), [6, 8],
    ),
    "addcdiv": (lambda x: torch.addcdiv(x, x, x.square() + 1), [6, 8]),
    "angle": (lambda x: torch.atan2(x, x.exp()), [6, 8]),
    "chosen": (lambda x: torch.where(x > 0.5, x, 0.0) + torch.where(x > 0.5, 1.0, x.cos()), [6, 8]),
    "powers": (lambda x: 2**x + (x + 1) ** x, [6, 8]),
    "gated by itself": (lambda x: F.glu(x.repeat(1, 2, 1, 1), 1), [6, 8]),
    "gated positions": (lambda x: F.glu(x, -1) + F.glu(x, 3), [6, 8]),
    # reductions of positions, and over what was stacked
    "product": (lambda x: x + x.prod(-1, keepdim=True), [6, 8]),
    "median": (lambda x: x + x.median(2, keepdim=True)[0], [6, 8]),
    "place of the largest": (lambda x: x + x.argmax(2, keepdim=True) - x.argmin(-1, keepdim=True), [6, 8]),
    "any and all": (lambda x: x * (x > 0.5).any(2, keepdim=True) + (x > 0).all(-1, keepdim=True), [6, 8]),
    "variance": (lambda x: x / (x.var((2, 3), keepdim=True) + 1e-5), [6, 8]),
    "biased variance": (lambda x: x / (x.flatten(2).var(-1, False) + 1e-5)[..., None, None], [6, 8]),
    "deviation": (lambda x: (x - x.mean((2, 3), True)) / (x.std((2, 3), keepdim=True) + 1e-5), [6, 8]),
    "deviation and mean": (lambda x: x - torch.std_mean(x, (2, 3), keepdim=True)[1], [6, 8]),
    "largest along a dimension": (lambda x: x + x.max(2, keepdim=True)[0].min(-1, keepdim=True).values, [6, 8]),
    "soft maximum": (lambda x: x * x.logsumexp((2, 3), keepdim=True), [6, 8]),
    "stack and mean": (lambda x: torch.stack([x, x.tanh(), x.exp()]).mean(0), [6, 8]),
    "stack and deviation": (lambda x: torch.stack([x, x.tanh(), x.exp()], -1).std(-1), [6, 8]),
    "stack and unbind": (lambda x: sum(torch.stack([x, x.tanh()], 2).unbind(2)), [6, 8]),
    "stack of each channel": (lambda x: torch.stack([x[:, i] for i in range(x.shape[1])], 1), [6, 8]),
    "groups of a view": (lambda x: x.view(1, 2, x.shape[1] // 2, 8, 8).softmax(1).flatten(1, 2), [4, 6]),
    # moved, and back
    "swapaxes": (lambda x: x.swapaxes(1, 3).swapdims(1, 3), [6, 8]),
    "movedim": (lambda x: x.movedim(1, -1).relu().moveaxis(-1, 1), [6, 8]),
}  # fmt: skip


@pytest.mark.parametrize("name", FOLLOWED)
def test_channels_are_followed(name: str) -> None:
    step, widths = FOLLOWED[name]
    assert sorted(exact_network(between(step), images(1, 3, 8, 8), plans=4).widths.tolist()) == widths


# name: (step, what the warning has to match): 0/0 in a removed channel
QUOTIENTS: dict[str, tuple[Callable[[Tensor], Tensor], str]] = {
    "by the maximum": (lambda x: x / x.abs().amax((2, 3), keepdim=True), "for div in"),
    "by a norm": (lambda x: x / x.norm(dim=(2, 3), keepdim=True), "for div in"),
    "negative power": (lambda x: x * x.abs().sum((2, 3), keepdim=True) ** -1, "for pow in"),
    "by a parameter": (Divided(8, 1, 1), "for div in"),
    "by a deviation": (lambda x: x / x.std((2, 3), keepdim=True), "for div in"),
    "by a root": (lambda x: x * x.square().sum((2, 3), keepdim=True).rsqrt(), "for rsqrt in"),
    "reciprocal": (lambda x: x * x.abs().amax((2, 3), keepdim=True).reciprocal(), "for reciprocal in"),
    "by addcdiv": (lambda x: torch.addcdiv(x, x, x.abs().amax((2, 3), True)), "for addcdiv in"),
    "remainder": (lambda x: x % x.abs().amax((2, 3), True), "for remainder in"),
    "plain logarithm": (lambda x: x.abs().amax((2, 3), True).log() + x, "for log in"),
    "logarithm of zero": (lambda x: x + (x.mean((2, 3), True).exp() - 2).log1p(), "for log1p in"),
}


@pytest.mark.parametrize("name", QUOTIENTS)
def test_quotients_that_are_not_finite_in_removed_channels_are_frozen(name: str) -> None:
    step, message = QUOTIENTS[name]
    assert exact_network(between(step), images(1, 3, 8, 8), plans=4, warns=message).widths.tolist() == [6]


@pytest.mark.parametrize(
    "step",
    [
        lambda x: x + x.max(1, keepdim=True)[0],
        lambda x: x - x.min(),
        lambda x: x / (x.var() + 1),
        lambda x: x * x.std(1, keepdim=True),
    ],
)
def test_what_is_reduced_over_channels_is_frozen(step: Callable[[Tensor], Tensor]) -> None:
    warns = r"for (max|min|var|std) in"
    assert exact_network(between(step), images(1, 3, 8, 8), plans=4, warns=warns).widths.tolist() == [6]


def test_a_type_taken_from_a_parameter_ties_nothing_to_it() -> None:
    model = Net(lambda n, x: n.b(n.a(x.double().type_as(n.b[0].weight))), 6, a=conv(8, 8), b=conv(8, 6))
    assert sorted(exact_network(model, images(1, 3, 8, 8), plans=4).widths.tolist()) == [6, 8, 8]


class Standardised(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.weight - self.weight.mean((1, 2, 3), keepdim=True), self.bias)


def test_weight_standardisation_is_frozen() -> None:
    model = Net(lambda n, x: n.a(x), 6, deep=True, a=Standardised(8, 6, 3))
    assert exact_network(model, images(1, 3, 8, 8), warns="mean in 'a'").widths.tolist() == [5]


@pytest.mark.parametrize("layer", [nn.MaxPool3d, nn.AvgPool3d, nn.AdaptiveAvgPool3d, nn.AdaptiveMaxPool3d])
def test_pools_of_volumes(layer: Callable[[int], nn.Module]) -> None:
    first = nn.Sequential(nn.Conv3d(2, 6, 3), nn.BatchNorm3d(6), nn.ReLU())
    model = nn.Sequential(first, layer(2), nn.Conv3d(6, 4, 1), nn.Flatten(), nn.Linear(32, 2))
    assert exact_network(model, images(1, 2, 6, 6, 6), plans=3).widths.tolist() == [6, 4]


# by dimensions of positions
MODES = {1: ["nearest", "nearest-exact", "linear"], 2: ["nearest-exact", "bilinear", "bicubic"]}
MODES[3] = ["nearest", "nearest-exact", "trilinear"]


@pytest.mark.parametrize(("mode", "dims"), [(mode, dims) for dims, modes in MODES.items() for mode in modes])
def test_interpolation(mode: str, dims: int) -> None:
    layer = [nn.Conv1d, nn.Conv2d, nn.Conv3d][dims - 1]
    model = nn.Sequential(layer(2, 6, 1), nn.Upsample(scale_factor=1.5, mode=mode), layer(6, 4, 1), layer(4, 2, 1))
    assert exact_network(model, images(1, 2, *[4] * dims), plans=3).widths.tolist() == [6, 4]


# name: step that moves positions
RESAMPLED: dict[str, Callable[[Tensor], Tensor]] = {
    "antialiased": lambda x: F.interpolate(x, (5, 5), mode="bilinear", antialias=True),
    "antialiased, bicubic": lambda x: F.interpolate(x, (5, 5), mode="bicubic", antialias=True),
    "grid": lambda x: F.grid_sample(x, torch.linspace(-1, 1, 32).view(1, 4, 4, 2), align_corners=False),
    "unpooled": lambda x: F.max_unpool2d(*F.max_pool2d(x, 2, return_indices=True), 2),
    "with indices": lambda x: F.max_pool1d(x.flatten(2), 4, return_indices=True)[0][..., None],
}


@pytest.mark.parametrize("name", RESAMPLED)
def test_positions_are_resampled(name: str) -> None:
    network = exact_network(between(RESAMPLED[name]), images(1, 3, 8, 8), plans=4)
    assert sorted(network.widths.tolist()) == [6, 8]


def test_volumes_are_unpooled() -> None:
    step = Foreign(lambda x: F.max_unpool3d(*F.max_pool3d(x, 2, return_indices=True), 2))
    model = nn.Sequential(nn.Conv3d(2, 6, 3), step, nn.Conv3d(6, 4, 1), nn.Flatten(), nn.Linear(256, 2))
    assert exact_network(model, images(1, 2, 6, 6, 6), plans=3).widths.tolist() == [6, 4]


class Transformer(nn.Module):
    """A spatial one: an affine map of six numbers per image says where its features are read."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.find = nn.Sequential(nn.Conv2d(8, 5, 1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(5, 6))

    def forward(self, x: Tensor) -> Tensor:
        grid = F.affine_grid(self.find(x).view(-1, 2, 3), x.size(), align_corners=False)
        return F.grid_sample(x, grid, align_corners=False)


def test_a_spatial_transformer() -> None:
    assert sorted(exact_network(between(Transformer()), images(2, 3, 8, 8), plans=4).widths.tolist()) == [5, 6, 8]


def test_a_gated_linear_unit() -> None:
    model = Net(lambda n, x: n.a(n.g(n.wide(x))), 6, wide=conv(8, 14), g=nn.GLU(1), a=conv(7, 6))
    network = exact_network(model, images(1, 3, 8, 8))
    assert sorted(network.widths.tolist()) == [6, 7, 8]
    slim: Any = network.slim([2] * 3)
    assert slim.wide[0].out_channels == 4


def one_sample(layer: nn.Module) -> nn.Module:
    return nn.Sequential(Foreign(lambda x: x[0]), layer, Foreign(lambda x: x[None]))


# name: (step, what the warning has to match): no batch dimension, or one that is taken for another
UNBATCHED: dict[str, tuple[Callable[[Tensor], Tensor], str]] = {
    "a convolution of one sample": (one_sample(nn.Conv2d(8, 8, 3, padding=1)), "conv2d in"),
    "transposed": (one_sample(nn.ConvTranspose2d(8, 8, 3, padding=1)), "conv_transpose2d in"),
    "channels pooled as rows": (lambda x: F.avg_pool2d(x.flatten(2), (2, 1)).repeat(1, 2, 1).view(x.shape), "pool2d"),
}


@pytest.mark.parametrize("name", UNBATCHED)
def test_what_has_no_batch_dimension_is_frozen_and_named(name: str) -> None:
    step, warns = UNBATCHED[name]
    assert exact_network(between(step), images(1, 3, 8, 8), plans=4, warns=warns).widths.tolist() == [6]


@pytest.mark.parametrize("layer", [nn.Conv2d(3, 8, 3), nn.ConvTranspose2d(3, 8, 3)])
def test_an_example_of_one_sample_is_refused_with_the_mend(layer: nn.Module) -> None:
    network = nn.Sequential(layer, nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3))
    with pytest.raises(UnsupportedOperation, match=r"\[3, 16, 16\] has no batch dimension: .* x\[None\]"):
        PrunableNetwork(network, images(3, 16, 16))
    assert PrunableNetwork(network, images(1, 3, 16, 16)).widths.tolist() == [8, 8]


class Decoder(nn.Module):
    """Features, images, and up: as the generator of a DCGAN or a VAE."""

    def __init__(self, images_of: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.features, self.images_of = nn.Linear(5, 8 * 9), images_of
        self.up = nn.Sequential(nn.ConvTranspose2d(8, 6, 4, 2, 1), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 3, 3))

    def forward(self, x: Tensor) -> Tensor:
        return self.up(self.images_of(self.features(x)).relu())


def test_features_become_images() -> None:
    network = exact_network(Decoder(lambda x: x.view(len(x), -1, 3, 3)), images(2, 5))
    assert network.widths.tolist() == [8, 6]
    assert network.slim([2, 3]).features.out_features == 18
    model = nn.Sequential(nn.Linear(5, 8 * 9), nn.Unflatten(1, (-1, 3, 3)), nn.BatchNorm2d(8), nn.Conv2d(8, 4, 3))
    assert exact_network(model, images(2, 5)).widths.tolist() == [8]


def test_features_that_become_so_many_images_stay_alone() -> None:
    written = Decoder(lambda x: x.view(-1, 8, 3, 3))
    assert exact_network(written, images(2, 5), warns=r"write -1 in its place").widths.tolist() == [6]


# name: (step, what the warning has to match): it makes something that the channels become one with
MADE: dict[str, tuple[Callable[[Tensor], Tensor], str]] = {
    "added": (lambda x: x + torch.ones(x.shape[1], 1, 1), "ones in"),
    "computed with before": (lambda x: x * (torch.arange(x.shape[1]) / 7).sinc()[:, None, None], "sinc in"),
    "in a concatenation": (
        lambda x: torch.cat([x, torch.zeros(1, 4, 8, 8)], 1)[:, :8] + torch.full((8, 1, 1), 2.0),
        "full in",
    ),
}


@pytest.mark.parametrize("name", MADE)
def test_what_is_made_and_meets_channels_is_named(name: str) -> None:
    step, warns = MADE[name]
    assert exact_network(
        between(step), images(1, 3, 8, 8), plans=4, warns=f"No channel rule for {warns}"
    ).widths.tolist() == [6]
    with pytest.raises(UnsupportedOperation, match=f"No channel rule for {warns}"):
        PrunableNetwork(between(step), images(1, 3, 8, 8), strict=True)


def written(x: Tensor) -> Tensor:
    """Writes into a slice by an operation that has no rule, and no reader."""
    x[:, :, 0].sinc_()
    return x


def test_what_is_written_in_place_without_a_rule_is_named() -> None:
    warns = r"No channel rule for sinc in 'p' \(.*test_channels\.py:\d+\)"
    assert exact_network(between(written), images(1, 3, 8, 8), plans=4, warns=warns).widths.tolist() == [6]
    with pytest.raises(UnsupportedOperation, match=warns):
        PrunableNetwork(between(written), images(1, 3, 8, 8), strict=True)


def test_what_is_assigned_to_a_slice_is_named() -> None:
    def border(x: Tensor) -> Tensor:
        x[:, :, 0] += 1
        return x

    warns = r"for copy in 'p' \(.*test_channels\.py:\d+\)"
    assert exact_network(between(border), images(1, 3, 8, 8), plans=4, warns=warns).widths.tolist() == [6]


# name: (shape of a parameter, what is done with it, what the warning has to match)
GATES: dict[str, tuple[tuple[int, ...], Callable[[Tensor, Tensor], Tensor], str | None]] = {
    "one of a list": ((3,), lambda x, w: x * w[1], None),
    "sigmoid": ((1,), lambda x, w: x * w.sigmoid(), None),
    "softmax": ((2,), lambda x, w: x * w.softmax(0)[0] + x.tanh() * w.softmax(0)[1], None),
    "shares": ((2,), lambda x, w: x * (w.relu() / (w.relu().sum() + 1e-4))[0], None),
    "mixed": ((8, 1, 1), lambda x, w: x * w.softmax(0), "for softmax in"),
    "of length one": ((8,), lambda x, w: x * (w / w.norm()).view(1, -1, 1, 1), "for linalg_vector_norm in"),
    "reshaped and mixed": ((8,), lambda x, w: x * w[:, None, None] * w.view(2, 4).cumsum(1).sum(), "for cumsum in"),
    "its size": ((1, 8, 8, 8), lambda x, w: x + x.mean((2, 3), True).expand_as(w), "for expand_as in"),
    # the parameter is left whole, and so are the channels that it meets as it is
    "taken twice": ((8, 1, 1), lambda x, w: x * w * w.cumsum(0)[0], "for cumsum in"),
}


class Gated(nn.Module):
    def __init__(self, shape: tuple[int, ...], step: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.w, self.step = nn.Parameter(images(*shape)), step

    def forward(self, x: Tensor) -> Tensor:
        return self.step(x, self.w)


@pytest.mark.parametrize("name", GATES)
def test_what_is_made_of_parameters_is_named_where_it_meets_channels(name: str) -> None:
    shape, step, warns = GATES[name]
    network = exact_network(between(Gated(shape, step)), images(1, 3, 8, 8), plans=4, warns=warns)
    assert sorted(network.widths.tolist()) == ([6] if warns else [6, 8])
    if warns:
        with pytest.raises(UnsupportedOperation, match=warns):
            PrunableNetwork(between(Gated(shape, step)), images(1, 3, 8, 8), strict=True)
    else:
        PrunableNetwork(between(Gated(shape, step)), images(1, 3, 8, 8), strict=True)


# what touches no channel, or only those that the output keeps anyway
HARMLESS: dict[str, Callable[[], nn.Module]] = {
    "softmax": lambda: nn.Sequential(between(lambda x: x), nn.Softmax(1)),
    "log softmax": lambda: nn.Sequential(between(lambda x: x), nn.LogSoftmax(1)),
    "positions of the input": lambda: nn.Sequential(
        Foreign(lambda x: x * torch.linspace(0, 1, 8)), between(lambda x: x)
    ),
    "positions": lambda: between(lambda x: x * torch.linspace(0, 1, 8)),
}


@pytest.mark.parametrize("name", HARMLESS)
def test_what_freezes_nothing_is_neither_named_nor_refused(name: str, recwarn: pytest.WarningsRecorder) -> None:
    network = PrunableNetwork(HARMLESS[name](), images(1, 3, 8, 8), strict=True)
    assert sorted(network.widths.tolist()) == [6, 8]
    assert not [str(w.message) for w in recwarn if "frozen" in str(w.message)]


def test_channels_that_are_mixed_before_the_end_are_named() -> None:
    step = "softmax in"
    assert exact_network(between(lambda x: x.softmax(1)), images(1, 3, 8, 8), warns=step).widths.tolist() == [6]
    with pytest.raises(UnsupportedOperation, match=step):
        PrunableNetwork(between(lambda x: x.softmax(-3)), images(1, 3, 8, 8), strict=True)


class Volume(nn.Module):
    """A parameter whose three dimensions meet the channels of three layers, which `heads` read."""

    def __init__(self, *heads: nn.Module) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers, self.heads = nn.ModuleList(nn.Linear(4, 8) for _ in range(3)), nn.ModuleList(heads)
        self.w = nn.Parameter(torch.rand(8, 8, 8))

    def forward(self, x: Tensor) -> list[Tensor]:
        a, b, c = (layer(x) for layer in self.layers)
        first = (a[:, :, None, None] * self.w).sum((2, 3))
        second = (b[:, None, :, None] * self.w).sum((1, 3))
        third = (c[:, None, None] * self.w).sum((1, 2))
        return [head(y) for head, y in zip(self.heads, (first, second, third), strict=True)]


def test_a_parameter_of_three_dimensions_of_channels_is_refused() -> None:
    with pytest.raises(UnsupportedOperation, match=r"'w' of shape \[8, 8, 8\] has channels along 3 dimensions"):
        PrunableNetwork(Volume(*(nn.Linear(8, 2) for _ in range(3))), images(2, 4))


def test_a_dimension_that_stays_is_not_counted() -> None:
    model = Volume(nn.Linear(8, 2), nn.Linear(8, 2), nn.Identity())
    assert exact_network(model, images(2, 4)).widths.tolist() == [8, 8]


def test_nothing_prunable_says_why_without_a_warning() -> None:
    tied = Foreign(lambda x: x.view(1, 2, 3).flatten(1).view(1, 3, 2).flatten(1))
    model = nn.Sequential(nn.Conv2d(3, 6, 8), tied, nn.Linear(6, 2))
    with pytest.raises(UnsupportedOperation, match=r"no channel group .* or is one with all others of its layer"):
        PrunableNetwork(model, images(1, 3, 8, 8))
