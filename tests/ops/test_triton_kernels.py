"""The Triton kernels in Triton's interpreter against the reference, and compiled for GPUs that are not here."""
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers import ROOT, require

import ops
from _quan_base import QParams, code_range
from ops.reference import Reference

triton = require('triton')
REFERENCE = ops.get('reference')
# Of the tests of all implementations some: the interpreter is slow.
CHOSEN = 'test_triton_kernels or triton and test_linear and False-False'


@pytest.fixture
def interpreted(monkeypatch) -> Reference:
    """The implementation, its kernels run by the interpreter in blocks of which these tensors need several."""
    if os.environ.get('TRITON_INTERPRET') != '1':
        pytest.skip('in a process with TRITON_INTERPRET=1, which test_the_kernels_in_the_interpreter starts')
    kernels = ops.get('triton').kernels
    assert kernels.interpreted
    monkeypatch.setattr('ops.triton_kernels.ROWS', 4)
    monkeypatch.setattr('ops.triton_kernels.COLUMNS', 8)
    return ops.get('triton')


@pytest.mark.processes
@pytest.mark.slow
def test_the_kernels_in_the_interpreter():
    """Triton reads the variable when it is imported."""
    here = Path(__file__)
    done = subprocess.run([sys.executable, '-m', 'pytest', here, here.with_name('test_products.py'), '-k',
                           CHOSEN, '-m', 'not processes', '-p', 'no:cacheprovider', '--tb=short'],
                          cwd=ROOT, capture_output=True, text=True,
                          env=os.environ | {'TRITON_INTERPRET': '1'})
    assert done.returncode == 0, done.stdout[-3000:]
    assert int(re.search(r'(\d+) passed', done.stdout)[1]) >= 20


def quantizer(*shape: int, bits: int = 4, signed: bool = True, weight: bool = False,
              dtype: torch.dtype = torch.float64) -> QParams:
    scale = (torch.rand(shape, dtype=dtype) * 0.2 + 0.1).requires_grad_()
    zero_point = None if weight else torch.randn(shape, dtype=dtype).requires_grad_()
    return QParams(scale, zero_point, *code_range(bits, signed))


def assert_like_the_reference(ours, theirs, tensors: list) -> None:
    upstream = torch.randn(theirs.shape, dtype=theirs.dtype)
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
    for got, wanted in zip(torch.autograd.grad(ours, tensors, upstream), torch.autograd.grad(theirs, tensors, upstream),
                           strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-10, atol=1e-11)


@pytest.mark.parametrize(('shape', 'scales'), [
    ((3, 7), (7,)), ((2, 5, 9), (9,)), ((2, 5, 9), (1,)), ((2, 3, 5, 4), (3, 1, 1)), ((2, 3, 5, 4), (1, 1, 1)),
    ((6, 11), (6, 1)), ((1, 1), (1,))], ids=str)
@pytest.mark.parametrize(('bits', 'signed', 'strided'), [(2, True, True), (8, False, False)])
def test_fake_quantization(interpreted, shape, scales, bits, signed, strided):
    torch.manual_seed(0)
    q = quantizer(*scales, bits=bits, signed=signed)
    x = torch.randn(shape, dtype=torch.float64) * 2 ** bits * 0.2
    x = (x.mT.contiguous().mT if strided else x).requires_grad_()
    assert_like_the_reference(interpreted.fake_quantize(x, q), REFERENCE.fake_quantize(x, q),
                              [x, q.scale, q.zero_point])
    assert torch.equal(interpreted.codes(x, q), q.codes(x))


def test_borders_halves_and_nan(interpreted):
    """A value on a border is inside, a half goes to the even code, and NaN stays."""
    q = QParams(torch.ones(1, requires_grad=True), torch.zeros(1, requires_grad=True), -2, 1)
    x = torch.tensor([-2.5, -2., -1.5, -0.5, 0.5, 1., 1.5, torch.nan], requires_grad=True)
    out = interpreted.fake_quantize(x, q)
    assert out.tolist()[:7] == [-2., -2., -2., 0., 0., 1., 1.] and out.isnan()[7]
    out[:7].sum().backward()
    assert x.grad.tolist() == [0., 1., 1., 1., 1., 1., 0., 0.]


@pytest.mark.parametrize('scales', [1, 2])
def test_attention(interpreted, scales):
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, 3, 2, 4, dtype=torch.float64).transpose(1, 2).requires_grad_() for _ in range(3))
    quantizers = [quantizer(scales, 1, 1, signed=signed) for signed in (True, True, True, False)]
    assert_like_the_reference(interpreted.attention(q, k, v, quantizers, 0.5), REFERENCE.attention(
        q, k, v, quantizers, 0.5), [q, k, v, *(value for each in quantizers for value in each[:2])])


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16])
def test_half_precision_is_quantized_as_torch_does(interpreted, dtype):
    torch.manual_seed(0)
    x, q = torch.randn(6, 9).to(dtype).requires_grad_(), quantizer(9, dtype=torch.float32)
    found = []
    for implementation in (interpreted, ops.get('torch')):
        out = implementation.fake_quantize(x, q)
        found.append([out, *torch.autograd.grad(out.square().sum(), [x, q.scale, q.zero_point])])
    torch.testing.assert_close(*found)


COMPILE = '''
import sys
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from ops import triton_kernels as kernels

FLAT = {'rows': 'i32', 'columns': 'i32', 'channels': 'i32', 'qn': 'i32', 'qp': 'i32'}
ROW = {'tokens': 'i32', 'channels': 'i32', 'qn': 'i32', 'qp': 'i32'}
BLOCK = {'last': True, 'gelu': True, 'R': kernels.ROWS, 'C': kernels.COLUMNS}
GRID = {'reciprocal_ptr': '*fp32', 'zero_ptr': '*fp32'}
for name, arguments, constants in (
        ('_codes_kernel', {'x_ptr': '*bf16', 'out_ptr': '*fp32', **GRID, **FLAT}, BLOCK),
        ('_codes_kernel', {'x_ptr': '*fp32', 'out_ptr': '*fp32', **GRID, **FLAT}, BLOCK | {'last': False}),
        ('_backward_kernel', {'grad_ptr': '*bf16', 'x_ptr': '*bf16', 'out_ptr': '*fp32', 'sums_ptr': '*fp32', **GRID,
                              **FLAT}, BLOCK),
        ('_backward_kernel', {'grad_ptr': '*fp32', 'x_ptr': '*fp32', 'out_ptr': '*fp32', 'sums_ptr': '*fp32', **GRID,
                              **FLAT}, BLOCK | {'last': False, 'gelu': False}),
        ('_softmax_kernel', {'scores_ptr': '*bf16', 'out_ptr': '*fp32', **GRID, **ROW}, {'N': 256}),
        ('_softmax_backward_kernel', {'grad_ptr': '*bf16', 'scores_ptr': '*bf16', 'out_ptr': '*bf16',
                                      'sums_ptr': '*fp32', **GRID, **ROW}, {'N': 256})):
    function = getattr(kernels, name)
    signature = {key: arguments.get(key, 'constexpr') for key in function.arg_names}
    source = ASTSource(function, signature, {(function.arg_names.index(key),): value
                                             for key, value in constants.items()})
    made = triton.compile(source, target=GPUTarget('cuda', int(sys.argv[1]), 32), options=kernels.OPTIONS)
    print(name, made.metadata.shared)
    open(f'{sys.argv[2]}/{len(constants)}{name}{constants.get("last", "")}.cubin', 'wb').write(made.asm['cubin'])
'''


@pytest.mark.slow
@pytest.mark.processes
@pytest.mark.parametrize('capability', [80, 90])
def test_kernels_compile_for_gpus_that_are_not_here(capability, tmp_path):
    """And need at most 64 KiB of shared memory, 168 registers a thread, and spill none of them."""
    (tmp_path / 'compile.py').write_text(COMPILE)
    done = subprocess.run([sys.executable, tmp_path / 'compile.py', str(capability), tmp_path], cwd=ROOT,
                          capture_output=True, text=True, env=os.environ | {
                              'PYTHONPATH': str(ROOT), 'TRITON_CACHE_DIR': str(tmp_path / 'cache')})
    assert done.returncode == 0, done.stderr
    shared = [int(line.split()[1]) for line in done.stdout.splitlines()]
    assert len(shared) == 6 and max(shared) <= 65536
    tools = list(Path(triton.__file__).parent.glob('backends/nvidia/bin/cuobjdump'))
    if not tools:
        pytest.skip('this Triton has no cuobjdump, which tells the registers')
    for file in tmp_path.glob('*.cubin'):
        said = subprocess.run([tools[0], '-res-usage', file], capture_output=True, text=True, check=True)
        registers, stack, local = (int(re.search(rf'{name}:(\d+)', said.stdout + said.stderr)[1])
                                   for name in ('REG', 'STACK', 'LOCAL'))
        print(file.stem, capability, registers, stack, local)
        assert registers <= 168 and stack == local == 0, file.name
