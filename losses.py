"""Training losses: the base criterion, and distillation of a teacher's logits, attention (DGD) and tokens.

    loss = (1 - alpha) * cls + alpha * distill + dgd_weight * (dgd_q + dgd_k) + token_weight * tokens

Hard and soft distillation follow DeiT (Touvron et al., 2021, arXiv 2012.12877): the distillation head learns from the
teacher, the class head from the labels; a single head learns from both. 'both' is for a student that is to equal its
teacher, as a quantized network that starts from the teacher's own weights: all heads learn from its logits. DGD is that
of Q-ViT (Li et al., 2022, arXiv 2210.06707): for every layer and head the Gram matrices q q^T and k k^T of the
student's rectified queries and keys are pulled towards those of a full-precision teacher, each matrix divided by its
Frobenius norm. Token distillation does so with the output of every block itself, for a student of the teacher's width.
"""
from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby, islice
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models import BlockOutputs, Teacher, network_blocks, timm_attentions
from ops.gram import gram_distance
from utils import UserError

__all__ = ['DISTILLATION_TYPES', 'Distillation', 'DistillationLoss', 'SoftLabels', 'check_dgd_compatible',
           'distribution_guided_distillation', 'token_distance']

Pair = tuple[Tensor, Tensor]
DISTILLATION_TYPES = ('none', 'soft', 'hard', 'both')
SMALLEST = 2.0 ** -25  # half precision rounds what is smaller to 0


class SoftLabels(NamedTuple):
    """The labels of a batch and a teacher's answers; of an item, without the first axis.

    Attributes:
        labels: (B,)
        indices: the classes of the K largest probabilities, (B, K).
        values: these, (B, K).
    """
    labels: Tensor
    indices: Tensor
    values: Tensor

    def to(self, device: torch.device, non_blocking: bool = False) -> SoftLabels:
        return SoftLabels(*(tensor.to(device, non_blocking=non_blocking) for tensor in self))

    def probabilities(self, num_classes: int) -> Tensor:
        """(B, num_classes), with what is missing to 1 spread evenly over the classes beyond the K."""
        values = self.values.float()
        rest = (1 - values.sum(1, keepdim=True)).clamp_min(0) / max(1, num_classes - values.shape[1])
        return rest.repeat(1, num_classes).scatter_(1, self.indices.long(), values)

    def logits(self, num_classes: int) -> Tensor:
        """The teacher's logits up to a constant, which softmax takes away at any temperature: (B, num_classes)."""
        return self.probabilities(num_classes).clamp_min(SMALLEST).log()


def check_dgd_compatible(student: nn.Module, teacher: nn.Module) -> str | None:
    """None if DGD can compare the two networks, else the reason on one line. Head dims may differ."""
    teacher_attentions = timm_attentions(teacher)
    if teacher_attentions is None:
        return f'teacher {type(teacher).__name__} has no blocks with timm attention'
    theirs = [attention.num_heads for attention in teacher_attentions]
    ours = [getattr(getattr(block, 'attn', None), 'num_heads', None) for block in network_blocks(student)]
    if not ours or None in ours:
        return f'student {type(student).__name__} has no blocks with multi-head attention'
    if len(ours) != len(theirs):
        return f'the student has {len(ours)} layers, the teacher {len(theirs)}'
    if ours != theirs:
        return f'the student has {ours} heads by layer, the teacher {theirs}: these must be equal'
    windows = [[(getattr(block, 'window_size', None), getattr(block, 'shift_size', None))
                for block in network_blocks(network)] for network in (student, teacher)]
    for index, (of_student, of_teacher) in enumerate(zip(*windows, strict=True)):
        if of_student != of_teacher:
            return (f'the attention of block {index} is within windows of {of_student[0]}, shifted by {of_student[1]}, '
                    f'in the student, and of {of_teacher[0]}, shifted by {of_teacher[1]}, in the teacher')
    patches = [getattr(getattr(model, 'patch_embed', None), 'num_patches', None) for model in (student, teacher)]
    if None in patches or patches[0] != patches[1]:
        return f'the student has {patches[0]} patch tokens, the teacher {patches[1]}'
    return None


def distribution_guided_distillation(
        student_qk: Sequence[Pair], teacher_qk: Iterable[Pair], student_prefix_tokens: int, teacher_prefix_tokens: int,
) -> tuple[Tensor, Tensor]:
    """DGD of queries and of keys (Q-ViT, L_DGD): sums over layers and heads, means over the batch and its windows.

        sum over l, h of || G_T / ||G_T||_F - G_S / ||G_S||_F ||_F,   G = q q^T (then k k^T) over tokens, N x N

    Computed in float32 (float64 stays float64), also inside autocast regions. The gradient goes to the student alone.
    With unequal numbers of prefix tokens (class, distillation) both drop theirs and patch tokens alone are compared.

    Args:
        student_qk, teacher_qk: per layer (q, k), each (B, heads, N, d). B, which counts windows where attention is
            within windows, heads and the number of patch tokens must agree between the two; d may differ.

    Returns:
        (loss_q, loss_k), each 0-dim, in [0, sqrt(2) * layers * heads].
    """
    assert student_qk, 'no layers to compare'
    same_prefix = student_prefix_tokens == teacher_prefix_tokens
    skips = (0, 0) if same_prefix else (student_prefix_tokens, teacher_prefix_tokens)
    # As one batch, layers are a twelfth of a GPU's kernel launches at depth 12; one by one, they stay in a CPU's cache.
    # Layers of one shape follow one another: all of a ViT, those of a stage of a Swin transformer.
    device, totals, teacher_layers = student_qk[0][0].device.type, [], iter(teacher_qk)
    with torch.autocast(device, enabled=False):
        for _, alike in groupby(student_qk, key=lambda pair: pair[0].shape):
            layers, losses = ((pair, next(teacher_layers)) for pair in alike), ([], [])
            while group := tuple(islice(layers, 1 if device == 'cpu' else None)):
                for which, distances in enumerate(losses):
                    student, teacher = (_stack([pair[whose][which][:, :, skips[whose]:] for pair in group])
                                        for whose in (0, 1))  # (L, B, H, N, d) each, d its own
                    distances.append(gram_distance(student, teacher))
                del group, student, teacher  # before the next ones are taken
            # (L, B, H) -> (B,) -> ()
            totals.append([torch.cat(distances).sum(dim=(0, 2)).mean() for distances in losses])
    assert next(teacher_layers, None) is None, 'the teacher has more layers'
    return tuple(sum(parts[1:], parts[0]) for parts in zip(*totals, strict=True))


def _stack(layers: list[Tensor]) -> Tensor:
    return layers[0][None] if len(layers) == 1 else torch.stack(layers)


def _given_up(layers: deque[Pair]) -> Iterator[Pair]:
    """The layers, none of them kept: the gradients that DGD computes at once then take no memory beside them."""
    while layers:
        yield layers.popleft()


def token_distance(student: Sequence[Tensor], teacher: Sequence[Tensor], student_prefix_tokens: int,
                   teacher_prefix_tokens: int) -> Tensor:
    """Squared distance of the blocks' outputs, over the teacher's variance; mean over the blocks.

    Patch tokens, and special ones (each of the student's to the teacher's of that place, or its last), count alike: one
    term for either; where one of the networks has no special ones, patch tokens count alone. The gradient goes to the
    student alone.

    Args:
        student, teacher: per block (B, N, D), with as many patch tokens behind the special ones.
    """
    terms = []
    for ours, theirs in zip(student, teacher, strict=True):
        dtype = torch.promote_types(ours.dtype, torch.float32)
        ours, theirs = ours.to(dtype), theirs.detach().to(dtype)
        pairs = [(ours[:, student_prefix_tokens:], theirs[:, teacher_prefix_tokens:])]
        if student_prefix_tokens and teacher_prefix_tokens:
            places = [min(place, teacher_prefix_tokens - 1) for place in range(student_prefix_tokens)]
            pairs += [(ours[:, :student_prefix_tokens], torch.stack([theirs[:, place] for place in places], 1))]
        for a, b in pairs:
            spread = (b - b.mean((0, 1))).square().mean().clamp_min(torch.finfo(b.dtype).tiny)
            terms.append((a - b).square().mean() / spread)
    return torch.stack(terms).sum() / len(student)


@dataclass(frozen=True)
class Distillation:
    """What is learned from a teacher, and how much each part counts.

    Attributes:
        distillation_type: 'none'; 'soft', T^2-scaled KL divergence to the teacher's logits; 'hard', cross-entropy with
            the teacher's decision as the label, each of the last head; 'both', T^2-scaled KL divergence of an image,
            mean over the heads (soft divides by the number of classes as well, which leaves it next to no weight).
        distillation_alpha: share of distillation, in [0, 1]; not used with 'none'.
        distillation_tau: temperature T.
        dgd_weight: weight of DGD; 0 leaves it out at no cost.
        token_weight: weight of token distillation; 0 leaves it out.

    Raises:
        UserError: a value out of range.
    """
    distillation_type: str = 'none'
    distillation_alpha: float = 0.5
    distillation_tau: float = 1.
    dgd_weight: float = 0.
    token_weight: float = 0.

    def __post_init__(self) -> None:
        if self.distillation_type not in DISTILLATION_TYPES:
            raise UserError(f'--distillation-type {self.distillation_type} is unknown: choose none, soft, hard or both')
        if not 0 <= self.distillation_alpha <= 1:
            raise UserError(f'--distillation-alpha {self.distillation_alpha} is not a share: choose a value from 0 '
                            'to 1')
        if not self.distillation_tau > 0:
            raise UserError(f'--distillation-tau {self.distillation_tau} is no temperature: choose a value above 0')
        if not self.dgd_weight >= 0:
            raise UserError(f'--dgd-weight {self.dgd_weight} is negative: choose 0 (off) or a value above')
        if not self.token_weight >= 0:
            raise UserError(f'--token-weight {self.token_weight} is negative: choose 0 (off) or a value above')

    @property
    def compares_blocks(self) -> bool:
        """Whether what happens inside the two networks is compared."""
        return self.dgd_weight > 0 or self.token_weight > 0


class DistillationLoss(nn.Module):
    """The training loss by parts. Nothing in it reads a value back to the host.

    Args:
        base_criterion: criterion(logits, labels) of the class head.
        teacher: needed by distillation, by DGD, for which it must return q and k, and by token distillation, for which
            it must return tokens; one forward per batch.
        distillation: what is learned from it.
        student_prefix_tokens: class, distillation and register tokens of the student.
        stored_labels: the labels of every batch are `SoftLabels`: distillation needs no teacher.

    Raises:
        UserError: a teacher is missing.
    """

    def __init__(self, base_criterion: nn.Module, teacher: Teacher | None, distillation: Distillation,
                 student_prefix_tokens: int = 2, stored_labels: bool = False) -> None:
        super().__init__()
        kind, dgd_weight = distillation.distillation_type, distillation.dgd_weight
        if teacher is None and (kind != 'none' and not stored_labels or distillation.compares_blocks):
            raise UserError(f'--distillation-type {kind} with --dgd-weight {dgd_weight} needs a teacher: '
                            'name one, or pass --distillation-type none --dgd-weight 0')
        assert dgd_weight == 0 or teacher.return_qk, 'DGD needs Teacher(..., return_qk=True)'
        assert distillation.token_weight == 0 or teacher.return_tokens, 'tokens need Teacher(..., return_tokens=True)'
        self.base_criterion, self.teacher, self.distillation = base_criterion, teacher, distillation
        self.student_prefix_tokens = student_prefix_tokens

    @property
    def needs_blocks(self) -> bool:
        """Whether the student is to be called with return_blocks=True."""
        return self.distillation.compares_blocks

    def forward(self, inputs: Tensor, outputs: Tensor | Pair, labels: Tensor | SoftLabels,
                student_blocks: Sequence[BlockOutputs] | None = None) -> dict[str, Tensor]:
        """Loss of one batch.

        Args:
            inputs: the images that the student saw, (B, 3, H, W), after mixup and the like.
            outputs: logits (B, classes), or (logits, distillation logits) of a student with a distillation token.
                Without distillation a pair counts by its mean, which is what evaluation uses.
            labels: whatever the base criterion takes, (B,) or (B, classes); or `SoftLabels`, to distil from these.
            student_blocks: what happened in each block of the student; where `needs_blocks`.

        Returns:
            0-dim tensors: 'loss', to backpropagate; for the log, unweighted and detached, 'loss_cls' and, where they
            apply, 'loss_distill', 'loss_dgd_q', 'loss_dgd_k', 'loss_tokens'.

        Raises:
            UserError: distillation from a teacher with other classes.
        """
        weights, teacher_blocks = self.distillation, []
        logits = outputs if isinstance(outputs, Tensor) else outputs[0]
        teacher_logits = None
        if isinstance(labels, SoftLabels):
            teacher_logits, labels = labels.logits(logits.shape[-1]), labels.labels
        elif weights.distillation_type != 'none' or weights.compares_blocks:
            teacher_logits, teacher_blocks = self.teacher(inputs)
        parts = self._of_logits(outputs, labels, teacher_logits)
        loss = parts.pop('loss')
        if weights.compares_blocks:
            assert student_blocks is not None, 'comparing blocks needs those of the student'
            of_blocks = self._of_blocks(student_blocks, teacher_blocks)
            loss = loss + of_blocks.pop('loss')
            parts |= of_blocks
        return {'loss': loss} | {name: part.detach() for name, part in parts.items()}

    def _of_logits(self, outputs: Tensor | Pair, labels: Tensor, teacher_logits: Tensor | None) -> dict[str, Tensor]:
        """'loss', the weighted sum, and the parts that it is made of."""
        kind, alpha = self.distillation.distillation_type, self.distillation.distillation_alpha
        heads = (outputs,) if isinstance(outputs, Tensor) else outputs
        if kind == 'none':
            cls = self.base_criterion(sum(heads) / len(heads), labels)
            return {'loss': cls, 'loss_cls': cls}
        cls, distill = self.base_criterion(heads[0], labels), self._distill(heads, teacher_logits)
        return {'loss': (1 - alpha) * cls + alpha * distill, 'loss_cls': cls, 'loss_distill': distill}

    def _of_blocks(self, student: Sequence[BlockOutputs], teacher: list[BlockOutputs]) -> dict[str, Tensor]:
        """'loss', the weighted sum, and the parts that it is made of. Empties the teacher's list."""
        weights, prefixes = self.distillation, (self.student_prefix_tokens, self.teacher.num_prefix_tokens)
        loss, parts = 0., {}
        teacher_tokens, teacher_qk = [block.tokens for block in teacher], deque((b.q, b.k) for b in teacher)
        teacher.clear()
        if weights.dgd_weight > 0:
            parts['loss_dgd_q'], parts['loss_dgd_k'] = distribution_guided_distillation(
                [(block.q, block.k) for block in student], _given_up(teacher_qk), *prefixes)
            loss = loss + weights.dgd_weight * (parts['loss_dgd_q'] + parts['loss_dgd_k'])
        if weights.token_weight > 0:
            parts['loss_tokens'] = token_distance([block.tokens for block in student], teacher_tokens, *prefixes)
            loss = loss + weights.token_weight * parts['loss_tokens']
        return {'loss': loss} | parts

    def _distill(self, heads: Sequence[Tensor], teacher_logits: Tensor) -> Tensor:
        """Soft: T^2 KL(teacher || student) of logits / T, DeiT's sum over B and classes / (B * classes). Hard: CE.
        Both are of the last head. 'both': T^2 KL, mean over the images and the heads."""
        dist_logits = heads[-1]
        if dist_logits.shape != teacher_logits.shape:
            raise UserError(f'the teacher has {teacher_logits.shape[-1]} classes, the student {dist_logits.shape[-1]}: '
                            'choose a teacher of the same data set, or pass --distillation-type none')
        kind, tau = self.distillation.distillation_type, self.distillation.distillation_tau
        if kind == 'hard':
            return F.cross_entropy(dist_logits, teacher_logits.argmax(dim=1))
        dtype = torch.promote_types(dist_logits.dtype, torch.float32)
        students = heads if kind == 'both' else (dist_logits,)
        *students, teacher = (F.log_softmax(x.to(dtype) / tau, dim=1) for x in (*students, teacher_logits))
        divergence = sum(F.kl_div(student, teacher, reduction='sum', log_target=True) for student in students)
        terms = len(heads) * len(teacher) if kind == 'both' else dist_logits.numel()
        return divergence * tau ** 2 / terms
