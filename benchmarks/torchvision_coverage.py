"""Every classification network of torchvision: traced, slimmed, exact? Torch-Pruning beside it, where installed."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import torch
import torchvision
from torch import Tensor, nn

from benchmarks.coverage import (
    ABSENT,
    BUDGET,
    COLUMNS,
    PLANS,
    cells,
    kept,
    measured,
    passes,
    prepare,
    randomise,
    rows,
)
from benchmarks.registry import Benchmark, Options, markdown_table, of_model

# the smallest images that the network takes, to save time: channels, not pixels, are what is checked
_SIZES = {"vit_h_14": 56, "vit_": 224, "maxvit": 224, "swin_v2": 256, "swin": 224, "inception": 299, "googlenet": 128}


def run(options: Options) -> dict[str, Any]:
    """Rows are kept in the runs folder: an interrupted measurement goes on where it was."""
    names = [options.model] if options.model else torchvision.models.list_models(module=torchvision.models)
    folder = options.runs / f"torchvision-coverage{f'-{options.seed}' if options.seed else ''}"
    found = rows(names, partial(_row, folder, options.seed), options.workers)
    return {"plans": PLANS, "budget": BUDGET, "rows": found}


def _row(folder: Path, seed: int, name: str) -> dict[str, Any]:
    theirs = kept(folder / f"{name}.torch-pruning.json", _torch_pruning, name, seed)
    found = kept(folder / f"{name}.json", _measure, name, seed)
    row = {"network": name, "image": _size(name), "torch_pruning": theirs}
    return row | (found if isinstance(found, dict) else {"error": found})


def _size(name: str) -> int:
    return next((size for start, size in _SIZES.items() if name.startswith(start)), 64)


def _prepared(name: str, seed: int) -> tuple[nn.Module, Tensor]:
    prepare(seed)
    heads: dict[str, Any] = {"aux_logits": True, "init_weights": False} if name in ("googlenet", "inception_v3") else {}
    if name.startswith("vit_"):
        heads = {"image_size": _size(name)}
    model = randomise(torchvision.models.get_model(name, weights=None, **heads).eval())
    return model, torch.randn(1, 3, _size(name), _size(name))


def _measure(name: str, seed: int) -> dict[str, Any]:
    return measured(*_prepared(name, seed), seed)


def _torch_pruning(name: str, seed: int) -> str:
    """ "ok", "not installed", or an error: how Torch-Pruning removes channels and runs forward and backward."""
    try:
        import torch_pruning
    except ImportError:
        return ABSENT
    model, x = _prepared(name, seed)
    ignored = [m for m in model.modules() if 1000 in (getattr(m, "out_features", 0), getattr(m, "out_channels", 0))]
    pruner = torch_pruning.pruner.MagnitudePruner(
        model,
        x,
        importance=torch_pruning.importance.MagnitudeImportance(p=2),
        pruning_ratio=0.3,
        ignored_layers=ignored,
    )
    pruner.step()
    model.eval()(x).sum().backward()
    return "ok"


def table(record: dict[str, Any]) -> str:
    """A row per network, and how many pass."""
    header = ["network", "image", *COLUMNS, "Torch-Pruning"]
    lines = []
    for row in record["rows"]:
        theirs = "ok" if row["torch_pruning"] == "ok" else row["torch_pruning"].split(":")[0]
        lines.append([row["network"], str(row["image"]), *cells(row), theirs])
    passed = sum(passes(row) for row in record["rows"])
    others = sum(row["torch_pruning"] == "ok" for row in record["rows"])
    lines.append([f"**pass, of {len(lines)}**", "", "", "", "", f"**{passed}**", "", f"**{others}**"])
    return markdown_table(header, lines)


BENCHMARK = Benchmark("torchvision-coverage", "all of torchvision, Torch-Pruning beside it", run, table, of_model)
