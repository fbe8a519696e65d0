"""What all command lines have in common: spellings of flags, `~`, help in no time, pipes that close early."""
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import ROOT

import cost
import datasets
import deploy
import engine
import losses
import main
import model_card
import soft_labels
import visualize
from console.parser import path_text
from files.readers import READERS
from training import networks


def test_every_flag_has_both_spellings():
    parser = main.get_args_parser()
    for flag in [flag for action in parser._actions for flag in action.option_strings if flag.startswith('--')]:
        for spelled in ('--' + flag[2:].replace('-', '_'), '--' + flag[2:].replace('_', '-')):
            assert parser.as_defined(spelled) == flag and parser.as_defined(f'{spelled}=a_b-c') == f'{flag}=a_b-c'
    assert parser.as_defined('--un_known-flag') == '--un_known-flag'


@pytest.mark.parametrize('flags', ['--batch_size 7', '--batch_size=7', '--batch-size 7', '--batch-size=7'])
def test_both_spellings_mean_the_same(flags):
    assert main.parse_args(flags.split()).batch_size == 7
    assert deploy.get_args_parser().parse_args(['eval', 'x', *flags.split()]).batch_size == 7


def test_values_stay_as_they_are():
    args = main.parse_args(['--data_path', 'a_b-c', '--no_repeated_aug', '--output-dir=--x_y'])
    assert (args.data_path, args.repeated_aug, args.output_dir) == ('a_b-c', False, '--x_y')


# --- `~` --------------------------------------------------------------------------------------------------------------

def commands():
    """(parser, option or positional) of every path that any command takes."""
    parsers = {'main': main, 'cost': cost, 'soft_labels': soft_labels, 'model_card': model_card}
    for name, module in parsers.items():
        yield name, module.get_args_parser()
    for module in (deploy, visualize):
        for name, parser in module.get_args_parser()._subparsers._group_actions[0].choices.items():
            yield f'{module.__name__} {name}', parser


NAMED = [(command, action) for command, parser in commands() for action in parser._actions
         if action.metavar in ('FILE', 'DIR', 'CHECKPOINT', 'IMAGE', 'RUN')]


def test_paths_are_all_looked_at():
    assert len(NAMED) >= 35 and {'main', 'cost', 'deploy pack', 'visualize qk'} <= {command for command, _ in NAMED}


@pytest.mark.parametrize(('command', 'action'), NAMED, ids=lambda value: getattr(value, 'dest', value))
def test_home_is_expanded(command, action, monkeypatch):
    monkeypatch.setenv('HOME', '/home of/somebody')
    assert str(action.type('~/a b')) == '/home of/somebody/a b'
    assert str(action.type('a~b')) == 'a~b'


def test_home_is_expanded_in_configs(monkeypatch, tmp_path):
    monkeypatch.setenv('HOME', str(tmp_path))
    (tmp_path / 'x.yaml').write_text('output_dir: ~/out\ndata-path: ~/photos\nfinetune: ~/a.pth\n'
                                     'class_map: ~/names.txt\n')
    args = main.parse_args(['--config', '~/x.yaml'])
    for value, name in ((args.output_dir, 'out'), (args.data_path, 'photos'), (args.finetune, 'a.pth'),
                        (args.class_map, 'names.txt')):
        assert value == f'{tmp_path}/{name}'


def test_addresses_stay():
    assert [path_text(text) for text in ('https://host/~user/x.pth', 'auto')] == ['https://host/~user/x.pth', 'auto']


# --- help -------------------------------------------------------------------------------------------------------------


@pytest.mark.processes
def test_help_imports_nothing_heavy():
    began = os.times().children_user
    done = subprocess.run([sys.executable, '-X', 'importtime', ROOT / 'main.py', '--help'], capture_output=True,
                          text=True, timeout=60)
    assert done.returncode == 0 and os.times().children_user - began < 2
    imported = set(re.findall(r'\| +([\w.]+)$', done.stderr, re.MULTILINE))
    assert 'yaml' in imported and not imported & {'torch', 'numpy', 'timm', 'torchvision', 'sklearn'}
    groups = re.findall(r'^(\w[\w ]*):$', done.stdout, re.MULTILINE)
    assert {'model', 'optimizer and schedule', 'teacher', 'calibration', 'data and evaluation', 'run'} <= set(groups)


def test_choices_that_help_knows_without_imports_are_those_of_the_code():
    choices = {action.dest: action.choices for action in main.get_args_parser()._actions}
    assert set(choices['amp']) == set(engine.AMP_DTYPES)
    assert choices['distillation_type'] == losses.DISTILLATION_TYPES
    assert set(choices['calibration']) == set(networks.CALIBRATIONS)
    assert choices['freeze'] == networks.FREEZINGS
    told = {action.dest: action.help for action in main.get_args_parser()._actions}
    names = re.findall(r'[A-Z]+[0-9]*(?=[ ,])', told['data_set'].partition(';')[0])
    assert sorted(names) == sorted(datasets.DATASETS)
    assert re.findall(r'(\w+)/\.\.\.', told['data_set']) == [*READERS]
    assert told['inat_category'].partition(' (')[0].replace(' or ', ', ').split(', ') == [*datasets.INAT_CATEGORIES]


@pytest.mark.processes
def test_output_that_nobody_reads_on():
    """As `... | head -1`."""
    shell = f'set -o pipefail; {sys.executable} {ROOT / "main.py"} --help | head -1'
    done = subprocess.run(['bash', '-c', shell], capture_output=True, text=True, timeout=60)
    assert done.stdout.startswith('usage') and done.stderr == ''
    shell = f'{sys.executable} {ROOT / "cost.py"} --model deit_tiny_patch16_224 --per-layer --format csv | head -1'
    done = subprocess.run(['bash', '-c', shell], capture_output=True, text=True, timeout=60, cwd=Path('/'))
    assert done.stdout.count('\n') == 1 and done.stderr == ''
