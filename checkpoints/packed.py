"""Packed files: a quantized network in the bytes that its bit-widths say, and nothing but what its forward needs.

A packed file is a safetensors file. Weight codes of b bits lie in a stream of b bits each, low bits first (3-bit codes
take 3 bits, not 4); scales, zero points, biases, LayerNorms, embeddings are float32. The header's `qvit_packed` entry,
a JSON object, says what network it is, and of every coded weight its bits and shape; its `sha256` is the checksum of
all the rest. The same network always gives the same bytes.

The checksum finds damage, not intent: whoever makes a file can compute it. So the description is checked all the same.
"""
from __future__ import annotations

import hashlib
import json
import math
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import safetensors
import safetensors.torch
import torch
import torch.nn as nn
from torch import Tensor

import _quan_base
import quant_swin_transformer  # noqa: F401  registers networks that packed files hold
import quant_vision_transformer  # noqa: F401  registers the others
from _quan_base import ActQ, code_range, is_calibrated, named_quantizers
from checkpoints.building import build_described, check_described
from checkpoints.descriptions import FORMAT_VERSION, ModelInfo
from checkpoints.states import some
from console.mistakes import shown
from files.paths import check_file, fault
from utils import UserError, write_whole

__all__ = ['PackedFile', 'Stored', 'is_packed', 'pack_codes', 'packed_layout', 'read_packed', 'unpack_codes',
           'write_packed']

ENTRY, CHECKSUM = 'qvit_packed', 'sha256'


class Stored(NamedTuple):
    """One tensor of a packed file: its bits per value, shape, and bytes."""
    name: str
    bits: int
    shape: tuple[int, ...]
    bytes: int


class PackedFile(NamedTuple):
    """What a packed file holds.

    Attributes:
        info: which network it is.
        weights: {'bits': .., 'shape': [..]} of every coded weight, by name.
        activations: {'bits': .., 'signed': ..} of every activation quantizer, by name.
        tensors: all of them, the coded weights still packed (uint8).
    """
    info: ModelInfo
    weights: dict[str, dict[str, Any]]
    activations: dict[str, dict[str, Any]]
    tensors: dict[str, Tensor]

    @property
    def about(self) -> dict[str, Any]:
        """The description as it stands in the header."""
        return self.info.to_dict() | {'weights': self.weights, 'activations': self.activations}

    def state(self) -> dict[str, Tensor]:
        """The state_dict of the simulated network: the weights have the values of their codes."""
        state = self.shapes()
        for name, code in self.weights.items():
            shape, scale = torch.Size(code['shape']), state[f'{name.removesuffix("weight")}alpha']
            codes = unpack_codes(self.tensors[name], code['bits'], shape.numel()).view(shape)
            state[name] = codes.to(scale.dtype) * scale.view(-1, *[1] * (len(shape) - 1))
        return {name: _quan_base.alpha_of(value) if name.endswith('.alpha') else value for name, value in state.items()}

    def shapes(self) -> dict[str, Tensor]:
        """`state` with the weights on the meta device: their shapes, without unpacking their codes."""
        state = {name: value for name, value in self.tensors.items() if name not in self.weights}
        for name, code in self.weights.items():
            state[name] = torch.empty(code['shape'], device='meta')
            state[f'{name.removesuffix("weight")}init_state'] = torch.ones(1)
        for name, activation in self.activations.items():
            state[f'{name}.signed'] = torch.full((1,), float(activation['signed']))
            state[f'{name}.init_state'] = torch.ones(1)
        return state

    def checkpoint(self) -> dict[str, Any]:
        """The same as a checkpoint that describes its network."""
        return {'model': self.state(), 'qvit': self.info.to_dict()}

    def network(self) -> nn.Module:
        """The simulated network, in evaluation mode.

        Raises:
            UserError: the file does not fit the network that it names.
        """
        return build_described(self.info, self.state(), 'the packed file').eval()

    def stored(self) -> list[Stored]:
        """Every tensor, in the file's order."""
        return [Stored(name, self.weights[name]['bits'], tuple(self.weights[name]['shape']), value.nbytes)
                if name in self.weights else Stored(name, 8 * value.element_size(), tuple(value.shape), value.nbytes)
                for name, value in self.tensors.items()]


# --- streams of codes -------------------------------------------------------------------------------------------------


def pack_codes(codes: Tensor, bits: int) -> Tensor:
    """Signed codes of `bits` bits, any shape -> uint8 (ceil(numel * bits / 8),): b bits each, low bits first.

    Raises:
        ValueError: a code does not fit.
    """
    qn, qp = code_range(bits, signed=True)
    if codes.numel() and not (qn <= int(codes.min()) and int(codes.max()) <= qp):
        raise ValueError(f'codes from {int(codes.min())} to {int(codes.max())} do not fit in {bits} bits')
    unsigned = (codes.flatten() - qn).to(torch.uint8).numpy()
    stream = np.unpackbits(unsigned[:, None], axis=1, count=bits, bitorder='little')
    return torch.from_numpy(np.packbits(stream, bitorder='little'))


def unpack_codes(stream: Tensor, bits: int, numel: int) -> Tensor:
    """The inverse of `pack_codes`: uint8 stream -> int32 (numel,)."""
    values = np.unpackbits(stream.numpy(), count=numel * bits, bitorder='little').reshape(numel, bits)
    unsigned = np.packbits(values, axis=1, bitorder='little')[:, 0]
    return torch.from_numpy(unsigned.astype(np.int32)) + code_range(bits, signed=True)[0]


# --- files ------------------------------------------------------------------------------------------------------------


def packed_layout(model: nn.Module) -> list[Stored]:
    """The tensors that a packed file of this network has, calibrated or not, and the bytes of each."""
    coded = {f'{name}.weight': layer.weight_bits for name, layer in named_quantizers(model)
             if not isinstance(layer, ActQ)}
    layout = []
    for name, value in model.state_dict().items():
        if not name.endswith(('.init_state', '.signed')):
            bits = coded.get(name, 32)
            layout.append(Stored(name, bits, tuple(value.shape), -(-value.numel() * bits // 8)))
    return layout


def _json(header: dict[str, Any]) -> str:
    return json.dumps(header, separators=(',', ':'))


def _checksum(header: dict[str, Any], tensors: dict[str, Tensor]) -> str:
    digest = hashlib.sha256(_json(header).encode())
    for name in sorted(tensors):
        value = tensors[name]
        digest.update(f'{name} {value.dtype} {list(value.shape)}'.encode())
        digest.update(value.flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def write_packed(model: nn.Module, info: ModelInfo, path: str | Path) -> PackedFile:
    """Writes the packed file of a calibrated network, whole or not at all.

    Args:
        model: the network, on any device.
        info: its description.
        path: of the file, by convention *.qvit.safetensors.

    Raises:
        UserError: the network is not quantized or not calibrated, or the file cannot be written.
    """
    quantizers = dict(named_quantizers(model))
    layers = {f'{name}.weight': layer for name, layer in quantizers.items() if not isinstance(layer, ActQ)}
    if not layers:
        raise UserError('the network is a full-precision one: pack a quantized checkpoint')
    if not is_calibrated(model):
        raise UserError('the network has no steps yet: pack a trained or calibrated checkpoint')
    lost = [name for name, quantizer in quantizers.items() if not torch.allclose(
        _quan_base.learned_scale(_quan_base.alpha_of(quantizer.scale)), quantizer.scale, rtol=1e-3)]
    if lost:
        raise UserError(f'the scales of {some(lost, 3)} would not come back from a file: alpha_of in _quan_base.py '
                        'has to undo learned_scale there')
    state = model.state_dict() | {f'{name}.alpha': quantizer.scale for name, quantizer in quantizers.items()}
    tensors = {name: pack_codes(layers[name].to_int().cpu(), bits) if name in layers else
               state[name].float().cpu().contiguous() for name, bits, *_ in packed_layout(model)}
    packed = PackedFile(
        info,
        {name: {'bits': layer.weight_bits, 'shape': list(layer.weight.shape)} for name, layer in layers.items()},
        {name: {'bits': act.bits, 'signed': act.signed_codes} for name, act in quantizers.items()
         if isinstance(act, ActQ)}, tensors)
    header = packed.about
    header[CHECKSUM] = _checksum(header, tensors)
    try:
        write_whole(path, lambda beside: safetensors.torch.save_file(tensors, beside, {ENTRY: _json(header)}))
    except (OSError, safetensors.SafetensorError) as error:
        raise UserError(f'{path} cannot be written ({" ".join(str(error).split())})') from error
    return packed


def is_packed(path: str | Path) -> bool:
    """Whether the file calls itself a packed file; damage is found by `read_packed`."""
    if not Path(path).is_file():  # opening a pipe would wait for a writer
        return False
    try:
        with safetensors.safe_open(path, 'pt') as file:
            return ENTRY in (file.metadata() or {})
    except (OSError, safetensors.SafetensorError):
        return False


def read_packed(path: str | Path) -> PackedFile:
    """A packed file, its checksum verified.

    Raises:
        UserError: it is missing, truncated, altered, not a packed file, or of a newer format.
    """
    check_file(path)
    try:
        with safetensors.safe_open(path, 'pt') as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}
    except Exception as error:  # safetensors raises its own, and others for a damaged header
        if reason := fault(error):
            raise UserError(f'{path} cannot be read ({reason})') from error
        raise UserError(f'{path}: truncated or damaged, or not a safetensors file (deploy.py pack makes one)'
                        ) from error
    if ENTRY not in metadata:
        raise UserError(f'{path}: not a packed Q-ViT file: make one with deploy.py pack')
    try:
        header = json.loads(metadata[ENTRY])
        version, checksum = header['format_version'], header.pop(CHECKSUM, None)
    except (AttributeError, KeyError, RecursionError, TypeError, ValueError) as error:
        raise UserError(f'{path}: altered, its description cannot be read') from error
    if isinstance(version, int) and version > FORMAT_VERSION:
        raise UserError(f'{path}: format version {shown(version)}, this code reads up to {FORMAT_VERSION}: update it')
    try:
        is_whole = checksum == _checksum(header, tensors)
    except (RuntimeError, TypeError):  # numbers of a type that no packed file has
        is_whole = False
    if not is_whole:
        raise UserError(f'{path}: altered, its checksum does not match: copy it or pack it again')
    info = ModelInfo.from_dict(header, str(path))
    _check_codes(path, header, tensors)
    _check_values(path, tensors)
    packed = PackedFile(info, header['weights'], header['activations'], tensors)
    network = check_described(info, packed.shapes(), str(path))
    if network is not None:
        _check_bits(path, packed, network)
    return packed


# --- a header against its tensors -------------------------------------------------------------------------------------


def _check_codes(path: str | Path, header: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    """Refuses a header that does not describe the codes and quantizers in the file."""
    weights, activations = header.get('weights'), header.get('activations')
    if not isinstance(weights, dict) or not isinstance(activations, dict):
        wrong = [key for key in ('weights', 'activations') if not isinstance(header.get(key), dict)]
    else:
        wrong = [name for name, code in weights.items() if not _fits(name, code, tensors)]
        wrong += [name for name, act in activations.items() if not _fits_activation(name, act, tensors)]
        wrong += [name for name, value in tensors.items() if name not in weights and value.dtype != torch.float32]
        wrong = wrong or [name for name, code in weights.items() if not _is_filled(tensors[name], code)]
    if wrong:
        raise _unfit(path, wrong)


def _check_values(path: str | Path, tensors: dict[str, Tensor]) -> None:
    """Refuses numbers that no network computes with. Every step is one that divides, as `write_packed` writes it."""
    values = {name: value for name, value in tensors.items() if value.is_floating_point()}
    damaged = [name for name, value in values.items() if not value.isfinite().all()]
    if damaged:
        raise UserError(f'{path}: NaN or infinite values in {some(damaged, 3)}: pack it again')
    damaged = [name for name, value in values.items() if name.endswith('.alpha') and not (value > 0).all()]
    if damaged:
        raise UserError(f'{path}: steps that are not positive in {some(damaged, 3)}: pack it again')


def _fits(name: str, code: Any, tensors: dict[str, Tensor]) -> bool:
    """Whether the description of a weight's codes is one of the stream of that name, and there is a scale for each of
    its output channels."""
    stream, scale = tensors.get(name), tensors.get(f'{name.removesuffix("weight")}alpha')
    if stream is None or scale is None or not isinstance(code, dict) or not isinstance(code.get('shape'), list):
        return False
    numbers = [code.get('bits'), *code['shape']]
    return (len(numbers) in (3, 5) and all(type(number) is int and number > 0 for number in numbers)
            and 2 <= code['bits'] <= 8 and stream.dtype == torch.uint8
            and list(stream.shape) == [-(-math.prod(numbers) // 8)] and list(scale.shape) == code['shape'][:1])


def _is_filled(stream: Tensor, code: dict[str, Any]) -> bool:
    """Whether the bits behind the last code, up to the end of its byte, are 0 as `pack_codes` leaves them."""
    used = math.prod([code['bits'], *code['shape']]) % 8
    return used == 0 or int(stream[-1]) >> used == 0


def _fits_activation(name: str, act: Any, tensors: dict[str, Tensor]) -> bool:
    scale, zero_point = tensors.get(f'{name}.alpha'), tensors.get(f'{name}.zero_point')
    return (isinstance(act, dict) and type(act.get('bits')) is int and 2 <= act['bits'] <= 8
            and type(act.get('signed')) is bool and scale is not None and zero_point is not None
            and scale.ndim == 1 and scale.shape == zero_point.shape)


def _check_bits(path: str | Path, packed: PackedFile, network: nn.Module) -> None:
    """Refuses codes of other bits than the network's quantizers have: these would quantize the values once more."""
    quantizers = dict(named_quantizers(network))
    bits = {name if isinstance(layer, ActQ) else f'{name}.weight':
            layer.bits if isinstance(layer, ActQ) else layer.weight_bits for name, layer in quantizers.items()}
    described = {name: entry['bits'] for name, entry in (packed.weights | packed.activations).items()}
    wrong = [name for name in bits.keys() | described.keys() if bits.get(name) != described.get(name)]
    if wrong:
        raise _unfit(path, sorted(wrong))


def _unfit(path: str | Path, names: list[str]) -> UserError:
    return UserError(f'{path}: its description does not fit, see {some(names, 3)}: pack it again')
