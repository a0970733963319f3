"""What the environments share that prune one network: its graph, its pictures, and how it is made and checked."""

from __future__ import annotations

import os
from collections.abc import Mapping
from functools import partial
from typing import Any

import gymnasium as gym
import numpy as np
import torch
from gymnasium import spaces
from torch import Tensor, nn

from gnnrl_gym.copies import copy_of
from gnnrl_gym.envs.rendering import draw_plan, plan_table
from gnnrl_gym.evaluation.accuracy import PlanEvaluator
from gnnrl_gym.graph.features import EDGE_FEATURES, LEVELS, NODE_FEATURES
from gnnrl_gym.graph.groups import Ints
from gnnrl_gym.pruning.network import PrunableNetwork
from gnnrl_gym.pruning.recalibration import eager
from gnnrl_gym.zoo import DataSplits, load_data
from gnnrl_gym.zoo.images import FileImages
from gnnrl_gym.zoo.models import input_shape_for, model_names

# A forked process, as Gymnasium's AsyncVectorEnv makes, hangs in OpenMP as soon as it uses several threads where its
# parent has done so. Beside others one is right anyway.
if hasattr(os, "register_at_fork"):  # not on Windows, where nothing forks
    os.register_at_fork(after_in_child=partial(torch.set_num_threads, 1))

NOT_SCORED = -1.0  # not NaN: equal infos must compare equal


class NetworkEnv(gym.Env[spaces.GraphInstance, np.ndarray]):
    """A network that is pruned and scored. Subclasses say what an action means, and when a score is given.

    Attributes:
        network: the dense network and its groups. evaluator: scores it, and counts.
        given: the network with the weights that were given, before an objective trained it here.
        widths: the present plan, int64 [A].
        max_nodes, max_edges: of its graph, which has the same nodes and edges at any widths.
    """

    metadata = {"render_modes": ["ansi", "rgb_array"], "render_fps": 1}
    levels = len(LEVELS)

    arguments: dict[str, Any]
    data: DataSplits
    device: torch.device
    network: PrunableNetwork
    given: nn.Module
    evaluator: PlanEvaluator
    widths: Ints
    _accuracy: float

    def _make_spaces(self, components: int) -> None:
        """The spaces, with an action component for each of so many parts; measures the graph's sensitivities."""
        self.observation_space = spaces.Graph(
            spaces.Box(-4.0, 4.0, (len(NODE_FEATURES),), np.float32),
            spaces.Box(-4.0, 4.0, (len(EDGE_FEATURES),), np.float32),
        )
        self.action_space = spaces.Box(0.0, 1.0, (components,), np.float32)
        builder = self.network.graph_builder
        builder.set_sensitivity(self.evaluator.sensitivity())
        self.max_nodes, self.max_edges = builder.nodes, len(builder.edges)

    @property
    def evaluations(self) -> int:
        """Evaluations since the environment was made; its slots count together."""
        return self.evaluator.evaluations

    def render(self) -> Any:
        """The groups with what is kept: text, or an image uint8 [H, W, 3]."""
        if self.render_mode is None:
            raise ValueError("Rendering needs gym.make(..., render_mode='ansi') or 'rgb_array'.")
        draw = plan_table if self.render_mode == "ansi" else draw_plan
        return draw(self.network, self.widths, self._limits(), self._accuracy)

    def _limits(self) -> Mapping[str, float]:
        """The share that may stay, by what it is of."""
        raise NotImplementedError

    def _finite(self, action: Any, meaning: str) -> np.ndarray:
        """The action as an array.

        Raises:
            ValueError: another shape, NaN or infinity.
        """
        values, shape = np.asarray(action), self.action_space.shape
        if values.shape != shape:
            raise ValueError(f"The action must have shape {shape}, one {meaning}, got {values.shape}.")
        if not np.isfinite(values).all():
            raise ValueError(f"The action holds NaN or infinity at component {np.argmin(np.isfinite(values))}.")
        return values


def own_arguments(given: Mapping[str, Any]) -> dict[str, Any]:
    """What `__init__` was called with, from its `locals()`.

    A module is copied as it is now: an environment that is made again from its arguments (by `copy`, `pickle`, in a
    worker) is the same, whatever the caller did with the module since.
    """
    found = {name: value for name, value in given.items() if name not in ("self", "__class__")}
    return {name: copy_of(value) if isinstance(value, nn.Module) else value for name, value in found.items()}


def splits_for(data: str | os.PathLike[str] | DataSplits, model: str | nn.Module) -> DataSplits:
    """The data that an environment is given, loaded where it is a name or path.

    The images of a folder are brought to the size that a named network is usually fed. A module says nothing of its
    size: it gets 224 by 224, unless it is given `load_data(folder, image_size=...)`.

    Raises:
        ValueError, FileNotFoundError: as `load_data`.
    """
    if isinstance(data, DataSplits):
        return data
    if isinstance(model, str) and model in model_names():
        return load_data(data, image_size=input_shape_for(model)[1])
    return load_data(data)


def check_model(model: Any) -> None:
    """Check that an environment was given a network that it can use.

    Raises:
        ValueError: it is neither a name nor an `nn.Module`.
    """
    if not isinstance(model, str | nn.Module):
        what = f"the class {model.__name__}" if isinstance(model, type) else f"a {type(model).__name__}"
        raise ValueError(f"model is a name for load_model, or a network (an nn.Module, made already), got {what}.")


def check_weights(model: str | nn.Module, weights: str | os.PathLike[str] | None) -> None:
    """Check that weights are given only with a model by name.

    Raises:
        ValueError: there are weights and a module, which has its own.
    """
    if weights is not None and not isinstance(model, str):
        raise ValueError(
            "weights go with a model by name. A module is taken with the weights it has: load them into it, "
            "and leave weights out."
        )


def check_outputs(module: nn.Module, data: DataSplits, device: torch.device) -> None:
    """Check that a network classifies the images of `data`: [N, C, H, W] in, one tensor [N, classes] out.

    Raises:
        ValueError: `module` (put into eval mode) does not take the images, or does not return one tensor with an
            output for every class.
    """
    x, _ = data.train.take(2, seed=1).tensors()
    try:
        with torch.no_grad():
            outputs = eager(module).eval()(x.to(device))
    except Exception as error:  # whatever a forward of the caller's raises
        mend = " Give it the folder in another size: load_data(folder, image_size=...)."
        raise ValueError(
            f"The network does not take the images of {data.name!r}, shape {data.input_shape}: {error}."
            f"{mend if isinstance(data.train.images, FileImages) else ''}"
        ) from error
    if not isinstance(outputs, Tensor) or outputs.ndim != 2:
        shape = f" of shape {tuple(outputs.shape)}" if isinstance(outputs, Tensor) else ""
        raise ValueError(
            f"The network answers with a {type(outputs).__name__}{shape}, but plans are scored by one tensor "
            "[N, classes]: wrap it in a module that returns that alone."
        )
    if outputs.shape[1] != data.num_classes:
        raise ValueError(
            f"The network answers with shape {tuple(outputs.shape)}, but {data.name!r} has "
            f"{data.num_classes} classes: use a network with that many outputs."
        )
