"""Packed files: the bytes of codes, the size of files, what comes back out of them, and damage."""

import json
import math
import re

import pytest
import safetensors.torch
import timm
import torch
from timm.data import ImageNetInfo

import quant_vision_transformer  # noqa: F401  registers the variants
from _quan_base import ActQ, named_quantizers
from calibration.first_batch import calibrate
from checkpoints.networks import ModelInfo, open_network
from checkpoints.packed import is_packed, pack_codes, packed_layout, read_packed, unpack_codes, write_packed
from utils import UserError

pytestmark = pytest.mark.usefixtures('one_thread')
NAME = 'fourbits_deit_tiny_patch16_224'
SHAPE = {'patch_size': 8, 'embed_dim': 48, 'depth': 2, 'num_heads': 3}


def uneven(x, qn, qp):
    """Another scale and zero point for every channel."""
    scale = 2 * x.abs().mean(1) / qp ** 0.5
    return scale, x.amin(1) - scale * qn


def network(name=NAME, **kwargs):
    """A calibrated network and its description."""
    torch.manual_seed(0)
    kwargs = SHAPE | kwargs
    model = timm.create_model(name, num_classes=10, img_size=32, **kwargs)
    calibrate(model, torch.randn(4, 3, 32, 32), uneven)
    return model.eval(), ModelInfo(name, kwargs, 10, 32, [str(digit) for digit in range(10)], 'DIGITS')


@pytest.fixture(scope='module')
def packed_bytes(tmp_path_factory) -> bytes:
    path = tmp_path_factory.mktemp('packed') / 'network.qvit.safetensors'
    write_packed(*network(), path)
    return path.read_bytes()


def split(data: bytes) -> tuple[dict, int]:
    """A safetensors file's header, and where the data begin."""
    start = 8 + int.from_bytes(data[:8], 'little')
    return json.loads(data[8:start]), start


# --- streams of codes -------------------------------------------------------------------------------------------------


def test_three_bit_codes_by_hand():
    # Plus 4: 0, 7, 4, 3, 6. Low bits first 000 111 001 110 011 and a 0: bytes 00011100 and 11100110, low bits first.
    stream = pack_codes(torch.tensor([-4, 3, 0, -1, 2]), 3)
    assert stream.dtype == torch.uint8 and stream.tolist() == [8 + 16 + 32, 1 + 2 + 4 + 32 + 64]


@pytest.mark.parametrize('bits', range(2, 9))
@pytest.mark.parametrize('count', [0, 1, 7, 8, 13, 256])
def test_streams(bits, count):
    low = -2 ** (bits - 1)
    codes = torch.randint(low, -low, (count,), generator=torch.Generator().manual_seed(bits))
    codes[:2] = torch.tensor([low, -low - 1])[:count]
    stream = pack_codes(codes, bits)
    number = sum((code - low) << (bits * index) for index, code in enumerate(codes.tolist()))
    assert bytes(stream.tolist()) == number.to_bytes(math.ceil(count * bits / 8), 'little')
    back = unpack_codes(stream, bits, count)
    assert back.dtype == torch.int32 and back.tolist() == codes.tolist()


@pytest.mark.parametrize(('bits', 'code'), [(2, 2), (2, -3), (3, 4), (4, -9), (8, 128)])
def test_codes_that_do_not_fit(bits, code):
    with pytest.raises(ValueError, match=f'do not fit in {bits} bits'):
        pack_codes(torch.tensor([0, code]), bits)


# --- sizes ------------------------------------------------------------------------------------------------------------


def bytes_of_tensors(model) -> int:
    """What bit-widths say: b bits a weight code, each tensor in whole bytes, 32 bits for what else a forward needs."""
    coded = {f'{name}.weight': layer.weight_bits for name, layer in named_quantizers(model)
             if not isinstance(layer, ActQ)}
    return sum(math.ceil(value.numel() * coded.get(name, 32) / 8) for name, value in model.state_dict().items()
               if not re.search(r'\.(init_state|signed)$', name))


@pytest.mark.parametrize('weight_bits', [2, 3, 4, 5, 8])
def test_size_is_that_of_the_bits(weight_bits, tmp_path):
    model, info = network(weight_bits=weight_bits)
    packed = write_packed(model, info, tmp_path / 'file.safetensors')
    data = (tmp_path / 'file.safetensors').read_bytes()
    header, start = split(data)
    assert len(data) == start + bytes_of_tensors(model)
    assert sum(stored.bytes for stored in packed.stored()) == sum(stored.bytes for stored in packed_layout(model))
    assert set(packed.stored()) == set(packed_layout(model)) == set(read_packed(tmp_path / 'file.safetensors').stored())
    assert header['blocks.0.attn.qkv.weight'] | {'data_offsets': 0} == {
        'dtype': 'U8', 'shape': [math.ceil(48 * 144 * weight_bits / 8)], 'data_offsets': 0}
    assert [path.name for path in tmp_path.iterdir()] == ['file.safetensors']  # nothing is left beside it


@pytest.mark.slow
@pytest.mark.parametrize(('name', 'most'), [(NAME, 3.8e6), ('twobits_deit_small_patch16_224', 7.5e6)])
def test_full_size_files(name, most, tmp_path):
    model = timm.create_model(name)
    model.load_state_dict({key: torch.ones_like(value) if key.endswith('init_state') else value
                           for key, value in model.state_dict().items()})
    classes = ImageNetInfo().label_names()
    assert len(classes) == 1000
    write_packed(model, ModelInfo(name, {}, 1000, 224, classes, 'IMNET'), tmp_path / 'file.safetensors')
    data = (tmp_path / 'file.safetensors').read_bytes()
    assert len(data) == split(data)[1] + bytes_of_tensors(model) <= most


# --- what comes back --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize('kwargs', [
    {}, {'weight_bits': 2, 'act_bits': 2}, {'weight_bits': 3}, {'weight_bits': 8, 'act_bits': 8},
    {'act_granularity': 'tensor'}, {'irm': False}, {'quantize_attn': False}], ids=str)
def test_loads_bit_for_bit(kwargs, tmp_path):
    model, info = network(**kwargs)
    with torch.no_grad():  # scales that the forward replaces by the smallest
        model.blocks[0].mlp.fc1.alpha[:2] = torch.tensor([0., -1.])
        model.blocks[0].mlp.fc2.act.alpha[:1] = -1.
    write_packed(model, info, tmp_path / 'file.safetensors')
    packed = read_packed(tmp_path / 'file.safetensors')
    back = packed.network()
    assert packed.info == info and open_network(tmp_path / 'file.safetensors').info == info
    assert not back.training
    layers = dict(named_quantizers(back))
    for name, layer in named_quantizers(model):
        if isinstance(layer, ActQ):
            assert (layers[name].signed_codes, layers[name].bits) == (layer.signed_codes, layer.bits), name
        else:
            assert torch.equal(layers[name].quantized_weight(), layer.quantized_weight()), name
            assert torch.equal(layers[name].to_int(), layer.to_int()), name
    images = torch.randn(3, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(back(images), model(images))
        assert torch.equal(open_network(tmp_path / 'file.safetensors').model(images), model(images))


def test_the_same_network_gives_the_same_bytes(packed_bytes, tmp_path):
    for turn in range(4):
        write_packed(*network(), tmp_path / f'{turn}.safetensors')
        assert (tmp_path / f'{turn}.safetensors').read_bytes() == packed_bytes


def test_other_precisions_are_packed_as_float32(tmp_path):
    model, info = network()
    write_packed(model.double(), info, tmp_path / 'file.safetensors')
    state = read_packed(tmp_path / 'file.safetensors').network().state_dict()
    assert torch.equal(state['pos_embed'], model.pos_embed.float())


# --- damage -----------------------------------------------------------------------------------------------------------


def refused(path, line):
    with pytest.raises(UserError) as caught:
        read_packed(path)
    said = str(caught.value)
    assert said.startswith(f'{path}: ') and line in said and '\n' not in said


@pytest.mark.parametrize('where', ['empty', 'length', 'header', 'header end', 'data', 'last byte'])
def test_truncated(where, packed_bytes, tmp_path):
    start = split(packed_bytes)[1]
    size = {'empty': 0, 'length': 5, 'header': start // 2, 'header end': start, 'last byte': len(packed_bytes) - 1,
            'data': (start + len(packed_bytes)) // 2}[where]
    path = tmp_path / 'cut.safetensors'
    path.write_bytes(packed_bytes[:size])
    refused(path, 'truncated or damaged')


@pytest.mark.parametrize('share', [0., 0.3, 0.7, 1.])
def test_one_flipped_bit_of_the_data(share, packed_bytes, tmp_path):
    start, data = split(packed_bytes)[1], bytearray(packed_bytes)
    data[start + round(share * (len(data) - 1 - start))] ^= 16
    path = tmp_path / 'flipped.safetensors'
    path.write_bytes(data)
    assert is_packed(path)
    refused(path, 'altered, its checksum does not match')


@pytest.mark.parametrize(('old', 'new', 'line'), [
    (rb'\"num_classes\":10', rb'\"num_classes\":11', 'altered, its checksum does not match'),
    (rb'\"bits\":4', rb'\"bits\":3', 'altered, its checksum does not match'),
    (rb'"dtype":"F32"', rb'"dtype":"I32"', 'altered, its checksum does not match'),
    (rb'\"model\":', rb'\"model\" ', 'altered, its description cannot be read'),
    (rb'\"format_version\":1', rb'\"format_version\":2', 'format version 2, this code reads up to 1: update it'),
    (rb'"qvit_packed"', rb'"qvit_pocked"', 'not a packed Q-ViT file')])
def test_altered_header(old, new, line, packed_bytes, tmp_path):
    assert old in packed_bytes and len(old) == len(new)
    path = tmp_path / 'altered.safetensors'
    path.write_bytes(packed_bytes.replace(old, new))
    refused(path, line)


def test_other_files(tmp_path):
    foreign, checkpoint = tmp_path / 'foreign.safetensors', tmp_path / 'checkpoint.pth'
    safetensors.torch.save_file({'half': torch.ones(3, dtype=torch.bfloat16)}, foreign)
    torch.save({'model': {'half': torch.ones(3)}}, checkpoint)
    refused(foreign, 'not a packed Q-ViT file: make one with deploy.py pack')
    refused(checkpoint, 'not a safetensors file')
    refused(tmp_path / 'nothing', 'no such file')
    refused(tmp_path, 'no such file')
    assert not any(map(is_packed, (foreign, checkpoint, tmp_path / 'nothing', tmp_path)))


def test_networks_that_cannot_be_packed(tmp_path):
    torch.manual_seed(0)
    for name, line in ((NAME, 'no steps yet'), ('deit_tiny_distilled_patch16_224', 'a full-precision one')):
        model = timm.create_model(name, num_classes=10, img_size=32, **SHAPE)
        with pytest.raises(UserError, match=line):
            write_packed(model, ModelInfo(name), tmp_path / 'file.safetensors')
    for path in (tmp_path / 'nowhere' / 'file.safetensors', tmp_path):
        with pytest.raises(UserError, match='cannot be written'):
            write_packed(*network(), path)
    assert list(tmp_path.iterdir()) == []
