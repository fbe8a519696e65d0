"""The networks of a run: student, teacher, the loss that compares them, and what is called in training."""

import inspect
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import timm
import torch
import torch.distributed as dist
from timm.loss import LabelSmoothingCrossEntropy, SoftTargetCrossEntropy
from timm.utils import freeze
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from _quan_base import is_calibrated, named_quantizers
from calibration.closed_form import calibrate_to_full_precision
from calibration.first_batch import calibrate
from calibration.reconstruction import Reconstruction, reconstruct
from checkpoints.full_precision import load_full_precision
from checkpoints.networks import ModelInfo, create_network, load_quantized, network_info, read_network, state_of
from losses import Distillation, DistillationLoss, check_dgd_compatible
from models import Teacher, count_prefix_tokens, is_quantized, network_blocks
from training.data import Mixing
from utils import UserError, rng_states, set_rng_state

__all__ = ['CALIBRATIONS', 'FREEZINGS', 'build_criterion', 'build_student', 'build_teacher', 'calibrate_student',
           'check_has_classes', 'check_same_classes', 'checkpoint_gradients', 'freeze_all_but', 'settle_buckets',
           'settle_dgd_weight', 'wrap']

FREEZINGS = ('all-but-quantizers', 'all-but-heads')
CALIBRATIONS = {'published': 64, 'mse': 64, 'reconstruct': 1000}  # with the images that each takes unless told


# --- the student ------------------------------------------------------------------------------------------------------


def build_student(name: str, kwargs: Mapping[str, Any], num_classes: int, input_size: int, drop: float = 0.,
                  drop_path: float = 0.) -> nn.Module:
    """The network of timm's registry to be trained, not yet calibrated.

    Args:
        kwargs: options of the network; these win over `drop_path`.
        drop: dropout.

    Raises:
        UserError: it cannot be built.
    """
    options = {'drop_path_rate': drop_path, **kwargs}
    if drop:
        student = _create_with_dropout(name, num_classes, input_size, drop, options)
    else:
        student = create_network(name, num_classes, input_size, **options)
    if hasattr(student, 'set_distilled_training'):  # timm's distilled networks return the mean of their heads otherwise
        student.set_distilled_training(True)
    return student


def _create_with_dropout(name: str, num_classes: int, input_size: int, drop: float, options: dict[str, Any],
                         ) -> nn.Module:
    try:
        return create_network(name, num_classes, input_size, pos_drop_rate=drop, proj_drop_rate=drop, **options)
    except UserError as error:
        if 'pos_drop_rate' not in str(error):
            raise
        return create_network(name, num_classes, input_size, drop_rate=drop, **options)  # not a vision transformer


def check_same_classes(path: str, info: ModelInfo, classes: Sequence[str]) -> None:
    """Refuses to go on with classes of other names, or in another order: each label would mean another class.

    Args:
        path: of the checkpoint that training continues from, which `info` describes.
    """
    if info.classes is None or len(info.classes) != len(classes):
        return  # it does not say, or the heads have another size, which loading them says
    changed = [(before, now) for before, now in zip(info.classes, classes, strict=True) if before != now]
    if changed:
        raise UserError(f'{path} was trained with class {changed[0][0]!r} where the data set has {changed[0][1]!r} '
                        f'({len(changed)} of {len(classes)} classes differ): name the class folders as before, or '
                        'start anew with --finetune')


def check_has_classes(path: str, checkpoint: Mapping[str, Any], num_classes: int, data_set: str) -> None:
    """Refuses to evaluate what a checkpoint cannot know: heads for other classes would start anew.

    Args:
        path: of the checkpoint, for the message.
    """
    head = state_of(checkpoint).get('head.weight')
    if head is not None and head.ndim and len(head) != num_classes:
        raise UserError(f'{path} has {len(head)} classes, {data_set} has {num_classes}: without training it knows only '
                        'its own, name their images with --data-path')


def calibrate_student(student: nn.Module, images: Tensor, calibration: str,
                      reconstruction: Reconstruction | None = None, progress: Path | None = None) -> None:
    """Gives the quantizers their scales, alike on all ranks.

    Args:
        student: on its device, with the weights to start from.
        images: (B, 3, H, W), on any device.
        calibration: 'published', by the rule for the first batch; 'mse', scales, weights and IRM fitted to the
            full-precision network; 'reconstruct', blocks then learning to give what full precision gives.
        reconstruction, progress: see `reconstruct`.
    """
    if calibration == 'reconstruct':
        reconstruct(student, images, reconstruction or Reconstruction(), progress)
    else:
        images = images.to(next(student.parameters()).device)
        (calibrate if calibration == 'published' else calibrate_to_full_precision)(student, images)


# --- the teacher ------------------------------------------------------------------------------------------------------


def build_teacher(name: str | None, path: str | None, num_classes: int, input_size: int, data_set: str,
                  in_chans: int = 3) -> nn.Module:
    """The network to learn from.

    Args:
        name: timm's; None where the file says it.
        path: of its checkpoint; None or '' for timm's pretrained weights.
        num_classes, input_size, data_set, in_chans: those of the run, which it has to fit; the data set's name is for
            messages.

    Raises:
        UserError: its weights cannot be had, or it is for other images or classes.
    """
    if path:
        teacher = _teacher_from_file(name, path, num_classes, input_size, data_set, in_chans)
    else:
        teacher = _pretrained_teacher(name, num_classes, input_size, data_set, in_chans)
    if not is_calibrated(teacher):
        raise UserError(f'--teacher-model {name} is quantized and not calibrated: choose a full-precision one')
    return teacher


def _check_classes(teacher: str, teacher_classes: int, num_classes: int, data_set: str) -> None:
    if teacher_classes != num_classes:
        raise UserError(f'the teacher {teacher} has {teacher_classes} classes, {data_set} has {num_classes}: train a '
                        'full-precision network on it first, as README says, and name it with --teacher-path')


def _teacher_from_file(name: str | None, path: str, num_classes: int, input_size: int, data_set: str, in_chans: int,
                       ) -> nn.Module:
    checkpoint = read_network(path)
    if 'qvit' in checkpoint:
        return _described_teacher(name, path, checkpoint, num_classes, input_size, data_set, in_chans)
    if name is None:
        raise UserError(f'--teacher-path {path} does not say which network it holds: name it with --teacher-model')
    teacher = create_network(name, num_classes, input_size, what='--teacher-model', **_channels(in_chans))
    state = state_of(checkpoint)
    head = state.get('head.weight', state.get('head.fc.weight'))
    if head is not None:
        _check_classes(path, len(head), num_classes, data_set)
    if is_quantized(teacher):
        load_quantized(teacher, checkpoint)
        return teacher
    for note in load_full_precision(teacher, checkpoint):
        print(f'teacher: {note}')
    return teacher


def _described_teacher(name: str | None, path: str, checkpoint: dict[str, Any], num_classes: int, input_size: int,
                       data_set: str, in_chans: int) -> nn.Module:
    info = network_info(path, checkpoint)
    if name not in (None, info.model):
        raise UserError(f'--teacher-model {name}, but {path} is of {info.model}: leave the flag out')
    if info.input_size != input_size:
        raise UserError(f'the teacher {path} is for --input-size {info.input_size}, not {input_size}')
    _check_classes(path, info.num_classes, num_classes, data_set)
    if info.normalization.in_chans != in_chans:
        raise UserError(f'the teacher {path} takes {info.normalization.in_chans} channels, the network {in_chans}: '
                        'choose one of the same images')
    teacher = create_network(info.model, info.num_classes, info.input_size, what=f'{path}:', **info.kwargs)
    load_quantized(teacher, checkpoint)
    return teacher


def _channels(in_chans: int) -> dict[str, int]:
    return {} if in_chans == 3 else {'in_chans': in_chans}


def _pretrained_teacher(name: str, num_classes: int, input_size: int, data_set: str, in_chans: int) -> nn.Module:
    published = timm.get_pretrained_cfg(name)
    if published is None or not published.has_weights:
        raise UserError(f'--teacher-model {name} has no published weights: give its checkpoint with --teacher-path')
    _check_classes(name, published.num_classes, num_classes, data_set)
    try:
        return create_network(name, num_classes, input_size, what='--teacher-model', pretrained=True,
                              **_channels(in_chans))
    except UserError:
        raise
    except Exception as error:  # whatever the hub's and the network's libraries raise where there is no connection
        raise UserError(f'the weights of --teacher-model {name} cannot be downloaded ({type(error).__name__}): give '
                        'them with --teacher-path') from error


# --- the loss ---------------------------------------------------------------------------------------------------------


def settle_dgd_weight(weight: float | None, student: nn.Module, teacher: nn.Module | None, name: str) -> float:
    """The weight of DGD: the one given; where that is None, 1 if the two networks can be compared, which is said.

    Args:
        name: of the student.

    Raises:
        UserError: DGD is asked for, but the attention of the two networks cannot be compared.
    """
    if teacher is None or weight == 0:
        return weight or 0.
    reason = None if is_quantized(student) else f'student {name} is not quantized'
    reason = reason or check_dgd_compatible(student, teacher)
    if weight is None:
        weight = 0. if reason else 1.
        print(f'--dgd-weight {weight:g}: ' + (reason or 'the layers and heads of the teacher match'))
    elif reason:
        raise UserError(f'--dgd-weight {weight:g} cannot be used, {reason}: pass --dgd-weight 0')
    ours, theirs = (count_prefix_tokens(network) for network in (student, teacher))
    if weight and ours != theirs:
        print(f'DGD compares the patch tokens alone: the student has {ours} before them, the teacher {theirs}')
    return weight


def build_criterion(student: nn.Module, teacher: nn.Module | None, distillation: Distillation, mixing: Mixing,
                    stored_labels: bool = False) -> DistillationLoss:
    """The training loss.

    Args:
        mixing: whether labels are distributions over the classes, or smoothed.
        stored_labels: the teacher's answers come with the labels.

    Raises:
        UserError: tokens are to be compared, but the student is not quantized, or differs in depth or width.
    """
    if distillation.distillation_type != 'none' and not hasattr(student, 'head_dist'):
        print(f'--distillation-type {distillation.distillation_type}: the student has one head, which learns from the '
              'labels and from the teacher')
    if mixing.active:
        base = SoftTargetCrossEntropy()
    else:
        base = LabelSmoothingCrossEntropy(mixing.smoothing) if mixing.smoothing else nn.CrossEntropyLoss()
    compares_tokens = distillation.token_weight > 0
    if compares_tokens:
        if not is_quantized(student):
            raise UserError(f'--token-weight {distillation.token_weight}: {type(student).__name__} does not give the '
                            'outputs of its blocks, pass 0 or choose a quantized network')
        widths = [[getattr(getattr(block, 'norm2', None), 'normalized_shape', None) for block in network_blocks(net)]
                  for net in (student, teacher)]
        if not widths[0] or widths[0] != widths[1]:
            raise UserError(f'--token-weight {distillation.token_weight}: the teacher differs from the student in '
                            'depth or width, pass 0 or choose another teacher')
    watched = None
    if teacher is not None:
        watched = Teacher(teacher, return_qk=distillation.dgd_weight > 0, return_tokens=compares_tokens)
    return DistillationLoss(base, watched, distillation, count_prefix_tokens(student), stored_labels)


# --- what is trained, and how -----------------------------------------------------------------------------------------


def freeze_all_but(model: nn.Module, kept: str) -> None:
    """Leaves nothing to be trained but 'quantizers', their scales and zero points, or 'heads'.

    Raises:
        UserError: the network has none.
    """
    if kept == 'heads':
        named = (getattr(model, 'pretrained_cfg', None) or {}).get('classifier') or 'head'
        names = {named, 'head_dist'} if isinstance(named, str) else {*named}
        trained = [parameter for name, module in model.named_modules() if name in names
                   for parameter in module.parameters()]
    else:
        trained = [parameter for _, quantizer in named_quantizers(model)
                   for name, parameter in quantizer.named_parameters(recurse=False) if name in ('alpha', 'zero_point')]
    if not trained:
        raise UserError(f'--freeze all-but-{kept}: {type(model).__name__} has none')
    freeze(model, include_bn_running_stats=False)
    for parameter in trained:
        parameter.requires_grad_(True)


def checkpoint_gradients(model: nn.Module) -> None:
    """Lets the network compute its blocks again in the backward, instead of keeping what they computed.

    Raises:
        UserError: it cannot.
    """
    try:
        model.set_grad_checkpointing()
    except (AssertionError, AttributeError) as error:
        raise UserError(f'--grad-checkpointing: timm has none for {type(model).__name__}, leave it out') from error


# --- what is called in training ---------------------------------------------------------------------------------------


def wrap(model: nn.Module, device: torch.device, compile: bool = False) -> nn.Module:
    """What to call in training: the model, compiled if asked for, within DistributedDataParallel if there are ranks."""
    if compile:
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


def settle_buckets(network: nn.Module, images: Tensor) -> None:
    """Lets DistributedDataParallel put its gradients into their final order; no state of the run changes.

    After its first backward it orders them anew, by when they were ready. From three processes on, the place of a
    gradient decides in which order the processes' values are added, so that the first update after a resumption would
    differ in the last digits from that of an uninterrupted run.

    Args:
        network: what `wrap` gave; nothing happens without several processes.
        images: (B, 3, H, W), of any values.
    """
    if not isinstance(network, DistributedDataParallel):
        return
    device = images.device
    random, buffers = rng_states(device)[dist.get_rank()], [buffer.clone() for buffer in network.buffers()]
    outputs = network.train()(images)
    sum(output.float().sum() for output in ([outputs] if isinstance(outputs, Tensor) else outputs)).backward()
    with torch.no_grad():
        for buffer, before in zip(network.buffers(), buffers, strict=True):
            buffer.copy_(before)
    network.zero_grad()
    set_rng_state(random, device)
