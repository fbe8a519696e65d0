"""losses.py against plain N x N Gram matrices, DeiT's formulas, and the inputs that break naive versions."""

import gc
import weakref

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import losses
from losses import (
    Distillation,
    DistillationLoss,
    check_dgd_compatible,
    distribution_guided_distillation,
    token_distance,
)
from models import BlockOutputs, Teacher
from utils import UserError

DISTILLED, PLAIN = 'deit_tiny_distilled_patch16_224', 'deit_tiny_patch16_224'


def tiny(name=DISTILLED, **changes):
    return timm.create_model(name, **{'img_size': 32, 'embed_dim': 48, 'depth': 2, 'num_heads': 3, 'num_classes': 10}
                             | changes)


def random_qk(layers=2, batch=3, heads=2, tokens=11, dim=4, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    def draw():
        return torch.randn(batch, heads, tokens, dim, dtype=torch.float64, generator=generator).to(dtype)
    return [(draw(), draw()) for _ in range(layers)]


def require_grad(qk):
    return [tuple(x.clone().requires_grad_() for x in pair) for pair in qk]


def reference_dgd(student_qk, teacher_qk, which):
    """The paper's formula with its N x N matrices."""
    def gram(x):
        g = x @ x.mT
        return g / g.norm(dim=(-2, -1), keepdim=True)

    per_image = sum((gram(t[which]) - gram(s[which])).norm(dim=(-2, -1)).sum(dim=1)
                    for s, t in zip(student_qk, teacher_qk, strict=True))
    return per_image.mean()


def blocks(qk):
    return [BlockOutputs(None, *pair) for pair in qk]


def criterion(teacher, kind='none', alpha=0.5, tau=1., dgd_weight=0., token_weight=0.):
    """The loss with cross-entropy as its base."""
    return DistillationLoss(nn.CrossEntropyLoss(), teacher, Distillation(kind, alpha, tau, dgd_weight, token_weight))


def gradients(loss, qk):
    return torch.autograd.grad(loss, [x for pair in qk for x in pair])


@pytest.mark.parametrize('student_dim, teacher_dim, noise', [(4, 4, None), (4, 6, None), (6, 4, None), (4, 4, 1e-2)])
def test_dgd_is_the_n_by_n_formula(student_dim, teacher_dim, noise):
    teacher = random_qk(dim=teacher_dim, seed=1)
    student = random_qk(dim=student_dim)
    if noise is not None:  # close to the teacher, at another scale
        student = [tuple(3 * (t + noise * s) for s, t in zip(*pair, strict=True))
                   for pair in zip(student, teacher, strict=True)]
    student = require_grad(student)
    loss_q, loss_k = distribution_guided_distillation(student, teacher, 2, 2)
    expected_q, expected_k = (reference_dgd(student, teacher, which) for which in (0, 1))
    torch.testing.assert_close(loss_q, expected_q, rtol=1e-10, atol=0)
    torch.testing.assert_close(loss_k, expected_k, rtol=1e-10, atol=0)
    for got, expected in zip(gradients(loss_q + 2 * loss_k, student), gradients(expected_q + 2 * expected_k, student),
                             strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-10 * expected.abs().max().item())


def test_dgd_lets_go_of_the_teacher_layer_by_layer(monkeypatch):
    class Layers:
        return_qk, num_prefix_tokens = True, 2

        def __call__(self, images):
            qk = random_qk(layers=4, seed=1)
            self.alive = [weakref.ref(q) for q, _ in qk]
            return torch.randn(2, 5), blocks(qk)

    teacher, alive, distance = Layers(), [], losses.gram_distance
    monkeypatch.setattr(losses, 'gram_distance', lambda *pair: alive.append(
        sum(ref() is not None for ref in teacher.alive)) or distance(*pair))
    criterion(teacher, dgd_weight=1.)(torch.zeros(2, 3, 8, 8), torch.randn(2, 5), torch.tensor([0, 1]),
                                      blocks(random_qk(layers=4)))
    assert alive == [4, 4, 3, 3, 2, 2, 1, 1]  # q and k of four layers


def test_dgd_compares_patch_tokens_only_when_prefix_counts_differ():
    student, teacher = random_qk(tokens=11), random_qk(tokens=10, seed=1)
    patches = [[tuple(x[:, :, prefix:] for x in pair) for pair in qk] for qk, prefix in ((student, 2), (teacher, 1))]
    for which, loss in enumerate(distribution_guided_distillation(student, teacher, 2, 1)):
        torch.testing.assert_close(loss, reference_dgd(*patches, which))
    same_prefix = distribution_guided_distillation(student, student[::-1], 2, 2)[0]
    torch.testing.assert_close(same_prefix, reference_dgd(student, student[::-1], 0))


def test_dgd_is_accurate_in_float32_near_the_teacher():
    # The distances here are near 1e-4, where sqrt(2 - 2 cos) in float32 is off by its own size.
    teacher = random_qk(tokens=50, dim=16, seed=1, dtype=torch.float32)
    student = require_grad([tuple(t + 1e-4 * s.float() for s, t in zip(*pair, strict=True))
                            for pair in zip(random_qk(tokens=50, dim=16), teacher, strict=True)])
    exact = require_grad([tuple(x.detach().double() for x in pair) for pair in student])
    expected = reference_dgd(exact, [tuple(x.double() for x in pair) for pair in teacher], 0)
    loss, _ = distribution_guided_distillation(student, teacher, 2, 2)
    assert expected < 1e-3
    torch.testing.assert_close(loss.double(), expected, rtol=1e-3, atol=0)
    got = torch.autograd.grad(loss, [q for q, _ in student])
    for ours, theirs in zip(got, torch.autograd.grad(expected, [q for q, _ in exact]), strict=True):
        assert (ours - theirs).norm() < 1e-2 * theirs.norm()


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize('case', ['equal', 'zero student', 'zero teacher', 'both zero'])
def test_dgd_stays_finite_at_the_singular_points(case, dtype):
    teacher = random_qk(dtype=dtype)
    zeros = [tuple(torch.zeros_like(x) for x in pair) for pair in teacher]
    student = require_grad(zeros if case in ('zero student', 'both zero') else teacher)
    teacher = zeros if case in ('zero teacher', 'both zero') else teacher
    expected = 4. if case in ('zero student', 'zero teacher') else 0.  # 2 layers x 2 heads at distance 1, or at 0
    with torch.autocast('cpu', dtype=torch.bfloat16):
        loss_q, loss_k = distribution_guided_distillation(student, teacher, 2, 2)
    assert loss_q.item() == loss_k.item() == expected
    assert loss_q.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    for gradient in gradients(loss_q + loss_k, student):
        assert gradient.dtype == dtype and torch.count_nonzero(gradient) == 0


def test_dgd_of_a_rotated_teacher_is_rounding_noise_not_nan():
    # The same Gram matrices from other columns: the one case in which 1 - cos cancels, and may round below 0.
    teacher = random_qk(batch=32, dtype=torch.float32)
    rotation = torch.linalg.qr(torch.randn(4, 4, generator=torch.Generator().manual_seed(0)))[0]
    student = require_grad([tuple(x @ rotation for x in pair) for pair in teacher])
    loss_q, loss_k = distribution_guided_distillation(student, teacher, 2, 2)
    assert 0 <= loss_q < 1e-2 and 0 <= loss_k < 1e-2
    assert all(gradient.isfinite().all() for gradient in gradients(loss_q + loss_k, student))


def test_dgd_does_not_hide_a_nan():
    student = random_qk()
    student[0][0][0, 0, 0, 0] = torch.nan
    loss_q, loss_k = distribution_guided_distillation(student, random_qk(seed=1), 2, 2)
    assert loss_q.isnan() and loss_k.isfinite()


def test_dgd_ignores_autocast_in_both_passes():
    teacher = random_qk(dtype=torch.float32, seed=1)
    results = []
    for enabled in (False, True):
        student = require_grad(random_qk(dtype=torch.float32))
        with torch.autocast('cpu', dtype=torch.bfloat16, enabled=enabled):
            loss = sum(distribution_guided_distillation(student, teacher, 2, 2))
            results.append((loss, *gradients(loss, student)))
    for plain, autocast in zip(*results, strict=True):
        assert torch.equal(plain, autocast)


@pytest.mark.parametrize('qk_norm', [False, True])
def test_teacher_returns_what_the_attention_multiplies(qk_norm, monkeypatch):
    model = tiny('vit_tiny_patch16_224', qk_norm=qk_norm)
    multiplied = []
    attend = F.scaled_dot_product_attention
    def spy(q, k, v, **kwargs):
        multiplied.append((q.clone(), k.clone()))
        return attend(q, k, v, **kwargs)
    monkeypatch.setattr(F, 'scaled_dot_product_attention', spy)
    images = torch.randn(2, 3, 32, 32)
    teacher = Teacher(model.train(), return_qk=True)
    for _ in range(2):  # nothing is left over from one call to the next
        multiplied.clear()
        logits, found = teacher(images)
        assert len(found) == len(multiplied) == 2
        for ours, theirs in zip(found, multiplied, strict=True):
            assert ours.q.shape == (2, 3, 5, 16) and ours.tokens is None  # (B, heads, 4 patches + class token, d)
            assert torch.equal(ours.q, theirs[0]) and torch.equal(ours.k, theirs[1])
    assert not model.training and not any(p.requires_grad for p in model.parameters())
    assert not logits.requires_grad and not logits.is_inference() and not found[0].q.is_inference()
    with torch.autocast('cpu', dtype=torch.bfloat16):
        assert teacher(images)[1][0].q.dtype == torch.bfloat16


def test_teacher_keeps_nothing_and_recovers_from_a_failed_forward():
    model = tiny()
    teacher = Teacher(model, return_qk=True)
    images = torch.randn(1, 3, 32, 32)
    alive = [weakref.ref(block.q) for block in teacher(images)[1]]
    gc.collect()
    assert not any(ref() is not None for ref in alive)
    broken = model.blocks[1].register_forward_pre_hook(lambda *_args: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        teacher(images)
    broken.remove()
    assert len(teacher(images)[1]) == 2


def test_teacher_without_qk_has_no_hooks_and_takes_any_network():
    vit = tiny()
    assert Teacher(vit, return_qk=False)(torch.randn(1, 3, 32, 32))[1] == []
    assert not any(module._forward_hooks for module in vit.modules())
    cnn = nn.Sequential(nn.Conv2d(3, 10, 4), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    assert Teacher(cnn, return_qk=False)(torch.randn(1, 3, 32, 32))[0].shape == (1, 10)
    with pytest.raises(UserError, match='Sequential.*--dgd-weight 0'):
        Teacher(cnn, return_qk=True)


def test_teacher_refuses_attention_that_bypasses_its_modules():
    model = tiny()
    model.blocks[1].attn.forward = lambda x, **_kwargs: x
    with pytest.raises(UserError, match='VisionTransformerDistilled.*--dgd-weight 0'):
        Teacher(model, return_qk=True)(torch.randn(1, 3, 32, 32))


@pytest.mark.parametrize('teacher, reason', [
    ({}, None), ({'name': PLAIN}, None), ({'embed_dim': 96}, None),
    ({'depth': 1}, 'the student has 2 layers, the teacher 1'),
    ({'num_heads': 6}, 'the student has [3, 3] heads by layer, the teacher [6, 6]: these must be equal'),
    ({'img_size': 48}, 'the student has 4 patch tokens, the teacher 9'),
])
def test_check_dgd_compatible(teacher, reason):
    assert check_dgd_compatible(tiny(), tiny(**teacher)) == reason


def test_check_dgd_compatible_names_what_has_no_attention():
    assert check_dgd_compatible(tiny(), nn.Linear(2, 2)) == 'teacher Linear has no blocks with timm attention'
    assert check_dgd_compatible(nn.Linear(2, 2), tiny()) == 'student Linear has no blocks with multi-head attention'


class FixedTeacher:
    """Stands in for a Teacher: known logits, q and k, and a count of its calls."""

    num_prefix_tokens, return_qk, return_tokens = 2, True, True

    def __init__(self, logits, qk=()):
        self.logits, self.qk, self.calls = logits, list(qk), 0

    def __call__(self, images):
        self.calls += 1
        return self.logits, blocks(self.qk)


@pytest.fixture
def batch():
    torch.manual_seed(0)
    logits, dist, teacher = torch.randn(3, 4, 10, dtype=torch.float64)
    return {'images': torch.randn(4, 3, 32, 32), 'pair': (logits.requires_grad_(), dist.requires_grad_()),
            'teacher': teacher, 'labels': torch.tensor([1, 0, 9, 3])}


def test_without_distillation_the_teacher_never_runs(batch):
    teacher = FixedTeacher(batch['teacher'])
    loss = criterion(teacher)
    single, mean = batch['pair'][0], (batch['pair'][0] + batch['pair'][1]) / 2
    for outputs, logits in ((single, single), (batch['pair'], mean)):
        parts = loss(batch['images'], outputs, batch['labels'], student_blocks=blocks(random_qk()))
        assert set(parts) == {'loss', 'loss_cls'}
        torch.testing.assert_close(parts['loss'], F.cross_entropy(logits, batch['labels']))
    assert teacher.calls == 0


def test_hard_distillation(batch):
    loss = criterion(FixedTeacher(batch['teacher']), 'hard', 0.3)
    parts = loss(batch['images'], batch['pair'], batch['labels'])
    cls = F.cross_entropy(batch['pair'][0], batch['labels'])
    distill = F.cross_entropy(batch['pair'][1], batch['teacher'].argmax(1))
    assert set(parts) == {'loss', 'loss_cls', 'loss_distill'}
    torch.testing.assert_close(parts['loss_cls'], cls.detach())
    torch.testing.assert_close(parts['loss_distill'], distill.detach())
    torch.testing.assert_close(parts['loss'], 0.7 * cls + 0.3 * distill)
    assert parts['loss'].requires_grad and not parts['loss_cls'].requires_grad


def test_soft_distillation_has_deits_normalisation(batch):
    loss = criterion(FixedTeacher(batch['teacher']), 'soft', 0.3, 3.)
    parts = loss(batch['images'], batch['pair'], batch['labels'])
    p, q = ((x / 3).softmax(1) for x in (batch['teacher'], batch['pair'][1]))
    torch.testing.assert_close(parts['loss_distill'], (9 * (p * (p / q).log()).sum() / (4 * 10)).detach())
    torch.testing.assert_close(parts['loss'], 0.7 * F.cross_entropy(batch['pair'][0], batch['labels'])
                               + 0.3 * parts['loss_distill'])


def test_distillation_of_both_heads(batch):
    loss = criterion(FixedTeacher(batch['teacher']), 'both', 0.3, 3.)
    parts = loss(batch['images'], batch['pair'], batch['labels'])
    p = (batch['teacher'] / 3).softmax(1)
    divergences = [9 * (p * (p / (x / 3).softmax(1)).log()).sum(1).mean() for x in batch['pair']]
    torch.testing.assert_close(parts['loss_distill'], (sum(divergences) / 2).detach())
    torch.testing.assert_close(parts['loss'], 0.7 * F.cross_entropy(batch['pair'][0], batch['labels'])
                               + 0.3 * sum(divergences) / 2)


def test_token_distance_by_hand():
    theirs = [torch.tensor([[[1.], [3.], [5.]], [[2.], [3.], [5.]]])]  # a class token and two patches, two images
    theirs.append(torch.tensor([[[0.], [1.], [-1.]], [[4.], [3.], [-3.]]]))
    ours = [torch.cat([t[:, :1], t[:, :1], t[:, 1:]], 1).requires_grad_() for t in theirs]
    assert token_distance(ours, theirs, 2, 1) == 0
    moved = [ours[0] + torch.tensor([0., 1., 0., 0.])[:, None], ours[1] + torch.tensor([0., 0., 2., 0.])[:, None]]
    # Block 0: the distillation token, half of the special ones, is 1 off; the class tokens 1, 2 vary by 1/4.
    # Block 1: one of two patches is 2 off; 1, -1, 3, -3 vary by 5. Two blocks.
    found = token_distance(moved, theirs, 2, 1)
    torch.testing.assert_close(found, torch.tensor((0.5 / 0.25 + 2. / 5) / 2))
    found.backward()
    assert all(x.grad.abs().sum() > 0 for x in ours)


@pytest.mark.parametrize('prefixes', [(0, 1), (1, 0), (0, 0)])
def test_without_special_tokens_patches_count_alone(prefixes):
    patches = torch.randn(2, 2, 5, 3)
    ours, theirs = ([torch.cat([torch.randn(2, prefix, 3), tokens], 1)]
                    for prefix, tokens in zip(prefixes, patches, strict=True))
    spread = (patches[1] - patches[1].mean((0, 1))).square().mean()
    torch.testing.assert_close(token_distance(ours, theirs, *prefixes),
                               (patches[0] - patches[1]).square().mean() / spread)


def outputs_of_blocks(model, images):
    """The tokens behind each block, computed step by step."""
    x, found = model._pos_embed(model.patch_embed(images)), []
    for block in model.blocks:
        x = block(x)
        found.append(x)
    return found


def test_tokens_are_compared_block_by_block(batch):
    teacher, student = tiny(PLAIN), tiny()
    wrapped = Teacher(teacher, return_tokens=True)
    loss = criterion(wrapped, 'both', 1., token_weight=0.5)
    assert loss.needs_blocks
    images, outputs = batch['images'], tuple(logits.float() for logits in batch['pair'])
    with torch.no_grad():
        ours, theirs = outputs_of_blocks(student, images), outputs_of_blocks(teacher, images)
    parts = loss(images, outputs, batch['labels'], [BlockOutputs(tokens) for tokens in ours])
    wanted = token_distance(ours, theirs, 2, 1)
    torch.testing.assert_close(parts['loss_tokens'], wanted)
    torch.testing.assert_close(parts['loss'].detach(), parts['loss_distill'] + 0.5 * wanted)


@pytest.mark.parametrize('distillation_type', ['none', 'hard'])
def test_dgd_is_weighted_into_the_total(batch, distillation_type):
    student, teacher_qk = require_grad(random_qk(batch=4)), random_qk(batch=4, seed=1)
    teacher = FixedTeacher(batch['teacher'], teacher_qk)
    without, loss = criterion(teacher, distillation_type), criterion(teacher, distillation_type, dgd_weight=0.25)
    base = without(batch['images'], batch['pair'], batch['labels'])['loss']
    teacher.calls = 0
    parts = loss(batch['images'], batch['pair'], batch['labels'], blocks(student))
    assert teacher.calls == 1
    dgd = [reference_dgd(student, teacher_qk, which) for which in (0, 1)]
    torch.testing.assert_close(parts['loss_dgd_q'], dgd[0].detach())
    torch.testing.assert_close(parts['loss_dgd_k'], dgd[1].detach())
    torch.testing.assert_close(parts['loss'], base + 0.25 * sum(dgd))
    for got, expected in zip(gradients(parts['loss'], student), gradients(0.25 * sum(dgd), student), strict=True):
        torch.testing.assert_close(got, expected)


def test_trains_with_a_real_teacher_that_is_no_part_of_the_module():
    torch.manual_seed(0)
    teacher = Teacher(tiny(PLAIN), return_qk=True)
    loss = criterion(teacher, 'soft', 0.5, 2., 1.)
    assert not list(loss.parameters()) and not loss.state_dict()
    student_qk = require_grad(random_qk(batch=2, heads=3, tokens=6, dim=16, dtype=torch.float32))
    outputs = tuple(torch.randn(2, 10, requires_grad=True) for _ in range(2))
    loss(torch.randn(2, 3, 32, 32), outputs, torch.tensor([1, 2]), blocks(student_qk))['loss'].backward()
    for x in (*outputs, *(x for pair in student_qk for x in pair)):
        assert x.grad.isfinite().all() and x.grad.abs().sum() > 0
    assert all(p.grad is None for p in teacher.model.parameters())


@pytest.mark.parametrize('changes, message', [
    ({'kind': 'medium'}, '--distillation-type medium'), ({'alpha': 1.5}, '--distillation-alpha 1.5'),
    ({'tau': 0.}, '--distillation-tau 0.0'), ({'dgd_weight': -1.}, '--dgd-weight -1.0'),
    ({'token_weight': -1.}, '--token-weight -1.0'), ({'teacher': None}, 'needs a teacher'),
    ({'teacher': None, 'kind': 'none', 'dgd_weight': 1.}, 'needs a teacher'),
    ({'teacher': None, 'kind': 'none', 'token_weight': 1.}, 'needs a teacher'),
])
def test_mistakes_are_named(changes, message):
    good = {'teacher': FixedTeacher(None), 'kind': 'hard'}
    criterion(**good)
    with pytest.raises(UserError, match=message) as caught:
        criterion(**good | changes)
    assert '\n' not in str(caught.value)


@pytest.mark.parametrize('kind', ['hard', 'soft', 'both'])
def test_a_single_head_learns_from_labels_and_teacher(batch, kind):
    """As two heads would that agree."""
    loss, single = criterion(FixedTeacher(batch['teacher']), kind, 0.3, 2.), batch['pair'][0]
    found = loss(batch['images'], single, batch['labels'])
    wanted = loss(batch['images'], (single, single), batch['labels'])
    for name, value in wanted.items():
        torch.testing.assert_close(found[name], value)
    gradient, = torch.autograd.grad(found['loss'], single)
    torch.testing.assert_close(gradient, torch.autograd.grad(wanted['loss'], single)[0])
    if kind == 'hard':
        torch.testing.assert_close(found['loss'], 0.7 * F.cross_entropy(single, batch['labels'])
                                   + 0.3 * F.cross_entropy(single, batch['teacher'].argmax(1)))


def test_distillation_refuses_other_classes(batch):
    loss = criterion(FixedTeacher(batch['teacher'][:, :7]), 'hard')
    with pytest.raises(UserError, match='teacher has 7 classes, the student 10'):
        loss(batch['images'], batch['pair'], batch['labels'])


def test_no_n_by_n_matrix_is_built(monkeypatch):
    shapes = []
    class Recorder(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **kwargs or {})
            shapes.extend(x.shape for x in (out if isinstance(out, (tuple, list)) else [out]) if torch.is_tensor(x))
            assert func is not torch.ops.aten._local_scalar_dense.default, 'a value was read to the host'
            return out
    student = require_grad(random_qk(tokens=37))
    with Recorder():
        loss = sum(distribution_guided_distillation(student, random_qk(tokens=37, seed=1), 2, 2))
        loss.backward()
    assert shapes and not any(shape[-2:] == (37, 37) for shape in shapes)
