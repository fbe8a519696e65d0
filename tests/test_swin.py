"""Swin transformers: equal to timm's own with the quantizers off, close at 8 bits, started from weights of all kinds,
calibrated, trained and deployed."""

import json
import re

import pytest
import timm
import torch
from helpers import relative, run
from torch import nn

import cost
import deploy
import quant_swin_transformer  # noqa: F401  registers the variants
from _quan_base import ActQ, LinearQ, is_calibrated, named_quantizers
from analysis.codes import code_statistics
from analysis.cost import countings, summary
from analysis.inspection import attention_distances, class_token_maps
from analysis.precision import analyse, manifest
from calibration.closed_form import calibrate_to_full_precision
from calibration.first_batch import calibrate
from calibration.full_precision import FullPrecision
from calibration.reconstruction import Reconstruction, reconstruct
from checkpoints.descriptions import ModelInfo, check_kwargs, check_sizes
from checkpoints.files import write_checkpoint
from checkpoints.full_precision import load_full_precision
from checkpoints.networks import open_features
from checkpoints.packed import read_packed, write_packed
from deployment.integer_swin import IntegerSwin
from deployment.native import NativeUnavailable, NativeViT
from deployment.onnx_export import export_onnx
from deployment.predictor import build_predictor, integer_network
from losses import Distillation, DistillationLoss, check_dgd_compatible
from models import Teacher
from utils import UserError

SMALL = {'img_size': 56, 'patch_size': 4, 'embed_dim': 24, 'depths': (2, 2), 'num_heads': (2, 4), 'num_classes': 10,
         'drop_path_rate': 0.}
FORMS = {  # maps of whole windows, of padded ones, and smaller than a window
    'whole windows': {}, 'padded windows': {'img_size': 40, 'window_size': 4}, 'small maps': {'img_size': 24},
    'oblong': {'img_size': (32, 56), 'window_size': (4, 7)}, 'odd maps': {'img_size': 36, 'window_size': 3}}
EVERY_FORM = pytest.mark.parametrize('form', FORMS)
NAME = 'fourbits_swin_tiny_patch4_window7_224'

pytestmark = pytest.mark.usefixtures('one_thread')


def timms(form: str = 'whole windows', **options) -> nn.Module:
    """timm's network with weights that matter everywhere, float64."""
    torch.manual_seed(0)
    net = timm.create_model('swin_tiny_patch4_window7_224', **SMALL | FORMS[form] | options).double().eval()
    for name, parameter in net.named_parameters():
        is_norm = 'norm' in name and name.endswith('weight')
        nn.init.normal_(parameter, float(is_norm), 0.5 if name.endswith('bias_table') else 0.1)
    return net


def quantized(form: str = 'whole windows', name: str = NAME, **options) -> nn.Module:
    torch.manual_seed(1)
    return timm.create_model(name, **SMALL | FORMS[form] | options).double().eval()


def student(net: nn.Module, form: str = 'whole windows', **options) -> nn.Module:
    model = quantized(form, **options)
    load_full_precision(model, net.state_dict())
    return model


def images(form: str = 'whole windows', count: int = 4) -> torch.Tensor:
    size = timm.layers.to_2tuple((SMALL | FORMS[form])['img_size'])
    return torch.randn(count, 3, *size, dtype=torch.float64, generator=torch.Generator().manual_seed(2))


# --- the network ------------------------------------------------------------------------------------------------------


@EVERY_FORM
def test_without_quantizers_it_is_timms_network(form):
    net, x = timms(form), images(form)
    with torch.no_grad():
        torch.testing.assert_close(FullPrecision(student(net, form))(x), net(x), rtol=1e-10, atol=1e-10)


@EVERY_FORM
def test_the_forward_is_timms_where_the_quantizers_change_nothing(form, monkeypatch):
    net, x = timms(form), images(form)
    model = student(net, form, irm=False)
    calibrate(model, x)
    monkeypatch.setattr(ActQ, 'forward', lambda self, x: x)
    for _, layer in named_quantizers(model):
        if not isinstance(layer, ActQ):
            plain = nn.Linear if isinstance(layer, nn.Linear) else nn.Conv2d
            gelu = nn.functional.gelu if hasattr(layer, 'drop') else nn.Identity()
            monkeypatch.setattr(layer, 'forward', lambda x, layer=layer, plain=plain, gelu=gelu:
                                plain.forward(layer, gelu(x)))
    with torch.no_grad():
        torch.testing.assert_close(model(x), net(x), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize('form, quantize_attn', [('small maps', True), ('odd maps', True), ('oblong', False)])
def test_at_8_bits_it_is_close_and_nothing_but_the_quantizers_is_new(form, quantize_attn):
    net, x = timms(form), images(form, 8)
    model = student(net, form, weight_bits=8, act_bits=8, irm=False, quantize_attn=quantize_attn)
    new = {name for name in model.state_dict() if name not in net.state_dict()}
    assert set(model.state_dict()) - new == set(net.state_dict())
    assert all(name.rpartition('.')[2] in ('alpha', 'zero_point', 'init_state', 'signed') for name in new)
    calibrate_to_full_precision(model, x)
    with torch.no_grad():
        assert 0 < relative(model(x), net(x)) < 0.05


@pytest.mark.parametrize('size, depths', [('tiny', [2, 2, 6, 2]), ('small', [2, 2, 18, 2])])
@pytest.mark.parametrize('bits_name, bits', [('twobits', 2), ('threebits', 3), ('fourbits', 4)])
def test_every_variant(bits_name, bits, size, depths):
    name = f'{bits_name}_swin_{size}_patch4_window7_224'
    with torch.device('meta'):
        model = timm.create_model(name)
        theirs = timm.create_model(f'swin_{size}_patch4_window7_224')
    assert [len(stage.blocks) for stage in model.layers] == depths
    assert [block.attn.num_heads for block in model.blocks[::2]] == [
        heads for heads, depth in zip((3, 6, 12, 24), depths, strict=True) for _ in range(depth // 2)]
    assert {name: value.shape for name, value in theirs.state_dict().items()}.items() <= {
        name: value.shape for name, value in model.state_dict().items()}.items()
    for path, quantizer in named_quantizers(model):
        wanted = bits if path.startswith('layers.') else 8
        assert (quantizer.bits if isinstance(quantizer, ActQ) else quantizer.weight_bits) == wanted, path
    linear = {path for path, module in theirs.named_modules() if isinstance(module, nn.Linear | nn.Conv2d)}
    assert linear == {path for path, quantizer in named_quantizers(model) if not isinstance(quantizer, ActQ)}
    assert f'swin_{size}_patch4_window7_224' in model.default_cfg['url'] or model.default_cfg['hf_hub_id']
    assert model.default_cfg['classifier'] == 'head.fc' and isinstance(model.head.fc, LinearQ)


def test_training_and_evaluation_return_logits_and_blocks():
    model, x = student(timms()), images()
    model.train()
    logits, blocks = model(x, return_blocks=True)
    assert logits.shape == (4, 10) and is_calibrated(model)
    assert [tuple(block.tokens.shape) for block in blocks] == [(4, 196, 24)] * 2 + [(4, 49, 48)] * 2
    assert [tuple(block.q.shape) for block in blocks] == [(16, 2, 49, 12)] * 2 + [(4, 4, 49, 12)] * 2
    logits.sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    with torch.no_grad():
        torch.testing.assert_close(model.eval()(x), logits.detach())


def test_gradient_checkpointing_changes_nothing():
    found = []
    for checkpointing in (False, True):
        model = student(timms()).train()
        calibrate(model, images())
        model.set_grad_checkpointing(checkpointing)
        model(images()).square().sum().backward()
        found.append({name: parameter.grad for name, parameter in model.named_parameters()})
    for name, gradient in found[0].items():
        torch.testing.assert_close(found[1][name], gradient, msg=name)


def test_a_shifted_window_sees_no_other_part_of_the_image():
    """Within a window that the shift put together from two borders, tokens attend to their own border alone."""
    model, x = student(timms()), images(count=1)
    calibrate(model, images())
    block, tokens = model.blocks[1], model.embed(x)
    attn = block.attn.probabilities(*block(tokens, return_qk=True)[1])  # (4 windows, heads, 49, 49)
    place = torch.arange(196.).view(1, 196, 1)
    rows = block.windows.split(place).div(14, rounding_mode='floor')[..., 0]
    apart = (rows[-1][:, None] - rows[-1][None]).abs() > 7  # the last window holds rows 10 to 13 and 0 to 2
    assert apart.any() and attn[-1][:, apart].max() < 1e-30 and attn[-1][:, ~apart].max() > 0.02


@pytest.mark.parametrize('option, value', [
    ('strict_img_size', False), ('head_dim', 8), ('norm_layer', nn.Identity), ('global_pool', 'max'),
    ('embed_layer', nn.Identity), ('dynamic_img_size', True), ('patch_size', 5)])
def test_what_there_is_not_is_refused_in_a_line(option, value):
    with pytest.raises(ValueError, match=option) as refused:
        timm.create_model(NAME, **SMALL | {option: value})
    assert '\n' not in str(refused.value)


def test_another_number_of_classes_and_another_size():
    model = quantized()
    model.reset_classifier(3)
    assert isinstance(model.head.fc, LinearQ) and model.head.fc.weight_bits == 8
    model.set_input_size((28, 28), window_size=7)
    model.train()
    assert model(images()[:, :, :28, :28]).shape == (4, 3)
    model.reset_classifier(0, '')
    assert model.heads == (model.head.fc,) and isinstance(model.head.fc, nn.Identity)


def test_no_weight_decay_of_position_biases_and_quantizers():
    model = quantized()
    kept = model.no_weight_decay()
    assert 'layers.0.blocks.0.attn.relative_position_bias_table' in kept
    assert {'layers.1.downsample.reduction.alpha', 'layers.1.downsample.reduction.act.zero_point'} <= kept
    assert kept <= {name for name, _ in model.named_parameters()}


# --- full-precision files ---------------------------------------------------------------------------------------------


def test_files_of_swins_authors_compute_the_same():
    net, x = timms(), images()
    state = {name.replace('head.fc.', 'head.').replace('layers.1.downsample', 'layers.0.downsample'): value
             for name, value in net.state_dict().items()}
    state |= {'layers.0.blocks.0.attn.relative_position_index': torch.zeros(49, 49),
              'layers.0.blocks.1.attn_mask': torch.zeros(4, 49, 49)}
    model = quantized()
    assert load_full_precision(model, {'model': state}) == []
    with torch.no_grad():
        torch.testing.assert_close(FullPrecision(model)(x), net(x), rtol=1e-10, atol=1e-10)


def test_what_is_adapted_is_said():
    model = quantized(num_classes=3, window_size=5, img_size=40)
    notes = load_full_precision(model, timms().state_dict())
    assert len(notes) == 2 and 'relative position biases resized' in notes[0] and 'heads start anew' in notes[1]
    headless = {name: value for name, value in timms().state_dict().items() if not name.startswith('head')}
    assert load_full_precision(quantized(), headless) == ['the checkpoint has no head: it starts anew']


@pytest.mark.parametrize('theirs, options', [
    ('vit_tiny_patch16_224', {'depth': 1, 'patch_size': 4, 'num_heads': 2}),
    ('swinv2_tiny_window8_256', {'depths': (2, 2), 'num_heads': (2, 4), 'img_size': 32})])
def test_weights_of_another_network_are_refused_in_a_line(theirs, options):
    given = timm.create_model(theirs, num_classes=10, embed_dim=24, **options).state_dict()
    with pytest.raises(UserError, match='lacks .* has unknown|has shape') as refused:
        load_full_precision(quantized(), given)
    assert '\n' not in str(refused.value)


# --- calibration ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize('form, irm', [('small maps', True), ('odd maps', False)])
def test_fits_are_closer_than_the_first_batch(form, irm):
    net, x = timms(form), images(form, 24)
    fitted, published = (student(net, form, irm=irm) for _ in range(2))
    calibrate(published, x)
    calibrate_to_full_precision(fitted, x)
    fresh = torch.randn_like(x)
    with torch.no_grad():
        assert relative(fitted(fresh), net(fresh)) < 0.8 * relative(published(fresh), net(fresh))


def test_reconstruction(tmp_path):
    net, x = timms('small maps'), images('small maps', 32)
    model = student(net, 'small maps')
    reconstruct(model, x, Reconstruction(epochs=1), tmp_path / 'progress.pth')
    assert is_calibrated(model) and not list(tmp_path.iterdir())
    fitted = student(net, 'small maps')
    calibrate_to_full_precision(fitted, x)
    with torch.no_grad():
        assert relative(model(x), net(x)) < 1.05 * relative(fitted(x), net(x))


# --- distillation -----------------------------------------------------------------------------------------------------


def gram(x: torch.Tensor) -> torch.Tensor:
    product = x @ x.mT
    return product / torch.linalg.matrix_norm(product, keepdim=True)


def windows_of_teacher(net: nn.Module, x: torch.Tensor) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """q and k of every window, from what timm's attention modules are called with."""
    found = []

    def keep(attn: nn.Module, inputs: tuple) -> None:
        q, k, _ = attn.qkv(inputs[0]).unflatten(-1, (3, attn.num_heads, -1)).permute(2, 0, 3, 1, 4)
        found.append((q, k))

    hooks = [block.attn.register_forward_pre_hook(keep) for stage in net.layers for block in stage.blocks]
    net(x)
    for hook in hooks:
        hook.remove()
    return found


def test_dgd_compares_window_by_window():
    net, x = timms('odd maps'), images('odd maps')
    model = student(net, 'odd maps').train()
    assert check_dgd_compatible(model, net) is None
    loss = DistillationLoss(nn.CrossEntropyLoss(), Teacher(net, return_qk=True, return_tokens=True),
                            Distillation(dgd_weight=1., token_weight=1.), model.num_prefix_tokens)
    logits, blocks = model(x, return_blocks=True)
    parts = loss(x, logits, torch.zeros(4, dtype=torch.long), blocks)
    with torch.no_grad():
        wanted = [torch.zeros(()).double() for _ in range(2)]
        for block, theirs in zip(blocks, windows_of_teacher(net, x), strict=True):
            for which, (ours, their) in enumerate(zip((block.q, block.k), theirs, strict=True)):
                assert ours.shape == their.shape and ours.shape[-2] == 9
                wanted[which] += torch.linalg.matrix_norm(gram(ours) - gram(their)).mean(0).sum()
    torch.testing.assert_close(parts['loss_dgd_q'], wanted[0])
    torch.testing.assert_close(parts['loss_dgd_k'], wanted[1])
    assert parts['loss_tokens'] > 0
    parts['loss'].backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


@pytest.mark.parametrize('options, said', [
    ({'window_size': 4}, r'within windows of \(7, 7\), shifted by \(0, 0\), in the student, and of \(4, 4\)'),
    ({'depths': (2, 3)}, 'the student has 4 layers, the teacher 5'),
    ({'num_heads': (4, 4)}, r'the student has \[2, 2, 4, 4\] heads by layer')])
def test_dgd_needs_the_same_windows(options, said):
    assert re.search(said, check_dgd_compatible(quantized(), timms(**options)))


# --- costs ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize('size, depths, gigas', [('tiny', (2, 2, 6, 2), 4.5), ('small', (2, 2, 18, 2), 8.7)])
def test_macs_by_hand(size, depths, gigas):
    """The published counts of the full-precision networks are 4.5 and 8.7 G."""
    macs = 56 * 56 * (4 * 4 * 3) * 96 + 768 * 1000  # patch embedding and head
    for stage, depth in enumerate(depths):
        tokens, dim = (56 >> stage) ** 2, 96 << stage
        of_block = 12 * tokens * dim ** 2 + 2 * tokens * 49 * dim  # qkv, proj and MLP; scores and values
        macs += depth * of_block + (tokens * (2 * dim) * dim if stage else 0)
    with torch.device('meta'):
        nets = [timm.create_model(f'{bits}swin_{size}_patch4_window7_224') for bits in ('', 'fourbits_')]
    for net in nets:
        row = summary('net', net)
        assert row['macs'] == macs and round(macs / 1e9, 1) == gigas
        assert row['parameters'] >= row['full_precision_size_bytes'] / 4 == sum(p.numel() for p in nets[0].parameters())
    four_bits = 4 * 4 * (macs - 56 * 56 * 48 * 96 - 768 * 1000) + 64 * (56 * 56 * 48 * 96 + 768 * 1000)
    assert row['bops'] == four_bits


def test_manifest_and_countings():
    model = quantized('odd maps')
    calibrate(model, images('odd maps'))
    tensors, products = analyse(model)
    rows = manifest(tensors)
    places = list(dict.fromkeys(row['where'] for row in rows))
    assert places == ['patch_embed', 'layers.0.blocks.0-1', 'layers.1.downsample', 'layers.1.blocks.0-1', 'norm',
                      'pool', 'head', 'logits']
    named = {row['quantizer'] for row in rows if row['quantizer']}
    assert {'attn.qkv', 'attn.attn_act', 'mlp.fc2.act', 'reduction.act', 'fc.act'} <= named
    assert sum(tensor.elements for tensor in tensors if tensor.parameter) + sum(
        tensor.scales + tensor.zero_points for tensor in tensors) == sum(p.numel() for p in model.parameters())
    scores = next(tensor for tensor in tensors if tensor.name == 'layers.1.blocks.0.attn.attn_act')
    assert scores.elements == 4 * 4 * 9 * 9  # 5 x 5 tokens in 4 windows of 9, 4 heads
    blocks, whole = countings(model)[:2]
    edges = sum(p.macs for p in products if p.layer in ('patch_embed.proj', 'head.fc'))
    assert whole['full_precision'] - blocks['full_precision'] == edges + sum(p.macs for p in products if p.is_attention)


# --- files and integers -----------------------------------------------------------------------------------------------


OPTIONS = {'embed_dim': 24, 'depths': [2, 2], 'num_heads': [2, 4]}


def calibrated(form: str = 'whole windows', **options) -> nn.Module:
    model = student(timms(form), form, **options)
    calibrate(model, images(form))
    return model


def test_a_packed_file_gives_the_same_logits(tmp_path):
    model, x = calibrated().float(), images().float()
    path = tmp_path / 'net.qvit.safetensors'
    write_packed(model, ModelInfo(NAME, OPTIONS, 10, 56), path)
    with torch.no_grad():
        torch.testing.assert_close(read_packed(path).network()(x), model(x), rtol=1e-4, atol=1e-4)


@EVERY_FORM
@pytest.mark.parametrize('options', [{}, {'irm': False}, {'quantize_attn': False}])
def test_integers_are_exact_per_tensor(form, options):
    model, x = calibrated(form, act_granularity='tensor', **options), images(form)
    network = IntegerSwin(model, dtype=torch.float64)
    with torch.no_grad():
        torch.testing.assert_close(network(x), model(x), rtol=1e-8, atol=1e-8)
    assert network.exact


@pytest.mark.parametrize('terms, most', [(1, 0.2), (2, 0.005)])
def test_folded_channels_are_close(terms, most):
    """Layer by layer on the same input: a code that rounds otherwise is 1/16 of its range, which layers add up."""
    model, x = calibrated('odd maps'), images('odd maps')
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for _, quantizer in named_quantizers(model):  # the first batch gives all channels one scale
            quantizer.alpha.mul_(1 + torch.rand(quantizer.alpha.shape, generator=generator))
        network = IntegerSwin(model, terms, torch.float64)
        assert not network.exact
        stream, layers = model.embed(x), iter(network.layers)
        assert relative(network.norm_pre(network.embedded(x)), stream) < 0.005  # always two terms
        for index, block in enumerate(model.blocks):
            for layer in (*filter(None, [model.transitions.get(index)]), block):
                given, stream = stream, layer(stream)
                assert 0 < relative(next(layers)(given), stream) < most
        assert next(layers, None) is None


def test_what_has_no_form_for_it_says_so_in_a_line(tmp_path, capsys):
    model = calibrated('small maps')
    network = integer_network(model)
    with pytest.raises(NativeUnavailable, match='the kernels are for ViT and DeiT'):
        NativeViT(network)
    assert build_predictor(model).__class__.__name__ == 'IntegerSwin'
    assert 'plain torch, which is slower: the kernels are for ViT and DeiT' in capsys.readouterr().out
    with pytest.raises(UserError, match='--backend native: the kernels are for ViT and DeiT'):
        build_predictor(model, backend='native')
    for net in (network, timms()):
        with pytest.raises(UserError, match='has no ONNX form: only a ViT or DeiT can be exported'):
            export_onnx(net, tmp_path / 'net.onnx')
    for picture in (lambda: class_token_maps(model, images('small maps'), 0),
                    lambda: attention_distances(model, images('small maps'))):
        with pytest.raises(UserError, match='QSwinTransformer attends within windows'):
            picture()


def test_code_statistics_cover_every_quantizer():
    model, x = calibrated('small maps'), images('small maps')
    assert set(code_statistics(model, x)) == {name for name, _ in named_quantizers(model)}


def test_features_of_a_file(tmp_path):
    model, x = calibrated().float(), images().float()
    write_checkpoint({'model': model.state_dict(), 'qvit': ModelInfo(NAME, OPTIONS, 10, 56).to_dict()},
                     tmp_path / 'net.pth')
    _, net, _ = open_features(tmp_path / 'net.pth', out_indices=(0, 1))
    with torch.no_grad():
        found, blocks = net(x), model(x, return_blocks=True)[1]
    assert net.feature_info.channels() == [24, 48] and net.feature_info.reduction() == [4, 8]
    for feature, block in zip(found, (blocks[1], blocks[3]), strict=True):
        torch.testing.assert_close(feature.flatten(2).mT, block.tokens)


@pytest.mark.parametrize('name, value', [('depths', [2, 0]), ('depths', 2), ('depths', []), ('num_heads', ['3']),
                                         ('window_size', 0), ('window_size', [[7, 7]]), ('depths', [1] * 17)])
def test_descriptions_have_bounds(name, value):
    with pytest.raises(UserError, match=name):
        check_kwargs({name: value}, 'net.pth')
    check_kwargs({'depths': (2, 2, 6, 2), 'num_heads': [3, 6, 12, 24], 'window_size': (7, 7)}, 'net.pth')


@pytest.mark.parametrize('name, value', [('embed_dim', 96), ('depths', (2, 4)), ('depths', [2, 2, 2])])
def test_descriptions_of_other_sizes_are_refused(name, value):
    state = quantized().state_dict()
    check_sizes(ModelInfo(NAME, OPTIONS, 10, 56), state, 'net.pth')
    with pytest.raises(UserError, match=f'its description has {name}=.*: it is damaged'):
        check_sizes(ModelInfo(NAME, OPTIONS | {name: value}, 10, 56), state, 'net.pth')


# --- whole runs -------------------------------------------------------------------------------------------------------

TINY = ('--model-kwargs', 'embed_dim=32', 'depths=(2,1)', 'num_heads=(2,4)', 'patch_size=4', 'window_size=2',
        '--input-size', '16', '--batch-size', '64', '--num_workers', '0', '--device', 'cpu', '--warmup-epochs', '0',
        '--weight-decay', '0', '--no-repeated-aug', '--mixup', '0', '--cutmix', '0', '--reprob', '0', '--smoothing',
        '0', '--print-freq', '20')


@pytest.mark.whole_run
def test_from_full_precision_to_a_packed_file(tmp_path, capsys):
    assert run(*TINY, '--model', 'swin_tiny_patch4_window7_224', '--epochs', 3, '--opt', 'adamw', '--lr', '1e-2',
               '--output_dir', tmp_path / 'teacher') == 0
    teacher, out, packed = tmp_path / 'teacher' / 'best_checkpoint.pth', tmp_path / 'out', tmp_path / 'net.safetensors'
    assert run(*TINY, '--model', NAME, '--opt', 'fusedlamb', '--lr', '5e-3', '--finetune', teacher, '--teacher-path',
               teacher, '--distillation-type', 'hard', '--calibration', 'mse', '--epochs', 1, '--output_dir', out) == 0
    assert '--dgd-weight 1: the layers and heads of the teacher match' in capsys.readouterr().out
    log = [json.loads(line) for line in (out / 'log.txt').read_text().splitlines()]
    assert log[-1]['test_acc1'] > 60 and log[-1]['train_loss_dgd_q'] > 0
    assert NAME in (out / 'model_card.md').read_text() and 'bops' in (out / 'model_card.json').read_text()

    best = out / 'best_checkpoint.pth'
    assert run('--eval', '--resume', best, '--device', 'cpu', '--num_workers', 0) == 0
    accuracy = re.search(r'\* Acc@1 (\S+)', capsys.readouterr().out)[1]
    assert deploy.main(['pack', str(best), '--output', str(packed)]) == 0
    assert deploy.main(['eval', str(packed), '--arithmetic', 'float', '--num-workers', '0']) == 0
    assert f'* Acc@1 {accuracy}' in capsys.readouterr().out
    assert deploy.main(['eval', str(packed), '--arithmetic', 'int8x2', '--num-workers', '0']) == 0
    assert abs(float(re.search(r'\* Acc@1 (\S+)', capsys.readouterr().out)[1]) - float(accuracy)) < 2
    assert cost.main(['--checkpoint', str(best), '--packed', str(packed)]) == 0
