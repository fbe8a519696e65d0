"""The model card of a run: what was trained, on what, how well it does, what it costs, and how to use it.

Training writes it after every epoch, and `model_card.py` for any checkpoint. The accuracies are those of log.txt, the
versions and the commit those of args.json, each where it lies beside the checkpoint. Of paths only the last component
is kept.
"""
from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch.nn as nn

from analysis.cost import summary
from analysis.logs import parse_epoch
from checkpoints.networks import ModelInfo
from files.paths import parse_json, read_text
from files.readers import is_reader, without_place
from utils import UserError, printable, write_whole_text

__all__ = ['write_model_card']

PATH_FLAGS = ('class_map', 'config', 'data_path', 'finetune', 'output_dir', 'resume', 'teacher_path')
MEASURED = {'test': 'network', 'test_ema': 'averaged network', 'teacher': 'teacher'}  # prefixes of log.txt
Flags = Mapping[str, Any]


def write_model_card(directory: str | Path, model: nn.Module, info: ModelInfo, flags: Flags, defaults: Flags,
                     images: int | None = None, checkpoint: str = 'best_checkpoint.pth',
                     epoch: int | None = None) -> None:
    """Writes model_card.md and model_card.json, so that each is a whole file at any time.

    Args:
        directory: of the checkpoint; log.txt and args.json are read from there, too.
        model: the network, outside any wrapper.
        info: its description.
        flags: those of the run by name, with what the run derived from them: values that JSON can hold.
        defaults: those of the flags by name. The card shows where the run differs from them.
        images: how many the accuracies were measured on, if known.
        checkpoint: name of the file that the card describes.
        epoch: that the file is of; unless given, the one with the best top-1 in log.txt.
    """
    directory = Path(directory)
    card = _card(model, info, _plain(flags), _plain(defaults), _log(directory / 'log.txt'), images, epoch)
    card |= _record(directory / 'args.json')
    card |= {'checkpoint': checkpoint, 'commands': _commands(checkpoint, info.data_set)}
    write_whole_text(directory / 'model_card.json', json.dumps(card, indent=2) + '\n')
    write_whole_text(directory / 'model_card.md', _markdown(card))


def images_said_in(path: Path) -> int | None:
    """How many images the accuracies were measured on, as an earlier card says; None where it does not."""
    try:
        images = parse_json(read_text(path))['accuracy']['images']
    except (UserError, KeyError, TypeError, ValueError):
        return None
    return images if type(images) is int and images > 0 else None


# --- what the card says -----------------------------------------------------------------------------------------------


def _plain(flags: Flags) -> dict[str, Any]:
    """The flags as they look in JSON, where a tuple is a list."""
    return json.loads(json.dumps(dict(flags)))


def _card(model: nn.Module, info: ModelInfo, flags: dict[str, Any], defaults: dict[str, Any],
          log: list[dict[str, Any]], images: int | None, epoch: int | None) -> dict[str, Any]:
    quant, flags = getattr(model, 'quant', None), _without_places(flags)
    return {
        'model': {name: getattr(info, name) for name in ('model', 'kwargs', 'num_classes', 'input_size')},
        'precision': asdict(quant) if quant is not None else None,
        'data': {'data_set': info.data_set, 'data_path': flags['data_path']},
        'accuracy': _accuracies(log, images, epoch),
        'epochs_done': len(log) or None, 'cost': _cost(model, info),
        # Given, or settled by the run where the default leaves them open.
        'changed_flags': {name: flags[name] for name in defaults if name in flags and flags[name] != defaults[name]},
        'flags': flags}


def _accuracies(log: list[dict[str, Any]], images: int | None, epoch: int | None) -> dict[str, Any]:
    """What was measured in the given epoch, unless given in the best one; None for what was not."""
    measured = [entry for entry in log if 'test_acc1' in entry]
    best = max(measured, key=lambda entry: entry['test_acc1'], default={})  # the first of equals, as training keeps it
    own = best if epoch is None else next((entry for entry in measured if entry['epoch'] == epoch), {})
    teacher = next((entry for entry in log if 'teacher_acc1' in entry), {})  # measured once, in the first epoch
    return {'measured_by': 'this run', 'epoch': own.get('epoch', epoch), 'is_best': bool(own) and own is best,
            'images': images,
            **{prefix: _accuracy(teacher if prefix == 'teacher' else own, prefix) for prefix in MEASURED}}


def _accuracy(entry: dict[str, Any], prefix: str) -> dict[str, float] | None:
    """Top-1, top-5 (percent) and loss of a line of log.txt."""
    if not all(f'{prefix}_{what}' in entry for what in ('acc1', 'acc5', 'loss')):
        return None
    return {'top1': entry[f'{prefix}_acc1'], 'top5': entry[f'{prefix}_acc5'], 'loss': entry[f'{prefix}_loss']}


def _cost(model: nn.Module, info: ModelInfo) -> dict[str, Any] | None:
    try:
        return summary(info.model, model)
    except UserError:  # main.py trains other networks, too
        return None


def _without_places(flags: dict[str, Any]) -> dict[str, Any]:
    """All flags, and what the run derived from them, without folders and addresses of the machine."""
    names = {flag: printable(Path(str(flags[flag])).name) for flag in PATH_FLAGS if flags.get(flag)}
    scheme = {'dist_url': f'{str(flags["dist_url"]).partition("://")[0]}://'} if 'dist_url' in flags else {}
    data_set = {'data_set': without_place(str(flags['data_set']))} if flags.get('data_set') else {}
    return {'data_path': None} | flags | names | scheme | data_set


def _commands(checkpoint: str, data_set: str | None) -> dict[str, str]:
    """What to type in the folder of this code, with the checkpoint in it."""
    where = f' --data-set {data_set}' if data_set is not None and is_reader(data_set) else ''
    where += '' if data_set == 'DIGITS' or data_set and data_set.startswith('hfds/') else ' --data-path DIR'
    return {'evaluate': f'python main.py --eval --resume {checkpoint}{where}',
            'pack': f'python deploy.py pack {checkpoint} --output model.qvit.safetensors',
            'precision': f'python cost.py --checkpoint {checkpoint} --manifest'}


def _log(path: Path) -> list[dict[str, Any]]:
    """The epochs of log.txt, none where there is none; a line that was cut off is left out."""
    entries = []
    for line in _lines(path):
        with suppress(ValueError):
            entries.append(parse_epoch(line))
    return entries


def _lines(path: Path) -> list[str]:
    return path.read_text(encoding='utf-8', errors='replace').splitlines() if path.is_file() else []


def _record(path: Path) -> dict[str, Any]:
    """Versions and commit of args.json, None where there is no such file that can be read."""
    record = {}
    with suppress(ValueError):
        record = parse_json('\n'.join(_lines(path)))
    said = {name: printable(value) for name, value in record.items() if isinstance(value, str)
            } if isinstance(record, dict) else {}
    return {'versions': {name: said.get(name) for name in ('python', 'torch', 'timm', 'cuda', 'gpu')},
            'git_commit': said.get('git_commit')}


# --- how it reads -----------------------------------------------------------------------------------------------------


def _markdown(card: dict[str, Any]) -> str:
    sections = (_network, _measured, _costs, _training, _use)
    return '\n\n'.join(text for section in sections if (text := section(card))) + '\n'


def _network(card: dict[str, Any]) -> str:
    model, precision = card['model'], card['precision']
    if precision is None:
        bits = 'A full-precision network'
    else:
        bits = (f'A vision transformer quantized by Q-ViT, {precision["weight_bits"]}-bit weights and '
                f'{precision["act_bits"]}-bit activations in its blocks, 8 bits in patch embedding and heads')
    options = ', '.join(f'{name}={value}' for name, value in model['kwargs'].items())
    return (f'# {model["model"]}\n\n{bits}, for images of {model["input_size"]} x {model["input_size"]} pixels and '
            f'{model["num_classes"]} classes' + (f' (options: {options})' if options else '')
            + f'. This card describes `{card["checkpoint"]}`.')


def _data_name(card: dict[str, Any]) -> str:
    """What the images are called: IMNET is also how a folder of other classes is read, which goes by its own name."""
    data = card['data']
    is_own = data['data_set'] == 'IMNET' and data['data_path'] and card['model']['num_classes'] != 1000
    return f'the folder `{data["data_path"]}`' if is_own else str(data['data_set'])


def _measured(card: dict[str, Any]) -> str:
    accuracy = card['accuracy']
    if accuracy['test'] is None:
        return '## Accuracy\n\nNot recorded: no line of a log.txt beside the checkpoint is of its epoch.'
    count = '' if accuracy['images'] is None else f'{accuracy["images"]} '
    chosen = f', the best of {card["epochs_done"]} on these same images' if accuracy['is_best'] else ''
    rows = ''.join(f'| {what} | {values["top1"]:.2f} | {values["top5"]:.2f} | {values["loss"]:.4f} |\n'
                   for prefix, what in MEASURED.items() if (values := accuracy[prefix]) is not None)
    return (f'## Accuracy\n\nMeasured by this run, on the {count}evaluation images of {_data_name(card)}, '
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
    path, name = card['data']['data_path'], _data_name(card)
    return (f'## Training\n\nData: {name}' + (f' (folder `{path}`)' if path and '`' not in name else '')
            + f'. Epochs: {card["epochs_done"] or "not recorded"} of {card["flags"].get("epochs", "not recorded")}. '
            f'Versions: {versions}. '
            f'Commit: {card["git_commit"] or "not recorded"}.\n\nFlags that differ from the defaults, or that the run '
            f'settled (all of them: `model_card.json`):\n\n| flag | value |\n|---|---|\n{flags}').rstrip()


def _use(card: dict[str, Any]) -> str:
    commands = card['commands']
    lines = [commands['evaluate']] if card['precision'] is None else [
        commands['evaluate'], f'{commands["precision"]}      # every tensor with its bits', commands['pack']]
    return '## Use\n\nFrom the folder of the code:\n\n```bash\n' + '\n'.join(lines) + '\n```'
