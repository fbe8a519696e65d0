"""What a launcher says in the environment, and processes that wait for others."""

import re
import socket

import pytest
from helpers import run

from training import rendezvous
from utils import Ranks, RunError, UserError

NAMES = ('RANK', 'WORLD_SIZE', 'LOCAL_RANK', 'LOCAL_WORLD_SIZE', 'MASTER_ADDR', 'MASTER_PORT', 'SLURM_PROCID',
         'SLURM_LOCALID', 'SLURM_STEP_NUM_TASKS', 'SLURM_STEP_NUM_NODES', 'SLURM_STEP_NODELIST', 'SLURM_JOB_NODELIST',
         'SLURM_JOB_ID')
TWO = {'RANK': '0', 'WORLD_SIZE': '2', 'MASTER_ADDR': 'localhost', 'MASTER_PORT': '1234'}
STEP = {'SLURM_PROCID': '0', 'SLURM_STEP_NUM_TASKS': '2'}


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(rendezvous, 'MEETING_LIMIT', 0.4)
    monkeypatch.setattr(rendezvous, 'SAID_EVERY', 0.05)
    monkeypatch.setattr(rendezvous, 'ATTEMPT', 0.1)
    for name in NAMES:
        monkeypatch.setenv(name, '')  # so that it is put back
        monkeypatch.delenv(name)


@pytest.mark.parametrize(('variables', 'line'), [
    ({'RANK': '5', 'WORLD_SIZE': '1'}, 'RANK=5 in the environment: the launcher sets a whole number from 0 to 0'),
    ({'RANK': '-1', 'WORLD_SIZE': '1'}, 'RANK=-1'),
    ({'RANK': 'one', 'WORLD_SIZE': '1'}, 'RANK=one'),
    ({'RANK': '0', 'WORLD_SIZE': '0'}, 'WORLD_SIZE=0 in the environment: the launcher sets a whole number of at least'),
    ({'RANK': '0', 'WORLD_SIZE': ''}, 'WORLD_SIZE= in'),
    ({'RANK': '0', 'WORLD_SIZE': '²'}, 'WORLD_SIZE='),
    (TWO | {'LOCAL_RANK': 'x'}, 'LOCAL_RANK=x'),
    (TWO | {'LOCAL_RANK': '2'}, 'LOCAL_RANK=2 in the environment: the launcher sets a whole number from 0 to 1'),
    (TWO | {'LOCAL_WORLD_SIZE': '0'}, 'LOCAL_WORLD_SIZE=0'),
    (TWO | {'LOCAL_WORLD_SIZE': '3'}, 'LOCAL_WORLD_SIZE=3'),
    (TWO | {'MASTER_PORT': 'http'}, 'MASTER_PORT=http in the environment: the launcher sets a whole number from 1 to'),
    (TWO | {'MASTER_PORT': '65536'}, 'MASTER_PORT=65536'),
    ({name: value for name, value in TWO.items() if name != 'MASTER_PORT'}, 'MASTER_PORT= in'),
    (STEP | {'SLURM_STEP_NUM_TASKS': 'two'}, 'SLURM_STEP_NUM_TASKS=two'),
    (STEP | {'SLURM_STEP_NUM_NODES': '0'}, 'SLURM_STEP_NUM_NODES=0'),
    (STEP | {'SLURM_PROCID': '2'}, 'SLURM_PROCID=2'),
    (STEP | {'SLURM_LOCALID': 'a'}, 'SLURM_LOCALID=a'),
    (STEP | {'SLURM_JOB_ID': '12_3'}, 'SLURM_JOB_ID=12_3'),
])
def test_malformed_variables_are_refused_in_one_line(monkeypatch, capsys, variables, line):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert run('--device', 'cpu', '--num_workers', 0) == 2
    err = capsys.readouterr().err
    assert err.startswith(f'error: {line}') and err.count('\n') == 1


@pytest.mark.parametrize('url', ['', 'tcp://', 'tcp://host', 'tcp://host:port', 'http://host:1', 'file://'])
def test_places_that_cannot_be_met_at(url):
    with pytest.raises(UserError, match=f'--dist_url {re.escape(url)}: choose env://, tcp://HOST:PORT'):
        rendezvous._meet(url, Ranks(0, 2))


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(('localhost', 0))
        return probe.getsockname()[1]


def test_who_waits_says_for_whom_and_gives_up(capsys):
    place = f'localhost:{free_port()}'
    with pytest.raises(RunError, match=f'^1 of 2 processes have met at {place}, since ..:..:..: given up after'):
        rendezvous._meet(f'tcp://{place}', Ranks(0, 2))
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) >= 2
    assert all(re.fullmatch(f'1 of 2 processes have met at {place}, since ..:..:..; for at most .* minutes', line)
               for line in lines)


def test_rank_0_that_does_not_come_is_missed(capfd):
    place = f'localhost:{free_port()}'
    with pytest.raises(RunError, match=f'^process 1 of 2 waits for process 0 at {place}, since ..:..:..: given'):
        rendezvous._meet(f'tcp://{place}', Ranks(1, 2))
    lines = capfd.readouterr().err.splitlines()
    assert lines and all(line.startswith(f'process 1 of 2 waits for process 0 at {place}') for line in lines)


def test_a_port_that_others_use_is_refused():
    with socket.socket() as other:
        other.bind(('', 0))
        other.listen()
        with pytest.raises(UserError, match='is in use: choose another'):
            rendezvous._meet(f'tcp://localhost:{other.getsockname()[1]}', Ranks(0, 2))


def test_processes_meet_by_a_file(tmp_path):
    rendezvous._meet(f'file://{tmp_path}/store', Ranks(0, 1))
