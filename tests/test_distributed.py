"""Runs in two processes, by each of the launchers."""

import json
import os
import re
import subprocess
import sys

import pytest
import torch
from helpers import ROOT, TINY, environment, launch, run

import utils
from checkpoints import read_checkpoint

pytestmark = pytest.mark.usefixtures('one_thread')
BATCHES = 5  # of an epoch on each rank

# Runs main.py, and leaves what each rank ends with. One rank signals itself after STOP_AFTER updates.
RECORDER = '''
import os, signal, sys
import torch
import engine, main
from training import Training

fit, update, calls = engine.fit, Training.update, []

def fit_and_record(network, training, *rest):
    fit(network, training, *rest)
    torch.save({'model': training.model.state_dict(), 'ema': training.ema.module.state_dict(),
                'optimizer': training.optimizer.state_dict()}, f'{sys.argv[1]}/rank{os.environ["RANK"]}.pt')

def update_and_signal(self, *args):
    update(self, *args)
    calls.append(None)
    if os.environ['RANK'] == '1' and len(calls) == int(os.environ.get('STOP_AFTER', -1)):
        os.kill(os.getpid(), signal.SIGTERM)

main.fit, Training.update = fit_and_record, update_and_signal
sys.exit(main.main(sys.argv[2:]))
'''


def assert_same(a, b):
    torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)


def test_two_processes_end_alike_and_can_be_stopped(tmp_path, teacher_path):
    script = tmp_path / 'recorder.py'
    script.write_text(RECORDER)
    flags = (*TINY, '--epochs', 2, '--teacher-path', teacher_path, '--distillation-type', 'hard', '--model-ema',
             '--model-ema-decay', '0.9', '--dist-eval', '--repeated-aug', '--mixup', '0.2')

    done = launch('launch', script, tmp_path, *flags, '--output_dir', tmp_path / 'whole')
    assert done.returncode == 0, done.stderr
    ranks = [torch.load(tmp_path / f'rank{rank}.pt') for rank in (0, 1)]
    assert_same(*ranks)
    # Only rank 0 speaks, and the epoch is shared: 1442 images, rounded down by repeated augmentation.
    assert done.stdout.count('Max accuracy') == 2
    assert f'[{BATCHES - 1}/{BATCHES}]' in done.stdout
    assert '"effective_batch": 256, "scaled_lr": 0.005' in done.stdout
    assert 'Accuracy of the network on the 355 test images' in done.stdout
    state = read_checkpoint(tmp_path / 'whole/checkpoint.pth')
    assert_same(state['model'], ranks[0]['model'])
    assert not any(name.startswith(('module.', '_orig_mod.')) for name in state['model'])
    # Not the same randomness on every rank.
    assert len(state['rng']) == 2 and not torch.equal(state['rng'][0]['torch'], state['rng'][1]['torch'])

    # All ranks stop where the first log line after the signal is; then they continue to the same end.
    stopped = launch('run', script, tmp_path, *flags, '--output_dir', tmp_path / 'stopped', STOP_AFTER=2)
    assert stopped.returncode == 0, stopped.stderr
    assert f'stopped by a signal in epoch 0 after batch {BATCHES} of {BATCHES}' in stopped.stdout
    resumed = launch('run', script, tmp_path, *flags, '--output_dir', tmp_path / 'stopped', '--resume', 'auto')
    assert resumed.returncode == 0, resumed.stderr
    ours = read_checkpoint(tmp_path / 'stopped/checkpoint.pth')
    for key in ('model', 'model_ema', 'optimizer', 'lr_scheduler', 'rng', 'max_accuracy', 'epoch', 'step'):
        assert_same(ours[key], state[key])

    # Shared evaluation gives what a single process finds.
    log = [json.loads(line) for line in (tmp_path / 'whole/log.txt').read_text().splitlines()]
    assert run('--eval', '--resume', tmp_path / 'whole/checkpoint.pth', '--device', 'cpu', '--num_workers', 0) == 0
    assert log[-1]['test_acc1'] * 355 / 100 == pytest.approx(round(log[-1]['test_acc1'] * 355 / 100))


def test_evaluation_in_two_processes_counts_every_image_once(tmp_path, teacher_path, capsys):
    flags = ('--eval', '--resume', teacher_path, '--device', 'cpu', '--num_workers', 0, '--batch-size', 100)
    assert run(*flags) == 0
    alone = capsys.readouterr().out
    for extra in ((), ('--dist-eval',)):
        done = launch('run', ROOT / 'main.py', *flags, *extra)
        assert done.returncode == 0, done.stderr
        for pattern in (r'Accuracy of the network on the 355 test images: .*', r'\* Acc@1 .*'):
            assert re.findall(pattern, done.stdout) == re.findall(pattern, alone) != []
        # 150 images a batch, 178 of 355 images a rank
        assert f'[1/{2 if extra else 3}]' in done.stdout


def test_slurm_variables_and_one_line_for_all_ranks(tmp_path):
    slurm = {'SLURM_STEP_NUM_TASKS': 2, 'SLURM_STEP_NODELIST': 'localhost', 'MASTER_PORT': 20000 + os.getpid() % 20000}
    ranks = [subprocess.Popen([sys.executable, ROOT / 'main.py', *TINY, '--batch-size', '722'], text=True,
                              stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                              env=environment(**slurm, SLURM_PROCID=rank, SLURM_LOCALID=rank)) for rank in (0, 1)]
    outputs = [rank.communicate(timeout=120) for rank in ranks]
    assert [rank.returncode for rank in ranks] == [2, 2]
    errors = [line for _, stderr in outputs for line in stderr.splitlines() if line.startswith('error: ')]
    assert errors == ['error: --batch-size 722, but an epoch has 721 images for each process: choose a smaller one']
    assert '"world_size": 2' in outputs[0][0] and outputs[1][0] == ''


@pytest.mark.parametrize(('variables', 'expected'), [
    ({}, (0, 1, 0, 1)),
    ({'RANK': 3, 'WORLD_SIZE': 4, 'LOCAL_RANK': 1, 'LOCAL_WORLD_SIZE': 2}, (3, 4, 1, 2)),
    ({'SLURM_PROCID': 3, 'SLURM_STEP_NUM_TASKS': 4, 'SLURM_STEP_NUM_NODES': 2, 'SLURM_LOCALID': 1}, (3, 4, 1, 2)),
    # A batch script of a job with several tasks, which srun did not start.
    ({'SLURM_PROCID': 0, 'SLURM_NTASKS': 4, 'SLURM_LOCALID': 0}, (0, 1, 0, 1)),
])
def test_launched_as(monkeypatch, variables, expected):
    for name in (*variables, 'RANK', 'WORLD_SIZE', 'SLURM_PROCID', 'SLURM_STEP_NUM_TASKS'):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, str(value))
    assert utils.launched_as() == expected


def test_address_from_slurm(monkeypatch, tmp_path):
    for name in ('MASTER_ADDR', 'MASTER_PORT'):
        monkeypatch.setenv(name, 'set so that it is put back')
        monkeypatch.delenv(name)
    monkeypatch.setenv('SLURM_STEP_NODELIST', 'node[07-09]')
    monkeypatch.setenv('SLURM_JOB_ID', '123')
    monkeypatch.setenv('PATH', str(tmp_path))
    with pytest.raises(utils.UserError, match=r'node\[07-09\]: set MASTER_ADDR'):
        utils._address_from_slurm()
    (tmp_path / 'scontrol').write_text('#!/bin/sh\necho node07; echo node08; echo node09\n')
    (tmp_path / 'scontrol').chmod(0o755)
    utils._address_from_slurm()
    assert (os.environ['MASTER_ADDR'], os.environ['MASTER_PORT']) == ('node07', '10123')


def test_other_ranks_leave_a_mistake_to_rank_0(monkeypatch, capsys):
    monkeypatch.setenv('RANK', '1')
    monkeypatch.setenv('WORLD_SIZE', '2')
    assert run('--epochs', 0) == 2
    assert capsys.readouterr().err == ''
