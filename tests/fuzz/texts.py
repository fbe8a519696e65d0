"""Campaigns on text: logs, model cards, files of --config, flags of the command lines."""
from __future__ import annotations

import functools
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import yaml
from PIL import Image

import cost
import deploy
import main
import soft_labels
import visualize
from analysis import figures, inspection
from analysis.model_card import write_model_card
from benchmarks import inference
from datasets import Augmentation, build_transform
from training import data
from training.checks import check_args
from training.networks import build_criterion, build_student
from training.optimizer import OptimizerConfig
from training.record import keep_log_before
from training.schedule import ScheduleConfig
from training.state import Averaging, build_training
from utils import UserError, pick

from . import mutations
from .networks import INFO, new_network

LINE = {'train_lr': 1e-3, 'train_loss': 2.5, 'test_loss': 2.1, 'test_acc1': 40.5, 'test_acc5': 80., 'epoch': 0,
        'n_parameters': 12345, 'teacher_acc1': 90., 'teacher_acc5': 99., 'teacher_loss': 0.3}
VALUES = ('nan', 'inf', '-inf', '-1', '0', '1e400', '1e308', '1e-320', '', ' ', 'é漢', '\x1b[2J', '٣', '9' * 20,
          '9' * 5000, 'None', '1_000', '0.5', '1', '2', '3', '16', '100000', '1000000', '[', '[' * 5000, '-', '../x',
          '/dev/full', '/dev/zero')


@functools.cache
def network() -> torch.nn.Module:
    return new_network()


# --- logs and cards ---------------------------------------------------------------------------------------------------


def logs(rng: random.Random, folder: Path) -> tuple[str, Callable[[], object]]:
    """log.txt and args.json of a run, damaged or with other values."""
    lines, said = [LINE | {'epoch': epoch} for epoch in range(3)], 'nothing'
    for _ in range(rng.randint(1, 2)):
        lines, said = mutations.mutated(rng, lines, values=mutations.plain_value)
    args = {'python': '3.12', 'torch': '2', 'timm': '1', 'git_commit': 'abc', 'args': {}}
    args, more = mutations.mutated(rng, args, values=mutations.plain_value)
    (folder / 'log.txt').write_bytes(''.join(f'{_json(line)}\n' for line in lines).encode(errors='surrogatepass'))
    (folder / 'args.json').write_bytes(_json(rng.choice([args, [], 3, 'x', mutations.deep(list, 10)])).encode())
    for name in ('log.txt', 'args.json'):
        if rng.random() < 0.2:
            changed, what = mutations.altered_bytes(rng, (folder / name).read_bytes())
            (folder / name).write_bytes(changed)
            said += f', {name} {what}'
    if rng.random() < 0.05:
        (folder / 'log.txt').write_text('[' * 10 ** 5)
    reader = rng.choice(['card', 'curves', 'resume'])

    def read() -> None:
        if reader == 'card':
            flags = vars(main.plain(main.parse_args([]))) | {'rank': 0}
            write_model_card(folder, network(), INFO, flags, flags, 10, epoch=rng.choice([None, 1]))
            assert (folder / 'model_card.md').read_text().replace('\n', '').isprintable()
        elif reader == 'curves':
            figures.save(figures.curves_figure(inspection.read_logs([folder])), folder / 'x.png')
        else:
            keep_log_before(folder / 'log.txt', 1)

    return f'{reader} of {said} {more}', read


def _json(value: Any) -> str:
    try:
        return json.dumps(value)
    except (TypeError, ValueError, RecursionError):
        return '{"epoch": ' + '9' * 5000 + '}'


# --- flags of main.py -------------------------------------------------------------------------------------------------


def use(flags: list[str]) -> None:
    """What main.py builds from its flags, a few steps of each, on the smallest network."""
    args = main.parse_args(flags)
    check_args(args)
    if args.data_path or args.resume or args.finetune or args.soft_labels or args.teacher_path or args.config:
        return
    args.batch_size, args.scaled_lr = min(args.batch_size, 4), args.lr
    size = min(args.input_size or 16, 32)
    transform = build_transform(True, size, 'IMNET', augmentation=pick(Augmentation, vars(args)))
    transform(Image.new('RGB', (40, 30)))
    build_transform(False, size, 'IMNET', eval_crop_ratio=args.eval_crop_ratio)(Image.new('RGB', (40, 30)))
    mixup = data.build_mixup(pick(data.Mixing, vars(args)), 10)
    labels = torch.zeros(4, dtype=torch.long)
    if mixup is not None:
        _, labels = mixup(torch.randn(4, 3, 16, 16), labels)
    torch.manual_seed(args.seed)
    shape = {'embed_dim': 24, 'depth': 1, 'num_heads': 2, 'patch_size': 8}
    model = build_student('fourbits_deit_tiny_patch16_224', shape | args.model_kwargs, 10, 16, args.drop,
                          args.drop_path)
    main.networks.calibrate_student(model, torch.randn(2, 3, 16, 16), 'published')
    training = build_training(
        model, torch.device('cpu'), pick(OptimizerConfig, vars(args) | {'lr': args.scaled_lr}),
        pick(ScheduleConfig, vars(args)), pick(Averaging, vars(args)),
        main.build_methods(model, pick(main.OscillationConfig, vars(args))), seed=args.seed,
        start_epoch=args.start_epoch)
    criterion = build_criterion(model, None, main.Distillation('none'), pick(data.Mixing, vars(args)))
    for _ in range(2):
        outputs = model.train()(torch.randn(4, 3, 16, 16))
        parts = criterion(torch.randn(4, 3, 16, 16), outputs, labels)
        training.add_methods_parts(parts)['loss'].backward()
        training.update(args.clip_grad, 0.5)
        training.end_epoch()


def _value(rng: random.Random, action: Any) -> list[str]:
    """Values for a flag, of which some are of its type."""
    if action.nargs == 0:
        return []
    count = action.nargs if isinstance(action.nargs, int) else rng.choice([1, 1, 2, 3]) if action.nargs else 1
    if action.choices and rng.random() < 0.7:
        return [rng.choice(list(action.choices)) for _ in range(count)]
    if action.dest == 'model_kwargs':
        name = rng.choice(['depth', 'embed_dim', 'weight_bits', 'irm', 'drop_rate', 'patch_size', 'mlp_ratio', 'x'])
        return [f'{name}={rng.choice(VALUES)}' for _ in range(count)]
    if action.dest == 'opt' and rng.random() < 0.7:
        return [rng.choice(['sgd', 'adamw', 'lamb', 'adahessian', 'fusedsgd', 'lookahead_adam', 'rmsprop', 'lbfgs',
                            'muon', 'sgdp', 'adopt'])]  # not kron, which compiles for seconds
    return [rng.choice(VALUES) for _ in range(count)]


def _flags(rng: random.Random, parser: Any, without: tuple[str, ...] = ()) -> list[str]:
    actions = [action for action in parser._actions if action.option_strings and action.dest not in ('help', *without)]
    flags = []
    for action in rng.sample(actions, rng.choice([1, 1, 2, 3])):
        name = rng.choice(action.option_strings)
        values = _value(rng, action)
        flags += [f'{name}={values[0]}'] if len(values) == 1 and rng.random() < 0.8 else [name, *values]
    return flags


def flags_of_main(rng: random.Random, folder: Path) -> tuple[str, Callable[[], object]]:
    """A few flags of main.py with values of any kind."""
    flags = ['--device', 'cpu', *_flags(rng, main.get_args_parser(), ('device', 'model', 'teacher_model'))]
    return _shown(flags), lambda: use(flags)


def config_files(rng: random.Random, folder: Path) -> tuple[str, Callable[[], object]]:
    """A file of --config with values of any kind, or damaged."""
    recipe = {'lr': 3e-4, 'batch_size': 4, 'repeated-aug': False, 'model-ema': True, 'opt-betas': [0.8, 0.9],
              'model-kwargs': {'irm': False, 'depth': 1}, 'clip-grad': None, 'opt': 'sgd', 'lr-noise': [0.5]}
    recipe, said = mutations.mutated(rng, recipe, values=mutations.plain_value)
    try:
        text = yaml.safe_dump(recipe, allow_unicode=True).encode(errors='surrogatepass')
    except (ValueError, RecursionError):
        text = b'lr: ' + b'9' * 5000
    path, kind = folder / 'recipe.yaml', rng.random()
    if kind < 0.3:
        text, said = mutations.altered_bytes(rng, text)
    elif kind < 0.5:
        text = rng.choice([
            b'', b'[1]', b'\xff\xfe', b'a: &a [*a]', b'lr: !!python/object/apply:os.system [x]', b'? [1, 2]\n: 3\n',
            b'lr: ' + b'[' * 5000, b'lr: 2024-01-01', b'lr: {a: {b: 1}}', b'lr: [1, 2, 3]', b'eval: [true]',
            b'---\n---\n',
            b'a: &a [x,x]\n' + b''.join(b'%c: &%c [*%c,*%c]\n' % (98 + i, 98 + i, 97 + i, 97 + i) for i in range(25)),
            b'lr: *b', b'model-kwargs: [1]', b'eval: 3', b'config: x', b'help: true',
            b'lr: "\x1b[2J"', b'\x00', b'3: 4'])
        said = repr(text[:40])
    path.write_bytes(text)
    if kind > 0.95:
        path.unlink()
        rng.choice([path.mkdir, lambda: __import__('os').mkfifo(path), lambda: path.symlink_to(path)])()
    return said, lambda: check_args(main.parse_args(['--config', str(path), '--device', 'cpu']))


# --- flags of the other commands --------------------------------------------------------------------------------------


def flags_of_others(rng: random.Random, folder: Path) -> tuple[str, Callable[[], object]]:
    """Flags of deploy.py, cost.py, visualize.py and soft_labels.py: as far as no long work begins."""
    command = rng.choice(['bench', 'eval', 'predict', 'cost', 'visualize', 'labels'])
    if command in ('bench', 'eval', 'predict'):
        sub = deploy.get_args_parser()._subparsers._group_actions[0].choices[command]
        needed = {'bench': [], 'eval': [str(folder / 'x')], 'predict': [str(folder / 'x.jpg'), '--packed', 'x']}
        flags = [command, *needed[command], *_flags(rng, sub, ('markdown', 'json', 'packed', 'checkpoint', 'device'))]

        def run() -> None:
            args = deploy.get_args_parser().parse_args(flags)
            if command == 'bench':
                torch.set_num_threads(pick(inference.Conditions, vars(args)).threads)
                torch.set_num_threads(1)
            else:
                args.run(args)
    elif command == 'cost':
        flags = ['--model', 'fourbits_deit_tiny_patch16_224',
                 *_flags(rng, cost.get_args_parser(), ('output', 'model', 'checkpoint'))]

        def run() -> None:
            args = cost.get_args_parser().parse_args(flags)
            cost.check_args(args)
            cost.rows(args)
    elif command == 'visualize':
        kind = rng.choice(['qk', 'attention', 'distance', 'codes'])
        sub = visualize.get_args_parser()._subparsers._group_actions[0].choices[kind]
        flags = [kind, '--resume', 'x', *_flags(rng, sub, ('output',))]

        def run() -> None:
            visualize.check_args(visualize.get_args_parser().parse_args(flags))
    else:
        flags = ['--output', 'x', '--teacher-model', 'deit_tiny_patch16_224',
                 *_flags(rng, soft_labels.get_args_parser())]

        def run() -> None:
            soft_labels.parse_args(flags)
    return f'{command} {_shown(flags)}', run


def _shown(flags: list[str]) -> str:
    return ' '.join(flag if len(flag) < 40 else f'{flag[:40]}...' for flag in flags)


CAMPAIGNS = {'log.txt, args.json': logs, 'flags of main.py': flags_of_main, 'files of --config': config_files,
             'flags of other commands': flags_of_others}
__all__ = ['CAMPAIGNS', 'UserError', 'network']
