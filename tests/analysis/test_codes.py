"""The collector of code statistics, by hand counts and recomputation."""

import math

import numpy as np
import pytest
import torch
from watched import STUDENT, TEACHER, build, images_of

from _quan_base import named_quantizers
from analysis import codes
from analysis.attention import attention_inputs, attention_probabilities
from analysis.codes import code_distribution, code_statistics, entropy

pytestmark = pytest.mark.usefixtures('one_thread')


# --- entropies and distributions --------------------------------------------------------------------------------------


def test_entropy_by_hand():
    assert entropy(np.full(16, 1 / 16)) == 4
    assert entropy(np.array([1 / 2, 1 / 4, 1 / 8, 1 / 8, 0])) == 1.75
    assert entropy(np.array([0., 1.])) == 0


def test_code_distribution_by_hand():
    uniform = code_distribution(np.full(16, 3), -8)
    assert uniform.bits == 4 and uniform.entropy == 4 and uniform.heights.tolist() == [1 / 16] * 16
    assert uniform.positions.tolist() == list(range(-8, 8))
    some = code_distribution(np.array([2, 1, 0, 1]), 0)
    assert some.heights.tolist() == [0.5, 0.25, 0, 0.25] and some.entropy == 1.5 and some.bits == 2


# --- the collector ----------------------------------------------------------------------------------------------------


def test_statistics_by_recomputation():
    model, images = build(STUDENT, torch.float64), images_of(4, torch.float64)
    found = code_statistics(model, images)
    assert list(found) == [name for name, _ in named_quantizers(model)] and len(found) == 2 * 12 + 6

    def check(name: str, values: torch.Tensor, scale: torch.Tensor, zero_point: torch.Tensor | float, qn: int, qp: int):
        """x / scale + zero point of every value against the shares of the codes and of what lies outside."""
        position, item = values / scale + zero_point, found[name]
        met = position.clamp(qn, qp).round().flatten().tolist()
        shares = [met.count(code) / len(met) for code in range(qn, qp + 1)]
        assert item.distribution.positions.tolist() == list(range(qn, qp + 1)), name
        assert item.distribution.heights.tolist() == pytest.approx(shares), name
        assert item.clipped == pytest.approx(((position < qn) | (position > qp)).double().mean().item()), name
        expected = -sum(share * math.log2(share) for share in shares if share) / math.log2(qp - qn + 1)
        assert item.relative_entropy == pytest.approx(expected), name
        assert item.scale == pytest.approx(scale.mean().item()), name

    def check_input(name: str, values: torch.Tensor, shape: tuple[int, ...], qn: int, qp: int):
        act = model.get_submodule(name)
        check(name, values, act.alpha.view(shape), act.zero_point.round().view(shape), qn, qp)
        assert found[name].zero_point == pytest.approx(act.zero_point.mean().item()), name

    with torch.no_grad():
        block = model.blocks[0]
        x = model._pos_embed(model.patch_embed(images))
        inputs = attention_inputs(model, images)[0]
        check_input('patch_embed.proj.act', images, (3, 1, 1), -128, 127)
        check('blocks.0.attn.qkv', block.attn.qkv.weight, block.attn.qkv.alpha[:, None], 0., -8, 7)
        assert found['blocks.0.attn.qkv'].zero_point is None
        check_input('blocks.0.attn.qkv.act', block.norm1(x), (24,), -8, 7)
        for act, value, (qn, qp) in (('v_act', inputs.v, (-8, 7)), ('q_act', inputs.q.rectified, (-8, 7)),
                                     ('k_act', inputs.k.rectified, (-8, 7)),
                                     ('attn_act', attention_probabilities(inputs), (0, 15))):
            check_input(f'blocks.0.attn.{act}', value, (2, 1, 1), qn, qp)
        x = x + block.attn(block.norm1(x))[0]
        hidden = block.mlp.fc1(block.norm2(x))
        gelu = (hidden * (1 + torch.erf(hidden / 2 ** 0.5)) / 2).clamp(-10, 10)
        check_input('blocks.0.mlp.fc2.act', gelu, (96,), -8, 7)


def test_without_quantized_attention_or_any_quantizer():
    quantized = code_statistics(build(STUDENT), images_of(2))
    assert code_statistics(build(STUDENT, quantize_attn=False), images_of(2)).keys() == {
        name for name in quantized if not name.endswith(('q_act', 'k_act', 'v_act', 'attn_act'))}
    assert code_statistics(build(TEACHER), images_of(2)) == {}
    assert code_statistics(torch.nn.Linear(2, 2), torch.zeros(1, 2)) == {}


def test_a_quantizer_that_gives_one_code():
    model = build(STUDENT, torch.float64)
    with torch.no_grad():
        model.blocks[0].attn.attn_act.alpha.fill_(1e-4)  # 15 codes reach 0.0015: every probability is clipped
        model.blocks[0].attn.attn_act.zero_point.zero_()
        model.head.act.alpha.fill_(100.)
        model.head.act.zero_point.zero_()
    found = code_statistics(model, images_of(4, torch.float64))
    assert found['blocks.0.attn.attn_act'][:4] == (pytest.approx(1e-4), 0, 1, 1)
    assert found['head.act'][:4] == (100, 0, 0, 1)
    assert found['head.act'].distribution.entropy == found['blocks.0.attn.attn_act'].relative_entropy == 0


def test_dead_channels():
    model = build(STUDENT, torch.float64)
    attention, fc1 = model.blocks[0].attn, model.blocks[0].mlp.fc1
    with torch.no_grad():
        fc1.weight[:24] = 0.3  # rows of a constant, a quarter of them
        attention.norm_q.weight[:3] = 0.  # of the 12 dimensions of both heads
        model.blocks[0].norm2.weight[:6] = 0.  # inputs of fc1, of 24
    found = code_statistics(model, images_of(4, torch.float64))
    assert {name: found[f'blocks.0.{name}'].dead for name in ('mlp.fc1', 'attn.q_act', 'attn.k_act', 'mlp.fc1.act')
            } == {'mlp.fc1': 0.25, 'attn.q_act': 0.25, 'attn.k_act': 0, 'mlp.fc1.act': 0.25}


def test_pieces_add_up(monkeypatch):
    """A channel that is dead in each piece is alive where the pieces differ."""
    model, images = build(STUDENT, torch.float64), images_of(3, torch.float64)
    images[:, 0] = torch.tensor([-1., 1., 1.], dtype=torch.float64).view(3, 1, 1)
    whole = code_statistics(model, images)
    monkeypatch.setattr(codes, 'IMAGES_AT_A_TIME', 1)
    pieces = code_statistics(model, images)
    assert whole['patch_embed.proj.act'].dead == 0
    for name, item in whole.items():
        assert pieces[name][:4] == item[:4], name
        assert pieces[name].distribution.heights.tolist() == item.distribution.heights.tolist(), name


def test_the_network_is_left_as_it_was():
    model = build(STUDENT).train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    attention_inputs(model, images_of(2))
    code_statistics(model, images_of(2))
    assert model.training and all(module.training for module in model.modules())
    assert not any(module._forward_hooks for module in model.modules())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
