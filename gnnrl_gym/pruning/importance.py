"""Scores that order the units of a group: the lowest go first."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor, nn

from gnnrl_gym.backends import without_cudnn
from gnnrl_gym.checks import check_choice
from gnnrl_gym.copies import copy_of
from gnnrl_gym.graph.groups import ChannelGroups, Floats, Ints

IMPORTANCES = ("l1", "l2", "bn-scale", "taylor", "random")
Batch = tuple[Tensor, Tensor]


def importance_scores(
    model: nn.Module, groups: ChannelGroups, kind: str, batch: Batch | None = None, seed: int = 0
) -> Floats:
    """Score of every unit, float64 [U].

    * ``l1``, ``l2``: norm of all weights that write or read the unit, each layer scaled to mean 1 so that wide layers
      don't drown the others (group norm; Fang et al. 2023, DepGraph, section 3.3).
    * ``bn-scale``: mean absolute scale of the unit's BatchNorms (Liu et al. 2017, Network Slimming); ``l2`` for groups
      without a BatchNorm.
    * ``taylor``: squared first-order change of the loss when the unit goes (Molchanov et al. 2019, equation 8), needs
      `batch` = (inputs [N, ...], labels [N]).
    * ``random``: drawn from `seed`.

    Raises:
        ValueError: unknown `kind`, or ``taylor`` without a batch of that form.
    """
    check_choice("importance", kind, IMPORTANCES)
    if kind == "taylor" and batch is None:
        raise ValueError("importance='taylor' needs batch=(inputs, labels): a few hundred training images.")
    if kind == "random":
        return np.random.default_rng(seed).random(len(groups.group_of))
    if kind == "taylor":
        assert batch is not None
        _check_batch(batch)
        return _taylor(model, groups, batch)
    if kind == "bn-scale":
        return _bn_scale(model, groups)
    return _norm(model, groups, 1 if kind == "l1" else 2)


def transposed_weights(model: nn.Module) -> set[Tensor]:
    """Weights [inputs, outputs, ...], of transposed convolutions: all others have their outputs first. Grouped ones are
    left out: along their first dimension lie the groups, which are outputs as well."""
    return {m.weight for m in model.modules() if isinstance(m, nn.modules.conv._ConvTransposeNd) and m.groups == 1}


def _check_batch(batch: Batch) -> None:
    if len(batch) != 2 or not all(isinstance(part, Tensor) for part in batch):
        raise ValueError("batch is a pair of tensors, inputs [N, ...] and labels [N].")
    inputs, labels = batch
    if not len(inputs) or labels.shape != (len(inputs),):
        raise ValueError(
            f"batch is inputs [N, ...] and labels [N] of at least one image, got {tuple(inputs.shape)} and "
            f"{tuple(labels.shape)}."
        )


def _owned(model: nn.Module, groups: ChannelGroups) -> Iterator[tuple[nn.Parameter, int, Ints]]:
    parameters = dict(model.named_parameters())
    for (name, dim), owner in groups.owner.items():
        if name in parameters and (owner >= 0).any():
            yield parameters[name], dim, owner


def _spread(groups: ChannelGroups, owner: Ints, values: Tensor) -> Floats:
    """Sum of `values` [size] over the indices that each unit owns, [U]."""
    owned = owner >= 0
    weights = values.detach().double().cpu().numpy()[owned]
    return np.bincount(owner[owned], weights, minlength=len(groups.group_of)).astype(np.float64)


def _norm(model: nn.Module, groups: ChannelGroups, power: int) -> Floats:
    scores = np.zeros(len(groups.group_of))
    for weight, dim, owner in _owned(model, groups):
        if weight.dim() < 2:
            continue
        size = weight.detach().abs().double().pow(power).transpose(0, dim).flatten(1).sum(1)
        scores += _spread(groups, owner, size / size.mean().clamp_min(1e-12))
    return scores ** (1 / power)


def _bn_scale(model: nn.Module, groups: ChannelGroups) -> Floats:
    scores, count = np.zeros(len(groups.group_of)), np.zeros(len(groups.group_of))
    for module in model.modules():
        if not isinstance(module, nn.modules.batchnorm._BatchNorm) or module.weight is None:
            continue
        for weight, _, owner in _owned(model, groups):
            if weight is module.weight:
                scores += _spread(groups, owner, weight.abs())
                count += _spread(groups, owner, torch.ones_like(weight))
    without = np.isin(groups.group_of, groups.group_of[count == 0])
    return np.where(without, _norm(model, groups, 2), scores / np.maximum(count, 1))


def _taylor(model: nn.Module, groups: ChannelGroups, batch: Batch) -> Floats:
    """A unit goes when all its readers lose it: the sum of weight times gradient over them is the first-order change
    of the loss; its square is averaged over mini-batches."""
    model = copy_of(model).eval()
    transposed = transposed_weights(model)
    readers = [(w, dim, owner) for w, dim, owner in _owned(model, groups) if dim == (0 if w in transposed else 1)]
    for weight, *_ in readers:
        weight.requires_grad_()  # what is not trained is pruned all the same
    scores = np.zeros(len(groups.group_of))
    for images, labels in zip(batch[0].split(32), batch[1].split(32), strict=True):
        with torch.enable_grad(), without_cudnn(model):
            loss = nn.functional.cross_entropy(model(images.clone()), labels)  # it may change its input
            # a head that only training uses has no part in it
            gradients = torch.autograd.grad(loss, [w for w, *_ in readers], allow_unused=True)
        change = np.zeros(len(scores))
        for (weight, dim, owner), gradient in zip(readers, gradients, strict=True):
            if gradient is not None:
                change += _spread(groups, owner, (weight * gradient).transpose(0, dim).flatten(1).sum(1))
        scores += change**2
    return scores
