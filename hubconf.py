"""torch.hub's entry points: a function for each quantized network and each full-precision one.

    model = torch.hub.load('<owner>/<repository>', 'fourbits_deit_tiny_patch16_224', checkpoint='best_checkpoint.pth')
    model = torch.hub.load('/path/to/repository', 'vit_deit_tiny_patch16_224', source='local')

This repository's modules have short names (`utils`, `models`) that a program may use for its own. They are imported so
that both find theirs: afterwards `sys.modules` is as the program left it, but for the three modules that define the
network, by whose names pickle and the compiler find its classes. torch.hub shows every public name here as an entry
point, which is why there are no others.
"""
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
_TOP = {path.stem for path in _FOLDER.glob('*.py') if path.name != 'hubconf.py'} | {
    path.parent.name for path in _FOLDER.glob('*/__init__.py')}
_NAMES = sorted(_TOP | {'.'.join(path.relative_to(_FOLDER).with_suffix('').parts)
                        for top in _TOP for path in (_FOLDER / top).glob('**/*.py') if path.name != '__init__.py'})
_KEPT = ('ops', 'ops.lsq', 'ops.attention', 'ops.cpu', 'ops.cpp_library', '_quan_base', 'quant_vision_transformer')


@_contextmanager
def _own_modules() -> _Iterator[None]:
    """Within, imports find the modules of this repository, whatever modules of these names the program has."""
    before = {name: _sys.modules[name] for name in _NAMES if name in _sys.modules}
    aside = {name: f'{_FOLDER}/{name}' for name in _NAMES}  # where they wait for the next call: no import has this name
    for name in _NAMES:
        if aside[name] in _sys.modules:
            _sys.modules[name] = _sys.modules[aside[name]]
        elif not _is_own(before.get(name)):
            _sys.modules.pop(name, None)
    _sys.path.insert(0, str(_FOLDER))
    try:
        yield
    finally:
        _sys.path.remove(str(_FOLDER))
        for name in _NAMES:
            if _is_own(_sys.modules.get(name)):
                _sys.modules[aside[name]] = _sys.modules[name]
                if name not in _KEPT:
                    del _sys.modules[name]
        _sys.modules.update(before)


def _is_own(module: _Any) -> bool:
    file = getattr(module, '__file__', None)
    return file is not None and _FOLDER in _Path(file).resolve().parents


def _load(name: str, checkpoint: str | None, pretrained: bool, options: dict[str, _Any]) -> _Any:
    from timm import create_model

    from _quan_base import is_calibrated
    from checkpoints.files import read_checkpoint
    from checkpoints.networks import create_from_checkpoint, load_quantized
    from utils import UserError

    if checkpoint is None:
        return create_model(name, pretrained=pretrained, **options)
    if pretrained:
        raise UserError('pretrained=True and checkpoint both give weights: choose one')
    contents = read_checkpoint(checkpoint)
    about = contents.get('qvit')
    if about is None:
        head = contents.get('model', contents).get('head.weight')
        model = create_model(name, **({} if head is None else {'num_classes': len(head)}) | options)
        load_quantized(model, contents)
    elif about['model'] != name:
        raise UserError(f'{checkpoint} is of {about["model"]}: load it by that name, not as {name}')
    elif options:
        raise UserError(f'{", ".join(options)}: {checkpoint} says how its network is built, leave it out')
    else:
        model = create_from_checkpoint(contents)
    if not is_calibrated(model):
        raise UserError(f'{checkpoint} holds quantizers without steps: train it first')
    return model.eval()


def _entry_point(name: str, summary: str) -> _Callable:
    def load(checkpoint: str | None = None, pretrained: bool = False, **options: _Any) -> _Any:
        with _own_modules():
            return _load(name, checkpoint, pretrained, options)

    load.__name__ = load.__qualname__ = name
    load.__doc__ = _inspect.cleandoc(f"""{summary}

        Args:
            checkpoint: path or https:// URL of a file with this network's weights, as training writes them or as they
                were released; the network comes in evaluation mode. Read with weights_only=True.
            pretrained: start from timm's full-precision DeiT weights instead. A quantized network is then to be
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
        import quant_vision_transformer as _network
    for _name in (*_models.__all__, *_network.default_cfgs):
        _registered = getattr(_models if _name in _models.__all__ else _network, _name)
        globals()[_name] = _entry_point(_name, _registered.__doc__)
