"""Later methods of training, each in a file of its own, and what a run asks of them."""
from __future__ import annotations

from typing import Any

from torch import Tensor

__all__ = ['Method']


class Method:
    """Something that takes part in training besides the loss and the optimizer, and has a state of its own.

    A run calls these methods in the order of their names here; those that a method does not override do nothing.
    `training.methods.registry` lists the methods.

    Attributes:
        name: of its state in a checkpoint.
        without_state: what follows where a checkpoint that training continues from has no such state.
        left_out: what is said where it has one and the run goes on without the method.
    """
    name: str
    without_state: str
    left_out: str

    def loss_parts(self, progress: float) -> dict[str, Tensor]:
        """What is added to the loss of a batch, by the names that the log gives to it; each 0-dim.

        Args:
            progress: share of the run that is done, in [0, 1].
        """
        return {}

    def before_update(self) -> None:
        """Is called when the gradients of an update are complete, unscaled and clipped."""

    def after_update(self, progress: float) -> None:
        """Is called when the optimizer has moved the parameters."""

    def shares(self) -> dict[str, dict[str, Tensor]]:
        """By the layer's name, shares of its weights by what became of them, 0-dim; empty if it follows none."""
        return {}

    def state_dict(self) -> dict[str, Any]:
        raise NotImplementedError

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continues from a `state_dict`.

        Raises:
            UserError: it is of another network, or damaged.
        """
        raise NotImplementedError
