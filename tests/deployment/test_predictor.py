"""Predictors of every arithmetic and backend, names of classes, pictures."""
import pytest
import timm
import torch
from PIL import Image
from timm.data import ImageNetInfo

import models  # noqa: F401  registers full-precision networks
from calibration.first_batch import calibrate
from checkpoints.networks import ModelInfo
from deployment import native
from deployment.integer import IntegerViT
from deployment.predictor import build_predictor, class_names, likeliest, open_quantized, read_picture
from utils import UserError


def network():
    torch.manual_seed(0)
    model = timm.create_model('fourbits_deit_tiny_patch16_224', depth=1, img_size=32, num_classes=4)
    calibrate(model, torch.randn(4, 3, 32, 32), lambda x, qn, qp: (x.abs().mean(1) / qp ** 0.5, x.amin(1)))
    return model.eval()


def test_arithmetics_and_backends(monkeypatch, capsys):
    model = network()
    assert build_predictor(model, 'float') is model
    for arithmetic, terms in (('int8', 1), ('int8x2', 2)):
        predict = build_predictor(model, arithmetic, 'torch')
        assert isinstance(predict, IntegerViT) and len(predict.blocks[0].fc1.weight) == terms
    monkeypatch.setenv('CXX', 'no-such-compiler')
    native._library.cache_clear()
    assert isinstance(build_predictor(model, 'int8', 'auto'), IntegerViT)
    assert 'no C++ compiler (no-such-compiler)' in capsys.readouterr().out
    with pytest.raises(UserError, match=r'--backend native: no C\+\+ compiler \(no-such-compiler\)'):
        build_predictor(model, 'int8', 'native')


@pytest.mark.parametrize(('options', 'message'), [
    (('float', 'native'), '--backend native is for integers on the CPU'),
    (('int8', 'torch', 'teapot'), '--device teapot cannot be used'),
    (('int8', 'native', 'meta'), '--backend native is for integers on the CPU')])
def test_what_does_not_go_together(options, message):
    with pytest.raises(UserError, match=message):
        build_predictor(network(), *options)


def test_full_precision_is_refused(tmp_path):
    model = timm.create_model('deit_tiny_patch16_224', depth=1, num_classes=4)
    info = ModelInfo('deit_tiny_patch16_224', {'depth': 1}, 4, 224)
    torch.save({'model': model.state_dict(), 'qvit': info.to_dict()}, tmp_path / 'a.pth')
    with pytest.raises(UserError, match='a.pth holds deit_tiny_patch16_224, which is of full precision: quantize'):
        open_quantized(tmp_path / 'a.pth')


def test_class_names():
    imagenet = ImageNetInfo()
    named = class_names(ModelInfo('any'))
    assert named[0] == 'tench, Tinca tinca (n01440764)' and len(named) == 1000
    assert named == class_names(ModelInfo('any', classes=imagenet.label_names()))
    assert class_names(ModelInfo('any', num_classes=2, classes=['n01443537', 'mine'])) == [
        'goldfish, Carassius auratus (n01443537)', 'mine']
    assert class_names(ModelInfo('any', num_classes=3)) == ['class 0', 'class 1', 'class 2']


def test_likeliest_classes():
    logits = torch.tensor([[1., 3., 2.]])
    shares = logits.softmax(1)[0].tolist()
    found = likeliest(lambda images: logits.expand(len(images), -1), torch.zeros(3, 2, 2), ['a', 'b', 'c'], 2)
    assert [name for _, name in found] == ['b', 'c']
    assert [share for share, _ in found] == pytest.approx([shares[1], shares[2]])
    assert len(likeliest(lambda images: logits, torch.zeros(3, 2, 2), ['a', 'b', 'c'], 9)) == 3


def test_pictures_are_read_as_rgb(tmp_path):
    Image.new('L', (2, 3), 7).save(tmp_path / 'grey.png')
    image = read_picture(tmp_path / 'grey.png')
    assert image.mode == 'RGB' and image.getpixel((0, 0)) == (7, 7, 7)
    (tmp_path / 'text.png').write_text('no picture')
    with pytest.raises(UserError, match=r'text.png is not a readable image \(UnidentifiedImageError\)'):
        read_picture(tmp_path / 'text.png')
