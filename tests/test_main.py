"""The command line: whole runs on the embedded data, and what is refused."""

import json
import re
import shlex
import subprocess
import sys
from argparse import Namespace
from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from helpers import ROOT, SHAPE, TINY, run
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import main
import run_with_submitit
from _quan_base import is_calibrated, named_quantizers
from checkpoints.files import read_checkpoint
from checkpoints.networks import open_checkpoint, open_network
from training import networks

pytestmark = pytest.mark.usefixtures('one_thread')


@pytest.fixture(scope='module')
def student(teacher_path, tmp_path_factory):
    """The folder of a run with teacher, DGD, a full-precision start and averaged weights."""
    folder = tmp_path_factory.mktemp('student')
    with pytest.MonkeyPatch.context() as patch:
        said = []
        patch.setattr('builtins.print', lambda *parts, **_: said.append(' '.join(map(str, parts))))
        torch.set_num_threads(1)
        assert run(*TINY, '--epochs', 3, '--lr', '2e-2', '--finetune', teacher_path, '--teacher-path', teacher_path,
                   '--distillation-type', 'hard', '--model-ema', '--model-ema-decay', '0.8', '--output_dir',
                   folder) == 0
    (folder / 'said.txt').write_text('\n'.join(said))
    return folder


# --- whole runs -------------------------------------------------------------------------------------------------------


@pytest.mark.whole_run
def test_the_log_says_what_happened(student):
    said = (student / 'said.txt').read_text()
    assert '--dgd-weight 1: the layers and heads of the teacher match' in said
    assert said.count('Accuracy of the teacher on the 355 test images') == 1
    line = r'Epoch: \[1\]  \[ 4/11\]  eta: \d:\d\d:\d\d  lr: 0\.\d{6}  loss: \d+\.\d{4} \(\d+\.\d{4}\)  ' \
           r'loss_cls: .*  loss_distill: .*  loss_dgd_q: .*  loss_dgd_k: .*  time: \d\.\d{4}  data: \d\.\d{4}'
    assert re.search(line, said)
    assert re.search(r'\* Acc@1 \d+\.\d{3} Acc@5 \d+\.\d{3} loss \d\.\d{3}', said)
    assert said.count('Accuracy of the network on the 355 test images: ') == said.count('Max accuracy: ') == 3

    log = [json.loads(text) for text in (student / 'log.txt').read_text().splitlines()]
    assert [entry['epoch'] for entry in log] == [0, 1, 2]
    assert {f'train_{key}' for key in ('lr', 'loss', 'loss_cls', 'loss_distill', 'loss_dgd_q', 'loss_dgd_k')} | {
        f'{kind}_{key}' for kind in ('test', 'test_ema') for key in ('loss', 'acc1', 'acc5')} | {
            'epoch', 'n_parameters'} == set(log[1])
    assert log[0]['teacher_acc1'] > 30
    assert log[2]['train_loss'] < log[0]['train_loss'] and log[2]['test_acc1'] > 30
    assert log[2]['test_ema_loss'] != log[2]['test_loss']
    assert f'Max accuracy: {max(entry["test_acc1"] for entry in log):.2f}%' in said


def test_the_run_is_on_record(student):
    record = json.loads((student / 'args.json').read_text())
    assert record['effective_batch'] == 128 and record['scaled_lr'] == pytest.approx(2e-2 / 4)
    assert record['args']['model'] == 'fourbits_deit_tiny_patch16_224' and record['args']['input_size'] == 16
    assert record['torch'] == torch.__version__ and record['timm'] == timm.__version__ and 'cuda' in record
    state = read_checkpoint(student / 'best_checkpoint.pth')
    assert state['args'].lr == 2e-2 and state['args'].device == 'cpu'
    assert state['qvit']['classes'] == [str(digit) for digit in range(10)] and state['qvit']['data_set'] == 'DIGITS'


def test_the_run_is_readable(student, tmp_path, capsys):
    """One flag a line that differs from its default, so that nobody looks for it; at the end what there is now."""
    said = (student / 'said.txt').read_text().splitlines()
    assert max(map(len, said)) < 400
    first = next(index for index, line in enumerate(said) if line.startswith('Q-ViT'))
    assert f'torch {torch.__version__}' in said[first] and f'timm {timm.__version__}' in said[first]
    last = next(index for index, line in enumerate(said) if line.startswith('  all other flags'))
    flags = said[first + 1:last]
    assert '  --lr 0.02' in flags and '  --model-ema' in flags and '  --no-repeated-aug' in flags
    assert '  --model-kwargs embed_dim=24 depth=2 num_heads=2 patch_size=8' in flags
    assert not any(line.startswith(('  --sched ', '  --reprob', '  --sources')) for line in flags)
    assert f'{student}/args.json' in said[last] and '128 images an update, learning rate 0.005' in said[last]
    # They are a command line of the same run.
    written = main.parse_args(shlex.split(' '.join(line for line in flags if not line.startswith('  --native'))))
    record = json.loads((student / 'args.json').read_text())['args']
    assert {name: value for name, value in vars(written).items() if record[name] != value}.keys() <= {'native_kernels'}

    end = said[next(index for index, line in enumerate(said) if line.startswith('Training time')) + 1:]
    best = max(json.loads(line)['test_acc1'] for line in (student / 'log.txt').read_text().splitlines())
    assert end[0].startswith(f'{best:.2f} % top-1: {student}/best_checkpoint.pth')
    for command in (line.partition(': ')[2] for line in '\n'.join(end).splitlines()[2:]):
        assert command.startswith(('python main.py --eval', 'python deploy.py pack')) and str(student) in command


def test_tensorboard(student):
    events = EventAccumulator(str(student / 'tensorboard'))
    events.Reload()
    tags = set(events.Tags()['scalars'])
    model = open_network(student / 'checkpoint.pth').model
    names = {name for name, _ in named_quantizers(model)}
    assert 'blocks.1.attn.attn_act' in names and 'blocks.0.mlp.fc1.act' in names and 'patch_embed.proj' in names
    assert {f'{what}/{name}' for what in ('step', 'clipped') for name in names} <= tags
    assert {f'zero_point/{name}' for name in names if name.endswith('act')} <= tags
    assert {'train/loss', 'train/loss_distill', 'train/loss_dgd_q', 'train/lr', 'train/images_per_second', 'test/acc1',
            'test_ema/acc1', 'teacher/acc1'} <= tags
    assert [event.step for event in events.Scalars('train/loss')] == [1, 5, 9, 11, 12, 16, 20, 22, 23, 27, 31, 33]
    assert [event.step for event in events.Scalars('test/acc1')] == [11, 22, 33]
    # The last values are those of the checkpoint.
    layer = model.blocks[0].mlp.fc1
    assert events.Scalars('step/blocks.0.mlp.fc1')[-1].value == pytest.approx(layer.alpha.mean().item())
    zero_point = events.Scalars('zero_point/blocks.0.mlp.fc1.act')[-1].value
    assert zero_point == pytest.approx(layer.act.zero_point.mean().item())
    outside = (layer.weight / layer.alpha[:, None] < -8) | (layer.weight / layer.alpha[:, None] > 7)
    assert events.Scalars('clipped/blocks.0.mlp.fc1')[-1].value == pytest.approx(outside.float().mean().item())


@pytest.mark.whole_run
@pytest.mark.processes
def test_the_summary_of_the_demo(student, teacher_path):
    command = [sys.executable, ROOT / 'scripts/summary.py', teacher_path.parent, student]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
    teacher, quantized = re.findall(r'^(\w+): (\d+\.\d\d) % top-1(.*)$', done.stdout, re.MULTILINE)
    best = max(json.loads(line)['test_acc1'] for line in (student / 'log.txt').read_text().splitlines())
    assert quantized[:2] == ('fourbits_deit_tiny_patch16_224', f'{best:.2f}')
    assert '4-bit weights and 4-bit activations' in quantized[2] and 'in theory' in quantized[2]
    assert teacher[0] == 'deit_tiny_distilled_patch16_224' and 'bit' not in teacher[2]


@pytest.mark.whole_run
def test_descent_to_fewer_bits(student, tmp_path, capsys, monkeypatch):
    """A quantized network is start and teacher."""
    four = student / 'best_checkpoint.pth'
    assert run('--eval', '--resume', four, '--num_workers', 0, '--device', 'cpu') == 0
    accuracy = re.search(r'\* Acc@1 \S+', capsys.readouterr().out)[0]
    assert run(*TINY, '--epochs', 1, '--model', 'threebits_deit_tiny_patch16_224', '--finetune', four, '--teacher-path',
               four, '--distillation-type', 'both', '--token-weight', '0.5', '--output_dir', tmp_path) == 0
    said = capsys.readouterr().out
    assert said.count('--finetune: the checkpoint is quantized to 4 bits') == 1 and '--calibration mse' in said
    assert accuracy in said  # of the teacher, with its own scales
    model = open_network(tmp_path / 'checkpoint.pth').model
    assert model.quant.weight_bits == 3 and is_calibrated(model)

    # A file that does not describe its network, as a teacher.
    source = open_network(four).model
    torch.save({'model': source.state_dict()}, tmp_path / 'bare.pth')
    monkeypatch.setattr(networks, 'create_network', lambda *_, **__: timm.create_model(
        'fourbits_deit_tiny_patch16_224', img_size=16, num_classes=10, embed_dim=24, depth=2,
        num_heads=2, patch_size=8))
    teacher = networks.build_teacher('fourbits_deit_tiny_patch16_224', str(tmp_path / 'bare.pth'), 10, 16, 'DIGITS')
    images = torch.randn(2, 3, 16, 16)
    assert torch.equal(teacher.eval()(images), source(images))


@pytest.mark.whole_run
def test_evaluation_needs_the_file_only(student, capsys):
    log = [json.loads(text) for text in (student / 'log.txt').read_text().splitlines()]
    assert run('--eval', '--resume', student / 'checkpoint.pth', '--model-ema', '--num_workers', 0) == 0
    said = capsys.readouterr().out
    assert f'* Acc@1 {log[-1]["test_acc1"]:.3f}' in said
    assert f'Accuracy of the averaged network on the 355 test images: {log[-1]["test_ema_acc1"]:.1f}%' in said
    if not torch.cuda.is_available():
        assert 'no CUDA GPU here: running on the CPU' in said

    for contradiction, line in (
            (('--model', 'twobits_deit_tiny_patch16_224'), 'model is fourbits_deit_tiny_patch16_224 in'),
            (('--input-size', 32), 'input_size is 16 in'), (('--model-kwargs', 'depth=3'), 'depth is 2 in'),
            (('--model-kwargs', 'irm=False'), 'irm of --model-kwargs is not in')):
        assert run('--eval', '--resume', student / 'checkpoint.pth', *contradiction) == 2
        assert line in capsys.readouterr().err


def test_a_file_of_the_released_form(student, tmp_path, capsys):
    state = read_checkpoint(student / 'checkpoint.pth')
    released = {key: state[key] for key in ('model', 'optimizer', 'lr_scheduler', 'epoch', 'scaler')}
    path = tmp_path / 'best_checkpoint.pth'
    # As torch 1.7 wrote it in its older format.
    torch.save(released | {'args': Namespace(lr=3e-4)}, path, _use_new_zipfile_serialization=False)
    assert run('--eval', '--resume', path) == 2
    assert 'does not say which network it holds: name it with --model' in capsys.readouterr().err
    log = json.loads((student / 'log.txt').read_text().splitlines()[-1])
    assert run(*TINY, '--model', 'fourbits_deit_tiny_patch16_224', '--eval', '--resume', path) == 0
    assert f'* Acc@1 {log["test_acc1"]:.3f}' in capsys.readouterr().out


@pytest.mark.whole_run
def test_options_reach_the_network(tmp_path):
    assert run(*TINY, '--epochs', 1, '--output_dir', tmp_path, '--drop', '0.1', '--model-kwargs', 'irm=False',
               'act_granularity=tensor', 'weight_bits=2', *SHAPE[1:]) == 0
    state = read_checkpoint(tmp_path / 'checkpoint.pth')
    assert state['qvit']['kwargs']['irm'] is False
    model = open_checkpoint('the file', state).model
    attention = model.blocks[0].attn
    assert attention.qkv.weight_bits == 2 and attention.qkv.act.bits == 4 and attention.q_act.alpha.numel() == 1
    assert not any('norm_q' in name for name in state['model'])


@pytest.fixture(scope='module')
def photographs(tmp_path_factory):
    """Two classes in train/, of which val/ has one."""
    root, rng = tmp_path_factory.mktemp('photographs'), np.random.default_rng(0)
    for name in ('train/a/0', 'train/a/1', 'train/b/0', 'train/b/1', 'val/b/0', 'val/b/1'):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (230, 240, 3), dtype=np.uint8)).save(f'{root / name}.jpg')
    return root


@pytest.mark.whole_run
def test_a_run_without_tensorboard(tmp_path, monkeypatch, capsys):
    for name in [name for name in sys.modules if name.startswith(('tensorboard.', 'torch.utils.tensorboard'))]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, 'tensorboard', None)
    assert run(*TINY, '--epochs', 1, '--batch-size', 512, '--output_dir', tmp_path) == 0
    assert capsys.readouterr().out.count('TensorBoard is not installed, the run writes no events') == 1
    assert (tmp_path / 'log.txt').exists() and not (tmp_path / 'tensorboard').exists()


def test_more_gpus_than_there_are(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: True)
    monkeypatch.setattr(torch.cuda, 'device_count', lambda: 2)
    assert run('--device', 'cuda:2') == 2
    assert '--device cuda:2: PyTorch finds 2 CUDA GPUs here, the first is cuda:0' in capsys.readouterr().err


@pytest.mark.whole_run
def test_the_published_commands(photographs, tmp_path, capsys):
    """As in the published README but for paths, --device, --teacher-path and the sizes."""
    torch.manual_seed(0)
    teacher = timm.create_model('vit_deit_tiny_distilled_patch16_224', num_classes=2)
    torch.save({'model': teacher.state_dict()}, tmp_path / 'teacher.pth')
    out = tmp_path / 'dist_4bit_tiny_lamb_3e-4_300_512'
    smaller = ['--device', 'cpu', '--teacher-path', tmp_path / 'teacher.pth', '--num_workers', 0]
    assert run('--model', 'fourbits_deit_tiny_patch16_224', '--epochs', 1, '--warmup-epochs', 0, '--weight-decay', '0.',
               '--batch-size', 2, '--data-path', photographs, '--lr', '3e-4', '--no-repeated-aug', '--output_dir', out,
               '--distillation-type', 'hard', '--teacher-model', 'vit_deit_tiny_distilled_patch16_224', '--opt',
               'fusedlamb', *smaller) == 0
    said = capsys.readouterr().out
    assert '--dgd-weight 1: the layers and heads of the teacher match' in said
    assert is_calibrated(open_network(out / 'best_checkpoint.pth').model)
    accuracy = re.search(r'Accuracy of the network on the 2 test images: .*', said)[0]
    assert run('--eval', '--model', 'fourbits_deit_tiny_patch16_224', '--resume', out / 'best_checkpoint.pth',
               '--data-path', photographs, '--device', 'cpu') == 0
    assert accuracy in capsys.readouterr().out


@pytest.mark.whole_run
def test_augmentation_flags_of_photographs(photographs, tmp_path):
    common = (*TINY, '--data-path', photographs, '--batch-size', 2, '--epochs', 1)
    states = []
    for flags in ((), ('--no-random-resized-crop',), ('--aa', 'none'), ('--repeated-aug',), ('--reprob', 0)):
        assert run(*common, *flags, '--output_dir', tmp_path) == 0
        states.append(read_checkpoint(tmp_path / 'checkpoint.pth')['model']['head.weight'])
    assert all(not torch.equal(states[0], other) for other in states[1:])


# --- what is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(('flags', 'line'), [
    ('--model fourbit_deit_tiny_patch16_224', 'did you mean fourbits_deit_tiny_patch16_224'),
    ('--teacher-model vit_deit_tiny_destilled_patch16_224 --distillation-type hard',
     'did you mean vit_deit_tiny_distilled_patch16_224'),
    ('--distillation-type hard', 'needs a teacher: name it with --teacher-model'),
    ('--dgd-weight 1', 'needs a teacher: name it with --teacher-model'),
    ('--teacher-model deit_tiny_patch16_224', 'the teacher has nothing to do'),
    ('--soft-labels here.pth', '--soft-labels: pass --distillation-type soft, hard or both'),
    ('--soft-labels here.pth --distillation-type soft', '--soft-labels here.pth cannot be read'),
    ('--soft-labels nowhere.pth --distillation-type soft', '--soft-labels nowhere.pth: no such file'),
    ('--soft-labels here.pth --distillation-type soft --dgd-weight 1', '--dgd-weight 1.0 needs a teacher, not'),
    ('--soft-labels here.pth --distillation-type soft --token-weight 1', '--token-weight 1.0 needs a teacher, not'),
    ('--soft-labels here.pth --distillation-type soft --teacher-model deit_tiny_patch16_224', 'stand in for a teacher'),
    ('--soft-labels here.pth --distillation-type soft --mixup 0.8', '--soft-labels are of single images'),
    ('--resume here.pth --finetune here.pth', '--resume continues a run and --finetune starts one'),
    ('--resume here.pth --start_epoch 3', '--start_epoch: the checkpoint of --resume says the epoch'),
    ('--resume auto', '--resume auto looks into --output_dir'),
    ('--resume nowhere.pth', '--resume nowhere.pth: no such file'),
    ('--finetune nowhere.pth', '--finetune nowhere.pth: no such file'),
    ('--teacher-path nowhere.pth --distillation-type hard', '--teacher-path nowhere.pth: no such file'),
    ('--eval', '--eval needs --resume'),
    ('--amp fp16 --device cpu', '--amp fp16 needs a GPU'),
    ('--device abacus', '--device abacus is unknown'),
    ('--device mps', '--device mps: PyTorch finds no such device here'),
    ('--device xpu', '--device xpu: PyTorch finds no such device here'),
    ('--device meta', '--device meta: PyTorch finds no such device here'),
    ('--device cuda:9', '--device cuda:9: PyTorch finds'),
    ('--data-set CIFAR', '--data-set CIFAR needs --data-path'),
    ('--data-set CIFAR11', "--data-set 'CIFAR11' is unknown: choose one of CIFAR, CIFAR10"),
    ('--batch-size 0', '--batch-size 0: choose a value of at least 1'),
    ('--epochs -1', '--epochs -1: choose a value of at least 1'),
    ('--grad-accum-steps 0', '--grad-accum-steps 0'),
    ('--weight-decay=-0.1', '--weight-decay -0.1: choose a value of at least 0'),
    ('--drop-path 1.5', '--drop-path 1.5: choose a value from 0 to 1'),
    ('--distillation-alpha 2', '--distillation-alpha 2.0'),
    ('--lr 0', '--lr 0.0: choose a value above 0'),
    ('--lr nan', '--lr nan'),
    ('--lr fast', 'invalid float value'),
    ('--clip-grad 0', '--clip-grad 0.0'),
    ('--batch-size 5 --mixup 0.8', '--batch-size 5: mixup and cutmix need an even one'),
    ('--model-ema-force-cpu', '--model-ema-force-cpu needs --model-ema'),
    ('--model-ema-warmup', '--model-ema-warmup needs --model-ema'),
    ('--freeze all-but-heads --oscillation-dampening 1', '--freeze all-but-heads keeps the weights as they are'),
    ('--opt adahessian', '--opt adahessian needs second derivatives'),
    ('--opt adamm', "did you mean"),
    ('--model-kwargs irm', 'is not of the form key=value'),
    ('--model-kwargs num_classes=7', '--model-kwargs num_classes: the class count follows from the data set'),
    ('--model-kwargs weight_bits=1', 'weight_bits=1: choose a whole number from 2 to 8'),
    ('--model-kwargs act_bits=2.5', 'act_bits=2.5: choose a whole number'),
    ('--model-kwargs irm=maybe', "irm='maybe': choose True or False"),
    ('--model-kwargs num_heads=0', 'cannot be built'),
    ('--model-kwargs patch_size=32 --input-size 16', 'does not divide the image size (16, 16)'),
    ('--output_dir here.pth', '--output_dir here.pth cannot be written'),
    ('--model-kwargs in_chans=2', 'the network takes 2 channels: images have 3, or 1 where they are made grey'),
    ('--mean 0.1 0.2', '--mean 0.1 0.2: choose one value, or one for each of 3 colours'),
    ('--std 0', '--std 0.0: choose a value above 0'),
    ('--model-kwargs bits=3', '--model-kwargs bits is no option that a checkpoint could describe'),
    ('--model-kwargs checkpoint_path=here.pth', '--model-kwargs checkpoint_path is no option'),
    ('--model-kwargs embed_dim=50', 'cannot be built (embed_dim 50 is not a multiple of num_heads 3)'),
    ('--world_size 4', 'start with torchrun --nproc_per_node=4'),
    ('--batch-size 2000 --epochs 1', 'an epoch has 1280 images for each process'),
    ('--learning-rate 1', 'unrecognized arguments: --learning-rate'),
    ('--config nowhere.yaml', '--config nowhere.yaml: No such file'),
    ('--config here.pth', 'is not a mapping of flags to values'),
    ('--config odd.yaml', "'batch_sizes' is no flag, did you mean batch_size"),
    ('--aa sometimes', '--aa'),
])
def test_refused_in_one_line(flags, line, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path('here.pth').write_text('just text')
    Path('odd.yaml').write_text('batch_sizes: 3')
    extra = ['--data-path', '.', '--data-set', 'IMNET'] if '--aa' in flags else []
    assert run('--num_workers', 0, '--device', 'cpu', *flags.split(), *extra) == 2
    err = capsys.readouterr().err
    assert err.startswith('error: ') and err.count('\n') == 1
    assert line in err


def test_booleans_in_any_case_and_options_over_flags():
    args = main.parse_args(['--model-kwargs', 'irm=false', 'quantize_attn=True', 'drop_path_rate=0.3'])
    assert args.model_kwargs == {'irm': False, 'quantize_attn': True, 'drop_path_rate': 0.3}
    student = networks.build_student(main.DEFAULT_MODEL, args.model_kwargs | {'depth': 2}, 10, 32,
                                     drop_path=args.drop_path)
    assert isinstance(student.blocks[0].attn.norm_q, torch.nn.Identity)
    assert student.blocks[1].drop_path.drop_prob == pytest.approx(0.3)


@pytest.mark.whole_run
def test_mistakes_that_only_the_files_show(teacher_path, photographs, tmp_path, capsys, monkeypatch):
    distill = ('--distillation-type', 'soft', '--num_workers', 0, '--device', 'cpu')
    bare = tmp_path / 'bare.pth'
    torch.save({'model': read_checkpoint(teacher_path)['model']}, bare)
    broken = photographs / 'val/b/broken.jpg'

    def offline(*_, **kwargs):
        raise ConnectionError('no network') if kwargs.get('pretrained') else AssertionError

    for flags, line in (
            ((*TINY, *distill, '--teacher-path', bare), 'name it with --teacher-model'),
            ((*TINY, *distill, '--teacher-path', bare, '--teacher-model', 'deit_tiny_patch16_224'),
             'the checkpoint is 24'),
            ((*TINY, *distill, '--teacher-path', teacher_path, '--teacher-model', 'resnet18'),
             'is of deit_tiny_distilled'),
            ((*TINY[5:], *distill, '--teacher-path', teacher_path, '--input-size', 32),
             'is for --input-size 16, not 32'),
            ((*TINY, *distill, '--teacher-model', 'deit_tiny_patch16_224'), 'has 1000 classes, DIGITS has 10'),
            ((*TINY, *distill, '--teacher-path', teacher_path, '--model-kwargs', 'num_heads=3', '--dgd-weight', 1),
             'pass --dgd-weight 0'),
            ((*TINY, *distill, '--teacher-path', teacher_path, '--model', 'deit_tiny_distilled_patch16_224',
              '--token-weight', 1), 'choose a quantized network'),
    ):
        assert run(*flags) == 2, flags
        err = capsys.readouterr().err
        assert err.count('\n') == 1 and line in err

    # Offline, and nothing in the cache.
    monkeypatch.setattr(networks, '_check_classes', lambda *_: None)
    with monkeypatch.context() as patch:
        create = timm.create_model
        patch.setattr(timm, 'create_model',
                      lambda *a, **k: offline(*a, **k) if k.get('pretrained') else create(*a, **k))
        assert run(*TINY, *distill, '--teacher-model', 'deit_tiny_patch16_224') == 2
    assert 'cannot be downloaded (ConnectionError): give them with --teacher-path' in capsys.readouterr().err

    # Met by a data-loading worker.
    broken.write_text('not an image')
    try:
        assert run(*TINY, '--data-path', photographs, '--batch-size', 2, '--num_workers', 1, '--epochs', 1) == 2
    finally:
        broken.unlink()
    err = capsys.readouterr().err
    assert err.startswith(f'error: {broken} is not a readable image') and err.count('\n') == 1


@pytest.mark.whole_run
def test_dgd_is_left_out_where_it_cannot_be_computed(teacher_path, tmp_path, capsys):
    assert run(*TINY, '--epochs', 1, '--teacher-path', teacher_path, '--distillation-type', 'soft', '--model-kwargs',
               'depth=1', *(part for part in SHAPE[1:] if 'depth' not in part), '--output_dir', tmp_path) == 0
    assert '--dgd-weight 0: the student has 1 layers, the teacher 2' in capsys.readouterr().out
    assert 'train_loss_dgd_q' not in json.loads((tmp_path / 'log.txt').read_text())


# --- flags ------------------------------------------------------------------------------------------------------------


class Watched(Namespace):
    """Flags that note which of them are asked for."""
    asked: set[str] = set()

    def __getattribute__(self, name):
        Watched.asked.add(name)
        return super().__getattribute__(name)


@pytest.mark.whole_run
def test_every_flag_has_a_reader(teacher_path, tmp_path, monkeypatch):
    """Each ends in a value that a run is built from, or is asked for by one of the jobs; checks do not count."""
    parse, asked = main.parse_args, Watched.asked
    pick, picked = main.pick, set()

    def pick_and_note(kind, values):
        picked.update(field.name for field in fields(kind))
        return pick(kind, values)

    monkeypatch.setattr(main, 'pick', pick_and_note)
    monkeypatch.setattr(main, 'parse_args', lambda argv=None: Watched(**vars(parse(argv))))
    monkeypatch.setattr(main, 'check_args', lambda _: None)
    asked.clear()
    teach = '--teacher-path', teacher_path, '--distillation-type', 'hard'
    assert run(*TINY, '--epochs', 1, *teach, '--finetune', teacher_path, '--output_dir', tmp_path) == 0
    assert run(*TINY, '--epochs', 1, *teach, '--resume', 'auto', '--output_dir', tmp_path) == 0
    assert run(*TINY, '--eval', '--model-ema', '--resume', tmp_path / 'checkpoint.pth') == 0
    flags = {action.dest for action in main.get_args_parser()._actions} - {'help'}
    assert flags - picked - asked == {'config'}, 'of these the first is read while the flags are parsed'


def test_defaults_are_those_of_the_published_runs():
    args = main.parse_args([])
    assert (args.mixup, args.cutmix, args.smoothing, args.clip_grad, args.model_ema, args.amp) == (
        0, 0, 0, None, False, 'none')
    assert (args.batch_size, args.epochs, args.lr, args.opt, args.min_lr, args.warmup_epochs, args.drop_path) == (
        64, 300, 5e-4, 'adamw', 1e-5, 5, 0.1)
    assert args.repeated_aug and args.random_resized_crop and args.distillation_type == 'none'


def test_config_sets_what_the_command_line_leaves_open(tmp_path):
    path = tmp_path / 'recipe.yaml'
    path.write_text('lr: 3e-4\nbatch_size: 128\nrepeated-aug: false\nmodel-ema: true\ndist-eval: true\neval: false\n'
                    'opt-betas: [0.8, 0.9]\nmodel-kwargs: {irm: false, depth: 2}\nclip-grad: null\n')
    args = main.parse_args(['--config', str(path), '--batch-size', '32', '--no-model-ema', '--model-kwargs', 'depth=3'])
    assert (args.lr, args.batch_size, args.repeated_aug, args.model_ema, args.dist_eval, args.eval, args.clip_grad) == (
        3e-4, 32, False, False, True, False, None)
    assert args.opt_betas == [0.8, 0.9] and args.model_kwargs == {'irm': False, 'depth': 3}
    path.write_text('distillation-type: firm\n')
    with pytest.raises(main.UserError, match='invalid choice'):
        main.parse_args(['--config', str(path)])


@pytest.mark.parametrize('path', sorted((ROOT / 'configs').glob('*.yaml')), ids=lambda path: path.stem)
def test_recipes(path, tmp_path):
    flags = ['--config', str(path), '--data-path', str(tmp_path), '--device', 'cpu']
    if path.stem.startswith(('best_', 'calibrate_')):
        with pytest.raises(main.UserError, match='fits to full-precision weights|--finetune, full-precision weights'):
            main.check_args(main.parse_args(flags))
        weights = tmp_path / 'weights.pth'
        weights.touch()
        flags += ['--finetune', str(weights)]
    if path.stem.startswith('calibrate_'):
        weights = tmp_path / 'weights.pth'
        weights.touch()
        args = main.parse_args([*flags, '--finetune', str(weights)])
        main.check_args(args)
        assert args.eval and args.calibration == 'reconstruct' and args.model == 'fourbits_deit_tiny_patch16_224'
        assert args.model_kwargs == {'calibrate_8bit': {'weight_bits': 8, 'act_bits': 8},
                                     'calibrate_6bit': {'weight_bits': 6, 'act_bits': 6},
                                     'calibrate_4bit_weights': {'act_bits': 8}}[path.stem]
        return
    args = main.parse_args(flags)
    main.check_args(args)
    if path.stem.startswith('calibrate_'):
        bits = path.stem.removeprefix('calibrate_').partition('bit')[0]
        assert args.eval and args.calibration == 'reconstruct'
        assert dict(args.model_kwargs) == ({'act_bits': 8} if path.stem.endswith('_weights') else
                                           {'weight_bits': int(bits), 'act_bits': int(bits)})
        assert args.model == 'fourbits_deit_tiny_patch16_224'
        return
    bits = {'2': 'two', '3': 'three', '4': 'four'}[path.stem[-4]]
    size = 'tiny' if 'tiny' in path.stem else 'small'
    assert args.model == f'{bits}bits_deit_{size}_patch16_224'
    if path.stem.startswith('best_'):  # start and teacher are the same network
        assert args.teacher_model == f'deit_{size}_patch16_224' and args.calibration == 'mse'
        assert (args.weight_decay, args.warmup_epochs, args.opt) == (0, 0, 'fusedlamb')
        return
    assert args.teacher_model == f'vit_deit_{size}_distilled_patch16_224' and args.calibration == 'published'
    assert args.repeated_aug == (size == 'small')
    assert (args.batch_size * 4, args.lr, args.weight_decay, args.warmup_epochs, args.opt) == (
        512, 3e-4, 0, 0, 'fusedlamb')


def test_submitit_is_optional(capsys, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, 'submitit', None)
    assert run_with_submitit.submit(['--nodes', '2', '--epochs', '3']) == 2
    assert capsys.readouterr().err == 'error: submitit is not installed: pip install submitit\n'
    assert run_with_submitit.submit(['--epochz', '3']) == 2
    assert 'unrecognized arguments: --epochz' in capsys.readouterr().err
    args, flags = run_with_submitit.parse_args(['--nodes', '2', '--epochs', '3', '--output_dir', 'x'])
    assert args.nodes == 2 and flags == ['--epochs', '3', '--output_dir', 'x']


def test_numbers_of_a_job_are_checked(capsys):
    for flags, line in ((['--nodes', '-1'], '--nodes -1: choose'), (['--ngpus', '99999'], '--ngpus 99999: choose')):
        assert run_with_submitit.submit(flags) == 2
        assert line in capsys.readouterr().err
