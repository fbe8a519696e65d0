"""Networks for grey images, and of another normalization, get such images from every command; others are refused."""
import pytest
import timm
import torch
from PIL import Image

import deploy
import visualize
from calibration.first_batch import calibrate
from checkpoints.networks import ModelInfo
from datasets import Digits, build_transform

pytestmark = [pytest.mark.usefixtures('one_thread'), pytest.mark.slow]
NAME, KWARGS = 'fourbits_deit_tiny_patch16_224', {'depth': 1, 'embed_dim': 24, 'num_heads': 2, 'patch_size': 8}


def saved(folder, channels: int, **described) -> tuple[ModelInfo, str]:
    torch.manual_seed(0)
    info = ModelInfo(NAME, KWARGS | {'in_chans': channels}, 10, 16, Digits.classes, 'DIGITS', **described)
    model = timm.create_model(NAME, num_classes=10, img_size=16, **info.kwargs)
    calibrate(model, torch.randn(4, channels, 16, 16))
    torch.save({'model': model.state_dict(), 'qvit': info.to_dict()}, folder / 'network.pth')
    return info, str(folder / 'network.pth')


def run(*flags: object) -> int:
    return deploy.main([str(flag) for flag in flags])


@pytest.mark.parametrize('described', [{}, {'mean': (0.5,), 'std': (0.25,)}])
def test_grey_images_for_a_grey_network(described, tmp_path, capsys):
    info, path = saved(tmp_path, 1, **described)
    assert run('eval', path, '--limit', 8, '--num_workers', 0, '--arithmetic', 'float') == 0
    assert 'on the 8 test images' in capsys.readouterr().out
    args = visualize.get_args_parser().parse_args(['codes', '--resume', path, '--num-images', '2'])
    images = visualize.load_images(args, info, 'DIGITS')
    transform = build_transform(False, 16, 'DIGITS', normalization=info.normalization)
    assert images.shape == (2, 1, 16, 16) and torch.equal(images[0], Digits(False, transform)[0][0])
    args = visualize.get_args_parser().parse_args(['codes', '--resume', path, '--num-images', '2', '--mean', '0.1'])
    moved = (info.normalization.mean[0] - 0.1) / info.normalization.std[0]
    torch.testing.assert_close(visualize.load_images(args, info, 'DIGITS'), images + moved, atol=1e-5, rtol=0)


def test_networks_of_other_channels_are_refused(tmp_path, capsys):
    Image.new('RGB', (16, 16)).save(tmp_path / 'x.png')
    _, path = saved(tmp_path, 5)
    for call in (('eval', path), ('predict', tmp_path / 'x.png', '--packed', path, '--arithmetic', 'float')):
        assert run(*call) == 2
        assert 'the network takes 5 channels: images have 3, or 1' in capsys.readouterr().err
    pytest.importorskip('matplotlib')
    assert visualize.main(['codes', '--resume', path, '--output', str(tmp_path / 'x.pdf')]) == 2
    assert 'the network takes 5 channels: images have 3, or 1' in capsys.readouterr().err


def test_networks_of_other_images_are_not_compared(tmp_path, capsys):
    (tmp_path / 'other').mkdir()
    (_, path), (_, other) = saved(tmp_path, 3), saved(tmp_path / 'other', 3, mean=(0.5,))
    assert run('eval', path, '--checkpoint', other, '--limit', 2, '--num_workers', 0, '--arithmetic', 'float') == 2
    assert 'takes images of another mean, deviation or number of channels' in capsys.readouterr().err
