"""A run that was interrupted, however it was, ends with the same checkpoint as one that was not, bit for bit."""

import copy
import json
import os
import shutil
import signal
import time
from argparse import Namespace

import pytest
import torch
from helpers import TINY, Fork, assert_same, run, run_and_keep

import engine
from checkpoints.files import read_checkpoint, write_checkpoint
from files.paths import checksum
from training.state import Training

pytestmark = [pytest.mark.usefixtures('one_thread'), pytest.mark.whole_run]
BATCHES, EPOCHS = 11, 3


@pytest.fixture(scope='module')
def flags(teacher_path):
    """With randomness of every kind: augmentation, drop path, mixup."""
    return (*TINY, '--epochs', EPOCHS, '--teacher-path', teacher_path, '--distillation-type', 'hard', '--mixup', '0.8',
            '--cutmix', '1', '--model-ema', '--model-ema-decay', '0.9')


@pytest.fixture(scope='module')
def whole(flags, tmp_path_factory):
    """The folder of an uninterrupted run, with every checkpoint.pth that it had on the way as <epoch>-<step>.pth."""
    folder = tmp_path_factory.mktemp('whole')
    torch.set_num_threads(1)
    run_and_keep(folder, *flags)
    return folder


def assert_same_run(folder, whole):
    for name in ('checkpoint.pth', 'best_checkpoint.pth'):
        ours, expected = read_checkpoint(folder / name), read_checkpoint(whole / name)
        assert {'model', 'optimizer', 'lr_scheduler', 'epoch', 'scaler', 'qvit', 'step', 'max_accuracy', 'rng',
                'model_ema', 'args'} == set(ours)
        for state in (ours, expected):
            state.pop('args')
        assert_same(ours, expected)
    logs = [[json.loads(line) for line in (f / 'log.txt').read_text().splitlines()] for f in (folder, whole)]
    ours, expected = ([(line['epoch'], line['test_acc1'], line['test_ema_loss']) for line in log] for log in logs)
    assert ours == expected


def assert_same_log(folder, whole):
    """What was logged is the same in every figure, those of training included (the teacher is evaluated once a run)."""
    logs = [[json.loads(line) for line in (f / 'log.txt').read_text().splitlines()] for f in (folder, whole)]
    assert logs[0] == logs[1] and 'train_loss' in logs[0][0]


@pytest.mark.parametrize(('name', 'workers'), [('0-0', 0), ('0-0', 2), ('1-0', 0), (f'1-{BATCHES}', 0)])
def test_continues_after_an_epoch(flags, whole, tmp_path, name, workers):
    for file in ('log.txt', 'best_checkpoint.pth'):
        shutil.copy(whole / file, tmp_path / file)
    shutil.copy(whole / f'{name}.pth', tmp_path / 'checkpoint.pth')
    assert run(*flags, '--output_dir', tmp_path, '--resume', 'auto', '--num_workers', workers) == 0
    assert_same_run(tmp_path, whole)


@pytest.mark.parametrize(('number', 'workers', 'at'), [(signal.SIGTERM, 2, 6), (signal.SIGINT, 0, BATCHES + 2)])
def test_a_signal_ends_the_batch_and_the_run_continues_there(
        flags, whole, tmp_path, monkeypatch, capsys, number, workers, at):
    update, calls = Training.update, []

    def update_and_signal(self, *args):
        update(self, *args)
        calls.append(None)
        if len(calls) == at:
            os.kill(os.getpid(), number)

    monkeypatch.setattr(Training, 'update', update_and_signal)
    before = signal.getsignal(number)
    assert run(*flags, '--output_dir', tmp_path, '--num_workers', workers) == 128 + number
    assert len(calls) == at
    assert signal.getsignal(number) == before
    epoch, batches = divmod(at, BATCHES)
    assert f'stopped by a signal in epoch {epoch} after batch {batches} of {BATCHES}' in capsys.readouterr().out
    state = read_checkpoint(tmp_path / 'checkpoint.pth')
    assert (state['epoch'], state['step']) == (epoch, batches)
    assert run(*flags, '--output_dir', tmp_path, '--resume', 'auto', '--num_workers', workers) == 0
    assert_same_run(tmp_path, whole)
    assert_same_log(tmp_path, whole)


def test_a_signal_during_evaluation(flags, whole, tmp_path, monkeypatch):
    evaluate = engine.evaluate

    def signal_and_evaluate(*args, **options):
        os.kill(os.getpid(), signal.SIGTERM)
        return evaluate(*args, **options)

    with monkeypatch.context() as patch:
        patch.setattr(engine, 'evaluate', signal_and_evaluate)
        assert run(*flags, '--output_dir', tmp_path) == 143
    state = read_checkpoint(tmp_path / 'checkpoint.pth')
    assert (state['epoch'], state['step'], state['max_accuracy']) == (0, BATCHES, -1)
    assert not (tmp_path / 'log.txt').exists()
    assert run(*flags, '--output_dir', tmp_path, '--resume', 'auto') == 0
    assert_same_run(tmp_path, whole)
    assert_same_log(tmp_path, whole)


@pytest.mark.processes
@pytest.mark.parametrize(('epoch', 'batch'), [(0, 8), (1, 4), (2, 0), (2, 10)])
def test_killed_within_an_epoch(flags, whole, tmp_path, epoch, batch):
    process = Fork(tmp_path, *flags, '--output_dir', tmp_path)
    while not (process.stdout.exists() and f'Epoch: [{epoch}]  [{batch:2d}/' in process.stdout.read_text()):
        time.sleep(0.01)
    process.kill()
    assert process.wait() == -signal.SIGKILL
    assert run(*flags, '--output_dir', tmp_path, '--resume', 'auto') == 0
    assert_same_run(tmp_path, whole)


def test_stops_between_updates_only(tmp_path, monkeypatch):
    accumulating = (*TINY, '--epochs', 1, '--grad-accum-steps', 4)
    assert run(*accumulating, '--output_dir', tmp_path / 'whole') == 0
    update = Training.update

    def signal_in_the_next_batch(self, *args):
        update(self, *args)
        signal.raise_signal(signal.SIGTERM)

    with monkeypatch.context() as patch:
        patch.setattr(Training, 'update', signal_in_the_next_batch)
        assert run(*accumulating, '--output_dir', tmp_path) == 143
    assert read_checkpoint(tmp_path / 'checkpoint.pth')['step'] == 4
    assert run(*accumulating, '--output_dir', tmp_path, '--resume', 'auto') == 0
    ours, expected = (read_checkpoint(folder / 'checkpoint.pth') for folder in (tmp_path, tmp_path / 'whole'))
    for key in ('model', 'optimizer', 'rng'):
        assert_same(ours[key], expected[key], key)


def test_position_needs_the_same_batches(flags, whole, tmp_path, capsys):
    assert run(*flags, '--resume', whole / f'1-{BATCHES}.pth', '--batch-size', 64) == 2
    assert 'within epoch 1, which continues only with the same --batch-size' in capsys.readouterr().err


def test_a_changed_schedule_is_followed_from_the_epoch_on(flags, whole, tmp_path, capsys):
    assert run(*flags, '--resume', whole / '1-0.pth', '--lr', '4e-2', '--output_dir', tmp_path) == 0
    assert 'lr_scheduler: not taken (--scaled-lr)' in capsys.readouterr().out
    usual, changed = (json.loads((f / 'log.txt').read_text().splitlines()[-1])['train_lr'] for f in (whole, tmp_path))
    # Both at the same place of the cosine, which ends at 1e-5.
    assert (changed - 1e-5) / (usual - 1e-5) == pytest.approx((1e-2 - 1e-5) / (2.5e-3 - 1e-5))


def test_continues_from_a_released_file_and_says_what_it_lacks(flags, whole, tmp_path, capsys):
    state = read_checkpoint(whole / '1-0.pth')
    released = {key: state[key] for key in ('model', 'optimizer', 'lr_scheduler', 'epoch', 'scaler')}
    name = 'fourbits_deit_tiny_patch16_224'
    torch.save(released | {'args': Namespace(lr=3e-4, model=name)}, tmp_path / 'released.pth')
    assert run(*flags, '--resume', tmp_path / 'released.pth', '--model', name, '--output_dir', tmp_path) == 0
    said = capsys.readouterr().out
    for part in ('optimizer', 'lr_scheduler', 'model_ema', 'rng'):
        assert said.count(f'released.pth: {part}: n') == 1, said
    logs = [json.loads((folder / 'log.txt').read_text().splitlines()[-1]) for folder in (tmp_path, whole)]
    assert [log['epoch'] for log in logs] == [2, 2]
    assert logs[0]['train_lr'] == pytest.approx(logs[1]['train_lr'])


def test_other_classes_or_damaged_entries_are_refused_in_one_line(flags, whole, tmp_path, capsys):
    path, state = tmp_path / 'checkpoint.pth', read_checkpoint(whole / '0-0.pth')
    for change, line in ((lambda state: state['qvit']['classes'].reverse(), "was trained with class '9' where"),
                         (lambda state: state.update(epoch='x'), "its entry epoch is 'x'"),
                         (lambda state: state['rng'][0].pop('numpy'), 'its entry rng is'),
                         (lambda state: state['optimizer']['state'][0]['exp_avg'].resize_(1), 'has exp_avg missing'),
                         (lambda state: state.update(step=10 ** 6), 'batches of its epoch done')):
        damaged = copy.deepcopy(state)
        change(damaged)
        torch.save(damaged, path)
        assert run(*flags, '--output_dir', tmp_path, '--resume', 'auto') == 2
        err = capsys.readouterr().err
        assert line in err and err.count('\n') == 1


# --- the files that a run is made of ----------------------------------------------------------------------------------


def test_a_changed_teacher_or_start_is_noticed(teacher_path, tmp_path, capsys):
    """What a repeated command line resumes is a student of the file that is named now."""
    teacher, start, out = tmp_path / 'teacher.pth', tmp_path / 'start.pth', tmp_path / 'out'
    shutil.copy(teacher_path, teacher)
    shutil.copy(teacher_path, start)
    flags = (*TINY, '--epochs', 1, '--batch-size', 512, '--teacher-path', teacher, '--distillation-type', 'hard',
             '--finetune', start, '--output_dir', out, '--resume', 'auto')
    assert run(*flags) == 0 and run(*flags) == 0
    assert 'another file' not in capsys.readouterr().out
    other = read_checkpoint(teacher_path)
    other['model']['head.bias'] += 1
    for path, flag in ((teacher, '--teacher-path'), (start, '--finetune')):
        before = path.read_bytes()
        write_checkpoint(other, path)
        assert run(*flags) == 2
        said = capsys.readouterr().err
        assert f'{flag} {path} is another file than the one that {out / "checkpoint.pth"} was made of' in said
        assert 'name another --output_dir' in said and said.count('\n') == 1
        path.write_bytes(before)
    # A checkpoint that is named is continued, with a word, and still says what the run began with.
    write_checkpoint(other, teacher)
    named = (*flags[:flags.index('--finetune')], '--epochs', 2, '--output_dir', out, '--resume', out / 'checkpoint.pth')
    assert run(*named) == 0
    assert f'warning: --teacher-path {teacher} is another file' in capsys.readouterr().out
    sources = read_checkpoint(out / 'checkpoint.pth')['args'].sources
    assert sources == {'finetune': checksum(start), 'teacher_path': checksum(teacher)}
