"""The training step, evaluation and the log."""

import json
import math
import os
import signal
import sys

import pytest
import torch
from helpers import TINY, run
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from checkpoints.files import read_checkpoint
from checkpoints.networks import ModelInfo
from engine import Loop, evaluate, train_one_epoch
from losses import Distillation
from training import data, networks
from training.data import Mixing
from training.optimizer import OptimizerConfig
from training.schedule import ScheduleConfig
from training.signals import StopRequest
from training.state import Averaging, Training, build_training
from utils import DivergedError, MetricLogger, SmoothedValue

pytestmark = pytest.mark.usefixtures('one_thread')
CPU = torch.device('cpu')


def small():
    """(model, images, labels) of a linear network in float64, where orders of summation do not show."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(12, 3)).double()
    return model, torch.randn(12, 3, 2, 2).double(), torch.arange(12) % 3


def started(model: nn.Module, averaging: Averaging | None = None) -> Training:
    """The state of a run by plain gradient descent at a rate of 0.5."""
    optimizer = OptimizerConfig('momentum', 0.5, weight_decay=0., momentum=0.)
    return build_training(model, CPU, optimizer, ScheduleConfig(epochs=1, warmup_epochs=0, scaled_lr=0.5), averaging)


def trained(batch_size: int = 4, mixing: Mixing = Mixing(), averaging: Averaging | None = None, **loop):  # noqa: B008
    """The state after an epoch, and its statistics."""
    model, images, labels = small()
    training = started(model, averaging)
    criterion = networks.build_criterion(model, None, Distillation(), mixing)
    loader = DataLoader(TensorDataset(images, labels), batch_size)
    stats, stopped = train_one_epoch(model, training, criterion, loader, Loop(1, batch_size=batch_size, **loop),
                                     StopRequest(), data.build_mixup(mixing, 3))
    assert not stopped and training.batches_done == len(loader)
    return training, stats


def test_accumulation_is_a_larger_batch():
    one, _ = trained(batch_size=12)
    three, _ = trained(grad_accum_steps=3)
    torch.testing.assert_close(one.model[1].weight, three.model[1].weight)
    # The last update of an epoch takes what is left: two updates, of 2 and 1 batches.
    updates = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Training, 'update', lambda self, clip, done: updates.append(self.batches_done))
        trained(grad_accum_steps=2)
    assert updates == [1, 2]


def test_clipping_bounds_the_step():
    def moved(**loop):
        before, *_ = small()
        training, _ = trained(batch_size=12, **loop)
        return torch.cat([(p - q).flatten() for p, q in zip(training.model.parameters(), before.parameters(),
                                                             strict=True)]).norm().item()

    assert moved(clip_grad=0.01) == pytest.approx(0.5 * 0.01, rel=1e-3)
    assert moved() > 0.05


def test_average_of_the_weights():
    start, *_ = small()
    training, _ = trained(batch_size=12, averaging=Averaging(True, 0.75))
    expected = 0.75 * start[1].weight + 0.25 * training.model[1].weight
    torch.testing.assert_close(training.ema.module[1].weight, expected)


def test_smoothing_and_mixup_change_the_labels(monkeypatch):
    _, plain = trained(batch_size=12)
    _, smooth = trained(batch_size=12, mixing=Mixing(smoothing=0.1))
    model, images, labels = small()
    logs = model(images).log_softmax(-1)
    expected = -(0.9 * logs[range(12), labels] + 0.1 * logs.mean(-1)).mean().item()
    assert smooth['loss'] == pytest.approx(expected) and plain['loss'] != pytest.approx(expected)

    monkeypatch.setattr('numpy.random.beta', lambda *_, **__: 0.3)
    _, mixed = trained(batch_size=12, mixing=Mixing(mixup=0.8))
    logs = model(0.3 * images + 0.7 * images.flip(0)).log_softmax(-1)
    expected = -(0.3 * logs[range(12), labels] + 0.7 * logs[range(12), labels.flip(0)]).mean().item()
    assert mixed['loss'] == pytest.approx(expected)
    monkeypatch.setattr('timm.data.mixup.rand_bbox', lambda shape, *_, **__: (0, shape[-2], 0, 1))  # the first column
    _, cut = trained(batch_size=12, mixing=Mixing(cutmix=1.))
    images[..., 0], kept = images.flip(0)[..., 0].clone(), 1 - 1 / images.shape[-1]
    logs = model(images).log_softmax(-1)
    expected = -(kept * logs[range(12), labels] + (1 - kept) * logs[range(12), labels.flip(0)]).mean().item()
    assert cut['loss'] == pytest.approx(expected)


@pytest.mark.whole_run
def test_a_loss_that_is_not_finite_stops_the_run_before_anything_is_saved(tmp_path, monkeypatch, capsys):
    update = Training.update

    def poison(self, *args):
        update(self, *args)
        if self.epoch == 1:
            self.model.head.weight.data[0, 0] = float('nan')

    monkeypatch.setattr(Training, 'update', poison)
    assert run(*TINY, '--epochs', 2, '--output_dir', tmp_path) == 1
    err = capsys.readouterr().err
    assert err.startswith('error: the loss is not finite by batch 5 of epoch 1') and err.count('\n') == 1
    state = read_checkpoint(tmp_path / 'checkpoint.pth')
    assert (state['epoch'], state['step']) == (0, 0)
    assert all(tensor.isfinite().all() for tensor in state['model'].values())


def test_parameters_that_are_not_finite_are_not_saved():
    training, _ = trained()
    training.model[1].weight.data[0, 0] = float('inf')
    with pytest.raises(DivergedError, match='parameters are not finite'):
        training.checkpoint(None, ModelInfo('none'))


def test_evaluation_counts_exactly():
    model, images, labels = small()
    stats = evaluate(model, DataLoader(TensorDataset(images, labels), 5), CPU, print_freq=1)
    logits = model(images)
    assert stats['n'] == 12
    assert stats['acc1'] == pytest.approx((logits.argmax(1) == labels).double().mean().item() * 100)
    assert stats['acc5'] == 100  # of three classes
    assert stats['loss'] == pytest.approx(nn.functional.cross_entropy(logits, labels).item(), rel=1e-6)


@pytest.mark.whole_run
def test_learning_rates_of_a_run(tmp_path):
    """As DeiT steps its schedule: each epoch has the rate of the one before, the first one twice."""
    assert run(*TINY, '--epochs', 3, '--cooldown-epochs', 1, '--grad-accum-steps', 2, '--output_dir', tmp_path) == 0
    log = [json.loads(line) for line in (tmp_path / 'log.txt').read_text().splitlines()]
    top = 1e-2 * 256 / 512
    cosine = [1e-5 + (top - 1e-5) * (1 + torch.cos(torch.tensor(torch.pi * t / 3)).item()) / 2 for t in (0, 0, 1, 2)]
    assert [entry['train_lr'] for entry in log] == pytest.approx(cosine, rel=1e-5)


@pytest.mark.whole_run
def test_learning_rates_by_the_update(tmp_path, monkeypatch):
    update, rates = Training.update, []

    def note(self, *args):
        rates.append(self.optimizer.param_groups[0]['lr'])
        update(self, *args)

    monkeypatch.setattr(Training, 'update', note)
    flags = *TINY, '--epochs', 2, '--grad-accum-steps', 3, '--sched-on-updates', '--output_dir', tmp_path
    assert run(*flags) == 0
    top, shares = 1e-2 * 384 / 512, torch.tensor([0, 3, 6, 9, 11, 14, 17, 20]) / 22  # of 11 batches an epoch
    expected = (1e-5 + (top - 1e-5) * (1 + torch.cos(torch.pi * shares)) / 2).tolist()
    assert rates == pytest.approx(expected, rel=1e-4)
    assert run(*flags, '--epochs', 3, '--resume', 'auto') == 0
    assert rates[8] == pytest.approx(1e-5 + (top - 1e-5) * (1 + math.cos(math.pi * 2 / 3)) / 2, rel=1e-4)


@pytest.mark.whole_run
@pytest.mark.parametrize('flags', [('--amp', 'bf16'), ('--clip-grad', '0.5'), ('--opt', 'lamb'), ('--sched', 'step'),
                                   ('--model-ema', '--model-ema-force-cpu'), ('--smoothing', '0.1'),
                                   ('--sched', 'poly', '--lr-noise', '0.1', '0.9')])
def test_options_train(flags, tmp_path):
    assert run(*TINY, '--batch-size', 512, '--epochs', 2, *flags, '--output_dir', tmp_path) == 0
    state = read_checkpoint(tmp_path / 'checkpoint.pth')
    assert state['epoch'] == 1 and ('model_ema' in state) == ('--model-ema' in flags)


@pytest.mark.whole_run
def test_a_compiled_network_keeps_its_names(tmp_path, monkeypatch):
    compile_by_inductor = nn.Module.compile
    compiled = []

    def compile_eagerly(self):  # the C++ compiler would take a minute
        compiled.append(type(self).__name__)
        compile_by_inductor(self, backend='eager')

    monkeypatch.setattr(nn.Module, 'compile', compile_eagerly)
    flags = (*TINY, '--batch-size', 512, '--epochs', 1, '--output_dir', tmp_path)
    assert run(*flags) == 0
    names = list(read_checkpoint(tmp_path / 'checkpoint.pth')['model'])
    assert run(*flags, '--compile') == 0
    assert list(read_checkpoint(tmp_path / 'checkpoint.pth')['model']) == names and compiled == [
        'QVisionTransformerDistilled']


# --- the log ----------------------------------------------------------------------------------------------------------


def test_smoothed_value():
    value = SmoothedValue()
    for number in range(30):
        value.update(number)
    assert (value.mean, value.last, str(value)) == (14.5, 29, '19.0000 (14.5000)')


def test_nothing_is_read_from_the_device_between_log_lines(monkeypatch):
    """What a log line says is gathered on the device until it is due."""
    model, images, labels = small()
    training, reading = started(model), []
    read = MetricLogger.read
    monkeypatch.setattr(MetricLogger, 'read', lambda self: (reading.append(self.done), read(self), reading.pop())[1])
    for name in ('tolist', 'item', '__bool__', '__float__', '__int__'):
        original = getattr(torch.Tensor, name)
        monkeypatch.setattr(torch.Tensor, name, lambda self, original=original: original(self) if reading or not inside
                            else pytest.fail('a value was read between log lines'))
    inside = []
    batches = list(zip(images.chunk(12), labels.chunk(12), strict=True))

    def watched():
        for batch in batches:
            inside.append(True)
            yield batch
            inside.clear()

    class Loader:
        def __len__(self):
            return len(batches)

        def __iter__(self):
            return watched()

    criterion = networks.build_criterion(model, None, Distillation(), Mixing())
    stats, _ = train_one_epoch(model, training, criterion, Loader(), Loop(1, print_freq=3), StopRequest())
    assert stats['loss'] > 0


def test_a_terminal_gets_one_line_that_is_written_over(monkeypatch, capsys):
    monkeypatch.setattr(sys.stdout, 'isatty', lambda: True, raising=False)
    logger = MetricLogger('Epoch: [0]', 2, 1, CPU)
    for _ in logger.batches(range(2)):
        logger.update(loss=torch.tensor(1.))
        assert logger.end_batch() and logger.read()
        logger.print_line()
    said = capsys.readouterr().out
    assert said.count('\n') == 1 and said.count('\r') == 2
    assert '[##########..........] Epoch: [0]  [0/2]' in said


def test_signals_end_no_step():
    with StopRequest() as stop:
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.requested
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
