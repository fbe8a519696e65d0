"""Trains and evaluates Q-ViT: the wiring of everything else.

    python main.py --data-path /path/to/imagenet --output_dir out ...          train (--resume auto continues)
    python main.py --eval --resume out/best_checkpoint.pth --data-path ...     evaluate
    python main.py --eval --finetune deit_tiny.pth --data-path ...             calibrate and evaluate (no training)
"""

import json
import sys
import traceback
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

import utils
from _quan_base import is_calibrated
from checkpoints.files import read_checkpoint, write_checkpoint
from checkpoints.full_precision import load_full_precision
from checkpoints.networks import load_quantized, model_info
from engine import evaluate_and_say, fit
from ops import cpu as native_training
from ops.cpp_library import NativeUnavailable
from training import data, networks
from training.flags import DEFAULT_MODEL, DEFAULT_SIZE, check_args, parse_args
from training.state import build_training
from utils import DivergedError, UserError


def resolve(args: Namespace, checkpoint: dict[str, Any] | None) -> None:
    """Fills in the flags that were left open, from what the checkpoint says of itself."""
    about = (checkpoint or {}).get('qvit')
    if about is not None:
        given = {'model': args.model, 'input_size': args.input_size} | args.model_kwargs
        for name, known in {'model': about['model'], 'input_size': about['input_size'], **about['kwargs']}.items():
            if given.pop(name, None) not in (None, known):
                raise UserError(f'{name} is {known} in {args.resume}: leave the flag out')
        if set(given) - {'model', 'input_size'}:
            raise UserError(f'{", ".join(given)} of --model-kwargs is not in {args.resume}: leave it out')
        args.model, args.input_size, args.model_kwargs = about['model'], about['input_size'], about['kwargs']
        args.data_set = args.data_set or about['data_set']
    elif checkpoint is not None and args.model is None:
        raise UserError(f'{args.resume} does not say which network it holds: name it with --model')
    args.model = args.model or DEFAULT_MODEL
    args.input_size = args.input_size or DEFAULT_SIZE
    args.data_set = args.data_set or ('DIGITS' if args.data_path is None else 'IMNET')
    if args.data_set != 'DIGITS' and args.data_path is None:
        raise UserError(f'{args.resume} is of {args.data_set}: pass its --data-path')


def enable_native_kernels(wanted: bool | None, device: torch.device) -> bool:
    """Whether quantizers and DGD are computed in C++ from now on: by default on a CPU that has a compiler."""
    on = device.type == 'cpu' if wanted is None else wanted
    try:
        native_training.enable(on)
    except NativeUnavailable as error:
        if wanted:
            raise UserError(f'--native-kernels: {error}') from error
        print(f'training goes on without its C++ kernels: {error}')
        return False
    return on


def prepare(args: Namespace) -> tuple[torch.device, dict[str, Any] | None]:
    """Joins the processes, reads the checkpoint, and settles, says and saves how everything is going to run."""
    device_was_open = args.device is None
    args.device = args.device or ('cuda' if torch.cuda.is_available() else 'cpu')
    device = utils.init_distributed(args)
    if device_was_open and args.device == 'cpu':
        print('no CUDA GPU here: running on the CPU')
    if device.type == 'cpu':
        utils.keep_freed_memory()
    args.native_kernels = enable_native_kernels(args.native_kernels, device)
    output = Path(args.output_dir) if args.output_dir else None
    if args.resume == 'auto':
        args.resume = str(output / 'checkpoint.pth') if (output / 'checkpoint.pth').is_file() else ''
        print(f'--resume auto: {args.resume or "nothing to resume, starting anew"}')
    elif output and not args.resume and (output / 'checkpoint.pth').is_file():
        print(f'{output} holds an earlier run, which this one overwrites (--resume auto would continue it)')
    checkpoint = read_checkpoint(args.resume) if args.resume else None
    resolve(args, checkpoint)
    effective_batch = args.batch_size * args.grad_accum_steps * args.world_size
    args.scaled_lr = args.lr * effective_batch / 512
    run = utils.describe_run(args) | {'effective_batch': effective_batch, 'scaled_lr': args.scaled_lr}
    print(json.dumps(run))
    if output and args.rank == 0 and not args.eval:
        try:
            output.mkdir(parents=True, exist_ok=True)
            (output / 'args.json').write_text(json.dumps(run, indent=2) + '\n')
        except OSError as error:
            raise UserError(f'--output_dir {output} cannot be written ({error.strerror}): choose another') from error
    return device, checkpoint


def run_evaluation(args: Namespace) -> None:
    device, checkpoint = prepare(args)
    if checkpoint is None:
        return run_post_training_quantization(args, device)
    about = checkpoint.get('qvit', {})
    head = checkpoint.get('model', checkpoint).get('head.weight')
    args.nb_classes = about.get('num_classes', None if head is None else len(head))
    _, dataset, num_classes = data.build_datasets(args)
    if about.get('classes') not in (None, list(dataset.classes)):
        print('warning: the classes of the data set have other names than those that the checkpoint was trained on')
    model = networks.build_student(args, num_classes)
    load_quantized(model, checkpoint)
    if not is_calibrated(model):
        raise UserError(f'{args.resume} holds quantizers without steps: train it first')
    loader = data.build_eval_loader(args, dataset)
    evaluate_and_say('test', model.to(device), loader, device, args)
    if args.model_ema and 'model_ema' in checkpoint:
        load_quantized(model, {'model': checkpoint['model_ema']})
        evaluate_and_say('test_ema', model, loader, device, args)


def load_finetune(args: Namespace, model: nn.Module) -> None:
    for note in load_full_precision(model, read_checkpoint(args.finetune)):
        print(f'--finetune: {note}')


def run_post_training_quantization(args: Namespace, device: torch.device) -> None:
    dataset_train, dataset_val, num_classes = data.build_datasets(args)
    utils.seed_everything(args.seed)  # of heads that start anew
    model = networks.build_student(args, num_classes)
    load_finetune(args, model)
    networks.calibrate_student(args, model.to(device), dataset_train)
    if args.output_dir and args.rank == 0:
        about = model_info(args.model, args.model_kwargs, num_classes, args.input_size, list(dataset_val.classes),
                            args.data_set)
        state = {'model': model.state_dict(), 'epoch': -1, 'args': utils.plain_args(args), 'qvit': about}
        Path(args.output_dir).mkdir(parents=True, exist_ok=True)
        write_checkpoint(state, Path(args.output_dir) / 'calibrated.pth')
    evaluate_and_say('test', model, data.build_eval_loader(args, dataset_val), device, args)


def run_training(args: Namespace) -> None:
    device, checkpoint = prepare(args)
    # cuDNN's faster backward of the patch embedding adds in another order every time: no run could be resumed exactly.
    torch.backends.cudnn.deterministic = True
    dataset_train, dataset_val, num_classes = data.build_datasets(args)
    loader, sampler = data.build_train_loader(args, dataset_train)

    utils.seed_everything(args.seed)  # alike on all ranks
    model = networks.build_student(args, num_classes)
    if checkpoint:
        load_quantized(model, checkpoint)
    elif args.finetune:
        load_finetune(args, model)
    model.to(device)
    teacher = networks.build_teacher(args, num_classes)
    criterion = networks.build_criterion(args, model, teacher if teacher is None else teacher.to(device))
    utils.seed_everything(args.seed + args.rank)
    if not is_calibrated(model):
        networks.calibrate_student(args, model, dataset_train, sampler)
    training = build_training(args, model, device)
    network = networks.wrap(args, model, device)  # now, with the parameters that are trained
    args.n_parameters = sum(p.numel() for p in model.parameters() if p.requires_grad)
    print(f'number of params: {args.n_parameters}')
    if checkpoint:
        for note in training.resume(checkpoint, args):
            print(f'{args.resume}: {note}')
        done = training.epoch >= args.epochs + args.cooldown_epochs
        print(f'{args.resume}: ' + (f'all {training.epoch} epochs are done, a larger --epochs would go on' if done else
                                    f'continuing at epoch {training.epoch}, batch {training.step}'))
    about = model_info(args.model, args.model_kwargs, num_classes, args.input_size, list(dataset_train.classes),
                        args.data_set)
    with utils.StopRequest() as stop:
        fit(network, training, criterion, loader, sampler, data.build_eval_loader(args, dataset_val),
            data.build_mixup(args, num_classes), args, about, stop)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line; returns its exit status."""
    try:
        utils.print_on_rank_0()
        args = parse_args(argv)
        check_args(args)
        run_evaluation(args) if args.eval else run_training(args)
    except (UserError, DivergedError) as error:
        utils.report(error)
        # Lets go of the data loaders, which end their workers; the interpreter would wait for these at its exit.
        traceback.clear_frames(error.__traceback__)
        return 2 if isinstance(error, UserError) else 1
    if dist.is_initialized():
        dist.destroy_process_group()
    return 0


if __name__ == '__main__':
    sys.exit(main())
