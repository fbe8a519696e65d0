"""What goes wrong inside a quantized network in training, by numbers and in words.

Of every quantizer, on a few images: the entropy of its codes, the share of values outside its range, the share of dead
channels, whose codes are all the same, and of weights whose codes oscillate. A run writes them to TensorBoard at each
epoch, and prints a warning for the worst of each kind.

Cost: none in the deployed network nor in a training step; at each epoch one forward of 16 images.
"""
from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from _quan_base import ActQ, named_quantizers
from analysis.codes import CodeStatistics, code_statistics
from training.methods import Method
from training.methods.oscillation import block_weights

__all__ = ['Diagnostics', 'Found', 'warning_lines']

Found = dict[str, dict[str, float]]  # by the quantizer's name, numbers by their names

# Quantizing a Gaussian with the least error uses 95 % of 2 bits and 90 % of 4: half of them is a lost bit or more.
LOW_ENTROPY = 0.5
# Clipped values have no gradient. Calibrated by mse to 2 bits, DeiT-Tiny clips up to 52 % behind a GELU, whose flat
# side is one code, and trains well.
MANY_CLIPPED = 0.75
# Calibration itself gives up 2 of a head's 64 dimensions to IRM, 3 %. A quarter is capacity that is paid for in vain.
MANY_DEAD = 0.25
# Such a share of codes is left to chance at the end of a run. In its first half codes change because weights learn.
MANY_OSCILLATING, OSCILLATING_FROM = 0.25, 0.5


# --- numbers ----------------------------------------------------------------------------------------------------------


class Diagnostics:
    """The numbers at each epoch, with what became of the codes since the one before.

        diagnostics = Diagnostics(model, images)
        found = diagnostics.measure()                       # at each epoch
        print(*warning_lines(model, found, progress), sep='\\n')

    Args:
        images: (B, 3, H, W), on the model's device.
        methods: the methods of the run, some of which may follow the codes of weights.
    """

    def __init__(self, model: nn.Module, images: Tensor, methods: Sequence[Method] = ()) -> None:
        self.model, self.images = model, images
        self.trackers = [method for method in methods if method.shares()]
        self._codes = self._current_codes()

    def _current_codes(self) -> dict[str, Tensor]:
        """The weights' codes, to be compared with those an epoch later; none where a method follows them."""
        return {} if self.trackers else {
            name: layer.to_int().to(torch.int8) for name, layer in block_weights(self.model).items()}

    def measure(self) -> Found:
        """Of every quantizer 'step' (mean scale), 'zero_point' (mean, of activations), 'clipped', 'dead', 'entropy'.

        Weights of the blocks have also the shares 'oscillating' and 'frozen' where a method follows them, else that of
        the codes that 'changed' since the call before (or the start).
        """
        found = {name: _numbers(statistics) for name, statistics in code_statistics(self.model, self.images).items()}
        for name, shares in self._shares().items():
            found[name] |= shares
        return found

    def _shares(self) -> Found:
        """What became of the codes, by layer; one copy brings it to the host."""
        shares: dict[tuple[str, str], Tensor] = {}
        for tracker in self.trackers:
            shares |= {(layer, what): share for layer, entry in tracker.shares().items()
                       for what, share in entry.items()}
        before, self._codes = self._codes, self._current_codes()
        shares |= {(layer, 'changed'): (codes != before[layer]).float().mean()
                   for layer, codes in self._codes.items()}
        found: Found = {}
        for (layer, what), value in zip(shares, torch.stack(list(shares.values())).tolist() if shares else (),
                                        strict=True):
            found.setdefault(layer, {})[what] = value
        return found


def _numbers(statistics: CodeStatistics) -> dict[str, float]:
    """The statistics by the names that they have in TensorBoard."""
    zero_point = {} if statistics.zero_point is None else {'zero_point': statistics.zero_point}
    return {'step': statistics.scale, **zero_point, 'clipped': statistics.clipped, 'dead': statistics.dead,
            'entropy': statistics.distribution.entropy}


# --- words ------------------------------------------------------------------------------------------------------------


def warning_lines(model: nn.Module, found: Found, progress: float, is_fitted: bool = False) -> list[str]:
    """A line for each kind of trouble: the worst place, in how many it is found, and what to try.

    Args:
        found: of `Diagnostics.measure`.
        progress: done share of the run, in [0, 1].
        is_fitted: the quantizers began fitted to a full-precision network, which is not recommended again.
    """
    start = '' if is_fitted else 'a start by --finetune and --calibration mse, or '
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
         'uses {used:.1f} of {bits} bits', f'{start}a lower --lr', used=used, bits=bits)
    warn({name: entry['clipped'] for name, entry in found.items()}, MANY_CLIPPED, 'clips {share:.0%} of its values',
         f'{start}a lower --step-lr-scale')
    warn({name: entry['dead'] for name, entry in found.items()}, MANY_DEAD, 'has one code only in {share:.0%} of its '
         'channels', f'{start}a lower --lr')
    if progress > OSCILLATING_FROM:
        for what, say in (('oscillating', 'has {share:.0%} of its weights oscillating'),
                          ('changed', 'changed {share:.0%} of its codes in this epoch')):
            warn({name: entry[what] for name, entry in found.items() if what in entry}, MANY_OSCILLATING, say,
                 '--oscillation-dampening, --oscillation-freezing or a lower --lr')
    return lines
