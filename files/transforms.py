"""From an image to what networks take: the augmentation of training, the crop of evaluation, the normalization."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from PIL import Image
from timm.data import auto_augment, create_transform
from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torchvision import transforms

from utils import UserError

__all__ = ['IMAGENET', 'Augmentation', 'Normalization', 'build_transform', 'normalization', 'normalized']

_BICUBIC = transforms.InterpolationMode.BICUBIC
# Up to this size images are taken whole: such data sets (CIFAR) have nothing to spare around the object.
_SMALL = 32
_LUMA = (0.299, 0.587, 0.114)  # how much of a grey level each colour makes, as Pillow converts


def _posterize(image: Image.Image, bits_to_keep: int, **_: Any) -> Image.Image:
    """timm's operation, which Pillow 13 refuses for the 0 bits that RandAugment's noise can ask for: those give black.
    """
    return auto_augment.posterize(image, bits_to_keep) if bits_to_keep > 0 else Image.new(image.mode, image.size)


auto_augment.NAME_TO_OP.update(Posterize=_posterize, PosterizeIncreasing=_posterize, PosterizeOriginal=_posterize)


# --- normalization ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Normalization:
    """Mean and standard deviation of pixels from 0 to 1: of each colour, or one of each for grey images."""
    mean: tuple[float, ...] = IMAGENET_DEFAULT_MEAN
    std: tuple[float, ...] = IMAGENET_DEFAULT_STD

    @property
    def in_chans(self) -> int:
        """Channels of the normalized image: 3, or 1 for grey."""
        return len(self.mean)


IMAGENET = Normalization()


def normalization(mean: Sequence[float] | None = None, std: Sequence[float] | None = None, in_chans: int = 3,
                  ) -> Normalization:
    """The normalization for a network of `in_chans` channels.

    Args:
        mean, std: one value, which serves every channel, or one a channel; None for ImageNet's, whose colours are
            weighted for grey images as a grey level weights them.

    Raises:
        UserError: there are no images of so many channels, or another number of values.
    """
    if in_chans not in (1, 3):
        raise UserError(f'the network takes {in_chans} channels: images have 3, or 1 where they are made grey')
    values = []
    for flag, given, imagenet in (('--mean', mean, IMAGENET_DEFAULT_MEAN), ('--std', std, IMAGENET_DEFAULT_STD)):
        if given is None:
            grey = round(sum(weight * value for weight, value in zip(_LUMA, imagenet, strict=True)), 4)
            values.append(imagenet if in_chans == 3 else (grey,))
        elif len(given) not in (1, in_chans):
            raise UserError(f'{flag} {" ".join(map(str, given))}: choose one value'
                            + (', or one for each of 3 colours' if in_chans == 3 else ', images are grey'))
        else:
            values.append(tuple(given) * (in_chans // len(given)))
    return Normalization(*values)


def normalized(by: Normalization = IMAGENET) -> list[Callable]:
    """The last transforms of all: they turn a PIL image into the normalized tensor that networks take."""
    grey = [transforms.Grayscale()] if by.in_chans == 1 else []
    return [*grey, transforms.ToTensor(), transforms.Normalize(by.mean, by.std)]


# --- transforms -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Augmentation:
    """The random augmentation of training, DeiT's unless told otherwise; timm's `create_transform` explains the values.

    Attributes:
        aa: timm's name of a policy; 'none', '' or None for colour jitter instead of a policy.
        train_interpolation: 'random', 'bilinear' or 'bicubic'.
        random_resized_crop: False takes the fixed crop of evaluation.
        reprob, remode, recount: how likely an image has parts erased, with what they are filled, and how many.
    """
    color_jitter: float = 0.4
    aa: str | None = 'rand-m9-mstd0.5-inc1'
    train_interpolation: str = 'bicubic'
    random_resized_crop: bool = True
    reprob: float = 0.25
    remode: str = 'pixel'
    recount: int = 1


def _fixed_crop(size: int, ratio: float) -> list[Callable]:
    """The crop of evaluation: the middle of the resized image, or all of it for small sizes."""
    resized = size if size <= _SMALL else int(size / ratio)
    return [transforms.Resize(resized, interpolation=_BICUBIC), transforms.CenterCrop(size)]


def _digits_transform(is_train: bool, size: int, by: Normalization) -> transforms.Compose:
    """Digits change their meaning by flips and by strong augmentation, so training only moves them a little."""
    moved = transforms.RandomAffine(
        degrees=8, translate=(0.08, 0.08), scale=(0.92, 1.08), interpolation=transforms.InterpolationMode.BILINEAR
    )
    resized = transforms.Resize((size, size), interpolation=_BICUBIC)
    return transforms.Compose([resized, *([moved] if is_train else []), *normalized(by)])


def build_transform(is_train: bool, input_size: int, data_set: str = 'IMNET', *,
                    augmentation: Augmentation = Augmentation(), eval_crop_ratio: float = 0.875,
                    normalization: Normalization = IMAGENET) -> transforms.Compose:
    """The transform from an RGB image of PIL to a normalized float tensor of shape (C, input_size, input_size).

    Args:
        is_train: with the random augmentations of training.
        data_set: a name of `datasets.DATASETS`; DIGITS has augmentations of its own.
        eval_crop_ratio: share of the resized image's side that the fixed crop takes.
        normalization: of the tensor; its number of channels is C.

    Raises:
        UserError: an unknown interpolation, erasing mode or augmentation policy.
    """
    if data_set == 'DIGITS':
        return _digits_transform(is_train, input_size, normalization)
    fixed_crop = _fixed_crop(input_size, eval_crop_ratio)
    if not is_train:
        return transforms.Compose([*fixed_crop, *normalized(normalization)])

    transform = _augmented(input_size, augmentation, normalization)
    # The first of timm's transforms is its RandomResizedCrop.
    if not augmentation.random_resized_crop:
        transform.transforms[:1] = fixed_crop
    elif input_size <= _SMALL:
        whole = transforms.Resize(input_size, interpolation=_BICUBIC)
        transform.transforms[:1] = [whole, transforms.RandomCrop(input_size, padding=4)]
    return transform


def _augmented(input_size: int, augmentation: Augmentation, by: Normalization) -> transforms.Compose:
    """timm's transform of training, beginning with RandomResizedCrop.

    Augmentation is that of RGB images, grey ones are made at the end: timm fills with the mean colour, for one.
    """
    interpolation, remode, aa = augmentation.train_interpolation, augmentation.remode, augmentation.aa
    if interpolation not in ('random', 'bilinear', 'bicubic'):
        raise UserError(f'--train-interpolation {interpolation!r}: choose random, bilinear or bicubic')
    if remode not in ('const', 'rand', 'pixel'):
        raise UserError(f'--remode {remode!r}: choose const, rand or pixel')
    colours = 3 // by.in_chans
    try:
        transform = create_transform(
            input_size=input_size, is_training=True, color_jitter=augmentation.color_jitter,
            auto_augment=None if aa in (None, '', 'none') else aa, interpolation=interpolation,
            re_prob=augmentation.reprob, re_mode=remode, re_count=augmentation.recount, mean=by.mean * colours,
            std=by.std * colours)
    except (AssertionError, IndexError, KeyError, ValueError) as error:
        raise UserError(f"--aa {aa!r} is not a policy: choose e.g. 'rand-m9-mstd0.5-inc1' or 'none'") from error
    if by.in_chans == 1:
        steps = transform.transforms
        last = next(number for number, step in enumerate(steps) if isinstance(step, transforms.Normalize))
        steps[last - 1:last + 1] = normalized(by)  # in place of those that make the tensor and normalize it
    return transform
