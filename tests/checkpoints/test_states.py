"""The weights in a file, wherever they lie and whatever wrappers have put before their names."""

import itertools

import pytest
import timm
import torch
from torch import nn

from calibration.first_batch import calibrate
from checkpoints.full_precision import load_full_precision
from checkpoints.networks import ModelInfo, network_info, open_network, state_of
from utils import UserError

pytestmark = pytest.mark.usefixtures('one_thread')
NAME, TEACHER = 'fourbits_deit_tiny_patch16_224', 'deit_tiny_distilled_patch16_224'
SHAPE = {'patch_size': 8, 'embed_dim': 48, 'depth': 2, 'num_heads': 3}
PREFIXES = ('module.', '_orig_mod.', 'model.', 'backbone.')
CONTAINERS = ('model', 'state_dict', 'teacher', 'student', 'model_ema', 'state_dict_ema')


def network(name=NAME, seed=0, **changes) -> nn.Module:
    torch.manual_seed(seed)
    return timm.create_model(name, **{'img_size': 32, 'num_classes': 10} | SHAPE | changes)


@pytest.fixture(scope='module')
def model() -> nn.Module:
    model = network()
    calibrate(model, torch.randn(4, 3, 32, 32))
    return model.eval()


def assert_same(given, expected) -> None:
    assert given.keys() == expected.keys()
    assert all(torch.equal(given[name], value) for name, value in expected.items())


@pytest.mark.parametrize('prefix', ['', *PREFIXES, *map(''.join, itertools.permutations(PREFIXES, 2)),
                                    'module._orig_mod.model.backbone.', 'module.module.'])
@pytest.mark.parametrize('container', [None, *CONTAINERS])
def test_containers_and_prefixes(container, prefix):
    expected = {'cls_token': torch.ones(1, 1, 4), 'blocks.0.norm1.weight': torch.zeros(4)}
    given = {prefix + name: value for name, value in expected.items()}
    assert_same(state_of(given if container is None else {'epoch': 3, container: given, 'optimizer': {}}), expected)


@pytest.mark.parametrize('first, second', itertools.pairwise(CONTAINERS))
def test_the_first_container_counts(first, second):
    ones, zeros = {'a': torch.ones(1)}, {'a': torch.zeros(1)}
    assert state_of({second: zeros, first: ones})['a'] == 1
    assert state_of({second: zeros, first: {}})['a'] == 0 == state_of({second: zeros, first: 'a name'})['a']


def test_a_prefix_of_some_names_belongs_to_them():
    state = {'model.weight': torch.ones(1), 'head.weight': torch.ones(1)}
    assert state_of({'state_dict': state}).keys() == state.keys()
    # Parts that are compiled by themselves stand within the names.
    assert state_of({'blocks.0._orig_mod.norm1.weight': torch.ones(1), 'norm.bias': torch.ones(1)}).keys() == {
        'blocks.0.norm1.weight', 'norm.bias'}


def test_other_entries_beside_the_tensors_are_left_out():
    assert state_of({'state_dict': {'model.a': torch.ones(1), 'step': 3, 7: torch.ones(1)}}).keys() == {'a'}


def compiled_by_parts(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name.replace('blocks.1.', 'blocks.1._orig_mod.'): value for name, value in model.state_dict().items()}


@pytest.mark.parametrize('form', ['described', 'named', 'by parts', 'data parallel'])
def test_files_of_compiled_networks_open_as_others_do(form, model, tmp_path):
    state = compiled_by_parts(model) if form == 'by parts' else torch.compile(model).state_dict()
    assert any('_orig_mod.' in name for name in state)
    if form == 'data parallel':
        state = {f'module.{name}': value for name, value in state.items()}
    info = ModelInfo(NAME, SHAPE, 10, 32)
    path, named = tmp_path / 'file.pth', form == 'named'
    torch.save({'model': state} | ({} if named else {'qvit': info.to_dict()}), path)
    opened = open_network(path, NAME, model_kwargs=SHAPE) if named else open_network(path)
    assert opened.info == info
    assert_same(opened.model.state_dict(), model.state_dict())


@pytest.mark.parametrize('prefix', ['_orig_mod.', 'module._orig_mod.'])
def test_a_start_from_a_compiled_full_precision_network(prefix):
    weights, ours, theirs = network(TEACHER).state_dict(), network(seed=1), network(seed=1)
    prefixed = {'model': {prefix + name: value for name, value in weights.items()}}
    assert load_full_precision(ours, prefixed) == load_full_precision(theirs, {'model': weights}) == []
    assert_same(ours.state_dict(), theirs.state_dict())


@pytest.mark.parametrize('prefix', ['', '_orig_mod.', 'module.'])
@pytest.mark.parametrize('container', [None, 'model', 'state_dict'])
def test_the_class_count_is_found_wherever_it_lies(container, prefix):
    weights = {prefix + name: value for name, value in network(TEACHER, num_classes=1000).state_dict().items()}
    info = network_info('teacher.pth', weights if container is None else {container: weights}, TEACHER, SHAPE)
    assert info == ModelInfo(TEACHER, SHAPE, 1000, 32)


# --- files without a description --------------------------------------------------------------------------------------


@pytest.mark.parametrize('name', [NAME, TEACHER, 'deit_tiny_patch16_224'])
@pytest.mark.parametrize('size', [16, 32, 48])
def test_sizes_are_those_of_the_tensors(name, size):
    state = network(name, img_size=size, num_classes=7).state_dict()
    assert network_info('a.pth', {'model': state}, name, SHAPE) == ModelInfo(name, SHAPE, 7, size)
    assert network_info('a.pth', {'model': state}, name, SHAPE, 64).input_size == 64  # the user's word counts


def test_other_architectures_have_other_heads():
    state = timm.create_model('resnet18', num_classes=7).state_dict()
    assert network_info('a.pth', {'state_dict': state}, 'resnet18') == ModelInfo('resnet18', {}, 7, 224)


@pytest.mark.parametrize('arguments, said', [
    ((), 'a.pth does not say which network it holds: name it with --teacher-model'),
    (('no_network',), '--teacher-model no_network is unknown'),
    (('hf-hub:some/where',), '--teacher-model hf-hub:some/where is unknown'),
    (('resnet18',), 'the checkpoint has no fc.weight')])
def test_unnamed_and_unknown_networks(arguments, said, model):
    with pytest.raises(UserError, match=said):
        network_info('a.pth', {'model': model.state_dict()}, *arguments, what='--teacher-model')


def test_without_a_head():
    with pytest.raises(UserError, match='the checkpoint holds no vision transformer'):
        network_info('a.pth', {'model': {'bias': torch.zeros(1)}}, NAME)


@pytest.mark.parametrize('arguments, said', [
    (('twobits_deit_tiny_patch16_224',), f'model is {NAME} in a.pth: leave --model out'),
    ((None, None, 48), 'input_size is 32 in a.pth: leave the flag out'),
    ((None, {'depth': 3}), 'depth is 2 in a.pth: leave the flag out'),
    ((None, {'irm': True}), 'irm of --model-kwargs is not in a.pth: leave it out')])
def test_arguments_that_contradict_a_description(arguments, said, model):
    checkpoint = {'model': model.state_dict(), 'qvit': ModelInfo(NAME, SHAPE, 10, 32).to_dict()}
    assert network_info('a.pth', checkpoint, NAME, {'depth': 2}, 32) == network_info('a.pth', checkpoint)
    with pytest.raises(UserError) as caught:
        network_info('a.pth', checkpoint, *arguments)
    assert str(caught.value) == said
