"""Networks with one head: equal to timm's own with the quantizers off, close at 8 bits, started from weights of all
kinds, calibrated, trained and deployed."""

import json
import re
import runpy
import sys

import pytest
import timm
import torch
from helpers import FORMS, ROOT, TINY, relative, run
from torch import nn

import cost
import deploy
import quant_vision_transformer  # noqa: F401  registers the variants
from _quan_base import ActQ, LinearQ, is_calibrated, named_quantizers
from analysis.codes import code_statistics
from analysis.inspection import attention_distances, class_token_maps
from calibration.closed_form import calibrate_to_full_precision
from calibration.first_batch import calibrate
from calibration.full_precision import FullPrecision, fold_layer_scale
from calibration.importance import fisher_information, information_root, weighted_error
from calibration.reconstruction import Reconstruction, reconstruct
from checkpoints.files import write_checkpoint
from checkpoints.full_precision import load_full_precision
from checkpoints.networks import ModelInfo, open_features
from utils import UserError

SMALL = {'img_size': 32, 'patch_size': 8, 'embed_dim': 48, 'depth': 2, 'num_heads': 3, 'num_classes': 10}
EVERY_FORM = pytest.mark.parametrize('form', FORMS)

pytestmark = pytest.mark.usefixtures('one_thread')


def timms(form: str = 'vit', **options) -> nn.Module:
    """timm's network with weights that matter everywhere, float64."""
    torch.manual_seed(0)
    net = timm.create_model('vit_tiny_patch16_224', **SMALL | FORMS[form] | options).double().eval()
    for name, parameter in net.named_parameters():
        nn.init.normal_(parameter, 1. if name.endswith(('norm.weight', 'norm1.weight', 'norm2.weight')) else 0., 0.1)
    return net


def quantized(form: str = 'vit', name: str = 'fourbits_vit_tiny_patch16_224', **options) -> nn.Module:
    torch.manual_seed(1)
    return timm.create_model(name, **SMALL | FORMS[form] | options).double().eval()


def student(net: nn.Module, form: str = 'vit', **options) -> nn.Module:
    model = quantized(form, **options)
    load_full_precision(model, net.state_dict())
    return model


def images(form: str = 'vit', count: int = 4) -> torch.Tensor:
    size = (SMALL | FORMS[form])['img_size']
    return torch.randn(count, 3, size, size, dtype=torch.float64, generator=torch.Generator().manual_seed(2))


# --- the network ------------------------------------------------------------------------------------------------------


@EVERY_FORM
def test_without_quantizers_it_is_timms_network(form):
    net, x = timms(form), images(form)
    with torch.no_grad():
        torch.testing.assert_close(FullPrecision(student(net, form))(x), net(x), rtol=1e-10, atol=1e-10)


@EVERY_FORM
def test_at_8_bits_it_is_close_and_nothing_but_the_options_of_a_block_is_new(form):
    net, x = timms(form), images(form, 16)
    model = student(net, form, weight_bits=8, act_bits=8, irm=False)
    assert set(model.state_dict()) >= set(net.state_dict())
    new = {name for name in model.state_dict() if name not in net.state_dict()}
    assert all(name.rpartition('.')[2] in ('alpha', 'zero_point', 'init_state', 'signed') for name in new)
    calibrate_to_full_precision(model, x)
    with torch.no_grad():
        assert 0 < relative(model(x), net(x)) < 0.05


@pytest.mark.parametrize('size, width, heads', [('tiny', 192, 3), ('small', 384, 6), ('base', 768, 12)])
@pytest.mark.parametrize('bits_name, bits', [('twobits', 2), ('threebits', 3), ('fourbits', 4)])
def test_every_variant(bits_name, bits, size, width, heads):
    name = f'{bits_name}_vit_{size}_patch16_224'
    model = timm.create_model(name, depth=1, img_size=32)
    assert (model.embed_dim, model.blocks[0].attn.num_heads, model.num_prefix_tokens) == (width, heads, 1)
    for path, quantizer in named_quantizers(model):
        wanted = bits if path.startswith('blocks.') else 8
        assert (quantizer.bits if isinstance(quantizer, ActQ) else quantizer.weight_bits) == wanted, path
    assert f'deit_{size}_patch16_224' in model.default_cfg['url']
    assert not hasattr(model, 'head_dist') and isinstance(model.head, LinearQ)


def test_layer_scale_multiplies_what_the_quantized_layers_give():
    model, x = quantized('layer scale'), images('layer scale')
    calibrate(model, x)
    block, tokens = model.blocks[0], model.embed(x)
    with torch.no_grad():
        block.ls1.gamma.copy_(torch.arange(48.))
        block.ls2.gamma.copy_(-torch.arange(48.))
        middle = tokens + torch.arange(48.) * block.attn(block.norm1(tokens))[0]
        wanted = middle - torch.arange(48.) * block.mlp(block.norm2(middle))
        torch.testing.assert_close(block(tokens), wanted, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize('form, read', [
    ('vit', lambda x: x[:, 0]), ('average', lambda x: x[:, 1:].mean(1)), ('gap with registers', lambda x:
     x[:, 4:].mean(1)), ('average of all tokens', lambda x: x.mean(1))])
def test_what_the_head_reads(form, read):
    """Of tokens that count up: with one class token, 16 patches and no norm to speak of."""
    model = quantized(form)
    model.fc_norm = nn.Identity()
    tokens = torch.arange(float(model.num_prefix_tokens + 16)).double()[None, :, None].expand(1, -1, 48)
    assert torch.equal(*model.head_inputs(tokens), read(tokens)) and len(model.heads) == 1


def test_training_and_evaluation_return_logits_and_blocks():
    model, x = quantized('registers'), images('registers')
    calibrate(model, x)
    for mode in (True, False):
        logits, blocks = model.train(mode)(x, return_blocks=True)
        assert logits.shape == (4, 10) and torch.equal(logits, model(x))
        assert [block.q.shape for block in blocks] == [(4, 3, 1 + 4 + 16, 16)] * 2
    model.reset_classifier(7)
    assert isinstance(model.head, LinearQ) and not model.head.calibrated and model.head.out_features == 7
    model.reset_classifier(0, 'avg')
    assert model(x).shape == (4, 48) and model.global_pool == 'avg'


@pytest.mark.parametrize('option, value', [
    ('qk_norm', True), ('proj_bias', False), ('global_pool', 'map'), ('global_pool', 'max'), ('global_pool', 'avgmax'),
    ('class_token', False), ('pos_embed', 'none'), ('final_norm', False), ('norm_layer', 'rmsnorm'),
    ('act_layer', 'relu'), ('mlp_layer', nn.Identity), ('embed_norm_layer', 'layernorm')])
def test_what_there_is_not_is_refused_in_a_line(option, value):
    with pytest.raises(ValueError, match=option) as caught:
        quantized(**{option: value})
    assert '\n' not in str(caught.value)


# --- weights ----------------------------------------------------------------------------------------------------------

STARTS = {  # the form of the weights, that of the model, options of the model, what is said
    'deit3 as a plain ViT': ('deit3', 'vit', ['no LayerScale']),
    'ViT as deit3': ('vit', 'deit3', []),
    'ViT as a ViT with LayerScale': ('vit', 'layer scale', []),
    'registers without positions, as such with': ('dinov2 registers', 'registers', []),
    'registers with positions, as such without': ('registers', 'dinov2 registers', []),
}


@pytest.mark.parametrize('start', STARTS)
def test_weights_of_another_form_compute_the_same(start):
    theirs, ours, said = STARTS[start]
    net, x = timms(theirs), images()
    model = quantized(ours)
    notes = load_full_precision(model, net.state_dict())
    assert len(notes) == len(said) and all(part in note for part, note in zip(said, notes, strict=True))
    with torch.no_grad():
        torch.testing.assert_close(FullPrecision(model)(x), net(x), rtol=1e-10, atol=1e-10)


def dino_file(net: nn.Module) -> dict[str, torch.Tensor]:
    """The state of DINOv2 with registers: a position of the class token, none of the registers, its own names."""
    state = {name: value for name, value in net.state_dict().items() if not name.startswith('head')}
    registers, token = state.pop('reg_token'), state.pop('cls_token')
    position = torch.full_like(token, 0.5)
    return state | {'register_tokens': registers, 'mask_token': torch.zeros(1, 48), 'cls_token': token - position,
                    'pos_embed': torch.cat([position, state['pos_embed']], 1)}


@pytest.mark.parametrize('form', ['registers', 'dinov2 registers'])
@pytest.mark.parametrize('wrapped', [False, True])
def test_dino_files(form, wrapped):
    net, x = timms('dinov2 registers'), images()
    checkpoint = dino_file(net)
    if wrapped:  # as pretraining leaves it
        checkpoint = {'teacher': {f'backbone.{name}': value for name, value in checkpoint.items()}
                      | {'head.mlp.0.weight': torch.zeros(3, 3)}}
    model = quantized(form)
    notes = load_full_precision(model, checkpoint)
    assert len(notes) == 1 + wrapped and 'no head' in notes[-1]
    net.reset_classifier(0)
    model.reset_classifier(0)
    with torch.no_grad():
        torch.testing.assert_close(FullPrecision(model)(x), net(x), rtol=1e-10, atol=1e-10)


def test_deit3_names():
    net, x = timms('deit3'), images()
    state = {name.replace('.ls1.gamma', '.gamma_1').replace('.ls2.gamma', '.gamma_2'): value
             for name, value in net.state_dict().items()}
    assert any('gamma_1' in name for name in state)
    for form in ('deit3', 'vit'):
        model = quantized(form)
        load_full_precision(model, {'model': state})
        with torch.no_grad():
            torch.testing.assert_close(FullPrecision(model)(x), net(x), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize('form', ['vit', 'deit3', 'registers', 'gap with registers'])
def test_positions_are_resized_as_timm_does(form):
    net, size = timms(form, fc_norm=FORMS[form].get('global_pool') == 'avg'), 48
    model = quantized(form, img_size=size)
    notes = load_full_precision(model, net.state_dict())
    assert notes == ['position embeddings resized from 4 x 4 to 6 x 6 patches']
    other = timms(form, img_size=size)
    other.load_state_dict(timm.models.vision_transformer.checkpoint_filter_fn(
        {name: value.float() for name, value in net.state_dict().items()}, other))
    torch.testing.assert_close(model.pos_embed.double(), other.pos_embed, rtol=1e-6, atol=1e-6)


def test_a_distilled_network_leaves_its_second_token_and_head():
    net = timm.create_model('deit_tiny_distilled_patch16_224', **SMALL).double()
    model = quantized()
    assert any('not distilled' in note for note in load_full_precision(model, net.state_dict()))
    assert torch.equal(model.pos_embed, net.pos_embed[:, [0, *range(2, 18)]])
    assert not model.has_twin_tokens


@pytest.mark.parametrize('theirs, options, said', [
    ({'qk_norm': True}, {}, 'qk_norm'),
    ({'mlp_layer': timm.layers.SwiGLU}, {}, 'SwiGLU'),
    ({'mlp_layer': timm.layers.GluMlp}, {}, 'SwiGLU'),
    ({'global_pool': 'map'}, {}, 'pools by attention'),
    ({'reg_tokens': 4}, {}, '--model-kwargs reg_tokens=4'),
    ({'pre_norm': True}, {}, '--model-kwargs pre_norm=True'),
    ({'global_pool': 'avg'}, {}, '--model-kwargs global_pool=avg'),
    ({}, {'global_pool': 'avg'}, '--model-kwargs fc_norm=False'),
    ({'global_pool': 'avg', 'class_token': False}, {'global_pool': 'avg'}, '--model-kwargs class_token=False'),
    ({'reg_tokens': 4}, {'name': 'fourbits_deit_tiny_patch16_224'}, '..._vit_...')], ids=str)
def test_what_cannot_be_taken_is_said_in_a_line(theirs, options, said):
    state = timms(**theirs).state_dict()
    with pytest.raises(UserError) as caught:
        load_full_precision(quantized(**options), state)
    assert said in str(caught.value) and '\n' not in str(caught.value)


# --- calibration ------------------------------------------------------------------------------------------------------


def test_folded_layer_scale_is_the_same_block():
    net, x = timms('layer scale'), images()
    model = student(net, 'layer scale')
    before = FullPrecision(model)(x)
    for block in model.blocks:
        fold_layer_scale(block)
        assert (block.ls1.gamma == 1).all() and (block.ls2.gamma == 1).all()
    torch.testing.assert_close(FullPrecision(model)(x), before, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize('form', ['vit', 'dinov2 registers', 'gap with registers', 'average', 'clip'])
def test_information_has_a_matrix_for_every_prefix_token(form):
    """Against gradients taken one image at a time."""
    net, x = timms(form), images(form, 2)
    full, prefix = FullPrecision(student(net, form)), net.num_prefix_tokens
    found = fisher_information(full, x)
    assert [matrix.shape for matrix in found] == [(prefix + 1, 48, 48)] * 2
    logits = FullPrecision(student(net, form))(x)
    drawn = torch.multinomial(logits.softmax(-1), 1, generator=torch.Generator().manual_seed(0))[:, 0]
    wanted = torch.zeros(prefix + 1, 48, 48).double()
    for image, label in zip(x, drawn, strict=True):
        tokens = full.block(0, full.embed(image[None])).detach().requires_grad_()
        loss = nn.functional.cross_entropy(full.head(full.block(1, tokens)), label[None])
        gradient, = torch.autograd.grad(loss, tokens)
        outer = gradient[0, :, :, None] * gradient[0, :, None, :]
        wanted += torch.cat([outer[:prefix], outer[prefix:].mean(0, keepdim=True)]) / 2
    torch.testing.assert_close(found[0], wanted, rtol=1e-9, atol=1e-12)
    error, root = torch.randn(2, prefix + 16, 48).double(), information_root(found[0], prefix + 16).double()
    by_token = torch.cat([root[:prefix], root[-1:].expand(16, -1, -1)])
    torch.testing.assert_close(weighted_error(error, root), (by_token @ error[..., None]).square().sum()
                               / error.numel(), rtol=1e-6, atol=0)


@pytest.mark.parametrize('way', ['published', 'mse', 'reconstruct'])
@pytest.mark.parametrize('form', ['vit', 'dinov2 registers', 'average'])
def test_every_calibration(form, way):
    net, x = timms(form).float(), images(form, 32).float()
    model = student(net, form, act_bits=6, weight_bits=6).float().train()
    load_full_precision(model, net.state_dict())
    if way == 'published':
        calibrate(model, x)
    elif way == 'mse':
        calibrate_to_full_precision(model, x)
    else:
        reconstruct(model, x, Reconstruction(epochs=1))
    assert is_calibrated(model) and model.training
    with torch.no_grad():
        error = relative(model.eval()(x), net(x))
    assert error < (1. if way == 'published' else 0.3)


@pytest.mark.parametrize('name', ['fourbits_deit_tiny_patch16_224', 'fourbits_vit_tiny_patch16_224'])
@pytest.mark.parametrize('fit', [calibrate_to_full_precision, reconstruct])
def test_fits_need_a_bias_of_queries_keys_and_values(name, fit):
    model, x = quantized(name=name, qkv_bias=False), images('vit', 16)
    with pytest.raises(UserError, match='qkv_bias=False'):
        fit(model, x)
    calibrate(model, x)
    assert model(x).isfinite().all()


def test_the_attention_that_is_drawn_is_that_of_the_class_token():
    model, x = quantized('registers'), images('registers')
    calibrate(model, x)
    assert class_token_maps(model, x, 0).shape == (4, 3, 4, 4)
    headless = quantized('gap with registers')
    calibrate(headless, x)
    with pytest.raises(UserError, match='no class token'):
        class_token_maps(headless, x, 0)
    assert attention_distances(headless, x).shape == (2, 3)
    assert set(code_statistics(headless, x)) == {name for name, _ in named_quantizers(headless)}


# --- whole runs -------------------------------------------------------------------------------------------------------


@pytest.mark.whole_run
@pytest.mark.parametrize('options', [(), ('no_embed_class=True', 'init_values=1e-3', 'global_pool=avg',
                                          'fc_norm=False')])
def test_from_full_precision_to_a_packed_file(teacher_path, tmp_path, capsys, options):
    """The teacher has two tokens: the student takes the class token's, and DGD compares patches."""
    flags = (*TINY, *(('--model-kwargs', *options) if options else ()))
    assert run(*flags, '--model', 'fourbits_vit_tiny_patch16_224', '--finetune', teacher_path, '--teacher-path',
               teacher_path, '--distillation-type', 'hard', '--epochs', 2, '--lr', '2e-2', '--output_dir',
               tmp_path / 'out') == 0
    said = capsys.readouterr().out
    assert '--distillation-type hard: the student has one head, which learns from the labels and from the' in said
    assert 'DGD compares the patch tokens alone: the student has 1 before them, the teacher 2' in said
    log = [json.loads(line) for line in (tmp_path / 'out' / 'log.txt').read_text().splitlines()]
    assert log[-1]['test_acc1'] > 30 and log[-1]['train_loss_dgd_q'] > 0
    assert 'fourbits_vit_tiny_patch16_224' in (tmp_path / 'out' / 'model_card.md').read_text()

    best, packed = tmp_path / 'out' / 'best_checkpoint.pth', tmp_path / 'net.safetensors'
    assert run('--eval', '--resume', best, '--device', 'cpu', '--num_workers', 0) == 0
    accuracy = re.search(r'\* Acc@1 (\S+)', capsys.readouterr().out)[1]
    assert deploy.main(['pack', str(best), '--output', str(packed)]) == 0
    assert deploy.main(['eval', str(packed), '--arithmetic', 'float', '--num-workers', '0']) == 0
    assert f'* Acc@1 {accuracy}' in capsys.readouterr().out
    assert deploy.main(['eval', str(packed), '--arithmetic', 'int8x2', '--backend', 'torch', '--num-workers', '0']) == 0
    assert abs(float(re.search(r'\* Acc@1 (\S+)', capsys.readouterr().out)[1]) - float(accuracy)) < 2
    assert cost.main(['--checkpoint', str(best), '--packed', str(packed)]) == 0


# --- features ---------------------------------------------------------------------------------------------------------


def maps_of(model: nn.Module, x: torch.Tensor) -> list[torch.Tensor]:
    """What each block gives for the patches, in their places."""
    grid = model.patch_embed.grid_size
    return [block.tokens[:, model.num_prefix_tokens:].mT.unflatten(2, grid)
            for block in model(x, return_blocks=True)[1]]


@EVERY_FORM
def test_feature_maps_have_their_stride_and_are_those_of_the_quantized_network(form):
    whole, x = quantized(form), images(form)
    calibrate(whole, x)
    net, patch = quantized(form, features_only=True, out_indices=(0, 1)), (SMALL | FORMS[form])['patch_size']
    assert net.model.load_state_dict(whole.state_dict(), strict=False).missing_keys == []
    assert net.feature_info.channels() == [48, 48] and net.feature_info.reduction() == [patch, patch]
    found, expected = net(x), maps_of(whole, x)
    assert is_calibrated(net) and found[0].shape == (4, 48, x.shape[2] // patch, x.shape[3] // patch)
    assert len(found) == 2 and all(map(torch.equal, found, expected))


@pytest.mark.parametrize('family', ['deit', 'vit'])
def test_features_of_a_file(family, tmp_path):
    name, options = f'fourbits_{family}_tiny_patch16_224', {'depth': 4, 'embed_dim': 48, 'patch_size': 8}
    model = timm.create_model(name, img_size=32, num_classes=10, **options).eval()
    x = images().float()
    calibrate(model, x)
    write_checkpoint({'model': model.state_dict(), 'qvit': ModelInfo(name, options, 10, 32).to_dict()},
                     tmp_path / 'net.pth')
    for indices, blocks in ((2, (2, 3)), ((0, 2), (0, 2)), ([-1], (3,))):
        info, net, _ = open_features(tmp_path / 'net.pth', out_indices=indices)
        assert info.model == name and not net.training and is_calibrated(net)
        found, expected = net(x), maps_of(model, x)
        assert len(found) == len(blocks) and net.feature_info.reduction() == [8] * len(blocks)
        assert all(torch.equal(feature, expected[block]) for feature, block in zip(found, blocks, strict=True))
    with pytest.raises(UserError, match='cannot be built'):
        open_features(tmp_path / 'net.pth', out_indices=[7])


@pytest.mark.whole_run
@pytest.mark.parametrize('family', ['deit', 'vit'])
def test_the_example_trains_a_linear_head_on_frozen_features(family, tmp_path, capsys, monkeypatch):
    info = ModelInfo(f'fourbits_{family}_tiny_patch16_224', {'depth': 3, 'embed_dim': 96, 'patch_size': 4}, 10, 16)
    torch.manual_seed(0)
    model = timm.create_model(info.model, img_size=16, num_classes=10, **info.kwargs)
    calibrate(model, torch.randn(16, 3, 16, 16))
    write_checkpoint({'model': model.state_dict(), 'qvit': info.to_dict()}, tmp_path / 'net.pth')
    main = runpy.run_path(str(ROOT / 'examples' / 'linear_head.py'))['main']
    monkeypatch.setattr(sys, 'argv', ['linear_head.py', '--resume', str(tmp_path / 'net.pth'), '--epochs', '30'])
    assert main() == 0
    said = capsys.readouterr().out
    assert '192 features of blocks with stride 4' in said
    assert float(re.search(r'(\S+)%', said)[1]) > 40  # of a network that was never trained; chance is 10
    monkeypatch.setattr(sys, 'argv', ['linear_head.py', '--resume', str(tmp_path / 'missing.pth')])
    assert main() == 2 and capsys.readouterr().err.count('\n') == 1
