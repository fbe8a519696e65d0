"""The networks of a run, built from its flags: student, teacher, criterion."""

import inspect
import itertools
from argparse import Namespace
from typing import Any

import timm
import torch
import torch.distributed as dist
from timm.loss import LabelSmoothingCrossEntropy, SoftTargetCrossEntropy
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from _quan_base import calibrate, is_calibrated
from calibration.closed_form import calibrate_to_full_precision
from checkpoints.files import read_checkpoint
from checkpoints.full_precision import load_full_precision
from checkpoints.networks import create_from_checkpoint, load_quantized
from datasets import SeededSamples, build_transform
from losses import DistillationLoss, check_dgd_compatible
from models import Teacher
from quant_vision_transformer import QVisionTransformer
from samplers import ResumableSampler
from training.data import mixes
from utils import UserError

# --- networks ---------------------------------------------------------------------------------------------------------


def _create(flag: str, name: str, num_classes: int, input_size: int, drop: float = 0., **kwargs: Any) -> nn.Module:
    """A network of timm's registry, for images of (input_size, input_size)."""
    of_transformer = {'pos_drop_rate': drop, 'proj_drop_rate': drop} if drop else {}
    try:
        try:
            return timm.create_model(name, img_size=input_size, num_classes=num_classes, **of_transformer, **kwargs)
        except TypeError as error:
            if "'img_size'" not in str(error):
                raise
            # Not a vision transformer: its weights do not depend on the image size.
            return timm.create_model(name, num_classes=num_classes, drop_rate=drop, **kwargs)
    except (ArithmeticError, AssertionError, RuntimeError, TypeError, ValueError) as error:
        reason = ' '.join(str(error).split())
        raise UserError(f'{flag} {name} cannot be built ({reason}): correct its options or --input-size') from error


def build_student(args: Namespace, num_classes: int) -> nn.Module:
    """The network that `--model` and `--model-kwargs` name, not yet calibrated."""
    student = _create('--model', args.model, num_classes, args.input_size, args.drop,
                      **({'drop_path_rate': args.drop_path} | args.model_kwargs))
    if hasattr(student, 'set_distilled_training'):  # timm's distilled networks return the mean of their heads otherwise
        student.set_distilled_training(True)
    return student


CALIBRATIONS = ('published', 'mse')


def calibrate_student(args: Namespace, student: nn.Module, dataset: SeededSamples,
                      sampler: ResumableSampler | None = None) -> None:
    """Gives the quantizers their steps in the way that --calibration names, alike on all ranks.

    Args:
        student: on its device, with the weights to start from.
        dataset: the training part.
        sampler: that of this rank's batches, the first of which the published calibration takes; without it, and for
            the others, the images are drawn from the seed and transformed as in evaluation.
    """
    name = args.calibration or ('mse' if args.finetune else 'published')
    if name == 'published' and sampler is not None:
        images = [dataset[index][0] for index in itertools.islice(sampler, args.batch_size)]
    else:
        augmented, dataset.base.transform = dataset.base.transform, build_transform(False, args)
        drawn = torch.randperm(len(dataset), generator=torch.Generator().manual_seed(args.seed))
        images = [dataset[index][0] for index in drawn[:args.calibration_images].tolist()]
        dataset.base.transform = augmented
    images = torch.stack(images).to(next(student.parameters()).device)
    if args.calibration is None:
        print(f'--calibration {name}: {len(images)} images')
    (calibrate if name == 'published' else calibrate_to_full_precision)(student, images)


def build_teacher(args: Namespace, num_classes: int) -> nn.Module | None:
    """The network that `--teacher-model` and `--teacher-path` name; None if nothing is learned from one.

    Raises:
        UserError: its weights cannot be had, or it is for other images or classes.
    """
    if args.distillation_type == 'none' and not args.dgd_weight and not args.token_weight or args.soft_labels:
        return None
    teacher = _teacher_from_file(args, num_classes) if args.teacher_path else _pretrained_teacher(args, num_classes)
    if not is_calibrated(teacher):
        raise UserError(f'--teacher-model {args.teacher_model} is quantized and not calibrated: choose a '
                        'full-precision one')
    return teacher


def _check_classes(args: Namespace, teacher_classes: int, num_classes: int) -> None:
    if teacher_classes != num_classes:
        raise UserError(f'the teacher {args.teacher_path or args.teacher_model} has {teacher_classes} classes, '
                        f'{args.data_set} has {num_classes}: choose a teacher of this data set')


def _teacher_from_file(args: Namespace, num_classes: int) -> nn.Module:
    checkpoint = read_checkpoint(args.teacher_path)
    about = checkpoint.get('qvit')
    if about is not None:  # the file describes its network
        if args.teacher_model not in (None, about['model']):
            raise UserError(f'--teacher-model {args.teacher_model}, but {args.teacher_path} is of {about["model"]}: '
                            'leave the flag out')
        if about['input_size'] != args.input_size:
            raise UserError(f'the teacher {args.teacher_path} is for --input-size {about["input_size"]}, '
                            f'not {args.input_size}')
        _check_classes(args, about['num_classes'], num_classes)
        return create_from_checkpoint(checkpoint)
    if args.teacher_model is None:
        raise UserError(f'--teacher-path {args.teacher_path} does not say which network it holds: name it with '
                        '--teacher-model')
    teacher = _create('--teacher-model', args.teacher_model, num_classes, args.input_size)
    head = checkpoint.get('model', checkpoint).get('head.weight')
    if head is not None:
        _check_classes(args, len(head), num_classes)
    if isinstance(teacher, QVisionTransformer):
        load_quantized(teacher, checkpoint)
        return teacher
    for note in load_full_precision(teacher, checkpoint):
        print(f'teacher: {note}')
    return teacher


def _pretrained_teacher(args: Namespace, num_classes: int) -> nn.Module:
    published = timm.get_pretrained_cfg(args.teacher_model)
    if published is None or not published.has_weights:
        raise UserError(f'--teacher-model {args.teacher_model} has no published weights: give its checkpoint with '
                        '--teacher-path')
    _check_classes(args, published.num_classes, num_classes)
    try:
        return _create('--teacher-model', args.teacher_model, num_classes, args.input_size, pretrained=True)
    except UserError:
        raise
    except Exception as error:  # whatever the hub's and the network's libraries raise where there is no connection
        raise UserError(f'the weights of --teacher-model {args.teacher_model} cannot be downloaded '
                        f'({type(error).__name__}): give them with --teacher-path') from error


def build_criterion(args: Namespace, student: nn.Module, teacher: nn.Module | None) -> DistillationLoss:
    """The training loss. Says whether DGD is part of it where --dgd-weight leaves that open.

    Raises:
        UserError: DGD was asked for, but the attention of the two networks cannot be compared.
    """
    weight = args.dgd_weight or 0.
    if teacher is not None and args.dgd_weight != 0:
        reason = None if isinstance(student, QVisionTransformer) else f'student {args.model} is not quantized'
        reason = reason or check_dgd_compatible(student, teacher)
        if args.dgd_weight is None:
            weight = 0. if reason else 1.
            print(f'--dgd-weight {weight:g}: ' + (reason or 'the layers and heads of the teacher match'))
        elif reason:
            raise UserError(f'--dgd-weight {weight:g} cannot be used, {reason}: pass --dgd-weight 0')
    if mixes(args):
        base = SoftTargetCrossEntropy()
    else:
        base = LabelSmoothingCrossEntropy(args.smoothing) if args.smoothing else nn.CrossEntropyLoss()
    if args.token_weight:
        blocks = [[getattr(net, 'embed_dim', None)] * len(getattr(net, 'blocks', [])) for net in (student, teacher)]
        if not blocks[0] or blocks[0] != blocks[1]:
            raise UserError(f'--token-weight {args.token_weight}: the teacher differs from the student in depth or '
                            'width, pass 0 or choose another teacher')
    wrapped = None if teacher is None else Teacher(teacher, return_qk=weight > 0, keep_tokens=args.token_weight > 0)
    return DistillationLoss(base, wrapped, args.distillation_type, args.distillation_alpha, args.distillation_tau,
                            weight, getattr(student, 'num_prefix_tokens', 1), args.token_weight, student,
                            stored_labels=bool(args.soft_labels))


def wrap(args: Namespace, model: nn.Module, device: torch.device) -> nn.Module:
    """What to call in training: the model, compiled if asked for, within DistributedDataParallel if there are ranks."""
    if args.compile:
        model.compile()  # in place: names in checkpoints stay as they are
    if not dist.is_initialized():
        return model
    # Buffers of quantizers do not change after calibration; the running statistics of other networks do.
    has_statistics = any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in model.modules())
    known = inspect.signature(DistributedDataParallel).parameters
    renamed = 'forward_sync_buffers' if 'forward_sync_buffers' in known else 'broadcast_buffers'  # by PyTorch 2.15
    # Gradients live in the buckets that are reduced: no second copy of them, no copying.
    return DistributedDataParallel(model, device_ids=[device] if device.type == 'cuda' else None,
                                   gradient_as_bucket_view=True, **{renamed: has_statistics})
