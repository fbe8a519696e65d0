"""Trains, evaluates and calibrates Q-ViT: the flags, and the three jobs that they can ask for.

    python main.py --data-path /path/to/imagenet --output_dir out ...          train (--resume auto continues)
    python main.py --eval --resume out/best_checkpoint.pth --data-path ...     evaluate
    python main.py --eval --finetune deit_tiny.pth --data-path ...             calibrate and evaluate (no training)
"""

import json
import os
import sys
from argparse import ArgumentParser, BooleanOptionalAction, Namespace
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

from console.parser import Parser, answer_help, key_value, path_text
from training import flags

DEFAULT_MODEL = 'fourbits_deit_tiny_patch16_224'
DEFAULT_SIZE = 224


# --- flags ------------------------------------------------------------------------------------------------------------


def get_args_parser() -> ArgumentParser:
    """Flags have DeiT's names, and its defaults but where the published Q-ViT runs did without (mixup, cutmix, label
    smoothing, weight averaging, clipping, cool-down)."""
    parser = Parser(description='Q-ViT: training and evaluation', allow_abbrev=False,
                          formatter_class=flags.HelpFormatter)
    add = parser.add_argument
    add('--config', metavar='FILE', type=path_text, help='YAML with values for these flags; flags on the '
        'command line win')
    add('--batch-size', default=64, type=flags.positive_int, help='images of a process at a time')
    add('--epochs', default=300, type=flags.positive_int)
    add('--grad-accum-steps', default=1, type=flags.positive_int, help='batches per update')

    group = parser.add_argument_group('model')
    add = group.add_argument
    add('--model', help=f'{DEFAULT_MODEL} unless the checkpoint says another')
    add('--model-kwargs', nargs='+', action='extend', type=key_value, metavar='KEY=VALUE',
        help='options of the network, e.g. irm=False act_granularity=tensor weight_bits=2')
    add('--input-size', type=flags.image_size, help=f'image size, {DEFAULT_SIZE} unless the checkpoint says another')
    add('--drop', default=0., type=flags.share, help='dropout')
    add('--drop-path', default=0.1, type=flags.share)
    add('--model-ema', default=False, action=BooleanOptionalAction, help='average the weights over time')
    add('--model-ema-decay', default=0.99996, type=flags.share)
    add('--model-ema-force-cpu', action='store_true')
    add('--model-ema-warmup', action='store_true', help='the decay rises to its value over the first updates')
    add('--amp', default='none', choices=('none', 'bf16', 'fp16'), help='precision of the matrix products')
    add('--grad-checkpointing', action='store_true', help='less memory, more time: blocks are computed twice')
    add('--freeze', choices=('all-but-quantizers', 'all-but-heads'), help='train steps and zero points only, or the '
        'heads only')
    add('--tf32', action='store_true', help='float32 products of a GPU in TF32: faster, with 10 bits of mantissa')
    add('--compile', action='store_true', help='torch.compile')
    add('--native-kernels', action=BooleanOptionalAction,
        help='quantizers in C++, compiled on first use (default: on a CPU, where a compiler is found)')
    add('--kernels', choices=('triton',), help='quantizers in Triton, on a GPU; not yet measured on any')

    group = parser.add_argument_group('optimizer and schedule')
    add = group.add_argument
    add('--opt', default='adamw', help="timm's name; fusedlamb is apex's, or timm's Lamb with the same update")
    add('--opt-eps', type=flags.non_negative)
    add('--opt-betas', type=flags.share, nargs=2)
    add('--clip-grad', type=flags.positive, help='largest norm of the gradient')
    add('--momentum', default=0.9, type=flags.non_negative)
    add('--weight-decay', default=0.05, type=flags.non_negative)
    add('--step-lr-scale', default=1., type=flags.non_negative, help='learning rate of the steps and zero points, in '
        'units of --lr')
    add('--oscillation-dampening', default=0., type=flags.non_negative, metavar='W',
        help='final weight of a loss that pulls weights to the centres of their codes')
    add('--oscillation-freezing', type=flags.frequency, nargs='+', metavar='F', help='freeze weights whose codes go '
        'back and forth more often than this, in an average per update, e.g. 0.01; two values: at start and end')
    add('--sched', default='cosine', choices=('cosine', 'tanh', 'step', 'poly'))
    add('--sched-on-updates', action='store_true', help='change the learning rate at every update, not every epoch')
    add('--lr', default=5e-4, type=flags.positive, help='at 512 images per update; scaled in proportion to them')
    add('--lr-noise', type=flags.share, nargs='+')
    add('--lr-noise-pct', default=0.67, type=flags.share_above_0)
    add('--lr-noise-std', default=1.0, type=flags.non_negative)
    add('--warmup-lr', default=1e-6, type=flags.non_negative)
    add('--min-lr', default=1e-5, type=flags.non_negative)
    add('--decay-epochs', default=30, type=flags.positive)
    add('--warmup-epochs', default=5, type=flags.non_negative_int)
    add('--cooldown-epochs', default=0, type=flags.non_negative_int, help='epochs at the last rate, after --epochs')
    add('--decay-rate', '--dr', default=0.1, type=flags.exponent)

    group = parser.add_argument_group('augmentation and regularization')
    add = group.add_argument
    add('--color-jitter', default=0.4, type=flags.non_negative)
    add('--aa', default='rand-m9-mstd0.5-inc1', help='auto-augmentation policy')
    add('--smoothing', default=0., type=flags.share, help='label smoothing')
    add('--train-interpolation', default='bicubic')
    add('--random-resized-crop', default=True, action=BooleanOptionalAction)
    add('--repeated-aug', default=True, action=BooleanOptionalAction)
    add('--reprob', default=0.25, type=flags.share, help='probability of random erasing')
    add('--remode', default='pixel')
    add('--recount', default=1, type=flags.few)
    add('--mixup', default=0., type=flags.non_negative)
    add('--cutmix', default=0., type=flags.non_negative)
    add('--cutmix-minmax', type=flags.share, nargs=2)
    add('--mixup-prob', default=1.0, type=flags.share)
    add('--mixup-switch-prob', default=0.5, type=flags.share)
    add('--mixup-mode', default='batch', choices=('batch', 'pair', 'elem'))

    group = parser.add_argument_group('teacher')
    add = group.add_argument
    add('--teacher-model', help="timm's name, e.g. vit_deit_tiny_distilled_patch16_224")
    add('--teacher-path', metavar='FILE', type=path_text, help="its checkpoint; without one, timm's pretrained weights")
    add('--soft-labels', default='', metavar='FILE', type=path_text, help="a teacher's answers for crops of the "
        'training images, as soft_labels.py stores them, instead of a teacher; no other augmentation applies')
    add('--distillation-type', default='none', choices=('none', 'soft', 'hard', 'both'),
        help="hard: the distillation head (or the only one) learns the teacher's decision; soft: its probabilities, "
        'over the number of classes as in DeiT, next to nothing; both: all heads learn its probabilities')
    add('--distillation-alpha', default=0.5, type=flags.share, help='share of distillation; 1: labels are unused')
    add('--distillation-tau', default=1.0, type=flags.positive)
    add('--dgd-weight', type=flags.non_negative, help='weight of distribution-guided distillation; unless given, 1 '
        'with a teacher whose attention can be compared and 0 otherwise')
    add('--token-weight', default=0., type=flags.non_negative, help='weight of token distillation: the outputs of '
        'every block, from a teacher of the same depth and width')

    add = parser.add_argument_group('calibration').add_argument
    add('--calibration', choices=('published', 'mse', 'reconstruct'), help='published: steps by the first batch; mse: '
        'steps, weights, IRM fitted to the full-precision network, layer by layer; reconstruct: blocks learn by '
        'gradient after that; unless given, mse with --finetune (reconstruct with --eval, too), else published')
    add('--calibration-images', type=flags.positive_int, help='training images, without labels: 64 for mse and 1000 '
        'for reconstruct, unless given')
    add('--calibration-epochs', default=2, type=flags.positive_int, help='of reconstruct: how often a block sees them')
    add('--calibration-tuning', default=3, type=flags.non_negative_int, metavar='EPOCHS', help='of reconstruct: how '
        'often the later blocks together then see views of them')

    group = parser.add_argument_group('data and evaluation')
    add = group.add_argument
    flags.add_data_arguments(add, 'IMNET where there is a --data-path, else DIGITS')
    add('--eval', action='store_true', help='only evaluate: --resume, or --finetune after calibration alone '
        '(post-training quantization; --output_dir gets the network as calibrated.pth)')
    add('--dist-eval', action='store_true', help='share the evaluation among the processes')
    add('--eval-crop-ratio', default=0.875, type=flags.crop_ratio)
    add('--num_workers', default=min(10, os.cpu_count() or 1), type=flags.workers)
    add('--pin-mem', default=True, action=BooleanOptionalAction)

    group = parser.add_argument_group('run')
    add = group.add_argument
    add('--output_dir', default='', metavar='DIR', type=path_text, help='for checkpoints, log.txt, args.json, '
        'TensorBoard')
    add('--finetune', default='', metavar='FILE', type=path_text, help='checkpoint to start from: of full precision, '
        'or quantized to more bits (4 -> 3 -> 2)')
    add('--resume', default='', metavar='FILE', type=path_text, help='checkpoint to continue; auto: that of '
        '--output_dir, if any')
    add('--start_epoch', default=0, type=flags.non_negative_int)
    add('--seed', default=0, type=flags.seed)
    add('--device', help='cuda where there is one, else cpu')
    add('--print-freq', default=10, type=flags.positive_int, help='batches between log lines')
    add('--world_size', default=1, type=flags.positive_int,
        help='processes to expect; the launcher starts them')
    add('--dist_url', default='env://', help='where they meet')
    return parser


def parse_args(argv: Sequence[str] | None = None) -> Namespace:
    """The flags, over those of --config."""
    parser = get_args_parser()
    args = parser.parse_args(argv)
    if args.config:
        args = parser.parse_args([*flags.config_flags(parser, args.config), *(sys.argv[1:] if argv is None else argv)])
    args.model_kwargs = dict(args.model_kwargs or [])
    return args


if __name__ == '__main__':
    answer_help(get_args_parser)  # without what follows, which takes seconds to import

import torch
import torch.distributed as dist
from torch import nn
from torch.utils.data import Dataset

import ops
import utils
from _quan_base import is_calibrated
from calibration.reconstruction import Reconstruction
from checkpoints.files import local_file, write_checkpoint
from checkpoints.full_precision import load_full_precision
from checkpoints.networks import ModelInfo, load_quantized, names_quantized, network_info, read_network, say_doubts
from checkpoints.packed import is_packed
from datasets import Augmentation, Normalization, SeededSamples, choose_data_set, normalization
from engine import Loop, allow_tf32, autocast, evaluate_and_say, fit
from files.readers import is_stream, without_place
from losses import Distillation
from ops import cpu_memory
from samplers import ResumableSampler
from training import data, networks
from training.checks import check_args
from training.methods.oscillation import OscillationConfig
from training.methods.registry import build_methods
from training.networks import CALIBRATIONS
from training.optimizer import OptimizerConfig
from training.output import output_folder
from training.record import RunRecord, describe_run, run_lines, write_args
from training.rendezvous import init_distributed, print_on_rank_0
from training.resumption import Position, check_sources, resume_and_say, sources_of
from training.schedule import ScheduleConfig
from training.signals import StopRequest
from training.state import Averaging, CheckpointFolder, build_training
from utils import Ranks, UserError, pick


def plain(args: Namespace) -> Namespace:
    """A copy of the flags that a checkpoint can hold: numbers, strings, None, and lists and dicts of them."""
    return Namespace(**json.loads(json.dumps(vars(args))))


# --- what all jobs begin with -----------------------------------------------------------------------------------------


class Setting(NamedTuple):
    """Where a job runs, and what it starts from.

    Attributes:
        implementation: of `ops`, for the products of quantized layers.
        checkpoint: what --resume names; None without.
        checkpoint_info: the network in it.
    """
    device: torch.device
    ranks: Ranks
    implementation: str
    checkpoint: dict[str, Any] | None
    checkpoint_info: ModelInfo | None


def prepare(args: Namespace, held: ExitStack) -> Setting:
    """Joins the processes, reads the checkpoint, and settles, says and saves how everything is going to run.

    Args:
        held: keeps the output folder until the job is done.
    """
    device_was_open = args.device is None
    args.device = args.device or ('cuda' if torch.cuda.is_available() else 'cpu')
    device, ranks = init_distributed(args.device, args.world_size, args.dist_url)
    args.rank, args.world_size = ranks
    allow_tf32(args.tf32)
    if device_was_open and args.device == 'cpu':
        print('no CUDA GPU here: running on the CPU')
    if device.type == 'cpu':
        cpu_memory.keep_freed_memory()
    implementation = ops.choose(args.native_kernels, device, args.kernels)
    args.native_kernels = implementation == 'cpu'
    output = Path(args.output_dir) if args.output_dir else None
    is_writer = output is not None and ranks.rank == 0 and not (args.eval and args.resume)
    if is_writer:
        held.enter_context(output_folder(output))
    is_asked_for = args.resume != 'auto'
    if args.resume == 'auto':
        args.resume = str(output / 'checkpoint.pth') if (output / 'checkpoint.pth').is_file() else ''
        print(f'--resume auto: {args.resume or "nothing to resume, starting anew"}')
    elif output and not args.resume and (output / 'checkpoint.pth').is_file():
        print(f'{output} holds an earlier run, which this one overwrites (--resume auto would continue it)')
    if args.eval and args.finetune and args.model is not None and not names_quantized(args.model):
        args.resume, args.finetune = args.finetune, ''  # nothing is to be calibrated
    checkpoint = read_network(args.resume) if args.resume else None
    if checkpoint is not None and not args.eval and is_packed(local_file(args.resume)):
        raise UserError(f'--resume {args.resume} is a packed file, which holds no state of training: start from it '
                        'with --finetune')
    info = settle_network(args, checkpoint)
    if not args.eval:
        args.sources = (sources_of(vars(args)) if checkpoint is None else
                        check_sources(args.resume, checkpoint, vars(args), is_asked_for))
    effective_batch = args.batch_size * args.grad_accum_steps * args.world_size
    args.scaled_lr = args.lr * effective_batch / 512
    run = describe_run(vars(plain(args)), device) | {'effective_batch': effective_batch, 'scaled_lr': args.scaled_lr}
    for line in run_lines(run, vars(plain(parse_args([])))):
        print(line)
    if is_writer and not args.eval:
        write_args(run, output)
    return Setting(device, ranks, implementation, checkpoint, info)


def settle_network(args: Namespace, checkpoint: dict[str, Any] | None) -> ModelInfo | None:
    """Fills in the flags of network and data that were left open, by what the checkpoint says of itself."""
    info = None
    if checkpoint is not None:
        info = network_info(args.resume, checkpoint, args.model, args.model_kwargs, args.input_size)
        args.model, args.input_size, args.model_kwargs = info.model, info.input_size, dict(info.kwargs)
        args.mean, args.std = args.mean or info.mean, args.std or info.std
    args.model = args.model or DEFAULT_MODEL
    args.input_size = args.input_size or DEFAULT_SIZE
    args.data_set = choose_data_set(args.data_set, args.data_path, info.data_set if info else None, args.resume)
    if args.data_set == 'DIGITS' and args.input_size == DEFAULT_SIZE and not args.eval:
        print('no --data-path: training on handwritten digits of 8 x 8 pixels at 224 px, which is slow; '
              '--input-size 16 --model-kwargs patch_size=8 suits them')
    normalization_of(args)  # refuses what does not go together
    return info


def normalization_of(args: Namespace) -> Normalization:
    return normalization(args.mean, args.std, args.model_kwargs.get('in_chans') or 3)


def source_of(args: Namespace) -> data.DataSource:
    """Where the run's images come from."""
    return pick(data.DataSource, vars(args) | {'normalization': normalization_of(args)})


def build_datasets(args: Namespace, ranks: Ranks) -> tuple[SeededSamples, Dataset]:
    """The training part and the evaluation part."""
    source = source_of(args)
    with data.rank_0_first(ranks):
        dataset = data.build_train_dataset(source, pick(Augmentation, vars(args)), args.soft_labels)
        args.nb_classes = len(dataset.classes)
        return dataset, data.build_eval_dataset(source, args.nb_classes)


def build_student(args: Namespace, setting: Setting, num_classes: int) -> nn.Module:
    """The network, with the weights that it starts from."""
    model = networks.build_student(args.model, args.model_kwargs, num_classes, args.input_size, args.drop,
                                   args.drop_path)
    if setting.checkpoint is not None:
        load_quantized(model, setting.checkpoint)
    elif args.finetune:
        contents = read_network(args.finetune)
        if args.eval:
            networks.check_has_classes(args.finetune, contents, num_classes, args.data_path or args.data_set)
        for note in load_full_precision(model, contents):
            print(f'--finetune: {note}')
    ops.use(model, setting.implementation)
    return model.to(setting.device)


def calibrate_student(args: Namespace, model: nn.Module, dataset: SeededSamples,
                      sampler: ResumableSampler | None = None) -> None:
    """Gives the quantizers their scales in the way that --calibration names.

    Args:
        sampler: that of this rank's batches, the first of which the published calibration takes.
    """
    calibration = args.calibration or ('published' if not args.finetune else 'reconstruct' if args.eval else 'mse')
    if calibration == 'published' and sampler is not None:
        images = data.first_batch_images(dataset, sampler, args.batch_size)
    else:
        count = args.calibration_images or CALIBRATIONS[calibration]
        images = data.calibration_images(dataset, source_of(args), count, args.seed)
    if args.calibration is None:
        print(f'--calibration {calibration}: {len(images)} images')
    networks.calibrate_student(model, images, calibration,
                               Reconstruction(args.calibration_epochs, args.calibration_tuning, seed=args.seed),
                               Path(args.output_dir) / 'calibration.pth' if args.output_dir else None)


def describe_network(args: Namespace, dataset: Dataset) -> ModelInfo:
    classes = list(dataset.classes)
    return ModelInfo(args.model, args.model_kwargs, len(classes), args.input_size, classes,
                     without_place(args.data_set), args.mean and tuple(args.mean), args.std and tuple(args.std))


# --- the jobs ---------------------------------------------------------------------------------------------------------


def evaluate(args: Namespace, setting: Setting) -> None:
    """Evaluates the network of a checkpoint, and the average of its weights where that is asked for."""
    known = setting.checkpoint_info
    with data.rank_0_first(setting.ranks):
        dataset = data.build_eval_dataset(source_of(args), known.num_classes)
    if known.classes not in (None, dataset.classes):
        print('warning: the classes of the data set have other names than those that the checkpoint was trained on')
    model = build_student(args, setting, len(dataset.classes))
    if not is_calibrated(model):
        raise UserError(f'{args.resume} holds quantizers without steps: train it first')
    if 'qvit' not in setting.checkpoint:
        say_doubts(args.resume, args.model, model)
    loader = data.build_eval_loader(dataset, pick(data.Loading, vars(args)), setting.ranks, setting.device)
    loop = pick(Loop, vars(args))
    evaluate_and_say('test', model, loader, setting.device, loop)
    if args.model_ema and 'model_ema' in setting.checkpoint:
        load_quantized(model, {'model': setting.checkpoint['model_ema']})
        evaluate_and_say('test_ema', model, loader, setting.device, loop)


def calibrate(args: Namespace, setting: Setting) -> None:
    """Post-training quantization: calibrates the network that --finetune starts, keeps and evaluates it."""
    dataset, dataset_val = build_datasets(args, setting.ranks)
    utils.seed_everything(args.seed)  # of heads that start anew
    model = build_student(args, setting, len(dataset.classes))
    calibrate_student(args, model, dataset)
    if args.output_dir and setting.ranks.rank == 0:
        state = {'model': model.state_dict(), 'epoch': -1, 'args': plain(args),
                 'qvit': describe_network(args, dataset_val).to_dict()}
        write_checkpoint(state, Path(args.output_dir) / 'calibrated.pth')
    loader = data.build_eval_loader(dataset_val, pick(data.Loading, vars(args)), setting.ranks, setting.device)
    evaluate_and_say('test', model, loader, setting.device, pick(Loop, vars(args)))


def train(args: Namespace, setting: Setting) -> int:
    """Trains a network, from the start or from a checkpoint on; the exit status, which tells a stop by a signal."""
    # cuDNN's faster backward of the patch embedding adds in another order every time: no run could be resumed exactly.
    torch.backends.cudnn.deterministic = True
    device, ranks, loading = setting.device, setting.ranks, pick(data.Loading, vars(args))
    dataset, dataset_val = build_datasets(args, ranks)
    loader, sampler = data.build_train_loader(dataset, loading, ranks, device)
    batches = len(sampler.sampler) // args.batch_size
    if setting.checkpoint_info is not None:
        networks.check_same_classes(args.resume, setting.checkpoint_info, dataset.classes)

    utils.seed_everything(args.seed)  # alike on all ranks
    model = build_student(args, setting, len(dataset.classes))
    criterion = build_criterion(args, setting, model, len(dataset.classes))
    utils.seed_everything(args.seed + ranks.rank)
    if not is_calibrated(model):
        calibrate_student(args, model, dataset, sampler)
    if args.freeze:
        networks.freeze_all_but(model, args.freeze.removeprefix('all-but-'))
    if args.grad_checkpointing:
        networks.checkpoint_gradients(model)
    training = build_training(
        model, device, pick(OptimizerConfig, vars(args) | {'lr': args.scaled_lr}), pick(ScheduleConfig, vars(args)),
        pick(Averaging, vars(args)), build_methods(model, pick(OscillationConfig, vars(args))), amp=args.amp,
        seed=args.seed, start_epoch=args.start_epoch)
    network = networks.wrap(model, device, args.compile)  # now, with the parameters that are trained
    with autocast(device, args.amp):
        networks.settle_buckets(network, torch.zeros(args.batch_size, normalization_of(args).in_chans,
                                                     args.input_size, args.input_size, device=device))
    args.n_parameters = training.n_parameters
    print(f'number of params: {args.n_parameters}')
    if setting.checkpoint is not None:
        resume_and_say(args.resume, training, setting.checkpoint, pick(Position, vars(args)),
                       pick(OptimizerConfig, vars(args)), pick(ScheduleConfig, vars(args)), ranks, batches,
                       args.native_kernels, is_stream(args.data_set))

    info, folder, record = describe_network(args, dataset), None, None
    if args.output_dir:
        folder = CheckpointFolder(Path(args.output_dir), ranks.rank == 0, plain(args), info, batches)
    if folder is not None and folder.is_writer:
        record = RunRecord(folder.path, training, info, dataset_val, batches,
                           args.batch_size * ranks.world_size, vars(plain(args)), vars(plain(parse_args([]))))
    loader_val = data.build_eval_loader(dataset_val, loading, ranks, device)
    mixup = data.build_mixup(pick(data.Mixing, vars(args)), len(dataset.classes))
    with StopRequest() as stop:
        is_done = fit(network, training, criterion, loader, sampler, loader_val, pick(Loop, vars(args)), stop, mixup,
                      folder, record)
    if is_done and ranks.rank == 0:
        print(record.summary() if record is not None else 'nothing is kept without --output_dir')
    return 0 if is_done else stop.exit_status


def build_criterion(args: Namespace, setting: Setting, model: nn.Module, num_classes: int) -> nn.Module:
    """The training loss, with the teacher where something is learned from one."""
    teacher = None
    if (args.distillation_type != 'none' or args.dgd_weight or args.token_weight) and not args.soft_labels:
        teacher = networks.build_teacher(args.teacher_model, args.teacher_path, num_classes, args.input_size,
                                         args.data_path or args.data_set,
                                         normalization_of(args).in_chans).to(setting.device)
        ops.use(teacher, setting.implementation)
    dgd_weight = networks.settle_dgd_weight(args.dgd_weight, model, teacher, args.model)
    distillation = pick(Distillation, vars(args) | {'dgd_weight': dgd_weight})
    return networks.build_criterion(model, teacher, distillation, pick(data.Mixing, vars(args)),
                                    stored_labels=bool(args.soft_labels))


@utils.entry_point
def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line; returns its exit status."""
    status = 0
    print_on_rank_0()
    args = parse_args(argv)
    check_args(args)
    with ExitStack() as held:
        setting = prepare(args, held)
        if not args.eval:
            status = train(args, setting)
        elif setting.checkpoint is not None:
            evaluate(args, setting)
        else:
            calibrate(args, setting)
    if dist.is_initialized():
        dist.destroy_process_group()
    return status


if __name__ == '__main__':
    sys.exit(main())
