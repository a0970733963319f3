"""The smallest network of every family that timm has (`pip install timm`): traced, slimmed, exact?"""

from __future__ import annotations

import contextlib
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.coverage import BUDGET, COLUMNS, PLANS, cells, kept, measured, passes, prepare, randomise, rows
from benchmarks.registry import Benchmark, Options, markdown_table, of_model

SMALL_ENOUGH = 4_000_000  # parameters: no smaller network of its family is looked for
LARGEST = 150_000_000  # a family whose smallest has more is left out
SIZES = (64, 128)  # images that are tried, to save time, before those that the network was made for


def run(options: Options) -> dict[str, Any]:
    """Rows are kept in the runs folder: an interrupted measurement goes on where it was.

    Raises:
        ModuleNotFoundError: timm is not installed.
    """
    import timm

    folder = options.runs / f"timm-coverage{f'-{options.seed}' if options.seed else ''}"
    names = [options.model] if options.model else kept(folder / ".families.json", _smallest, "", options.seed)
    if isinstance(names, str):
        raise RuntimeError(f"timm's networks could not be listed: {names}")
    found = rows(names, partial(_row, folder, options.seed), options.workers)
    return {"timm": timm.__version__, "plans": PLANS, "budget": BUDGET, "rows": found}


def _smallest(_: str, __: int) -> list[str]:
    """Of every family the network with the fewest parameters, or the first that has few enough."""
    import timm

    found = []
    for family in timm.list_modules():
        sizes: dict[str, int] = {}
        for name in timm.list_models(module=family):
            with contextlib.suppress(Exception), torch.device("meta"):  # some can't be made without memory
                sizes[name] = sum(p.numel() for p in timm.create_model(name).parameters())
            if sizes.get(name, LARGEST) < SMALL_ENOUGH:
                break
        found += [name for name in sizes if sizes[name] == min(sizes.values()) < LARGEST][:1]
    return found


def _row(folder: Path, seed: int, name: str) -> dict[str, Any]:
    found = kept(folder / f"{name}.json", _measure, name, seed)
    return {"network": name} | (found if isinstance(found, dict) else {"image": 0, "error": found})


def _measure(name: str, seed: int) -> dict[str, Any]:
    prepare(seed)
    model, x = _made(name)
    return {"image": x.shape[-1]} | measured(model, x, seed)


def _made(name: str) -> tuple[nn.Module, Tensor]:
    """The network and the smallest image that it takes."""
    import timm

    for size in SIZES:
        for settings in ({}, {"img_size": size}):
            with contextlib.suppress(Exception):  # many take the size of image alone that they were made for
                return _that_runs(timm.create_model(name, num_classes=10, **settings), size)
    model = timm.create_model(name, num_classes=10)
    return _that_runs(model, model.default_cfg["input_size"][-1])


def _that_runs(model: nn.Module, size: int) -> tuple[nn.Module, Tensor]:
    x = torch.randn(1, 3, size, size)
    with torch.no_grad():
        randomise(model.eval())(x)
    return model, x


def table(record: dict[str, Any]) -> str:
    """A row per network, and how many pass."""
    lines = [[row["network"], str(row["image"] or ""), *cells(row)] for row in record["rows"]]
    passed = sum(passes(row) for row in record["rows"])
    lines.append([f"**pass, of {len(lines)}**", "", "", "", "", f"**{passed}**", ""])
    return markdown_table(["network", "image", *COLUMNS], lines)


BENCHMARK = Benchmark("timm-coverage", "the smallest network of every family of timm", run, table, of_model)
