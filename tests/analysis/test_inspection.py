"""The numbers behind the figures, by hand counts and recomputation."""

import json
import math
import os

import numpy as np
import pytest
import timm
import torch
from torch import nn
from watched import STUDENT, TEACHER, build, images_of

from analysis import inspection
from analysis.attention import attention_inputs, attention_probabilities
from analysis.inspection import (
    attention_distance,
    attention_distances,
    class_token_maps,
    code_usage,
    compare_qk,
    qk_distributions,
    read_log,
    read_logs,
    value_distribution,
)
from utils import UserError

# --- distributions ----------------------------------------------------------------------------------------------------


def test_differential_entropy():
    values = torch.linspace(0, 1, 64001, dtype=torch.float64)
    flat = value_distribution(values)
    assert flat.entropy == pytest.approx(0, abs=1e-4) and flat.bits is None
    assert (flat.heights * np.diff(flat.positions)).sum() == pytest.approx(1)
    assert value_distribution(2 * values - 5).entropy == pytest.approx(1, abs=1e-4)  # a bit for each doubling
    gaussian = torch.special.ndtri((torch.arange(200000, dtype=torch.float64) + 0.5) / 200000)
    of_deviation_3 = 0.5 * math.log2(2 * math.pi * math.e * 9)
    assert value_distribution(3 * gaussian).entropy == pytest.approx(of_deviation_3, abs=0.01)


# --- attention --------------------------------------------------------------------------------------------------------


def test_attention_distance_by_hand():
    def distance(attention, grid=(2, 2), patch_size=(8, 8)):
        return attention_distance(attention[None, None].double(), grid, patch_size).item()

    assert distance(torch.eye(4)) == 0
    assert distance(torch.full((4, 4), 0.25)) == pytest.approx((0 + 8 + 8 + 8 * 2 ** 0.5) / 4)
    to_the_side = torch.eye(4)[[1, 0, 3, 2]]
    below = torch.eye(4)[[2, 3, 0, 1]]
    assert distance(to_the_side, patch_size=(4, 8)) == 8 and distance(below, patch_size=(4, 8)) == 4
    # In a row of three: neighbours at 8, ends at 16 from each other. Rows attend to the first patch alone.
    assert distance(torch.eye(3)[[0, 0, 0]], grid=(1, 3)) == pytest.approx((0 + 8 + 16) / 3)

    # Two special tokens take half of all attention, and their own is not counted: the distance stays.
    special = torch.zeros(6, 6)
    special[:, :2], special[2:, 2:], special[:2, 2:] = 0.25, to_the_side / 2, 0.125
    assert distance(special) == 8
    # Heads apart, images averaged.
    pair = torch.stack([torch.stack([torch.eye(4), to_the_side]), torch.stack([torch.eye(4), torch.eye(4)])])
    assert attention_distance(pair, (2, 2), (8, 8)).tolist() == [0, 4]


@pytest.mark.parametrize('options', [{}, {'irm': False}, {'quantize_attn': False}])
def test_attention_of_the_student_equals_a_recomputation(options):
    model, images = build(STUDENT, torch.float64, **options), images_of(3, torch.float64)
    _, returned = model(images, return_blocks=True)
    for block, inputs, outputs in zip(model.blocks, attention_inputs(model, images), returned, strict=True):
        used = []
        for name, stages in (('q', inputs.q), ('k', inputs.k)):
            rectified = getattr(outputs, name)
            assert torch.equal(stages.rectified, rectified)
            norm = getattr(block.attn, f'norm_{name}')
            assert torch.equal(norm(stages.projected), stages.rectified)
            assert torch.equal(stages.projected, stages.rectified) == isinstance(norm, nn.Identity)
            if 'quantize_attn' not in options:
                act = getattr(block.attn, f'{name}_act')
                scale, zero_point = act.alpha.view(-1, 1, 1), act.zero_point.round().view(-1, 1, 1)
                codes = (rectified / scale + zero_point).clamp(-8, 7).round()
                assert torch.equal(stages.codes, codes.int())
                rectified = (codes - zero_point) * scale
            else:
                assert stages.codes is None
            used.append(rectified)
        scores = torch.einsum('bhnd,bhmd->bhnm', *used) / math.sqrt(12)
        expected = scores.exp() / scores.exp().sum(-1, keepdim=True)
        attention = attention_probabilities(inputs)
        assert attention.shape == (3, 2, 6, 6)
        torch.testing.assert_close(attention, expected, rtol=1e-12, atol=0)
        torch.testing.assert_close(attention.sum(-1), torch.ones(3, 2, 6, dtype=torch.float64), rtol=1e-12, atol=0)
        assert attention.std(-1).min() > 1e-3


def test_attention_of_the_teacher_is_what_timm_computes():
    model, images = build(TEACHER, torch.float64), images_of(3, torch.float64)
    computed = []
    for block in model.blocks:
        block.attn.fused_attn = False
        block.attn.attn_drop.register_forward_hook(lambda _module, inputs, _output: computed.append(inputs[0]))
    model(images)
    for inputs, expected in zip(attention_inputs(model, images), computed[:2], strict=True):
        torch.testing.assert_close(attention_probabilities(inputs), expected, rtol=1e-10, atol=0)
    values = model.blocks[0].attn.qkv(model.blocks[0].norm1(model._pos_embed(model.patch_embed(images))))
    expected = values[..., 48:].unflatten(-1, (2, 12)).transpose(1, 2)
    torch.testing.assert_close(attention_inputs(model, images)[0].v, expected)


def test_class_token_maps():
    model, images = build(STUDENT, torch.float64), images_of(2, torch.float64)
    maps = class_token_maps(model, images, -1)
    attention = attention_probabilities(attention_inputs(model, images)[1])
    assert maps.shape == (2, 2, 2, 2)
    assert torch.equal(maps[:, :, 1, 0], attention[:, :, 0, 2 + 2])  # second row, first column: patch 2 of 4
    torch.testing.assert_close(maps.sum((-2, -1)) + attention[:, :, 0, :2].sum(-1), torch.ones(2, 2).double())


def test_attention_distances_of_a_network_by_pieces(monkeypatch):
    model, images = build(STUDENT, torch.float64), images_of(5, torch.float64)
    expected = [attention_distance(attention_probabilities(inputs), (2, 2), (8, 8))
                for inputs in attention_inputs(model, images)]
    monkeypatch.setattr(inspection, 'IMAGES_AT_A_TIME', 2)
    found = attention_distances(model, images)
    np.testing.assert_allclose(found, torch.stack(expected).numpy(), rtol=1e-12)
    assert found.shape == (2, 2) and 0 < found.min() < found.max() < 8 * 2 ** 0.5


def test_networks_without_such_attention():
    with pytest.raises(UserError, match='ResNet has no blocks with the attention'):
        attention_inputs(timm.create_model('resnet18'), images_of(1))
    with pytest.raises(UserError, match='VisionTransformerDistilled has no codes'):
        code_usage(build(TEACHER), images_of(1))


# --- queries and keys -------------------------------------------------------------------------------------------------


def test_qk_distributions():
    model, images = build(STUDENT), images_of(4)
    rows = qk_distributions(model, images, [1], [0])
    assert len(rows) == 2 and [list(row) for row in rows] == [['before IRM', 'after IRM', 'codes']] * 2
    keys = attention_inputs(model, images)[1].k
    codes = keys.codes[:, 0].flatten().tolist()
    assert rows[1]['codes'].heights.tolist() == pytest.approx([codes.count(code) / len(codes) for code in range(-8, 8)])
    assert rows[1]['before IRM'].positions[[0, -1]] == pytest.approx(
        [keys.projected[:, 0].min().item(), keys.projected[:, 0].max().item()])
    # IRM rectifies to zero mean and unit deviation for each head and token.
    centres = (rows[0]['after IRM'].positions[1:] + rows[0]['after IRM'].positions[:-1]) / 2
    density = rows[0]['after IRM'].heights / rows[0]['after IRM'].heights.sum()
    assert (density * centres).sum() == pytest.approx(0, abs=0.05)
    assert (density * centres ** 2).sum() == pytest.approx(1, abs=0.05)

    assert list(qk_distributions(build(TEACHER), images, [0], [0, 1])[0]) == ['full precision']
    assert list(qk_distributions(build(STUDENT, irm=False), images, [0], [0])[0]) == ['before quantization', 'codes']
    assert list(qk_distributions(build(STUDENT, quantize_attn=False), images, [0], [0])[0]) == ['before IRM',
                                                                                               'after IRM']


def test_rows_of_student_and_teacher():
    networks, images = {'teacher': build(TEACHER), '4 bits': build(STUDENT)}, images_of(2)
    rows = compare_qk(networks, images, [-1, 1], None)  # the same block twice, drawn once
    assert list(rows) == ['q, block 1', 'k, block 1']
    assert list(rows['k, block 1']) == ['teacher: full precision', 'before IRM', 'after IRM', 'codes']
    expected = qk_distributions(networks['4 bits'], images, [1], [0, 1])[1]
    assert (rows['k, block 1']['codes'].heights == expected['codes'].heights).all()
    with pytest.raises(UserError, match='--heads 2: there are 2, from 0 to 1'):
        compare_qk(networks, images, [0], [2])


# --- logs -------------------------------------------------------------------------------------------------------------


def test_read_log(tmp_path):
    (tmp_path / 'log.txt').write_text(''.join(json.dumps(
        {'epoch': epoch, 'train_loss': 2 / (epoch + 1), **({'teacher_acc1': 90.} if epoch == 0 else {})}) + '\n'
        for epoch in range(4)))
    log = read_log(tmp_path)
    assert log['epoch'].tolist() == [0, 1, 2, 3] and log['train_loss'].tolist() == [2, 1, 2 / 3, 0.5]
    assert log['teacher_acc1'][0] == 90 and np.isnan(log['teacher_acc1'][1:]).all()
    for text, line in (('', 'has no epochs yet'), ('{"epoch": 0}\n{"ep', 'line 2 is no record'),
                       ('[1]\n', 'line 1 is no record'), ('{"loss": 1}\n', 'line 1 is no record')):
        (tmp_path / 'log.txt').write_text(text)
        with pytest.raises(UserError, match=line):
            read_log(tmp_path)


def test_runs_are_told_apart_by_their_folders(tmp_path):
    for name in ('a/run', 'b/run', 'other'):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / 'log.txt').write_text('{"epoch": 0}\n')
    assert list(read_logs([tmp_path / 'a/run', tmp_path / 'other/log.txt'])) == ['run', 'other']
    same = [tmp_path / 'a/run', tmp_path / 'b/run', tmp_path / 'a/run']
    assert list(read_logs(same)) == [str(tmp_path / 'a/run'), str(tmp_path / 'b/run')]


def test_logs_of_any_kind(tmp_path):
    for text in ('{"epoch": "0"}\n', '{"epoch": 1e400}\n', '{"epoch": ' + '9' * 5000 + '}\n', '[' * 10 ** 5,
                 '{"epoch": null}\n', '{"epoch": -1}\n'):
        (tmp_path / 'log.txt').write_text(text)
        with pytest.raises(UserError, match='line 1 is no record'):
            read_log(tmp_path)
    (tmp_path / 'log.txt').write_text('{"epoch": 0, "a": 1, "b": "x", "c": [1], "d": 1' + '0' * 400 + ', "e": NaN}\n')
    log = read_log(tmp_path)
    assert set(log) == {'a', 'e', 'epoch'}
    (tmp_path / 'log.txt').write_bytes(b'\xff')
    with pytest.raises(UserError, match='no text'):
        read_log(tmp_path)
    (tmp_path / 'log.txt').unlink()
    os.mkfifo(tmp_path / 'log.txt')
    with pytest.raises(UserError, match='not a regular file'):
        read_log(tmp_path)
