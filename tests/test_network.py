"""The registered networks: what they are made of, what timm's interface does with them, and what a forward costs."""

import copy
import json
import pickle
from pathlib import Path

import pytest
import timm
import timm.optim
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import models  # noqa: F401  registers the aliases
from _quan_base import ActQ, Conv2dQ, LinearQ, UncalibratedError, is_calibrated, named_quantizers
from calibration.first_batch import calibrate
from quant_vision_transformer import QVisionTransformer

REFERENCE = Path(__file__).parent / 'reference'
BITS = {'twobits': 2, 'threebits': 3, 'fourbits': 4}
SIZES = {'tiny': (192, 3), 'small': (384, 6), 'base': (768, 12)}
SMALL = {'img_size': 32, 'patch_size': 8, 'embed_dim': 48, 'depth': 2, 'num_heads': 3, 'num_classes': 10}
TOKENS = 2 + 4 * 4

pytestmark = pytest.mark.usefixtures('one_thread')


def network(name='fourbits_deit_tiny_patch16_224', seed=0, **changes) -> nn.Module:
    torch.manual_seed(seed)
    return timm.create_model(name, **SMALL | changes)


def images(count=4, size=32, channels=3, seed=0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, channels, size, size, dtype=torch.float64, generator=generator)


def calibrated(**changes) -> nn.Module:
    """In float64, where two orders of operations give the same codes."""
    model = network(**changes).double()
    calibrate(model, images(channels=changes.get('in_chans', 3), size=changes.get('img_size', 32)))
    return model


def loss_of(outputs) -> torch.Tensor:
    labels = torch.arange(4)
    return F.cross_entropy(outputs[0], labels) + F.cross_entropy(outputs[1], labels + 1)


def gradients(model, inputs) -> dict[str, torch.Tensor]:
    model.zero_grad(set_to_none=True)
    loss_of(model(inputs)).backward()
    return {name: parameter.grad for name, parameter in model.named_parameters()}


# --- variants ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize('size', SIZES)
@pytest.mark.parametrize('bits_name', BITS)
def test_every_variant_has_its_bits_and_its_size(bits_name, size):
    model = timm.create_model(f'{bits_name}_deit_{size}_patch16_224', depth=2, img_size=32)
    assert isinstance(model, QVisionTransformer)
    assert (model.embed_dim, model.blocks[0].attn.num_heads) == SIZES[size]
    calibrate(model, images(1).float())
    for name, quantizer in named_quantizers(model):
        bits = BITS[bits_name] if name.startswith('blocks.') else 8
        lowest, highest = quantizer.code_range
        assert highest - lowest == 2 ** bits - 1, name
        if not isinstance(quantizer, ActQ):
            codes = quantizer.to_int()
            assert lowest <= codes.min() < 0 < codes.max() <= highest, name
            assert quantizer.act.bits == bits, name
    assert isinstance(model.patch_embed.proj, Conv2dQ)
    kinds = {type(module) for module in model.modules()}
    assert nn.Linear not in kinds and nn.Conv2d not in kinds


@pytest.mark.parametrize('size', ['tiny', 'small'])
@pytest.mark.parametrize('bits_name', BITS)
def test_keys_and_shapes_are_those_of_the_released_checkpoints(bits_name, size):
    expected = json.loads((REFERENCE / f'state_keys_{size}.json').read_text())
    model = timm.create_model(f'{bits_name}_deit_{size}_patch16_224')
    assert {name: list(value.shape) for name, value in model.state_dict().items()} == expected


def test_norms_have_the_published_eps():
    model = network()
    assert model.norm.eps == model.blocks[0].norm1.eps == model.blocks[1].norm2.eps == 1e-6
    assert model.blocks[0].attn.norm_q.eps == model.blocks[0].attn.norm_k.eps == 1e-5
    assert model.blocks[0].attn.norm_q.normalized_shape == (16,)


# --- forward ----------------------------------------------------------------------------------------------------------


def test_training_returns_both_heads_and_evaluation_their_mean():
    model, x = calibrated(), images()
    logits, dist_logits = model.train()(x)
    assert logits.shape == dist_logits.shape == (4, 10)
    assert not torch.equal(logits, dist_logits)
    torch.testing.assert_close(model.eval()(x), (logits + dist_logits) / 2, rtol=1e-12, atol=0)
    model.set_distilled_training(False)
    torch.testing.assert_close(model.train()(x), (logits + dist_logits) / 2, rtol=1e-12, atol=0)


def test_features_and_head():
    model, x = calibrated().eval(), images()
    features = model.forward_features(x)
    assert features.shape == (4, TOKENS, 48)
    assert torch.equal(model.forward_head(features), model(x))
    assert torch.equal(model.forward_head(features, pre_logits=True), (features[:, 0] + features[:, 1]) / 2)


@pytest.mark.parametrize('mode', ['train', 'eval'])
@pytest.mark.parametrize('irm', [True, False])
def test_return_blocks_gives_what_the_attention_quantizes_and_every_output(mode, irm):
    model, x, seen = getattr(calibrated(irm=irm), mode)(), images(), []
    for block in model.blocks:
        for norm in (block.attn.norm_q, block.attn.norm_k):
            norm.register_forward_hook(lambda module, inputs, output: seen.append(output))
    outputs, blocks = model(x, return_blocks=True)
    for block, q, k in zip(blocks, seen[::2], seen[1::2], strict=True):
        assert block.q.shape == block.k.shape == (4, 3, TOKENS, 16)
        assert torch.equal(block.q, q) and torch.equal(block.k, k) and q.requires_grad and k.requires_grad
    assert not torch.equal(blocks[0].q, blocks[0].k) and not torch.equal(blocks[0].q, blocks[1].q)
    if irm:
        assert blocks[0].q.mean(-1).abs().max() < 1e-12
    first = model.blocks[0](model._pos_embed(model.patch_embed(x)))
    assert torch.equal(blocks[0].tokens, first) and torch.equal(blocks[1].tokens, model.blocks[1](first))
    plain = model(x)
    for got, expected in zip(outputs, plain, strict=True):  # two heads, or the images of one
        assert torch.equal(got, expected)
    features, of_features = model.forward_features(x, return_blocks=True)
    assert torch.equal(features, model.forward_features(x)) and torch.equal(of_features[1].k, blocks[1].k)


def test_a_gradient_reaches_every_parameter():
    model, x = calibrated().train(), images()
    with torch.no_grad():
        for name, quantizer in named_quantizers(model):
            # Every quantizer clips, so that zero points matter.
            quantizer.alpha.mul_(0.2 if name.startswith('blocks.') else 0.02)
    for name, gradient in gradients(model, x).items():
        assert gradient is not None and gradient.isfinite().all() and gradient.abs().max() > 0, name


@pytest.mark.parametrize('loss_on', ['q', 'k'])
def test_gradients_flow_through_the_returned_q_and_k(loss_on):
    model = calibrated().train()
    _, blocks = model(images(), return_blocks=True)
    getattr(blocks[0], loss_on).square().sum().backward()
    attn = model.blocks[0].attn
    reached, other = (attn.norm_q, attn.norm_k) if loss_on == 'q' else (attn.norm_k, attn.norm_q)
    assert reached.weight.grad.abs().max() > 0 and other.weight.grad is None
    assert attn.qkv.alpha.grad.abs().max() > 0


# --- calibration ------------------------------------------------------------------------------------------------------


def test_uncalibrated_evaluation_names_the_call():
    model = network().double().eval()
    with pytest.raises(UncalibratedError, match=r'calibrate\(model, images\)'):
        model(images())
    assert not any(quantizer.calibrated for _, quantizer in named_quantizers(model))
    with pytest.raises(Exception, match=r'calibrate\(model, images\)'):  # as the compiler passes it on
        torch.compile(model.train(), backend='eager', fullgraph=True)(images())


def test_first_training_forward_calibrates_like_the_explicit_call():
    explicit, implicit = calibrated().train(), network().double().train()
    outputs = implicit(images())
    assert is_calibrated(implicit)
    for name, value in explicit.state_dict().items():
        assert torch.equal(implicit.state_dict()[name], value), name
    for got, expected in zip(outputs, explicit(images()), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)
    before = copy.deepcopy(implicit.state_dict())
    implicit(3 * images(seed=1))  # the second one leaves the steps alone
    assert all(torch.equal(value, before[name]) for name, value in implicit.state_dict().items())


def _copies():
    return {'deepcopy': copy.deepcopy, 'pickle': lambda model: pickle.loads(pickle.dumps(model))}


@pytest.mark.parametrize('way', _copies())
@pytest.mark.parametrize('used', [True, False])
def test_copies_keep_calibration_and_outputs(way, used):
    model, x = calibrated().eval(), images()
    if used:  # quantized weights lie about
        model(x)
    twin = _copies()[way](model)
    assert is_calibrated(twin)
    assert [quantizer.code_range for _, quantizer in named_quantizers(twin)] == [
        quantizer.code_range for _, quantizer in named_quantizers(model)]
    assert torch.equal(twin(x), model(x))
    with torch.no_grad():
        twin.head.weight.mul_(2)
    assert not torch.equal(twin(x), model(x))


@pytest.mark.parametrize('way', _copies())
def test_copies_of_an_uncalibrated_network_are_uncalibrated(way):
    twin = _copies()[way](network().double().eval())
    with pytest.raises(UncalibratedError):
        twin(images())


def test_another_precision_keeps_calibration():
    model = network()
    calibrate(model, images().float())
    assert model.eval()(images().float()).dtype == torch.float32
    expected = network(seed=1).double().eval()
    expected.load_state_dict(model.state_dict())
    model.to(torch.float64)
    assert is_calibrated(model) and is_calibrated(expected)
    assert torch.equal(model(images()), expected(images()))


def test_meta_and_back_then_loading_gives_the_outputs():
    model, x = calibrated().eval(), images()
    other = network(seed=1).double().to('meta').to_empty(device='cpu').eval()
    other.load_state_dict(model.state_dict())
    assert torch.equal(other(x), model(x))


# --- cost: host reads, compilation ------------------------------------------------------------------------------------


class HostReads(TorchDispatchMode):
    """Lists the operations whose result or shape the host has to wait for."""
    OPERATIONS = ('_local_scalar_dense', 'equal', 'is_nonzero', 'nonzero', 'masked_select', 'item')

    def __init__(self):
        super().__init__()
        self.found, self.calls = [], 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.calls += 1
        name = func.overloadpacket.__name__
        if name in self.OPERATIONS:
            self.found.append(name)
        return func(*args, **kwargs or {})


OPTIONS = [{}, {'irm': False}, {'quantize_attn': False}, {'act_granularity': 'tensor'},
           {'drop_path_rate': 0.1, 'attn_drop_rate': 0.1, 'proj_drop_rate': 0.1, 'drop_rate': 0.1}]


@pytest.mark.parametrize('options', OPTIONS, ids=str)
def test_nothing_is_read_back_to_the_host(options):
    model, x = calibrated(**options), images()
    with HostReads() as reads:
        loss_of(model.train()(x)).backward()
    assert reads.found == [] and reads.calls > 100
    with HostReads() as reads, torch.no_grad():
        model.eval()(x)
        model(x)
    assert reads.found == [] and reads.calls > 100
    with HostReads() as reads:  # they would have been seen
        loss = loss_of(model.train()(x))
        loss.backward()
        assert model.head.weight.grad.abs().max() > 0 and loss.item() and not torch.equal(x, x + 1)
    assert reads.found.count('_local_scalar_dense') == 2 and 'equal' in reads.found


def assert_close(actual, expected, scale, name=None):
    torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-9 * scale, msg=name)


@pytest.mark.slow
def test_compiled_training_is_the_eager_one():
    torch.compiler.reset()
    model, x = calibrated(depth=1).train(), images()  # a block is a block, and compiling takes long
    expected, expected_outputs = gradients(model, x), model(x)
    twin = copy.deepcopy(model)
    outputs = torch.compile(twin, backend='aot_eager', fullgraph=True, dynamic=False)(x)
    for got, want in zip(outputs, expected_outputs, strict=True):
        assert_close(got, want, 1)
    twin.zero_grad()
    loss_of(outputs).backward()
    scale = min(1e-3, max(gradient.abs().max().item() for gradient in expected.values()))
    for name, parameter in twin.named_parameters():
        assert_close(parameter.grad, expected[name], scale, name)


@pytest.mark.slow
def test_compiled_evaluation_is_the_eager_one():
    torch.compiler.reset()
    model, x = calibrated(depth=1).eval(), images()
    with torch.no_grad():
        assert_close(torch.compile(model, backend='aot_eager', fullgraph=True, dynamic=False)(x), model(x), 1)


@pytest.mark.slow
@pytest.mark.parametrize('options', OPTIONS[1:4], ids=str)
def test_options_compile_too(options):
    torch.compiler.reset()
    model, x = calibrated(depth=1, **options).eval(), images()
    with torch.no_grad():
        compiled = torch.compile(model, backend='eager', fullgraph=True, dynamic=False)
        torch.testing.assert_close(compiled(x), model(x), rtol=1e-9, atol=1e-9)


# --- options ----------------------------------------------------------------------------------------------------------


def test_classes_image_size_and_channels():
    model = calibrated(num_classes=7, img_size=48, in_chans=1).eval()
    assert model(images(size=48, channels=1)).shape == (4, 7)
    assert model.pos_embed.shape == (1, 2 + 6 * 6, 48)
    assert model.patch_embed.proj.weight.shape == (48, 1, 8, 8)
    assert model.patch_embed.proj.act.alpha.shape == (1,)
    assert model.head.out_features == model.head_dist.out_features == model.num_classes == 7
    with pytest.raises(AssertionError):
        model(images(size=32, channels=1))


@pytest.mark.parametrize('rate', ['drop_rate', 'drop_path_rate', 'attn_drop_rate', 'proj_drop_rate', 'pos_drop_rate',
                                  'patch_drop_rate'])
@pytest.mark.parametrize('quantize_attn', [True, False])
def test_every_rate_has_an_effect_in_training_only(rate, quantize_attn):
    def outputs(model, seed):
        torch.manual_seed(seed)
        return torch.stack(model.train()(images()))

    plain = calibrated(quantize_attn=quantize_attn)
    model = network(quantize_attn=quantize_attn, **{rate: 0.5}).double()
    model.load_state_dict(plain.state_dict())
    assert torch.equal(outputs(plain, 0), outputs(plain, 1))
    assert torch.equal(outputs(model, 0), outputs(model, 0))
    assert not torch.equal(outputs(model, 0), outputs(model, 1))
    assert not torch.equal(outputs(model, 0), outputs(plain, 0))
    assert torch.equal(model.eval()(images()), plain.eval()(images()))


def test_rates_reach_the_modules_they_are_for():
    model = calibrated(depth=3, drop_path_rate=0.2, attn_drop_rate=0.3, proj_drop_rate=0.4)
    assert [getattr(block.drop_path, 'drop_prob', 0.) for block in model.blocks] == pytest.approx([0., 0.1, 0.2])
    for block in model.blocks:
        assert block.attn.attn_drop == 0.3 and block.attn.proj_drop.p == block.mlp.drop.p == 0.4


def test_attention_dropout_keeps_the_expectation():
    """As dropout does: zeroes of the given share, the rest scaled up."""
    attn = calibrated(attn_drop_rate=0.25).train().blocks[0].attn
    dropped, seen = 0.25, {}
    original = F.dropout
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(F, 'dropout', lambda *args: seen.setdefault('mask', original(*args)))
        attn(torch.randn(4, TOKENS, 48, dtype=torch.float64))
    mask = seen['mask']
    assert mask.shape == (4, 3, TOKENS, TOKENS)
    assert set(mask.unique().tolist()) == {0., 1 / (1 - dropped)}
    assert abs((mask == 0).double().mean() - dropped) < 0.05


def test_dropped_patches_are_never_the_two_tokens():
    model = calibrated(patch_drop_rate=0.5).train()
    entered = []
    model.blocks[0].register_forward_pre_hook(lambda module, inputs: entered.append(inputs[0]))
    with torch.no_grad():
        model(images())
    whole = model._pos_embed(model.patch_embed(images()))
    assert entered[0].shape == (4, 2 + 8, 48)
    assert torch.equal(entered[0][:, :2], whole[:, :2])


def test_bits_of_weights_and_activations_apart():
    model = calibrated(weight_bits=3, act_bits=5)
    for block in model.blocks:
        for layer in (block.attn.qkv, block.attn.proj, block.mlp.fc1, block.mlp.fc2):
            assert layer.code_range == (-4, 3)
            assert layer.act.bits == 5 and layer.act.code_range in ((-16, 15), (0, 31))
        for act in (block.attn.q_act, block.attn.k_act, block.attn.v_act, block.attn.attn_act):
            assert act.bits == 5
        assert block.attn.attn_act.code_range == (0, 31)  # probabilities
        assert block.attn.q_act.code_range == (-16, 15)
    assert model.head.code_range == model.patch_embed.proj.code_range == (-128, 127)


def test_without_irm_q_and_k_are_plain():
    model, x, plain = calibrated(irm=False).eval(), images(), []
    assert not [name for name in model.state_dict() if 'norm_q' in name or 'norm_k' in name]
    model.blocks[0].attn.qkv.register_forward_hook(lambda module, inputs, output: plain.append(output))
    _, blocks = model(x, return_blocks=True)
    q, k, _ = plain[0].reshape(4, TOKENS, 3, 3, 16).permute(2, 0, 3, 1, 4)
    assert torch.equal(blocks[0].q, q) and torch.equal(blocks[0].k, k)


def test_one_scale_per_tensor():
    model = calibrated(act_granularity='tensor')
    for name, quantizer in named_quantizers(model):
        if isinstance(quantizer, ActQ):
            assert quantizer.alpha.shape == quantizer.zero_point.shape == (1,), name
        else:  # weights keep one per output channel
            assert quantizer.alpha.shape == quantizer.weight.shape[:1], name
    # The published first-batch rule gives all channels one scale: the two granularities start alike.
    torch.testing.assert_close(model.eval()(images()), calibrated().eval()(images()), rtol=1e-9, atol=1e-9)


def test_without_quantized_attention():
    model, x = calibrated(quantize_attn=False).eval(), images()
    assert not [name for name in model.state_dict() if '_act.' in name]
    seen = {}
    attn = model.blocks[0].attn
    attn.qkv.register_forward_hook(lambda module, inputs, output: seen.update(qkv=output))
    attn.proj.register_forward_pre_hook(lambda module, inputs: seen.update(out=inputs[0]))
    model(x)
    q, k, v = seen['qkv'].reshape(4, TOKENS, 3, 3, 16).permute(2, 0, 3, 1, 4)
    scores = attn.norm_q(q) @ attn.norm_k(k).mT / 4
    expected = (scores.softmax(-1) @ v).transpose(1, 2).reshape(4, TOKENS, 48)
    torch.testing.assert_close(seen['out'], expected, rtol=1e-9, atol=1e-12)


def test_attention_is_that_of_its_quantizers():
    model, seen = calibrated().eval(), {}
    attn = model.blocks[0].attn
    attn.qkv.register_forward_hook(lambda module, inputs, output: seen.update(qkv=output))
    attn.proj.register_forward_pre_hook(lambda module, inputs: seen.update(out=inputs[0]))
    model(images())
    q, k, v = seen['qkv'].reshape(4, TOKENS, 3, 3, 16).permute(2, 0, 3, 1, 4)
    scores = attn.q_act(attn.norm_q(q)) @ attn.k_act(attn.norm_k(k)).mT / 4
    expected = (attn.attn_act(scores.softmax(-1)) @ attn.v_act(v)).transpose(1, 2).reshape(4, TOKENS, 48)
    torch.testing.assert_close(seen['out'], expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize('option', [
    {'act_granularity': 'row'}, {'weight_bits': 1}, {'act_bits': 9}, {'num_heads': 5}, {'qk_norm': True},
    {'init_values': 1e-5}, {'act_layer': 'relu'}, {'mlp_layer': nn.Identity}, {'block_fn': nn.Identity},
    {'embed_layer': nn.Identity}, {'proj_bias': False}, {'pre_norm': True}, {'fc_norm': True}, {'reg_tokens': 4},
    {'class_token': False}, {'global_pool': 'avg'}, {'no_embed_class': True}, {'pos_embed': 'none'}], ids=str)
def test_unsupported_options_are_refused(option):
    (name, value), = option.items()
    with pytest.raises(ValueError, match=name) as caught:
        network(**option)
    assert str(value) in str(caught.value) and '\n' not in str(caught.value)


def test_unsupported_options_at_their_only_value_are_taken():
    network(qk_norm=False, init_values=None, proj_bias=True, global_pool='token', class_token=True, reg_tokens=0)


# --- timm's interface -------------------------------------------------------------------------------------------------


def test_reset_classifier_stays_quantized_and_wants_calibration():
    model, x = calibrated().eval(), images()
    assert model.get_classifier() == (model.head, model.head_dist)
    model.reset_classifier(7)
    assert model.num_classes == 7
    for head in model.get_classifier():
        assert isinstance(head, LinearQ) and head.weight.shape == (7, 48) and head.weight.dtype == torch.float64
        assert head.weight_bits == head.act.bits == 8 and not head.calibrated and not head.act.calibrated
        assert not head.training and head.act.init_state.item() == 0
    with pytest.raises(UncalibratedError):
        model(x)
    calibrate(model, x)
    assert model(x).shape == (4, 7)
    with pytest.raises(ValueError, match='avg'):
        model.reset_classifier(5, 'avg')

    model.reset_classifier(0)
    features = model.forward_features(x)
    assert torch.equal(model(x), (features[:, 0] + features[:, 1]) / 2)
    assert calibrated(num_classes=0).eval()(x).shape == (4, 48)


def test_no_weight_decay_names_embeddings_steps_and_zero_points():
    model = network()
    named = model.no_weight_decay() & dict(model.named_parameters()).keys()
    assert named == {name for name, _ in model.named_parameters()
                     if name.endswith(('token', 'pos_embed', '.alpha', '.zero_point'))}
    assert len(named) > 40
    groups = timm.optim.create_optimizer_v2(model, 'adamw', 1e-3, weight_decay=0.1).param_groups
    decayed = {id(p) for group in groups if group['weight_decay'] for p in group['params']}
    assert decayed == {id(p) for name, p in model.named_parameters()
                       if name.endswith('.weight') and 'norm' not in name}


@pytest.mark.parametrize('start', ['calibrated', 'uncalibrated'])
def test_grad_checkpointing_changes_neither_loss_nor_gradients(start):
    rates = {'drop_path_rate': 0.3, 'attn_drop_rate': 0.2, 'proj_drop_rate': 0.2}
    results, runs = [], []
    for enable in (False, True):
        model = (calibrated(**rates) if start == 'calibrated' else network(**rates).double()).train()
        model.set_grad_checkpointing(enable)
        model.blocks[1].mlp.fc1.register_forward_hook(lambda *_, enable=enable: runs.append(enable))
        torch.manual_seed(1)
        results.append(gradients(model, images()))
    assert runs.count(False) == 1 and runs.count(True) == 2
    for name, gradient in results[0].items():
        torch.testing.assert_close(results[1][name], gradient, rtol=1e-12, atol=1e-14, msg=name)


def test_pretrained_cfg_points_at_the_full_precision_weights():
    model = network('threebits_deit_small_patch16_224')
    assert model.default_cfg is model.pretrained_cfg
    published = timm.get_pretrained_cfg('deit_small_distilled_patch16_224').to_dict()
    for key in ('url', 'hf_hub_id', 'num_classes', 'first_conv', 'classifier', 'mean', 'std', 'crop_pct'):
        assert model.pretrained_cfg.get(key) == published.get(key), key
    assert 'deit_small_distilled' in model.pretrained_cfg['url']
    assert timm.data.resolve_data_config(model=model)['interpolation'] == 'bicubic'


def test_features_only():
    whole = calibrated()
    net = network(features_only=True, out_indices=(0, 1)).double()
    assert net.feature_info.channels() == [48, 48] and net.feature_info.reduction() == [8, 8]
    net.model.load_state_dict(whole.state_dict(), strict=False)
    assert is_calibrated(net)  # the heads are gone
    features = net.eval()(images())
    assert [feature.shape for feature in features] == [(4, 48, 4, 4)] * 2
    for feature, expected in zip(features, whole.eval().forward_intermediates(images(), intermediates_only=True),
                                 strict=True):
        assert torch.equal(feature, expected)


def test_forward_intermediates():
    model, x, blocks = calibrated().eval(), images(), []
    for block in model.blocks:
        block.register_forward_hook(lambda module, inputs, output: blocks.append(output))
    final, intermediates = model.forward_intermediates(x, output_fmt='NLC')
    for got, tokens in zip(intermediates, blocks, strict=True):
        assert torch.equal(got, tokens[:, 2:])
    assert torch.equal(final, model.forward_features(x))
    last, = model.forward_intermediates(x, indices=1, intermediates_only=True, return_prefix_tokens=True)
    assert last[0].shape == (4, 48, 4, 4) and last[1].shape == (4, 2, 48)


@pytest.mark.skipif(not hasattr(timm.models.VisionTransformer, 'set_input_size'), reason='not in this timm')
def test_set_input_size():
    model = calibrated().eval()
    model.set_input_size(img_size=48)
    assert model.pos_embed.shape == (1, 2 + 6 * 6, 48)
    assert model(images(size=48)).shape == (4, 10)
    with pytest.raises(ValueError, match='patch_size 4'):
        model.set_input_size(patch_size=4)


def test_dynamic_image_size():
    model = calibrated(dynamic_img_size=True).eval()
    assert torch.equal(model(images()), calibrated().eval()(images()))
    assert model(images(size=48)).shape == (4, 10)


# --- full precision: aliases and pretrained weights -------------------------------------------------------------------


@pytest.mark.parametrize('distilled', ['', '_distilled'])
@pytest.mark.parametrize('size', SIZES)
def test_aliases_are_timms_networks(size, distilled):
    target = f'deit_{size}{distilled}_patch16_224'
    alias, expected = (timm.create_model(name, depth=1, num_classes=3) for name in (f'vit_{target}', target))
    assert type(alias) is type(expected)
    assert {name: value.shape for name, value in alias.state_dict().items()} == {
        name: value.shape for name, value in expected.state_dict().items()}
    for cfg in (alias.pretrained_cfg, timm.get_pretrained_cfg(f'vit_{target}').to_dict()):
        assert target in cfg['url'] and cfg['hf_hub_id'] == expected.pretrained_cfg['hf_hub_id']


def test_alias_loads_pretrained_weights(tmp_path):
    source = network('deit_tiny_distilled_patch16_224')
    torch.save(source.state_dict(), tmp_path / 'source.pth')
    alias = network('vit_deit_tiny_distilled_patch16_224', seed=1, pretrained=True, pretrained_cfg_overlay={
        'file': str(tmp_path / 'source.pth'), 'num_classes': 10})
    assert all(torch.equal(value, source.state_dict()[name]) for name, value in alias.state_dict().items())


@pytest.mark.parametrize('source_name', ['deit_tiny_distilled_patch16_224', 'deit_tiny_patch16_224'])
@pytest.mark.parametrize('classes', [10, 7])
def test_pretrained_really_loads(tmp_path, source_name, classes):
    source = network(source_name)
    with torch.no_grad():  # far from any initialisation
        for parameter in source.parameters():
            parameter.normal_(3., 0.1)
    given = source.state_dict()
    torch.save({'model': given}, tmp_path / 'source.pth')
    model = network(seed=1, num_classes=classes, pretrained=True, pretrained_cfg_overlay={
        'file': str(tmp_path / 'source.pth'), 'num_classes': 10})
    loaded = model.state_dict()
    for name, value in given.items():
        if name == 'pos_embed':
            assert torch.equal(loaded[name][:, -16:], value[:, -16:])
        elif name.startswith('head') and classes != 10:
            assert loaded[name].shape[0] == classes and loaded[name].mean().abs() < 1
        else:
            assert torch.equal(loaded[name], value), name
    if 'dist_token' not in given:
        assert torch.equal(loaded['dist_token'], given['cls_token'])
    assert not any(quantizer.calibrated for _, quantizer in named_quantizers(model))
    with pytest.raises(UncalibratedError):
        model.eval()(images().float())
    calibrate(model, images().float())
    assert model(images().float()).shape == (4, classes)


@pytest.mark.parametrize(('name', 'options'), [
    ('fourbits_deit_tiny_patch16_224', {'depth': 1}),
    ('fourbits_swin_tiny_patch4_window7_224', {'depths': (1,), 'num_heads': (2,), 'embed_dim': 16, 'window_size': 4})])
def test_tracers_are_told_what_exports(name, options, monkeypatch):
    model, images = timm.create_model(name, img_size=32, **options), torch.randn(2, 3, 32, 32)
    model.train()(images)
    with pytest.raises(ValueError, match='python deploy.py onnx FILE --output model.onnx writes its ONNX file'):
        torch.jit.trace(model.eval(), images)
    monkeypatch.setattr(torch.onnx, 'is_in_onnx_export', lambda: True)
    with pytest.raises(ValueError, match='python deploy.py onnx'):
        model(images)
    monkeypatch.undo()
    torch.testing.assert_close(torch.export.export(model, (images,)).module()(images), model(images))
    compiled = torch.compile(model, backend='eager', fullgraph=True)
    torch.testing.assert_close(compiled(images), model(images))
