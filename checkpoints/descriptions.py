"""What a file says of the network in it: the `qvit` entry of a checkpoint, and the header of a packed file.

A description comes from whoever made the file and decides what is built here. So nothing of it is believed: the
network is one that is registered here, its options are those that are listed here, every value has a type and bounds,
and sizes are those of the tensors in the same file. All of this is checked before anything is built.
"""
from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import timm
from torch import Tensor

from console.mistakes import UserError, closest, shown
from console.parser import LARGEST_IMAGE, MOST_CLASSES
from datasets import DATASETS, Normalization, normalization
from files.readers import READERS, is_reader

__all__ = ['FORMAT_VERSION', 'ModelInfo', 'check_kwargs', 'check_options', 'check_registered', 'check_sizes']

FORMAT_VERSION = 1


class _Kind(NamedTuple):
    """The values that a field may have, and how to say so."""
    accepts: Callable[[Any], bool]
    wanted: str


def _whole(low: int, high: int) -> _Kind:
    return _Kind(lambda value: type(value) is int and low <= value <= high, f'a whole number from {low} to {high}')


def _number(low: float, high: float) -> _Kind:
    return _Kind(lambda value: type(value) in (int, float) and low <= value <= high, f'a number from {low} to {high}')


def _each(kind: _Kind) -> _Kind:
    """One for each stage of a network."""
    return _Kind(lambda value: isinstance(value, list | tuple) and 1 <= len(value) <= 16
                 and all(map(kind.accepts, value)), f'{kind.wanted}, for each of up to 16 stages')


def _either(*kinds: _Kind) -> _Kind:
    return _Kind(lambda value: any(kind.accepts(value) for kind in kinds), ', or '.join(kind.wanted for kind in kinds))


def _one_of(*values: str) -> _Kind:
    return _Kind(lambda value: type(value) is str and value in values, f'one of {", ".join(map(repr, values))}')


def _text(value: Any) -> bool:
    """Whether it is a short text that can be printed on a terminal as it is."""
    return type(value) is str and len(value) <= 200 and not re.search(r'[\x00-\x1f\x7f-\x9f\ud800-\udfff]', value)


def _levels(value: Any, low: float) -> bool:
    """Whether they are numbers of pixels, one or one for each colour."""
    return isinstance(value, list | tuple) and len(value) in (1, 3) and all(
        type(level) in (int, float) and low <= level <= 1e30 for level in value)


_FLAG = _Kind(lambda value: type(value) is bool, 'True or False')
_SHARE = _number(0, 1)
_PATCH = _whole(1, 256)
_RATES = ('drop_rate', 'pos_drop_rate', 'patch_drop_rate', 'proj_drop_rate', 'attn_drop_rate', 'drop_path_rate')
_FLAGS = ('qkv_bias', 'qk_norm', 'scale_attn_norm', 'scale_mlp_norm', 'proj_bias', 'class_token', 'no_embed_class',
          'pre_norm', 'final_norm', 'fc_norm', 'pool_include_prefix', 'dynamic_img_size', 'dynamic_img_pad', 'fix_init')

# The options of the quantized network, and those of timm's vision transformers that are plain values. None of any other
# is passed on: `checkpoint_path`, `pretrained` or `cache_dir` would have timm read files and addresses.
OPTIONS: dict[str, _Kind] = {
    'weight_bits': _whole(2, 8), 'act_bits': _whole(2, 8), 'act_granularity': _one_of('channel', 'tensor'),
    'irm': _FLAG, 'quantize_attn': _FLAG,
    'patch_size': _Kind(lambda value: _PATCH.accepts(value) or isinstance(value, list | tuple) and len(value) == 2
                        and all(map(_PATCH.accepts, value)), f'{_PATCH.wanted}, or two'),
    'embed_dim': _whole(1, 16384), 'depth': _whole(1, 1000), 'depths': _each(_whole(1, 1000)),
    'num_heads': _either(_whole(1, 1024), _each(_whole(1, 1024))), 'in_chans': _whole(1, 1024),
    'window_size': _either(_whole(1, 256), _each(_whole(1, 256))), 'always_partition': _FLAG,
    'reg_tokens': _whole(0, 1024), 'mlp_ratio': _number(0.01, 64), 'init_values': _number(0, 100),
    'global_pool': _one_of('', 'avg', 'avgmax', 'max', 'token', 'map', 'prr'),
    'pos_embed': _one_of('', 'none', 'learn'), 'weight_init': _one_of('', 'skip', 'reset', 'jax', 'jax_nlhb', 'moco'),
    'act_layer': _one_of('gelu', 'gelu_tanh', 'quick_gelu', 'relu', 'silu'),
    'norm_layer': _one_of('layernorm', 'rmsnorm'),
} | dict.fromkeys(_FLAGS, _FLAG) | dict.fromkeys(_RATES, _SHARE)

_FIELDS = {  # of a description, beside its version, its model and its kwargs
    'num_classes': _whole(0, MOST_CLASSES),
    'input_size': _whole(1, LARGEST_IMAGE),
    'classes': _Kind(lambda value: value is None or isinstance(value, list) and all(map(_text, value)),
                     'a list of short names'),
    'data_set': _Kind(lambda value: value is None or _text(value) and (value in DATASETS or is_reader(value)),
                      f'one of {", ".join(DATASETS)}, or {", ".join(f"{prefix}/NAME" for prefix in READERS)}'),
    'mean': _Kind(lambda value: value is None or _levels(value, 0), 'one number from 0 to 1, or three'),
    'std': _Kind(lambda value: value is None or _levels(value, 1e-30), 'one number above 0, or three'),
}


@dataclass(frozen=True)
class ModelInfo:
    """Which network a file holds, and where its classes come from.

    Attributes:
        model: its name in timm's registry.
        kwargs: options of its constructor that differ from the registered ones.
        num_classes, input_size: of its logits; of its square images, in pixels.
        classes: names of the classes, by label.
        data_set: that it was trained on, as `--data-set` names it.
        mean, std: that its images are normalized by, see `datasets.normalization`; None for ImageNet's.
    """
    model: str
    kwargs: dict[str, Any] = field(default_factory=dict)
    num_classes: int = 1000
    input_size: int = 224
    classes: list[str] | None = None
    data_set: str | None = None
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None

    @property
    def normalization(self) -> Normalization:
        """That of its images.

        Raises:
            UserError: there are no images of so many channels as the network takes.
        """
        return normalization(self.mean, self.std, self.kwargs.get('in_chans') or 3)

    def to_dict(self) -> dict[str, Any]:
        """The `qvit` entry of a checkpoint."""
        levels = {name: list(value) for name, value in (('mean', self.mean), ('std', self.std)) if value is not None}
        return {'format_version': FORMAT_VERSION, 'model': self.model, 'kwargs': dict(self.kwargs),
                'num_classes': self.num_classes, 'input_size': self.input_size, 'classes': self.classes,
                'data_set': self.data_set} | levels

    @classmethod
    def from_dict(cls, entry: Any, where: str) -> ModelInfo:
        """What a `qvit` entry says, every field checked.

        The modules that register the networks, `models` and `quant_vision_transformer`, have to be imported before.

        Args:
            entry: of a file, so anything that a file can hold.
            where: begins the messages: the file's path.

        Raises:
            UserError: a field is missing, of another type or out of bounds, or the network or an option is unknown.
        """
        if not isinstance(entry, dict):
            raise UserError(f'{where}: its description is {shown(entry)}, not a dict of fields')
        absent = [name for name in ('format_version', 'model', 'kwargs', 'num_classes', 'input_size')
                  if name not in entry]
        if absent:
            raise UserError(f'{where}: its description lacks {", ".join(absent)}')
        version = entry['format_version']
        _check('format_version', version, _Kind(lambda value: type(value) is int and value > 0, 'a version'), where)
        if version > FORMAT_VERSION:
            raise UserError(f'{where} has format version {shown(version)}, this code reads up to {FORMAT_VERSION}: '
                            'update it')
        check_registered(entry['model'], f'{where}: its network')
        check_kwargs(entry['kwargs'], where)
        for name, kind in _FIELDS.items():
            _check(name, entry.get(name), kind, where)
        classes, num_classes = entry.get('classes'), entry['num_classes']
        if classes is not None and len(classes) != num_classes:
            raise UserError(f'{where}: its description names {len(classes)} classes, but has num_classes={num_classes}')
        return cls(entry['model'], dict(entry['kwargs']), num_classes, entry['input_size'], classes,
                   entry.get('data_set'), *(None if entry.get(name) is None else tuple(entry[name])
                                            for name in ('mean', 'std')))


def _check(name: str, value: Any, kind: _Kind, where: str) -> None:
    if not kind.accepts(value):
        raise UserError(f'{where}: its description has {name}={shown(value)}, which is to be {kind.wanted}')


def check_registered(name: Any, what: str) -> None:
    """Refuses names of networks that are not in timm's registry. timm takes others for files and addresses.

    Raises:
        UserError: `what` begins the message.
    """
    if type(name) is not str or not re.fullmatch(r'\w+(\.\w+)?', name, re.ASCII) or not timm.is_model(name):
        is_short = type(name) is str and len(name) < 100
        known = closest(name, timm.list_models()) if is_short else 'that is no name'
        raise UserError(f'{what} {name if is_short else shown(name)} is unknown: {known}')


def check_kwargs(kwargs: Any, where: str) -> None:
    """Refuses options that a description may not have, and values that they may not have.

    Raises:
        UserError: the first of them; `where` begins the message.
    """
    if not isinstance(kwargs, dict):
        raise UserError(f'{where}: its description has kwargs={shown(kwargs)}, which is to be a dict of options')
    for name, value in kwargs.items():
        if type(name) is not str or name not in OPTIONS:
            raise UserError(f'{where}: its description has the option {shown(name)}, which a file may not set')
        if value is not None:  # None leaves the registered value
            _check(name, value, OPTIONS[name], where)


def check_options(options: dict[str, Any]) -> None:
    """Refuses what --model-kwargs may not say: sizes that follow from elsewhere, and values that no description has.

    Raises:
        UserError: the first of them; a value of another type, or out of bounds.
    """
    for name in ('num_classes', 'img_size'):
        if name in options:
            raise UserError(f'--model-kwargs {name}: the class count follows from the data set, the image size from '
                            '--input-size')
    for name, value in options.items():
        if value is not None and name in OPTIONS and not OPTIONS[name].accepts(value):
            raise UserError(f'--model-kwargs {name}={shown(value)}: choose {OPTIONS[name].wanted}, others cannot be '
                            'built')


# --- against the tensors of the file ----------------------------------------------------------------------------------


def check_sizes(info: ModelInfo, state: dict[str, Tensor], where: str) -> None:
    """Compares the sizes that are described with those of the tensors, where these show them.

    Raises:
        UserError: the first that differs; `where` begins the message.
    """
    found = _sizes(state)
    wanted = {'num_classes': info.num_classes} | {name: value for name, value in info.kwargs.items()
                                                  if value is not None}
    for name, value in wanted.items():
        if name in found and (tuple(value) if isinstance(value, list | tuple) else value) not in found[name]:
            raise UserError(f'{where}: its description has {name}={shown(value)}, its tensors '
                            f'{shown(found[name][0])}: it is damaged')
    ratio = info.kwargs.get('mlp_ratio')
    if ratio is not None and 'hidden' in found and int(found['embed_dim'][0] * ratio) not in found['hidden']:
        raise UserError(f'{where}: its description has mlp_ratio={shown(ratio)}, its tensors {found["hidden"][0]} '
                        'channels there: it is damaged')
    tokens, patches = found.get('tokens'), found.get('patch_size')
    if tokens and patches:
        rows, columns = (info.input_size // side for side in patches[-1])
        if rows * columns not in tokens:
            raise UserError(f'{where}: its description has input_size={info.input_size}, its tensors '
                            f'{tokens[0]} patches: it is damaged')


def _sizes(state: dict[str, Tensor]) -> dict[str, tuple]:
    """By option, the values that fit the tensors; none where they do not show it."""
    def shape(name: str, dimensions: int) -> tuple[int, ...] | None:
        return tuple(state[name].shape) if name in state and state[name].ndim == dimensions else None

    blocks = {name.split('.')[1] for name in state if name.startswith('blocks.')}
    stages = Counter(name.split('.')[1] for name in {'.'.join(name.split('.')[:4]) for name in state
                                                     if re.match(r'layers\.\d+\.blocks\.\d+\.', name)})
    sizes: dict[str, tuple] = {'depth': (len(blocks),), 'depths': (tuple(stages[stage] for stage in sorted(stages)),)}
    if head := shape('head.weight', 2) or shape('head.fc.weight', 2):
        sizes['num_classes'] = (head[0],)
    filters, token = shape('patch_embed.proj.weight', 4), shape('cls_token', 3)
    if filters and not any(name.startswith('patch_embed.backbone.') for name in state):
        sizes |= {'in_chans': (filters[1],), 'patch_size': (filters[2], filters[2:])}
        if filters[2] != filters[3]:
            sizes['patch_size'] = (filters[2:],) * 2
    if stages and filters:
        sizes['embed_dim'] = (filters[0],)
    if not token:
        return sizes
    width = token[2]
    sizes['embed_dim'] = (width,)
    registers = shape('reg_token', 3)
    sizes['reg_tokens'] = (registers[1] if registers else 0,)
    if norm := shape('blocks.0.attn.norm_q.weight', 1):  # of a head's width
        sizes['num_heads'] = (width // max(1, norm[0]),)
    if hidden := shape('blocks.0.mlp.fc1.weight', 2):
        sizes['hidden'] = (hidden[0], hidden[0] // 2)  # gated layers have two in one
    if positions := shape('pos_embed', 3):
        prefix = 1 + sizes['reg_tokens'][0] + ('dist_token' in state)
        sizes['tokens'] = (positions[1] - prefix, positions[1])
    return sizes
