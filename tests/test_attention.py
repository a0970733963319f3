"""Attention heads as channel groups: every usual way to write attention, torch's and torchvision's own modules."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import assert_close, count_params, counted_macs, images, outputs, random_plans
from torch import Tensor, nn
from torchvision.models.maxvit import RelativePositionalMultiHeadAttention
from torchvision.models.swin_transformer import ShiftedWindowAttention, ShiftedWindowAttentionV2

from gnnrl_gym import PrunableNetwork
from gnnrl_gym.export import export_program, load_slim, save_slim
from gnnrl_gym.pruning import attention
from gnnrl_gym.pruning.latency import LatencyTable

EMBEDDING, HEADS, HEAD_DIM, MLP = 16, 4, 6, 20
X = images(2, 5, 8)


@pytest.fixture(autouse=True)
def _counted() -> Iterator[None]:
    """The fused path of attention is one call that the counter does not see into."""
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    yield
    torch.backends.mha.set_fastpath_enabled(before)


def plain(net: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v)


def softmax(net: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.softmax(q @ k.transpose(-2, -1) * net.scale, -1) @ v


def masked(net: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    later = torch.triu(torch.ones(q.shape[2], q.shape[2], dtype=torch.bool), 1)
    return (q @ k.transpose(-2, -1) * net.scale).masked_fill(later, -torch.inf).softmax(-1) @ v


def einsum(net: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = torch.einsum("bhid,bhjd->bhij", q, k) * net.scale
    return torch.einsum("bhij,bhjd->bhid", scores.softmax(-1), v)


def normalised(net: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return plain(net, net.norm(q), net.norm(k), v)


def cosine(net: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return plain(net, F.normalize(q, dim=-1), F.normalize(k, dim=-1), v)


def rotated(net: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """As rotary embeddings turn halves of a head against each other."""
    q, k = (x + torch.cat([-x[..., x.shape[-1] // 2 :], x[..., : x.shape[-1] // 2]], -1) for x in (q, k))
    return plain(net, q, k, v)


def folded(net: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """With one dimension for batch and heads."""
    flat = [x.reshape(-1, *x.shape[2:]) for x in (q, k, v)]
    found = torch.bmm(torch.bmm(flat[0] * net.scale, flat[1].transpose(1, 2)).softmax(-1), flat[2])
    return found.view(-1, net.num_heads, *found.shape[1:])


PRODUCTS = (plain, softmax, masked, einsum, normalised, cosine, rotated, folded)
# how the heads are put side by side again
JOINS: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "-1": lambda net, y: y.reshape(*y.shape[:2], -1),
    "flatten": lambda net, y: y.flatten(2),
    "heads * size": lambda net, y: y.reshape(*y.shape[:2], net.num_heads * net.head_dim),
    "attribute": lambda net, y: y.reshape(*y.shape[:2], net.inner),
}


class Attention(nn.Module):
    """Attention as users write it: three projections, or one; `product` and `join` as above."""

    def __init__(
        self, product: Callable[..., Tensor] = plain, join: str = "-1", fused: bool = False, head_dim: int = HEAD_DIM
    ) -> None:
        super().__init__()
        self.num_heads, self.head_dim, self.inner = HEADS, head_dim, HEADS * head_dim
        self.product, self.join, self.scale, self.norm = product, join, head_dim**-0.5, nn.LayerNorm(head_dim)
        self.qkv = nn.ModuleList(
            nn.Linear(EMBEDDING, self.inner * (3 if fused else 1)) for _ in range(1 if fused else 3)
        )
        self.out = nn.Linear(self.inner, EMBEDDING)

    def forward(self, x: Tensor) -> Tensor:
        shape = (*x.shape[:2], self.num_heads, self.head_dim)
        if len(self.qkv) == 1:
            joint = self.qkv[0](x).reshape(*shape[:2], 3, *shape[2:])
            q, k, v = joint.permute(2, 0, 3, 1, 4).unbind(0)
        else:
            q, k, v = (layer(x).view(shape).transpose(1, 2) for layer in self.qkv)
        return self.out(JOINS[self.join](self, self.product(self, q, k, v).transpose(1, 2)))


class Block(nn.Module):
    """A pre-norm encoder block around `attention`, with an embedding and a head."""

    def __init__(self, make: Callable[[], nn.Module], call: Callable[[Any, Tensor], Tensor] | None = None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding, self.first, self.second = (
            nn.Linear(8, EMBEDDING),
            nn.LayerNorm(EMBEDDING),
            nn.LayerNorm(EMBEDDING),
        )
        self.attention, self.call = make(), call
        self.mlp = nn.Sequential(nn.Linear(EMBEDDING, MLP), nn.GELU(), nn.Linear(MLP, EMBEDDING))
        self.head = nn.Linear(EMBEDDING, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embedding(x)
        y = self.first(x)
        x = x + (self.attention(y) if self.call is None else self.call(self.attention, y))
        x = x + self.mlp(self.second(x))
        return self.head(x.flatten(1, -2).mean(1))


def prunable(model: nn.Module, x: Tensor = X, numbers: str | None = None) -> PrunableNetwork:
    """Exact on random plans, in answers and costs. `numbers`: what a warning about numbers of channels has to match;
    without it, there may be none."""
    with torch.no_grad():  # zero biases and equal tables would hide a head in the wrong place
        for parameter in model.parameters():
            parameter.add_(images(*parameter.shape, seed=parameter.numel()) * 0.2)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        network = PrunableNetwork(model, x)
    found = [str(w.message) for w in said if "number of channels" in str(w.message)]
    assert bool(found) == (numbers is not None) and all(numbers in message for message in found if numbers)
    assert len(set(found)) == len(found)
    dense = outputs(model, x)[0]
    for plan in random_plans(network, 6):
        slim, mask = network.slim(plan), outputs(network.mask(plan), x)
        assert type(slim) is type(model)
        assert_close(outputs(slim, x), mask, 1e-5)
        assert (mask[0] - dense).abs().max() > 1e-3 * dense.abs().max()  # or the line above would say nothing
        assert network.macs(plan) == counted_macs(slim, x) and network.params(plan) == count_params(slim)
    assert torch.equal(outputs(network.slim(network.widths), x)[0], dense)
    return network


# ---- attention as users write it -----------------------------------------------------------------------------------


@pytest.mark.parametrize("fused", [False, True], ids=["three projections", "one projection"])
@pytest.mark.parametrize("product", PRODUCTS)
def test_a_unit_is_a_whole_head(product: Callable[..., Tensor], fused: bool) -> None:
    network = prunable(Block(lambda: Attention(product, fused=fused)))
    assert network.widths.tolist() == [HEADS, MLP]
    slim: Any = network.slim([3, MLP])
    assert type(slim.attention) is Attention
    assert (slim.attention.num_heads, slim.attention.head_dim) == (3, HEAD_DIM)
    assert slim.attention.out.in_features == 3 * HEAD_DIM
    assert [layer.out_features for layer in slim.attention.qkv] == ([9 * HEAD_DIM] if fused else [3 * HEAD_DIM] * 3)
    assert network.model.attention.num_heads == HEADS  # type: ignore[union-attr]
    # the heads that stay are whole, and the same in all four layers
    kept = network.kept(np.array([3, MLP]))[:HEADS]
    model: Any = network.model
    rows = model.attention.qkv[0].weight.unflatten(0, (-1, HEADS, HEAD_DIM))[:, kept].flatten(0, 2)
    columns = model.attention.out.weight.unflatten(1, (HEADS, HEAD_DIM))[:, kept].flatten(1)
    assert torch.equal(slim.attention.qkv[0].weight, rows) and torch.equal(slim.attention.out.weight, columns)


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("join", JOINS)
def test_heads_are_joined_in_any_way(join: str, fused: bool) -> None:
    assert prunable(Block(lambda: Attention(softmax, join, fused))).widths.tolist() == [HEADS, MLP]


@pytest.mark.parametrize("join", ["-1", "attribute"])
def test_as_many_heads_as_channels_in_each(join: str) -> None:
    """Two attributes equal the number of heads, and one the embedding: only some of them follow."""
    network = prunable(Block(lambda: Attention(softmax, join, head_dim=HEADS)))
    assert network.widths.tolist() == [HEADS, MLP]
    slim: Any = network.slim([2, MLP])
    assert (slim.attention.num_heads, slim.attention.head_dim) == (2, HEADS)


def literal(net: Any, y: Tensor) -> Tensor:
    return y.reshape(*y.shape[:2], 24)


def test_numbers_in_the_code_freeze_the_heads_and_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(JOINS, "literal", literal)
    network = prunable(Block(lambda: Attention(softmax, "literal")), numbers="'attention' (")
    assert network.widths.tolist() == [MLP]


class SharedKeys(Attention):
    """Grouped queries: two heads of keys and values for all four of queries; or one, for `shared` of one."""

    def __init__(self, shared: int) -> None:
        super().__init__()
        self.shared = shared
        self.qkv[1], self.qkv[2] = (nn.Linear(EMBEDDING, shared * HEAD_DIM) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (layer(x).unflatten(-1, (-1, HEAD_DIM)).transpose(1, 2) for layer in self.qkv)
        found = F.scaled_dot_product_attention(q, k, v, enable_gqa=True) if self.shared > 1 else softmax(self, q, k, v)
        return self.out(found.transpose(1, 2).flatten(2))


def test_grouped_queries_stay_whole_and_shared_keys_do() -> None:
    assert prunable(Block(lambda: SharedKeys(2))).widths.tolist() == [MLP]
    network = prunable(Block(lambda: SharedKeys(1)))
    assert network.widths.tolist() == [HEADS, MLP]
    slim: Any = network.slim([2, MLP])
    assert [layer.out_features for layer in slim.attention.qkv] == [2 * HEAD_DIM, HEAD_DIM, HEAD_DIM]


def test_at_least_one_head_stays() -> None:
    network = prunable(Block(Attention))
    with pytest.raises(ValueError, match="group 0 must be between 1 and 4"):
        network.slim([0, MLP])
    assert network.slim([1, 1])(X).shape == (2, 3)


def test_slim_networks_are_pruned_again() -> None:
    for make, call in ((lambda: Attention(fused=True), None), (own_attention, attend)):
        once = prunable(Block(make, call)).slim([3, 10])
        again = prunable(once.eval())
        assert again.widths.tolist() == [3, 10]


# ---- torch's module ------------------------------------------------------------------------------------------------


def own_attention(**settings: Any) -> nn.MultiheadAttention:
    return nn.MultiheadAttention(EMBEDDING, HEADS, **({"batch_first": True} | settings))


def attend(module: Any, x: Tensor, **settings: Any) -> Tensor:
    return module(x, x, x, **({"need_weights": False} | settings))[0]


MASK = torch.full((5, 5), -torch.inf).triu(1)
# name: (settings of the module, of the call)
TORCHS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "as in torchvision": ({}, {}),
    "no bias": ({"bias": False}, {}),
    "with weights": ({}, {"need_weights": True}),
    "weights of each head": ({}, {"need_weights": True, "average_attn_weights": False}),
    "mask": ({}, {"attn_mask": MASK}),
    "mask of bools": ({}, {"attn_mask": MASK < 0}),
    "mask and weights": ({}, {"attn_mask": MASK, "need_weights": True}),
    "causal": ({}, {"attn_mask": MASK, "is_causal": True}),
    "positions first": ({"batch_first": False}, {"attn_mask": MASK[:2, :2]}),
}


@pytest.mark.parametrize("name", TORCHS)
def test_multihead_attention(name: str) -> None:
    settings, call = TORCHS[name]
    network = prunable(Block(lambda: own_attention(**settings), lambda module, x: attend(module, x, **call)))
    assert network.widths.tolist() == [HEADS, MLP]
    slim: Any = network.slim([3, MLP])
    assert type(slim.attention) is attention.SlimMultiheadAttention
    assert slim.attention.in_proj_weight.shape == (9 * 4, EMBEDDING)
    slim.train()(X).sum().backward()
    assert all(parameter.grad is not None for parameter in slim.parameters())


class Louder(nn.MultiheadAttention):
    """A subclass, whose forward may do anything."""


@pytest.mark.parametrize(
    "make",
    [
        lambda: own_attention(add_zero_attn=True),
        lambda: own_attention(add_bias_kv=True),
        lambda: Louder(EMBEDDING, HEADS, batch_first=True),
    ],
    ids=["added zeros", "added keys", "subclass"],
)
def test_other_multihead_attention_stays_whole(make: Callable[[], nn.Module]) -> None:
    with pytest.warns(UserWarning, match="frozen"):
        network = PrunableNetwork(Block(make, attend), X)
    assert network.widths.tolist() == [MLP]
    assert_close(outputs(network.slim([7]), X), outputs(network.mask([7]), X))


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("norm_first", [True, False])
def test_encoder_layers_of_torch(norm_first: bool, batch_first: bool) -> None:
    """Their own fused path reads the attention's attributes: it has to be left once heads are gone."""
    torch.backends.mha.set_fastpath_enabled(True)
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(
        EMBEDDING, HEADS, MLP, batch_first=batch_first, norm_first=norm_first, dropout=0.0
    )
    model = nn.Sequential(nn.Linear(8, EMBEDDING), nn.TransformerEncoder(layer, 2, enable_nested_tensor=False))
    model.append(nn.Linear(EMBEDDING, 3)).eval()
    network = PrunableNetwork(model, X)
    assert network.widths.tolist() == [HEADS, MLP] * 2
    for plan in random_plans(network, 5):
        slim, mask = network.slim(plan), network.mask(plan)
        assert_close(outputs(slim, X), outputs(mask, X), 1e-5)
        torch.backends.mha.set_fastpath_enabled(False)
        assert network.macs(plan) == counted_macs(slim, X)
        torch.backends.mha.set_fastpath_enabled(True)


class Padded(Block):
    """A mask as an input of the network, which torch spreads over all heads."""

    def __init__(self) -> None:
        super().__init__(own_attention)

    def forward(self, x: Tensor, padding: Tensor) -> Tensor:
        self.call = lambda module, y: attend(module, y, key_padding_mask=padding)
        return super().forward(x)


@pytest.mark.filterwarnings("ignore:.*frozen:UserWarning")
def test_masks_that_are_spread_over_the_heads_freeze_them() -> None:
    padding = torch.arange(5).expand(2, 5) == 4
    network = PrunableNetwork(Padded(), (X, padding))
    assert network.widths.tolist() == [MLP]
    assert_close(outputs(network.slim([7]), X, padding), outputs(network.mask([7]), X, padding))


@pytest.mark.filterwarnings("ignore:.*frozen:UserWarning")
@pytest.mark.parametrize("importance", ["l1", "l2", "bn-scale", "taylor", "random"])
def test_every_importance_orders_heads(importance: str) -> None:
    network = PrunableNetwork(Block(own_attention, attend), X, importance, (X, torch.tensor([0, 1])))
    assert np.isfinite(network.importance).all()
    assert len(set(network.importance[:HEADS])) == HEADS


def test_masks_of_single_heads_are_refused() -> None:
    slim: Any = prunable(Block(own_attention, attend)).slim([3, MLP])
    x = images(2, 5, EMBEDDING)
    with pytest.raises(ValueError, match="dense network's heads"):
        slim.attention(x, x, x, attn_mask=torch.zeros(2 * HEADS, 5, 5))


@pytest.mark.parametrize("need_weights", [True, False])
@pytest.mark.parametrize("batch_first", [True, False])
def test_slim_attention_computes_what_torchs_does(batch_first: bool, need_weights: bool) -> None:
    torch.manual_seed(0)
    dense = own_attention(batch_first=batch_first).eval()
    slim = copy.copy(dense)
    slim.__class__ = attention.SlimMultiheadAttention
    q, k = images(2, 5, EMBEDDING), images(2, 5, EMBEDDING, seed=1)
    padding = torch.zeros((2, 5) if batch_first else (5, 2), dtype=torch.bool)
    padding[0, -1] = True
    masks: list[dict[str, Any]] = [{}, {"key_padding_mask": padding}]
    for inputs in ((q, q, q), (q, k, k), (q, k, q * k), (q[0], k[0], k[0])):
        for mask in masks if inputs[0].dim() == 3 else masks[:1]:
            found = slim(*inputs, need_weights=need_weights, **mask)
            expected = dense(*inputs, need_weights=need_weights, **mask)
            assert (found[1] is None) == (expected[1] is None) == (not need_weights)
            assert_close([x for x in found if x is not None], [x for x in expected if x is not None], 1e-5)


# ---- torchvision's modules -----------------------------------------------------------------------------------------


def of_windows(module: Any, x: Tensor) -> Tensor:
    """Positions as an image of 5 x 5, which the windows don't fill."""
    return module(x)


WINDOWS = images(2, 5, 5, 8)


@pytest.mark.parametrize("shift", [0, 1])
@pytest.mark.parametrize("kind", [ShiftedWindowAttention, ShiftedWindowAttentionV2])
def test_shifted_windows(kind: type[ShiftedWindowAttention], shift: int) -> None:
    network = prunable(Block(lambda: kind(EMBEDDING, [3, 3], [shift, shift], HEADS), of_windows), WINDOWS)
    assert sorted(network.widths) == sorted([HEADS, MLP, *([512] if kind is ShiftedWindowAttentionV2 else [])])
    slim: Any = network.slim([3 if width == HEADS else width for width in network.widths])
    assert slim.attention.get_relative_position_bias().shape == (1, 3, 9, 9)
    assert slim.attention.qkv.weight.shape == (9 * EMBEDDING // HEADS, EMBEDDING)
    slim.train()(WINDOWS).sum().backward()
    assert all(parameter.grad is not None for parameter in slim.parameters())


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("size", [(6, 6), (5, 7), (3, 8), (2, 3), (1, 1)])
@pytest.mark.parametrize("shift", [[0, 0], [1, 1], [2, 1]])
def test_slim_windows_compute_what_torchvisions_do(size: tuple[int, int], shift: list[int], bias: bool) -> None:
    torch.manual_seed(0)
    kinds: dict[Any, Any] = {
        ShiftedWindowAttention: attention.SlimShiftedWindowAttention,
        ShiftedWindowAttentionV2: attention.SlimShiftedWindowAttentionV2,
    }
    for kind, slimmer in kinds.items():
        dense = kind(EMBEDDING, [3, 4], shift, HEADS, qkv_bias=bias).eval()
        for parameter in dense.parameters():
            nn.init.normal_(parameter, std=0.5)
        if kind is ShiftedWindowAttentionV2:
            nn.init.constant_(dense.logit_scale[:2], 6.0)  # above the largest that counts
        slim: Any = copy.copy(dense)
        slim.__class__, slim.head_dim = slimmer, EMBEDDING // HEADS
        x = images(2, *size, EMBEDDING)
        assert_close([slim(x)], [dense(x)], 1e-5)


def test_relative_positions() -> None:
    make = lambda: RelativePositionalMultiHeadAttention(EMBEDDING, EMBEDDING // HEADS, 9)  # noqa: E731
    network = prunable(Block(make, of_windows), images(2, 5, 9, 8))
    assert network.widths.tolist() == [HEADS, MLP]
    slim: Any = network.slim([3, MLP])
    assert slim.attention.relative_position_bias_table.shape == (25, 3)


# ---- the rest of the package ---------------------------------------------------------------------------------------


MODULES: dict[str, Callable[[], tuple[nn.Module, Tensor]]] = {
    "as users write it": lambda: (Block(lambda: Attention(softmax, fused=True)), X),
    "torch's": lambda: (Block(own_attention, attend), X),
    "windows": lambda: (Block(lambda: ShiftedWindowAttention(EMBEDDING, [3, 3], [1, 1], HEADS), of_windows), WINDOWS),
}


@pytest.mark.filterwarnings("ignore:.*frozen:UserWarning")
@pytest.mark.parametrize("name", MODULES)
def test_files_and_programs(name: str, tmp_path: Path) -> None:
    model, x = MODULES[name]()
    network = PrunableNetwork(model, x)
    slim = network.slim([2, 11])
    save_slim(tmp_path / "slim.pt", network, np.array([2, 11]), slim)
    again = load_slim(tmp_path / "slim.pt", MODULES[name]()[0], x)
    assert torch.equal(outputs(again, x)[0], outputs(slim, x)[0])
    export_program(slim, x, tmp_path / "slim.pt2")
    other = torch.cat([x, -x, x])
    assert_close([torch.export.load(tmp_path / "slim.pt2").module()(other)], outputs(slim, other), 1e-5)


@pytest.mark.filterwarnings("ignore:.*frozen:UserWarning")
@pytest.mark.parametrize("name", MODULES)
def test_graph_memory_and_latency_know_heads(name: str) -> None:
    model, x = MODULES[name]()
    network = PrunableNetwork(model, x)
    full, less = network.widths, np.array([2, MLP])
    assert network.memory(less) < network.memory(full)
    assert not np.array_equal(network.graph(full).nodes, network.graph(less).nodes)
    assert LatencyTable(network).predict(less) > 0
