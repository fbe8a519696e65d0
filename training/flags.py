"""The flags of main.py: their parser, and the checks that need nothing but the flags.

Flags have DeiT's names, and its defaults but where the published Q-ViT runs did without (mixup, cutmix, label
smoothing, weight averaging, clipping, cool-down).
"""

import argparse
import ast
import math
import os
import sys
from argparse import BooleanOptionalAction, Namespace
from collections.abc import Sequence
from typing import Any

import timm
import torch
from torch import nn

import models  # noqa: F401  (registers the teachers)
import quant_vision_transformer  # noqa: F401  (registers the students)
import utils
from datasets import DATASETS
from engine import AMP_DTYPES
from losses import DISTILLATION_TYPES
from training import data, networks
from training.optimizer import build_optimizer
from utils import UserError, closest

__all__ = ['DEFAULT_MODEL', 'DEFAULT_SIZE', 'check_args', 'get_args_parser', 'parse_args']

DEFAULT_MODEL = 'fourbits_deit_tiny_patch16_224'
DEFAULT_SIZE = 224


class _Formatter(argparse.ArgumentDefaultsHelpFormatter):
    """Shows every default there is, also of flags whose name says it all."""

    def add_argument(self, action: argparse.Action) -> None:
        if action.help is None:  # argparse leaves blank ones out
            action.help = '' if action.default in (None, '') else '(default: %(default)s)'
        super().add_argument(action)

    def _get_help_string(self, action: argparse.Action) -> str:
        return action.help if action.default in (None, '') else super()._get_help_string(action)


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> None:
        raise UserError(f'{message} (--help lists the flags)')


def _key_value(text: str) -> tuple[str, Any]:
    key, equals, value = text.partition('=')
    if not (key.isidentifier() and equals):
        raise argparse.ArgumentTypeError(f'{text!r} is not of the form key=value')
    if value.lower() in ('true', 'false', 'none'):
        value = value.capitalize()
    try:
        return key, ast.literal_eval(value)
    except (SyntaxError, ValueError):
        return key, value


def get_args_parser() -> argparse.ArgumentParser:
    parser = _Parser(description='Q-ViT: training and evaluation', allow_abbrev=False,
                     formatter_class=_Formatter)
    add = parser.add_argument
    add('--config', metavar='FILE', help='YAML with values for these flags; flags on the command line win')
    add('--batch-size', default=64, type=int, help='images of a process at a time')
    add('--epochs', default=300, type=int)
    add('--grad-accum-steps', default=1, type=int, help='batches per update')

    group = parser.add_argument_group('model')
    add = group.add_argument
    add('--model', help=f'{DEFAULT_MODEL} unless the checkpoint says another')
    add('--model-kwargs', nargs='+', action='extend', type=_key_value, metavar='KEY=VALUE',
        help='options of the network, e.g. irm=False act_granularity=tensor weight_bits=2')
    add('--input-size', type=int, help=f'image size, {DEFAULT_SIZE} unless the checkpoint says another')
    add('--drop', default=0., type=float, help='dropout')
    add('--drop-path', default=0.1, type=float)
    add('--model-ema', default=False, action=BooleanOptionalAction, help='average the weights over time')
    add('--model-ema-decay', default=0.99996, type=float)
    add('--model-ema-force-cpu', action='store_true')
    add('--amp', default='none', choices=AMP_DTYPES, help='precision of the matrix products')
    add('--compile', action='store_true', help='torch.compile')
    add('--native-kernels', action=BooleanOptionalAction,
        help='quantizers and DGD in C++, compiled on first use (default: on a CPU, where a compiler is found)')

    group = parser.add_argument_group('optimizer and schedule')
    add = group.add_argument
    add('--opt', default='adamw', help="timm's name; fusedlamb is apex's, or timm's Lamb with the same update")
    add('--opt-eps', type=float)
    add('--opt-betas', type=float, nargs=2)
    add('--clip-grad', type=float, help='largest norm of the gradient')
    add('--momentum', default=0.9, type=float)
    add('--weight-decay', default=0.05, type=float)
    add('--step-lr-scale', default=1., type=float, help='learning rate of the steps and zero points, in units of --lr')
    add('--oscillation-dampening', default=0., type=float, metavar='W',
        help='final weight of a loss that pulls weights to the centres of their codes')
    add('--oscillation-freezing', type=float, nargs='+', metavar='F', help='freeze weights whose codes go back and '
        'forth more often than this, in an average per update, e.g. 0.01; two values: at the start and at the end')
    add('--sched', default='cosine', choices=('cosine', 'tanh', 'step', 'poly'))
    add('--sched-on-updates', action='store_true', help='change the learning rate at every update, not every epoch')
    add('--lr', default=5e-4, type=float, help='at 512 images per update; scaled in proportion to them')
    add('--lr-noise', type=float, nargs='+')
    add('--lr-noise-pct', default=0.67, type=float)
    add('--lr-noise-std', default=1.0, type=float)
    add('--warmup-lr', default=1e-6, type=float)
    add('--min-lr', default=1e-5, type=float)
    add('--decay-epochs', default=30, type=float)
    add('--warmup-epochs', default=5, type=int)
    add('--cooldown-epochs', default=0, type=int, help='epochs at the last learning rate, after --epochs')
    add('--decay-rate', '--dr', default=0.1, type=float)

    group = parser.add_argument_group('augmentation and regularization')
    add = group.add_argument
    add('--color-jitter', default=0.4, type=float)
    add('--aa', default='rand-m9-mstd0.5-inc1', help='auto-augmentation policy')
    add('--smoothing', default=0., type=float, help='label smoothing')
    add('--train-interpolation', default='bicubic')
    add('--random-resized-crop', default=True, action=BooleanOptionalAction)
    add('--repeated-aug', default=True, action=BooleanOptionalAction)
    add('--reprob', default=0.25, type=float, help='probability of random erasing')
    add('--remode', default='pixel')
    add('--recount', default=1, type=int)
    add('--mixup', default=0., type=float)
    add('--cutmix', default=0., type=float)
    add('--cutmix-minmax', type=float, nargs=2)
    add('--mixup-prob', default=1.0, type=float)
    add('--mixup-switch-prob', default=0.5, type=float)
    add('--mixup-mode', default='batch', choices=('batch', 'pair', 'elem'))

    group = parser.add_argument_group('teacher')
    add = group.add_argument
    add('--teacher-model', help="timm's name, e.g. vit_deit_tiny_distilled_patch16_224")
    add('--teacher-path', help="its checkpoint; without one, timm's pretrained weights")
    add('--soft-labels', default='', metavar='FILE', help="a teacher's answers for crops of the training images, as "
        'soft_labels.py stores them, instead of a teacher; no other augmentation applies')
    add('--distillation-type', default='none', choices=DISTILLATION_TYPES, help='hard: the distillation head learns '
        "the teacher's decision; soft: its probabilities, over the number of classes as in DeiT, next to nothing; "
        'both: both heads learn its probabilities')
    add('--distillation-alpha', default=0.5, type=float, help='share of distillation in the loss; 1: labels are unused')
    add('--distillation-tau', default=1.0, type=float)
    add('--dgd-weight', type=float, help='weight of distribution-guided distillation; unless given, 1 with a teacher '
        'whose attention can be compared and 0 otherwise')
    add('--token-weight', default=0., type=float, help='weight of token distillation: the outputs of every block, from '
        'a teacher of the same depth and width')

    add = parser.add_argument_group('calibration').add_argument
    add('--calibration', choices=networks.CALIBRATIONS, help='published: steps by the first batch; mse: steps, '
        'weights, IRM fitted to the full-precision network, layer by layer; unless given, mse with --finetune, else '
        'published')
    add('--calibration-images', default=64, type=int, help='training images that mse fits to')

    group = parser.add_argument_group('data and evaluation')
    add = group.add_argument
    add('--data-path', help='folder of the data set')
    add('--data-set', choices=DATASETS, help='IMNET where there is a --data-path, else DIGITS')
    add('--inat-category', default='name')
    add('--eval', action='store_true', help='only evaluate: --resume, or --finetune after calibration alone '
        '(post-training quantization; --output_dir gets the network as calibrated.pth)')
    add('--dist-eval', action='store_true', help='share the evaluation among the processes')
    add('--eval-crop-ratio', default=0.875, type=float)
    add('--num_workers', '--num-workers', default=min(10, os.cpu_count() or 1), type=int)
    add('--pin-mem', default=True, action=BooleanOptionalAction)

    group = parser.add_argument_group('run')
    add = group.add_argument
    add('--output_dir', '--output-dir', default='', help='for checkpoints, log.txt, args.json and TensorBoard')
    add('--finetune', default='', metavar='FILE', help='checkpoint to start from: of full precision, or '
        'quantized to more bits (4 -> 3 -> 2)')
    add('--resume', default='', metavar='FILE', help='checkpoint to continue; auto: that of --output_dir, if any')
    add('--start_epoch', '--start-epoch', default=0, type=int)
    add('--seed', default=0, type=int)
    add('--device', help='cuda where there is one, else cpu')
    add('--print-freq', default=10, type=int, help='batches between log lines')
    add('--world_size', '--world-size', default=1, type=int, help='processes to expect; the launcher starts them')
    add('--dist_url', '--dist-url', default='env://', help='where they meet')
    return parser


def parse_args(argv: Sequence[str] | None = None) -> Namespace:
    """The flags, over those of --config."""
    parser = get_args_parser()
    args = parser.parse_args(argv)
    if args.config:
        args = parser.parse_args([*utils.config_flags(parser, args.config), *(sys.argv[1:] if argv is None else argv)])
    args.model_kwargs = dict(args.model_kwargs or [])
    return args


def check_args(args: Namespace) -> None:
    """Refuses unknown names, values out of range and contradictions, before any data is touched.

    Raises:
        UserError: the first of them, in one line.
    """
    def require(condition: bool, message: str) -> None:
        if not condition:
            raise UserError(message)

    for flag, name in (('--model', args.model), ('--teacher-model', args.teacher_model)):
        if name is not None and not timm.is_model(name):
            raise UserError(f'{flag} {name} is unknown: {closest(name, timm.list_models())}')
    for low, high, names in (
            (1, math.inf, 'batch_size calibration_images epochs grad_accum_steps print_freq recount world_size'),
            (0, math.inf, 'num_workers start_epoch warmup_epochs cooldown_epochs weight_decay min_lr warmup_lr mixup '
                          'cutmix color_jitter dgd_weight token_weight step_lr_scale oscillation_dampening '
                          'seed momentum'),
            (0, 1, 'distillation_alpha reprob mixup_prob mixup_switch_prob drop drop_path smoothing model_ema_decay')):
        for name in names.split():
            value = getattr(args, name)
            require(value is None or low <= value <= high,
                    f'--{name.replace("_", "-")} {value}: choose a value '
                    + (f'from {low} to {high}' if high < math.inf else f'of at least {low}'))
    for name in ('lr', 'input_size', 'clip_grad', 'distillation_tau', 'eval_crop_ratio', 'decay_epochs'):
        value = getattr(args, name)
        require(value is None or 0 < value < math.inf, f'--{name.replace("_", "-")} {value}: choose a value above 0')
    frequencies = args.oscillation_freezing or [0.5]
    require(len(frequencies) <= 2 and all(0 < value < 1 for value in frequencies), '--oscillation-freezing '
            + ' '.join(map(str, frequencies)) + ': choose one value between 0 and 1, or two')
    for name in ('num_classes', 'img_size'):
        require(name not in args.model_kwargs, f'--model-kwargs {name}: the class count follows from the data set, the '
                                               'image size from --input-size')

    cuda = torch.cuda.is_available()
    try:
        kind = torch.device(args.device or ('cuda' if cuda else 'cpu')).type
    except RuntimeError as error:
        raise UserError(f'--device {args.device} is unknown: choose cuda or cpu') from error
    require(kind != 'cuda' or cuda, f'--device {args.device}: PyTorch finds no CUDA GPU here, choose cpu')
    require(args.amp != 'fp16' or kind != 'cpu', '--amp fp16 needs a GPU: choose bf16 or none')
    require(not args.native_kernels or kind == 'cpu', f'--native-kernels are for CPUs, not {kind}: leave it out, or '
                                                          'choose --device cpu')

    require(args.data_set in (None, 'DIGITS') or args.data_path is not None, f'--data-set {args.data_set} needs '
                                                                             '--data-path')
    require(not args.eval or bool(args.resume or args.finetune), '--eval needs --resume, the checkpoint to evaluate, '
            'or --finetune, full-precision weights to calibrate')
    # With --resume auto, --finetune is how the run starts, and the same command line continues it.
    require(args.resume in ('', 'auto') or not args.finetune, '--resume continues a run and --finetune starts one: '
                                                              'choose one')
    require(not (args.resume and args.start_epoch), '--start_epoch: the checkpoint of --resume says the epoch')
    require(args.resume != 'auto' or bool(args.output_dir), '--resume auto looks into --output_dir: name it')
    for flag, path in (('--resume', args.resume), ('--finetune', args.finetune), ('--teacher-path', args.teacher_path),
                       ('--soft-labels', args.soft_labels)):
        require(not path or path == 'auto' or path.startswith('https://') or os.path.isfile(path),
                f'{flag} {path}: no such file')
    if args.eval:
        return

    weights = [f'--{name}-weight {weight}' for name, weight in (('dgd', args.dgd_weight), ('token', args.token_weight))
               if weight]
    distills = args.distillation_type != 'none' or bool(weights)
    if args.soft_labels:
        require(args.distillation_type != 'none', '--soft-labels: pass --distillation-type soft, hard or both')
        require(not weights, ''.join(weights[:1]) + ' needs a teacher, not --soft-labels: choose one')
        require(not (args.teacher_model or args.teacher_path), '--soft-labels stand in for a teacher: choose one')
        require(not data.mixes(args), '--soft-labels are of single images: pass --mixup 0 --cutmix 0')
    require(not distills or bool(args.teacher_model or args.teacher_path or args.soft_labels),
            (f'--distillation-type {args.distillation_type}' if args.distillation_type != 'none' else
             ''.join(weights[:1])) + ' needs a teacher: name it with --teacher-model, or give a '
            'self-describing checkpoint of it with --teacher-path')
    require(distills or not (args.teacher_model or args.teacher_path), 'the teacher has nothing to do: pass '
            '--distillation-type hard or soft, or a --dgd-weight')
    require(not (args.sched_on_updates and args.lr_noise), '--lr-noise is by epochs, --sched-on-updates by updates: '
            'choose one')
    require(args.calibration != 'mse' or bool(args.finetune or args.resume), '--calibration mse fits to full-precision '
            'weights: name them with --finetune')
    if args.warmup_epochs >= args.epochs:
        print(f'warning: --warmup-epochs {args.warmup_epochs} is all of --epochs: the learning rate stays '
              'below --lr')
    require(not args.model_ema_force_cpu or args.model_ema, '--model-ema-force-cpu needs --model-ema')
    require(not data.mixes(args) or args.batch_size % 2 == 0,
            f'--batch-size {args.batch_size}: mixup and cutmix need an even one')
    require('adahessian' not in args.opt.lower(), '--opt adahessian needs second derivatives, which quantizers do not '
                                                  'have: choose another')
    build_optimizer(args, nn.Linear(1, 1))
