"""A data set in three parts: how the search split is set apart, and what the images are normalised by."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from gnnrl_gym.checks import check_seed
from gnnrl_gym.zoo.arrays import KEYS, SEARCH_KEYS, Labelled, Parts, labelled
from gnnrl_gym.zoo.images import ImageSource
from gnnrl_gym.zoo.normalisation import Normalisation, Values, by_channel, check_normalisation
from gnnrl_gym.zoo.split import Split

# Of ImageNet's training images; the published CIFAR networks were trained with them too.
RGB_MEAN, RGB_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
SEARCH_SHARE = 0.1


@dataclass(frozen=True, eq=False)
class DataSplits:
    """A data set in three disjoint parts. ``DataSplits.of`` makes one of arrays; printing one shows what is in it.

    Attributes:
        name: the name or path it was loaded by.
        train: for fine-tuning and recalibration.
        search: for the reward. Best of images that the network was not trained on.
        test: reported once at the end, never used to choose anything.
        num_classes: labels are below it.
        input_shape: (C, H, W) of one image.
        flip: whether mirrored images are plausible, so that augmentation may make them.
        seed: of the draw that set the search split apart.
    """

    name: str
    train: Split
    search: Split
    test: Split
    num_classes: int
    input_shape: tuple[int, int, int]
    flip: bool
    seed: int = 0

    @classmethod
    def of(
        cls,
        x_train: Any,
        y_train: Any,
        x_test: Any,
        y_test: Any,
        *,
        x_search: Any = None,
        y_search: Any = None,
        mean: Values | None = None,
        std: Values | None = None,
        search: float = SEARCH_SHARE,
        seed: int = 0,
        name: str = "arrays",
        flip: bool | None = None,
    ) -> DataSplits:
        """Splits of one's own arrays or tensors, which are copied: what a ``.npz`` with them would give.

        Args:
            x_train, x_test: images, uint8 ``[N, H, W]`` or ``[N, H, W, C]``, pixels from 0 to 255.
            y_train, y_test: labels, integers ``[N]`` from 0.
            x_search, y_search: the search split, likewise: images that the network was not trained on, and that are
                not the test's. None: a share of the training images.
            mean, std: as in ``load_data``.
            search: share of the training images, in (0, 1), that is set apart where there is no ``x_search``.
            seed: of the draw that sets them apart.
            name: what messages and records call the data.
            flip: whether mirrored images are plausible; None: in colour they are, in grey not.

        Raises:
            ValueError: for data of another form.
        """
        if not isinstance(search, (int, float)) or not 0 < search < 1:
            raise ValueError(f"search is a share of the training images in (0, 1), got {search!r}")
        check_seed(seed=seed)
        check_normalisation(mean, std)
        arrays = (x_train, y_train, x_test, y_test, x_search, y_search)
        parts = labelled(dict(zip((*KEYS, *SEARCH_KEYS), arrays, strict=True)))
        return assemble(name, parts, seed, flip, (mean, std), search)

    @property
    def mean(self) -> tuple[float, ...]:
        """What was taken off each channel, on the scale [0, 1]."""
        return tuple(self.train.mean)

    @property
    def std(self) -> tuple[float, ...]:
        """What each channel was divided by, on the same scale."""
        return tuple(self.train.std)

    def __repr__(self) -> str:
        sizes = f"{len(self.train)} train, {len(self.search)} search, {len(self.test)} test"
        mean, std = (", ".join(f"{value:.4g}" for value in values) for values in (self.mean, self.std))
        return (
            f"DataSplits({self.name!r}: {sizes} images of shape {self.input_shape}, {self.num_classes} classes, "
            f"mean ({mean}), std ({std}))"
        )


def assemble(
    name: str,
    parts: Parts,
    seed: int,
    flip: bool | None,
    given: tuple[Any, Any],
    share: float = SEARCH_SHARE,
) -> DataSplits:
    """Splits of the parts of a data set; ``given``: mean and std, None for the usual ones."""
    train, search = (parts.train, parts.search) if parts.search else _set_apart(parts.train, seed, share)
    normalisation = normalisation_of(train.images, torch.arange(len(train.labels)), given)
    labels, shape = parts.train.labels, train.images.shape
    _warn_of_absent_classes(name, labels, train.labels)
    return DataSplits(
        name,
        Split(*train, *normalisation),
        Split(*search, *normalisation),
        Split(*parts.test, *normalisation),
        num_classes=int(labels.max()) + 1,
        input_shape=shape,
        # In colour it may be anything, and most things have mirror images; in grey it is digits or letters.
        flip=shape[0] == 3 if flip is None else flip,
        seed=seed,
    )


def _warn_of_absent_classes(name: str, labels: Tensor, trained: Tensor) -> None:
    """A warning, not an error: a part of a data set may well lack a class. ``trained``: of ``labels``, what the search
    has left."""
    given = torch.bincount(labels)
    absent = (torch.bincount(trained, minlength=len(given)) == 0).nonzero().flatten().tolist()
    if not absent:
        return
    some = ", ".join(map(str, absent[:5])) + (", ..." if len(absent) > 5 else "")
    mend = "; take 1 off all labels if they count from 1" if absent == [0] and not given[0] else ""
    if given[absent].any():
        mend = "; what there was is set apart for the search: give more images, or a search split of your own"
    message = f"{name!r} has no training image with the label {some}, of 0 to {int(labels.max())}"
    warnings.warn(f"{message}: a class that is never trained{mend}.", stacklevel=2)


def _set_apart(training: Labelled, seed: int, share: float) -> tuple[Labelled, Labelled]:
    """What stays for training, and a share for the search."""
    n = len(training.labels)
    if n < 2:
        raise ValueError("at least 2 training images are needed: one to train on, one to search with")
    order = torch.randperm(n, generator=torch.Generator().manual_seed(seed))
    size = min(max(1, round(share * n)), n - 1)
    search, train = (Labelled(training.images.select(at), training.labels[at]) for at in (order[:size], order[size:]))
    return train, search


def normalisation_of(images: ImageSource, train: Tensor, given: tuple[Any, Any]) -> Normalisation:
    """Mean and standard deviation by channel: what is given, else the usual constants, or the train split's own."""
    if given[0] is not None:
        return by_channel(*given, images.shape[0])
    if images.shape[0] == 3:
        return RGB_MEAN, RGB_STD
    # By counting grey levels: exact, and no float copy of all images.
    channels = images.read(train).unbind(1)
    counts = torch.stack([torch.bincount(channel.flatten(), minlength=256) for channel in channels]).double()
    shares, levels = counts / counts.sum(1, keepdim=True), torch.arange(256, dtype=torch.float64) / 255
    mean = shares @ levels
    std = (shares @ levels.square() - mean.square()).clamp(min=0).sqrt()
    std[std == 0] = 1.0  # a constant channel says nothing; leave its scale
    return tuple(mean.tolist()), tuple(std.tolist())
