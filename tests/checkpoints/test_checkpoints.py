"""Checkpoint files: what is read, what is refused and how, and what becomes of the weights."""

import argparse
import builtins
import os
import pickle
import resource
import warnings
from pathlib import Path

import pytest
import safetensors.torch
import timm
import torch
from helpers import SHARED
from torch import nn

import quant_vision_transformer  # noqa: F401  registers the variants
from _quan_base import is_calibrated, named_quantizers
from calibration.first_batch import calibrate
from checkpoints.files import read_checkpoint, write_checkpoint
from checkpoints.full_precision import load_full_precision
from checkpoints.networks import ModelInfo, load_quantized, open_network
from utils import RunError, UserError

NAME = 'fourbits_deit_tiny_patch16_224'
DISTILLED, PLAIN = 'deit_tiny_distilled_patch16_224', 'deit_tiny_patch16_224'
SMALL = {'patch_size': 8, 'embed_dim': 48, 'depth': 2, 'num_heads': 3}
DEIT = SHARED / 'data' / 'deit_tiny_patch16_224-fp16.pth'

pytestmark = pytest.mark.usefixtures('one_thread')


def network(name=NAME, seed=0, **changes) -> nn.Module:
    torch.manual_seed(seed)
    return timm.create_model(name, **{'img_size': 32, 'num_classes': 10} | SMALL | changes)


def images(size=32) -> torch.Tensor:
    return torch.randn(4, 3, size, size, generator=torch.Generator().manual_seed(0))


def calibrated(**changes) -> nn.Module:
    model = network(**changes)
    calibrate(model, images(changes.get('img_size', 32)))
    return model


def full_precision(name=DISTILLED, **changes) -> dict[str, torch.Tensor]:
    """Weights in which no two values are alike."""
    model = network(name, **changes)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_()
    return model.state_dict()


def released(model: nn.Module) -> dict:
    optimizer = torch.optim.Adam(model.parameters())
    sum(parameter.sum() for parameter in model.parameters()).backward()
    optimizer.step()
    return {'model': model.state_dict(), 'optimizer': optimizer.state_dict(), 'lr_scheduler': {'base_values': [3e-4]},
            'epoch': 299, 'scaler': {'scale': 65536., 'growth_factor': 2.},
            'args': argparse.Namespace(lr=3e-4, model=NAME, distributed=True, data_path='/data', betas=None,
                                       milestones=[1, 2])}


def message_of(call, *arguments) -> str:
    """The one line of the UserError that the call ends in."""
    with pytest.raises(UserError) as caught:
        call(*arguments)
    message = str(caught.value)
    assert message and '\n' not in message and message == message.strip()
    return message


def assert_same(state: dict, expected: dict) -> None:
    assert state.keys() == expected.keys()
    for name, value in expected.items():
        assert state[name].dtype == value.dtype and torch.equal(state[name], value), name


# --- reading ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize('zipped', [True, False], ids=['zip', 'legacy'])
def test_released_form_is_read(tmp_path, zipped):
    model, path = calibrated(), tmp_path / 'best_checkpoint.pth'
    state = released(model)
    torch.save(state, path, _use_new_zipfile_serialization=zipped)
    read = read_checkpoint(path)
    assert read.keys() == state.keys()
    assert read['args'] == state['args'] and type(read['args']) is argparse.Namespace
    assert read['epoch'] == 299 and read['scaler'] == state['scaler']
    assert_same(read['model'], state['model'])
    assert torch.equal(read['optimizer']['state'][0]['exp_avg'], state['optimizer']['state'][0]['exp_avg'])
    other = network(seed=1).eval()
    load_quantized(other, read)
    assert_same(other.state_dict(), model.state_dict())
    assert is_calibrated(other) and torch.equal(other(images()), model.eval()(images()))


def test_reading_allows_nothing_to_later_loads(tmp_path):
    torch.save({'args': argparse.Namespace(lr=1.), 'model': {'a': torch.zeros(1)}}, tmp_path / 'a.pth')
    read_checkpoint(tmp_path / 'a.pth')
    assert argparse.Namespace not in torch.serialization.get_safe_globals()


def test_data_parallel_names_and_bare_state_dicts_are_taken():
    model, other = calibrated(), network(seed=1)
    load_quantized(other, {'module.' + name: value for name, value in model.state_dict().items()})
    assert_same(other.state_dict(), model.state_dict())


class Evil:
    def __init__(self, function, argument):
        self.call = function, (argument,)

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize('form', ['zip', 'legacy', 'pickle'])
@pytest.mark.parametrize('function', ['system', 'eval', 'within_args'])
def test_a_file_that_would_run_code_is_refused(tmp_path, form, function):
    marker, path = tmp_path / 'marker', tmp_path / 'evil.pth'
    if function == 'eval':
        evil = Evil(builtins.eval, f'open({str(marker)!r}, "w").close()')
    else:
        evil = Evil(os.system, f'touch {marker}')
    pickle.loads(pickle.dumps(evil))
    assert marker.exists()  # it would
    marker.unlink()
    state = {'model': {'a': torch.zeros(1)}, 'args': argparse.Namespace(lr=evil)} if function == 'within_args' else {
        'model': {'a': torch.zeros(1)}, 'optimizer': evil}
    if form == 'pickle':
        path.write_bytes(pickle.dumps({**state, 'model': {}}, protocol=2))
    else:
        torch.save(state, path, _use_new_zipfile_serialization=form == 'zip')
    message = message_of(read_checkpoint, path)
    assert str(path) in message and not marker.exists()
    assert 'refused' in message and ('eval' if function == 'eval' else 'system') in message


@pytest.mark.parametrize('damage', ['nothing', 'text', 'pickle', 'tensor', 'list'])
def test_files_of_another_kind(tmp_path, damage):
    path = tmp_path / 'file.pth'
    if damage in ('tensor', 'list'):
        torch.save(torch.zeros(3) if damage == 'tensor' else [1, 2], path)
    else:
        path.write_bytes({'nothing': b'', 'text': b'epoch: 3\nlr: 0.1\n', 'pickle': pickle.dumps({'a': 1})}[damage])
    message = message_of(read_checkpoint, path)
    assert str(path) in message
    assert ('Tensor' if damage == 'tensor' else 'list' if damage == 'list' else 'not a PyTorch checkpoint') in message


def test_missing_paths_and_folders(tmp_path):
    for path in (tmp_path / 'absent.pth', tmp_path, str(tmp_path / 'absent.safetensors')):
        message = message_of(read_checkpoint, path)
        assert str(path) in message and 'no such' in message


@pytest.mark.parametrize('form', ['zip', 'legacy', 'safetensors'])
def test_a_truncated_file(tmp_path, form):
    path = tmp_path / ('whole.safetensors' if form == 'safetensors' else 'whole.pth')
    state = {f'blocks.{i}.weight': torch.randn(40, 40) for i in range(3)}
    if form == 'safetensors':
        safetensors.torch.save_file(state, path)
    else:
        torch.save({'model': state, 'args': argparse.Namespace(lr=1.)}, path,
                   _use_new_zipfile_serialization=form == 'zip')
    whole, cut = path.read_bytes(), path.with_stem('cut')
    assert read_checkpoint(path)
    lengths = {*range(1, len(whole), len(whole) // 60), *range(1, 40), *range(len(whole) - 20, len(whole))}
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        for length in sorted(lengths):
            cut.write_bytes(whole[:length])
            assert str(cut) in message_of(read_checkpoint, cut), length


def test_safetensors(tmp_path):
    model, other = calibrated(), network(seed=1)
    safetensors.torch.save_file(model.state_dict(), tmp_path / 'model.safetensors')
    load_quantized(other, read_checkpoint(tmp_path / 'model.safetensors'))
    assert_same(other.state_dict(), model.state_dict())


@pytest.mark.parametrize('checkpoint', [{}, {'epoch': 3}, {'model': {}}, {'model': {'a': 3}}, {1: 2},
                                        {1: torch.ones(1)}], ids=str)
@pytest.mark.parametrize('load', [load_quantized, load_full_precision])
def test_a_checkpoint_without_a_model(checkpoint, load):
    assert 'no model' in message_of(load, network(), checkpoint)


# --- writing ----------------------------------------------------------------------------------------------------------


def test_written_whole_or_not_at_all(tmp_path):
    path = tmp_path / 'checkpoint.pth'
    write_checkpoint({'epoch': 1, 'model': {'a': torch.arange(5)}}, path)
    write_checkpoint({'epoch': 2, 'model': {'a': torch.arange(6)}}, str(path))
    whole = path.read_bytes()
    with pytest.raises((AttributeError, pickle.PicklingError, TypeError)):
        write_checkpoint({'model': {'a': torch.zeros(10000)}, 'hook': lambda: None}, path)
    assert path.read_bytes() == whole and read_checkpoint(path)['epoch'] == 2
    assert os.listdir(tmp_path) == ['checkpoint.pth']


def test_the_old_file_stays_until_the_new_one_is_whole(tmp_path, monkeypatch):
    path = tmp_path / 'checkpoint.pth'
    write_checkpoint({'epoch': 1}, path)
    save = torch.save

    def checked_save(state, target):
        save(state, target)
        assert read_checkpoint(path)['epoch'] == 1 and Path(target).parent == tmp_path
        raise KeyboardInterrupt

    monkeypatch.setattr(torch, 'save', checked_save)
    with pytest.raises(KeyboardInterrupt):
        write_checkpoint({'epoch': 2}, path)
    monkeypatch.undo()
    assert read_checkpoint(path)['epoch'] == 1 and os.listdir(tmp_path) == ['checkpoint.pth']


def test_a_full_disk_leaves_the_old_file_and_one_line(tmp_path):
    path = tmp_path / 'checkpoint.pth'
    write_checkpoint({'epoch': 1}, path)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    try:
        with pytest.raises(RunError, match=f'^{path} cannot be written .* make room$'):
            write_checkpoint({'epoch': 2, 'model': torch.zeros(1_000_000)}, path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert read_checkpoint(path)['epoch'] == 1 and os.listdir(tmp_path) == ['checkpoint.pth']


# --- the same network -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize('theirs, ours, parts', [
    ({'embed_dim': 96}, {}, ('96 wide', '48', '--model')),
    ({'num_classes': 7}, {}, ('7 classes', '10')),
    ({'img_size': 48}, {}, ('38 tokens', '18', '--input-size')),
    ({'act_granularity': 'tensor'}, {}, ('act_granularity=tensor',)),
    ({}, {'act_granularity': 'tensor'}, ('act_granularity=channel',)),
    ({'irm': False}, {}, ('irm=False',)),
    ({}, {'irm': False}, ('irm=True',)),
    ({'quantize_attn': False}, {}, ('quantize_attn=False',)),
    ({}, {'quantize_attn': False}, ('quantize_attn=True',)),
    ({'depth': 3}, {}, ('has unknown blocks.2.norm1.weight', 'more')),
    ({}, {'depth': 3}, ('lacks blocks.2.norm1.weight', 'more')),
    ({'mlp_ratio': 2}, {}, ('blocks.0.mlp.fc1.weight', '[96, 48]', '[192, 48]')),
    ({'num_heads': 6, 'irm': False}, {'irm': False}, ('blocks.0.attn.q_act.alpha', '[6]', '[3]')),
    ({'num_heads': 6}, {}, ('blocks.0.attn.norm_q.weight', '[8]', '[16]')),
], ids=str)
def test_another_network_is_one_line_that_names_the_difference(theirs, ours, parts):
    model = network(seed=1, **ours)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    message = message_of(load_quantized, model, {'model': calibrated(**theirs).state_dict()})
    assert [part for part in parts if part not in message] == []
    assert_same(model.state_dict(), before)
    assert not is_calibrated(model)


def test_full_precision_given_as_quantized_and_the_reverse():
    assert 'full-precision checkpoint' in message_of(load_quantized, network(), {'model': full_precision()})
    message = message_of(load_quantized, network(DISTILLED), {'model': calibrated().state_dict()})
    assert 'quantized checkpoint' in message and 'full-precision one' in message


@pytest.mark.parametrize('load', [load_quantized, load_full_precision])
def test_missing_and_unexpected_keys_are_listed(load):
    state = calibrated().state_dict()
    del state['norm.weight'], state['blocks.1.mlp.fc2.bias']
    state['extra.weight'] = torch.zeros(1)
    message = message_of(load, network(), {'model': state})
    for name in ('lacks', 'norm.weight', 'blocks.1.mlp.fc2.bias', 'unknown', 'extra.weight'):
        assert name in message
    state = calibrated().state_dict() | {f'extra.{i}': torch.zeros(1) for i in range(20)}
    message = message_of(load, network(), {'model': state})
    assert 'extra.0' in message and 'lacks' not in message and 'more' in message and len(message) < 300


def test_a_missing_quantizer_entry_is_not_passed_over():
    state = calibrated().state_dict()
    del state['blocks.0.attn.q_act.signed'], state['head.init_state']
    message = message_of(load_quantized, network(), {'model': state})
    assert 'blocks.0.attn.q_act.signed' in message and 'head.init_state' in message


# --- from full precision ----------------------------------------------------------------------------------------------


def assert_uncalibrated(model: nn.Module) -> None:
    for name, quantizer in named_quantizers(model):
        assert not quantizer.calibrated and quantizer.init_state.item() == 0, name


def test_distilled_weights_are_taken_bit_for_bit():
    given, model = full_precision(), network(seed=1)
    assert load_full_precision(model, {'model': given}) == []
    loaded = model.state_dict()
    assert_same({name: loaded[name] for name in given}, given)
    assert_uncalibrated(model)
    assert torch.equal(loaded['blocks.0.attn.norm_q.weight'], torch.ones(16))  # IRM starts as the identity
    assert {name.rpartition('.')[2] for name in loaded.keys() - given.keys() if '.norm_' not in name} == {
        'alpha', 'zero_point', 'init_state', 'signed'}
    calibrate(model, images())
    assert model.eval()(images()).isfinite().all()


def test_not_distilled_weights_give_token_and_head_of_distillation():
    given, model = full_precision(PLAIN), network(seed=1)
    notes = load_full_precision(model, given)
    assert len(notes) == 1 and 'not distilled' in notes[0] and '\n' not in notes[0]
    loaded = model.state_dict()
    assert torch.equal(loaded['dist_token'], given['cls_token'])
    assert torch.equal(loaded['head_dist.weight'], given['head.weight'])
    assert torch.equal(loaded['head_dist.bias'], given['head.bias'])
    positions = given['pos_embed']
    assert torch.equal(loaded['pos_embed'], torch.cat([positions[:, :1], positions[:, :1], positions[:, 1:]], dim=1))
    others = given.keys() - {'pos_embed'}
    assert_same({name: loaded[name] for name in others}, {name: given[name] for name in others})


def test_not_distilled_model_leaves_distillation_out():
    given, model = full_precision(), network(PLAIN, seed=1)
    notes = load_full_precision(model, {'model': given})
    assert len(notes) == 1 and 'not distilled' in notes[0]
    loaded = model.state_dict()
    assert torch.equal(loaded['pos_embed'], torch.cat([given['pos_embed'][:, :1], given['pos_embed'][:, 2:]], dim=1))
    assert torch.equal(loaded['head.weight'], given['head.weight'])


@pytest.mark.parametrize('name', [DISTILLED, PLAIN])
def test_another_class_count_starts_the_heads_anew(name):
    given, model = full_precision(name), network(seed=1, num_classes=7)
    heads = {name: value.clone() for name, value in model.state_dict().items() if name.startswith('head')}
    notes = load_full_precision(model, {'model': given})
    about_classes = [note for note in notes if '10 classes' in note and '7' in note]
    assert len(about_classes) == 1 and len(notes) == (1 if name == DISTILLED else 2)
    loaded = model.state_dict()
    for key, value in heads.items():
        assert torch.equal(loaded[key], value), key
    assert torch.equal(loaded['blocks.1.mlp.fc2.weight'], given['blocks.1.mlp.fc2.weight'])


def test_no_classes_at_all():
    given, model = full_precision(), network(seed=1, num_classes=0)
    load_full_precision(model, {'model': given})
    assert torch.equal(model.state_dict()['cls_token'], given['cls_token'])


def test_another_resolution_resizes_the_position_embedding():
    given, model = full_precision(), network(seed=1, img_size=48)
    grid = torch.linspace(-1, 1, 4)
    given['pos_embed'][:, 2:] = (grid[:, None] + 2 * grid).reshape(1, 16, 1)  # a ramp stays one, away from the border
    notes = load_full_precision(model, {'model': given})
    assert len(notes) == 1 and '4 x 4' in notes[0] and '6 x 6' in notes[0]
    loaded = model.state_dict()['pos_embed']
    assert loaded.shape == (1, 2 + 36, 48)
    assert torch.equal(loaded[:, :2], given['pos_embed'][:, :2])
    resized = loaded[0, 2:, 0].reshape(6, 6)
    assert (resized.diff(dim=0) > 0).all() and (resized.diff(dim=1) > resized.diff(dim=0).mean()).all()
    torch.testing.assert_close(resized, -resized.flip(0, 1), atol=1e-5, rtol=0)  # neither turned nor shifted


def test_another_aspect_ratio():
    given, model = full_precision(), network(seed=1, img_size=(16, 64))
    notes = load_full_precision(model, {'model': given})
    assert len(notes) == 1 and '2 x 8' in notes[0]
    assert not torch.equal(model.state_dict()['pos_embed'][:, 2:], given['pos_embed'][:, 2:])


def test_half_precision_file(tmp_path):
    given, model = {name: value.half() for name, value in full_precision(PLAIN).items()}, network(seed=1)
    torch.save({'model': given}, tmp_path / 'fp16.pth')
    load_full_precision(model, read_checkpoint(tmp_path / 'fp16.pth'))
    loaded = model.state_dict()
    assert all(value.dtype == torch.float32 for value in loaded.values())
    for name in given.keys() - {'pos_embed'}:
        assert torch.equal(loaded[name], given[name].float()), name


def test_missing_and_unexpected_full_precision_keys():
    given = full_precision()
    del given['blocks.0.attn.qkv.weight'], given['head_dist.weight']
    given['fc_norm.weight'] = torch.zeros(48)
    message = message_of(load_full_precision, network(), {'model': given})
    for name in ('blocks.0.attn.qkv.weight', 'head_dist.weight', 'fc_norm.weight'):
        assert name in message
    plain = full_precision(PLAIN)
    del plain['head.weight']
    assert 'head.weight' in message_of(load_full_precision, network(), plain)
    plain = full_precision(PLAIN)
    del plain['cls_token'], plain['pos_embed']
    message = message_of(load_full_precision, network(), plain)
    assert 'cls_token' in message and 'pos_embed' in message


def test_another_width_and_depth():
    message = message_of(load_full_precision, network(), full_precision(embed_dim=96))
    assert '96 wide' in message and '48' in message
    assert 'blocks.2.norm1.weight' in message_of(load_full_precision, network(), full_precision(depth=3))


@pytest.mark.parametrize('changes', [{'weight_bits': 3, 'act_bits': 3}, {'act_granularity': 'tensor'}], ids=str)
def test_weights_of_a_quantized_checkpoint_without_its_steps(changes):
    given, model = calibrated(), network(seed=1, **changes)
    with torch.no_grad():
        given.blocks[0].attn.norm_q.weight.normal_()
        given.blocks[0].attn.qkv.alpha.fill_(0.125)
    notes = load_full_precision(model, {'model': given.state_dict()})
    assert len(notes) == 1 and 'quantized' in notes[0]
    assert_uncalibrated(model)
    loaded = model.state_dict()
    for name, value in given.state_dict().items():
        if name.rpartition('.')[2] not in ('alpha', 'zero_point', 'init_state', 'signed'):
            assert torch.equal(loaded[name], value), name
    assert not (loaded['blocks.0.attn.qkv.alpha'] == 0.125).any()
    calibrate(model, images())


def test_a_start_with_fewer_bits_takes_what_the_network_computes_with():
    given, model = calibrated().double(), network(seed=1, weight_bits=3, act_bits=2).double()
    with torch.no_grad():
        for parameter in given.parameters():
            parameter.add_(torch.rand_like(parameter), alpha=0.05)
        given.blocks[0].mlp.fc1.weight[0, 0] = 100.  # beyond the range: it never counts with more than its end
    entry = ModelInfo(NAME, SMALL, num_classes=10, input_size=32).to_dict()
    notes = load_full_precision(model, {'model': given.float().state_dict(), 'qvit': entry})
    given.double()
    assert len(notes) == 1 and 'quantized to 4 bits' in notes[0]
    assert_uncalibrated(model)
    loaded, weights = model.state_dict(), set()
    for name, layer in named_quantizers(given):
        if hasattr(layer, 'weight'):
            weights.add(f'{name}.weight')
            torch.testing.assert_close(loaded[f'{name}.weight'], layer.quantized_weight(), rtol=0, atol=1e-6)
    assert loaded['blocks.0.mlp.fc1.weight'][0, 0] < 1.
    for name, value in given.state_dict().items():
        if name not in weights and name.rpartition('.')[2] not in ('alpha', 'zero_point', 'init_state', 'signed'):
            assert torch.equal(loaded[name], value), name
    assert not torch.equal(loaded['blocks.1.attn.norm_k.bias'], torch.zeros(16).double())
    # A network without IRM has no place for it.
    message = message_of(load_full_precision, network(irm=False), {'model': given.float().state_dict(), 'qvit': entry})
    assert message.endswith('irm=True: pass --model-kwargs irm=True')


def test_a_calibrated_network_loses_its_steps():
    model = calibrated()
    load_full_precision(model, full_precision())
    assert_uncalibrated(model)


@pytest.mark.skipif(not DEIT.is_file(), reason='the DeiT-Tiny weights are not here')
def test_the_published_deit_tiny():
    model = timm.create_model(NAME)
    checkpoint = read_checkpoint(DEIT)
    notes = load_full_precision(model, checkpoint)
    assert len(notes) == 1 and 'not distilled' in notes[0]
    assert torch.equal(model.state_dict()['head_dist.weight'], checkpoint['model']['head.weight'].float())
    assert torch.equal(model.state_dict()['pos_embed'][:, 2:], checkpoint['model']['pos_embed'][:, 1:].float())


# --- self-describing files --------------------------------------------------------------------------------------------


@pytest.mark.parametrize('name, options', [
    (NAME, {}), (NAME, {'act_granularity': 'tensor', 'irm': False}), ('twobits_deit_tiny_patch16_224', {'act_bits': 3}),
    (DISTILLED, {})], ids=str)
def test_a_described_network_comes_back(tmp_path, name, options):
    kwargs = SMALL | options
    model = timm.create_model(name, num_classes=6, img_size=48, **kwargs)
    calibrate(model, images(48))
    info = ModelInfo(name, kwargs, 6, 48, ['a', 'b', 'c', 'd', 'e', 'f'], 'IMNET')
    write_checkpoint({'model': model.state_dict(), 'qvit': info.to_dict()}, tmp_path / 'checkpoint.pth')
    found, twin, checkpoint = open_network(tmp_path / 'checkpoint.pth')
    assert found == info and not twin.training
    assert checkpoint['qvit'] == {'format_version': 1, 'model': name, 'kwargs': kwargs, 'num_classes': 6,
                                  'input_size': 48, 'classes': ['a', 'b', 'c', 'd', 'e', 'f'], 'data_set': 'IMNET'}
    assert type(twin) is type(model) and twin.num_classes == 6
    assert_same(twin.state_dict(), model.state_dict())
    if name != DISTILLED:
        assert twin.quant == model.quant
    assert torch.equal(twin(images(48)), model.eval()(images(48)))


@pytest.mark.parametrize('value', [torch.nan, torch.inf])
def test_damaged_steps_are_not_taken(value):
    state = calibrated().state_dict()
    state['blocks.0.attn.qkv.alpha'][0] = value
    line = message_of(load_quantized, network(), {'model': state})
    assert 'NaN or infinite values in blocks.0.attn.qkv.alpha' in line
