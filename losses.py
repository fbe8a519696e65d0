"""Training losses: the base criterion, and distillation of a teacher's logits, attention (DGD) and tokens.

    loss = (1 - alpha) * cls + alpha * distill + dgd_weight * (dgd_q + dgd_k) + token_weight * tokens

Hard and soft distillation follow DeiT (Touvron et al., 2021, arXiv 2012.12877): the distillation head learns from the
teacher, the class head from the labels. 'both' is for a student that is to equal its teacher, as a quantized network
that starts from the teacher's own weights: both heads learn from its logits. DGD is that of Q-ViT (Li et al., 2022,
arXiv 2210.06707): for every layer and head the Gram matrices q q^T and k k^T of the student's rectified queries and
keys are pulled towards those of a full-precision teacher, each matrix divided by its Frobenius norm. Token distillation
does so with the output of every block itself, for a student of the teacher's width.
"""

from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx, once_differentiable

from models import BlockHooks, Teacher, timm_attentions
from ops.lsq import cache_piece
from training.methods.stored_labels import SoftLabels
from utils import UserError

__all__ = ['DISTILLATION_TYPES', 'DistillationLoss', 'check_dgd_compatible',
           'distribution_guided_distillation', 'token_distance']

Pair = tuple[Tensor, Tensor]
DISTILLATION_TYPES = ('none', 'soft', 'hard', 'both')


def check_dgd_compatible(student: nn.Module, teacher: nn.Module) -> str | None:
    """None if DGD can compare the two networks, else the reason on one line. Head dims may differ."""
    teacher_attentions = timm_attentions(teacher)
    if teacher_attentions is None:
        return f'teacher {type(teacher).__name__} has no blocks with timm attention'
    theirs = [attention.num_heads for attention in teacher_attentions]
    ours = [getattr(getattr(block, 'attn', None), 'num_heads', None) for block in getattr(student, 'blocks', [])]
    if not ours or None in ours:
        return f'student {type(student).__name__} has no blocks with multi-head attention'
    if len(ours) != len(theirs):
        return f'the student has {len(ours)} layers, the teacher {len(theirs)}'
    if len({*ours, *theirs}) > 1:
        return f'the student has {ours} heads by layer, the teacher {theirs}: all must be equal'
    patches = [getattr(getattr(model, 'patch_embed', None), 'num_patches', None) for model in (student, teacher)]
    if None in patches or patches[0] != patches[1]:
        return f'the student has {patches[0]} patch tokens, the teacher {patches[1]}'
    return None


def distribution_guided_distillation(
        student_qk: Sequence[Pair], teacher_qk: Iterable[Pair], student_prefix_tokens: int, teacher_prefix_tokens: int,
) -> tuple[Tensor, Tensor]:
    """DGD of queries and of keys (Q-ViT, L_DGD): sums over layers and heads, means over the batch.

        sum over l, h of || G_T / ||G_T||_F - G_S / ||G_S||_F ||_F,   G = q q^T (then k k^T) over tokens, N x N

    Computed in float32 (float64 stays float64), also inside autocast regions. The gradient goes to the student alone.
    With unequal numbers of prefix tokens (class, distillation) both drop theirs and patch tokens alone are compared.

    Args:
        student_qk, teacher_qk: per layer (q, k), each (B, heads, N, d), the same shape in all layers of a network.
            B, heads and the number of patch tokens must agree between the two; d may differ.

    Returns:
        (loss_q, loss_k), each 0-dim, in [0, sqrt(2) * layers * heads].
    """
    assert student_qk, 'no layers to compare'
    same_prefix = student_prefix_tokens == teacher_prefix_tokens
    skips = (0, 0) if same_prefix else (student_prefix_tokens, teacher_prefix_tokens)
    # As one batch, layers are a twelfth of a GPU's kernel launches at depth 12; one by one, they stay in a CPU's cache.
    device = student_qk[0][0].device.type
    layers, losses = zip(student_qk, teacher_qk, strict=True), ([], [])
    with torch.autocast(device, enabled=False):
        while group := tuple(islice(layers, 1 if device == 'cpu' else None)):
            for which, distances in enumerate(losses):
                student, teacher = (_stack([pair[whose][which][:, :, skips[whose]:] for pair in group])
                                    for whose in (0, 1))  # (L, B, H, N, d) each, d its own
                distances.append(_gram_distance(student, teacher))
            del group, student, teacher  # before the next ones are taken
    return tuple(torch.cat(distances).sum(dim=(0, 2)).mean() for distances in losses)  # (L, B, H) -> (B,) -> ()


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
    term for either. The gradient goes to the student alone.

    Args:
        student, teacher: per block (B, N, D), with as many patch tokens behind the special ones.
    """
    terms = []
    for ours, theirs in zip(student, teacher, strict=True):
        dtype = torch.promote_types(ours.dtype, torch.float32)
        ours, theirs = ours.to(dtype), theirs.detach().to(dtype)
        special = theirs[:, [min(i, teacher_prefix_tokens - 1) for i in range(student_prefix_tokens)]]
        for a, b in ((ours[:, student_prefix_tokens:], theirs[:, teacher_prefix_tokens:]),
                     (ours[:, :student_prefix_tokens], special)):
            spread = (b - b.mean((0, 1))).square().mean().clamp_min(torch.finfo(b.dtype).tiny)
            terms.append((a - b).square().mean() / spread)
    return torch.stack(terms).sum() / len(student)


class _GramDistance(torch.autograd.Function):
    """|| A A^T / ||A A^T||_F - B B^T / ||B B^T||_F ||_F by d x d products: a, b (..., N, d) -> (...). No gradient to b.

    With <A A^T, B B^T>_F = ||A^T B||_F^2 the squared distance is 2 - 2 cos; but 1 - cos in float32 leaves no digit of a
    distance below 3e-4, and a gradient of noise. So scale A and B to norm 1 (the distance stays), take M = A - B, and
    expand in what vanishes with M. With K = M^T M, X = M^T B, C = B^T B:

        s = ||A A^T - B B^T||^2    = <K, K + 4 X + 2 C> + 2 <X, X^T>
        t = <A A^T - B B^T, B B^T> = <X, X + 2 C>,             e = s + 2 t
        b2 = ||B B^T|| = ||C||,    a2 = ||A A^T|| = sqrt(b2^2 + e),    a2 - b2 = e / (a2 + b2)
        distance^2 = 2 (1 - cos) = 2 / (a2 (a2 + b2)) * (s - t (a2 - b2) / b2)
        d(distance^2)/dA = 4 (cos / a2^2 A A^T A - 1 / (a2 b2) B B^T A)
                         = 4 M (p A^T A) + 4 B (p (K + X) + r (X^T + C))
        p = cos / a2^2,    r = p - 1 / (a2 b2) = -((a2 - b2) + (1 - cos) b2) / (a2^2 b2)

    Rounding errors are then relative to A - B. (For B = A Q, Q a rotation, the error is again that of 1 - cos.) A zero
    matrix has a zero normalised Gram matrix: distance 1 to any other, 0 to another zero. The gradient there, and the
    subgradient wherever the distance is 0, is 0.
    """

    @staticmethod
    def forward(ctx: FunctionCtx, a: Tensor, b: Tensor) -> Tensor:
        # The gradient is computed here, while a piece of a and b is in the cache: it alone is kept.
        distance, grad = a.new_empty(a.shape[:-2]), a.new_empty(a.shape)
        _GramDistance._by_pieces(a, b, distance, grad)
        ctx.save_for_backward(grad)
        return distance

    @staticmethod
    def _by_pieces(a: Tensor, b: Tensor, distance: Tensor, grad: Tensor) -> None:
        images = cache_piece(a.shape[1], a[:, :1].numel() // 2, a)
        for tensors in zip(*(tensor.split(images, 1) for tensor in (a, b, distance, grad)), strict=True):
            _distance_and_gradient_(*tensors)

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, grad: Tensor) -> tuple[Tensor, None]:
        return ctx.saved_tensors[0] * grad[..., None, None], None


def _distance_and_gradient_(a: Tensor, b: Tensor, distance: Tensor, grad: Tensor) -> None:
    """Into `distance`, (...), that of a and b, (..., N, d), and into `grad`, (..., N, d), its gradient to a."""
    # What norms, sums and products run over is contiguous: strided, each of them takes a multiple of the time.
    m, b = torch.empty_like(grad), b.contiguous()
    norm_a, norm_b = (torch.linalg.vector_norm(x, dim=(-2, -1), keepdim=True) for x in (a, b))  # (..., 1, 1)
    has_a, has_b = norm_a != 0, norm_b != 0
    norm_a, norm_b = torch.where(has_a, norm_a, 1), torch.where(has_b, norm_b, 1)
    torch.mul(a, norm_b / norm_a, out=m).sub_(b)  # M and B times ||B||: their products, (..., d, d), times its square
    k, x_t, c = m.mT @ m, b.mT @ m, b.mT @ b
    x = x_t.mT.contiguous()
    u, v = k + x, x_t + c  # K + X and X^T + C
    inverse = norm_b ** -2

    def inner(first: Tensor, second: Tensor) -> Tensor:
        """Of the products without ||B||^2, (..., 1, 1)."""
        return torch.linalg.vecdot(first.flatten(-2), second.flatten(-2))[..., None, None] * inverse * inverse

    t = inner(x_t, v + c)
    s = inner(k, u.add(x_t).add_(v, alpha=2)) + 2 * inner(x, x_t)
    e = s + 2 * t
    # At norm 1, a Gram matrix of rank at most d has ||C||^2 >= 1/d: the floor is reached by zero matrices alone.
    b4 = inner(c, c).clamp_min(1e-12)
    a2, b2 = (b4 + e).clamp_min(1e-12).sqrt(), b4.sqrt()
    difference = e / (a2 + b2)
    one_minus_cos = (s - t * difference / b2) / (a2 * (a2 + b2))
    nonzero = has_a & has_b
    far = torch.where(nonzero, (2 * one_minus_cos).clamp_min(0).sqrt(), (has_a ^ has_b).to(a.dtype))
    distance.copy_(far[..., 0, 0])

    # d(distance) = d(distance^2) / (2 distance); the divisions by the norms undo the scaling of A, M, B and products.
    factor = torch.where(nonzero & (far > 0), 2 / far, 0) / (norm_a * norm_b) * inverse
    p = factor * (1 - one_minus_cos) / a2.square()
    r = -factor * (difference + one_minus_cos * b2) / (a2.square() * b2)
    u *= p
    torch.matmul(m, torch.addcmul(u, v, p), out=grad)
    grad.flatten(0, -3).baddbmm_(b.flatten(0, -3), u.addcmul_(v, r).flatten(0, -3))


def _gram_distance(a: Tensor, b: Tensor) -> Tensor:
    """Distances of the normalised Gram matrices of a, (..., N, d), and b, (..., N, d'): (...)."""
    dtype = torch.promote_types(torch.promote_types(a.dtype, b.dtype), torch.float32)
    a, b = a.to(dtype), b.to(dtype)
    if a.shape[-1] != b.shape[-1]:  # columns of zeros leave the Gram matrix as it is
        width = max(a.shape[-1], b.shape[-1])
        a, b = F.pad(a, (0, width - a.shape[-1])), F.pad(b, (0, width - b.shape[-1]))
    return _GramDistance.apply(a, b)


class DistillationLoss(nn.Module):
    """The training loss by parts. Nothing in it reads a value back to the host.

    Args:
        base_criterion: criterion(logits, labels) of the class head.
        teacher: needed by distillation and by DGD, for which it must return q and k; one forward per batch.
        distillation_type: 'none'; 'soft', T^2-scaled KL divergence to the teacher's logits at temperature T = `tau`;
            'hard', cross-entropy with the teacher's decision as the label; 'both', T^2-scaled KL divergence of an
            image, mean over the heads (soft divides by the classes' number as well, which leaves it next to no weight).
        alpha: share of distillation, in [0, 1]; not used with 'none'.
        tau: temperature of soft distillation.
        dgd_weight: weight of DGD; 0 leaves it out at no cost.
        student_prefix_tokens: class, distillation and register tokens of the student.
        token_weight: weight of token distillation, with `student`, whose blocks' outputs it reads, and a teacher that
            keeps its own.
        stored_labels: the labels of every batch are `SoftLabels`: distillation needs no teacher.

    Raises:
        UserError: a value out of range, or a teacher that is missing.
    """

    def __init__(
            self, base_criterion: nn.Module, teacher: Teacher | None, distillation_type: str, alpha: float, tau: float,
            dgd_weight: float, student_prefix_tokens: int = 2, token_weight: float = 0.,
            student: nn.Module | None = None, stored_labels: bool = False,
    ) -> None:
        super().__init__()
        if distillation_type not in DISTILLATION_TYPES:
            raise UserError(f'--distillation-type {distillation_type} is unknown: choose none, soft, hard or both')
        if not 0 <= alpha <= 1:
            raise UserError(f'--distillation-alpha {alpha} is not a share: choose a value from 0 to 1')
        if not tau > 0:
            raise UserError(f'--distillation-tau {tau} is no temperature: choose a value above 0')
        if not dgd_weight >= 0:
            raise UserError(f'--dgd-weight {dgd_weight} is negative: choose 0 (off) or a value above')
        if teacher is None and (distillation_type != 'none' and not stored_labels or dgd_weight > 0):
            raise UserError(f'--distillation-type {distillation_type} with --dgd-weight {dgd_weight} needs a teacher: '
                            'name one, or pass --distillation-type none --dgd-weight 0')
        assert dgd_weight == 0 or teacher.return_qk, 'DGD needs Teacher(..., return_qk=True)'
        self.base_criterion, self.teacher, self.student_prefix_tokens = base_criterion, teacher, student_prefix_tokens
        self.distillation_type, self.alpha, self.tau, self.dgd_weight = distillation_type, alpha, tau, dgd_weight
        self.token_weight = token_weight
        self._student_tokens = BlockHooks(student) if token_weight else None

    def forward(
            self, inputs: Tensor, outputs: Tensor | Pair, labels: Tensor | SoftLabels,
            student_qk: Sequence[Pair] | None = None,
    ) -> dict[str, Tensor]:
        """Loss of one batch.

        Args:
            inputs: the images that the student saw, (B, 3, H, W), after mixup and the like.
            outputs: logits (B, classes), or (logits, distillation logits) of a student with a distillation token.
                Without distillation a pair counts by its mean, which is what evaluation uses.
            labels: whatever the base criterion takes, (B,) or (B, classes); or `SoftLabels`, to distil from these.
            student_qk: per layer (q, k) of the student after rectification, each (B, heads, N, d); used by DGD alone.

        Returns:
            0-dim tensors: 'loss', to backpropagate; for the log, unweighted and detached, 'loss_cls' and, where they
            apply, 'loss_distill', 'loss_dgd_q', 'loss_dgd_k', 'loss_tokens'.

        Raises:
            UserError: distillation from a student without a distillation head, or a teacher with other classes.
        """
        is_pair = not isinstance(outputs, Tensor)
        if self.distillation_type != 'none' or self.dgd_weight > 0 or self.token_weight > 0:
            if isinstance(labels, SoftLabels):
                teacher_logits, labels = labels.logits((outputs[0] if is_pair else outputs).shape[-1]), labels.labels
            else:
                teacher_logits, teacher_qk = self.teacher(inputs)
                teacher_qk = deque(teacher_qk)
        parts = {}
        if self.distillation_type == 'none':
            logits = (outputs[0] + outputs[1]) / 2 if is_pair else outputs
            loss = parts['loss_cls'] = self.base_criterion(logits, labels)
        else:
            if not is_pair:
                raise UserError(f'--distillation-type {self.distillation_type} needs a student with a distillation '
                                'token, which returns two heads: choose one, or pass --distillation-type none')
            logits, dist_logits = outputs
            parts['loss_cls'] = self.base_criterion(logits, labels)
            parts['loss_distill'] = self._distill(logits, dist_logits, teacher_logits)
            loss = (1 - self.alpha) * parts['loss_cls'] + self.alpha * parts['loss_distill']

        if self.dgd_weight > 0:
            assert student_qk is not None, 'dgd_weight > 0 needs the q and k of the student'
            parts['loss_dgd_q'], parts['loss_dgd_k'] = distribution_guided_distillation(
                student_qk, _given_up(teacher_qk), self.student_prefix_tokens, self.teacher.num_prefix_tokens)
            loss = loss + self.dgd_weight * (parts['loss_dgd_q'] + parts['loss_dgd_k'])
        if self.token_weight > 0:
            parts['loss_tokens'] = token_distance(self._student_tokens.take(), self.teacher.take_tokens(),
                                                  self.student_prefix_tokens, self.teacher.num_prefix_tokens)
            loss = loss + self.token_weight * parts['loss_tokens']
        return {'loss': loss} | {name: part.detach() for name, part in parts.items()}

    def _distill(self, logits: Tensor, dist_logits: Tensor, teacher_logits: Tensor) -> Tensor:
        """Soft: T^2 KL(teacher || student) of logits / T, DeiT's sum over B and classes / (B * classes). Hard: CE.
        Both: T^2 KL, mean over the images and the two heads."""
        if dist_logits.shape != teacher_logits.shape:
            raise UserError(f'the teacher has {teacher_logits.shape[-1]} classes, the student {dist_logits.shape[-1]}: '
                            'choose a teacher of the same data set, or pass --distillation-type none')
        if self.distillation_type == 'hard':
            return F.cross_entropy(dist_logits, teacher_logits.argmax(dim=1))
        dtype = torch.promote_types(dist_logits.dtype, torch.float32)
        students = (logits, dist_logits) if self.distillation_type == 'both' else (dist_logits,)
        *students, teacher = (F.log_softmax(x.to(dtype) / self.tau, dim=1) for x in (*students, teacher_logits))
        divergence = sum(F.kl_div(student, teacher, reduction='sum', log_target=True) for student in students)
        terms = 2 * len(teacher) if self.distillation_type == 'both' else dist_logits.numel()
        return divergence * self.tau ** 2 / terms
