"""Packed files: a quantized network in the bytes that its bit-widths say, and nothing but what its forward needs.

A packed file is a safetensors file. Weight codes of b bits lie in a stream of b bits each, low bits first (3-bit codes
take 3 bits, not 4); steps, zero points, biases, LayerNorms, embeddings are float32. The header's `qvit_packed` entry, a
JSON object, says what network it is, and of every coded weight its bits and shape; its `sha256` is the checksum of all
the rest. The same network always gives the same bytes.
"""
from __future__ import annotations

import hashlib
import json
import math
import os
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import safetensors
import safetensors.torch
import timm
import torch
import torch.nn as nn
from torch import Tensor

from _quan_base import ActQ, code_range, is_calibrated, min_scale, named_quantizers
from checkpoints.networks import load_quantized
from utils import UserError

__all__ = ['PackedFile', 'Stored', 'is_packed', 'pack_codes', 'packed_layout', 'read_packed', 'unpack_codes',
           'write_packed']

FORMAT_VERSION = 1
ENTRY, CHECKSUM = 'qvit_packed', 'sha256'
_NEED = {'format_version': int, 'model': str, 'kwargs': dict, 'num_classes': int, 'input_size': int, 'weights': dict,
         'activations': dict}


class Stored(NamedTuple):
    """One tensor of a packed file: its bits per value, shape, and bytes."""
    name: str
    bits: int
    shape: tuple[int, ...]
    bytes: int


class PackedFile(NamedTuple):
    """What a packed file holds: `about`, its description, and the stored tensors, coded ones still packed (uint8)."""
    about: dict[str, Any]
    tensors: dict[str, Tensor]

    def network(self) -> nn.Module:
        """The fake-quantized network, in evaluation mode. Import the module that registers it first.

        Raises:
            UserError: the file does not fit the network that it names.
        """
        about = self.about
        if not timm.is_model(about['model']):  # nor a name by which timm would look on the network
            raise UserError(f"the packed file's network {about['model']} is unknown: update this code")
        try:
            model = timm.create_model(about['model'], num_classes=about['num_classes'], img_size=about['input_size'],
                                      **about['kwargs'])
        except (RuntimeError, TypeError, ValueError) as error:
            raise UserError(f"the packed file's network {about['model']} cannot be built "
                            f'({" ".join(str(error).split())})') from error
        state = {name: value for name, value in self.tensors.items() if name not in about['weights']}
        for name, code in about['weights'].items():
            layer = name.removesuffix('.weight')
            shape = torch.Size(code['shape'])
            codes = unpack_codes(self.tensors[name], code['bits'], shape.numel()).view(shape)
            step = state[f'{layer}.alpha'].clamp_min(min_scale(torch.float32))  # as in use
            state[name] = codes.to(step.dtype) * step.view(-1, *[1] * (len(shape) - 1))
        for name, activation in about['activations'].items():
            state[f'{name}.signed'] = torch.full((1,), float(activation['signed']))
        for name, value in model.state_dict().items():
            if name.endswith('.init_state'):
                state[name] = torch.ones_like(value)
        load_quantized(model, {'model': state})
        return model.eval()

    def stored(self) -> list[Stored]:
        """Every tensor, in the file's order."""
        weights = self.about['weights']
        return [Stored(name, weights[name]['bits'], tuple(weights[name]['shape']), value.nbytes) if name in weights else
                Stored(name, 8 * value.element_size(), tuple(value.shape), value.nbytes)
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


def _json(about: dict[str, Any]) -> str:
    return json.dumps(about, separators=(',', ':'))


def _checksum(about: dict[str, Any], tensors: dict[str, Tensor]) -> str:
    digest = hashlib.sha256(_json(about).encode())
    for name in sorted(tensors):
        value = tensors[name]
        digest.update(f'{name} {value.dtype} {list(value.shape)}'.encode())
        digest.update(value.flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def write_packed(model: nn.Module, about: dict[str, Any], path: str | Path) -> PackedFile:
    """Writes the packed file of a calibrated network, whole or not at all.

    Args:
        model: the network, on any device.
        about: model, kwargs, num_classes, input_size (as `checkpoints.description` gives them), classes, data_set.
        path: of the file, by convention *.qvit.safetensors.

    Raises:
        UserError: the network is not quantized or not calibrated, or the file cannot be written.
    """
    layers = {name: layer for name, layer in named_quantizers(model) if not isinstance(layer, ActQ)}
    if not layers:
        raise UserError('the network is a full-precision one: pack a quantized checkpoint')
    if not is_calibrated(model):
        raise UserError('the network has no steps yet: pack a trained or calibrated checkpoint')
    state, tensors = model.state_dict(), {}
    for name, bits, *_ in packed_layout(model):
        layer = layers.get(name.removesuffix('.weight')) if name.endswith('.weight') else None
        tensors[name] = state[name].float().cpu().contiguous() if layer is None else pack_codes(
            layer.to_int().cpu(), bits)
    about = {**about, 'format_version': FORMAT_VERSION,
             'weights': {f'{name}.weight': {'bits': layer.weight_bits, 'shape': list(layer.weight.shape)}
                         for name, layer in layers.items()},
             'activations': {name: {'bits': act.bits, 'signed': act.signed_codes}
                             for name, act in named_quantizers(model) if isinstance(act, ActQ)}}
    checksum, path = _checksum(about, tensors), Path(path)
    beside = path.with_name(f'.{path.name}.{os.getpid()}')
    try:
        safetensors.torch.save_file(tensors, beside, {ENTRY: _json(about | {CHECKSUM: checksum})})
        os.replace(beside, path)
    except (OSError, safetensors.SafetensorError) as error:
        raise UserError(f'{path} cannot be written ({" ".join(str(error).split())})') from error
    finally:
        beside.unlink(missing_ok=True)
    return PackedFile(about, tensors)


def is_packed(path: str | Path) -> bool:
    """Whether the file calls itself a packed file; damage is found by `read_packed`."""
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
    if not Path(path).is_file():
        raise UserError(f'{path}: no such file')
    try:
        with safetensors.safe_open(path, 'pt') as file:
            header = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}
    except Exception as error:  # safetensors raises its own, and others for a damaged header
        raise UserError(f'{path}: truncated or damaged, or not a safetensors file') from error
    if ENTRY not in header:
        raise UserError(f'{path}: not a packed Q-ViT file: make one with deploy.py pack')
    try:
        about = json.loads(header[ENTRY])
        version, checksum = about['format_version'], about.pop(CHECKSUM, None)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise UserError(f'{path}: altered, its description cannot be read') from error
    if isinstance(version, int) and version > FORMAT_VERSION:
        raise UserError(f'{path}: format version {version}, this code reads up to {FORMAT_VERSION}: update it')
    if checksum != _checksum(about, tensors):
        raise UserError(f'{path}: altered, its checksum does not match: copy it or pack it again')
    _check_description(path, about, tensors)
    return PackedFile(about, tensors)


def _check_description(path: str | Path, about: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    wrong = [key for key, kind in _NEED.items() if not isinstance(about.get(key), kind)]
    if not wrong:
        wrong = [name for name, code in about['weights'].items() if not _fits(code, tensors.get(name))]
        wrong += [name for name, act in about['activations'].items()
                  if not (isinstance(act, dict) and isinstance(act.get('signed'), bool))]
        wrong += [name for name in about['weights'] if f'{name.removesuffix("weight")}alpha' not in tensors]
    if wrong:
        raise UserError(f'{path}: its description does not fit, see {", ".join(wrong[:3])}: pack it again')


def _fits(code: Any, stream: Tensor | None) -> bool:
    """Whether the description of a weight's codes is one of this very stream."""
    try:
        numbers = [code['bits'], *code['shape']]
        return (all(type(number) is int and number > 0 for number in numbers) and 2 <= code['bits'] <= 8
                and stream.dtype == torch.uint8 and len(stream) == -(-math.prod(numbers) // 8))
    except (AttributeError, KeyError, TypeError):
        return False
