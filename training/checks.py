"""The checks of main.py's flags that need nothing but the flags: unknown names, missing files, contradictions.

Types and ranges are checked where the flags are parsed.
"""

from argparse import Namespace

import torch

from checkpoints.descriptions import OPTIONS, check_options, check_registered
from datasets import choose_data_set
from files.paths import check_file
from training.data import Mixing
from training.optimizer import OptimizerConfig, check_optimizer
from utils import UserError, closest, pick

__all__ = ['check_args']


def check_args(args: Namespace) -> None:
    """Refuses what cannot be meant, before any data is touched.

    Raises:
        UserError: the first mistake, in one line.
    """
    _check_model(args)
    _check_device(args)
    _check_files(args)
    if not args.eval:
        _check_teacher(args)
        _check_training(args)


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise UserError(message)


def _check_model(args: Namespace) -> None:
    for flag, name in (('--model', args.model), ('--teacher-model', args.teacher_model)):
        if name is not None:
            check_registered(name, flag)
    check_options(args.model_kwargs)
    for name in args.model_kwargs:
        _require(name in OPTIONS, f'--model-kwargs {name} is no option that a checkpoint could describe: '
                                  f'{closest(name, OPTIONS)}')
    frequencies = args.oscillation_freezing or []
    _require(len(frequencies) <= 2, f'--oscillation-freezing {" ".join(map(str, frequencies))}: choose one value '
                                    'between 0 and 1, or two')


def _check_device(args: Namespace) -> None:
    cuda = torch.cuda.is_available()
    try:
        device = torch.device(args.device or ('cuda' if cuda else 'cpu'))
    except RuntimeError as error:
        raise UserError(f'--device {args.device} is unknown: choose cuda or cpu') from error
    kind = device.type
    _require(kind != 'cuda' or cuda, f'--device {args.device}: PyTorch finds no CUDA GPU here, choose cpu')
    if kind == 'cuda' and device.index is not None:
        gpus = torch.cuda.device_count()
        _require(device.index < gpus, f'--device {args.device}: PyTorch finds {gpus} CUDA GPUs here, the first is '
                                      'cuda:0')
    elif kind not in ('cuda', 'cpu'):
        _require(_can_compute(device), f'--device {args.device}: PyTorch finds no such device here, choose cuda or cpu')
    _require(args.amp != 'fp16' or kind != 'cpu', '--amp fp16 needs a GPU: choose bf16 or none')
    _require(args.kernels is None or kind == 'cuda', f'--kernels {args.kernels} are for GPUs, not {kind}: leave it out')
    _require(not args.native_kernels or kind == 'cpu', f'--native-kernels are for CPUs, not {kind}: leave it out, or '
                                                       'choose --device cpu')


def _can_compute(device: torch.device) -> bool:
    try:
        return torch.ones(1, device=device).item() == 1
    except (AssertionError, NotImplementedError, RuntimeError):  # each backend has its own
        return False


def _check_files(args: Namespace) -> None:
    """Looks at what the run starts from and reads."""
    if args.data_set is not None:
        choose_data_set(args.data_set, args.data_path)
    _require(not args.eval or bool(args.resume or args.finetune), '--eval needs --resume, the checkpoint to evaluate, '
             'or --finetune, full-precision weights to calibrate')
    # With --resume auto, --finetune is how the run starts, and the same command line continues it.
    _require(args.resume in ('', 'auto') or not args.finetune, '--resume continues a run and --finetune starts one: '
                                                               'choose one')
    _require(not (args.resume and args.start_epoch), '--start_epoch: the checkpoint of --resume says the epoch')
    _require(args.resume != 'auto' or bool(args.output_dir), '--resume auto looks into --output_dir: name it')
    for flag, path in (('--resume', args.resume), ('--finetune', args.finetune), ('--teacher-path', args.teacher_path),
                       ('--soft-labels', args.soft_labels), ('--class-map', args.class_map)):
        if path and path != 'auto' and not path.startswith('https://'):
            check_file(path, f'{flag} {path}')


def _check_teacher(args: Namespace) -> None:
    """Looks at whether there is a teacher just where something is learned from one."""
    weights = [f'--{name}-weight {weight}' for name, weight in (('dgd', args.dgd_weight), ('token', args.token_weight))
               if weight]
    is_distilled = args.distillation_type != 'none'
    named = bool(args.teacher_model or args.teacher_path)
    if args.soft_labels:
        _require(is_distilled, '--soft-labels: pass --distillation-type soft, hard or both')
        _require(not weights, ''.join(weights[:1]) + ' needs a teacher, not --soft-labels: choose one')
        _require(not named, '--soft-labels stand in for a teacher: choose one')
        _require(not pick(Mixing, vars(args)).active, '--soft-labels are of single images: pass --mixup 0 --cutmix 0')
    learning = [f'--distillation-type {args.distillation_type}'] * is_distilled + weights
    _require(not learning or named or bool(args.soft_labels), ''.join(learning[:1]) + ' needs a teacher: name it with '
             '--teacher-model, or give a self-describing checkpoint of it with --teacher-path')
    _require(bool(learning) or not named, 'the teacher has nothing to do: pass --distillation-type hard or soft, or a '
                                          '--dgd-weight')


def _check_training(args: Namespace) -> None:
    _require(not (args.sched_on_updates and args.lr_noise), '--lr-noise is by epochs, --sched-on-updates by updates: '
             'choose one')
    # The noise is drawn until it is within the limit: with a far larger deviation that would take for ever.
    _require(args.lr_noise_std <= 1000 * args.lr_noise_pct, f'--lr-noise-std {args.lr_noise_std}: choose at most 1000 '
             'times --lr-noise-pct')
    _require(args.sched == 'poly' or args.decay_rate <= 1, f'--decay-rate {args.decay_rate}: choose at most 1')
    _require(args.cutmix_minmax is None or args.cutmix_minmax[0] <= args.cutmix_minmax[1],
             f'--cutmix-minmax {args.cutmix_minmax}: choose two rising values')
    _require(args.calibration in (None, 'published') or bool(args.finetune or args.resume),
             f'--calibration {args.calibration} fits to full-precision weights: name them with --finetune')
    if args.warmup_epochs >= args.epochs:
        print(f'warning: --warmup-epochs {args.warmup_epochs} is all of --epochs: the learning rate stays '
              'below --lr')
    for flag in ('force_cpu', 'warmup'):
        _require(args.model_ema or not getattr(args, f'model_ema_{flag}'),
                 f'--model-ema-{flag.replace("_", "-")} needs --model-ema')
    _require(not (args.freeze and (args.oscillation_dampening or args.oscillation_freezing)),
             f'--freeze {args.freeze} keeps the weights as they are: leave --oscillation-... out')
    _require(not pick(Mixing, vars(args)).active or args.batch_size % 2 == 0,
             f'--batch-size {args.batch_size}: mixup and cutmix need an even one')
    _require('adahessian' not in args.opt.lower(), '--opt adahessian needs second derivatives, which quantizers do not '
                                                   'have: choose another')
    check_optimizer(pick(OptimizerConfig, vars(args)))
