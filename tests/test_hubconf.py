"""torch.hub's entry points, also in programs that have modules of the same names."""

import importlib.util
import subprocess
import sys
import textwrap
from argparse import Namespace
from pathlib import Path

import pytest
import timm
import torch
from helpers import ROOT

import quant_vision_transformer
from _quan_base import is_calibrated
from calibration.first_batch import calibrate
from checkpoints.files import write_checkpoint
from checkpoints.networks import ModelInfo
from checkpoints.packed import write_packed

SHAPE = {'embed_dim': 24, 'depth': 1, 'num_heads': 2, 'patch_size': 8}
NAME = 'threebits_deit_tiny_patch16_224'


def load(name: str, **options):
    return torch.hub.load(str(ROOT), name, source='local', trust_repo=True, **options)


@pytest.fixture(scope='module')
def files(tmp_path_factory) -> Path:
    """A folder with a file that describes its network, one of the released form, and one without steps."""
    folder = tmp_path_factory.mktemp('hub')
    torch.manual_seed(0)
    model = timm.create_model(NAME, img_size=16, num_classes=5, **SHAPE)
    info = ModelInfo(NAME, SHAPE, 5, 16)
    write_checkpoint({'model': model.state_dict(), 'qvit': info.to_dict()}, folder / 'without.pth')
    calibrate(model, torch.randn(4, 3, 16, 16))
    write_checkpoint({'model': model.state_dict(), 'qvit': info.to_dict()}, folder / 'own.pth')
    write_packed(model, info, folder / 'own.qvit.safetensors')
    write_checkpoint({'model': model.state_dict(), 'args': Namespace(lr=3e-4)}, folder / 'released.pth')
    return folder


def test_every_registered_variant_is_an_entry_point():
    spec = importlib.util.spec_from_file_location('hubconf', ROOT / 'hubconf.py')
    hubconf = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(hubconf)
    # As torch.hub.list finds them.
    public = [name for name in dir(hubconf) if callable(getattr(hubconf, name)) and not name.startswith('_')]
    assert sorted(public) == sorted(
        [f'{bits}_{family}_{size}_patch16_224' for bits in ('twobits', 'threebits', 'fourbits')
         for family in ('deit', 'vit') for size in ('tiny', 'small', 'base')]
        + [f'{bits}_swin_{size}_patch4_window7_224' for bits in ('twobits', 'threebits', 'fourbits')
           for size in ('tiny', 'small')]
        + [f'vit_deit_{size}{distilled}_patch16_224' for size in ('tiny', 'small', 'base')
           for distilled in ('', '_distilled')])
    assert all(getattr(hubconf, name).__name__ == name for name in public)
    said = hubconf.twobits_deit_small_patch16_224.__doc__
    assert said.startswith('2-bit DeiT-Small at 224 px') and '\n    checkpoint: path or https://' in said


def test_networks_without_a_checkpoint():
    model = load('twobits_deit_small_patch16_224', depth=1, num_classes=7)
    assert isinstance(model, quant_vision_transformer.QVisionTransformer)  # the very class: no second import
    assert (model.quant.weight_bits, model.embed_dim, model.num_classes) == (2, 384, 7) and not is_calibrated(model)
    teacher = load('vit_deit_small_distilled_patch16_224', depth=1)
    assert type(teacher).__name__ == 'VisionTransformerDistilled' and teacher.embed_dim == 384


def test_networks_from_checkpoints(files):
    images = torch.randn(2, 3, 16, 16)
    own = load(NAME, checkpoint=str(files / 'own.pth'))
    released = load(NAME, checkpoint=str(files / 'released.pth'), img_size=16, **SHAPE)
    assert not own.training and not released.training and own.num_classes == released.num_classes == 5
    weights = torch.load(files / 'own.pth', weights_only=True)['model']
    packed = load(NAME, checkpoint=str(files / 'own.qvit.safetensors'))
    assert torch.allclose(packed(images), own(images), atol=1e-5)
    for model in (own, released):
        assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())
        assert is_calibrated(model) and model(images).shape == (2, 5)


@pytest.mark.parametrize('name, options, line', [
    ('twobits_deit_tiny_patch16_224', {'checkpoint': 'own.pth'}, f'is of {NAME}: load it by that name'),
    (NAME, {'checkpoint': 'own.pth', 'num_classes': 5}, 'num_classes: .* says how its network is built'),
    (NAME, {'checkpoint': 'own.pth', 'pretrained': True}, 'both give weights: choose one'),
    (NAME, {'checkpoint': 'without.pth'}, 'holds quantizers without steps'),
    (NAME, {'checkpoint': 'none.pth'}, 'no such checkpoint file'),
    (NAME, {'checkpoint': 'released.pth'}, 'the checkpoint is 24 wide, the model 192'),
    (NAME, {'checkpoint': 'released.pth', 'img_size': 16, 'num_classes': 7, **SHAPE},
     'has 5 classes, not num_classes=7'),
])
def test_mistakes(files, name, options, line):
    with pytest.raises(ValueError, match=line):
        load(name, **{**options, 'checkpoint': str(files / options['checkpoint'])})


@pytest.mark.processes
@pytest.mark.parametrize('imports', ['import ops.grid, utils', 'import training'], ids=['before', 'after'])
def test_programs_with_modules_of_the_same_names(imports, files, tmp_path):
    """Their packages stay theirs, imported before or after, and pickle and the compiler find the network's modules."""
    (tmp_path / 'utils.py').write_text('MINE = True\n')
    for name in ('checkpoints', 'models', 'ops', 'training'):
        (tmp_path / name).mkdir()
        (tmp_path / name / '__init__.py').write_text('MINE = True\n')
        (tmp_path / name / 'grid.py').write_text('MINE = True\n')  # ours has a module ops.grid, too
    (tmp_path / 'program.py').write_text(textwrap.dedent(f"""
        import copy, io, sys, warnings
        import torch
        {imports}
        warnings.simplefilter('error')  # a second registration would warn
        path = list(sys.path)
        for _ in range(2):
            model = torch.hub.load({str(ROOT)!r}, {NAME!r}, source='local', trust_repo=True,
                                   checkpoint={str(files / 'own.pth')!r})
        assert sys.path == path
        assert not {{'engine', 'losses', 'ops.registry', 'checkpoints.networks'}} & set(sys.modules)
        import checkpoints, checkpoints.grid, models, ops, ops.grid, training, utils
        theirs = checkpoints, checkpoints.grid, models, ops, ops.grid, training, utils
        assert all(module.MINE and sys.modules[module.__name__] is module for module in theirs)
        stream = io.BytesIO()
        torch.save(model, stream)
        stream.seek(0)
        again, images = torch.load(stream, weights_only=False), torch.ones(1, 3, 16, 16)
        assert torch.equal(again(images), model(images)) and torch.equal(copy.deepcopy(model)(images), model(images))
        warnings.simplefilter('default')  # the compiler's own
        torch.testing.assert_close(torch.compile(model, backend='eager')(images), model(images))
        compiled = torch.compile(model.train(), backend='eager')
        sum(logits.sum() for logits in compiled(images)).backward()  # through the functions of ops
        assert model.blocks[0].attn.qkv.alpha.grad.abs().sum() > 0
        try:
            torch.hub.load({str(ROOT)!r}, {NAME!r}, source='local', trust_repo=True, checkpoint='none.pth')
        except ValueError as error:
            print(type(error).__name__, error)
        assert all(sys.modules[module.__name__] is module for module in theirs) and sys.path == path
    """))
    found = subprocess.run([sys.executable, 'program.py'], capture_output=True, text=True, cwd=tmp_path, timeout=100)
    assert found.returncode == 0, found.stderr
    assert found.stdout == 'UserError none.pth: no such checkpoint file\n'


def test_missing_dependencies_are_named_by_torch_hub(monkeypatch):
    find_spec = importlib.util.find_spec
    monkeypatch.setattr('importlib.util.find_spec', lambda name, *package: (
        None if name == 'safetensors' else find_spec(name, *package)))
    with pytest.raises(RuntimeError, match='Missing dependencies: safetensors'):
        load(NAME)
