"""What is only needed on a GPU, as far as it shows without one."""

from __future__ import annotations

import contextlib
from typing import Any

import pytest
import torch
from conftest import images
from torch import fx, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from gnnrl_gym import PrunableNetwork
from gnnrl_gym.backends import full_precision, gpus_of, without_cudnn
from gnnrl_gym.errors import UnsupportedOperation
from gnnrl_gym.evaluation.batched import BatchedCandidates
from gnnrl_gym.evaluation.determinism import deterministic, randomness_kept
from gnnrl_gym.evaluation.finetuning import finetune
from gnnrl_gym.evaluation.training import Recipe, train
from gnnrl_gym.graph.channels import macs_of
from gnnrl_gym.zoo import load_data, load_model

CUDNN: Any = torch.backends.cudnn
PARTS: Any = (CUDNN.conv, CUDNN.rnn, torch.backends.cuda.matmul)


def test_gpus_of_tensors_and_devices() -> None:
    with FakeTensorMode():
        there = torch.empty(2, device="cuda:0")
    assert gpus_of([{"a": (there, 3)}, torch.zeros(1), torch.device("cuda:1"), torch.device("cpu"), None]) == [0, 1]


OLD = torch.torch_version.TorchVersion(torch.__version__) < (2, 15) and not torch.cuda.is_available()
GRU = pytest.param("gru", marks=pytest.mark.skipif(OLD, reason="torch 2.14 runs a real one of this size on the GPU"))


@pytest.mark.parametrize("kind", ["lstm", GRU, "rnn_tanh"])
def test_recurrent_layers_cost_the_same_on_a_gpu(kind: str) -> None:
    """cuDNN would read the memory of tensors that have none."""

    def macs(device: str) -> int:
        layer = {"lstm": nn.LSTM, "gru": nn.GRU, "rnn_tanh": nn.RNN}[kind](5, 7, 2, bidirectional=True, device="meta")
        shapes = [(3, 4, 5), *[(4, 3, 7)] * (1 + (kind == "lstm")), *[p.shape for p in layer.parameters()]]
        graph, values = fx.Graph(), []
        with FakeTensorMode():
            for number, shape in enumerate(shapes):
                values.append(graph.placeholder(f"x{number}"))
                values[-1].meta["val"] = torch.empty(shape, device=device)
        states = 2 if kind == "lstm" else 1
        start: Any = values[1:3] if kind == "lstm" else values[1]
        arguments = (values[0], start, values[1 + states :], True, 2, 0.0, False, True, True)
        return macs_of(graph.call_function(getattr(torch.ops.aten, kind).input, arguments))

    gates = {"lstm": 4, "gru": 3, "rnn_tanh": 1}[kind]
    assert macs("cuda") == macs("cpu") == 3 * 4 * 2 * gates * 7 * (5 + 7 + 2 * 7 + 7)
    assert CUDNN.enabled


class Chosen(nn.Module):
    """Asks how it is to compute, as torch's own resizes and paddings do on a GPU."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Conv1d(6, 5, 1), nn.Conv1d(5, 2, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden: torch.Tensor = self.first(x)
        if torch.are_deterministic_algorithms_enabled():
            hidden = torch.ops.aten._unsafe_index(hidden, [None, None, torch.arange(4)])
        return self.last(hidden.relu())


@pytest.mark.parametrize("fails", [False, True])
def test_networks_are_traced_as_they_are_written_where_algorithms_are_deterministic(
    fails: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if fails:
        monkeypatch.setattr(torch.export, "export", lambda *_, **__: 1 / 0)
    with deterministic(torch.device("cuda:0")):
        with pytest.raises(UnsupportedOperation) if fails else contextlib.nullcontext():
            assert PrunableNetwork(Chosen(), images(2, 6, 4)).widths.tolist() == [5]
        assert torch.are_deterministic_algorithms_enabled() and torch.is_deterministic_algorithms_warn_only_enabled()
    assert not torch.are_deterministic_algorithms_enabled()


def test_cudnn_is_off_for_recurrent_layers_alone() -> None:
    with pytest.raises(KeyError), without_cudnn():
        assert not CUDNN.enabled
        raise KeyError
    with without_cudnn(nn.Sequential(nn.Conv2d(1, 1, 1))):
        assert CUDNN.enabled
    with without_cudnn(nn.Sequential(nn.GRU(2, 2))):
        assert not CUDNN.enabled
    assert CUDNN.enabled


@pytest.mark.parametrize("usual", [None, "tf32"])
def test_full_precision_leaves_what_the_caller_has_set(usual: str | None) -> None:
    every: Any = torch.backends
    before = every.fp32_precision
    every.fp32_precision = usual or before
    try:
        asked = [part.fp32_precision for part in PARTS]
        with pytest.raises(KeyError), full_precision([0]):
            assert [part.fp32_precision for part in PARTS] == ["ieee"] * 3 and CUDNN.deterministic
            raise KeyError
        assert [part.fp32_precision for part in PARTS] == asked and not CUDNN.deterministic
        with full_precision([]):
            assert [part.fp32_precision for part in PARTS] == asked and not CUDNN.deterministic
    finally:
        every.fp32_precision = before


@pytest.mark.parametrize("attention", [False, True])
def test_deterministic_on_a_gpu(attention: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(CUDNN, "benchmark", True)
    with deterministic(torch.device("cuda:0"), attention):
        CUDNN.deterministic = True  # as Stable-Baselines3 does
        assert not CUDNN.benchmark and torch.are_deterministic_algorithms_enabled()
        assert torch.backends.cuda.flash_sdp_enabled() != attention
    assert CUDNN.benchmark and not CUDNN.deterministic and not torch.are_deterministic_algorithms_enabled()
    assert torch.backends.cuda.flash_sdp_enabled()


def test_training_on_a_cpu_leaves_the_generators_of_gpus_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """An agent may draw there."""
    data, seeded = load_data("digits"), []
    monkeypatch.setattr(torch.cuda, "manual_seed_all", seeded.append)
    model = load_model("digits-resnet", "random")
    train(model, data, Recipe(1), steps=1)
    finetune(model, data, 1)
    assert not seeded


def test_what_agents_seed_is_put_back_on_every_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    forked: list[Any] = []
    fork = torch.random.fork_rng
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.random, "fork_rng", lambda gpus: forked.extend(gpus) or fork([]))
    with randomness_kept():
        pass
    assert forked == [0, 1]


def _strided() -> PrunableNetwork:
    """Its last BatchNorm has maps of one pixel, so it can't train on one image."""
    body = [nn.Sequential(nn.Conv2d(a, b, 3, 2, 1), nn.BatchNorm2d(b)) for a, b in ((3, 8), (8, 16), (16, 16))]
    return PrunableNetwork(nn.Sequential(*body, nn.Flatten(), nn.Linear(16, 4)).eval(), images(1, 3, 8, 8))


def test_one_batch_has_channels_last_where_one_image_can_not_train() -> None:
    assert BatchedCandidates(_strided()).layout == torch.channels_last


def test_one_batch_takes_its_statistics_in_full_precision() -> None:
    network = _strided()
    candidates, x = BatchedCandidates(network), images(32, 3, 8, 8)
    plans = [network.widths, network.widths // 2]
    found = []
    for low in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=low):
            candidates._accuracies(plans, x, x, torch.zeros(32, dtype=torch.int64), torch.float32)
        found.append(torch.cat([norm.mean.flatten() for norm in candidates.norms.values()]))
    assert torch.equal(*found) and found[0].any()
