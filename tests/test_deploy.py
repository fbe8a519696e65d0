"""deploy.py on a small network of digits: pack, inspect, eval, predict, onnx; and what is refused, by bench, too."""

import json
import os
import re
import stat
from argparse import Namespace
from pathlib import Path

import pytest
import timm
import torch
from helpers import SHARED, require
from helpers import run as main_run
from PIL import Image

import cost
import deploy
import main
from _quan_base import first_batch_rule
from calibration.first_batch import calibrate
from calibration.scales import weight_scales
from checkpoints.files import read_checkpoint
from checkpoints.full_precision import load_full_precision
from checkpoints.networks import ModelInfo, open_network
from datasets import Digits, build_transform
from deployment import packing
from deployment.integer import IntegerViT
from deployment.predictor import TERMS
from training import networks

pytestmark = [pytest.mark.usefixtures('one_thread'), pytest.mark.slow]
NAME = 'fourbits_deit_tiny_patch16_224'
KWARGS = {'depth': 2, 'patch_size': 8, 'embed_dim': 128, 'num_heads': 2}
DATA = SHARED / 'data'
DEIT, PHOTOGRAPHS = DATA / 'deit_tiny_patch16_224-fp16.pth', DATA / 'imagenet-mini'
TRANSFORM = build_transform(False, 32, 'DIGITS')
BATCH = ('--num_workers', 0, '--batch-size', 100)


def run(*flags: object) -> int:
    return deploy.main([str(flag) for flag in flags])


def least_squares_rule(x, qn, qp):
    return weight_scales(x, qn, qp), torch.zeros(())


def fitted(**kwargs) -> torch.nn.Module:
    """A calibrated network with random blocks, whose heads are the ridge regression of the digits on its features."""
    digits = Digits(True, TRANSFORM)
    images = torch.stack([digits[index][0] for index in range(len(digits))])
    targets = torch.nn.functional.one_hot(torch.tensor(digits.targets)).float()
    torch.manual_seed(0)
    model = timm.create_model(NAME, num_classes=10, img_size=32, **KWARGS, **kwargs)
    calibrate(model, images[::8])
    with torch.no_grad():
        tokens = model.eval().forward_features(images)
        for head, x in ((model.head, tokens[:, 0]), (model.head_dist, tokens[:, 1])):
            head.weight.copy_(torch.linalg.solve(x.T @ x + torch.eye(x.shape[1]), x.T @ (targets - 0.1)).T * 10)
    calibrate(model, images[::8])
    return model


@pytest.fixture(scope='module')
def folder(tmp_path_factory) -> Path:
    """checkpoint.pth, and checkpoint.qvit.safetensors of it."""
    path = tmp_path_factory.mktemp('deploy')
    torch.set_num_threads(1)
    info = ModelInfo(NAME, KWARGS, 10, 32, Digits.classes, 'DIGITS')
    torch.save({'model': fitted().state_dict(), 'qvit': info.to_dict()}, path / 'checkpoint.pth')
    assert run('pack', path / 'checkpoint.pth') == 0
    return path


@pytest.fixture(scope='module')
def packed(folder) -> Path:
    return folder / 'checkpoint.qvit.safetensors'


# --- pack and inspect -------------------------------------------------------------------------------------------------


def test_pack_says_the_sizes(folder, tmp_path, capsys):
    output = tmp_path / 'own.safetensors'
    assert run('pack', folder / 'checkpoint.pth', '--output', output, '--model', NAME) == 0
    assert output.read_bytes() == (folder / 'checkpoint.qvit.safetensors').read_bytes()
    size = output.stat().st_size
    full = 4 * sum(value.numel() for value in read_checkpoint(folder / 'checkpoint.pth')['model'].values())
    first, *parts = capsys.readouterr().out.splitlines()
    assert first == (f'{output}: {size / 1e6:.2f} MB, {full / size:.2f} times smaller than the {full / 1e6:.2f} MB of '
                     f'float32 in {folder / "checkpoint.pth"}')
    sizes = {name.strip(): int(number.replace(',', '')) for name, number in
             (re.match(r'  (.{22}) *([\d,]+) bytes', part).groups() for part in parts)}
    assert sum(sizes.values()) == size
    # By hand: width 128, 2 blocks of 12 width^2 4-bit codes; 3 x 8 x 8 pixels and 2 x 10 classes in 8 bits; float32
    # embeddings of 16 patches and 2 tokens, and the tokens; norms over the width 5 times and 4 over heads 64 wide.
    assert sizes['weight codes'] == 2 * 12 * 128 ** 2 // 2 + 128 * 192 + 2 * 10 * 128
    assert sizes['embeddings'] == 4 * (18 + 2) * 128
    assert sizes['norms'] == 4 * 2 * (5 * 128 + 4 * 64)
    assert sizes['biases'] == 4 * (2 * (3 + 1 + 4 + 1) * 128 + 128 + 2 * 10)
    # A scale for each output; a scale and a zero point for each channel of an input: those of the four layers, q, k, v
    # and attention for a head, 3 colours, and the heads' 128.
    assert sizes['steps and zero points'] == 4 * (2 * 9 * 128 + 128 + 20 + 2 * (2 * (7 * 128 + 4 * 2) + 3 + 2 * 128))


def test_pack_of_a_released_file(tmp_path, capsys):
    """Without a description: class count and image size are those of the tensors."""
    model = timm.create_model(NAME, num_classes=7, img_size=48)
    state = {name: torch.ones_like(value) if name.endswith('init_state') else value
             for name, value in model.state_dict().items()}
    path = tmp_path / 'released.pth'
    torch.save({'model': state, 'args': Namespace(lr=1.)}, path)
    assert run('pack', path) == 2
    assert 'does not say which network it holds: name it with --model' in capsys.readouterr().err
    assert run('eval', path) == 2
    assert 'name it with --model' in capsys.readouterr().err
    assert run('pack', path, '--model', 'fourbit_deit_tiny_patch16_224') == 2
    assert f'did you mean {NAME}' in capsys.readouterr().err
    assert run('pack', path, '--model', NAME) == 0
    info = open_network(tmp_path / 'released.qvit.safetensors').info
    assert (info.model, info.num_classes, info.input_size) == (NAME, 7, 48)


def test_inspect(packed, capsys):
    assert run('inspect', packed, '--json') == 0
    found = json.loads(capsys.readouterr().out)
    assert found['bytes'] == packed.stat().st_size == sum(found['parts'].values())
    assert sum(row['bytes'] for row in found['tensors']) == found['bytes'] - found['parts']['header']
    assert sum(row['share'] for row in found['tensors']) == pytest.approx(1 - found['parts']['header'] / found['bytes'])
    assert all(found['parts'][part] == sum(row['bytes'] for row in found['tensors'] if row['part'] == part)
               for part in set(packing.PARTS) - {'header'})
    assert found['description']['classes'] == Digits.classes and found['description']['kwargs'] == KWARGS
    model = open_network(packed).model
    rows = {row['name']: row for row in found['tensors']}
    fc1 = model.blocks[1].mlp.fc1
    codes = fc1.to_int()
    assert rows['blocks.1.mlp.fc1.weight'] == {
        'name': 'blocks.1.mlp.fc1.weight', 'part': 'weight codes', 'bits': 4, 'shape': [512, 128], 'bytes': 32768,
        'share': 32768 / found['bytes'], 'min': codes.min().item(), 'max': codes.max().item()}
    assert rows['pos_embed']['max'] == model.pos_embed.max().item() and rows['pos_embed']['bits'] == 32
    assert found['activations']['blocks.1.mlp.fc1.act'] == {'bits': 4, 'signed': fc1.act.signed_codes}

    assert run('inspect', packed) == 0
    said = capsys.readouterr().out
    assert f'{NAME} with depth=2, patch_size=8, embed_dim=128, num_heads=2, 10 classes, 32 px, data set DIGITS' in said
    assert re.search(r'blocks\.1\.mlp\.fc1\.weight +4 +512 x 128 +32,768 +11\.\d% +-\d to \d', said)


# --- eval -------------------------------------------------------------------------------------------------------------


def results(said: str) -> list[str]:
    return re.findall(r'\* Acc@1 .*', said)


def accuracies(said: str) -> list[float]:
    return [float(line.split()[2]) for line in results(said)]


def test_eval_is_that_of_main(folder, packed, capsys):
    assert main.main(['--eval', '--resume', str(folder / 'checkpoint.pth'), *map(str, BATCH)]) == 0
    expected, = results(capsys.readouterr().out)
    accuracy, = accuracies(expected)
    assert accuracy > 45
    for file in (packed, folder / 'checkpoint.pth'):
        assert run('eval', file, '--arithmetic', 'float', '--checkpoint', folder / 'checkpoint.pth', *BATCH) == 0
        said = capsys.readouterr().out
        assert results(said) == [expected, expected]
        assert 'Both predict the same class for 355 of 355 images: 100.0%' in said
        assert f'in float on the 355 test images: {accuracy:.1f}%' in said


@pytest.mark.parametrize('arithmetic', ['int8', 'int8x2'])
def test_eval_in_integers(arithmetic, folder, packed, capsys):
    assert run('eval', packed, '--arithmetic', arithmetic, '--backend', 'torch', '--checkpoint',
               folder / 'checkpoint.pth', *BATCH) == 0
    said = capsys.readouterr().out
    ours, theirs = accuracies(said)
    assert theirs > 45 and abs(ours - theirs) < 5
    same = int(re.search(r'the same class for (\d+) of 355', said)[1])
    network, model = IntegerViT(open_network(packed).model, TERMS[arithmetic]), open_network(packed).model
    digits = Digits(False, TRANSFORM)
    labels = [torch.cat([net(torch.stack([digits[i][0] for i in range(start, min(start + 150, 355))])).argmax(1)
                         for start in range(0, 355, 150)]) for net in (network, model)]
    assert same == (labels[0] == labels[1]).sum()


def test_eval_of_some_images(packed, capsys):
    assert run('eval', packed, '--limit', 7, '--backend', 'torch', *BATCH) == 0
    assert 'on the 7 test images' in capsys.readouterr().out


def test_every_backend_predicts_alike(packed, capsys):
    """auto says in a line why where there are no native kernels."""
    for backend in ('auto', 'torch'):
        assert run('eval', packed, '--backend', backend, *BATCH) == 0
    first, second = accuracies(capsys.readouterr().out)
    assert abs(first - second) < 1.5  # the order of additions flips a few codes


# --- predict and onnx -------------------------------------------------------------------------------------------------


def test_predict(packed, tmp_path, capsys):
    digits = Digits(False, TRANSFORM)
    paths = [tmp_path / f'{index}.png' for index in (0, 200)]
    for path, index in zip(paths, (0, 200), strict=True):
        Image.fromarray(digits.images[index]).save(path)
    assert run('predict', *paths, '--packed', packed, '--top', 3, '--arithmetic', 'float') == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 8 and [lines[0], lines[4]] == list(map(str, paths))
    with torch.no_grad():
        logits = open_network(packed).model(torch.stack([digits[0][0], digits[200][0]]))
    for row, said in zip(logits.softmax(1), (lines[1:4], lines[5:8]), strict=True):
        best = row.argsort(descending=True)[:3].tolist()
        assert [line.split() for line in said] == [[f'{100 * row[label]:.1f}', '%', str(label)] for label in best]


def test_onnx(packed, tmp_path, capsys):
    require('onnx')
    runtime = require('onnxruntime')
    path = tmp_path / 'network.onnx'
    assert run('onnx', packed, '--output', path) == 0
    assert f'{path}: {path.stat().st_size / 1e6:.2f} MB, {NAME}' in capsys.readouterr().out
    images = torch.randn(3, 3, 32, 32)
    session = runtime.InferenceSession(str(path), providers=['CPUExecutionProvider'])
    logits = session.run(None, {session.get_inputs()[0].name: images.numpy()})[0]
    assert logits.shape == (3, 10)
    assert run('onnx', packed, '--output', tmp_path / 'four.onnx', '--weights', 'int4') == 0
    assert (tmp_path / 'four.onnx').stat().st_size < path.stat().st_size


# --- help and what is refused -----------------------------------------------------------------------------------------


@pytest.mark.parametrize('command', ['', 'pack', 'inspect', 'eval', 'predict', 'onnx', 'bench'])
def test_examples_of_the_help_are_right(command, capsys):
    with pytest.raises(SystemExit) as left:
        run(*filter(None, [command]), '--help')
    said = capsys.readouterr().out
    examples = re.findall(r'^ +python deploy\.py ((?:\S+ ?)+)', said, re.MULTILINE)
    assert left.value.code == 0
    commands = [deploy.get_args_parser().parse_args(example.split()).command for example in examples]
    if command == '':
        assert commands == ['pack', 'inspect', 'eval', 'predict', 'onnx', 'bench', 'push']
    else:
        assert commands and set(commands) == {command}


@pytest.mark.parametrize(('flags', 'line'), [
    ('', 'required: COMMAND'),
    ('unpack f', "invalid choice: 'unpack'"),
    ('pack nowhere.pth', 'nowhere.pth: no such checkpoint file'),
    ('pack text.pth', 'text.pth: truncated or damaged, or not a PyTorch checkpoint'),
    ('pack packed.safetensors', 'packed.safetensors is packed already'),
    ('pack checkpoint.pth --output file.pth', '--output file.pth: choose a name that ends in .safetensors'),
    ('pack checkpoint.pth --output nowhere/file.safetensors', 'cannot be written'),
    ('pack checkpoint.pth --model twobits_deit_tiny_patch16_224', f'model is {NAME} in checkpoint.pth: leave --model'),
    ('pack teacher.pth', 'teacher.pth holds deit_tiny_patch16_224, which is of full precision'),
    ('pack empty.pth --model ' + NAME, 'the checkpoint holds no vision transformer'),
    ('inspect checkpoint.pth', 'checkpoint.pth: truncated or damaged, or not a safetensors file'),
    ('inspect cut.safetensors', 'cut.safetensors: truncated or damaged'),
    ('eval cut.safetensors', 'cut.safetensors: truncated or damaged'),
    ('eval nowhere.safetensors', 'nowhere.safetensors: no such'),
    ('eval packed.safetensors --backend native --arithmetic float', '--backend native is for integers'),
    ('eval packed.safetensors --backend native --device cuda:7', '--device cuda:7 cannot be used'),
    ('predict text.pth --packed packed.safetensors --device teapot', '--device teapot cannot be used'),
    ('eval packed.safetensors --limit 0', '--limit 0: choose a value of at least 1'),
    ('eval packed.safetensors --data-path .', '--data-path .: the data set is DIGITS, which comes with'),
    ('eval packed.safetensors --data-set IMNET', '--data-set IMNET needs --data-path'),
    ('eval packed.safetensors --data-set IMNET --data-path nowhere', '--data-path nowhere is not a folder'),
    ('eval packed.safetensors --data-set IMNET --data-path photographs', 'has 1 class folders, not 10'),
    ('eval packed.safetensors --arithmetic int4', "invalid choice: 'int4'"),
    ('predict text.pth --packed packed.safetensors', 'text.pth is not a readable image'),
    ('predict text.pth --packed packed.safetensors --top 0', '--top 0: choose a value of at least 1'),
    ('predict text.pth', 'required: --packed'),
    ('onnx packed.safetensors', 'required: --output'),
    ('bench packed.safetensors --runs 0', '--runs: choose values of at least 1'),
    ('bench packed.safetensors --json nowhere/x.json', 'nowhere/x.json cannot be written: there is no folder nowhere'),
    ('bench --model resnet50', '--model resnet50 is unknown'),
    ('bench --contenders abacus', "invalid choice: 'abacus'"),
])
def test_refused_in_one_line(flags, line, folder, packed, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path('checkpoint.pth').symlink_to(folder / 'checkpoint.pth')
    Path('packed.safetensors').symlink_to(packed)
    Path('cut.safetensors').write_bytes(packed.read_bytes()[:-1])
    Path('text.pth').write_text('just text')
    torch.save({'model': {'bias': torch.zeros(1)}}, 'empty.pth')
    (tmp_path / 'photographs' / 'val' / 'a').mkdir(parents=True)
    if 'teacher' in flags:
        teacher = timm.create_model('deit_tiny_patch16_224', num_classes=10, img_size=32, **KWARGS)
        info = ModelInfo('deit_tiny_patch16_224', KWARGS, 10, 32)
        torch.save({'model': teacher.state_dict(), 'qvit': info.to_dict()}, 'teacher.pth')
    assert run(*flags.split()) == 2
    said = capsys.readouterr()
    assert said.err.startswith('error: ') and said.err.count('\n') == 1
    assert line in said.err


# --- real data --------------------------------------------------------------------------------------------------------


@pytest.mark.skipif(not (DEIT.is_file() and PHOTOGRAPHS.is_dir()), reason='DeiT-Tiny or its photographs are missing')
def test_a_calibrated_deit_on_photographs(tmp_path, capsys):
    """8 bits, so that the calibrated network is right without training."""
    transform = build_transform(False, 224)
    files = sorted((PHOTOGRAPHS / 'val').glob('*/*'))
    images = torch.stack([transform(Image.open(path).convert('RGB')) for path in files[::82]])
    kwargs = {'weight_bits': 8, 'act_bits': 8}
    model = timm.create_model(NAME, **kwargs)
    load_full_precision(model, read_checkpoint(DEIT))
    calibrate(model, images)
    classes = sorted(path.name for path in (PHOTOGRAPHS / 'train').iterdir())
    info = ModelInfo(NAME, kwargs, 1000, 224, classes, 'IMNET')
    torch.save({'model': model.state_dict(), 'qvit': info.to_dict()}, tmp_path / 'checkpoint.pth')
    assert run('pack', tmp_path / 'checkpoint.pth') == 0
    packed = tmp_path / 'checkpoint.qvit.safetensors'
    assert run('eval', packed, '--data-path', PHOTOGRAPHS, '--limit', 12, '--arithmetic', 'int8x2', '--checkpoint',
               tmp_path / 'checkpoint.pth', *BATCH) == 0
    said = capsys.readouterr().out
    assert min(accuracies(said)) >= 30 and int(re.search(r'the same class for (\d+) of 12', said)[1]) >= 10
    tench = next(path for path in files if path.parent.name == 'n01440764')
    capsys.readouterr()
    assert run('predict', tench, '--packed', packed, '--top', 1) == 0
    with torch.no_grad():
        label = model.eval()(transform(Image.open(tench).convert('RGB'))[None]).argmax()
    assert f'({classes[label]})' in capsys.readouterr().out


# --- full precision, packed files elsewhere ---------------------------------------------------------------------------


def bare_deit(path, classes=1000):
    torch.manual_seed(0)
    model = timm.create_model('deit_tiny_patch16_224', num_classes=classes, img_size=32, depth=2)
    described = ModelInfo('deit_tiny_patch16_224', {'depth': 2}, classes, 32, data_set='DIGITS').to_dict()
    torch.save({'model': model.state_dict()} | ({'qvit': described} if path.stem == 'described' else {}), path)
    return model.eval()


def test_full_precision_is_evaluated_and_exported(tmp_path, capsys):
    """Whatever file of it: what cannot be done with full precision says how to quantize it."""
    path = tmp_path / 'described.pth'
    bare_deit(path, 10)
    assert run('eval', path, '--num_workers', 0) == 0
    said = capsys.readouterr().out
    assert 'a network of full precision: computed in float32' in said and 'Accuracy of the network in float32' in said
    accuracy = re.search(r'\* Acc@1 \S+', said)[0]
    picture = tmp_path / 'a b.png'
    Image.new('RGB', (40, 40)).save(picture)
    assert run('predict', picture, '--packed', path, '--top', 1) == 0
    assert run('eval', path, '--backend', 'native', '--num_workers', 0) == 2
    for flags in (('--eval', '--resume', path), ('--eval', '--finetune', path, '--model', 'deit_tiny_patch16_224')):
        assert main_run(*flags, '--num_workers', 0, '--device', 'cpu') == 0
        assert accuracy in capsys.readouterr().out
    for command in ('pack', 'bench'):
        assert run(command, path) == 2
        said = capsys.readouterr().err
        assert 'is of full precision: quantize it first' in said and f'--finetune {path}' in said
        assert 'out/calibrated.pth' in said and said.count('\n') == 1


@pytest.mark.parametrize('name', [None, 'deit_tiny_patch16_224'])
def test_every_command_takes_the_name_of_a_network(tmp_path, capsys, name):
    path = tmp_path / 'bare.pth'
    torch.save({'model': timm.create_model('deit_tiny_patch16_224', num_classes=10, img_size=32).state_dict()}, path)
    picture = tmp_path / 'a.png'
    Image.new('RGB', (40, 40)).save(picture)
    named = () if name is None else ('--model', name)
    for command in (('eval', path, '--num_workers', 0), ('predict', picture, '--packed', path)):
        assert run(*command, *named) == (2 if name is None else 0)
        assert ('name it with --model' in capsys.readouterr().err) == (name is None)


def test_onnx_of_full_precision(tmp_path, capsys):
    require('onnx')
    path = tmp_path / 'described.pth'
    bare_deit(path)
    assert run('onnx', path, '--output', tmp_path / 'a.onnx') == 0
    assert run('onnx', path, '--output', tmp_path / 'a.onnx', '--weights', 'int4') == 2
    assert '--weights int4' in capsys.readouterr().err


def test_packed_files_are_read_by_every_command(packed, tmp_path, capsys):
    shape = ('--input-size', 32, '--num_workers', 0, '--device', 'cpu')
    assert main_run('--eval', '--resume', packed, '--num_workers', 0, '--device', 'cpu') == 0
    accuracy = re.search(r'\* Acc@1 \S+', capsys.readouterr().out)[0]
    assert run('eval', packed, '--arithmetic', 'float', '--num_workers', 0) == 0
    assert accuracy in capsys.readouterr().out
    assert cost.main(['--checkpoint', str(packed)]) == 0
    assert main_run(*shape, '--resume', packed, '--epochs', 1) == 2
    assert 'a packed file, which holds no state of training: start from it with --finetune' in capsys.readouterr().err
    info = open_network(packed).info
    teacher = networks.build_teacher(None, str(packed), info.num_classes, info.input_size, 'DIGITS').eval()
    images = torch.randn(2, 3, info.input_size, info.input_size)
    assert torch.equal(teacher(images), open_network(packed).model(images))


def test_a_packed_file_is_for_everybody_to_read(packed):
    mask = os.umask(0)
    os.umask(mask)
    assert stat.S_IMODE(os.stat(packed).st_mode) == 0o666 & ~mask


@pytest.mark.parametrize(('own', 'named', 'word'), [
    ('four', 'two', 'with more bits'), ('two', 'four', 'with fewer bits'), ('four', 'four', None),
    ('two', 'two', None)])
@pytest.mark.parametrize('rule', [first_batch_rule, least_squares_rule])
def test_a_file_named_as_of_other_bits(own, named, word, rule, tmp_path, capsys):
    torch.manual_seed(0)
    source = timm.create_model(f'{own}bits_deit_tiny_patch16_224', img_size=32, num_classes=10)
    calibrate(source, torch.randn(4, 3, 32, 32), rule)
    torch.save({'model': source.state_dict()}, tmp_path / 'bare.pth')
    assert run('pack', tmp_path / 'bare.pth', '--model', f'{named}bits_deit_tiny_patch16_224') == 0
    said = capsys.readouterr().out
    assert ('warning' in said) == (word is not None) and (word is None or word in said)
