"""The fused kernels of integer inference against the same integer network in plain torch.

Both compute the same integers. What lies between them in float32 differs in the last bits, and where a value lies on a
rounding border a code may differ by one and spread. So most images must agree to float32's precision: a kernel that is
wrong anywhere fails on all of them.
"""
import platform
import re
import shutil
import subprocess

import pytest
import timm
import torch

from calibration.first_batch import calibrate
from deployment import native
from deployment.integer import IntegerViT
from ops import cpp_library

pytestmark = pytest.mark.skipif(shutil.which('g++') is None, reason='no C++ compiler')
IMAGES = 9


@pytest.fixture
def own_cache(tmp_path, monkeypatch):
    """An empty cache of compiled libraries, forgotten afterwards."""
    monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path))
    native._library.cache_clear()
    yield tmp_path / 'qvit'
    native._library.cache_clear()


def spread_rule(channels, qn, qp):
    """Scales that differ from channel to channel, so that folding has something to do; zero points not at 0."""
    scale = 2 * channels.abs().mean() / qp ** .5 * torch.linspace(.8, 1.25, len(channels))
    return scale, 0.3 * (channels.amin(1) - scale * qn)


def make(size=(32, 48), depth=2, terms=1, name='fourbits_deit_tiny_patch16_224', classes=10, images=IMAGES, active=None,
         **kwargs):
    """An integer network and images; blocks whose index is not in `active` pass their input on unchanged."""
    torch.manual_seed(0)
    model = timm.create_model(name, img_size=size, depth=depth, num_classes=classes, **kwargs)
    for index, block in enumerate(model.blocks):  # LayerNorms that do something
        for norm in (block.norm1, block.norm2, block.attn.norm_q, block.attn.norm_k):
            for parameter in norm.parameters():
                torch.nn.init.uniform_(parameter, .5, 1.5)
        if active is not None and index not in active:
            for parameter in (*block.attn.proj.parameters(), *block.mlp.fc2.parameters()):
                torch.nn.init.zeros_(parameter)
    images = torch.randn(images, model.patch_embed.proj.in_channels, *size)
    calibrate(model, images, spread_rule)
    return IntegerViT(model, terms), images


def assert_agree(network, images, **options):
    expected, got = network(images), native.NativeViT(network, **options)(images)
    assert got.shape == expected.shape
    error = (got - expected).abs().amax(1) / expected.std()
    assert error.median() < 1e-4, error
    return got


@pytest.mark.parametrize('terms', [1, 2])
@pytest.mark.parametrize('kwargs', [{}, {'act_granularity': 'tensor'}, {'irm': False}, {'act_bits': 8},
                                    {'weight_bits': 8, 'act_bits': 8, 'irm': False}, {'classes': 129},
                                    {'name': 'twobits_deit_small_patch16_224'}, {'patch_size': 8}, {'in_chans': 1}],
                         ids=str)
def test_equals_plain_torch(kwargs, terms):
    network, images = make(terms=terms, **kwargs)
    assert_agree(network, images, threads=1)


@pytest.mark.parametrize('threads', [2, 3, 64])
@pytest.mark.parametrize('batch', [1, 2, 5])
def test_threads_do_not_change_the_result(threads, batch):
    network, images = make(size=(64, 64))
    one = native.NativeViT(network, threads=1)(images[:batch])
    assert torch.equal(native.NativeViT(network, threads=threads)(images[:batch]), one)


def test_result_of_an_image_does_not_depend_on_its_batch():
    network, images = make()
    model = native.NativeViT(network)
    assert torch.equal(model(images), torch.cat([model(image[None]) for image in images]))
    assert model(images[:0]).shape == (0, 10)


# Through 12 blocks of random weights one code that float32 rounds otherwise changes all logits, in torch as in the
# kernels. So few blocks do anything at a time, and the others add 0.


@pytest.mark.slow
def test_whole_depth_and_resolution():
    network, images = make(size=(224, 224), depth=12, images=3, active=(0, 11))
    logits = assert_agree(network, images)
    assert (logits - logits[0]).abs().amax(1)[1:].min() > 0.1 * logits.std()  # they depend on the images


@pytest.mark.slow
def test_every_block_has_its_own_weights_and_scales():
    alone = []
    for index in (1, 5, 10):
        network, images = make(size=(32, 32), depth=12, active=(index,))
        alone.append(assert_agree(network, images))
    assert all((one - other).abs().max() > 0.1 * one.std() for one, other in zip(alone, alone[1:], strict=False))


@pytest.mark.processes
@pytest.mark.parametrize(('flags', 'needs', 'instructions'), [
    (['-march=x86-64'], None, 'portable'), (['-march=haswell'], 'avx2', 'AVX2'),
    (['-march=haswell', '-mavxvnni'], 'avx_vnni', 'AVX-VNNI')])
def test_every_instruction_set_gives_the_same(own_cache, monkeypatch, flags, needs, instructions):
    if platform.machine() != 'x86_64' or needs and needs not in cpp_library.processor():
        pytest.skip(f'this processor lacks {needs}')
    network, images = make(size=(32, 32), depth=1, act_bits=8)
    expected = native.NativeViT(network)(images)
    monkeypatch.setattr(cpp_library, 'FLAGS', [flag for flag in cpp_library.FLAGS if flag != '-march=native'] + flags)
    monkeypatch.setattr(cpp_library, 'WIDE', [])
    native._library.cache_clear()
    other = native.NativeViT(network)
    assert other.instructions == instructions
    error = (other(images) - expected).abs().amax(1) / expected.std()
    assert error.median() < 1e-4


@pytest.mark.slow
def test_compiled_once(own_cache, monkeypatch):
    network, _ = make(depth=1)
    native.NativeViT(network)
    assert len(list(own_cache.glob('*.so'))) == 1
    native._library.cache_clear()
    monkeypatch.setattr(subprocess, 'run', None)
    native.NativeViT(network)


@pytest.mark.parametrize(('compiler', 'reason'), [('no-such-compiler', 'no C++ compiler'),
                                                  ('false', 'cannot compile')])
def test_without_a_compiler_plain_torch_runs_and_says_so(own_cache, monkeypatch, capsys, compiler, reason):
    monkeypatch.setenv('CXX', compiler)
    network, images = make(depth=1)
    with pytest.raises(native.NativeUnavailable, match=re.escape(reason)):
        native.NativeViT(network)
    assert native.fastest(network) is network
    said = capsys.readouterr().out
    assert reason in said and said.count('\n') == 1
    assert not own_cache.exists() or not list(own_cache.iterdir())


def test_unsupported_networks_and_images():
    model, images = make(depth=1, quantize_attn=False)
    with pytest.raises(native.NativeUnavailable, match='quantized attention'):
        native.NativeViT(model)
    wide, _ = make(depth=1, num_heads=6)
    with pytest.raises(native.NativeUnavailable, match='64 wide'):
        native.NativeViT(wide)
    network, _ = make(depth=1)
    with pytest.raises(ValueError, match=r'3, 32, 48'):
        native.NativeViT(network)(images[:, :, :16])


def test_long_sequences_of_8_bit_codes():
    """Sums of 8-bit codes over 290 tokens pass 2^24, where float32 stops counting one by one."""
    network, images = make(size=(96, 192), patch_size=8, depth=1, act_bits=8)
    assert_agree(network, images[:3])


def test_damaged_values_do_not_crash():
    network, images = make(depth=1)
    images[0, 0, 0, 0], images[1] = float('nan'), float('inf')
    logits = native.NativeViT(network)(images)
    assert torch.equal(logits[2:], native.NativeViT(network)(images[2:]))
