"""The codes of values on the borders between codes, in the integer network and in ONNX files.

A position x / scale + zero point is a whole number and a half on such a border. Scales are powers of two, so that every
position is exact, and what is expected can be counted: clamp the position, then round it to the nearest even.
"""
import numpy as np
import pytest
import torch
from helpers import require

from _quan_base import ActQ, code_range
from deployment.integer import Quantizer, UnsignedCodes

SCALES = (0.125, 1., 4., 0.)        # of 0 the smallest scale in use is made
ZERO_POINTS = (0.4, 2.5, -3.6, 0.)  # in use: 0, 2, -4, 0
WHOLE = (0, 2, -4, 0)
CASES = [(bits, signed, granularity) for bits in (2, 3, 4, 8) for signed in (True, False)
         for granularity in ('channel', 'tensor')]


def positions(qn: int, qp: int) -> torch.Tensor:
    """All codes, all borders between them, and values beyond both ends."""
    return torch.cat([torch.arange(2 * qn - 3, 2 * qp + 4, dtype=torch.float64) / 2,
                      torch.tensor([-1e6, 1e6], dtype=torch.float64)])


def quantizer(bits: int, signed: bool, granularity: str, channels: int = len(SCALES)) -> ActQ:
    act = ActQ(channels, bits, granularity).double().eval()
    count = channels if granularity == 'channel' else 1
    act.set_qparams(torch.tensor(SCALES[:count]).double(), torch.tensor(ZERO_POINTS[:count]).double(), signed)
    with torch.no_grad():  # as an optimizer may leave it
        act.alpha.copy_(torch.tensor(SCALES[:count]))
    return act


def inputs_and_codes(act: ActQ) -> tuple[torch.Tensor, torch.Tensor]:
    """Inputs (n, channels) that lie at `positions` in every channel, and their codes, counted by hand."""
    qn, qp = act.code_range
    where = positions(qn, qp)
    codes = torch.tensor([round(min(max(position, qn), qp)) for position in where.tolist()])  # Python's is to even
    x, expected = [], []
    for scale, zero in zip(SCALES, WHOLE, strict=True) if act.alpha.numel() > 1 else [(SCALES[0], WHOLE[0])] * 4:
        if scale > 0:
            x.append((where - zero) * scale)
            expected.append(codes)
        else:  # 0 is 0, and everything else far beyond the ends
            x.append(where.sign())
            expected.append(torch.where(where > 0, qp, torch.where(where < 0, qn, 0)))
    return torch.stack(x, 1), torch.stack(expected, 1)


@pytest.mark.parametrize(('bits', 'signed', 'granularity'), CASES)
def test_codes_of_the_integer_network(bits, signed, granularity):
    act = quantizer(bits, signed, granularity)
    x, expected = inputs_and_codes(act)
    qn, qp = code_range(bits, signed)
    assert torch.equal(act.to_int(x).long(), expected)
    assert torch.equal(Quantizer.of(act, x.shape[1])(x).long(), expected - qn)
    x, expected = x.T[None, :, :, None], expected.T[None, :, :, None]  # (B, heads, N, d), as q, k, v and attention
    assert torch.equal(act.to_int(x).long(), expected)
    assert torch.equal(Quantizer.of_heads(act, x.shape[1])(x).long(), expected - qn)
    codes = UnsignedCodes.of(act, x.shape[1])
    assert codes.levels == qp - qn and codes.zero.tolist() == [
        zero - qn for zero in (WHOLE if granularity == 'channel' else WHOLE[:1] * 4)]
    assert codes.scale.tolist() == (act.scale if granularity == 'channel' else act.scale.expand(4)).tolist()
    assert codes.scale.min() > 0


def onnx_codes(affine, x: torch.Tensor, right: bool) -> torch.Tensor:
    """What onnxruntime computes for `to_codes`: the stored codes, and the constant that they are stored with."""
    onnx, ort = require('onnx'), require('onnxruntime')
    from deployment.onnx_graph import Graph, to_codes

    g = Graph(17)
    codes = to_codes(g, 'x', affine, right)
    kind = {None: onnx.TensorProto.FLOAT, np.dtype(np.uint8): onnx.TensorProto.UINT8,
            np.dtype(np.int8): onnx.TensorProto.INT8}[codes.dtype]
    graph = onnx.helper.make_graph(
        g.nodes, 'codes', [onnx.helper.make_tensor_value_info('x', onnx.TensorProto.FLOAT, x.shape)],
        [onnx.helper.make_tensor_value_info(codes.value, kind, None)], list(g.constants.values()))
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid('', 17)], ir_version=8)
    session = ort.InferenceSession(model.SerializeToString(), providers=['CPUExecutionProvider'])
    stored, = session.run(None, {'x': x.float().numpy()})
    return torch.from_numpy(stored.astype(np.int64)) - codes.zero


@pytest.mark.parametrize(('bits', 'signed', 'granularity'), CASES)
@pytest.mark.parametrize('right', [False, True])
def test_codes_of_onnx_files(bits, signed, granularity, right):
    require('onnx')
    from deployment.onnx_graph import Affine

    act = quantizer(bits, signed, granularity)
    x, expected = inputs_and_codes(act)
    expected = expected - act.code_range[0]
    quant, zero = Quantizer.of(act, x.shape[1]), UnsignedCodes.of(act, x.shape[1]).zero
    assert torch.equal(onnx_codes(Affine.of(quant), x, right), expected)
    assert torch.equal(onnx_codes(Affine.of(quant, zero), x, right), expected - zero.long())  # as q and v


@pytest.mark.parametrize('right', [False, True])
def test_onnx_files_differ_at_most_on_borders_with_odd_zero_points(right):
    """ONNX adds a zero point after it has rounded to even: with an odd one, a tie goes to the other of both codes."""
    require('onnx')
    from deployment.onnx_graph import Affine

    act = quantizer(4, True, 'tensor')
    act.set_qparams(torch.tensor([0.5]), torch.tensor([3.]), True)
    where = positions(*act.code_range)[:, None]
    x = (where - 3) * 0.5
    quant = Quantizer.of(act, 1)
    off = onnx_codes(Affine.of(quant), x, right) - quant(x).long()
    assert off.abs().max() == 1 and (off[where == where.round()] == 0).all()
