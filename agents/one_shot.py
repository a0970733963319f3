"""One-shot criteria: a score for every unit from the weights and some gradients, one mask, one evaluation.

Scores of weights are as published. A filter's is the sum over the weights that make it (its convolution's row, bias,
BatchNorm), which for magnitude is the norm of its convolution's row.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from agents.recorder import PlanRecorder
from gnnrl_gym.backends import without_cudnn
from gnnrl_gym.copies import copy_of
from gnnrl_gym.evaluation.training import Recipe, main_output, recipe_for, train, undisturbed
from gnnrl_gym.graph.groups import Kept
from gnnrl_gym.pruning.importance import transposed_weights
from gnnrl_gym.pruning.masks import kept_units, top_mask
from gnnrl_gym.pruning.network import PrunableNetwork
from gnnrl_gym.pruning.recalibration import batch_norms
from gnnrl_gym.pruning.sparsity import SparseNetwork
from gnnrl_gym.zoo.split import training_batches

Floats = npt.NDArray[np.float64]
Values = dict[str, Tensor]  # by parameter name
IMAGES = 2000  # training images for gradients
BATCH = 200
TEMPERATURE = 200.0  # of GraSP's logits (Wang et al. 2020, their code)
ROUNDS = 100  # of SynFlow (Tanaka et al. 2020, section 6)


def magnitude(recorder: PlanRecorder, seed: int = 0, out: Path | None = None) -> None:
    """The largest weights stay, over all layers together (Han et al. 2015)."""
    _play(recorder, weight_size(_env(recorder).network))


def snip(recorder: PlanRecorder, seed: int = 0, out: Path | None = None, images: int = IMAGES) -> None:
    """|weight x gradient| of the training loss (Lee et al. 2019, SNIP, equation 4)."""
    env = _env(recorder)
    with undisturbed(seed, env.device), without_cudnn(env.network.model):
        model = _in_training(env)
        gradients = loss_gradients(model, _batches(env, images, seed))
    saliency = {name: p.detach() * gradients[name] for name, p in model.named_parameters()}
    _play(recorder, unit_scores(env.network, saliency, after_sum=torch.abs))


def grasp(recorder: PlanRecorder, seed: int = 0, out: Path | None = None, images: int = IMAGES) -> None:
    """weight x Hessian-gradient product: what stays keeps the gradient's norm (Wang et al. 2020, GraSP, equation 8)."""
    env = _env(recorder)
    with undisturbed(seed, env.device), without_cudnn(env.network.model):
        saliency = gradient_flow(_in_training(env), list(_batches(env, images, seed)))
    _play(recorder, unit_scores(env.network, saliency))


def synflow(recorder: PlanRecorder, seed: int = 0, out: Path | None = None, rounds: int = ROUNDS) -> None:
    """Synaptic flow: no data, pruned in `rounds` rounds (Tanaka et al. 2020, SynFlow, algorithm 1)."""
    env = _env(recorder)
    network, widths = env.network, env.network.widths
    scores = np.zeros(int(widths.sum()))
    kept = np.ones(len(scores), np.bool_)
    for round_ in range(1, rounds + 1):
        sparsity = 1 - (env.keep / len(kept)) ** (round_ / rounds)
        scores = np.where(kept, unit_scores(network, synaptic_flow(network, kept)), -1.0)
        keep = max(kept_units(widths, sparsity), env.keep)
        kept = top_mask(scores, keep, widths)
    _play(recorder, kept.astype(np.float64))


def lottery(recorder: PlanRecorder, seed: int = 0, out: Path | None = None, recipe: Recipe | None = None) -> None:
    """Train the dense network, keep its largest weights, rewind (Frankle and Carbin 2019, one-shot). `recipe`: how
    long; by default as the network that stays will be. With the objective `pretrained` it has been trained already."""
    env = _env(recorder)
    if env.objective == "pretrained":
        return magnitude(recorder, seed, out)
    chosen = recipe or recipe_for(env.arguments["model"])
    trained = train(copy.deepcopy(env.initial), env.data, chosen, seed, env.device)
    _play(recorder, weight_size(env.network, trained))


# ---- scores -------------------------------------------------------------------------------------------------------


def weight_size(network: PrunableNetwork, model: nn.Module | None = None) -> Floats:
    """Score of every unit, float64 [U]: a weight's absolute value, a filter's l2 norm, by the weights of `model` (a
    network of the same structure; default: the network's own)."""
    scored = network.model if model is None else model
    squares = {name: p.detach().double() ** 2 for name, p in scored.named_parameters()}
    kernels = {name: value if value.dim() > 1 else torch.zeros_like(value) for name, value in squares.items()}
    return np.sqrt(unit_scores(network, kernels))


def unit_scores(
    network: PrunableNetwork, values: Values, after_sum: Callable[[Tensor], Tensor] | None = None
) -> Floats:
    """Sum over what makes each unit, float64 [U], of values that have the shapes of the parameters.

    Args:
        after_sum: of each parameter's sums, before those of several parameters are added.
    """
    change = after_sum or (lambda x: x)
    if isinstance(network, SparseNetwork):
        parts = [change(values[name]).flatten() for name in network.slimmer.units]  # type: ignore[attr-defined]
        return torch.cat(parts).double().cpu().numpy()
    total = np.zeros(len(network.groups.group_of))
    parameters, transposed = dict(network.model.named_parameters()), transposed_weights(network.model)
    for (name, dim), owner in network.groups.owner.items():
        owned = owner >= 0
        outputs = 1 if parameters.get(name) in transposed else 0  # the dimension that they lie along
        if dim == outputs and owned.any() and name in values:
            by_output = values[name].double().transpose(0, dim)
            sums = change(by_output.flatten(1).sum(1) if by_output.dim() > 1 else by_output)
            np.add.at(total, owner[owned], sums.cpu().numpy()[owned])
    return total


def loss_gradients(model: nn.Module, batches: Iterable[tuple[Tensor, Tensor]]) -> Values:
    """Gradient of the cross-entropy, summed over the batches."""
    named = dict(model.named_parameters())
    total = {name: torch.zeros_like(p) for name, p in named.items()}
    for images, labels in batches:
        loss = F.cross_entropy(main_output(model(images)), labels)
        for name, gradient in zip(named, _by_weights(loss, named), strict=True):
            total[name] += gradient
    return total


def gradient_flow(model: nn.Module, batches: list[tuple[Tensor, Tensor]]) -> Values:
    """Weight times (Hessian times gradient): how much the squared norm of the gradient falls without the weight."""
    named = dict(model.named_parameters())

    def gradients(images: Tensor, labels: Tensor, graph: bool) -> tuple[Tensor, ...]:
        outputs = main_output(model(images.clone()))  # a forward may change its input in place
        return _by_weights(F.cross_entropy(outputs / TEMPERATURE, labels), named, graph)

    with sdpa_kernel(SDPBackend.MATH):  # the fused kernels of attention have no second derivative
        whole = [sum(parts) for parts in zip(*(gradients(*batch, graph=False) for batch in batches), strict=True)]
        total = {name: torch.zeros_like(p) for name, p in named.items()}
        for batch in batches:
            product = sum((g * w).sum() for g, w in zip(gradients(*batch, graph=True), whole, strict=True))
            for name, hessian in zip(named, _by_weights(product, named), strict=True):
                total[name] += hessian
    return {name: named[name].detach() * value for name, value in total.items()}


def synaptic_flow(network: PrunableNetwork, kept: Kept) -> Values:
    """Weight times gradient of the summed outputs on an image of ones, with all weights by their size, in float64."""
    model = network.slimmer.mask(kept).double().eval().requires_grad_()
    with torch.no_grad():
        for tensor in model.state_dict().values():
            if isinstance(tensor, Tensor) and tensor.is_floating_point():
                tensor.abs_()
    named = dict(model.named_parameters())
    image = torch.ones_like(network.example_input[0], dtype=torch.float64)
    with without_cudnn(model):
        gradients = _by_weights(model(image).sum(), named)
    return {name: p.detach() * g for (name, p), g in zip(named.items(), gradients, strict=True)}


# ---- inside -------------------------------------------------------------------------------------------------------


def _by_weights(value: Any, named: Mapping[str, Tensor], graph: bool = False) -> tuple[Tensor, ...]:
    """Gradients of a scalar by every parameter, zero by those that have no part in it."""
    return torch.autograd.grad(value, list(named.values()), create_graph=graph, materialize_grads=True)


def _env(recorder: PlanRecorder) -> Any:
    return recorder.unwrapped


def _in_training(env: Any) -> nn.Module:
    """A copy of the scored network with BatchNorm by batch, as in training, and no dropout of any kind: what gradients
    are of. What is not trained is pruned all the same."""
    model: nn.Module = copy_of(env.network.model).eval().requires_grad_()
    for norm in batch_norms(model):
        norm.train()
    return model


def _batches(env: Any, images: int, seed: int) -> Iterable[tuple[Tensor, Tensor]]:
    taken = env.data.train.take(images, seed=seed)
    for indices in training_batches(torch.arange(len(taken)), BATCH):
        x, y = taken.batch(indices)
        yield x.to(env.device), y.to(env.device)


def _play(recorder: PlanRecorder, scores: Floats) -> None:
    """One episode with the mask of the highest scores."""
    env = _env(recorder)
    recorder.play([top_mask(scores, env.keep, env.network.widths).astype(np.float32)])
