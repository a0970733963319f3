"""Attention modules of torch and torchvision with fewer heads than their forwards can hold.

Those forwards take the size of a head to be the embedding's over the number of heads, and the sum of all heads to be as
wide as the embedding. Neither is true once heads are removed. `slim` therefore turns such a module, its tensors cut
already, into one of the subclasses here: the same parameters and signature, a forward that keeps the two apart.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models.maxvit import RelativePositionalMultiHeadAttention
from torchvision.models.swin_transformer import ShiftedWindowAttention, ShiftedWindowAttentionV2


class SlimMultiheadAttention(nn.MultiheadAttention):
    """`nn.MultiheadAttention` with ``num_heads * head_dim`` channels inside, however many the embedding has.

    Parameters: ``in_proj_weight`` [3 * num_heads * head_dim, embed_dim], ``out_proj`` of num_heads * head_dim inputs.
    """

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """As `nn.MultiheadAttention.forward`; the weights are those of the heads that are left.

        Raises:
            ValueError: a mask for every single head, as there are fewer of them now.
        """
        batched, swapped = query.dim() == 3, query.dim() == 3 and not self.batch_first
        inputs = [x.transpose(0, 1) if swapped else x if batched else x[None] for x in (query, key, value)]
        q, k, v = (x.unflatten(-1, (self.num_heads, self.head_dim)).transpose(1, 2) for x in self._projected(inputs))
        mask = _added_mask(attn_mask, key_padding_mask, q)
        dropout = self.dropout if self.training else 0.0
        weights = None
        if need_weights:
            scores = (q * self.head_dim**-0.5) @ k.transpose(-2, -1)
            weights = F.dropout((scores if mask is None else scores + mask).softmax(-1), dropout)
            found = weights @ v
            weights = weights.mean(1) if average_attn_weights else weights
            weights = weights if batched else weights[0]
        else:
            found = F.scaled_dot_product_attention(q, k, v, mask, dropout)
        output = self.out_proj(found.transpose(1, 2).flatten(2))
        return output.transpose(0, 1) if swapped else output if batched else output[0], weights

    def _projected(self, inputs: list[Tensor]) -> list[Tensor]:
        assert self.in_proj_weight is not None
        if inputs[0] is inputs[1] is inputs[2]:
            return list(F.linear(inputs[0], self.in_proj_weight, self.in_proj_bias).chunk(3, -1))
        biases = [None] * 3 if self.in_proj_bias is None else self.in_proj_bias.chunk(3)
        return [F.linear(x, w, b) for x, w, b in zip(inputs, self.in_proj_weight.chunk(3), biases, strict=True)]


def _added_mask(attn_mask: Tensor | None, padding: Tensor | None, like: Tensor) -> Tensor | None:
    """Both masks as one that is added to the scores [B, heads, L, S]: minus infinity where a bool mask is true."""
    if attn_mask is not None and attn_mask.dim() == 3:
        raise ValueError("attn_mask [B * heads, L, S] is of the dense network's heads: give one [L, S] for all heads.")
    given = [attn_mask, None if padding is None else padding[..., None, None, :]]
    masks = [
        torch.zeros_like(mask, dtype=like.dtype).masked_fill_(mask, -torch.inf) if mask.dtype == torch.bool else mask
        for mask in given
        if mask is not None
    ]
    return sum(masks[1:], masks[0]) if masks else None


class SlimShiftedWindowAttention(ShiftedWindowAttention):
    """torchvision's attention inside shifted windows (Swin), of ``num_heads`` heads of ``head_dim`` channels."""

    head_dim: int

    def forward(self, x: Tensor) -> Tensor:
        """[B, H, W, C] -> [B, H, W, C]"""
        height, width = x.shape[1:3]
        (rows, columns), window = self.window_size, self.window_size
        x = F.pad(x, (0, 0, 0, -width % columns, 0, -height % rows))
        padded = x.shape[1:3]
        shift = [0 if w >= size else s for w, size, s in zip(window, padded, self.shift_size, strict=True)]
        x = x.roll((-shift[0], -shift[1]), (1, 2))
        windows = x.unflatten(2, (-1, columns)).unflatten(1, (-1, rows)).transpose(2, 3)
        found = self._attend(windows.flatten(3, 4).flatten(0, 2), self._mask(x, shift) if any(shift) else None)
        found = F.dropout(self.proj(found), self.dropout, self.training)
        x = found.view(windows.shape).transpose(2, 3).flatten(3, 4).flatten(1, 2)
        return x.roll((shift[0], shift[1]), (1, 2))[:, :height, :width].contiguous()

    def _attend(self, windows: Tensor, mask: Tensor | None) -> Tensor:
        """[windows, positions, C] -> [windows, positions, num_heads * head_dim]; `mask` [windows of an image, p, p]."""
        q, k, v = self._projected(windows).unflatten(-1, (3, self.num_heads, self.head_dim)).permute(2, 0, 3, 1, 4)
        scores = self._scores(q, k) + self.get_relative_position_bias()
        if mask is not None:
            scores = (scores.unflatten(0, (-1, len(mask))) + mask[:, None]).flatten(0, 1)
        weights = F.dropout(scores.softmax(-1), self.attention_dropout, self.training)
        return (weights @ v).transpose(1, 2).flatten(2)

    def _projected(self, windows: Tensor) -> Tensor:
        return self.qkv(windows)

    def _scores(self, q: Tensor, k: Tensor) -> Tensor:
        return (q * self.head_dim**-0.5) @ k.transpose(-2, -1)

    def _mask(self, x: Tensor, shift: list[int]) -> Tensor:
        """-100 between positions of a window that were no neighbours before the shift, as torchvision has it."""
        parts = [self._parts(size, w, s) for size, w, s in zip(x.shape[1:3], self.window_size, shift, strict=True)]
        region = (parts[0][:, None, :, None] * 3 + parts[1][None, :, None, :]).flatten(2).flatten(0, 1).to(x.device)
        return (region[:, None] != region[:, :, None]).to(x.dtype) * -100.0

    @staticmethod
    def _parts(size: int, window: int, shift: int) -> Tensor:
        """Which of the three parts that a shift along one axis makes each position is in, [windows, window]."""
        place = torch.arange(size)
        return ((place >= size - window).long() + ((place >= size - shift) & (shift > 0)).long()).view(-1, window)


class SlimShiftedWindowAttentionV2(SlimShiftedWindowAttention, ShiftedWindowAttentionV2):
    """The attention of Swin v2: scores are cosines, scaled by one number per head, and keys have no bias."""

    def _projected(self, windows: Tensor) -> Tensor:
        bias = self.qkv.bias
        if bias is not None:
            queries, keys, values = bias.chunk(3)
            bias = torch.cat([queries, torch.zeros_like(keys), values])
        return F.linear(windows, self.qkv.weight, bias)

    def _scores(self, q: Tensor, k: Tensor) -> Tensor:
        cosines = F.normalize(q, dim=-1) @ F.normalize(k, dim=-1).transpose(-2, -1)
        return cosines * self.logit_scale.clamp(max=math.log(100.0)).exp()


class SlimRelativeAttention(RelativePositionalMultiHeadAttention):
    """torchvision's attention with relative positions (MaxViT), of ``n_heads`` heads of ``head_dim`` channels."""

    def forward(self, x: Tensor) -> Tensor:
        """[B, G, P, D] -> [B, G, P, D]"""
        parts = self.to_qkv(x).chunk(3, -1)
        q, k, v = (part.unflatten(-1, (self.n_heads, self.head_dim)).transpose(2, 3) for part in parts)
        scores = q @ (k * self.scale_factor).transpose(-2, -1) + self.get_relative_positional_bias()
        return self.merge((scores.softmax(-1) @ v).transpose(2, 3).flatten(3))


# ---- what slim uses ------------------------------------------------------------------------------------------------


_SLIM: dict[type[nn.Module], type[nn.Module]] = {
    nn.MultiheadAttention: SlimMultiheadAttention,
    ShiftedWindowAttention: SlimShiftedWindowAttention,
    ShiftedWindowAttentionV2: SlimShiftedWindowAttentionV2,
    RelativePositionalMultiHeadAttention: SlimRelativeAttention,
}


def holds_heads(module: nn.Module) -> bool:
    """Whether `drop_heads` can turn `module` into one of fewer heads. Subclasses may do anything, and so may hooks."""
    if module._forward_hooks or module._forward_pre_hooks:
        return False
    if type(module) is nn.MultiheadAttention:
        return module._qkv_same_embed_dim and module.bias_k is None and not module.add_zero_attn
    return type(module) in _SLIM


def drop_heads(module: Any) -> None:
    """Turn `module` (one that `holds_heads`), whose tensors are cut already, into one of as many heads as they hold."""
    kind, name = type(module), "n_heads" if type(module) is RelativePositionalMultiHeadAttention else "num_heads"
    if kind is nn.MultiheadAttention:
        rows, head_dim = len(module.in_proj_weight), module.head_dim
    elif issubclass(kind, ShiftedWindowAttention):
        rows, head_dim = len(module.qkv.weight), len(module.proj.weight) // module.num_heads
    else:
        rows, head_dim = len(module.to_qkv.weight), module.head_dim
    heads = rows // (3 * head_dim)
    if heads == getattr(module, name):
        return
    module.__class__, module.head_dim = _SLIM[kind], head_dim
    setattr(module, name, heads)
    if kind is nn.MultiheadAttention:
        module._qkv_same_embed_dim = False  # torch's fused encoder layer, which reads this, knows nothing of the heads
