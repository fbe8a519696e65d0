"""--freeze, --grad-checkpointing, --model-ema-warmup: what is trained, and that runs resume to the same."""
import pytest
import timm
import torch
from helpers import TINY, assert_same, resume_after_an_epoch
from timm.utils import ModelEmaV3

import quant_vision_transformer  # noqa: F401  registers the variants
from calibration.first_batch import calibrate
from checkpoints.files import read_checkpoint
from training.networks import checkpoint_gradients, freeze_all_but
from training.optimizer import OptimizerConfig
from training.schedule import ScheduleConfig
from training.state import Averaging, build_training
from utils import UserError

pytestmark = pytest.mark.usefixtures('one_thread')
SHAPE = {'embed_dim': 24, 'depth': 2, 'num_heads': 2, 'patch_size': 8, 'img_size': 16, 'num_classes': 10}


def network(**options) -> torch.nn.Module:
    torch.manual_seed(0)
    model = timm.create_model('fourbits_deit_tiny_patch16_224', **SHAPE, **options)
    calibrate(model, torch.randn(4, 3, 16, 16))
    return model.train()


def is_step(name: str) -> bool:
    return name.endswith(('.alpha', '.zero_point'))


def is_of_heads(name: str) -> bool:
    return name.split('.')[0] in ('head', 'head_dist')


@pytest.mark.parametrize(('kept', 'is_kept'), [('quantizers', is_step), ('heads', is_of_heads)])
@pytest.mark.parametrize('weight_decay', [0., 0.1])
def test_only_what_is_kept_moves(kept, is_kept, weight_decay):
    model = network()
    freeze_all_but(model, kept)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    training = build_training(model, torch.device('cpu'), OptimizerConfig('fusedlamb', 0.1, weight_decay),
                              ScheduleConfig(epochs=1))
    assert training.n_parameters == sum(value.numel() for name, value in model.named_parameters() if is_kept(name))
    for _ in range(2):
        sum(output.square().sum() for output in model(torch.randn(4, 3, 16, 16))).backward()
        training.update(None, 0.5)
    moved = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert moved and all(map(is_kept, moved))
    assert {name.split('.')[0] for name in moved} >= {'head', 'head_dist'}


def test_heads_of_other_networks_are_kept_by_their_names():
    model = timm.create_model('resnet18', num_classes=3)
    freeze_all_but(model, 'heads')
    assert {name for name, value in model.named_parameters() if value.requires_grad} == {'fc.weight', 'fc.bias'}
    with pytest.raises(UserError, match='--freeze all-but-quantizers: ResNet has none'):
        freeze_all_but(model, 'quantizers')


def test_gradients_are_the_same_with_less_kept():
    gradients = []
    for is_checkpointed in (False, True):
        model = network(drop_path_rate=0.3)
        if is_checkpointed:
            checkpoint_gradients(model)
        assert model.grad_checkpointing is is_checkpointed
        torch.manual_seed(1)
        sum(output.square().sum() for output in model(torch.randn(4, 3, 16, 16))).backward()
        gradients.append({name: value.grad for name, value in model.named_parameters()})
    assert_same(*gradients)


def test_networks_that_keep_all():
    with pytest.raises(UserError, match='--grad-checkpointing: timm has none for Linear'):
        checkpoint_gradients(torch.nn.Linear(1, 1))


@pytest.mark.parametrize('warmup', [False, True])
def test_the_average_follows_timm(warmup):
    model = network()
    averaging = Averaging(model_ema=True, model_ema_decay=0.9, model_ema_warmup=warmup)
    training = build_training(model, torch.device('cpu'), OptimizerConfig(lr=0.1), ScheduleConfig(epochs=1), averaging)
    expected = ModelEmaV3(model, 0.9, use_warmup=warmup)
    for number in range(1, 4):
        sum(output.square().sum() for output in model(torch.randn(4, 3, 16, 16))).backward()
        training.update(None, number / 3)
        expected.update(model, step=number if warmup else None)
        assert_same(dict(training.ema.module.state_dict()), dict(expected.module.state_dict()))
    assert expected.get_decay(2) == pytest.approx(1 - 2 ** (-2 / 3) if warmup else 0.9)


@pytest.mark.slow
@pytest.mark.whole_run
@pytest.mark.parametrize('flags', [('--model-ema', '--model-ema-warmup', '--grad-accum-steps', 2),
                                   ('--freeze', 'all-but-quantizers', '--grad-checkpointing', '--model-ema')])
def test_runs_resume_to_the_same_result(flags, tmp_path):
    flags = (*TINY, '--epochs', 2, '--batch-size', 256, *flags)
    resumed, whole = (read_checkpoint(folder / 'checkpoint.pth') for folder in resume_after_an_epoch(tmp_path, *flags))
    for part in ('model', 'optimizer', 'model_ema', 'rng'):
        assert_same(resumed[part], whole[part], part)
