"""Model cards of whole runs: what training writes, and what the command writes from a checkpoint."""

import json

import pytest
import timm
import torch
from helpers import TINY, run

import model_card
from checkpoints.files import read_checkpoint

pytestmark = [pytest.mark.usefixtures('one_thread'), pytest.mark.whole_run]


@pytest.fixture(scope='module')
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp('trained')
    torch.set_num_threads(1)
    assert run(*TINY, '--batch-size', 512, '--epochs', 2, '--model-ema', '--model-ema-decay', '0.5', '--output_dir',
               folder) == 0
    return folder


def test_training_writes_the_card(trained):
    card, text = json.loads((trained / 'model_card.json').read_text()), (trained / 'model_card.md').read_text()
    log = [json.loads(line) for line in (trained / 'log.txt').read_text().splitlines()]
    best = max(log, key=lambda entry: entry['test_acc1'])
    state = read_checkpoint(trained / 'best_checkpoint.pth')
    assert card['accuracy']['epoch'] == best['epoch'] == state['epoch'] and card['accuracy']['images'] == 355
    assert card['accuracy']['test']['top1'] == best['test_acc1'] == state['max_accuracy']
    assert card['accuracy']['test_ema']['top1'] == best['test_ema_acc1'] and 'averaged network' in text
    assert card['epochs_done'] == 2 and card['changed_flags']['model_ema'] is True
    record = json.loads((trained / 'args.json').read_text())
    assert card['git_commit'] == record['git_commit'] and card['versions']['torch'] == torch.__version__
    assert card['versions']['timm'] == timm.__version__ and 'Data: DIGITS.' in text
    assert 'python main.py --eval --resume best_checkpoint.pth\n' in text  # the digits need no --data-path
    assert 'python deploy.py pack best_checkpoint.pth --output model.qvit.safetensors' in text


def test_the_command_writes_the_same_card(trained, capsys):
    names = ('model_card.json', 'model_card.md')
    before = [(trained / name).read_text() for name in names]
    for name in names:
        (trained / name).unlink()
    assert model_card.main([str(trained / 'best_checkpoint.pth'), '--images', '355']) == 0
    assert [(trained / name).read_text() for name in names] == before
    assert 'model_card.md' in capsys.readouterr().out


def test_the_command_to_evaluate_works(trained, monkeypatch, capsys):
    card = json.loads((trained / 'model_card.json').read_text())
    program, script, *given = card['commands']['evaluate'].split()
    monkeypatch.chdir(trained)
    assert (program, script) == ('python', 'main.py') and run(*given, '--device', 'cpu') == 0
    assert f'* Acc@1 {card["accuracy"]["test"]["top1"]:.3f}' in capsys.readouterr().out


def test_a_file_that_says_nothing_of_itself(tmp_path, capsys):
    torch.save({'model': {'head.weight': torch.zeros(1)}}, tmp_path / 'released.pth')
    assert model_card.main([str(tmp_path / 'released.pth')]) == 2
    err = capsys.readouterr().err
    assert err.count('\n') == 1 and 'was not written by main.py' in err
    assert not (tmp_path / 'model_card.md').exists()
