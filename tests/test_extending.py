"""What README says of extending the project: each kind of addition trains, is packed, and computes the same."""
import os
import re
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from helpers import ROOT, TINY, require, run
from PIL import Image

import _quan_base
import deploy
from checkpoints.networks import open_network
from deployment.integer import IntegerViT
from quant_vision_transformer import QVisionTransformerDistilled

RULES = {  # other parametrisations of the scale, with their inverses
    'exponential': (torch.exp, torch.log),
    'magnitude': (torch.abs, lambda scale: scale),
    'halved': (lambda alpha: alpha / 2, lambda scale: 2 * scale),
    # Powers of two by straight-through rounding, which leave themselves as they are.
    'power of two': (lambda alpha: alpha + (alpha.abs().log2().round().exp2() - alpha).detach(), lambda scale: scale)}


def accuracy(text: str) -> float:
    return float(re.findall(r'\* Acc@1 (\S+)', text)[-1])


@pytest.mark.whole_run
@pytest.mark.parametrize('kernels', ['--native-kernels', '--no-native-kernels'])
@pytest.mark.parametrize('name', RULES)
def test_another_step_rule(name, kernels, tmp_path, monkeypatch, capsys):
    learned, inverse = RULES[name]
    monkeypatch.setattr(_quan_base, 'learned_scale', learned)
    monkeypatch.setattr(_quan_base, 'alpha_of', inverse)
    assert run(*TINY, '--epochs', 2, '--lr', '2e-2', '--model-kwargs', 'act_granularity=tensor', kernels,
               '--output_dir', tmp_path) == 0
    checkpoint, packed = tmp_path / 'checkpoint.pth', tmp_path / 'checkpoint.qvit.safetensors'
    trained = accuracy(capsys.readouterr().out)
    assert trained > 25
    assert deploy.main(['pack', str(checkpoint)]) == 0
    ours, theirs = open_network(packed).model, open_network(checkpoint).model
    for (_, quantizer), (_, other) in zip(_quan_base.named_quantizers(ours), _quan_base.named_quantizers(theirs),
                                          strict=True):
        torch.testing.assert_close(quantizer.scale, other.scale, rtol=1e-5, atol=0)
    for arithmetic in ('float', 'int8'):
        assert deploy.main(['eval', str(packed), '--arithmetic', arithmetic, '--num_workers', '0', '--backend',
                            'auto' if kernels == '--native-kernels' else 'torch']) == 0
        assert accuracy(capsys.readouterr().out) == pytest.approx(trained, abs=0.6)  # two of 355 images
    images = torch.randn(4, 3, 16, 16)
    torch.testing.assert_close(IntegerViT(ours.double(), dtype=torch.float64)(images.double()), ours(images.double()),
                               rtol=1e-6, atol=1e-6)


@pytest.mark.whole_run
def test_another_step_rule_in_onnx(tmp_path, monkeypatch):
    require('onnx')
    runtime = require('onnxruntime')
    monkeypatch.setattr(_quan_base, 'learned_scale', torch.exp)
    monkeypatch.setattr(_quan_base, 'alpha_of', torch.log)
    assert run(*TINY, '--epochs', 1, '--model-kwargs', 'act_granularity=tensor', '--output_dir', tmp_path) == 0
    assert deploy.main(['onnx', str(tmp_path / 'checkpoint.pth'), '--output', str(tmp_path / 'a.onnx')]) == 0
    images, model = torch.randn(8, 3, 16, 16), open_network(tmp_path / 'checkpoint.pth').model
    logits, = runtime.InferenceSession(tmp_path / 'a.onnx', providers=['CPUExecutionProvider']).run(
        None, {'images': images.numpy()})
    assert (torch.from_numpy(logits).argmax(1) == model(images).argmax(1)).float().mean() > 0.8


def test_a_rule_without_its_inverse_is_not_packed(tmp_path, monkeypatch, capsys):
    torch.manual_seed(0)
    model = QVisionTransformerDistilled(img_size=16, patch_size=8, embed_dim=24, depth=1, num_heads=2, num_classes=10,
                                        weight_bits=4, act_bits=4)
    model.train()(torch.randn(4, 3, 16, 16))
    torch.save({'model': model.state_dict(), 'qvit': {
        'format_version': 1, 'model': 'fourbits_deit_tiny_patch16_224', 'num_classes': 10, 'input_size': 16,
        'kwargs': {'patch_size': 8, 'embed_dim': 24, 'depth': 1, 'num_heads': 2}}}, tmp_path / 'a.pth')
    monkeypatch.setattr(_quan_base, 'learned_scale', torch.exp)
    assert deploy.main(['pack', str(tmp_path / 'a.pth')]) == 2
    assert 'alpha_of in _quan_base.py has to undo learned_scale there' in capsys.readouterr().err


ADDITIONS = {  # file: (before, after), as README says it
    'quant_vision_transformer.py': [("    'tiny': (192, 3),\n", "    'tiny': (192, 3),\n    'micro': (48, 3),\n"),
                                    ("BITS = {'twobits': 2,", "BITS = {'twobits': 2, 'fivebits': 5,")],
    '_quan_base.py': [('    return alpha\n', '    return alpha.exp()\n'),
                      ('    return scale\n', '    return scale.log()\n')],
    'datasets.py': [("    'DIGITS': _digits,\n", "    'DIGITS': _digits,\n    'FIRST_DIGITS': _first_digits,\n"),
                    ('# Each builder is called', '''\
def _first_digits(is_train, data_path, transform, **_):
    data_set = Digits(is_train, transform)
    kept = [index for index, label in enumerate(data_set.targets) if label < 3]
    data_set.images, data_set.targets = data_set.images[kept], [data_set.targets[index] for index in kept]
    data_set.classes = ['0', '1', '2']
    return data_set


# Each builder is called''')],
    'losses.py': [("        loss = parts.pop('loss')\n", '''\
        parts['loss_size'] = 1e-4 * outputs[0].square().mean()
        loss = parts.pop('loss') + parts['loss_size']
''')]}


@pytest.mark.whole_run
@pytest.mark.processes
def test_additions_the_documented_way(tmp_path):
    """A variant, bits, a step rule, a loss and a data set, each in its one place, through training to a packed file."""
    folder = tmp_path / 'repository'
    left_out = shutil.ignore_patterns('.git', '.venv*', 'tests', 'docs', 'output', '__pycache__')
    shutil.copytree(ROOT, folder, ignore=left_out)
    for name, changes in ADDITIONS.items():
        text = (folder / name).read_text()
        for before, after in changes:
            assert text.count(before) == 1, (name, before)
            text = text.replace(before, after)
        (folder / name).write_text(text)
    out = tmp_path / 'out'
    program = f'''
import main, deploy
train = ['--model', 'fivebits_deit_micro_patch16_224', '--model-kwargs', 'depth=2', 'patch_size=8', '--input-size',
         '16', '--data-set', 'FIRST_DIGITS', '--data-path', '.', '--epochs', '8', '--batch-size', '32', '--num_workers',
         '0', '--warmup-epochs', '0', '--lr', '2e-2', '--no-repeated-aug', '--device', 'cpu', '--drop-path', '0',
         '--weight-decay', '0', '--output_dir', {str(out)!r}]
assert main.main(train) == 0
assert deploy.main(['pack', {str(out / 'checkpoint.pth')!r}]) == 0
for arithmetic in ('float', 'int8'):
    assert deploy.main(['eval', {str(out / 'checkpoint.qvit.safetensors')!r}, '--data-path', '.', '--num_workers', '0',
                        '--arithmetic', arithmetic]) == 0
'''
    done = subprocess.run([sys.executable, '-c', program], cwd=folder, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    trained, packed, integer = [float(value) for value in re.findall(r'\* Acc@1 (\S+)', done.stdout)[-3:]]
    assert trained > 50 and packed == pytest.approx(trained, abs=1) and integer == pytest.approx(trained, abs=2)
    assert 'loss_size: ' in done.stdout


# --- own classes ------------------------------------------------------------------------------------------------------


@pytest.mark.whole_run
@pytest.mark.processes
def test_own_classes(tmp_path):
    """Photos in a folder with spaces and accents become a packed file by one script, which goes on where it stopped."""
    photos, out, rng = tmp_path / 'Meine Fotos é', tmp_path / 'aus gang', np.random.default_rng(0)
    for label, name in enumerate(('Bär', 'chat noir', 'dog')):
        for part, count in (('train', 8), ('val', 2)):
            (photos / part / name).mkdir(parents=True)
            for index in range(count):
                noise = rng.integers(0, 60, (50, 40, 3)) + 150 * (np.arange(3) == label)
                Image.fromarray(noise.astype(np.uint8)).save(photos / part / name / f'Foto {index}.jpg')
    shape = '--model-kwargs depth=1 embed_dim=24 num_heads=2 --num_workers 0 --device cpu --no-native-kernels'
    env = os.environ | {'PYTHON': sys.executable, 'EPOCHS': '1', 'BATCH': '8', 'FLAGS': shape}
    command = ['bash', ROOT / 'examples/own_classes.sh', photos, out, '96']
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    opened = open_network(out / 'low-bit/best_checkpoint.qvit.safetensors')
    assert opened.info.classes == ['Bär', 'chat noir', 'dog'] and opened.info.input_size == 96
    card = (out / 'low-bit/model_card.md').read_text()
    assert 'images of the folder `Meine Fotos é`' in card and 'IMNET, after' not in card
