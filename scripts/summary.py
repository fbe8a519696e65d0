"""Sums up runs: accuracy, bits, and the bytes that the weights take, in float32 and as codes.

    python scripts/summary.py OUTPUT_DIR [OUTPUT_DIR ...]
"""
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import quant_vision_transformer  # noqa: E402, F401  registers the variants
from _quan_base import LinearQ, named_quantizers  # noqa: E402
from checkpoints.networks import open_network  # noqa: E402


def summary(folder: Path) -> str:
    info, model, checkpoint = open_network(folder / 'best_checkpoint.pth')
    parameters = sum(parameter.numel() for parameter in model.parameters())
    layers = [module for _, module in named_quantizers(model) if hasattr(module, 'weight_bits')]
    text = f'{info.model}: {checkpoint["max_accuracy"]:.2f} % top-1'
    if layers:
        block = next(layer for name, layer in model.named_modules() if isinstance(layer, LinearQ) and 'blocks' in name)
        text += f', {block.weight_bits}-bit weights and {block.act.bits}-bit activations'
    text += f', {parameters / 1e6:.2f} M parameters, {parameters * 4e-6:.1f} MB in float32'
    if layers:
        coded = sum(layer.weight.numel() for layer in layers)
        code_bits = sum(layer.weight.numel() * layer.weight_bits for layer in layers)
        text += f', {(code_bits + 32 * (parameters - coded)) / 8e6:.1f} MB in theory with its weights as codes'
    return f'{text}\n    {folder}/best_checkpoint.pth, {folder}/log.txt, tensorboard --logdir {folder}'


if __name__ == '__main__':
    torch.set_num_threads(1)
    print('\n'.join(['== summary', *(summary(Path(folder)) for folder in sys.argv[1:])]))
