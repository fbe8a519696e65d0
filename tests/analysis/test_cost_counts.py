"""What a network costs: counts against counts by hand."""

import pytest
import timm
from helpers import FORMS
from toys import SMALL, TINY, create

from analysis.cost import bops, countings, layers, ops, summary, theoretical_size
from analysis.precision import Product, analyse

pytestmark = pytest.mark.usefixtures('one_thread')

DEPTH, PATCHES, TOKENS, CLASSES = 12, 14 * 14, 14 * 14 + 2, 1000


def hand_macs(dim: int, tokens: int = TOKENS, patches: int = PATCHES, heads: int = 2) -> dict[str, int]:
    """qkv, proj, fc1 and fc2 are 3 + 1 + 4 + 4 squares of the width."""
    return {'linear': DEPTH * tokens * 12 * dim ** 2, 'attention': DEPTH * 2 * tokens ** 2 * dim,
            'edges': patches * 3 * 16 * 16 * dim + heads * dim * CLASSES}


def hand_float_parameters(dim: int) -> int:
    """Biases (9 widths a block), LayerNorms (4), patch bias, two tokens, positions, last norm, biases of the heads."""
    return DEPTH * 13 * dim + dim + 2 * dim + TOKENS * dim + 2 * dim + 2 * CLASSES


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


def test_one_head_by_hand():
    """One token, head and position less than with two; ViT-Tiny has 1.26 G multiply-accumulates, 5.7 M parameters."""
    row, macs = summary('it', timm.create_model('fourbits_vit_tiny_patch16_224')), hand_macs(192, 197, heads=1)
    assert row['macs'] == sum(macs.values()) == 1_253_683_200
    assert row['ops'] == (macs['linear'] + macs['attention']) / 8 + macs['edges'] / 4
    full = timm.create_model('deit_tiny_patch16_224')
    assert row['full_precision_size_bytes'] == 4 * sum(p.numel() for p in full.parameters()) == 4 * 5_717_416


@pytest.mark.parametrize('form', FORMS)
def test_full_precision_is_timms_network_of_that_form(form):
    options = {'img_size': 32, 'patch_size': 8, 'embed_dim': 48, 'depth': 2, 'num_heads': 3,
               'num_classes': 10} | FORMS[form]
    full = timm.create_model('vit_tiny_patch16_224', **options)
    ours, theirs = (summary('it', model) for model in (timm.create_model('twobits_vit_tiny_patch16_224', **options),
                                                       full))
    for key in ('macs', 'full_precision_size_bytes', 'full_precision_bops', 'full_precision_ops'):
        assert ours[key] == theirs[key]
    assert theirs['full_precision_size_bytes'] == 4 * sum(p.numel() for p in full.parameters())


def test_layer_scale_and_the_mean_of_the_tokens_are_elementwise_work():
    """18 tokens of 48 channels: one product each for LayerScale, twice a block; 16 patches are added up."""
    def work(**options) -> int:
        shape = {'img_size': 32, 'patch_size': 8, 'embed_dim': 48, 'depth': 2, 'num_heads': 3, 'num_classes': 10}
        return sum(t.reference_work for t in analyse(timm.create_model('fourbits_vit_tiny_patch16_224',
                                                                       **shape | options))[0])
    plain = work(reg_tokens=1)
    assert work(reg_tokens=1, init_values=1e-5) - plain == 4 * 18 * 48
    # The last norm is then of one vector in place of 18.
    assert work(reg_tokens=1, global_pool='avg') - plain == 16 * 48 - 7 * 17 * 48


@pytest.mark.parametrize('size, dim, heads', [('tiny', 192, 3), ('small', 384, 6)])
def test_size_by_hand(size, dim, heads):
    model = timm.create_model(f'threebits_deit_{size}_patch16_224')
    found, edges = theoretical_size(model), 768 * dim + 2 * CLASSES * dim
    assert found.codes == 3 * DEPTH * 12 * dim ** 2 + 8 * edges
    inputs = DEPTH * (7 * dim + 4 * heads) + 3 + 2 * dim        # channels of every quantized activation
    assert found.zero_points == 32 * inputs
    assert found.scales == 32 * (inputs + DEPTH * 9 * dim + dim + 2 * CLASSES)
    assert found.signs == DEPTH * 8 + 3
    irm = DEPTH * 4 * 64
    assert found.full_precision == 32 * (hand_float_parameters(dim) + irm)
    assert found.bytes == -(-sum(vars(found).values()) // 8)
    assert summary('it', model)['full_precision_size_bytes'] == 4 * (
        DEPTH * 12 * dim ** 2 + edges + hand_float_parameters(dim))


@pytest.mark.slow
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
