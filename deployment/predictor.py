"""From a file to predictions: quantized networks in integer arithmetic or simulated, and classes by name."""
from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from PIL import Image
from timm.data import ImageNetInfo
from torch import Tensor, nn

from checkpoints.networks import ModelInfo, OpenedNetwork, open_network
from deployment.integer import IntegerNetwork, IntegerViT
from deployment.integer_swin import IntegerSwin
from files.images import load_image
from files.paths import fault
from models import is_quantized
from quant_swin_transformer import QSwinTransformer
from quant_vision_transformer import SIZES, QVisionTransformer
from utils import UserError, printable

__all__ = ['ARITHMETICS', 'BACKENDS', 'TERMS', 'Predictor', 'add_arguments', 'build_predictor', 'class_names',
           'integer_network', 'likeliest', 'open_quantized', 'read_picture']

Predictor = Callable[[Tensor], Tensor]  # images (B, 3, H, W) -> logits (B, classes)
TERMS = {'int8': 1, 'int8x2': 2}        # of a folded weight, by the name of the arithmetic
ARITHMETICS = (*TERMS, 'float')
BACKENDS = ('auto', 'native', 'torch')


def open_quantized(path: str | Path, model: str | None = None) -> OpenedNetwork:
    """Opens a packed file or a checkpoint as `open_network` does, and refuses networks that are not quantized."""
    opened = open_network(path, model)
    if not is_quantized(opened.model):
        size = next((size for size in SIZES if f'_{size}_' in opened.info.model), 'tiny')
        raise UserError(f'{path} holds {opened.info.model}, which is of full precision: quantize it first, as with '
                        f'python main.py --eval --finetune {path} --model fourbits_deit_{size}_patch16_224 --data-path '
                        'DIR --output_dir out, and take out/calibrated.pth')
    return opened


def add_arguments(add: Callable[..., argparse.Action]) -> None:
    """Adds the flags that say how `build_predictor` is to compute."""
    add('--arithmetic', default='int8', choices=ARITHMETICS,
        help='int8: integer products, steps per channel folded into 8-bit weights; int8x2: into two 8-bit terms, twice '
             'the work, nearly exact; float: simulated in float32, exact (default: %(default)s)')
    add('--backend', default='auto', choices=BACKENDS,
        help='native: compiled kernels, torch: plain PyTorch, auto: the former where they can be compiled '
             '(default: %(default)s)')
    add('--device', default='cpu', help='cuda: plain PyTorch there (default: %(default)s)')


def integer_network(model: QVisionTransformer | QSwinTransformer, terms: int = 1) -> IntegerNetwork:
    """The network in integer arithmetic; UserError: see `IntegerViT`."""
    return (IntegerSwin if isinstance(model, QSwinTransformer) else IntegerViT)(model, terms)


def build_predictor(model: nn.Module, arithmetic: str = 'int8', backend: str = 'auto', device: str = 'cpu',
                    ) -> Predictor:
    """Makes what predicts from images.

    Args:
        model: a calibrated network in evaluation mode. One of full precision computes in float32, which is said.
        arithmetic: 'int8' or 'int8x2', integers with one or two 8-bit terms of a folded weight; 'float' simulates the
            network in float32.
        backend: 'native' for the compiled kernels, 'torch' for plain PyTorch, 'auto' for the former where there are
            any; it says why in a line where there are none.
        device: torch's name of it; the kernels are for 'cpu'.

    Raises:
        UserError: the device or the backend cannot be used, or not for this network.
    """
    try:
        model = model.to(device)
    except (AssertionError, RuntimeError) as error:
        raise UserError(f'--device {device} cannot be used ({" ".join(str(error).split())[:100]})') from error
    if backend == 'native' and (arithmetic == 'float' or device != 'cpu'):
        raise UserError('--backend native is for integers on the CPU: choose --arithmetic int8 or int8x2, no --device')
    if not is_quantized(model):
        if backend == 'native':
            raise UserError('--backend native is for integers, the network is of full precision: leave it out')
        print('a network of full precision: computed in float32')
        return model
    if arithmetic == 'float':
        return model
    network = integer_network(model, TERMS[arithmetic])
    if backend == 'torch':
        return network
    from deployment import native  # only these two backends need it, and a compiler

    if backend == 'auto':
        return native.fastest(network)
    try:
        return native.NativeViT(network)
    except native.NativeUnavailable as error:
        raise UserError(f'--backend native: {error}') from error


def class_names(info: ModelInfo) -> list[str]:
    """A readable name of each class: timm knows those of ImageNet, the file may name others, or they are numbered."""
    imagenet, classes = ImageNetInfo(), info.classes
    if classes is None and info.num_classes == imagenet.num_classes():
        classes = imagenet.label_names()
    classes = classes or [f'class {index}' for index in range(info.num_classes)]
    known = set(imagenet.label_names())
    return [f'{imagenet.label_name_to_description(name)} ({name})' if name in known else printable(name)
            for name in classes]


def read_picture(path: str | Path) -> Image.Image:
    """Reads an image file as RGB.

    Raises:
        UserError: it cannot be decoded.
    """
    try:
        return load_image(path)
    except UserError:
        raise
    except Exception as error:  # decoders raise nearly anything on a damaged file
        if reason := fault(error):
            raise UserError(f'{path} cannot be read ({reason})') from error
        raise UserError(f'{path} is not a readable image ({type(error).__name__})') from error


@torch.no_grad()
def likeliest(predict: Predictor, image: Tensor, names: Sequence[str], top: int) -> list[tuple[float, str]]:
    """The `top` classes of an image (3, H, W) with the highest probabilities, as (probability, name), best first."""
    probabilities = predict(image[None])[0].softmax(-1).cpu()
    best = probabilities.topk(min(top, len(names)))
    return [(probability, names[label]) for probability, label in zip(*map(Tensor.tolist, best), strict=True)]
