"""One-shot criteria: each against its definition, computed another way, on networks small enough for that."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import images
from torch import nn

from agents.one_shot import (
    BATCH,
    TEMPERATURE,
    gradient_flow,
    grasp,
    loss_gradients,
    lottery,
    magnitude,
    snip,
    synaptic_flow,
    synflow,
    unit_scores,
    weight_size,
)
from agents.recorder import PlanRecorder
from gnnrl_gym.evaluation.training import Recipe, train
from gnnrl_gym.pruning.masks import group_of, top_mask
from gnnrl_gym.pruning.sparsity import make_network
from gnnrl_gym.zoo import load_data


def chain(seed: int = 0) -> nn.Sequential:
    """64-8-10, for the digits."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(nn.Flatten(), nn.Linear(64, 8), nn.ReLU(), nn.Linear(8, 10))


def convolutions() -> nn.Sequential:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(
            nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 6, 3), nn.ReLU(),
            nn.Flatten(), nn.Linear(96, 10),
        )  # fmt: skip


def env_of(model: nn.Module, granularity: str = "unstructured", **changes: Any) -> Any:
    arguments = {"search_images": 50, "recalibration_images": 32, "device": "cpu", **changes}
    return gym.make("GNNRL-Mask-v0", model=model, granularity=granularity, **arguments)


def mask_of(method: Any, env: Any, **settings: Any) -> np.ndarray:
    recorder = PlanRecorder(env, 1)
    method(recorder, 0, None, **settings)
    assert recorder.spent == 1 and recorder.best is not None
    return recorder.best


def flat(values: dict[str, torch.Tensor]) -> torch.Tensor:
    return torch.cat([values[name].flatten() for name in ("1.weight", "3.weight")])


def test_magnitude_keeps_the_largest_weights_of_all_layers() -> None:
    env = env_of(chain(), sparsity=0.8)
    weights = flat(dict(chain().named_parameters())).detach().abs().numpy()
    np.testing.assert_array_equal(mask_of(magnitude, env), weights >= np.sort(weights)[-env.unwrapped.keep])


def test_a_filters_size_is_its_norm() -> None:
    model = convolutions()
    network = make_network(model, images(1, 1, 8, 8))
    first, second = model[0].weight, model[3].weight
    expected = torch.cat([first.flatten(1).norm(dim=1), second.flatten(1).norm(dim=1)])  # type: ignore[operator]
    np.testing.assert_allclose(weight_size(network), expected.detach().numpy(), rtol=1e-6)


def test_snip_is_the_change_of_the_loss_by_a_weights_factor() -> None:
    """weight x gradient is the derivative with respect to a factor on the weight."""
    model = chain().double()
    x, y = images(20, 1, 8, 8).double(), torch.arange(20) % 10
    gradients = loss_gradients(model, [(x[:10], y[:10]), (x[10:], y[10:])])
    for name, row, column in (("1.weight", 2, 30), ("3.weight", 4, 5)):
        losses = []
        for factor in (1 + 1e-5, 1 - 1e-5):
            changed = copy.deepcopy(model)
            with torch.no_grad():
                dict(changed.named_parameters())[name][row, column] *= factor
            losses.append(sum(float(F.cross_entropy(changed(x[p]), y[p]).detach()) for p in (slice(10), slice(10, 20))))
        saliency = dict(model.named_parameters())[name].detach() * gradients[name]
        assert (losses[0] - losses[1]) / 2e-5 == pytest.approx(float(saliency[row, column]), rel=1e-3, abs=1e-9)


def test_grasp_is_the_change_of_the_gradients_norm() -> None:
    """weight x Hg is half the derivative of the squared norm with respect to a factor on the weight."""
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 8), nn.Tanh(), nn.Linear(8, 10)).double()
    x, y = images(20, 1, 8, 8).double(), torch.arange(20) % 10
    found = gradient_flow(model, [(x, y)])

    def squared_norm(changed: nn.Module) -> float:
        loss = F.cross_entropy(changed(x) / TEMPERATURE, y)
        return sum(float((g**2).sum()) for g in torch.autograd.grad(loss, list(changed.parameters())))

    for name, row, column in (("1.weight", 2, 30), ("3.weight", 4, 5)):
        norms = []
        for factor in (1 + 1e-4, 1 - 1e-4):
            changed = copy.deepcopy(model)
            with torch.no_grad():
                dict(changed.named_parameters())[name][row, column] *= factor
            norms.append(squared_norm(changed))
        assert (norms[0] - norms[1]) / 4e-4 == pytest.approx(float(found[name][row, column]), rel=1e-3)


def test_synaptic_flow_is_conserved_and_counts_paths() -> None:
    """The scores into a unit and out of it sum to the same (Tanaka et al. 2020, theorem 1), biases aside."""
    model = chain()
    nn.init.zeros_(model[1].bias)  # type: ignore[arg-type]
    network = make_network(model, images(1, 1, 8, 8), "unstructured")
    kept = np.random.default_rng(0).random(int(network.widths.sum())) < 0.5
    scores = synaptic_flow(network, kept)
    torch.testing.assert_close(scores["1.weight"].sum(1), scores["3.weight"].sum(0))
    gone = torch.from_numpy(~kept)
    assert (flat(scores)[gone] == 0).all()
    first, second = (dict(model.named_parameters())[n].detach().double().abs() for n in ("1.weight", "3.weight"))
    masks = torch.from_numpy(kept).split([512, 80])
    first, second = first * masks[0].view(8, 64), second * masks[1].view(10, 8)
    torch.testing.assert_close(scores["1.weight"], first * second.sum(0)[:, None])


def test_synflow_prunes_gradually_to_the_exact_count() -> None:
    env = env_of(chain(), sparsity=0.95)
    once, many = (mask_of(synflow, env, rounds=rounds) for rounds in (1, 30))
    assert once.sum() == many.sum() == env.unwrapped.keep
    assert (once != many).any()
    network = env.unwrapped.network
    scores = unit_scores(network, synaptic_flow(network, np.ones(len(once), np.bool_)))
    np.testing.assert_array_equal(once, top_mask(scores, env.unwrapped.keep, network.widths))
    of = group_of(env.unwrapped.network.widths)
    assert {0, 1} == set(of[many])  # no layer collapses


def test_snip_and_grasp_keep_the_highest_of_their_scores_on_the_training_images() -> None:
    env = env_of(chain(), sparsity=0.7)
    model = chain().double()
    x, y = env.unwrapped.data.train.tensors()
    weights = [p for name, p in model.named_parameters() if name.endswith("weight")]
    parameters = list(model.parameters())

    def gradients(temperature: float) -> tuple[torch.Tensor, ...]:
        return torch.autograd.grad(F.cross_entropy(model(x.double()) / temperature, y), parameters, create_graph=True)

    of = dict(zip(map(id, parameters), gradients(1.0), strict=True))
    saliency = torch.cat([(w * of[id(w)]).flatten() for w in weights]).abs().detach().numpy()
    scaled = gradients(TEMPERATURE)
    product = sum((g * g.detach()).sum() for g in scaled)  # whose gradient is the Hessian times the gradient
    flow = dict(zip(map(id, parameters), torch.autograd.grad(product, parameters), strict=True))
    flows = torch.cat([(w * flow[id(w)]).flatten() for w in weights]).detach().numpy()
    for method, scores in ((snip, saliency), (grasp, flows)):
        expected = top_mask(scores, env.unwrapped.keep, env.unwrapped.network.widths)
        assert (mask_of(method, env) == expected).mean() > 0.99  # float32 against float64


def test_lottery_prunes_by_trained_weights_and_rewinds() -> None:
    env, recipe = env_of(chain(), sparsity=0.7), Recipe(epochs=2)
    mask = mask_of(lottery, env, recipe=recipe)
    trained = train(chain(), env.unwrapped.data, recipe, 0)
    scores = flat(dict(trained.named_parameters())).detach().abs().numpy()
    np.testing.assert_array_equal(mask, top_mask(scores, env.unwrapped.keep, env.unwrapped.network.widths))
    assert (mask != mask_of(magnitude, env)).any()
    rewound = dict(env.unwrapped.rewound(mask).named_parameters())
    initial = flat(dict(chain().named_parameters()))
    assert torch.equal(flat(rewound), initial * torch.from_numpy(mask))


def test_unit_scores_add_up_what_makes_a_filter() -> None:
    model = convolutions()
    network = make_network(model, images(1, 1, 8, 8))
    ones = {name: torch.ones_like(p) for name, p in model.named_parameters()}
    # a 3x3 kernel of one input, bias, BatchNorm's scale and shift; then 3x3 of four inputs and a bias
    assert unit_scores(network, ones).tolist() == [9 + 1 + 2] * 4 + [36 + 1] * 6


def test_a_transposed_convolutions_filters_are_what_it_writes() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.ReLU(), nn.ConvTranspose2d(4, 6, 2), nn.ReLU(),
        nn.ConvTranspose2d(6, 6, 2, groups=6), nn.Flatten(), nn.Linear(6 * 8 * 8, 10),
    )  # fmt: skip
    network = make_network(model, images(1, 1, 8, 8))
    ones = {name: torch.ones_like(p) for name, p in model.named_parameters()}
    # 2x2 of four inputs and a bias; behind it a kernel for each channel, which is one unit with what it reads
    assert unit_scores(network, ones).tolist() == [9 + 1] * 4 + [16 + 1 + 4 + 1] * 6
    first, second, third = (model[index].weight.double() for index in (0, 2, 4))  # type: ignore[operator, union-attr]
    written = second.transpose(0, 1).flatten(1).square().sum(1) + third.flatten(1).square().sum(1)
    expected = torch.cat([first.flatten(1).norm(dim=1), written.sqrt()]).detach().numpy()
    np.testing.assert_allclose(weight_size(network), expected, rtol=1e-6)


class Dropped(nn.Module):
    """`chain` with dropout that is no module, in training, or by hand always."""

    def __init__(self, share: float, always: bool = False) -> None:
        super().__init__()
        self.body, self.share, self.always = chain(), share, always

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = self.body[2](self.body[1](x.flatten(1)))
        return self.body[3](F.dropout(hidden, self.share, self.always or self.training))


@pytest.mark.parametrize("method", [snip, grasp])
def test_gradients_are_without_dropout_and_of_the_seed_alone(method: Any) -> None:
    masks = {}
    for share, always, before in ((0.0, False, 0), (0.5, False, 0), (0.5, True, 0), (0.5, True, 1)):
        env = env_of(Dropped(share, always))
        torch.manual_seed(before)
        masks[share, always, before] = mask_of(method, env)
    np.testing.assert_array_equal(masks[0.5, False, 0], masks[0.0, False, 0])
    np.testing.assert_array_equal(masks[0.5, True, 0], masks[0.5, True, 1])
    assert (masks[0.5, True, 0] != masks[0.0, False, 0]).any()


def normed() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 10))


def test_gradients_are_with_batch_norm_by_batch() -> None:
    env = env_of(normed())
    model, (x, y) = normed().train(), env.unwrapped.data.train.take(100, seed=0).tensors()
    loss = F.cross_entropy(model(x), y)
    named = {name: p for name, p in model.named_parameters() if name in ("1.weight", "4.weight")}
    gradients = torch.autograd.grad(loss, list(named.values()))
    scores = torch.cat([(p * g).abs().flatten() for p, g in zip(named.values(), gradients, strict=True)])
    expected = top_mask(scores.detach().numpy(), env.unwrapped.keep, env.unwrapped.network.widths)
    np.testing.assert_array_equal(mask_of(snip, env, images=100), expected)


@pytest.mark.parametrize("method", [snip, grasp])
def test_an_image_that_is_left_over_joins_the_batch_before(method: Any) -> None:
    data = load_data("digits")
    env = env_of(normed(), data=replace(data, train=data.train.take(BATCH + 1)))
    assert mask_of(method, env).sum() == env.unwrapped.keep


class Auxiliary(nn.Module):
    """Gives a second answer, as networks with auxiliary heads do in training."""

    def __init__(self) -> None:
        super().__init__()
        self.body = chain()

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return self.body(x), x.flatten(1)


@pytest.mark.parametrize("of", [lambda *given: loss_gradients(*given), gradient_flow])
def test_gradients_are_of_the_first_answer(of: Any) -> None:
    model, batches = Auxiliary(), [(images(8, 1, 8, 8), torch.arange(8))]
    found, expected = of(model, batches), of(model.body, batches)
    for name, values in expected.items():
        assert torch.equal(found[f"body.{name}"], values)


class Attention(nn.Module):
    """Attention over the rows of an image, by torch's function or spelled out."""

    def __init__(self, fused: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.fused, self.three, self.last = fused, nn.Linear(8, 24), nn.Linear(8, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.three(x).chunk(3, -1)
        spelled = (q @ k.transpose(-1, -2) / 8**0.5).softmax(-1) @ v
        mixed = F.scaled_dot_product_attention(q, k, v) if self.fused else spelled
        return self.last(mixed.mean((1, 2)))


def test_attention_has_a_gradient_flow() -> None:
    batches = [(images(8, 1, 8, 8), torch.arange(8))]
    fused, spelled = (gradient_flow(Attention(fused), batches) for fused in (True, False))
    for name, found in fused.items():
        torch.testing.assert_close(found, spelled[name])


class Untrained(nn.Module):
    """One layer is not trained, another one not used."""

    def __init__(self, in_place: bool = False) -> None:
        super().__init__()
        self.body, self.in_place, self.unused = chain(), in_place, nn.Linear(2, 3)
        self.body[1].requires_grad_(False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.body(x.mul_(2) if self.in_place else x * 2)


@pytest.mark.parametrize("method", [snip, grasp, synflow])
def test_what_is_not_trained_or_not_used_is_scored_too(method: Any) -> None:
    env = env_of(Untrained())
    assert mask_of(method, env).sum() == env.unwrapped.keep


def test_a_forward_that_changes_its_input_has_the_same_gradient_flow() -> None:
    flows = []
    for in_place in (True, False):
        batches = [(images(8, 1, 8, 8, seed=seed), torch.arange(8)) for seed in (0, 1)]
        flows.append(gradient_flow(Untrained(in_place).requires_grad_(), batches))
    for name, found in flows[0].items():
        if not name.startswith("unused"):
            torch.testing.assert_close(found, flows[1][name])
