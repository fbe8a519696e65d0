"""The model card: what it says of a run, and where that comes from."""

import json
from dataclasses import replace

import pytest
import timm
import torch

import quant_vision_transformer  # noqa: F401  registers the variants
import utils
from analysis.cost import summary
from analysis.model_card import write_model_card
from checkpoints.networks import ModelInfo

pytestmark = pytest.mark.usefixtures('one_thread')

NAME, KWARGS = 'threebits_deit_tiny_patch16_224', {'embed_dim': 24, 'depth': 2, 'num_heads': 2, 'patch_size': 8}
INFO = ModelInfo(NAME, KWARGS, 10, 16, [str(digit) for digit in range(10)], 'IMNET')
LOG = [{'epoch': epoch, 'test_acc1': top1, 'test_acc5': top5, 'test_loss': loss, 'train_loss': 1., 'n_parameters': 9}
       for epoch, top1, top5, loss in ((0, 40.25, 80., 2.), (1, 62.5, 91.125, 1.25), (2, 62.5, 91., 1.5))]
DEFAULTS = {'data_path': None, 'finetune': '', 'lr': 5e-4, 'opt_betas': None, 'epochs': 300, 'dist_url': 'env://',
            'output_dir': '', 'model_kwargs': {}, 'smoothing': 0.}
FLAGS = DEFAULTS | {'data_path': '/home/someone/imagenet/', 'finetune': '/home/someone/deit.pth', 'lr': 3e-4,
                    'opt_betas': (0.9, 0.99), 'epochs': 7, 'dist_url': 'tcp://node17:2900',
                    'output_dir': '/scratch/out', 'rank': 0, 'scaled_lr': 1e-4}


@pytest.fixture(scope='module')
def model():
    return timm.create_model(NAME, num_classes=10, img_size=16, **KWARGS)


def write(folder, model, log=LOG, info=INFO, **options):
    if log is not None:
        (folder / 'log.txt').write_text(''.join(f'{json.dumps(entry)}\n' for entry in log))
    write_model_card(folder, model, info, FLAGS, DEFAULTS, **options)
    return json.loads((folder / 'model_card.json').read_text()), (folder / 'model_card.md').read_text()


# --- from a log -------------------------------------------------------------------------------------------------------


def test_accuracies_are_those_of_the_first_best_epoch(model, tmp_path):
    log = [LOG[0] | {'teacher_acc1': 70., 'teacher_acc5': 95., 'teacher_loss': .5}, *LOG[1:]]
    card, text = write(tmp_path, model, log, images=650)
    assert card['accuracy'] == {
        'measured_by': 'this run', 'epoch': 1, 'is_best': True, 'images': 650,
        'test': {'top1': 62.5, 'top5': 91.125, 'loss': 1.25}, 'test_ema': None,
        'teacher': {'top1': 70., 'top5': 95., 'loss': .5}}
    assert 'Measured by this run, on the 650 evaluation images of the folder `imagenet`, after epoch 1 (counted ' \
           'from 0), the best of 3' in text
    assert '| network | 62.50 | 91.12 | 1.2500 |\n| teacher | 70.00 | 95.00 | 0.5000 |' in text
    assert 'Epochs: 3 of 7.' in text and card['epochs_done'] == 3


def test_another_epoch_is_not_called_the_best(model, tmp_path):
    card, text = write(tmp_path, model, epoch=0, checkpoint='checkpoint.pth')
    assert card['accuracy']['test']['top1'] == 40.25 and not card['accuracy']['is_best']
    assert 'the best of' not in text and 'describes `checkpoint.pth`' in text and '--resume checkpoint.pth' in text


@pytest.mark.parametrize('log, epoch', [(None, None), ([], None), (LOG, 5)])
def test_without_a_measurement_nothing_is_claimed(log, epoch, model, tmp_path):
    card, text = write(tmp_path, model, log, epoch=epoch)
    assert card['accuracy']['test'] is None and 'Not recorded: no line of a log.txt' in text and 'top-1' not in text
    assert 'Commit: not recorded' in text and 'Versions: not recorded' in text


def test_a_line_that_was_cut_off_is_left_out(model, tmp_path):
    (tmp_path / 'log.txt').write_text(json.dumps(LOG[0]) + '\n' + json.dumps(LOG[1])[:30])
    card, _ = write(tmp_path, model, log=None)
    assert (card['accuracy']['epoch'], card['epochs_done']) == (0, 1)


def test_flags_and_paths(model, tmp_path):
    card, text = write(tmp_path, model)
    assert card['changed_flags'] == {'data_path': 'imagenet', 'finetune': 'deit.pth', 'lr': 3e-4,
                                     'opt_betas': [0.9, 0.99], 'epochs': 7, 'dist_url': 'tcp://', 'output_dir': 'out'}
    assert set(card['flags']) == set(FLAGS) and card['flags']['scaled_lr'] == 1e-4
    assert card['data'] == {'data_set': 'IMNET', 'data_path': 'imagenet'} and '| `lr` | `0.0003` |' in text
    for place in ('/home', 'someone', '/scratch', 'node17', str(tmp_path)):
        assert place not in text and place not in (tmp_path / 'model_card.json').read_text()
    assert sorted(path.name for path in tmp_path.iterdir()) == ['log.txt', 'model_card.json', 'model_card.md']


def test_costs_are_those_of_the_report(model, tmp_path):
    card, text = write(tmp_path, model)
    row = summary(NAME, model)
    assert card['cost'] == row and card['precision']['weight_bits'] == card['precision']['act_bits'] == 3
    assert '3-bit weights and 3-bit activations' in text and 'embed_dim=24, depth=2' in text
    assert f'| {row["ops"] / 1e9:.4g} | {row["full_precision_ops"] / 1e9:.4g} | {row["ops_ratio"]:.2f} |' in text


def test_full_precision_and_networks_without_a_cost(tmp_path):
    full = timm.create_model('deit_tiny_patch16_224', num_classes=10, img_size=16, **KWARGS)
    card, text = write(tmp_path, full, info=replace(INFO, model='deit_tiny_patch16_224'))
    assert card['precision'] is None and card['cost']['ops_ratio'] == 1
    assert 'A full-precision network' in text and 'deploy.py' not in text and 'main.py --eval' in text
    card, text = write(tmp_path, torch.nn.Linear(1, 1), info=replace(INFO, model='resnet18'))
    assert card['cost'] is None and 'Size and operations' not in text and text.startswith('# resnet18\n')


# --- how it is written ------------------------------------------------------------------------------------------------


def test_a_card_is_whole_or_the_one_before(model, tmp_path, monkeypatch):
    before = write(tmp_path, model)[1]
    monkeypatch.setattr('os.replace', lambda *_: (_ for _ in ()).throw(OSError('disk full')))
    with pytest.raises(OSError, match='disk full'):
        write(tmp_path, model, LOG[:1])
    assert (tmp_path / 'model_card.md').read_text() == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ['log.txt', 'model_card.json', 'model_card.md']


def test_writing_draws_no_random_number(model, tmp_path):
    before = utils.rng_states(torch.device('cpu'))
    write(tmp_path, model)
    after = utils.rng_states(torch.device('cpu'))
    assert torch.equal(before[0].pop('torch'), after[0].pop('torch')) and before == after


def test_damaged_logs_and_records_are_passed_over(model, tmp_path):
    for record in ('[1]', '3', '[' * 10 ** 5, '{"torch": {"a": 1}, "git_commit": "\\u001b[2J"}', '{"python": 3}'):
        (tmp_path / 'args.json').write_text(record)
        (tmp_path / 'log.txt').write_bytes(b'[1]\n3\n{"epoch": "x"}\n\xff\n{"epoch": 0, "test_acc1": 5}\n'
                                           b'{"epoch": 1, "test_acc1": "\\u001b", "test_acc5": [], "test_loss": {}}\n')
        card, text = write(tmp_path, model, None)
        assert card['accuracy']['test'] is None and text.replace('\n', '').isprintable()
        assert card['versions'] == dict.fromkeys(('python', 'torch', 'timm', 'cuda', 'gpu'))
