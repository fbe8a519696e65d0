"""What goes wrong inside a quantized network in training, by numbers and in words.

Of every quantizer, on a few images: the entropy of its codes, the share of values outside its range, the share of dead
channels, whose codes are all the same, and of weights whose codes oscillate. The engine writes them to TensorBoard at
each epoch, and prints a warning for the worst of each kind.

Cost: none in the deployed network nor in a training step; at each epoch one forward of 16 images.
"""
from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn

from _quan_base import ActQ, block_weights, named_quantizers
from quant_vision_transformer import QAttention
from training.methods.oscillation import Oscillations

__all__ = ['Diagnostics', 'entropy', 'quantizer_statistics', 'warning_lines']

Statistics = dict[str, dict[str, float]]

# Quantizing a Gaussian with the least error uses 95 % of 2 bits and 90 % of 4: half of them is a lost bit or more.
LOW_ENTROPY = 0.5
# Clipped values have no gradient. Calibrated by mse to 2 bits, DeiT-Tiny clips up to 52 % behind a GELU, whose flat
# side is one code, and trains well.
MANY_CLIPPED = 0.75
# Calibration itself gives up 2 of a head's 64 dimensions to IRM, 3 %. A quarter is capacity that is paid for in vain.
MANY_DEAD = 0.25
# Such a share of codes is left to chance at the end of a run. In its first half codes change because weights learn.
MANY_OSCILLATING, OSCILLATING_FROM = 0.25, 0.5


def entropy(shares: np.ndarray) -> float:
    """-sum p log2 p, in bits."""
    shares = shares[shares > 0]
    return float(-(shares * np.log2(shares)).sum()) + 0.  # + 0: not -0 for a single code


# --- numbers ----------------------------------------------------------------------------------------------------------


def _clipped(quantizer: nn.Module, x: Tensor) -> Tensor:
    """The share of x outside the range of codes, 0-dim."""
    axis = 0 if not isinstance(quantizer, ActQ) else 1 if x.ndim == 4 else x.ndim - 1
    shape = [-1 if i == axis else 1 for i in range(x.ndim)]
    position = x / quantizer.alpha.view(shape)
    if isinstance(quantizer, ActQ):
        position = position + quantizer.zero_point.round().view(shape)
    low, high = quantizer.code_range
    return ((position < low) | (position > high)).float().mean()


@torch.no_grad()
def quantizer_statistics(model: nn.Module, images: Tensor) -> Statistics:
    """Of every quantizer by its name: mean 'step' and 'zero_point', shares 'clipped' and 'dead', 'entropy' in bits.

    Dead are output channels of a weight and channels of an activation: of q, k and v each dimension of each head, of
    attention probabilities the heads. One forward in evaluation mode, with hooks, and one copy to the host; a layer
    appears as `<layer>` (weight) and `<layer>.act` (input).

    Args:
        images: (B, 3, H, W)
    """
    found: dict[str, dict[str, Tensor]] = {}
    counts: dict[str, Tensor] = {}
    names = {module: name for name, module in model.named_modules()}

    def note(name: str, quantizer: nn.Module, x: Tensor, channels: list[int]) -> None:
        codes = quantizer.to_int(x) if isinstance(quantizer, ActQ) else quantizer.to_int()
        rows = codes.movedim(channels, list(range(len(channels)))).flatten(0, len(channels) - 1).flatten(1)
        found[name] = {'step': quantizer.alpha.mean()}
        if isinstance(quantizer, ActQ):
            found[name]['zero_point'] = quantizer.zero_point.mean()
        found[name] |= {'clipped': _clipped(quantizer, x), 'dead': (rows.amin(1) == rows.amax(1)).float().mean()}
        counts[name] = torch.bincount(rows.flatten() - quantizer.code_range[0], minlength=256)

    def of_layer(layer: nn.Module, inputs: tuple[Tensor, ...], _output: Tensor) -> None:
        note(names[layer], layer, layer.weight, [0])
        note(names[layer.act], layer.act, inputs[0], [1] if inputs[0].ndim == 4 else [inputs[0].ndim - 1])

    def of_attention(attention: QAttention, inputs: tuple[Tensor, ...], output: tuple) -> None:
        _, (q, k) = output                                                                       # (B, H, N, d) each
        v = attention.qkv(inputs[0])[..., 2 * attention.num_heads * attention.head_dim:]         # (B, N, H d)
        v = v.unflatten(-1, (attention.num_heads, attention.head_dim)).transpose(1, 2)           # (B, H, N, d)
        probabilities = (attention.q_act(q) @ attention.k_act(k).mT * attention.scale).softmax(dim=-1)
        for name, x, channels in (('q_act', q, [1, 3]), ('k_act', k, [1, 3]), ('v_act', v, [1, 3]),
                                  ('attn_act', probabilities, [1])):
            note(f'{names[attention]}.{name}', getattr(attention, name), x, channels)

    hooks = [module.register_forward_hook(of_layer) for _, module in named_quantizers(model)
             if not isinstance(module, ActQ)]
    hooks += [module.register_forward_hook(of_attention) for module in model.modules()
              if isinstance(module, QAttention) and module.quantize_attn]
    was_training = model.training
    try:
        model.eval().forward(images)  # not __call__, which may be compiled without the hooks
    finally:
        model.train(was_training)
        for hook in hooks:
            hook.remove()
    if not found:
        return {}
    measured = torch.stack([value.double() for entry in found.values() for value in entry.values()])
    on_host = torch.cat([measured, torch.stack(list(counts.values())).double().flatten()]).cpu().numpy()
    values = iter(on_host[:len(measured)].tolist())
    shares = on_host[len(measured):].reshape(len(counts), -1)
    shares /= shares.sum(1, keepdims=True)
    return {name: {what: next(values) for what in entry} | {'entropy': entropy(row)}
            for (name, entry), row in zip(found.items(), shares, strict=True)}


class Diagnostics:
    """The numbers at each epoch, with what became of the codes since the one before.

        diagnostics = Diagnostics(model, images)
        found = diagnostics.measure()                       # at each epoch
        print(*warning_lines(model, found, progress), sep='\\n')

    Args:
        images: (B, 3, H, W), on the model's device.
        oscillations: the tracker of the run, if it has one.
    """

    def __init__(self, model: nn.Module, images: Tensor, oscillations: Oscillations | None = None) -> None:
        self.model, self.images, self.oscillations = model, images, oscillations
        self._codes = self._current_codes()

    def _current_codes(self) -> dict[str, Tensor]:
        return {} if self.oscillations else {
            name: layer.to_int().to(torch.int8) for name, layer in block_weights(self.model).items()}

    def measure(self) -> Statistics:
        """`quantizer_statistics`, with the shares of weights 'oscillating' and 'frozen' where they are tracked, else of
        those with 'changed' codes since the call before (or the start)."""
        found = quantizer_statistics(self.model, self.images)
        if self.oscillations is not None:
            shares = self.oscillations.shares()
        else:
            before, self._codes = self._codes, self._current_codes()
            shares = {name: {'changed': (codes != before[name]).float().mean()} for name, codes in self._codes.items()}
        for name, entry in shares.items():
            found[name] |= {what: value.item() for what, value in entry.items()}
        return found


# --- words ------------------------------------------------------------------------------------------------------------


def warning_lines(model: nn.Module, found: Statistics, progress: float) -> list[str]:
    """A line for each kind of trouble: the worst place, in how many it is found, and what to try.

    Args:
        found: of `Diagnostics.measure`.
        progress: done share of the run, in [0, 1].
    """
    bits = {name: module.bits if isinstance(module, ActQ) else module.weight_bits
            for name, module in named_quantizers(model)}
    lines = []

    def warn(badness: dict[str, float], limit: float, say: str, advice: str, **values: dict[str, float]) -> None:
        bad = [name for name, value in badness.items() if value > limit]
        if not bad:
            return
        worst = max(bad, key=badness.__getitem__)
        more = f' (and {len(bad) - 1} more)' if len(bad) > 1 else ''
        said = say.format(share=badness[worst], **{key: value[worst] for key, value in values.items()})
        lines.append(f'warning: {worst}{more} {said}: try {advice}')

    used = {name: entry['entropy'] for name, entry in found.items() if name.endswith(('.q_act', '.k_act'))}
    warn({name: 1 - value / bits[name] for name, value in used.items()}, 1 - LOW_ENTROPY,
         'uses {used:.1f} of {bits} bits', '--calibration mse or a lower --lr', used=used, bits=bits)
    warn({name: entry['clipped'] for name, entry in found.items()}, MANY_CLIPPED, 'clips {share:.0%} of its values',
         '--calibration mse or a lower --step-lr-scale')
    warn({name: entry['dead'] for name, entry in found.items()}, MANY_DEAD, 'has one code only in {share:.0%} of its '
         'channels', '--calibration mse or a lower --lr')
    if progress > OSCILLATING_FROM:
        for what, say in (('oscillating', 'has {share:.0%} of its weights oscillating'),
                          ('changed', 'changed {share:.0%} of its codes in this epoch')):
            warn({name: entry[what] for name, entry in found.items() if what in entry}, MANY_OSCILLATING, say,
                 '--oscillation-dampening, --oscillation-freezing or a lower --lr')
    return lines
