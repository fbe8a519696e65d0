"""The network against float64 fixtures of the published one: forward, gradients, calibration, training steps."""
import json
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from reference.deterministic import batch, state_dict_for

import quant_vision_transformer  # noqa: F401  registers the variants
from calibration.first_batch import calibrate

HERE = Path(__file__).parent / 'reference'
RELATIVE = 1e-8


pytestmark = pytest.mark.usefixtures('implementation')


@pytest.fixture(scope='module')
def keys() -> dict:
    return json.loads((HERE / 'state_keys_tiny.json').read_text())


@pytest.fixture(scope='module')
def reference() -> dict:
    with np.load(HERE / 'reference_tiny_4bit.npz') as file:
        return dict(file)


@pytest.fixture(scope='module')
def images_and_labels() -> tuple[torch.Tensor, torch.Tensor]:
    images, labels = batch()
    return images.double(), labels


@pytest.fixture
def network(keys):
    model = timm.create_model('fourbits_deit_tiny_patch16_224')
    model.load_state_dict(state_dict_for(keys))
    return model.double()


def loss_of(outputs, labels):
    logits, dist_logits = outputs
    return 0.5 * F.cross_entropy(logits, labels) + 0.5 * F.cross_entropy(dist_logits, (labels + 1) % 1000)


def assert_close(actual, expected):
    """Relative to the largest value, so that near-zero entries are held to the accuracy of the rest."""
    actual, expected = np.asarray(actual, np.float64), np.asarray(expected, np.float64)
    assert np.abs(actual - expected).max() <= RELATIVE * np.abs(expected).max()


@pytest.mark.slow
def test_evaluation(network, reference, images_and_labels):
    with torch.no_grad():
        assert_close(network.eval()(images_and_labels[0]), reference['eval_logits'])


@pytest.mark.slow
def test_training_forward_loss_and_every_gradient(network, reference, images_and_labels):
    images, labels = images_and_labels
    outputs = network.train()(images)
    assert_close(outputs[0].detach(), reference['train_logits'])
    assert_close(outputs[1].detach(), reference['train_logits_dist'])
    loss = loss_of(outputs, labels)
    assert_close(loss.detach(), reference['loss'])

    loss.backward()
    parameters = dict(network.named_parameters())
    assert set(parameters) == set(reference['grad_names'])
    norms = np.array([parameters[name].grad.norm().item() for name in reference['grad_names']])
    np.testing.assert_allclose(norms, reference['grad_norms'], rtol=RELATIVE, atol=1e-18)


@pytest.mark.slow
@pytest.mark.parametrize('implementation', ['torch', 'cpu'], indirect=True)  # the reference is slow
def test_five_sgd_updates(network, reference, images_and_labels):
    images, labels = images_and_labels
    optimizer = torch.optim.SGD(network.train().parameters(), lr=0.01)
    losses = []
    for _ in range(5):
        optimizer.zero_grad()
        loss = loss_of(network(images), labels)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    np.testing.assert_allclose(losses, reference['sgd_losses'], rtol=RELATIVE)


@pytest.mark.slow
@pytest.mark.parametrize('explicitly', [True, False])
def test_first_batch_calibration(keys, reference, images_and_labels, explicitly):
    state = state_dict_for(keys)
    for name, value in state.items():
        leaf = name.rpartition('.')[2]
        if leaf in ('init_state', 'signed', 'zero_point'):
            value.zero_()
        elif leaf == 'alpha':
            value.fill_(1)
    model = timm.create_model('fourbits_deit_tiny_patch16_224')
    model.load_state_dict(state)
    model.double()
    if explicitly:
        calibrate(model, images_and_labels[0])
    else:
        model.train()(images_and_labels[0])
    state = model.state_dict()
    for name in reference['init_names']:  # the published rule gives every channel the same
        assert torch.all(state[name] == state[name].flatten()[0]), name
    first = [state[name].flatten()[0].item() for name in reference['init_names']]
    np.testing.assert_allclose(first, reference['init_first'], rtol=RELATIVE)
