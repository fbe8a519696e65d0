"""Integer inference of a quantized Swin transformer in plain torch, which `deployment.integer` describes."""
from __future__ import annotations

import copy

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from deployment.integer import IntAttention, IntBlock, IntegerNetwork, IntLinear, Quantizer, UnsignedCodes
from quant_swin_transformer import QPatchMerging, QSwinBlock, QSwinTransformer, QWindowAttention, neighbours, with_bias

__all__ = ['IntegerSwin']


class IntWindowAttention(IntAttention):
    """Q-Attention on the codes of windows: uint8 (B windows, N, dim) -> float (B windows, N, dim).

    Attributes:
        score_bias: position biases and masks of the windows of an image, (1 or windows, heads, N, N).
    """
    score_bias: Tensor

    def __init__(self, attn: QWindowAttention, terms: int, layer_scale: nn.Module | None = None) -> None:
        super().__init__(attn, terms, layer_scale)
        self.register_buffer('score_bias', attn.score_bias().detach().double())

    def _attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return self._probabilities(q @ k.mT * self.scale) @ v

    def _probabilities(self, scores: Tensor) -> Tensor:
        return with_bias(scores, self.score_bias).softmax(-1)


class IntSwinBlock(IntBlock):
    """A block with attention within windows: float (B, N, dim) -> float (B, N, dim).

    Attributes:
        code_of_zero: uint8 (dim,), what fills up windows that reach beyond the map.
    """
    attention = IntWindowAttention
    code_of_zero: Tensor

    def __init__(self, block: QSwinBlock, terms: int) -> None:
        super().__init__(block, terms)
        self.windows = block.windows
        codes = UnsignedCodes.of(block.attn.qkv.act, self.dim)
        self.register_buffer('code_of_zero', codes.zero.clamp(0, codes.levels).to(torch.uint8))

    def attend(self, codes: Tensor) -> Tensor:
        # Windows are filled up with zeros. uint8 wraps around, there and back.
        return self.windows.join(self.attn(self.windows.split(codes - self.code_of_zero) + self.code_of_zero))


class IntMerging(nn.Module):
    """Patch merging: float (B, N, dim) -> float (B, N / 4, 2 dim)."""

    def __init__(self, merging: QPatchMerging, terms: int) -> None:
        super().__init__()
        self.resolution, self.width, self.norm_eps = merging.input_resolution, 4 * merging.dim, merging.norm.eps
        self.reduction_in = Quantizer.of(merging.reduction.act, self.width, merging.norm)
        self.reduction = IntLinear(merging.reduction, terms)

    def forward(self, x: Tensor) -> Tensor:
        x = F.layer_norm(neighbours(x, self.resolution), (self.width,), eps=self.norm_eps)
        return self.reduction(self.reduction_in(x))


class IntegerSwin(IntegerNetwork):
    """A calibrated `QSwinTransformer` in integer arithmetic: (B, C, H, W) -> logits (B, classes).

    Args, Raises: as of `IntegerViT`.

    Attributes:
        norm_pre: of the embedded patches.
        layers: blocks and patch merging, in forward order.
        heads, heads_in: the classifier and the quantizer of its input, one each.
    """

    def __init__(self, model: QSwinTransformer, terms: int = 1, dtype: torch.dtype = torch.float32) -> None:
        super().__init__(model, terms)
        self.norm_pre = copy.deepcopy(model.patch_embed.norm).requires_grad_(False)
        layers, merging = [], model.transitions
        for index, block in enumerate(model.blocks):
            if index in merging:
                layers.append(IntMerging(merging[index], terms))
            layers.append(IntSwinBlock(block, terms))
        self.layers = nn.Sequential(*layers)
        self.dim, self.norm_eps = model.num_features, model.norm.eps
        self.heads_in = nn.ModuleList(Quantizer.of(head.act, self.dim, model.norm) for head in model.heads)
        self.to(next(model.parameters()).device, dtype)
        self.eval()

    @torch.inference_mode()
    def forward(self, images: Tensor) -> Tensor:
        x = self.layers(self.norm_pre(self.embedded(images)))
        pooled = F.layer_norm(x, (self.dim,), eps=self.norm_eps).mean(1)  # the quantizer took over the affine part
        return self.heads[0](self.heads_in[0](pooled))
