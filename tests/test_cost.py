"""The cost report: counts against counts by hand, and the list of tensors against the network."""

import csv
import io
import json

import pytest
import timm
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import cost
import models  # noqa: F401  registers the aliases
import quant_vision_transformer  # noqa: F401  registers the variants
from _quan_base import ActQ, calibrate, named_quantizers
from analysis.precision import Product, analyse, manifest
from cost import bops, countings, layers, ops, summary, theoretical_size

pytestmark = pytest.mark.usefixtures('one_thread')

TINY, SMALL = 'fourbits_deit_tiny_patch16_224', 'fourbits_deit_small_patch16_224'
DEPTH, PATCHES, TOKENS, CLASSES = 12, 14 * 14, 14 * 14 + 2, 1000
TOY = ('--model-kwargs', 'embed_dim=48', 'depth=2', 'num_heads=3', '--input-size', '48', '--num-classes', '10')


def create(name: str = TINY, **changes):
    return timm.create_model(name, **{'img_size': 48, 'embed_dim': 48, 'depth': 2, 'num_heads': 3, 'num_classes': 10}
                             | changes)


def hand_macs(dim: int, tokens: int = TOKENS, patches: int = PATCHES, heads: int = 2) -> dict[str, int]:
    """qkv, proj, fc1 and fc2 are 3 + 1 + 4 + 4 squares of the width."""
    return {'linear': DEPTH * tokens * 12 * dim ** 2, 'attention': DEPTH * 2 * tokens ** 2 * dim,
            'edges': patches * 3 * 16 * 16 * dim + heads * dim * CLASSES}


def hand_float_parameters(dim: int) -> int:
    """Biases (9 widths a block), LayerNorms (4), patch bias, two tokens, positions, last norm, biases of the heads."""
    return DEPTH * 13 * dim + dim + 2 * dim + TOKENS * dim + 2 * dim + 2 * CLASSES


# --- counts -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(('size', 'dim', 'total'), [('tiny', 192, 1_261_003_776), ('small', 384, 4_624_140_288)])
@pytest.mark.parametrize('bits, share', [(2, 1 / 32), (3, 1 / 16), (4, 1 / 8)])
def test_operations_by_hand(size, dim, total, bits, share):
    model = timm.create_model(f'{ {2: "twobits", 3: "threebits", 4: "fourbits"}[bits]}_deit_{size}_patch16_224')
    row, macs = summary('it', model), hand_macs(dim)
    assert row['macs'] == sum(macs.values()) == total == row['full_precision_ops']
    blocks = macs['linear'] + macs['attention']
    assert row['bops'] == blocks * bits ** 2 + macs['edges'] * 64
    assert row['full_precision_bops'] == total * 1024
    assert row['ops'] == blocks * share + macs['edges'] / 4
    assert row['ops_ratio'] == total / row['ops'] and row['bops_ratio'] == total * 1024 / row['bops']
    assert (row['weight_bits'], row['act_bits'], row['input_size']) == (bits, bits, 224)


@pytest.mark.parametrize('size, dim, heads', [('tiny', 192, 3), ('small', 384, 6)])
def test_size_by_hand(size, dim, heads):
    model = timm.create_model(f'threebits_deit_{size}_patch16_224')
    found, edges = theoretical_size(model), 768 * dim + 2 * CLASSES * dim
    assert found.codes == 3 * DEPTH * 12 * dim ** 2 + 8 * edges
    inputs = DEPTH * (7 * dim + 4 * heads) + 3 + 2 * dim        # channels of every quantized activation
    assert found.zero_points == 32 * inputs
    assert found.steps == 32 * (inputs + DEPTH * 9 * dim + dim + 2 * CLASSES)
    assert found.signs == DEPTH * 8 + 3
    irm = DEPTH * 4 * 64
    assert found.full_precision == 32 * (hand_float_parameters(dim) + irm)
    assert found.bytes == -(-sum(vars(found).values()) // 8)
    assert summary('it', model)['full_precision_size_bytes'] == 4 * (
        DEPTH * 12 * dim ** 2 + edges + hand_float_parameters(dim))


@pytest.mark.parametrize('name', ['deit_tiny_distilled_patch16_224', 'vit_deit_small_distilled_patch16_224'])
def test_the_reference_is_the_full_precision_network(name):
    full = timm.create_model(name)
    student = timm.create_model(TINY if 'tiny' in name else SMALL)
    row, reference = summary('student', student), summary('teacher', full)
    assert reference['size_bytes'] == 4 * sum(p.numel() for p in full.parameters())
    assert reference['size_bytes'] == row['full_precision_size_bytes'] == reference['full_precision_size_bytes']
    assert reference['ops'] == reference['macs'] == row['macs'] and reference['bops'] == row['full_precision_bops']
    assert reference['ops_ratio'] == reference['size_ratio'] == reference['bops_ratio'] == 1
    _, ours = analyse(student)
    _, theirs = analyse(full)
    assert [(p.layer, p.macs) for p in ours] == [(p.layer, p.macs) for p in theirs]


def test_norms_of_queries_and_keys_are_irm_in_quantized_networks_only():
    row = summary('it', create('deit_tiny_patch16_224', qk_norm=True))
    assert row['size_ratio'] == 1 and row['parameters'] == summary('it', create('deit_tiny_patch16_224'))[
        'parameters'] + 2 * 4 * 16


def test_without_a_distillation_token():
    macs = hand_macs(192, TOKENS - 1, heads=1)
    assert summary('it', timm.create_model('vit_deit_tiny_patch16_224'))['macs'] == sum(macs.values()) == 1_253_683_200


@pytest.mark.parametrize('name, changes', [
    (TINY, {}), (TINY, {'img_size': 64, 'quantize_attn': False}), ('deit_tiny_distilled_patch16_224', {}),
    ('deit_tiny_patch16_224', {'img_size': (32, 64)})])
def test_products_are_those_of_a_real_forward(name, changes):
    model = create(name, **changes).eval()
    images = torch.randn(1, 3, *model.patch_embed.img_size)
    calibrate(model, images)
    # Not every version of the counter knows the fused attention of CPUs.
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model(images)
    assert counter.get_total_flops() == 2 * sum(product.macs for product in analyse(model)[1])


def test_bits_follow_the_options():
    row = summary('it', create(weight_bits=2, act_bits=5))
    assert (row['weight_bits'], row['act_bits']) == (2, 5)
    bits = {product.layer: product.bits for product in analyse(create(weight_bits=2, act_bits=5))[1]}
    assert bits['blocks.1.mlp.fc2'] == (5, 2) and bits['blocks.0.attn q k^T'] == bits['blocks.0.attn A v'] == (5, 5)
    assert bits['patch_embed.proj'] == bits['head'] == bits['head_dist'] == (8, 8)
    bits = {product.layer: product.bits for product in analyse(create(quantize_attn=False))[1]}
    assert bits['blocks.0.attn q k^T'] == (32, 32) and bits['blocks.0.attn.proj'] == (4, 4)
    one_step = theoretical_size(create(act_granularity='tensor'))
    assert one_step.zero_points == 32 * (2 * 8 + 3)


@pytest.mark.parametrize('bits, share', [((2, 2), 1 / 32), ((3, 3), 1 / 16), ((4, 4), 1 / 8), ((8, 8), 1 / 4),
                                         ((2, 4), 1 / 8), ((4, 2), 1 / 8), ((5, 5), 1 / 4), ((4, 32), 1),
                                         ((32, 32), 1)])
def test_conventions(bits, share):
    product = Product('it', 320, bits)
    assert ops(product) == 320 * share and bops(product) == 320 * bits[0] * bits[1]


def test_layers_add_up():
    model = create()
    *rows, total = layers(model)
    row = summary('it', model)
    for key in ('macs', 'bops', 'ops'):
        assert sum(r[key] for r in rows) == total[key] == row[key]
    for key in ('size_bytes', 'full_precision_size_bytes'):
        assert sum(r[key] for r in rows) == total[key]
    assert row['size_bytes'] - 1 < total['size_bytes'] <= row['size_bytes']
    by_name = {r['layer']: r for r in rows}
    tokens, dim = 9 + 2, 48
    assert by_name['blocks.1.mlp.fc1']['macs'] == tokens * 4 * dim ** 2
    codes, steps, bias, sign = 4 * 4 * dim ** 2, 32 * (4 * dim + dim + dim), 32 * 4 * dim, 1
    assert by_name['blocks.1.mlp.fc1']['size_bytes'] * 8 == codes + steps + bias + sign
    assert by_name['blocks.0.attn A v']['macs'] == tokens ** 2 * dim
    assert by_name['patch_embed.proj']['ops_ratio'] == 4 and by_name['blocks.0.attn.qkv']['ops_ratio'] == 8


def test_countings_of_small_by_hand():
    ratios = {row['counting']: row['ratio'] for row in countings(timm.create_model(SMALL))}
    macs = hand_macs(384)
    linear, attention, edges = macs.values()
    total = sum(macs.values())

    def is_(counting, expected):
        assert ratios.pop(counting) == pytest.approx(expected, rel=1e-12)

    is_('linear layers of the blocks alone', 8)
    is_('OPs, as this report counts', total / ((linear + attention) / 8 + edges / 4))
    is_('without the attention products, in both networks', (linear + edges) / (linear / 8 + edges / 4))
    is_('patch embedding and heads at full precision', total / ((linear + attention) / 8 + edges))
    is_('one of the two attention products at full precision',
        total / (linear / 8 + attention / 16 + attention / 2 + edges / 4))
    is_('both attention products at full precision', total / (linear / 8 + attention + edges / 4))
    is_('both, and patch embedding and heads', total / (linear / 8 + attention + edges))
    is_('additions apart and in full (2 FLOPs a MAC)', 2 * total / (total + (linear + attention) / 8 + edges / 4))
    is_('BOPs', total * 1024 / ((linear + attention) * 16 + edges * 64))
    # Elementwise: LayerNorms 7 each, softmax 6, GELU 5, sums and biases 1; clip 2, quantizers 7, IRM 7.
    wide, maps = TOKENS * 384, 6 * TOKENS ** 2
    work = DEPTH * (2 * 7 * wide + 6 * maps + 5 * 4 * wide + 2 * wide + 9 * wide) + 7 * wide + wide
    work += PATCHES * 384 + 2 * CLASSES + 2 * CLASSES           # biases of patch embedding and heads; mean of these
    own = work + DEPTH * (2 * 4 * wide + 2 * 7 * wide + 7 * (10 * wide + maps)) + 7 * (3 * 224 ** 2 + 2 * 384)
    quantized = (linear + attention) / 8 + edges / 4
    is_('OPs, and elementwise work of the full-precision kind', (total + work) / (quantized + work))
    is_('OPs, and all elementwise work, quantizers and IRM included', (total + work) / (quantized + own))
    is_('the same, patch embedding and heads at full precision',
        (total + work) / ((linear + attention) / 8 + edges + own))
    assert not ratios


# --- the list of tensors ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize('changes', [{}, {'quantize_attn': False}, {'irm': False}, {'act_granularity': 'tensor'},
                                     {'num_classes': 0}, {'qkv_bias': False}])
def test_every_quantizer_and_every_parameter_is_listed_once(changes):
    model = create(weight_bits=3, act_bits=5, **changes)
    tensors, _ = analyse(model)
    listed = {tensor.quantizer: tensor for tensor in tensors if tensor.quantizer}
    quantizers = dict(named_quantizers(model))
    assert set(listed) == set(quantizers) and len(listed) == sum(tensor.quantizer is not None for tensor in tensors)
    for name, module in quantizers.items():
        is_act = isinstance(module, ActQ)
        assert listed[name].bits == (module.bits if is_act else module.weight_bits), name
        assert listed[name].steps == module.alpha.numel() and listed[name].parameter != is_act
    steps = {f'{name}.{leaf}' for name in quantizers for leaf in ('alpha', 'zero_point')}
    parameters = {name: parameter.numel() for name, parameter in model.named_parameters() if name not in steps}
    assert {tensor.name: tensor.elements for tensor in tensors if tensor.parameter} == parameters


def test_activations_have_the_sizes_of_a_real_forward():
    model, images = create().eval(), torch.randn(1, 3, 48, 48)
    calibrate(model, images)
    elements, names = {}, {module: name for name, module in model.named_modules()}
    lsq = ActQ.qparams
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ActQ, 'qparams', lambda self, x: elements.update({names[self]: x.numel()}) or lsq(self, x))
        model(images)
    listed = {tensor.quantizer: tensor for tensor in analyse(model)[0] if tensor.quantizer and not tensor.parameter}
    assert set(elements) == set(listed)
    for name, tensor in listed.items():
        assert tensor.code_range == model.get_submodule(name).code_range
        if not name.endswith('attn_act'):  # whose steps are asked for with q at hand
            assert tensor.elements == elements[name], name


def test_manifest_of_a_block():
    rows = manifest(analyse(create(depth=3))[0])
    block = {row['tensor']: row['bits'] for row in rows if row['where'] == 'blocks.0-2'}
    quantized = {'qkv input', 'qkv weight', 'q', 'k', 'v', 'attention', 'proj input', 'proj weight', 'fc1 input',
                 'fc1 weight', 'fc2 input', 'fc2 weight'}
    full = {'softmax', 'GELU', 'norm1 (LayerNorm)', 'norm2 (LayerNorm)', 'norm_q (IRM)', 'norm_k (IRM)',
            'residual sum of attn', 'residual sum of mlp', 'qkv bias', 'proj bias', 'fc1 bias', 'fc2 bias'}
    assert {name for name, bits in block.items() if bits == 4} == quantized
    assert full <= {name for name, bits in block.items() if bits == 32} and set(block.values()) == {4, 32}
    outside = {row['tensor']: row['bits'] for row in rows if not row['where'].startswith('blocks')}
    assert {name for name, bits in outside.items() if bits == 8} == {
        f'{layer} {what}' for layer in ('patch', 'head', 'head_dist') for what in ('input', 'weight')}
    assert outside['pos_embed'] == outside['head bias'] == outside['norm (LayerNorm)'] == 32


def test_manifest_keeps_blocks_apart_that_differ():
    model = create(depth=3)
    calibrate(model, torch.randn(2, 3, 48, 48))
    model.blocks[1].attn.v_act.signed_codes = False
    rows = manifest(analyse(model)[0])
    assert [row['where'] for row in rows if row['tensor'] == 'v'] == ['blocks.0', 'blocks.1', 'blocks.2']
    assert [row['codes'] for row in rows if row['tensor'] == 'v'] == ['-8 to 7', '0 to 15', '-8 to 7']
    assert {row['bits'] for row in manifest(analyse(create('deit_tiny_patch16_224'))[0])} == {32}


# --- command line -----------------------------------------------------------------------------------------------------


def said(capsys, *flags) -> str:
    assert cost.main([str(flag) for flag in flags]) == 0
    return capsys.readouterr().out


@pytest.mark.parametrize('report', [(), ('--per-layer',), ('--manifest',), ('--countings',)])
def test_formats_hold_the_same_rows(report, capsys):
    flags = ('--model', TINY, 'deit_tiny_distilled_patch16_224', *TOY, *report, '--format')
    rows = json.loads(said(capsys, *flags, 'json'))
    assert {row['model'] for row in rows} == {TINY, 'deit_tiny_distilled_patch16_224'}
    parsed = list(csv.DictReader(io.StringIO(said(capsys, *flags, 'csv'))))
    assert parsed == [{key: '' if value is None else str(value) for key, value in row.items()} for row in rows]
    table, markdown = said(capsys, *flags, 'table'), said(capsys, *flags, 'markdown')
    assert table.count('\n') == len(rows) + 1 and markdown.count('\n') == len(rows) + 2
    assert len({line.count('|') for line in markdown.splitlines()}) == 1


def test_units(capsys):
    heading, line = said(capsys, '--model', SMALL).splitlines()
    assert 'MACs (G)' in heading and line.split()[:6] == [SMALL, '4', '4', '224', '22.55', '12.69']
    assert line.split()[-3:] == ['0.585', '4.624', '7.90']


def test_bits_size_and_output_file(tmp_path, capsys):
    file, packed = tmp_path / 'report.json', tmp_path / 'packed'
    packed.write_bytes(bytes(1234))
    assert said(capsys, '--model', TINY, *TOY, '--weight-bits', 3, '--act-bits', 8, '--packed', packed, '--format',
                'json', '--output', file) == ''
    row, = json.loads(file.read_text())
    assert (row['weight_bits'], row['act_bits'], row['input_size'], row['packed_bytes']) == (3, 8, 48, 1234)
    assert row['packed_ratio'] == row['full_precision_size_bytes'] / 1234
    assert sorted(path.name for path in tmp_path.iterdir()) == ['packed', 'report.json']


def test_checkpoints(tmp_path, capsys):
    full = create('deit_tiny_patch16_224')
    torch.save({'model': full.state_dict()}, tmp_path / 'full.pth')
    kwargs = {'embed_dim': 48, 'depth': 2, 'num_heads': 3}
    model = create()
    calibrate(model, torch.randn(2, 3, 48, 48))
    torch.save({'model': model.state_dict(), 'qvit': {
        'format_version': 1, 'model': TINY, 'kwargs': kwargs, 'num_classes': 10, 'input_size': 48}}, tmp_path / 'q.pth')
    row, = json.loads(said(capsys, '--checkpoint', tmp_path / 'q.pth', '--format', 'json'))
    assert row == summary(TINY, model)
    named = ('--checkpoint', tmp_path / 'full.pth', '--model', 'deit_tiny_patch16_224', *TOY[:-2], '--format', 'json')
    row, = json.loads(said(capsys, *named))
    assert row == summary('deit_tiny_patch16_224', full)
    assert cost.main(['--checkpoint', str(tmp_path / 'q.pth'), '--model', TINY]) == 2
    assert cost.main(['--checkpoint', str(tmp_path / 'full.pth')]) == 2
    assert 'does not say which network it holds' in capsys.readouterr().err


@pytest.mark.parametrize('flags, message', [
    (('--model', 'fourbit_deit_tiny_patch16_224'), 'did you mean fourbits_deit_tiny_patch16_224'),
    (('--model', 'resnet18'), 'ResNet is not a DeiT'),
    (('--model', TINY, '--weight-bits', '9'), '9'),
    (('--model', TINY, '--input-size', '50'), '50'),
    (('--model', 'deit_tiny_patch16_224', '--act-bits', '4'), 'act_bits'),
    (('--model', TINY, '--num-classes', '0'), '--num-classes 0'),
    (('--model', TINY, '--packed', 'missing.safetensors'), 'missing.safetensors: no such file'),
    (('--model', TINY, TINY, '--packed', __file__), '--packed adds a column to the row of one network'),
    (('--model', TINY, '--output', '/nowhere/report.txt'), '/nowhere/report.txt cannot be written'),
    (('--checkpoint', 'missing.pth'), 'missing.pth: no such checkpoint file'),
    ((), 'name networks with --model')])
def test_mistakes_are_one_line(flags, message, capsys):
    assert cost.main(list(flags)) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith('error: ') and captured.err.count('\n') == 1 and message in captured.err
    assert captured.out == ''


def test_help_states_the_convention(capsys):
    with pytest.raises(SystemExit) as exit_:
        cost.main(['--help'])
    said_ = capsys.readouterr().out
    assert exit_.value.code == 0 and '1/32, 1/16, 1/8, 1/4 of the 2-, 3-, 4-, 8-bit multiplications' in said_
