"""What errors cost, twin tokens, and block-wise reconstruction: against what was worked out by hand, and whole."""
import copy

import pytest
import timm
import torch
import torch.nn.functional as F
from helpers import TINY, run
from torch import nn

import quant_vision_transformer  # noqa: F401  registers the variants
from _quan_base import is_calibrated
from calibration import reconstruction
from calibration.closed_form import RIDGES, _samples, calibrate_to_full_precision, choose_ridge
from calibration.first_batch import calibrate
from calibration.full_precision import FullPrecision
from calibration.importance import UNKNOWN, fisher_information, information_root, weighted_error
from calibration.reconstruction import Reconstruction, reconstruct
from calibration.twins import halve_attention_to_twins
from checkpoints.full_precision import load_full_precision
from utils import MetricLogger, UserError

SMALL = {'img_size': 32, 'patch_size': 8, 'embed_dim': 64, 'depth': 2, 'num_heads': 2, 'num_classes': 10}


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def float_network(name: str = 'deit_tiny_patch16_224', **options) -> nn.Module:
    net = timm.create_model(name, **SMALL | options).eval()
    for parameter in net.parameters():
        nn.init.normal_(parameter, std=0.2)
    for norm in (module for module in net.modules() if isinstance(module, nn.LayerNorm)):
        nn.init.ones_(norm.weight)
    return net


def student(net: nn.Module, **options) -> nn.Module:
    model = timm.create_model('fourbits_deit_tiny_patch16_224', **SMALL | options)
    load_full_precision(model, net.state_dict())
    return model.eval()


# --- twin tokens ------------------------------------------------------------------------------------------------------


def test_a_second_token_changes_nothing_where_queries_are_alike():
    """With queries of bias alone, and fewer tokens than channels, both least squares are exact."""
    net = float_network(depth=1).double()
    assert net.num_prefix_tokens == 1
    net.blocks[0].attn.qkv.weight.data[:64] = 0.
    model, images = student(net, depth=1).double(), torch.randn(2, 3, 32, 32).double()
    assert model.has_twin_tokens
    with torch.no_grad():
        wanted, doubled = net(images), FullPrecision(model)(images)
        halve_attention_to_twins(model, images)
        halved = FullPrecision(model)(images)
    assert (doubled - wanted).abs().max() > 1e-2
    torch.testing.assert_close(halved, wanted, rtol=0, atol=1e-4)


@pytest.mark.parametrize('qkv_bias', [True, False])
def test_a_second_token_changes_less_in_any_network(qkv_bias):
    net = float_network(qkv_bias=qkv_bias)
    for block in net.blocks:
        if qkv_bias:
            block.attn.qkv.bias.data[:64] *= 10  # queries have much in common
    model, images = student(net, qkv_bias=qkv_bias), torch.randn(16, 3, 32, 32)
    with torch.no_grad():
        doubled = (FullPrecision(model)(images) - net(images)).norm()
        halve_attention_to_twins(model, images)
        assert (FullPrecision(model)(images) - net(images)).norm() < 0.7 * doubled


def test_only_weights_without_a_distillation_token_make_twins():
    assert not student(float_network('deit_tiny_distilled_patch16_224')).has_twin_tokens
    model = student(float_network())
    calibrate_to_full_precision(model, torch.randn(16, 3, 32, 32))
    assert not model.has_twin_tokens  # the attention to them is not halved a second time


# --- what an error costs ----------------------------------------------------------------------------------------------


def test_behind_the_last_block_only_the_heads_tokens_count():
    full, images = FullPrecision(student(float_network()).double()), torch.randn(3, 3, 32, 32).double()
    found = fisher_information(full, images)
    assert [tuple(each.shape) for each in found] == [(3, 64, 64)] * 2
    assert (found[1][2] == 0).all() and found[1][:2].diagonal(dim1=1, dim2=2).min() > 0 and found[0][2].trace() > 0
    assert torch.linalg.eigvalsh(found[0]).min() > -1e-12


def test_an_error_costs_its_quadratic_form():
    parts = torch.randn(3, 4, 4).double()
    information = parts @ parts.mT
    error, tokens = torch.randn(2, 7, 4).double(), 7
    mean = (information[0].trace() + information[1].trace() + 5 * information[2].trace()) / (tokens * 4)
    forms = [information[min(token, 2)] / mean + UNKNOWN * torch.eye(4) for token in range(tokens)]
    expected = sum(error[image, token] @ forms[token] @ error[image, token]
                   for image in range(2) for token in range(tokens)) / error.numel()
    torch.testing.assert_close(weighted_error(error, information_root(information, tokens)), expected, rtol=1e-6,
                               atol=0)


# --- closed forms -----------------------------------------------------------------------------------------------------


def test_the_ridge_follows_from_held_out_images():
    x, weight, other = torch.randn(16, 5, 30).double(), torch.randn(8, 30).double(), torch.randn(8, 30).double()
    noise = torch.randn(16, 5, 8).double()
    assert choose_ridge(weight, x, x @ other.mT) == RIDGES[0]            # the target says all
    assert choose_ridge(weight, x, x @ weight.mT + noise) >= 10.         # there is nothing to learn but noise


def test_samples_stand_for_all_values_and_keep_the_rare_ones():
    rows = torch.randn(2, 40 * 10 * 3)
    rows[0, 17], rows[1, 500] = 1000., -1000.
    values, counts = _samples(rows, 300, 32)
    assert values[0].max() == 1000. and values[1].min() == -1000.
    assert counts[:, :300].sum(1).tolist() == pytest.approx([1200., 1200.])
    assert counts[0, values[0] == 1000.][-1] == 1. and torch.isin(values, rows).all()
    assert _samples(rows, 300, 0)[0].shape == (2, 300)
    few, counts = _samples(rows[:, :300], 300, 32)
    assert torch.equal(few, rows[:, :300]) and (counts == 1).all()


# --- reconstruction ---------------------------------------------------------------------------------------------------


def error_of(model: nn.Module, net: nn.Module, images: torch.Tensor) -> float:
    with torch.no_grad():
        return (model.eval()(images) - net(images)).square().mean().item()


@pytest.mark.slow
@pytest.mark.parametrize('options', [{}, {'irm': False, 'act_granularity': 'tensor'}, {'quantize_attn': False}],
                         ids=str)
def test_a_block_learns_to_give_what_full_precision_gives(options):
    """From the published start, which leaves much to learn: judged on images that it has not seen."""
    net, images, others = float_network(), torch.randn(64, 3, 32, 32), torch.randn(64, 3, 32, 32)
    model = student(net, proj_drop_rate=0.5, drop_path_rate=0.5, **options)
    full = FullPrecision(model)
    root = information_root(fisher_information(full, images)[0], 18)
    calibrate(model, images)
    block = model.eval().blocks[0]
    with torch.no_grad():
        (x, target), (x_others, target_others) = ((x, full.block(0, x)) for x in map(full.embed, (images, others)))
        before = weighted_error(block(x_others) - target_others, root)
        config = Reconstruction(epochs=20)
        reconstruction._refine(block, x, target, root, config, 0, MetricLogger('', 140, 100, x.device))
        assert weighted_error(block(x_others) - target_others, root) < 0.85 * before
    assert not any(module.training for module in block.modules()) and block.mlp.fc2.drop == 0.5


@pytest.mark.slow
def test_the_whole_network_is_calibrated():
    net, images, others = float_network(), torch.randn(64, 3, 32, 32), torch.randn(64, 3, 32, 32)
    fitted = student(net)
    learned, published = copy.deepcopy(fitted).train(), copy.deepcopy(fitted)
    calibrate_to_full_precision(fitted, images)
    calibrate(published, images)
    reconstruct(learned, images, Reconstruction(epochs=2))
    assert is_calibrated(learned) and learned.training and not learned.has_twin_tokens
    assert error_of(learned, net, others) < 1.1 * error_of(fitted, net, others) < 0.5 * error_of(published, net, others)


@pytest.mark.slow
def test_a_block_that_learns_nothing_keeps_its_closed_forms(monkeypatch):
    images = torch.randn(32, 3, 32, 32)
    fitted = student(float_network())
    learned = copy.deepcopy(fitted)
    calibrate_to_full_precision(fitted, images)
    monkeypatch.setattr(reconstruction, 'RATES', dict.fromkeys(reconstruction.RATES, 1e6))
    reconstruct(learned, images, Reconstruction(epochs=1))
    for name, value in fitted.blocks[0].state_dict().items():
        assert torch.equal(learned.blocks[0].state_dict()[name], value), name


@pytest.mark.slow
def test_an_interrupted_calibration_continues_to_the_same_result(monkeypatch, tmp_path, capsys):
    net, images, progress = float_network(), torch.randn(32, 3, 32, 32), tmp_path / 'calibration.pth'
    whole, interrupted, other = student(net), student(net), student(net)
    random = torch.get_rng_state()
    reconstruct(whole, images, Reconstruction(epochs=2))
    assert torch.equal(torch.get_rng_state(), random)
    refine, calls = reconstruction._refine, []

    def interrupt(*args):
        calls.append(args)
        if len(calls) == 2:
            raise KeyboardInterrupt
        refine(*args)

    monkeypatch.setattr(reconstruction, '_refine', interrupt)
    with pytest.raises(KeyboardInterrupt):
        reconstruct(interrupted, images, Reconstruction(epochs=2), progress)
    monkeypatch.setattr(reconstruction, '_refine', refine)
    capsys.readouterr()
    reconstruct(other, images + 1, Reconstruction(epochs=2), tmp_path / 'other.pth')
    assert 'calibrated already' not in capsys.readouterr().out
    again = student(net)
    reconstruct(again, images, Reconstruction(epochs=2), progress)
    assert f'{progress}: 1 of 2 blocks are calibrated already' in capsys.readouterr().out and not progress.exists()
    for name, value in whole.state_dict().items():
        assert torch.equal(again.state_dict()[name], value), name


@pytest.mark.slow
def test_interrupted_tuning_continues_to_the_same_result(monkeypatch, tmp_path, capsys):
    net, images, progress = float_network(), torch.randn(32, 3, 32, 32), tmp_path / 'calibration.pth'
    config = Reconstruction(tuning=8)  # 14 updates of 16 images
    monkeypatch.setattr(reconstruction, 'KEPT_EVERY', 5)
    whole, interrupted, again = student(net), student(net), student(net)
    reconstruct(whole, images, config)
    view_of, calls = reconstruction.view_of, []

    def interrupt(*args):
        calls.append(args)
        if len(calls) == 8:
            raise KeyboardInterrupt
        return view_of(*args)

    monkeypatch.setattr(reconstruction, 'view_of', interrupt)
    with pytest.raises(KeyboardInterrupt):
        reconstruct(interrupted, images, config, progress)
    monkeypatch.setattr(reconstruction, 'view_of', lambda *args: calls.append(args) or view_of(*args))
    calls.clear()
    reconstruct(again, images, config, progress)
    assert '2 of 2 blocks are calibrated already' in capsys.readouterr().out and not progress.exists()
    assert len(calls) == 14 - 5
    for name, value in whole.state_dict().items():
        assert torch.equal(again.state_dict()[name], value), name


@pytest.mark.parametrize('is_better', [True, False])
def test_tuning_is_kept_where_held_out_images_gain(is_better, monkeypatch, capsys):
    net, images = float_network(), torch.randn(64, 3, 32, 32)
    before, after = student(net), student(net)
    reconstruct(before, images, Reconstruction(tuning=0))
    monkeypatch.setattr(reconstruction, 'TUNING_RATE', 0.1 if is_better else 1000.)
    reconstruct(after, images, Reconstruction(tuning=20))
    same = [torch.equal(value, before.state_dict()[name]) for name, value in after.state_dict().items()]
    assert all(same) is not is_better

    wanted = student(net)
    halve_attention_to_twins(wanted, images)
    wanted = FullPrecision(wanted)(images[56:]).log_softmax(-1)

    def error(model):
        return F.kl_div(model(images[56:]).log_softmax(-1), wanted, log_target=True, reduction='batchmean').item()
    if is_better:
        assert error(after) < error(before)


@pytest.mark.slow
def test_the_progress_of_other_images_is_not_taken(tmp_path, capsys):
    net, progress = float_network(), tmp_path / 'calibration.pth'
    reconstruction._Progress(student(net), progress, 'of another calibration').keep(1)
    reconstruct(student(net), torch.randn(32, 3, 32, 32), Reconstruction(epochs=1), progress)
    assert 'calibrated already' not in capsys.readouterr().out


def test_too_few_images_are_refused():
    with pytest.raises(UserError, match='needs at least 16 images, not 8: raise --calibration-images'):
        reconstruct(student(float_network()), torch.randn(8, 3, 32, 32))


def test_networks_without_full_precision_are_refused(capsys):
    assert run(*TINY, '--calibration', 'reconstruct') == 2
    assert '--calibration reconstruct fits to full-precision weights: name them with --finetune' in \
        capsys.readouterr().err
