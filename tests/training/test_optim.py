"""The optimizer: the update of LAMB to the last digit, who decays, and which library is used."""

import sys
from types import ModuleType, SimpleNamespace

import pytest
import timm
import timm.scheduler
import torch
from torch import nn

import quant_vision_transformer  # noqa: F401  registers the variants
from training import optimizer as optim
from training.optimizer import OptimizerConfig, build_optimizer, check_optimizer
from utils import UserError

# Before 1.0.12 timm's Lamb kept the norm of the gradient in float32, whatever the parameters.
LAMB_RTOL = 1e-10 if hasattr(timm.optim, 'list_optimizers') else 1e-6


def config(**changes) -> OptimizerConfig:
    return OptimizerConfig(**{'opt': 'fusedlamb', 'lr': 0.01, 'weight_decay': 0., 'opt_eps': 1e-8} | changes)


@pytest.fixture(autouse=True)
def forget_the_announcement():
    optim._announce_timm_lamb.cache_clear()


@pytest.fixture
def without_apex(monkeypatch):
    monkeypatch.setitem(sys.modules, 'apex', None)
    monkeypatch.setitem(sys.modules, 'apex.optimizers', None)


class Quantized(nn.Module):
    """The kinds of parameters that a quantized transformer has."""

    def __init__(self):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        def draw(*shape):
            return nn.Parameter(torch.randn(*shape, dtype=torch.float64, generator=generator))
        self.pos_embed, self.cls_token, self.dist_token = draw(1, 5, 4), draw(1, 1, 4), draw(1, 1, 4)
        self.weight, self.bias = draw(6, 4), draw(6)
        self.zero_weight = nn.Parameter(torch.zeros(3, 4, dtype=torch.float64))
        self.alpha, self.zero_point, self.scalar_alpha = draw(6), draw(6), draw(1)
        self.frozen = draw(2, 2).requires_grad_(False)

    def no_weight_decay(self):
        return {'pos_embed', 'cls_token', 'dist_token'}


class _OnGPU(nn.Module):
    """Claims that its parameters are on a GPU, and has them on the CPU."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model, self.no_weight_decay = model, model.no_weight_decay

    def parameters(self, recurse: bool = True):
        yield SimpleNamespace(device=torch.device('cuda'))
        yield from super().parameters(recurse)


def on_gpu(model: nn.Module) -> nn.Module:
    return _OnGPU(model)


def lamb_reference(params, grads_by_step, lr, eps, weight_decay, decayed, betas=(0.9, 0.999)):
    """LAMB as apex's FusedLAMB computes it by default: adam_w_mode, grad averaging, no NVLAMB."""
    params = {name: p.clone() for name, p in params.items()}
    mean = {name: torch.zeros_like(p) for name, p in params.items()}
    square = {name: torch.zeros_like(p) for name, p in params.items()}
    for step, grads in enumerate(grads_by_step, start=1):
        norm = sum(g.square().sum() for g in grads.values()).sqrt()
        for name, p in params.items():
            g = grads[name] / max(norm.item(), 1.0)
            mean[name] = betas[0] * mean[name] + (1 - betas[0]) * g
            square[name] = betas[1] * square[name] + (1 - betas[1]) * g * g
            m_hat, v_hat = mean[name] / (1 - betas[0] ** step), square[name] / (1 - betas[1] ** step)
            update = m_hat / (v_hat.sqrt() + eps)
            if name in decayed and weight_decay > 0:
                update = update + weight_decay * p
                ratio = p.norm() / update.norm() if p.norm() > 0 and update.norm() > 0 else 1.0
                update = ratio * update
            params[name] = p - lr * update
    return params


@pytest.mark.parametrize('weight_decay', [0., 0.05])
@pytest.mark.parametrize('eps', [1e-8, 1e-3])
@pytest.mark.parametrize('gradient_scale', [1e-3, 10.], ids=['norm below 1', 'norm above 1'])
def test_fusedlamb_makes_the_update_of_lamb(weight_decay, eps, gradient_scale, without_apex):
    model = Quantized()
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    generator = torch.Generator().manual_seed(1)
    steps = [{name: gradient_scale * torch.randn(p.shape, dtype=p.dtype, generator=generator)
              for name, p in trained.items()} for _ in range(5)]
    for grads in steps:
        assert (sum(g.square().sum() for g in grads.values()).sqrt() > 1) == (gradient_scale > 1)
    start = {name: p.detach().clone() for name, p in trained.items()}
    expected = lamb_reference(start, steps, 0.01, eps, weight_decay, {'weight', 'zero_weight'})
    optimizer = build_optimizer(config(weight_decay=weight_decay, opt_eps=eps), model)
    for grads in steps:
        for name, p in trained.items():
            p.grad = grads[name].clone()
        optimizer.step()
    for name, p in trained.items():
        assert not torch.equal(p, start[name])
        torch.testing.assert_close(p.detach(), expected[name], rtol=LAMB_RTOL, atol=LAMB_RTOL)
    assert torch.equal(model.frozen, Quantized().frozen)


@pytest.mark.parametrize('opt', ['fusedlamb', 'adamw', 'sgd', 'lamb'])
def test_only_matrices_decay(opt, without_apex):
    model = Quantized()
    optimizer = build_optimizer(config(opt=opt, weight_decay=0.05), model)
    decay = {id(p): group['weight_decay'] for group in optimizer.param_groups for p in group['params']}
    names = {name: decay[id(p)] for name, p in model.named_parameters() if p.requires_grad}
    assert {name for name, value in names.items() if value == 0.05} == {'weight', 'zero_weight'}
    assert all(value in (0, 0.05) for value in names.values())


def test_timm_deit_keeps_its_tokens_from_decay(without_apex):
    model = timm.create_model('deit_tiny_distilled_patch16_224', img_size=32, embed_dim=48, depth=1, num_heads=3)
    optimizer = build_optimizer(config(weight_decay=0.05), model)
    decayed = {id(p) for group in optimizer.param_groups if group['weight_decay'] for p in group['params']}
    assert not decayed & {id(model.pos_embed), id(model.cls_token), id(model.dist_token)}
    assert decayed == {id(m.weight) for m in model.modules() if isinstance(m, (nn.Linear, nn.Conv2d))}


def test_flags_reach_the_optimizer():
    adamw = build_optimizer(config(opt='adamw', lr=0.3, opt_eps=1e-5, opt_betas=[0.8, 0.9]), Quantized())
    assert isinstance(adamw, torch.optim.AdamW)
    group = adamw.param_groups[0]
    assert (group['lr'], group['eps'], tuple(group['betas'])) == (0.3, 1e-5, (0.8, 0.9))
    sgd = build_optimizer(config(opt='SGD', momentum=0.7), Quantized())
    assert isinstance(sgd, torch.optim.SGD) and sgd.param_groups[0]['momentum'] == 0.7
    assert isinstance(build_optimizer(config(opt='lookahead_adam'), Quantized()), timm.optim.Lookahead)


def test_fusedlamb_without_apex_is_timms_and_says_so_once(without_apex, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: True)
    for _ in range(2):
        optimizer = build_optimizer(config(opt_betas=[0.8, 0.99]), Quantized())
    assert isinstance(optimizer, timm.optim.Lamb)
    values = {'eps': 1e-8, 'betas': [0.8, 0.99], 'lr': 0.01, 'bias_correction': True, 'grad_averaging': True,
              'max_grad_norm': 1.0, 'always_adapt': False, 'trust_clip': False}
    assert {name: optimizer.param_groups[0][name] for name in values} == values
    printed = capsys.readouterr().out
    assert printed.count('\n') == 1 and "timm's Lamb" in printed


@pytest.fixture
def fake_apex(monkeypatch):
    class FusedLAMB(torch.optim.SGD):
        def __init__(self, params, **kwargs):
            self.kwargs = kwargs
            super().__init__(params, lr=kwargs['lr'])

    apex, optimizers = ModuleType('apex'), ModuleType('apex.optimizers')
    apex.optimizers, optimizers.FusedLAMB = optimizers, FusedLAMB
    for other in ('FusedAdam', 'FusedNovoGrad', 'FusedSGD'):
        setattr(optimizers, other, None)
    monkeypatch.setitem(sys.modules, 'amp_C', ModuleType('amp_C'))
    monkeypatch.setitem(sys.modules, 'apex', apex)
    monkeypatch.setitem(sys.modules, 'apex.optimizers', optimizers)
    return FusedLAMB


def test_fusedlamb_is_apexs_where_it_can_be_used(fake_apex, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: True)
    optimizer = build_optimizer(config(weight_decay=0.05), on_gpu(Quantized()))
    assert isinstance(optimizer, fake_apex)
    assert sorted(group['weight_decay'] for group in optimizer.param_groups) == [0., 0.05]
    assert {name: value for name, value in optimizer.kwargs.items() if name != 'weight_decay'} == {
        'lr': 0.01, 'eps': 1e-8, 'bias_correction': True, 'grad_averaging': True, 'max_grad_norm': 1.0,
        'adam_w_mode': True, 'use_nvlamb': False}
    assert capsys.readouterr().out == ''


def test_on_the_cpu_fusedlamb_is_timms_also_beside_a_gpu(fake_apex, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: True)
    assert isinstance(build_optimizer(config(), Quantized()), timm.optim.Lamb)
    assert capsys.readouterr().out.count('\n') == 1


def test_an_apex_without_its_extension_is_not_used(fake_apex, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, 'amp_C', None)
    model = on_gpu(Quantized())
    assert isinstance(build_optimizer(config(), model), timm.optim.Lamb)
    assert "using timm's Lamb" in capsys.readouterr().out


def test_the_check_of_flags_builds_nothing_of_apex_and_says_nothing(fake_apex, monkeypatch, capsys):
    monkeypatch.setattr(fake_apex, '__init__', lambda *_, **__: pytest.fail('built before the device is set'))
    check_optimizer(config())
    assert capsys.readouterr().out == ''
    with pytest.raises(UserError, match='--opt adamm'):
        check_optimizer(config(opt='adamm'))


def test_an_apex_that_does_not_work_is_reported(fake_apex, monkeypatch):
    def refuse(*_args, **_kwargs):
        raise RuntimeError('apex.optimizers.FusedLAMB requires something else\nmore')
    monkeypatch.setattr(fake_apex, '__init__', refuse)
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: True)
    with pytest.raises(UserError, match=r'--opt fusedlamb cannot be used \(apex.*requires something else\): '):
        build_optimizer(config(), on_gpu(Quantized()))


@pytest.mark.skipif(not hasattr(timm.optim, 'list_optimizers'), reason='this timm does not list its optimizers')
@pytest.mark.parametrize('opt', ['adamwx', 'my_adamw'])
def test_unknown_names_get_suggestions(opt):
    with pytest.raises(UserError, match=f'--opt {opt} .*did you mean .*adamw') as caught:
        build_optimizer(config(opt=opt), Quantized())
    assert '\n' not in str(caught.value)


@pytest.mark.parametrize('changes', [{'opt': 'qqqqqqqq'}, {'opt': 'bnbadam8bit'}, {'opt': 'adamw', 'lr': -1.}])
def test_what_cannot_be_built_is_one_line(changes, monkeypatch):
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: False)
    with pytest.raises(UserError, match=f'--opt {changes["opt"]}') as caught:
        build_optimizer(config(**changes), Quantized())
    assert '\n' not in str(caught.value)


@pytest.mark.parametrize('decay', [0., 0.1])
def test_scales_learn_at_a_rate_of_their_own(decay, without_apex):
    model = timm.create_model('fourbits_deit_tiny_patch16_224', img_size=32, embed_dim=24, depth=1, num_heads=2)
    optimizer = build_optimizer(config(weight_decay=decay, step_lr_scale=0.1), model)
    schedule = timm.scheduler.CosineLRScheduler(optimizer, 10)
    rate = {id(p): group['lr'] for group in optimizer.param_groups for p in group['params']}
    plain = build_optimizer(config(weight_decay=decay), model)
    decays = {id(p): group['weight_decay'] for group in plain.param_groups for p in group['params']}
    names = {id(p): name for name, p in model.named_parameters()}
    assert len(rate) == len(names) == sum(len(group['params']) for group in optimizer.param_groups)
    for group in optimizer.param_groups:
        for p in group['params']:
            is_scale = names[id(p)].endswith(('.alpha', '.zero_point'))
            assert group['lr'] == pytest.approx(0.001 if is_scale else 0.01), names[id(p)]
            assert group['weight_decay'] == decays[id(p)], names[id(p)]
    schedule.step(5)
    assert {round(group['lr'], 9) for group in optimizer.param_groups} == {0.005, 0.0005}
