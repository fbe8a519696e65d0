"""What a network costs: parameters, bytes, multiply-accumulates, bit operations, operations; tables of them."""
from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch.nn as nn

from analysis.precision import FULL_PRECISION_BITS, Product, TensorUse, analyse

__all__ = ['CONVENTIONS', 'Row', 'Size', 'bops', 'countings', 'layers', 'ops', 'render', 'summary', 'theoretical_size']

CONVENTIONS = """All counts are of one image, and follow from the network's modules and shapes:

    MACs    multiply-accumulates of the linear layers, the patch embedding and the two products of each attention
    BOPs    sum of MACs x bits of one operand x bits of the other: weight and activation, q and k, attention and v;
            full precision is 32 x 32
    OPs     full-precision FLOPs + 1/32, 1/16, 1/8, 1/4 of the 2-, 3-, 4-, 8-bit multiplications, as the line of work
            from Bi-Real Net to Q-ViT counts; a FLOP is there a multiply-accumulate, its addition included. Other widths
            count as the next wider one of these, operands of two widths as the wider
    size    the weight codes' bits, 32 bits for every other value (biases, LayerNorms, embeddings, steps, zero points),
            and one bit for each activation quantizer's sign; MB are 10^6 bytes

Elementwise work (LayerNorm, softmax, GELU, residual sums, the quantizers) is in none of them, as is usual; --countings
shows what it would change. The full-precision columns are of the same network at 32 bits, without IRM and quantizers.
"""
OPS_OF_BITS = ((2, 1 / 32), (3, 1 / 16), (4, 1 / 8), (8, 1 / 4))
Row = dict[str, Any]


# --- conventions ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Size:
    """Stored bits of a network.

    Attributes:
        codes: the quantized weights' codes.
        scales, zero_points: the quantizers'.
        signs: one bit for each activation quantizer.
        full_precision: every other parameter.
    """
    codes: int
    scales: int
    zero_points: int
    signs: int
    full_precision: int

    @property
    def bits(self) -> int:
        return self.codes + self.scales + self.zero_points + self.signs + self.full_precision

    @property
    def bytes(self) -> int:
        """Rounded up to whole bytes."""
        return -(-self.bits // 8)


def theoretical_size(model: nn.Module) -> Size:
    """What the network's parameters take with every weight code at its bits, without a file's headers and padding.

    Args:
        model: a quantized network, or a full-precision DeiT, whose parameters are all `full_precision`.

    Raises:
        UserError: see `precision.analyse`.
    """
    return _size(analyse(model)[0])


def _size(tensors: list[TensorUse]) -> Size:
    stored = [tensor for tensor in tensors if tensor.parameter]
    return Size(codes=sum(tensor.elements * tensor.bits for tensor in stored if tensor.quantizer),
                scales=FULL_PRECISION_BITS * sum(tensor.scales for tensor in tensors),
                zero_points=FULL_PRECISION_BITS * sum(tensor.zero_points for tensor in tensors),
                signs=sum(tensor.quantizer is not None for tensor in tensors if not tensor.parameter),
                full_precision=sum(tensor.elements * tensor.bits for tensor in stored if not tensor.quantizer))


def bops(product: Product) -> int:
    """Bit operations: multiply-accumulates x bits x bits."""
    return product.macs * product.bits[0] * product.bits[1]


def ops(product: Product) -> float:
    """Operations: full-precision multiply-accumulates, or the share of one that a narrower counts as."""
    wider = max(product.bits)
    return product.macs * next((share for bits, share in OPS_OF_BITS if wider <= bits), 1.)


def _full_precision_bops(macs: int) -> int:
    return macs * FULL_PRECISION_BITS ** 2


# --- reports: rows of raw numbers -------------------------------------------------------------------------------------


def summary(name: str, model: nn.Module, packed: int | None = None) -> Row:
    """One row for a network: its size and operations beside those of the full-precision one.

    Args:
        name: what to call it.
        packed: bytes of its packed file, where there is one.
    """
    tensors, products = analyse(model)
    quant, (height, width) = getattr(model, 'quant', None), model.patch_embed.img_size
    macs, bit_operations, operations = (sum(map(count, products)) for count in (lambda p: p.macs, bops, ops))
    size = _size(tensors).bytes
    reference_size = _reference_bytes(tensors)
    return {
        'model': name, 'weight_bits': quant.weight_bits if quant else FULL_PRECISION_BITS,
        'act_bits': quant.act_bits if quant else FULL_PRECISION_BITS,
        'input_size': height if height == width else f'{height}x{width}',
        'parameters': sum(parameter.numel() for parameter in model.parameters()),
        'size_bytes': size, 'full_precision_size_bytes': reference_size, 'size_ratio': reference_size / size,
        **({} if packed is None else {'packed_bytes': packed, 'packed_ratio': reference_size / packed}),
        'macs': macs,
        'bops': bit_operations, 'full_precision_bops': _full_precision_bops(macs),
        'bops_ratio': _full_precision_bops(macs) / bit_operations,
        'ops': operations, 'full_precision_ops': macs, 'ops_ratio': macs / operations}


def _reference_bytes(tensors: list[TensorUse]) -> int:
    return sum(tensor.elements for tensor in tensors if tensor.parameter and tensor.in_reference) * (
        FULL_PRECISION_BITS // 8)


def layers(model: nn.Module) -> list[Row]:
    """One row for each product of the forward, one for the parameters of no product, one for all."""
    tensors, products = analyse(model)
    rows, left = [], list(tensors)
    for product in products:
        own = [] if product.is_attention else [tensor for tensor in tensors if _belongs(tensor, product.layer)]
        left = [tensor for tensor in left if tensor not in own]
        rows.append(_layer_row(product.layer, 'x'.join(map(str, product.bits)), own, [product]))
    rows.append(_layer_row('other', str(FULL_PRECISION_BITS), left, []))
    return [*rows, _layer_row('all', '', tensors, products)]


def _belongs(tensor: TensorUse, layer: str) -> bool:
    return tensor.name.startswith(f'{layer}.') and (tensor.parameter or tensor.quantizer == f'{layer}.act')


def _layer_row(name: str, bits: str, tensors: list[TensorUse], products: list[Product]) -> Row:
    macs, operations = sum(product.macs for product in products), sum(map(ops, products))
    return {'layer': name, 'bits': bits, 'size_bytes': _size(tensors).bits / 8,
            'full_precision_size_bytes': _reference_bytes(tensors), 'macs': macs, 'bops': sum(map(bops, products)),
            'full_precision_bops': _full_precision_bops(macs), 'ops': operations, 'full_precision_ops': macs,
            'ops_ratio': macs / operations if operations else None}


def countings(model: nn.Module) -> list[Row]:
    """The ratio of full precision to the network by several conventions, each of which someone could mean."""
    tensors, products = analyse(model)
    work, reference_work = sum(t.work for t in tensors), sum(t.reference_work for t in tensors)
    macs = sum(product.macs for product in products)

    def edges(product: Product) -> bool:
        return not product.layer.startswith(('blocks.', 'layers.'))

    def attention(product: Product) -> bool:
        return product.is_attention

    def counted(full_precision: Callable[[Product], bool] = lambda _: False) -> float:
        return sum(product.macs if full_precision(product) else ops(product) for product in products)

    blocks = [product for product in products if not edges(product) and not attention(product)]
    rows = [
        ('linear layers of the blocks alone', sum(p.macs for p in blocks), sum(map(ops, blocks))),
        ('OPs, as this report counts', macs, counted()),
        ('without the attention products, in both networks', sum(p.macs for p in products if not attention(p)),
         sum(ops(p) for p in products if not attention(p))),
        ('patch embedding and heads at full precision', macs, counted(edges)),
        ('one of the two attention products at full precision', macs, counted(lambda p: p.layer.endswith(' q k^T'))),
        ('both attention products at full precision', macs, counted(attention)),
        ('both, and patch embedding and heads', macs, counted(lambda p: edges(p) or attention(p))),
        ('OPs, and elementwise work of the full-precision kind', macs + reference_work, counted() + reference_work),
        ('OPs, and all elementwise work, quantizers and IRM included', macs + reference_work, counted() + work),
        ('the same, patch embedding and heads at full precision', macs + reference_work, counted(edges) + work),
        ('additions apart and in full (2 FLOPs a MAC)', 2 * macs, macs + counted()),
        ('BOPs', _full_precision_bops(macs), sum(map(bops, products)))]
    return [{'counting': name, 'full_precision': full, 'network': own, 'ratio': full / own} for name, full, own in rows]


# --- formats ----------------------------------------------------------------------------------------------------------

_GIGA, _MEGA = (1e9, '.3f'), (1e6, '.2f')
_SHOWN = {  # key: (heading, unit, form) where they differ from the key and the plain value
    'weight_bits': ('W bits', 1, 'd'), 'act_bits': ('A bits', 1, 'd'), 'input_size': ('px', 1, ''),
    'parameters': ('params (M)', *_MEGA), 'size_bytes': ('size (MB)', *_MEGA),
    'full_precision_size_bytes': ('FP size (MB)', *_MEGA), 'size_ratio': ('size ratio', 1, '.2f'),
    'packed_bytes': ('packed (MB)', *_MEGA), 'packed_ratio': ('packed ratio', 1, '.2f'), 'macs': ('MACs (G)', *_GIGA),
    'bops': ('BOPs (G)', 1e9, '.1f'), 'full_precision_bops': ('FP BOPs (G)', 1e9, '.1f'),
    'bops_ratio': ('BOPs ratio', 1, '.2f'), 'ops': ('OPs (G)', *_GIGA), 'full_precision_ops': ('FP OPs (G)', *_GIGA),
    'ops_ratio': ('OPs ratio', 1, '.2f'), 'full_precision': ('FP (G)', *_GIGA), 'network': ('network (G)', *_GIGA),
    'ratio': ('ratio', 1, '.2f'), 'zero_points': ('zero points', 1, 'd')}


def render(rows: list[Row], form: str) -> str:
    """Rows with the same keys as text: 'json' and 'csv' with raw numbers, 'table' and 'markdown' with units."""
    if form == 'json':
        return json.dumps(rows, indent=2) + '\n'
    if form == 'csv':
        text = io.StringIO()
        writer = csv.DictWriter(text, rows[0], lineterminator='\n')
        writer.writeheader()
        writer.writerows(rows)
        return text.getvalue()
    cells = [[_shown(key, value) for key, value in row.items()] for row in rows]
    table = [[_SHOWN.get(key, (key,))[0] for key in rows[0]], *cells]
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    right = [isinstance(value, int | float) for value in rows[0].values()]
    lines = [[text.rjust(width) if is_right else text.ljust(width)
              for text, width, is_right in zip(row, widths, right, strict=True)] for row in table]
    if form == 'table':
        return ''.join('  '.join(line).rstrip() + '\n' for line in lines)
    rule = ['-' * (width - 1) + (':' if is_right else '-') for width, is_right in zip(widths, right, strict=True)]
    return ''.join(f'| {" | ".join(line)} |\n' for line in [lines[0], rule, *lines[1:]])


def _shown(key: str, value: Any) -> str:
    if value is None:
        return ''
    _, unit, form = _SHOWN.get(key, (key, 1, ''))
    return str(value) if isinstance(value, str) else format(value if unit == 1 else value / unit, form)
