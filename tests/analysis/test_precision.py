"""The list of tensors and products of a forward, against the network and a forward of it."""

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from toys import TINY, create

from _quan_base import ActQ, named_quantizers
from analysis.attention import attention_inputs, attention_probabilities
from analysis.cost import summary, theoretical_size
from analysis.precision import analyse, manifest
from calibration.first_batch import calibrate

pytestmark = pytest.mark.usefixtures('one_thread')


# --- products ---------------------------------------------------------------------------------------------------------


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
    one_scale = theoretical_size(create(act_granularity='tensor'))
    assert one_scale.zero_points == 32 * (2 * 8 + 3)


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
        assert listed[name].scales == module.alpha.numel() and listed[name].parameter != is_act
    steps = {f'{name}.{leaf}' for name in quantizers for leaf in ('alpha', 'zero_point')}
    parameters = {name: parameter.numel() for name, parameter in model.named_parameters() if name not in steps}
    assert {tensor.name: tensor.elements for tensor in tensors if tensor.parameter} == parameters


def test_activations_have_the_sizes_of_a_real_forward():
    model, images = create().eval(), torch.randn(1, 3, 48, 48)
    calibrate(model, images)
    elements, names = {}, {module: name for name, module in model.named_modules()}

    def note(layer, inputs, _output):
        elements[f'{names[layer]}.act'] = layer.quantizer_input(inputs[0]).numel()

    for _, quantizer in named_quantizers(model):
        if not isinstance(quantizer, ActQ):
            quantizer.register_forward_hook(note)
    for index, inputs in enumerate(attention_inputs(model, images)):
        for name, value in (('q', inputs.q.used), ('k', inputs.k.used), ('v', inputs.v),
                            ('attn', attention_probabilities(inputs))):
            elements[f'blocks.{index}.attn.{name}_act'] = value.numel()
    listed = {tensor.quantizer: tensor for tensor in analyse(model)[0] if tensor.quantizer and not tensor.parameter}
    assert {name: tensor.elements for name, tensor in listed.items()} == elements
    assert all(tensor.code_range == model.get_submodule(name).code_range for name, tensor in listed.items())


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
