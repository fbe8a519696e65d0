"""Runs in two processes, by each of the launchers."""

import os
import re
import signal
import socket
import sys

import pytest
import torch
import torch.distributed as dist
from helpers import TINY, Fork, assert_same, fork_ranks, launch, run
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook

import main
import utils
from checkpoints.files import read_checkpoint
from training import rendezvous, signals
from training.state import Training

pytestmark = [pytest.mark.usefixtures('one_thread'), pytest.mark.processes]
BATCHES = 5  # of an epoch on each rank


@pytest.fixture(scope='module')
def flags(teacher_path):
    return (*TINY, '--epochs', 2, '--teacher-path', teacher_path, '--distillation-type', 'hard', '--model-ema',
            '--model-ema-decay', '0.9', '--dist-eval', '--repeated-aug', '--mixup', '0.2')


@pytest.fixture(scope='module')
def whole(flags, tmp_path_factory):
    """The folder of an uninterrupted run, where each rank left what it ended with as rank<number>.pth."""
    folder = tmp_path_factory.mktemp('whole')

    def record():
        fit = main.fit

        def fit_and_record(network, training, *rest):
            finished = fit(network, training, *rest)
            state = {'model': training.model.state_dict(), 'model_ema': training.ema.module.state_dict(),
                     'optimizer': training.optimizer.state_dict()}
            torch.save(state, folder / f'rank{os.environ["RANK"]}.pth')
            return finished

        main.fit = fit_and_record

    torch.set_num_threads(1)
    fork_ranks(folder, *flags, '--output_dir', folder, prepare=record)
    return folder


def test_ranks_end_alike(whole):
    ranks = [read_checkpoint(whole / f'rank{rank}.pth') for rank in (0, 1)]
    assert_same(*ranks)
    state = read_checkpoint(whole / 'checkpoint.pth')
    for key, value in ranks[0].items():
        assert_same(state[key], value)
    assert not any(name.startswith(('module.', '_orig_mod.')) for name in state['model'])
    # Not the same randomness on every rank.
    assert len(state['rng']) == 2 and not torch.equal(state['rng'][0]['torch'], state['rng'][1]['torch'])
    # Only rank 0 speaks, and the ranks share the 1442 images of an epoch (repeated augmentation rounds them down).
    said = (whole / '0/stdout.txt').read_text()
    assert said.count('Max accuracy') == 2 and (whole / '1/stdout.txt').read_text() == ''
    assert f'[{BATCHES - 1}/{BATCHES}]' in said
    assert '256 images an update, learning rate 0.005' in said


def signal_one() -> None:
    """Within rank 1, lets SIGTERM come after the second update."""
    update, calls = Training.update, []

    def update_and_signal(self, *args):
        update(self, *args)
        calls.append(None)
        if os.environ['RANK'] == '1' and len(calls) == 2:
            os.kill(os.getpid(), signal.SIGTERM)

    Training.update = update_and_signal


def test_ranks_stop_together_and_continue(flags, whole, tmp_path):
    # They agree at the next log line.
    ranks = fork_ranks(tmp_path, *flags, '--output_dir', tmp_path, '--print-freq', '3', prepare=signal_one,
                       status=143)
    assert 'stopped by a signal in epoch 0 after batch 4 of 5' in ranks[0].stdout.read_text()
    fork_ranks(tmp_path, *flags, '--output_dir', tmp_path, '--resume', 'auto')
    ours, expected = (read_checkpoint(folder / 'checkpoint.pth') for folder in (tmp_path, whole))
    for state in (ours, expected):
        state.pop('args')
    assert_same(ours, expected)


def test_ranks_stop_by_time_however_rare_log_lines_are(tmp_path):
    def signal_one_and_ask_often():
        signals.ASK_EVERY = 0.
        signal_one()

    ranks = fork_ranks(tmp_path, *TINY, '--epochs', 1, '--output_dir', tmp_path, '--print-freq', 1000,
                       prepare=signal_one_and_ask_often, status=143)
    assert 'stopped by a signal in epoch 0 after batch 2 of 5' in ranks[0].stdout.read_text()
    assert [rank.stderr.read_text() for rank in ranks] == ['', '']
    assert read_checkpoint(tmp_path / 'checkpoint.pth')['step'] == 2


def test_a_rank_that_is_lost_is_one_line(tmp_path):
    def kill_one():
        update = Training.update

        def update_or_die(self, *args):
            if os.environ['RANK'] == '1':
                os.kill(os.getpid(), signal.SIGKILL)
            update(self, *args)

        Training.update = update_or_die

    with socket.socket() as probe:
        probe.bind(('localhost', 0))
        port = probe.getsockname()[1]
    ranks = [Fork(tmp_path / str(rank), *TINY, '--epochs', 1, prepare=kill_one, RANK=rank, LOCAL_RANK=rank,
                  WORLD_SIZE=2, MASTER_ADDR='localhost', MASTER_PORT=port) for rank in (0, 1)]
    assert [rank.wait() for rank in ranks] == [1, -signal.SIGKILL]
    line, = ranks[0].stderr.read_text().splitlines()
    assert line.startswith('error: process 0 of 2: another process of the run has ended (')


def test_three_ranks_continue_bit_for_bit(tmp_path):
    """From three on, the order in which ranks' gradients are added depends on their place in DDP's buckets."""
    flags = (*TINY, '--epochs', 2, '--batch-size', 64)
    fork_ranks(tmp_path / 'whole', *flags, '--output_dir', tmp_path / 'whole', number=3)
    fork_ranks(tmp_path / 'first', *flags, '--output_dir', tmp_path / 'run', number=3, prepare=stop_after_an_epoch,
               status=143)
    assert read_checkpoint(tmp_path / 'run' / 'checkpoint.pth')['epoch'] == 0
    fork_ranks(tmp_path / 'second', *flags, '--output_dir', tmp_path / 'run', '--resume', 'auto', number=3)
    ours, expected = (read_checkpoint(tmp_path / name / 'checkpoint.pth') for name in ('run', 'whole'))
    for key in ('model', 'optimizer', 'rng'):
        assert_same(ours[key], expected[key], key)


def stop_after_an_epoch() -> None:
    end_epoch = Training.end_epoch

    def end_and_signal(self):
        end_epoch(self)
        os.kill(os.getpid(), signal.SIGTERM)

    Training.end_epoch = end_and_signal


def test_accumulated_gradients_are_reduced_once_an_update(tmp_path):
    def count():
        fit = main.fit

        def fit_and_count(network, *rest):
            reduced = []

            def count_and_reduce(group, bucket: dist.GradBucket) -> torch.futures.Future[torch.Tensor]:
                reduced.append(len(bucket.gradients()))
                return allreduce_hook(group, bucket)

            network.register_comm_hook(None, count_and_reduce)
            finished = fit(network, *rest)
            torch.save({'reduced': reduced, 'trained': sum(p.requires_grad for p in network.parameters()),
                        'views': network.gradient_as_bucket_view}, tmp_path / f'{os.environ["RANK"]}.pth')
            return finished

        main.fit = fit_and_count

    fork_ranks(tmp_path, *TINY, '--epochs', 1, '--grad-accum-steps', 2, prepare=count)
    for rank in (0, 1):
        seen = read_checkpoint(tmp_path / f'{rank}.pth')
        # The batches of an epoch make updates of 2, 2 and 1; a bucket has room for so small a network.
        assert seen['reduced'] == [seen['trained']] * 3 and seen['views']


def test_started_by_launch(flags, whole, tmp_path):
    done = launch(*flags, '--output_dir', tmp_path)
    assert done.returncode == 0, done.stderr
    assert_same(*(read_checkpoint(folder / 'checkpoint.pth')['model'] for folder in (tmp_path, whole)))


def test_evaluation_counts_every_image_once(tmp_path, teacher_path, capsys):
    flags = ('--eval', '--resume', teacher_path, '--device', 'cpu', '--num_workers', 0, '--batch-size', 100)
    assert run(*flags) == 0
    alone = capsys.readouterr().out
    for extra in ((), ('--dist-eval',)):
        said = fork_ranks(tmp_path, *flags, *extra)[0].stdout.read_text()
        for pattern in (r'Accuracy of the network on the 355 test images: .*', r'\* Acc@1 .*'):
            assert re.findall(pattern, said) == re.findall(pattern, alone) != []
        # 150 images a batch, of 178 or of all 355
        assert ('[1/2]' if extra else '[2/3]') in said


def test_slurm_variables_and_one_line_for_all_ranks(tmp_path):
    slurm = {'SLURM_STEP_NUM_TASKS': 2, 'SLURM_STEP_NODELIST': 'localhost', 'MASTER_PORT': 20000 + os.getpid() % 20000}
    ranks = [Fork(tmp_path / str(rank), *TINY, '--batch-size', 722, SLURM_PROCID=rank, SLURM_LOCALID=rank, **slurm)
             for rank in (0, 1)]
    assert [rank.wait() for rank in ranks] == [2, 2]
    errors = [line for rank in ranks for line in rank.stderr.read_text().splitlines() if line.startswith('error: ')]
    assert errors == ['error: --batch-size 722, but an epoch has 721 images for each process: choose a smaller one']
    assert '--world-size 2' in ranks[0].stdout.read_text() and ranks[1].stdout.read_text() == ''


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
    assert rendezvous.launched_as() == expected


def test_address_from_slurm(monkeypatch, tmp_path):
    for name in ('MASTER_ADDR', 'MASTER_PORT'):
        monkeypatch.setenv(name, 'set so that it is put back')
        monkeypatch.delenv(name)
    monkeypatch.setenv('SLURM_STEP_NODELIST', 'node[07-09]')
    monkeypatch.setenv('SLURM_JOB_ID', '123')
    monkeypatch.setenv('PATH', str(tmp_path))
    with pytest.raises(utils.UserError, match=r'node\[07-09\]: set MASTER_ADDR'):
        rendezvous._address_from_slurm()
    (tmp_path / 'scontrol').write_text('#!/bin/sh\necho node07; echo node08; echo node09\n')
    (tmp_path / 'scontrol').chmod(0o755)
    rendezvous._address_from_slurm()
    assert (os.environ['MASTER_ADDR'], os.environ['MASTER_PORT']) == ('node07', '10123')


def test_other_ranks_leave_a_mistake_to_rank_0(monkeypatch, capsys):
    monkeypatch.setattr(sys, 'stdout', sys.stdout)
    monkeypatch.setenv('RANK', '1')
    monkeypatch.setenv('WORLD_SIZE', '2')
    assert run('--epochs', 0) == 2
    assert capsys.readouterr().err == ''


@pytest.mark.parametrize(('local_rank', 'visible', 'index'), [(0, 1, 0), (3, 1, 0), (3, 4, 3), (1, 8, 1)])
def test_the_gpu_of_a_process(monkeypatch, local_rank, visible, index):
    """A launcher may show each process its own GPU alone, which then is number 0."""
    monkeypatch.setattr(torch.cuda, 'device_count', lambda: visible)
    assert rendezvous._gpu_of(local_rank, 4) == index


def test_too_few_gpus_are_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, 'device_count', lambda: 2)
    with pytest.raises(utils.UserError, match='4 processes on a node with 2 GPUs'):
        rendezvous._gpu_of(2, 4)


def test_a_single_process_uses_the_gpu_that_it_is_told(monkeypatch):
    chosen = []
    monkeypatch.setattr(torch.cuda, 'set_device', chosen.append)
    for name in ('RANK', 'WORLD_SIZE'):
        monkeypatch.delenv(name, raising=False)
    device, ranks = rendezvous.init_distributed('cuda:1', 1, 'env://')
    assert device == torch.device('cuda:1') and chosen == [device] and ranks == (0, 1)
