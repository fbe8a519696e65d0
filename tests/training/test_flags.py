"""Numbers that no run could use are refused where the flags are read, in every command line; files of --config."""

import pytest

import cost
import deploy
import main
import model_card
import soft_labels
import visualize
from benchmarks.inference import Conditions
from checkpoints.networks import ModelInfo
from console.parser import path_text
from training.checks import check_args
from training.networks import check_same_classes
from utils import UserError


def refused(call, *arguments) -> str:
    with pytest.raises(UserError) as caught:
        call(*arguments)
    assert str(caught.value).isprintable()
    return str(caught.value)


def check(*flags: str) -> None:
    check_args(main.parse_args(['--device', 'cpu', *flags]))


NUMERIC = [action for action in main.get_args_parser()._actions if action.type not in (None, str, path_text)
           and action.dest != 'model_kwargs']


@pytest.mark.parametrize('value', ['nan', 'inf', '-inf', '1e400', '-1', '9' * 400, '9' * 5000, '', 'x'])
@pytest.mark.parametrize('action', NUMERIC, ids=lambda action: action.dest)
def test_no_number_of_main_is_without_bounds(action, value):
    count = action.nargs if isinstance(action.nargs, int) else 1
    said = refused(check, f'{action.option_strings[0]}={value}' if count == 1 else action.option_strings[0],
                   *[value] * (count if count > 1 else 0))
    assert any(name in said for name in action.option_strings)


@pytest.mark.parametrize(('flags', 'line'), [
    ('--lr-noise 0.5 --lr-noise-std 1000 --lr-noise-pct 0.5', '--lr-noise-std 1000.0: choose at most 1000 times'),
    ('--lr-noise-pct 0', '--lr-noise-pct 0.0: choose a value above 0'),
    ('--decay-rate 2', '--decay-rate 2.0: choose at most 1'), ('--cutmix-minmax 0.5 0.2', 'choose two rising values'),
    ('--recount 1001', '--recount 1001: choose a value of at most 1000'),
    ('--input-size 100000', '--input-size 100000: choose a value above 0 and up to 4096'),
    ('--num-workers 100000', '--num_workers 100000: choose a value of at most 1024'),
    ('--eval-crop-ratio 1e-9', '--eval-crop-ratio 1e-09: choose a value above 0, from 0.05 to 1'),
    ('--model-kwargs depth=100000', '--model-kwargs depth=100000: choose a whole number from 1 to 1000'),
    ('--model-kwargs drop_rate=nan', "--model-kwargs drop_rate='nan': choose a number from 0 to 1"),
    ('--resume /', '--resume /: no such file, it is a folder'),
    ('--model \x1b[2J', '--model \\x1b[2J is unknown'), ('\x1b[2J', 'unrecognized arguments: \\x1b[2J')])
def test_what_no_run_could_use(flags, line):
    assert line in refused(check, *flags.split())


def test_what_runs_use_is_taken():
    check('--sched', 'poly', '--decay-rate', '2', '--lr-noise', '0.4', '0.9', '--seed', str(2 ** 33), '--opt-betas',
          '0.9', '0.999', '--eval-crop-ratio', '1', '--cutmix-minmax', '0.2', '0.8', '--model-kwargs', 'irm=none')


@pytest.mark.parametrize(('command', 'flags', 'line'), [
    (deploy, 'eval x --num-workers -1', '--num_workers -1: choose a value of at least 0'),
    (deploy, 'eval x --eval-crop-ratio nan', '--eval-crop-ratio nan: choose'),
    (deploy, 'eval x --limit 99999999999', '--limit 99999999999: choose a value of at most'),
    (deploy, 'predict x --packed y --top 0', '--top 0: choose a value of at least 1'),
    (deploy, 'bench --threads 100000', '--threads 100000: choose a value of at most'),
    (deploy, 'bench --runs 9999999999', '--batch-sizes and --runs: choose values of at most'),
    (cost, '--model deit_tiny_patch16_224 --weight-bits 99', '--weight-bits 99: choose a value of at most 8'),
    (cost, '--model deit_tiny_patch16_224 --num-classes 9999999', '--num-classes 9999999: choose'),
    (cost, '--model deit_tiny_patch16_224 --model-kwargs depth=9999', '--model-kwargs depth=9999: choose'),
    (cost, '--model deit_tiny_patch16_224 --packed /', '--packed /: no such file, it is a folder'),
    (visualize, 'qk --resume x --num-images 0', '--num-images 0: choose'),
    (visualize, 'qk --resume x --eval-crop-ratio inf', '--eval-crop-ratio inf: choose'),
    (visualize, 'qk --resume /', '--resume /: no such file, it is a folder'),
    (soft_labels, '--output x --crop-scale nan 1', '--crop-scale nan: choose a value from 0 to 1'),
    (soft_labels, '--output x --crops-per-image 100000', '--crops-per-image 100000: choose'),
    (model_card, 'x --images -3', '--images -3: choose a value of at least 1')])
def test_other_commands_say_the_same(command, flags, line, capsys):
    if command is visualize:
        pytest.importorskip('matplotlib')  # which it asks for first
    assert command.main(flags.split()) == 2
    err = capsys.readouterr().err
    assert line in err and err.count('\n') == 1


def test_threads_have_an_upper_end():
    assert 'choose a value of at most' in refused(lambda: Conditions(threads=10 ** 5))
    assert Conditions(threads=64).threads == 64


# --- files of --config ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(('text', 'line'), [
    (b'\xff\xfe', 'cannot be read (no text)'), (b'lr: ' + b'[' * 5000, 'is not YAML'),
    (b'lr: ' + b'9' * 5000, 'is not YAML'), (b'lr: 2024-13-45', 'is not YAML'), (b'? [1]\n: 2', 'is not YAML'),
    (b'lr: !!python/object/apply:os.system [x]', 'is not YAML'), (b'lr: {a: {b: 1}}', 'lr is {'),
    (b'lr: [[1]]', 'lr is [[1]], which is no value of a flag'), (b'3: 4', '3 is no flag'),
    (b'lr: 1\nlr: 2', "'lr' comes twice"), (b'min-lr: 1\nmin_lr: 2', "'min_lr' comes twice"),
    (b'lr:\nepochs: 3', "'lr' has no value: write one, or null"),
    (b'"\\e[2J": 4', "'\\x1b[2J' is no flag"), (b'lr: 2024-01-01', 'which is no value of a flag')])
def test_files_that_are_no_recipe(text, line, tmp_path):
    (tmp_path / 'x.yaml').write_bytes(text)
    said = refused(main.parse_args, ['--config', str(tmp_path / 'x.yaml')])
    assert line in said and said.startswith('--config') and len(said) < 400


def test_a_value_that_aliases_make_endless(tmp_path):
    names = 'abcdefghijklmnopqrstuvwxyz'
    lines = ['a: &a [x, x]', *(f'{name}: &{name} [*{before}, *{before}]' for before, name in
                               zip(names, names[1:], strict=False)), 'lr: *z']
    (tmp_path / 'x.yaml').write_text('\n'.join([*lines[-1:], *lines[:-1]]).replace('lr: *z\n', ''))
    assert 'is no flag' in refused(main.parse_args, ['--config', str(tmp_path / 'x.yaml')])
    nested = 'opt-betas: ' + '[' * 20 + '1' + ']' * 20
    (tmp_path / 'x.yaml').write_text(nested)
    assert 'no value of a flag' in refused(main.parse_args, ['--config', str(tmp_path / 'x.yaml')])


# --- classes of a resumed run -----------------------------------------------------------------------------------------


def test_a_run_goes_on_with_the_same_classes_only():
    info = ModelInfo('x', {}, 3, 16, ['cat', 'dog', 'eel'])
    check_same_classes('a.pth', info, ['cat', 'dog', 'eel'])
    check_same_classes('a.pth', ModelInfo('x', {}, 3, 16), ['a', 'b', 'c'])
    assert refused(check_same_classes, 'a.pth', info, ['dog', 'cat', 'eel']) == (
        "a.pth was trained with class 'cat' where the data set has 'dog' (2 of 3 classes differ): name the class "
        'folders as before, or start anew with --finetune')
