"""Integer inference in fused C++ kernels on the CPU: `NativeViT` runs an `IntegerViT` in them.

`integer_kernels.cpp`, with the headers beside it, is compiled on first use. Where there is no C++ compiler, `fastest`
returns the network in plain torch instead.
"""
from __future__ import annotations

import ctypes
import functools
import hashlib
import math
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from deployment.integer import IntBlock, IntegerNetwork, IntegerViT, IntLinear, Quantizer
from ops.cpp_library import NativeUnavailable, load

__all__ = ['NativeUnavailable', 'NativeViT', 'fastest']

SOURCE = Path(__file__).with_name('integer_kernels.cpp')
# The cached library is named after the source and the flags: the headers' checksum among them has it made anew when one
# of them changes.
HEADERS = hashlib.sha256(b''.join(path.read_bytes() for path in sorted(SOURCE.parent.glob('integer_*.h')))).hexdigest()
FLAGS = ['-pthread', '-fopenmp-simd', '-ffp-contract=fast', f'-DQVIT_HEADERS={HEADERS[:16]}']
HEAD_WIDTH = 64
LARGEST_ZERO = 1024  # of q, v and attention: the kernels sum their products in 32 bits
# The kinds of a block's parts: the kernels know each by its place in these tables.
LINEARS = ('qkv', 'proj', 'fc1', 'fc2')
QUANTIZERS = ('attn_in', 'q', 'k', 'v', 'attn', 'proj_in', 'fc1_in', 'fc2_in')
VECTORS = ('score_scale', 'q_zero', 'v_zero', 'attn_zero', 'out_scale')


@functools.cache
def _library() -> ctypes.CDLL:
    """The compiled kernels, with the types of their functions."""
    library = load(SOURCE, FLAGS)
    integer, pointer = ctypes.c_int, ctypes.c_void_p
    for name, result, arguments in (
            ('instructions', ctypes.c_char_p, []), ('new', pointer, [pointer, pointer]), ('free', None, [pointer]),
            ('linear', integer, [pointer, *[integer] * 5, *[pointer] * 4]),
            ('quantizer', integer, [pointer, *[integer] * 4, pointer, pointer]),
            ('vector', integer, [pointer, *[integer] * 3, pointer]),
            ('forward', integer, [pointer, pointer, integer, integer, pointer])):
        function = getattr(library, f'qvit_{name}')
        function.restype, function.argtypes = result, arguments
    return library


class NativeViT:
    """`IntegerViT` in fused kernels: float32 images (B, C, H, W) on the CPU -> logits (B, classes).

    Images are shared out to the threads; with fewer images than threads, several threads share one.

    Args:
        network: the integer network, with heads 64 wide and quantized attention, as every DeiT has them.
        threads: at most so many; torch's number unless given.

    Raises:
        NativeUnavailable: there is no compiler, or the network is of another kind.
    """

    def __init__(self, network: IntegerViT, threads: int | None = None) -> None:
        _check_supported(network)
        self._library, self._handle = _library(), None
        self.threads, self.num_classes = threads or torch.get_num_threads(), network.num_classes
        channels = network.patch.weight.shape[-1] // math.prod(network.patch_size)
        self.image_shape = channels, *network.input_size
        block, prefix = network.blocks[0], network.prefix.shape[1]
        read, has_norm_pre = network.tokens_of_heads[0], isinstance(network.norm_pre, nn.LayerNorm)
        tokens, hidden = prefix + network.positions.shape[1], block.fc1.weight.shape[1]
        shape = torch.tensor([tokens, prefix, network.dim, len(network.blocks), block.attn.num_heads, hidden,
                              network.num_classes, *self.image_shape, *network.patch_size, block.attn.rectified,
                              len(network.heads), read.start, read.stop, network.pools_first, has_norm_pre],
                             dtype=torch.int32)  # a Shape of the kernels
        eps = torch.tensor([block.norm1_eps, block.norm2_eps, network.norm_eps, block.attn.norm_eps,
                            network.norm_pre.eps if has_norm_pre else 0.])  # their Epsilon
        self._handle = self._library.qvit_new(shape.data_ptr(), eps.data_ptr())
        if not self._handle:
            raise MemoryError('no memory for the network in the kernels')
        for kind, (layer, quantizer) in enumerate(((network.patch, network.patch_in),
                                                   *zip(network.heads, network.heads_in, strict=True))):
            self._linear(-1, kind, layer)
            self._quantizer(-1, kind, quantizer)
        of_norm_pre = (network.norm_pre.weight, network.norm_pre.bias) if has_norm_pre else ()
        for kind, values in enumerate((network.prefix, network.positions, *of_norm_pre)):
            self._vector(-1, kind, values)
        for index, block in enumerate(network.blocks):
            self._block(index, block)

    @property
    def instructions(self) -> str:
        """The instructions that compute the products: 'AVX-512 VNNI', 'AVX-VNNI', 'AVX2', or 'portable' C++."""
        return self._library.qvit_instructions().decode()

    def _block(self, index: int, block: IntBlock) -> None:
        attn = block.attn
        linears = {'qkv': attn.qkv, 'proj': attn.proj, 'fc1': block.fc1, 'fc2': block.fc2}
        quantizers = {'attn_in': block.attn_in, 'q': attn.q_quant, 'k': attn.k_quant, 'v': attn.v_quant,
                      'attn': attn.attn_quant, 'proj_in': attn.proj_in, 'fc1_in': block.fc1_in, 'fc2_in': block.fc2_in}
        for kind, name in enumerate(LINEARS):
            self._linear(index, kind, linears[name])
        for kind, name in enumerate(QUANTIZERS):
            of_head = (attn.num_heads, 1, HEAD_WIDTH) if name in 'qkv' else None
            self._quantizer(index, kind, quantizers[name], of_head)
        for kind, name in enumerate(VECTORS):
            self._vector(index, kind, getattr(attn, name))

    def _linear(self, block: int, kind: int, layer: IntLinear) -> None:
        terms, outputs, inputs = layer.weight.shape
        weight, offset = layer.weight.cpu().contiguous(), layer.offset.cpu().contiguous()
        scale, bias = _floats(layer.scale), _floats(layer.bias)
        _check(self._library.qvit_linear(self._handle, block, kind, inputs, outputs, terms, weight.data_ptr(),
                                         scale.data_ptr(), offset.data_ptr(), bias.data_ptr()))

    def _quantizer(self, block: int, kind: int, quantizer: Quantizer, shape: tuple[int, ...] | None = None) -> None:
        scale, shift = (_floats(value if shape is None else value.expand(shape))
                        for value in (quantizer.scale, quantizer.shift))
        _check(self._library.qvit_quantizer(self._handle, block, kind, scale.numel(), quantizer.levels,
                                            scale.data_ptr(), shift.data_ptr()))

    def _vector(self, block: int, kind: int, values: Tensor) -> None:
        values = _floats(values)
        _check(self._library.qvit_vector(self._handle, block, kind, values.numel(), values.data_ptr()))

    def __call__(self, images: Tensor) -> Tensor:
        if tuple(images.shape[1:]) != self.image_shape:
            raise ValueError(f'images of shape {list(images.shape)}: this network takes (B, '
                             f'{", ".join(map(str, self.image_shape))})')
        images = _floats(images)
        logits = torch.empty(len(images), self.num_classes)
        if self._library.qvit_forward(self._handle, images.data_ptr(), len(images), self.threads, logits.data_ptr()):
            raise MemoryError(f'no memory or threads for {len(images)} images on {self.threads} threads')
        return logits

    def __del__(self) -> None:
        if getattr(self, '_handle', None):
            self._library.qvit_free(self._handle)


def _check_supported(network: IntegerNetwork) -> None:
    """Raises NativeUnavailable for a network that the kernels do not compute."""
    if not isinstance(network, IntegerViT):
        raise NativeUnavailable('the kernels are for ViT and DeiT, whose tokens all attend to one another')
    attention = network.blocks[0].attn if len(network.blocks) else None
    if attention is None or not attention.quantized or attention.head_dim != HEAD_WIDTH:
        raise NativeUnavailable(f'the kernels are for quantized attention with heads {HEAD_WIDTH} wide')
    if max(float(zeros.abs().max()) for block in network.blocks
           for zeros in (block.attn.q_zero, block.attn.v_zero, block.attn.attn_zero)) > LARGEST_ZERO:
        raise NativeUnavailable(f'the kernels are for zero points of attention up to {LARGEST_ZERO}')


def _check(status: int) -> None:
    """The kernels' functions return 0 unless they met an exception, which is only ever one of memory."""
    if status:
        raise MemoryError('no memory for the network in the kernels')


def _floats(values: Tensor) -> Tensor:
    return values.detach().to('cpu', torch.float32).contiguous()


def fastest(network: IntegerNetwork, threads: int | None = None) -> Callable[[Tensor], Tensor]:
    """The network in native kernels where a CPU can have them, and else the network itself, with a line that says why.
    """
    if network.patch.weight.device.type != 'cpu':
        return network
    try:
        native = NativeViT(network, threads)
    except NativeUnavailable as error:
        print(f'integer inference in plain torch, which is slower: {error}')
        return network
    if 'VNNI' not in native.instructions:
        print(f'integer inference without 8-bit dot products ({native.instructions} code), which is slower: '
              f'this processor has no VNNI')
    return native
