"""torch.hub's entry points: a function for each quantized network and each full-precision one.

    model = torch.hub.load('<owner>/<repository>', 'fourbits_deit_tiny_patch16_224', checkpoint='best_checkpoint.pth')
    model = torch.hub.load('/path/to/repository', 'vit_deit_tiny_patch16_224', source='local')

This repository's modules have short names (`utils`, `models`, `ops`) that a program may use for its own, before or
after. They are imported so that both find theirs: afterwards these names are as the program left them. pickle and
torch.compile find modules by the names that classes and functions give as theirs. `_quan_base` and the modules of the
networks, by which a pickled network names its classes, keep their names; every other module goes by a longer one from
then on. torch.hub shows every public name here as an entry point, which is why there are no others.
"""
import hashlib as _hashlib
import inspect as _inspect
import sys as _sys
from collections.abc import Callable as _Callable
from collections.abc import Iterator as _Iterator
from contextlib import contextmanager as _contextmanager
from importlib.util import find_spec as _find_spec
from pathlib import Path as _Path
from typing import Any as _Any

dependencies = ['numpy', 'safetensors', 'timm', 'torch', 'torchvision', 'yaml']

_FOLDER = _Path(__file__).resolve().parent
# The top-level modules and packages of this repository; a package stands for everything in it.
_TOP = {path.stem for path in _FOLDER.glob('*.py')} - {'hubconf'} | {
    path.parent.name for path in _FOLDER.glob('*/__init__.py')}
_KEPT = ('_quan_base', 'quant_swin_transformer', 'quant_vision_transformer')
# Begins the longer names. The next call, which runs this file anew, finds the modules by them.
_LONGER = f'_qvit_{_hashlib.sha256(str(_FOLDER).encode()).hexdigest()[:12]}.'


def _named_as_ours() -> dict[str, _Any]:
    """The modules that are imported under a name that this repository uses, whoever's they are."""
    return {name: module for name, module in _sys.modules.items() if name.partition('.')[0] in _TOP}


def _is_own(module: _Any) -> bool:
    file = getattr(module, '__file__', None)
    return file is not None and _FOLDER in _Path(file).resolve().parents


@_contextmanager
def _own_modules() -> _Iterator[None]:
    """Within, imports find the modules of this repository, whatever modules of these names the program has."""
    before = _named_as_ours()
    foreign = [name for name, module in before.items() if not _is_own(module)]
    # A program that works with this repository's modules itself goes on to find them under their names.
    works_with_ours = bool(before.keys() - {*foreign, *_KEPT})
    for name in foreign:
        del _sys.modules[name]
    _sys.modules.update({name.removeprefix(_LONGER): module for name, module in _sys.modules.items()
                         if name.startswith(_LONGER)})
    _sys.path.insert(0, str(_FOLDER))
    try:
        yield
    finally:
        _sys.path.remove(str(_FOLDER))
        for name, module in _named_as_ours().items():
            if name not in before and _is_own(module) and not works_with_ours:
                _put_aside(name, module)
        _sys.modules.update(before)


def _put_aside(name: str, module: _Any) -> None:
    """Leaves the module to be found under its longer name only; one of `_KEPT` under both."""
    longer = f'{_LONGER}{name}'
    _sys.modules[longer] = module
    if name in _KEPT:
        return
    del _sys.modules[name]
    module.__name__ = longer
    for value in vars(module).values():
        if (isinstance(value, type) or _inspect.isfunction(value)) and value.__module__ == name:
            value.__module__ = longer


def _load(name: str, checkpoint: str | None, pretrained: bool, options: dict[str, _Any]) -> _Any:
    from timm import create_model

    from _quan_base import is_calibrated
    from checkpoints.networks import open_checkpoint, read_network
    from utils import UserError

    if checkpoint is None:
        return create_model(name, pretrained=pretrained, **options)
    if pretrained:
        raise UserError('pretrained=True and checkpoint both give weights: choose one')
    contents = read_network(checkpoint)
    if 'qvit' in contents and options:
        raise UserError(f'{", ".join(options)}: {checkpoint} says how its network is built, leave it out')
    num_classes, input_size = options.pop('num_classes', None), options.pop('img_size', None)
    opened = open_checkpoint(checkpoint, contents, None if 'qvit' in contents else name, model_kwargs=options,
                             input_size=input_size)
    if opened.info.model != name:
        raise UserError(f'{checkpoint} is of {opened.info.model}: load it by that name, not as {name}')
    if num_classes not in (None, opened.info.num_classes):
        raise UserError(f'{checkpoint} has {opened.info.num_classes} classes, not num_classes={num_classes}')
    if not is_calibrated(opened.model):
        raise UserError(f'{checkpoint} holds quantizers without steps: train it first')
    return opened.model


def _entry_point(name: str, summary: str) -> _Callable:
    def load(checkpoint: str | None = None, pretrained: bool = False, **options: _Any) -> _Any:
        with _own_modules():
            return _load(name, checkpoint, pretrained, options)

    load.__name__ = load.__qualname__ = name
    load.__doc__ = _inspect.cleandoc(f"""{summary}

        Args:
            checkpoint: path or https:// URL of a file with this network's weights, as training writes them or as they
                were released; the network comes in evaluation mode. Read with weights_only=True.
            pretrained: start from timm's full-precision weights instead. A quantized network is then to be
                calibrated: one forward in training mode does that.
            **options: of timm.create_model, as num_classes and img_size; none with a checkpoint that describes its
                network, as those of this project do.

        Returns:
            The network: images (B, 3, 224, 224), normalized with ImageNet's mean and deviation, -> logits (B, classes).

        Raises:
            ValueError: the file is missing, damaged, or of another network.
        """)
    return load


if all(map(_find_spec, dependencies)):  # what is missing is said by torch.hub, which looks at `dependencies` next
    with _own_modules():
        import models as _models
        import quant_swin_transformer as _swin
        import quant_vision_transformer as _vit
    for _module, _names in ((_models, _models.__all__), (_vit, _vit.default_cfgs), (_swin, _swin.default_cfgs)):
        for _name in _names:
            globals()[_name] = _entry_point(_name, getattr(_module, _name).__doc__)
