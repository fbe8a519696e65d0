"""Calibration to the full-precision network: its closed forms, whole networks, ranks, and main.py's flags."""
import copy
import math
from datetime import timedelta

import pytest
import timm
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from helpers import TINY, run
from torch import nn

import quant_vision_transformer  # noqa: F401  registers the variants
from _quan_base import ActQ, is_calibrated, named_quantizers
from calibration.closed_form import calibrate_to_full_precision, compensate_rounding, ridge_fit
from calibration.first_batch import calibrate
from calibration.irm import fit_layer_norm
from calibration.scales import activation_qparams, weight_scales
from checkpoints.files import read_checkpoint
from checkpoints.full_precision import load_full_precision
from utils import UserError

SMALL = {'img_size': 32, 'patch_size': 8, 'embed_dim': 64, 'depth': 2, 'num_heads': 2, 'num_classes': 10}


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def squared_error(x, step, zero, qn, qp):
    return (((x / step + zero).clamp(qn, qp).round() - zero) * step - x).square().sum(-1)


# --- closed forms -----------------------------------------------------------------------------------------------------


def test_without_ridge_the_fit_is_least_squares():
    x, target, start = torch.randn(50, 6).double(), torch.randn(50, 4).double(), torch.randn(4, 6).double()
    x, target = x - x.mean(0), target - target.mean(0)
    found = ridge_fit(start, x.mT @ x / 50, target.mT @ x / 50, 0.)
    torch.testing.assert_close(found, torch.linalg.lstsq(x, target).solution.mT, rtol=1e-10, atol=1e-12)


def test_the_ridge_pulls_towards_the_weights_at_hand():
    x, target, start = torch.randn(50, 6).double(), torch.randn(50, 4).double(), torch.randn(4, 6).double()
    covariance, ridge = x.mT @ x / 50, 0.7
    # The same problem as least squares: rows sqrt(50 * ridge * scale) * I with the target W_0.
    pull = math.sqrt(50 * ridge * covariance.diagonal().mean()) * torch.eye(6).double()
    wanted = torch.linalg.lstsq(torch.cat([x, pull]), torch.cat([target, pull @ start.mT])).solution.mT
    torch.testing.assert_close(ridge_fit(start, covariance, target.mT @ x / 50, ridge), wanted, rtol=1e-10, atol=1e-12)


def test_layer_norm_fit_is_least_squares():
    norm = nn.LayerNorm(8).double().requires_grad_(False)
    x, target = torch.randn(3, 2, 20, 8).double(), torch.randn(3, 2, 20, 8).double()
    fit_layer_norm(norm, x, target)
    normed = F.layer_norm(x, (8,), eps=norm.eps)
    for i in range(8):
        design = torch.stack([normed[..., i].flatten(), torch.ones(120).double()], 1)
        wanted = torch.linalg.lstsq(design, target[..., i].reshape(-1, 1)).solution[:, 0]
        torch.testing.assert_close(torch.stack([norm.weight[i], norm.bias[i]]), wanted, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize('bits', [2, 3, 4])
def test_weight_step_is_the_best_of_its_grid(bits):
    weight, importance = torch.randn(5, 40).double(), torch.rand(40).double()
    qn, qp = -2 ** (bits - 1), 2 ** (bits - 1) - 1
    found = weight_scales(weight, qn, qp, importance)
    shares = torch.linspace(0.15, 1.1, 60).double()
    for row, step in zip(weight, found, strict=True):
        candidates = shares[:, None] * row.abs().max() / qp
        errors = (((row / candidates).clamp(qn, qp).round() * candidates - row).square() * importance).sum(1)
        assert step.item() == pytest.approx(candidates[errors.argmin()].item(), rel=1e-6)


@pytest.mark.parametrize('bits', [2, 3, 4])
@pytest.mark.parametrize('of', [lambda x: x + 1, F.gelu, torch.exp, lambda x: (3 * x).softmax(-1)],
                         ids=['normal', 'gelu', 'exp', 'softmax'])
def test_activation_step_comes_close_to_the_best_of_a_dense_grid(of, bits):
    x = of(torch.randn(4, 600).double())
    for qn in (0, -2 ** (bits - 1)):
        qp = qn + 2 ** bits - 1
        step, zero = activation_qparams(x, qn, qp)
        assert torch.equal(zero, zero.round())
        found = squared_error(x, step[:, None], zero[:, None], qn, qp)
        for row, error in zip(x, found, strict=True):
            steps = torch.linspace(0.05, 1.2, 100).double()[:, None, None] * (row.max() - row.min()) / (qp - qn)
            zeros = torch.arange(qn - 8, qp + 9).double()[:, None]
            assert error <= 1.05 * squared_error(row, steps, zeros, qn, qp).min()


@pytest.mark.parametrize('value', [0., 0.3, -2e4, 1e-12])
def test_channels_that_do_not_vary(value):
    x = torch.full((1, 50), value)
    layer = ActQ(1, 3)
    layer.set_qparams(*activation_qparams(x, -4, 3), signed=True)
    assert layer.alpha > 0 and layer.zero_point.abs() < 1e6
    torch.testing.assert_close(layer(x.T), x.T, rtol=1e-3, atol=1e-8)
    assert (weight_scales(torch.zeros(2, 5), -4, 3) > 0).all()


def test_free_zero_points_fit_no_worse_and_reach_the_middle_of_a_step():
    x = torch.tensor([[-1.5, -0.5, 0.5, 1.5]]).double().repeat(1, 50)
    step, zero = activation_qparams(x, -2, 1, whole=False)
    assert squared_error(x, step[:, None], zero[:, None], -2, 1) < 0.01 * len(x[0])
    step, zero = activation_qparams(x, -2, 1)
    assert squared_error(x, step[:, None], zero[:, None], -2, 1) > 0.05 * len(x[0])


def test_rounding_hands_its_error_to_the_columns_behind():
    weight, step = torch.tensor([[0.4, 0.4]]).double(), torch.ones(1).double()
    together = torch.tensor([[1., 0.99], [0.99, 1.]]).double()  # two inputs that are nearly the same
    # The first becomes 0; the second takes over 0.4 * 0.99 and becomes 1.
    torch.testing.assert_close(compensate_rounding(weight, step, together, -8, 7),
                               torch.tensor([[0.4, 0.4 + 0.4 * 0.99]]).double())
    assert torch.equal(compensate_rounding(weight, step, torch.eye(2).double(), -8, 7), weight)


def test_compensated_rounding_beats_rounding_to_nearest():
    x = torch.randn(500, 100).double() @ torch.randn(100, 100).double()  # two groups of columns, and correlations
    weight, covariance = torch.randn(7, 100).double(), x.mT @ x / 500
    step = weight_scales(weight, -4, 3)[:, None]

    def error(w):
        return ((w / step).clamp(-4, 3).round() * step - weight).matmul(x.mT).square().sum()

    assert error(compensate_rounding(weight, step[:, 0], covariance, -4, 3)) < 0.6 * error(weight)


# --- whole networks ---------------------------------------------------------------------------------------------------


def full_precision(**changes):
    """A network whose attention depends on lengths of q and k, as IRM's does not."""
    torch.manual_seed(1)
    net = timm.create_model('deit_tiny_distilled_patch16_224', **SMALL | changes)
    for name, value in net.named_parameters():
        value.data.add_(torch.randn_like(value) * (0.15 if name.endswith('weight') and value.ndim > 1 else 0.02))
    return net.eval()


def quantized(net: nn.Module, **changes):
    model = timm.create_model('fourbits_deit_tiny_patch16_224', **SMALL | changes)
    load_full_precision(model, net.state_dict())
    return model


def relative_error(model: nn.Module, net: nn.Module, images: torch.Tensor) -> float:
    with torch.no_grad():
        wanted = net(images)
        return ((model.eval()(images) - wanted).square().sum() / (wanted - wanted.mean(0)).square().sum()).item()


@pytest.mark.slow
@pytest.mark.parametrize('options', [{}, {'irm': False}, {'quantize_attn': False}, {'act_granularity': 'tensor'},
                                     {'dynamic_img_size': True}], ids=str)
def test_it_comes_closer_than_the_published_calibration(options):
    net, images, others = full_precision(), torch.randn(64, 3, 32, 32), torch.randn(64, 3, 32, 32)
    model, published = quantized(net, **options), quantized(net, **options)
    keys = list(model.state_dict())
    calibrate_to_full_precision(model.train(), images)
    calibrate(published, images)
    assert is_calibrated(model) and model.training and list(model.state_dict()) == keys
    assert relative_error(model, net, others) < 0.6 * relative_error(published, net, others)


def test_with_eight_bits_irm_passes_on_the_full_precision_attention():
    net, images = full_precision(), torch.randn(64, 3, 32, 32)
    model = quantized(net, weight_bits=8, act_bits=8)
    calibrate_to_full_precision(model, images)
    assert relative_error(model, net, images) < 0.01
    identity = quantized(net, weight_bits=8, act_bits=8)
    calibrate(identity, images)
    assert relative_error(identity, net, images) > 0.1


@pytest.mark.slow
def test_irm_of_a_quantized_start_is_part_of_the_network_to_come_close_to():
    images = torch.randn(64, 3, 32, 32)
    more = quantized(full_precision(), weight_bits=8, act_bits=8)
    calibrate_to_full_precision(more, images)
    fewer = quantized(more, weight_bits=7, act_bits=7)
    calibrate_to_full_precision(fewer, images)
    assert relative_error(fewer, more.eval(), images) < 0.03


@pytest.mark.slow
def test_the_result_follows_from_weights_and_images_alone():
    net, images = full_precision(), torch.randn(16, 3, 32, 32)
    first, second = quantized(net), quantized(net)
    state = torch.get_rng_state()
    calibrate_to_full_precision(first, images)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(99)
    calibrate_to_full_precision(second.train(), images.clone())
    for (name, a), b in zip(first.state_dict().items(), second.state_dict().values(), strict=True):
        assert torch.equal(a, b), name


def test_latent_weights_lie_in_the_cells_of_their_codes_and_can_leave_them():
    model = quantized(full_precision())
    calibrate_to_full_precision(model, torch.randn(16, 3, 32, 32))
    layer = model.blocks[0].mlp.fc1
    inside = (layer.weight / layer.alpha[:, None] - layer.to_int()).abs()
    assert inside.median() > 0.1


@pytest.mark.parametrize('value', [math.nan, math.inf])
def test_images_that_are_not_finite(value):
    with pytest.raises(ValueError, match='NaN or infinite'):
        calibrate_to_full_precision(quantized(full_precision()), torch.full((4, 3, 32, 32), value))


def test_another_network_is_refused():
    with pytest.raises(UserError, match='--calibration published'):
        calibrate_to_full_precision(full_precision(), torch.randn(4, 3, 32, 32))


def _rank(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group('gloo', init_method=f'file://{folder}/store', rank=rank, world_size=2,
                            timeout=timedelta(seconds=60))
    torch.manual_seed(rank)  # other weights and other images on each rank
    model = timm.create_model('fourbits_deit_tiny_patch16_224', **SMALL)
    alone, images = copy.deepcopy(model), torch.randn(16, 3, 32, 32) * (rank + 1)
    calibrate_to_full_precision(model, images.clone())
    dist.destroy_process_group()
    calibrate_to_full_precision(alone, images)
    ranges = [quantizer.code_range for _, quantizer in named_quantizers(model)]
    torch.save({'together': model.state_dict(), 'alone': alone.state_dict(), 'ranges': ranges}, f'{folder}/{rank}.pth')


@pytest.mark.processes
def test_ranks_end_alike(tmp_path):
    mp.spawn(_rank, (str(tmp_path),), nprocs=2)
    first, second = (torch.load(tmp_path / f'{rank}.pth', weights_only=True) for rank in (0, 1))
    assert first['ranges'] == second['ranges']
    for name, value in first['together'].items():
        assert torch.equal(value, second['together'][name]) and torch.equal(value, first['alone'][name]), name
    assert any(not torch.equal(value, second['alone'][name]) for name, value in first['alone'].items())


# --- main.py ----------------------------------------------------------------------------------------------------------


def accuracy(said: str) -> float:
    return float(said.rpartition('* Acc@1 ')[2].split()[0])


@pytest.mark.slow
def test_evaluation_after_calibration_alone(teacher_path, tmp_path, capsys):
    flags = (*TINY, '--finetune', teacher_path, '--model', 'fourbits_deit_tiny_patch16_224', '--eval',
             '--calibration-epochs', '1')
    assert run(*flags, '--output_dir', tmp_path / 'out') == 0
    fitted = capsys.readouterr().out
    assert '--calibration reconstruct: 1000 images' in fitted
    assert run('--eval', '--resume', tmp_path / 'out' / 'calibrated.pth', '--num_workers', '0', '--device', 'cpu') == 0
    assert accuracy(capsys.readouterr().out) == accuracy(fitted)
    assert run(*flags, '--calibration', 'published', '--calibration-images', 32) == 0
    assert accuracy(capsys.readouterr().out) < accuracy(fitted)
    assert 'checkpoint.pth' not in [path.name for path in (tmp_path / 'out').iterdir()]
    assert read_checkpoint(tmp_path / 'out' / 'calibrated.pth')['epoch'] == -1


def test_evaluation_wants_a_network(capsys):
    assert run(*TINY, '--eval') == 2
    assert 'or --finetune, full-precision weights to calibrate' in capsys.readouterr().err
    assert run(*TINY, '--calibration-images', '0') == 2
    assert '--calibration-images 0: choose a value of at least 1' in capsys.readouterr().err
