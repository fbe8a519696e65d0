"""The lines of a run's log.txt."""
from __future__ import annotations

from checkpoints.entries import MOST_EPOCHS
from files.paths import parse_json

__all__ = ['parse_epoch']

LARGEST = 10 ** 300


def parse_epoch(line: str) -> dict[str, int | float]:
    """The numbers of an epoch by their names, 'epoch' among them; whatever else the line holds is left out.

    Raises:
        ValueError: it is no JSON object with an epoch.
    """
    record = parse_json(line)
    if not isinstance(record, dict):
        raise ValueError('no JSON object')
    epoch = record.get('epoch')
    if type(epoch) not in (int, float) or not 0 <= epoch <= MOST_EPOCHS:
        raise ValueError('no number of an epoch')
    numbers = {name: value for name, value in record.items() if type(value) is float or type(value) is int and
               abs(value) < LARGEST}  # whole numbers beyond are none that a float can hold
    return {**numbers, 'epoch': int(epoch)}
