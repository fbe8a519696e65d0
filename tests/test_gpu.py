"""What a run on a GPU does, without one: training steps and all else that is computed there, on fake tensors.

docs/gpu.md says what this proves and what it does not.
"""
import numpy as np
import pytest
import timm
import torch
from fake_gpu import GPU, Watch, backward, fake_gpu, moved
from timm.utils import ModelEmaV3
from torch import Tensor, nn

import engine
import models  # noqa: F401  registers the aliases
import quant_vision_transformer  # noqa: F401  registers the variants
from _quan_base import named_quantizers
from analysis.codes import code_statistics
from calibration.closed_form import calibrate_to_full_precision
from calibration.first_batch import calibrate
from deployment.integer import IntegerViT
from losses import Distillation, SoftLabels
from training import networks
from training.data import Mixing
from training.optimizer import OptimizerConfig
from training.schedule import ScheduleConfig
from training.state import Training, build_training

SHAPE = {'img_size': 32, 'embed_dim': 48, 'depth': 1, 'num_heads': 3, 'num_classes': 10}
DISTILLED, VIT = 'fourbits_deit_tiny_patch16_224', 'twobits_vit_tiny_patch16_224'
TEACHER = 'deit_tiny_distilled_patch16_224'
DTYPES = {'none': torch.float32, 'bf16': torch.bfloat16, 'fp16': torch.float16}
LOSSES = {'labels': Distillation(), 'soft': Distillation('soft'), 'hard': Distillation('hard'),
          'both, DGD and tokens': Distillation('both', dgd_weight=1., token_weight=1.),
          'hard and DGD': Distillation('hard', dgd_weight=1.)}

pytestmark = pytest.mark.skipif(tuple(map(int, torch.__version__.split('.')[:2])) < (2, 10),
                                  reason='older PyTorch asks the driver of a GPU where tensors are fake, and aborts')


def network(name: str, **changes) -> nn.Module:
    """A network with scales, still on the CPU."""
    torch.manual_seed(0)
    model = timm.create_model(name, **SHAPE | changes)
    if hasattr(model, 'quant'):
        calibrate(model, torch.randn(2, 3, 32, 32))
    else:
        model.set_distilled_training(True)
    return model


def started(student: nn.Module, teacher: nn.Module | None, loss: Distillation, amp: str,
            ema: ModelEmaV3 | None = None) -> tuple[Training, nn.Module]:
    """(training, criterion) on the fake GPU; the loss is not scaled, because reading the scale needs a value."""
    criterion = networks.build_criterion(student, teacher, loss, Mixing(), stored_labels=teacher is None)
    training = build_training(moved(student), GPU, OptimizerConfig('fusedlamb', weight_decay=0.),
                              ScheduleConfig(epochs=1, warmup_epochs=0))
    if ema is not None:
        moved(ema.module)
        training.ema = ema
    training.scaler = torch.amp.GradScaler('cuda', enabled=False)
    return training, criterion


def step(training: Training, criterion: nn.Module, amp: str, images: Tensor, labels: Tensor | SoftLabels) -> None:
    """A training step as `engine.train_one_epoch` makes it."""
    training.model.train()
    parts = engine._losses(training.model, training, criterion, images, labels, amp)
    assert all(part.device == GPU and part.ndim == 0 for part in parts.values())
    backward(parts.pop('loss').grad_fn, torch.ones((), device=GPU))
    for name, parameter in training.model.named_parameters():
        assert parameter.grad is not None and parameter.grad.device == GPU, name
        assert parameter.grad.dtype == parameter.dtype == torch.float32, name
    training.update(clip_grad=1., share_of_epoch=0.5)


def batch(count: int = 4, size: int = 32) -> tuple[Tensor, Tensor]:
    return torch.empty(count, 3, size, size, device=GPU), torch.zeros(count, dtype=torch.long, device=GPU)


def quiet(watch: Watch) -> bool:
    """Whether the host neither waits for the GPU nor computes with it."""
    return not watch.reads and not watch.uploads


# --- the training step ------------------------------------------------------------------------------------------------

CASES = [(DISTILLED, loss, 'none' if loss == 'hard' else 'bf16', {}) for loss in LOSSES] + [
    (VIT, 'hard and DGD', 'fp16', {'reg_tokens': 2, 'init_values': 0.1}),
    (VIT, 'both, DGD and tokens', 'bf16', {'global_pool': 'avg', 'class_token': False}),
    (DISTILLED, 'hard and DGD', 'bf16', {'irm': False, 'act_granularity': 'tensor'}),
    (DISTILLED, 'hard', 'bf16', {'quantize_attn': False}), (TEACHER, 'hard', 'bf16', {})]


@pytest.mark.parametrize(('name', 'loss', 'amp', 'changes'), CASES, ids=lambda value: str(value) or 'default')
def test_a_training_step_stays_on_the_gpu(name, loss, amp, changes):
    """Student, teacher, losses, backward, clipping, LAMB, clamp and average: no read, and every tensor in its place."""
    student, teacher = network(name, **changes), network(TEACHER)
    ema = ModelEmaV3(student)
    with fake_gpu(), Watch() as watch:
        training, criterion = started(student, moved(teacher), LOSSES[loss], amp, ema)
        images, labels = batch()
        watch.uploads.clear()
        with engine.autocast(GPU, amp):
            outputs = training.model(images)
        assert all(each.dtype == DTYPES[amp] for each in ([outputs] if isinstance(outputs, Tensor) else outputs))
        step(training, criterion, amp, images, labels)
        assert quiet(watch), (watch.reads, watch.uploads)
        state = [value for each in training.optimizer.state.values() for value in each.values()
                 if isinstance(value, Tensor) and value.ndim]
        assert state and all(value.device == GPU and value.dtype == torch.float32 for value in state)
        assert all(parameter.device == GPU for parameter in training.ema.module.parameters())


def test_what_reads_a_value_is_noticed():
    with fake_gpu(), Watch(answer=2.) as watch:
        x = torch.ones(3, device=GPU)
        assert float(x.sum()) == 2. and bool((x > 0).all())
        x.cpu()
        assert len(watch.reads) == 3 and not watch.uploads
        torch.zeros(3).to(GPU)
        assert len(watch.uploads) == 1
        with pytest.raises(RuntimeError, match='device'):
            x + torch.zeros(3)
    with fake_gpu(), Watch(), pytest.raises(torch._subclasses.fake_tensor.DataDependentOutputException):
        torch.ones(3, device=GPU).sum().item()


def test_the_backward_of_fake_tensors_is_that_of_pytorch():
    """On real tensors of the CPU, where PyTorch's engine gives the expected gradients."""
    student = network(DISTILLED)
    criterion = networks.build_criterion(student, network(TEACHER), LOSSES['hard and DGD'], Mixing())
    training = build_training(student, torch.device('cpu'), OptimizerConfig('sgd'),
                              ScheduleConfig(epochs=1, warmup_epochs=0))
    found = []
    for amp in ('none', 'bf16'):
        for by_hand in (False, True):
            loss = engine._losses(student.eval(), training, criterion, torch.ones(2, 3, 32, 32),
                                  torch.tensor([0, 1]), amp)['loss']
            if by_hand:
                backward(loss.grad_fn, torch.ones(()))
            else:
                loss.backward()
            found.append([parameter.grad for parameter in student.parameters()])
            student.zero_grad()
    for expected, got in (found[:2], found[2:]):
        torch.testing.assert_close(got, expected)


def test_stored_labels_take_the_place_of_a_teacher():
    student = network(DISTILLED)
    with fake_gpu(), Watch() as watch:
        training, criterion = started(student, None, Distillation('soft'), 'bf16')
        images, labels = batch()
        watch.uploads.clear()
        answers = SoftLabels(labels, torch.zeros(4, 3, dtype=torch.int16, device=GPU),
                             torch.empty(4, 3, dtype=torch.float16, device=GPU))
        step(training, criterion, 'bf16', images, answers)
        assert quiet(watch), (watch.reads, watch.uploads)


# --- memory -----------------------------------------------------------------------------------------------------------


def peak(name: str, loss: str, amp: str) -> int:
    """Bytes at the peak of a step of 16 images of 197 or 198 tokens, with the networks."""
    size = {'img_size': 224, 'embed_dim': 192, 'depth': 2}
    student, teacher = timm.create_model(name, **SHAPE | size), network(TEACHER, **size)
    if name == TEACHER:
        student.set_distilled_training(True)
    for _, quantizer in named_quantizers(student):
        quantizer.calibrated, quantizer.signed_codes = True, True
    with fake_gpu():
        training, criterion = started(student, moved(teacher), LOSSES[loss], amp)
        images, labels = batch(16, 224)
        with Watch() as watch:
            watch.count(*student.parameters(), *student.buffers(), *teacher.parameters(), images)
            step(training, criterion, amp, images, labels)
            return watch.peak


@pytest.mark.slow
def test_the_memory_of_a_step_is_bounded():
    """By that of full precision, whose fused attention keeps no map. Counted are the tensors, all at once."""
    full, quantized = peak(TEACHER, 'hard', 'bf16'), peak(DISTILLED, 'hard and DGD', 'bf16')
    assert full < quantized <= 2.5 * full, (full, quantized)


# --- what else runs on the device -------------------------------------------------------------------------------------


def test_evaluation_and_integer_inference_stay_on_the_gpu():
    student = network(DISTILLED).eval()
    integer = [IntegerViT(student, terms) for terms in (1, 2)]
    with fake_gpu(), Watch() as watch, torch.no_grad():
        images, _ = batch()
        for model in (student, *integer):
            assert moved(model).eval()(images).device == GPU
        assert quiet(watch), (watch.reads, watch.uploads)


@pytest.mark.slow
@pytest.mark.parametrize('calibration', [calibrate, calibrate_to_full_precision])
def test_calibration_mixes_no_devices(calibration):
    """It reads values, whatever they are: here all are 1."""
    student = timm.create_model(DISTILLED, **SHAPE)
    with fake_gpu(), Watch(answer=1.) as watch:
        calibration(moved(student), torch.empty(4, 3, 32, 32, device=GPU))
        assert watch.reads and all(parameter.device == GPU for parameter in student.parameters())


@pytest.mark.slow
def test_diagnostics_mix_no_devices(monkeypatch):
    student = network(DISTILLED)
    monkeypatch.setattr(Tensor, 'numpy', lambda self, **_: np.ones(self.shape))
    monkeypatch.setattr(torch, 'bincount', lambda codes, minlength: codes.new_zeros(minlength))
    with fake_gpu(), Watch(answer=1.) as watch:
        found = code_statistics(moved(student), torch.empty(4, 3, 32, 32, device=GPU))
        assert watch.reads and set(found) == {name for name, _ in named_quantizers(student)}
