"""Descriptions of networks in files from strangers: what is refused, in which words, and before anything is built."""

import copy
import hashlib
import inspect
import json

import pytest
import safetensors.torch
import timm
import torch
from timm.models.swin_transformer import SwinTransformer
from timm.models.vision_transformer import VisionTransformer

from calibration.first_batch import calibrate
from checkpoints.descriptions import OPTIONS
from checkpoints.full_precision import load_full_precision
from checkpoints.networks import ModelInfo, network_info, open_network
from checkpoints.packed import _is_filled, pack_codes, read_packed, write_packed
from quant_vision_transformer import QVisionTransformer
from utils import UserError

pytestmark = pytest.mark.usefixtures('one_thread')
NAME, PLAIN = 'fourbits_deit_tiny_patch16_224', 'deit_tiny_patch16_224'
SHAPE = {'patch_size': 8, 'embed_dim': 48, 'depth': 2, 'num_heads': 3}
CLASSES = [str(digit) for digit in range(10)]


@pytest.fixture(scope='module')
def model() -> torch.nn.Module:
    torch.manual_seed(0)
    network = timm.create_model(NAME, num_classes=10, img_size=32, **SHAPE)
    calibrate(network, torch.randn(4, 3, 32, 32))
    return network.eval()


@pytest.fixture
def forge(model, tmp_path):
    """Writes a file with a changed description, and the checksum of the change: forge(form, change) -> its path."""
    def forge(form: str, change):
        entry = copy.deepcopy(ModelInfo(NAME, SHAPE, 10, 32, CLASSES, 'DIGITS').to_dict())
        path = tmp_path / ('file.pth' if form == 'checkpoint' else 'file.qvit.safetensors')
        if form == 'checkpoint':
            torch.save({'model': model.state_dict(), 'qvit': change(entry)}, path)
            return path
        packed = write_packed(model, ModelInfo(NAME, SHAPE, 10, 32, CLASSES, 'DIGITS'), path)
        write_header(path, change(entry | copy.deepcopy(
            {'weights': packed.weights, 'activations': packed.activations})), packed.tensors)
        return path

    return forge


def write_header(path, header: dict, tensors: dict) -> None:
    """A packed file that passes its own checksum, whatever it says; the checksum is that of the file format."""
    digest = hashlib.sha256(json.dumps(header, separators=(',', ':')).encode())
    for name in sorted(tensors):
        value = tensors[name]
        digest.update(f'{name} {value.dtype} {list(value.shape)}'.encode() + value.numpy().tobytes())
    sealed = header | {'sha256': digest.hexdigest()} if isinstance(header, dict) else header
    safetensors.torch.save_file(tensors, path, {'qvit_packed': json.dumps(sealed, separators=(',', ':'))})


@pytest.fixture
def nothing_is_built(monkeypatch):
    """Fails where a network is created, whoever asks for it."""
    def create(name, *_, **__):
        pytest.fail(f'{name} was to be built')  # no Exception, so nobody turns it into a message

    monkeypatch.setattr(timm, 'create_model', create)


def refused(call, *arguments) -> str:
    with pytest.raises(UserError) as caught:
        call(*arguments)
    said = str(caught.value)
    assert said and '\n' not in said and len(said) < 400 and said.isprintable()
    return said


def changed(**fields):
    return lambda entry: entry | fields


def without(name):
    return lambda entry: {key: value for key, value in entry.items() if key != name}


def option(name, value):
    return lambda entry: entry | {'kwargs': entry['kwargs'] | {name: value}}


# What is said of it, and the change. Everything here can stand in a checkpoint and in the JSON of a packed file.
HOSTILE = [
    # Names by which timm would read files and addresses, and those of nothing.
    *((name, changed(model=name)) for name in (
        'hf-hub:someone/network', 'hf_hub:someone/network', 'local-dir:/home/someone', 'timm/resnet18', '/etc/passwd',
        '../network', 'https://example.org/network', f'{NAME}.hf-hub:someone/network', 'no_such_network', '')),
    ('7', changed(model=7)), ('None', changed(model=None)), (r'\n', changed(model=f'{NAME}\nerror: all is well')),
    (r'\x1b', changed(model='\x1b[2J')), ("['deit", changed(model=['deit'])), ('aaaa', changed(model='a' * 10 ** 6)),
    # Options that have timm load, look up or pass on something.
    *((name, option(name, value)) for name, value in (
        ('checkpoint_path', '/etc/passwd'), ('pretrained', True), ('pretrained_cfg', {'url': 'https://example.org/x'}),
        ('pretrained_cfg_overlay', {'file': '/etc/passwd'}), ('cache_dir', '/tmp'), ('features_only', True),
        ('out_indices', [0]), ('scriptable', True), ('exportable', True), ('no_jit', True), ('device', 'cuda'),
        ('dtype', 'float64'), ('block_fn', 'x'), ('attn_layer', 'x'), ('mlp_layer', 'x'), ('embed_layer', 'x'),
        ('kwargs_filter', ['a']), ('img_size', 32), ('num_classes', 10), ('what', 'x'), ('name', 'x'), ('', 1))),
    # Sizes beyond all bounds, and of another kind.
    *((f'depth={value!r}'[:20], option('depth', value)) for value in (
        10 ** 7, 0, -1, 2.0, True, '2', [2], 10 ** 400)),
    *((f'embed_dim={value!r}', option('embed_dim', value)) for value in (10 ** 9, 0, -48, 48.0, '48')),
    *((f'num_heads={value!r}', option('num_heads', value)) for value in (10 ** 6, 0, -3, False)),
    *((f'num_classes={value!r}', changed(num_classes=value)) for value in (10 ** 10, -1, 10.0, True, None, '10')),
    *((f'input_size={value!r}', changed(input_size=value)) for value in (10 ** 6, 0, -32, 32.0, None, [32, 32])),
    *((f'patch_size={value!r}', option('patch_size', value)) for value in (
        0, -8, 10 ** 6, [8], [8, 8, 8], [8, 'a'], 8.0)),
    *((f'mlp_ratio={value!r}', option('mlp_ratio', value)) for value in (
        0, -4, 10 ** 9, float('nan'), float('inf'), '4', True)),
    ('in_chans=1000000', option('in_chans', 10 ** 6)), ('reg_tokens=100000000', option('reg_tokens', 10 ** 8)),
    *((f'{name}={value!r}', option(name, value)) for name in ('weight_bits', 'act_bits') for value in (1, 9, 4.0, '4')),
    *((f'{name}={value!r}', option(name, value)) for name, value in (
        ('irm', 1), ('irm', 'True'), ('quantize_attn', 0), ('qkv_bias', 'False'), ('act_granularity', 'head'),
        ('act_granularity', ['channel']), ('global_pool', 'os.system'), ('act_layer', 'nn.GELU'),
        ('norm_layer', 'torch.nn.LayerNorm'), ('drop_rate', 2), ('drop_path_rate', -0.1), ('init_values', 'x'))),
    # Sizes within the bounds that are not those of the tensors.
    ('depth=3', option('depth', 3)), ('depth=1000', option('depth', 1000)), ('embed_dim=96', option('embed_dim', 96)),
    ('embed_dim=16384', option('embed_dim', 16384)), ('num_heads=6', option('num_heads', 6)),
    ('patch_size=4', option('patch_size', 4)), ('patch_size=[8, 4]', option('patch_size', [8, 4])),
    ('in_chans=4', option('in_chans', 4)), ('reg_tokens=4', option('reg_tokens', 4)),
    ('num_classes=1000000', lambda entry: entry | {'num_classes': 10 ** 6, 'classes': None}),
    ('num_classes=11', lambda entry: entry | {'num_classes': 11, 'classes': None}),
    ('num_classes=0', lambda entry: entry | {'num_classes': 0, 'classes': None}),
    ('input_size=40', changed(input_size=40)), ('input_size=4096', changed(input_size=4096)),
    ('mlp_ratio=64', option('mlp_ratio', 64)),
    # Classes and data set, which are printed.
    ('10 classes, but has num_classes=9', changed(num_classes=9)), ('9 classes', changed(classes=CLASSES[:9])),
    ('classes=', changed(classes='0123456789')), ('classes=', changed(classes=[0] * 10)),
    (r'\x1b', changed(classes=['\x1b]0;title\x07'] + CLASSES[:9])), ('classes=', changed(classes=['a' * 10 ** 6] * 10)),
    *(('data_set=', changed(data_set=value)) for value in ('IM\nNET', ['IMNET'], 7, 'a' * 10 ** 6)),
    # The normalization of its images.
    *((f'{name}=', changed(**{name: value})) for name in ('mean', 'std') for value in (
        0.5, [], [0.5] * 2, ['0.5'], [True], [-0.1], [float('nan')], [10 ** 400], '0.5')),
    ('std=', changed(std=[0.])),
    # The whole.
    *((f'lacks {name}', without(name)) for name in ('model', 'kwargs', 'num_classes', 'input_size')),
    *((f'kwargs={value!r}', changed(kwargs=value)) for value in (None, [], 'depth=2', 3)),
    *((f'format_version={value!r}', changed(format_version=value)) for value in (0, -1, '1', None, 1.0)),
    ('version 2', changed(format_version=2)),
]


@pytest.mark.parametrize('form', ['checkpoint', 'packed'])
@pytest.mark.parametrize(('named', 'change'), HOSTILE, ids=[f'{i}-{said}'[:40] for i, (said, _) in enumerate(HOSTILE)])
def test_refused_before_anything_is_built(named, change, form, forge, nothing_is_built):
    path = forge(form, change)
    said = refused(open_network, path)
    assert said.startswith(str(path)) and named in said


@pytest.mark.parametrize('entry', [None, [], 'entry', 3, {}, {1: 2}, torch.ones(3)], ids=str)
def test_entries_that_are_no_description(entry, model, nothing_is_built):
    said = refused(network_info, 'file.pth', {'model': model.state_dict(), 'qvit': entry})
    assert said.startswith('file.pth: its description')


@pytest.mark.parametrize('named, change', [
    ("('a', 1)", option(('a', 1), 2)), ('tensor([2.', option('depth', torch.full((1,), 2.))), ('3', option(3, 2)),
    ('int', option('depth', 10 ** 5000)), ('version', changed(format_version=10 ** 5000)),
    ('num_classes=tensor', changed(num_classes=torch.tensor(10)))], ids=str)
def test_values_that_only_a_checkpoint_can_hold(named, change, model, nothing_is_built):
    entry = ModelInfo(NAME, SHAPE, 10, 32).to_dict()
    assert named in refused(network_info, 'file.pth', {'model': model.state_dict(), 'qvit': change(entry)})


def test_a_start_from_a_described_network_goes_through_the_same_door(model, nothing_is_built):
    entry = ModelInfo(NAME, SHAPE | {'checkpoint_path': '/etc/passwd'}, 10, 32).to_dict()
    assert 'checkpoint_path' in refused(load_full_precision, model, {'model': model.state_dict(), 'qvit': entry})


@pytest.mark.parametrize('name', ['vit_giant_patch14_224', 'twobits_deit_base_patch16_224', 'resnet18', PLAIN])
def test_registered_sizes_are_compared_without_memory_for_them(name, model, monkeypatch):
    """A description without sizes means those of the registry, up to billions of weights."""
    create, devices = timm.create_model, []

    def create_and_note(*args, **kwargs):
        network = create(*args, **kwargs)
        devices.extend(parameter.device.type for parameter in network.parameters())
        return network

    monkeypatch.setattr(timm, 'create_model', create_and_note)
    refused(network_info, 'file.pth', {'model': model.state_dict(), 'qvit': ModelInfo(name, {}, 10, 32).to_dict()})
    assert set(devices) == {'meta'}


def test_sizes_without_values(model, nothing_is_built):
    """A few bytes can say that they are a tensor of any size."""
    state = model.state_dict()
    state['head.weight'] = state['head_dist.weight'] = torch.zeros(1).expand(10 ** 6, 48)
    entry = ModelInfo(NAME, SHAPE, 10 ** 6, 32).to_dict()
    for tensors in (state, model.state_dict() | {'head.weight': torch.empty(10 ** 6, 48, device='meta')},
                    model.state_dict() | {'head.weight': torch.eye(4).to_sparse()}):
        said = refused(network_info, 'file.pth', {'model': tensors, 'qvit': entry})
        assert 'does not hold the values of head' in said


@pytest.mark.parametrize('name', ['cls_token', 'pos_embed', 'head.weight', 'patch_embed.proj.weight',
                                  'blocks.0.attn.norm_q.weight'])
@pytest.mark.parametrize('shape', [(), (0,), (7,), (2, 3, 4, 5)], ids=str)
def test_tensors_of_any_shape(name, shape, model):
    state = model.state_dict() | {name: torch.zeros(shape)}
    entry = ModelInfo(NAME, SHAPE, 10, 32).to_dict()
    said = refused(network_info, 'file.pth', {'model': state, 'qvit': entry})
    assert name in said or 'it is damaged' in said


# --- packed files -----------------------------------------------------------------------------------------------------


def weight(name, entry):
    return lambda header: header | {'weights': header['weights'] | {name: entry}}


def activation(name, entry):
    return lambda header: header | {'activations': header['activations'] | {name: entry}}


@pytest.mark.parametrize(('named', 'change'), [
    ('head.weight', weight('head.weight', {'bits': 9, 'shape': [10, 48]})),
    ('head.weight', weight('head.weight', {'bits': 4, 'shape': [20, 48]})),  # as many bytes
    ('head.weight', weight('head.weight', {'bits': 8, 'shape': [10, 49]})),
    ('head.weight', weight('head.weight', {'bits': 8, 'shape': [48, 10]})),
    ('head.weight', weight('head.weight', {'bits': 8, 'shape': [480]})),
    ('head.weight', weight('head.weight', {'bits': 8, 'shape': [-10, -48]})),
    ('head.weight', weight('head.weight', {'bits': True, 'shape': [10, 48]})),
    ('head.weight', weight('head.weight', {'bits': 8, 'shape': [10 ** 10, 10 ** 10]})),
    ('head.weight', weight('head.weight', {'bits': 8, 'shape': 480})),
    ('head.weight', weight('head.weight', {'bits': 8})), ('head.weight', weight('head.weight', None)),
    ('neck.weight', weight('neck.weight', {'bits': 8, 'shape': [1, 1]})),
    ('norm.weight', weight('norm.weight', {'bits': 8, 'shape': [48, 4]})),
    ('head.act', activation('head.act', {})), ('head.act', activation('head.act', {'bits': 8, 'signed': 1})),
    ('head.act', activation('head.act', {'bits': 4, 'signed': True})),  # the heads have 8
    ('blocks.0.mlp.fc1.act', activation('blocks.0.mlp.fc1.act', {'bits': 3, 'signed': True})),
    ('neck.act', activation('neck.act', {'bits': 8, 'signed': True})),
    ('weights', changed(weights=[])), ('activations', without('activations')),
    ('head.weight', lambda header: header | {'weights': {name: entry for name, entry in header['weights'].items()
                                                         if name != 'head.weight'}}),
    ('blocks.0.attn.qkv', option('weight_bits', 3)), ('blocks.0.attn.attn_act', option('act_bits', 8))])
def test_headers_that_do_not_fit_their_codes(named, change, forge):
    path = forge('packed', change)
    said = refused(read_packed, path)
    assert said.startswith(f'{path}: its description does not fit, see ') and named in said


@pytest.mark.parametrize(('named', 'change'), [
    ('head.weight', lambda tensors: tensors.pop('head.alpha')),
    ('head.weight', lambda tensors: tensors.update({'head.alpha': torch.ones(11)})),
    ('head.act', lambda tensors: tensors.pop('head.act.zero_point')),
    ('head.act', lambda tensors: tensors.update({'head.act.alpha': torch.ones(7)})),
    ('norm.bias', lambda tensors: tensors.update({'norm.bias': torch.zeros(48, dtype=torch.float64)})),
    ('head.bias', lambda tensors: tensors.pop('head.bias')),
    ('neck.bias', lambda tensors: tensors.update({'neck.bias': torch.zeros(4)})),
    ('NaN', lambda tensors: tensors['norm.bias'].fill_(torch.nan))])
def test_tensors_that_do_not_fit_the_header(named, change, forge):
    path = forge('packed', lambda header: header)
    packed = read_packed(path)
    header = packed.info.to_dict() | {'weights': packed.weights, 'activations': packed.activations}
    tensors = dict(packed.tensors)
    change(tensors)
    write_header(path, header, tensors)
    assert named in refused(open_network, path)


@pytest.mark.parametrize('header', [[], None, 3, 'text', {}], ids=str)
def test_headers_of_another_kind(header, tmp_path):
    write_header(tmp_path / 'file.safetensors', header, {'a': torch.zeros(1)})
    assert 'its description cannot be read' in refused(open_network, tmp_path / 'file.safetensors')


def test_a_header_nested_without_end(tmp_path):
    path = tmp_path / 'file.safetensors'
    safetensors.torch.save_file({'a': torch.zeros(1)}, path, {'qvit_packed': '[' * 10 ** 5})
    assert 'its description cannot be read' in refused(open_network, path)


# --- what is to be let through ----------------------------------------------------------------------------------------


@pytest.mark.parametrize('form', ['checkpoint', 'packed'])
def test_the_forgery_itself_is_sound(form, forge, model):
    opened = open_network(forge(form, lambda entry: entry))
    assert opened.info == ModelInfo(NAME, SHAPE, 10, 32, CLASSES, 'DIGITS')
    images = torch.randn(2, 3, 32, 32)
    assert torch.allclose(opened.model(images), model(images), atol=1e-6)


@pytest.mark.parametrize(('name', 'kwargs'), [
    (NAME, SHAPE | {'patch_size': (8, 8), 'mlp_ratio': 2.5, 'drop_path_rate': 0.2, 'init_values': None}),
    (NAME, SHAPE | {'act_granularity': 'tensor', 'irm': False, 'quantize_attn': False, 'qkv_bias': False}),
    (NAME, SHAPE | {'patch_size': [8, 4], 'in_chans': 1}),
    (PLAIN, SHAPE | {'reg_tokens': 2, 'qk_norm': True, 'act_layer': 'relu', 'norm_layer': 'rmsnorm'}),
    (PLAIN, SHAPE | {'class_token': False, 'global_pool': 'avg', 'final_norm': False}),
    (PLAIN, SHAPE | {'no_embed_class': True, 'init_values': 1e-5, 'dynamic_img_size': True, 'num_heads': 4}),
    ('vit_tiny_patch16_224.augreg_in21k', SHAPE), ('vit_tiny_r_s16_p8_224', {'depth': 1}), ('resnet18', {}),
    ('swin_tiny_patch4_window7_224', {'embed_dim': 24}), ('hiera_tiny_224', {}), ('cait_xxs24_224', {'depth': 2}),
], ids=str)
def test_networks_of_all_kinds_come_back(name, kwargs, tmp_path):
    size = 32 if kwargs.get('patch_size') else 224
    torch.manual_seed(0)
    options = {} if name == 'resnet18' else {'img_size': size}
    network = timm.create_model(name, num_classes=4, **options, **kwargs).eval()
    info = ModelInfo(name, kwargs, 4, size)
    torch.save({'model': network.state_dict(), 'qvit': info.to_dict()}, tmp_path / 'file.pth')
    opened = open_network(tmp_path / 'file.pth')
    assert opened.info == info and type(opened.model) is type(network)
    for key, value in network.state_dict().items():
        assert torch.equal(opened.model.state_dict()[key], value), key


def test_every_option_is_one_of_the_networks():
    """A misspelt entry of the list would let nothing through, or let through what timm hands on unread."""
    known = {name for kind in (VisionTransformer, SwinTransformer, QVisionTransformer)
             for name in inspect.signature(kind).parameters}
    assert OPTIONS.keys() <= known


def test_data_sets_are_those_that_there_are(forge):
    for form in ('checkpoint', 'packed'):
        assert 'IMNET, INAT' in refused(open_network, forge(form, changed(data_set='elsewhere')))


# --- values of packed files -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(('line', 'change'), [
    ('NaN or infinite values in norm.bias', lambda tensors: tensors['norm.bias'].fill_(torch.inf)),
    ('steps that are not positive in head.alpha', lambda tensors: tensors['head.alpha'].fill_(0)),
    ('steps that are not positive in head.act.alpha', lambda tensors: tensors['head.act.alpha'].neg_())])
def test_numbers_that_no_network_computes_with(line, change, forge):
    packed = read_packed(forge('packed', lambda header: header))
    change(packed.tensors)
    write_header(path := forge('packed', lambda header: header), packed.about, packed.tensors)
    assert refused(read_packed, path) == f'{path}: {line}: pack it again'


def test_bits_behind_the_last_code_are_none(tmp_path):
    """3 x 3 codes of 3 bits fill 27 bits: the 5 that are left say nothing."""
    stream, code = pack_codes(torch.zeros(9, dtype=torch.int32), 3), {'bits': 3, 'shape': [3, 3]}
    assert _is_filled(stream, code)
    for bit in range(3, 8):
        changed = stream.clone()
        changed[-1] |= 1 << bit
        assert not _is_filled(changed, code)
    assert _is_filled(pack_codes(torch.zeros(8, dtype=torch.int32), 2), {'bits': 2, 'shape': [2, 4]})


@pytest.mark.parametrize('value', [0., -1.])
def test_every_reader_of_an_own_checkpoint_looks_at_its_steps(value, model):
    entry = ModelInfo(NAME, SHAPE, 10, 32).to_dict()
    state = model.state_dict() | {'head.alpha': torch.full((10,), value)}
    for call in (lambda checkpoint: network_info('a.pth', checkpoint), lambda checkpoint: load_full_precision(
            model, checkpoint)):
        assert 'the quantizers of head.alpha have steps that are not positive' in refused(
            call, {'model': state, 'qvit': entry})
