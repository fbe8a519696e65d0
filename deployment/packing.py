"""Packs a checkpoint, and says what is in a packed file: its bytes by kind, and its tensors one by one."""
from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from checkpoints.packed import PackedFile, is_packed, read_packed, unpack_codes, write_packed
from deployment.predictor import open_quantized
from utils import UserError

__all__ = ['PARTS', 'bytes_by_part', 'inspect', 'inspection_text', 'pack', 'tensor_rows']

SUFFIX = '.safetensors'
PARTS = ('weight codes', 'steps and zero points', 'biases', 'norms', 'embeddings', 'header')


def pack(path: str, model: str | None = None, output: Path | None = None) -> str:
    """Writes the packed file of a checkpoint, and returns what is to be said of its size.

    Args:
        path: of the checkpoint.
        model: the network, where the checkpoint does not say it.
        output: the packed file; by default that of the checkpoint's name, ending in .qvit.safetensors.

    Raises:
        UserError: the checkpoint holds no quantized network, or a name does not fit.
    """
    if is_packed(path):
        raise UserError(f'{path} is packed already')
    output = output or Path(path).with_suffix(f'.qvit{SUFFIX}')
    if output.suffix != SUFFIX:
        raise UserError(f'--output {output}: choose a name that ends in {SUFFIX}')
    info, network, _ = open_quantized(path, model)
    packed = write_packed(network, info, output)
    # The whole `model` entry of the checkpoint counts, with the scales, which the packed file has in float32, too.
    full, size = sum(4 * value.numel() for value in network.state_dict().values()), os.path.getsize(output)
    return (f'{output}: {size / 1e6:.2f} MB, {full / size:.2f} times smaller than the {full / 1e6:.2f} MB of float32 '
            f'in {path}\n{_parts_table(bytes_by_part(packed, size))}')


def inspect(path: str) -> dict[str, Any]:
    """What is in a packed file, in plain values: its description, its bytes by part, activations and tensors."""
    packed, size = read_packed(path), os.path.getsize(path)
    return {'file': path, 'bytes': size, 'description': packed.info.to_dict(), 'parts': bytes_by_part(packed, size),
            'activations': packed.activations, 'tensors': tensor_rows(packed, size)}


# --- parts and tensors ------------------------------------------------------------------------------------------------


def _part_of(name: str, coded: bool) -> str:
    """Which of `PARTS` a tensor belongs to."""
    *path, leaf = name.split('.')
    if coded:
        return 'weight codes'
    if leaf in ('alpha', 'zero_point'):
        return 'steps and zero points'
    if any(module.startswith('norm') for module in path):
        return 'norms'
    return 'biases' if leaf == 'bias' else 'embeddings'


def bytes_by_part(packed: PackedFile, size: int) -> dict[str, int]:
    """The bytes of each of `PARTS`; they add up to the file's `size`."""
    parts = dict.fromkeys(PARTS, 0)
    for stored in packed.stored():
        parts[_part_of(stored.name, stored.name in packed.weights)] += stored.bytes
    parts['header'] = size - sum(parts.values())
    return parts


def tensor_rows(packed: PackedFile, size: int) -> list[dict[str, Any]]:
    """A row for every tensor: its name, part, bits, shape, bytes, share of the file's `size`, and range of values.

    `min` and `max` are those of the integer codes where the tensor is coded, and None where it is empty.
    """
    rows = []
    for stored in packed.stored():
        values, coded = packed.tensors[stored.name], stored.name in packed.weights
        if coded:
            values = unpack_codes(values, stored.bits, torch.Size(stored.shape).numel())
        low, high = (values.min().item(), values.max().item()) if values.numel() else (None, None)
        rows.append({'name': stored.name, 'part': _part_of(stored.name, coded), 'bits': stored.bits,
                     'shape': list(stored.shape), 'bytes': stored.bytes, 'share': stored.bytes / size,
                     'min': low, 'max': high})
    return rows


# --- as text ----------------------------------------------------------------------------------------------------------


def inspection_text(found: dict[str, Any]) -> str:
    """What `inspect` found, for people to read."""
    network = found['description']
    options = ', '.join(f'{key}={value}' for key, value in network['kwargs'].items())
    return (f'{found["file"]}: {found["bytes"]:,} bytes\n{network["model"]}' + (f' with {options}' if options else '')
            + f', {network["num_classes"]} classes, {network["input_size"]} px, '
            f'data set {network.get("data_set") or "not named"}\n\n{_tensor_table(found["tensors"])}\n\n'
            f'{_parts_table(found["parts"])}')


def _parts_table(parts: dict[str, int]) -> str:
    """A line for each of `bytes_by_part`, with its share."""
    total = sum(parts.values())
    return '\n'.join(f'  {name:22}{size:12,} bytes {100 * size / total:5.1f} %' for name, size in parts.items())


def _tensor_table(rows: Sequence[dict[str, Any]]) -> str:
    """A head and a line for each of `tensor_rows`."""
    width = max(len(row['name']) for row in rows)
    lines = [f'{"tensor":{width}}  bits  {"shape":>18}  {"bytes":>9}  share  range of values, or of codes']
    for row in rows:
        ends = 'empty' if row['min'] is None else f'{row["min"]:.4g} to {row["max"]:.4g}'
        lines.append(f'{row["name"]:{width}}  {row["bits"]:4}  {" x ".join(map(str, row["shape"])):>18}  '
                     f'{row["bytes"]:9,}  {100 * row["share"]:4.1f}%  {ends}')
    return '\n'.join(lines)
