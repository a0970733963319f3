"""What a report says of a run in tables: rows of text."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from agents.provenance import DIGESTS
from agents.report_runs import Groups, Run
from agents.results import SearchResult
from gnnrl_gym.envs.budget import in_words
from gnnrl_gym.zoo.models import DIGITS, model_names

Row = tuple[str, ...]
_NOT_AGAIN = ("model", "data", "weights", "budget", "metric", "method", "seed", "evaluations", "environment",
              "finetuning", "render_mode", *DIGESTS)  # fmt: skip
_TEST = "on the test split, looked at once, after the search"


def percent(share: float | None) -> str:
    """ "49.92 %"; nothing of None."""
    return "" if share is None else f"{100 * share:.2f} %"


def budget_of(run: Run) -> str:
    """The budget in words."""
    budget, metric = run.about("budget"), run.about("metric")
    if budget is None and run.early:  # not finished
        return f"{1 - float(run.settings.get('sparsity', 0.5)):g} of units"
    return in_words(budget if isinstance(budget, dict) else {str(metric): budget})


def title_of(run: Run) -> str:
    """The run in a line."""
    return f"{run.about('model')} on {run.about('data')}: {run.about('method')}, {budget_of(run)}"


# ---- what was asked ------------------------------------------------------------------------------------------------


def asked_rows(run: Run) -> list[Row]:
    """What was asked, and where and how long it ran."""
    digests = [f"{run.settings[key]} of the {what}" for key, what in DIGESTS.items() if key in run.settings]
    rows = [
        ("model", run.about("model")),
        ("weights", _weights(run)),
        ("data", run.about("data")),
        ("budget", f"{budget_of(run)}, as shares of the dense network's"),
        ("method", run.about("method")),
        ("seed", str(run.about("seed"))),
        ("evaluations", spent_of(run)),
        ("settings", _listed({k: v for k, v in {**run.settings, **run.asked}.items() if k not in _NOT_AGAIN})),
        ("digests", "; ".join(digests)),
    ]
    return [row for row in rows if row[1]] + (_ran_rows(run.result) if run.result else [])


def _ran_rows(result: SearchResult) -> list[Row]:
    trained = [("fine-tuning", _listed(how)) for how in result.settings.get("finetuning", [])]
    took = ("search took", f"{result.seconds:.1f} s")
    return [*trained, took, ("machine", str(result.machine)), ("versions", _listed(result.versions))]


def _weights(run: Run) -> str:
    weights, model = run.about("weights"), run.about("model")
    if weights is not None:
        return str(weights)
    if model not in model_names():
        return "those of the module that was given"
    return "those that ship with the package" if model == DIGITS and not run.settings.get("objective") else "random"


def spent_of(run: Run) -> str:
    """ "400", or "37 of 400" where it ended before."""
    spent = run.result.evaluations if run.result else len(run.log)
    asked = run.asked.get("evaluations", spent)
    return str(spent) if spent == asked else f"{spent} of {asked}"


def _listed(values: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} {_said(value)}" for name, value in values.items() if value is not None)


def _said(value: Any) -> str:
    if isinstance(value, dict):
        return f"({_listed(value)})"
    return value if isinstance(value, str) else json.dumps(value)


# ---- what came of it -----------------------------------------------------------------------------------------------


def outcome_rows(run: Run) -> list[Row]:
    """What is measured, of the dense network, of the pruned one, and what it is measured on."""
    if run.result is None:
        return _rows_so_far(run)
    if run.early:
        return [*_cost_rows(run.result), *_early_rows(run), *_finetuned_rows(run.result)]
    return [*_cost_rows(run.result), *_accuracy_rows(run), *_finetuned_rows(run.result)]


def _rows_so_far(run: Run) -> list[Row]:
    if run.best is None:
        return []
    costs = {"MACs": run.best.get("macs_ratio"), "parameters": run.best.get("params_ratio")}
    rows: list[Row] = [(name, percent(1), percent(share), "of the best plan so far") for name, share in costs.items()]
    return [*rows, ("search accuracy", "", percent(run.best["search_accuracy"]), _searched(run))]


def _cost_rows(result: SearchResult) -> list[Row]:
    words = "share of the dense network's, counted on the units that are built"
    shares = {"MACs": result.macs_ratio, "parameters": result.params_ratio, "peak activations": result.memory_ratio}
    rows: list[Row] = [(name, percent(1), percent(share), words) for name, share in shares.items() if share is not None]
    if result.latency is not None:
        dense, pruned, predicted = (
            f"{1000 * result.latency[key]:.2f} ms" for key in ("dense_measured", "measured", "predicted")
        )
        rows.append(("latency", dense, pruned, f"of one image, measured; {predicted} were predicted"))
    return rows


def _searched(run: Run) -> str:
    images = run.settings.get("search_images")
    limit = "" if images is None else f" (at most {images} images)"
    spent = run.result.evaluations if run.result else len(run.log)
    return f"on the search split{limit}, the best of {spent} evaluations: it chose the plan, and flatters it"


def _accuracy_rows(run: Run) -> list[Row]:
    result = run.result
    assert result is not None
    dense, pruned = percent(result.dense_test_accuracy), percent(result.test_accuracy)
    return [
        ("search accuracy", "", percent(result.search_accuracy), _searched(run)),
        ("test accuracy, not fine-tuned", dense, pruned, _TEST),
    ]


def _early_rows(run: Run) -> list[Row]:
    result = run.result
    assert result is not None
    rows = {
        "search accuracy": (result.search_accuracy, _searched(run)),
        "test accuracy, untrained": (result.untrained_accuracy, _TEST),
        "test accuracy, trained": (result.test_accuracy, "on the test split, after the last epoch of training"),
        "control": (result.control_accuracy, "likewise, of random units with the same counts per layer"),
    }
    return [(name, "", percent(share), words) for name, (share, words) in rows.items() if share is not None]


def _finetuned_rows(result: SearchResult) -> list[Row]:
    if result.finetuned_accuracy is None:
        return []
    hows = result.settings.get("finetuning", [])
    images = "the train and search splits" if any(how.get("images") == "all" for how in hows) else "the train split"
    epochs = "1 epoch" if result.finetune_epochs == 1 else f"{result.finetune_epochs} epochs"
    words = f"on the test split, after {epochs} of fine-tuning on {images}"
    return [("test accuracy, fine-tuned", "", percent(result.finetuned_accuracy), words)]


def group_table(groups: Groups) -> tuple[Row, list[Row]]:
    """Heads and rows of every group; what is not known is left out."""
    numbers = list(map(str, range(len(groups.kept))))
    columns: dict[str, list[Any]] = {"group": numbers, "first weight": groups.names or [], "kept": groups.kept}
    columns |= {"of": groups.dense or [], "share": [percent(share) for share in kept_shares(groups)]}
    known = {head: list(map(str, column)) for head, column in columns.items() if column}
    return tuple(known), list(zip(*known.values(), strict=True))


def kept_shares(groups: Groups) -> list[float]:
    """The kept share of every group; [] if the full widths are not known."""
    return [kept / max(full, 1) for kept, full in zip(groups.kept, groups.dense, strict=True)] if groups.dense else []


# ---- several runs --------------------------------------------------------------------------------------------------


def comparison(runs: list[Run]) -> tuple[Row, list[Row]]:
    """Heads and rows of a table with a row for each run; what a run has not is empty."""
    found = [{"run": str(number), **_compared(run)} for number, run in enumerate(runs, 1)]
    heads = list(dict.fromkeys(head for row in found for head in row))
    return tuple(heads), [tuple(row.get(head, "") for head in heads) for row in found]


def _compared(run: Run) -> dict[str, str]:
    about = {name: str(run.about(name)) for name in ("model", "data", "method", "seed")}
    about |= {"budget": budget_of(run), "evaluations": spent_of(run)}
    if run.state:
        about["state"] = run.state
    dense = {} if run.result is None or run.early else {"test, dense": percent(run.result.dense_test_accuracy)}
    found = {row[0].replace(" accuracy", ""): row[2] for row in outcome_rows(run)}
    return about | {key: found.pop(key) for key in list(found) if "test" not in key} | dense | found
