"""Which images a deployed network is evaluated on, and its agreement with another one."""
import pytest
import torch
from torch.utils.data import TensorDataset

from checkpoints.networks import ModelInfo
from deployment.evaluation import (
    Evaluated,
    agreement,
    check_classes,
    check_comparable,
    evaluate_classes,
    evenly_spread,
)
from utils import UserError

INFO = ModelInfo('any', num_classes=2, input_size=32, classes=['a', 'b'], data_set='CIFAR10')


def test_classes_are_compared(capsys):
    check_classes('f', INFO, 'CIFAR', ['a', 'b'])
    check_classes('f', ModelInfo('any', num_classes=2), 'CIFAR', ['c', 'd'])
    assert capsys.readouterr().out == ''
    check_classes('f', INFO, 'CIFAR', ['b', 'a'])
    assert 'warning: the classes of the data set have other names' in capsys.readouterr().out
    with pytest.raises(UserError, match='f has 2 classes, CIFAR has 3: choose the data set of its classes'):
        check_classes('f', INFO, 'CIFAR', ['a', 'b', 'c'])


def test_some_images_are_evenly_spread():
    dataset = TensorDataset(torch.arange(355))
    assert evenly_spread(dataset, 7).indices == [0, 50, 101, 152, 202, 253, 304]  # floor(355 i / 7)
    assert evenly_spread(dataset, None) is dataset and evenly_spread(dataset, 355) is dataset


def test_agreement_counts_images():
    batches = torch.eye(3)[[0, 2, 1, 1, 0]].split(2)
    found = evaluate_classes(lambda predict: {'n': sum(len(predict(batch)) for batch in batches)}, lambda x: 10 * x)
    assert found.stats == {'n': 5} and found.classes.tolist() == [0, 2, 1, 1, 0]
    other = Evaluated({}, torch.tensor([0, 2, 1, 0, 1]))
    assert agreement(found, other) == 'Both predict the same class for 3 of 5 images: 60.0%'


@pytest.mark.parametrize('other', [ModelInfo('any', num_classes=3, input_size=32),
                                   ModelInfo('any', num_classes=2, input_size=48)], ids=str)
def test_other_networks_are_not_compared(other):
    check_comparable('f', INFO, 'g', INFO)
    with pytest.raises(UserError, match='--checkpoint g has other classes or another image size than f'):
        check_comparable('f', INFO, 'g', other)
