"""The model card of a run: what was trained, on what, how well it does, what it costs, and how to use it.

    python model_card.py out/best_checkpoint.pth      writes model_card.md and model_card.json beside it

Training writes both by itself after every epoch. The accuracies are those of log.txt, the versions and the commit those
of args.json, each where it lies beside the checkpoint. Of paths only the last component is kept.
"""
from __future__ import annotations

import argparse
import json
import sys
from argparse import Namespace
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch.nn as nn

from checkpoints.files import read_checkpoint
from checkpoints.networks import create_from_checkpoint
from cost import summary, write_text
from utils import UserError, plain_args, report

__all__ = ['write_model_card']

PATH_FLAGS = ('config', 'data_path', 'finetune', 'output_dir', 'resume', 'teacher_path')
MEASURED = {'test': 'network', 'test_ema': 'averaged network', 'teacher': 'teacher'}  # prefixes of log.txt


def write_model_card(directory: str | Path, model: nn.Module, about: dict[str, Any], args: Namespace,
                     images: int | None = None, checkpoint: str = 'best_checkpoint.pth',
                     epoch: int | None = None) -> None:
    """Writes model_card.md and model_card.json, each beside its place and then renamed.

    Args:
        directory: of the checkpoint; log.txt and args.json are read from there, too.
        model: the network, outside any wrapper.
        about: `checkpoints.description` of it.
        args: the flags of the run.
        images: how many the accuracies were measured on, if known.
        checkpoint: name of the file that the card describes.
        epoch: that the file is of; unless given, the one with the best top-1 in log.txt.
    """
    directory = Path(directory)
    card = _card(model, about, args, _log(directory / 'log.txt'), _record(directory / 'args.json'), images, epoch)
    card |= {'checkpoint': checkpoint, 'commands': _commands(checkpoint, about['data_set'])}
    write_text(json.dumps(card, indent=2) + '\n', directory / 'model_card.json')
    write_text(_markdown(card), directory / 'model_card.md')


# --- what the card says -----------------------------------------------------------------------------------------------


def _card(model: nn.Module, about: dict[str, Any], args: Namespace, log: list[dict[str, Any]], record: dict[str, Any],
          images: int | None, epoch: int | None) -> dict[str, Any]:
    measured = [entry for entry in log if 'test_acc1' in entry]
    best = max(measured, key=lambda entry: entry['test_acc1'], default={})  # the first of equals, as training keeps it
    own = best if epoch is None else next((entry for entry in measured if entry['epoch'] == epoch), {})
    teacher = next((entry for entry in log if 'teacher_acc1' in entry), {})  # measured once, in the first epoch
    flags = _flags(args)
    try:
        cost = summary(about['model'], model)
    except UserError:  # main.py trains other networks, too
        cost = None
    quant = getattr(model, 'quant', None)
    return {
        'model': {name: about[name] for name in ('model', 'kwargs', 'num_classes', 'input_size')},
        'precision': asdict(quant) if quant is not None else None,
        'data': {'data_set': about['data_set'], 'data_path': flags['data_path']},
        'accuracy': {
            'measured_by': 'this run', 'epoch': own.get('epoch', epoch), 'is_best': bool(own) and own is best,
            'images': images,
            **{prefix: _accuracy(teacher if prefix == 'teacher' else own, prefix) for prefix in MEASURED}},
        'epochs_done': len(log) or None, 'cost': cost,
        'changed_flags': _changed(flags), 'flags': flags,
        'versions': {name: record.get(name) for name in ('python', 'torch', 'timm', 'cuda', 'gpu')},
        'git_commit': record.get('git_commit')}


def _accuracy(entry: dict[str, Any], prefix: str) -> dict[str, float] | None:
    """Top-1, top-5 (percent) and loss of a line of log.txt."""
    if f'{prefix}_acc1' not in entry:
        return None
    return {'top1': entry[f'{prefix}_acc1'], 'top5': entry[f'{prefix}_acc5'], 'loss': entry[f'{prefix}_loss']}


def _flags(args: Namespace) -> dict[str, Any]:
    """All flags, and what the run derived from them, without folders and addresses of the machine."""
    flags = vars(plain_args(args))
    names = {flag: Path(flags[flag]).name for flag in PATH_FLAGS if flags.get(flag)}
    scheme = {'dist_url': f'{flags["dist_url"].partition("://")[0]}://'} if 'dist_url' in flags else {}
    return {'data_path': None} | flags | names | scheme


def _changed(flags: dict[str, Any]) -> dict[str, Any]:
    """The flags that differ from their defaults: given, or settled by the run where the default leaves them open."""
    from main import parse_args  # here: main.py imports the trainer, which imports this module

    defaults = vars(plain_args(parse_args([])))
    return {name: flags[name] for name in defaults if name in flags and flags[name] != defaults[name]}


def _commands(checkpoint: str, data_set: str | None) -> dict[str, str]:
    """What to type in the folder of this code, with the checkpoint in it."""
    where = '' if data_set == 'DIGITS' else ' --data-path DIR'
    return {'evaluate': f'python main.py --eval --resume {checkpoint}{where}',
            'pack': f'python deploy.py pack {checkpoint} --output model.qvit.safetensors',
            'precision': f'python cost.py --checkpoint {checkpoint} --manifest'}


def _log(path: Path) -> list[dict[str, Any]]:
    """The epochs of log.txt, none where there is none; a line that was cut off is left out."""
    entries = []
    for line in path.read_text().splitlines() if path.is_file() else ():
        try:
            entries.append(json.loads(line))
        except ValueError:
            continue
    return entries


def _record(path: Path) -> dict[str, Any]:
    """args.json, where there is one that can be read."""
    try:
        return json.loads(path.read_text()) if path.is_file() else {}
    except ValueError:
        return {}



# --- how it reads -----------------------------------------------------------------------------------------------------


def _markdown(card: dict[str, Any]) -> str:
    sections = (_about, _accuracies, _costs, _training, _use)
    return '\n\n'.join(text for section in sections if (text := section(card))) + '\n'


def _about(card: dict[str, Any]) -> str:
    model, precision = card['model'], card['precision']
    if precision is None:
        bits = 'A full-precision network'
    else:
        bits = (f'A DeiT quantized by Q-ViT, {precision["weight_bits"]}-bit weights and {precision["act_bits"]}-bit '
                'activations in its blocks, 8 bits in patch embedding and heads')
    options = ', '.join(f'{name}={value}' for name, value in model['kwargs'].items())
    return (f'# {model["model"]}\n\n{bits}, for images of {model["input_size"]} x {model["input_size"]} pixels and '
            f'{model["num_classes"]} classes' + (f' (options: {options})' if options else '')
            + f'. This card describes `{card["checkpoint"]}`.')


def _accuracies(card: dict[str, Any]) -> str:
    accuracy = card['accuracy']
    if accuracy['test'] is None:
        return '## Accuracy\n\nNot recorded: no line of a log.txt beside the checkpoint is of its epoch.'
    count = '' if accuracy['images'] is None else f'{accuracy["images"]} '
    chosen = f', the best of {card["epochs_done"]} on these same images' if accuracy['is_best'] else ''
    rows = ''.join(f'| {what} | {values["top1"]:.2f} | {values["top5"]:.2f} | {values["loss"]:.4f} |\n'
                   for prefix, what in MEASURED.items() if (values := accuracy[prefix]) is not None)
    return (f'## Accuracy\n\nMeasured by this run, on the {count}evaluation images of {card["data"]["data_set"]}, '
            f'after epoch {accuracy["epoch"]} (counted from 0){chosen}.\n\n| | top-1 (%) | top-5 (%) | loss |\n'
            f'|---|--:|--:|--:|\n{rows}').rstrip()


def _costs(card: dict[str, Any]) -> str:
    cost = card['cost']
    if cost is None:
        return ''
    rows = [('size in theory (MB)', 'size_bytes', 'full_precision_size_bytes', 'size_ratio', 1e6),
            ('bit operations, BOPs (G)', 'bops', 'full_precision_bops', 'bops_ratio', 1e9),
            ('operations, OPs (G)', 'ops', 'full_precision_ops', 'ops_ratio', 1e9)]
    table = ''.join(f'| {what} | {cost[own] / unit:.4g} | {cost[full] / unit:.4g} | {cost[ratio]:.2f} |\n'
                    for what, own, full, ratio, unit in rows)
    return (f'## Size and operations\n\n{cost["parameters"] / 1e6:.3f} M parameters and {cost["macs"] / 1e9:.4g} G '
            'multiply-accumulates an image. Counted from the network as `docs/cost.md` says, not timed; the '
            'checkpoint itself stores float32.\n\n'
            f'| | this network | full precision | ratio |\n|---|--:|--:|--:|\n{table}').rstrip()


def _training(card: dict[str, Any]) -> str:
    flags = ''.join(f'| `{name}` | `{json.dumps(value)}` |\n' for name, value in card['changed_flags'].items())
    versions = ', '.join(f'{name} {version}' for name, version in card['versions'].items() if version) or 'not recorded'
    path = card['data']['data_path']
    return (f'## Training\n\nData: {card["data"]["data_set"]}' + (f' (folder `{path}`)' if path else '')
            + f'. Epochs: {card["epochs_done"] or "not recorded"} of {card["flags"]["epochs"]}. Versions: {versions}. '
            f'Commit: {card["git_commit"] or "not recorded"}.\n\nFlags that differ from the defaults, or that the run '
            f'settled (all of them: `model_card.json`):\n\n| flag | value |\n|---|---|\n{flags}').rstrip()


def _use(card: dict[str, Any]) -> str:
    commands = card['commands']
    lines = [commands['evaluate']] if card['precision'] is None else [
        commands['evaluate'], f'{commands["precision"]}      # every tensor with its bits', commands['pack']]
    return '## Use\n\nFrom the folder of the code:\n\n```bash\n' + '\n'.join(lines) + '\n```'


# --- command line -----------------------------------------------------------------------------------------------------


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line; returns its exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
                                     allow_abbrev=False)
    parser.add_argument('checkpoint', type=Path, help="a file that main.py wrote, as an output folder's "
                                                      'best_checkpoint.pth')
    parser.add_argument('--images', type=int, help='images that the accuracies in log.txt were measured on')
    args = parser.parse_args(argv)
    path = args.checkpoint
    try:
        state = read_checkpoint(path)
        if 'qvit' not in state or not isinstance(state.get('args'), Namespace):
            raise UserError(f'{path} does not say what it holds and how it was trained: it was not written by main.py')
        write_model_card(path.parent, create_from_checkpoint(state), state['qvit'], state['args'], args.images,
                         path.name, state['epoch'])
    except (UserError, OSError) as error:  # OSError: the folder cannot be written, which its text names
        report(error)
        return 2
    print(f'{path.parent / "model_card.md"} and model_card.json')
    return 0


if __name__ == '__main__':
    sys.exit(main())
