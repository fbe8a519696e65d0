"""Changes to plain values, nested or not, and to bytes."""
from __future__ import annotations

import math
import random
from typing import Any

import torch

ESCAPE = '\x1b]0;owned\x07\x1b[2J'
TEXTS = ('', 'x', ESCAPE, 'é漢\u202e', '\ud800', 'a' * 10 ** 5, '../../etc/passwd', 'nan', '\x00', 'line\nbreak')
NUMBERS = (0, -1, 1, 7, 2 ** 31, 2 ** 63, -2 ** 70, 10 ** 5000, 0., -0.5, 1e-320, 1e308, math.nan, math.inf, -math.inf)


def deep(kind: type = list, levels: int = 3000) -> Any:
    """A value nested so many times."""
    value: Any = kind()
    for _ in range(levels):
        value = {'a': value} if kind is dict else kind([value])
    return value


def doubling(levels: int = 40) -> list:
    """A list that a few bytes can hold, and that has 2 ** levels entries when it is written out."""
    value: list = []
    for _ in range(levels):
        value = [value, value]
    return value


def plain_value(rng: random.Random) -> Any:
    """A value that JSON or YAML can hold."""
    return rng.choice([
        lambda: rng.choice(NUMBERS), lambda: rng.choice(TEXTS), lambda: None, lambda: rng.random() < 0.5,
        lambda: [], lambda: {}, lambda: [rng.choice(NUMBERS)] * rng.randint(1, 3),
        lambda: {rng.choice(TEXTS): rng.choice(NUMBERS)}, lambda: deep(rng.choice([list, dict]), 60)])()


def any_value(rng: random.Random) -> Any:
    """A value that a checkpoint can hold."""
    return rng.choice([
        lambda: plain_value(rng), lambda: plain_value(rng), lambda: tensor(rng), lambda: tensor(rng),
        lambda: tuple(rng.choice(NUMBERS) for _ in range(rng.randint(0, 3))), lambda: deep(tuple), lambda: deep(dict),
        lambda: doubling(), lambda: b'bytes', lambda: {1, 2}, lambda: {1: 2, ('a',): 3, None: 4}, lambda: 1j])()


def tensor(rng: random.Random) -> torch.Tensor:
    shape = rng.choice([(), (0,), (1,), (3,), (24,), (2, 3), (1, 1, 24), (24, 24), (2, 3, 4, 5)])
    made = torch.full(shape, rng.choice([0., -1., 0.5, math.nan, math.inf, 1e30]))
    return rng.choice([
        lambda: made, lambda: made.to(torch.bfloat16), lambda: made.nan_to_num().clamp(0, 9).to(torch.uint8),
        lambda: made.nan_to_num().clamp(-9, 9).long(), lambda: made > 0, lambda: made.to(torch.complex64),
        lambda: torch.zeros(1).expand(10 ** 6, 10 ** 4), lambda: torch.empty(10 ** 7, 10 ** 3, device='meta'),
        lambda: torch.eye(4).to_sparse()])()


def altered_tensor(rng: random.Random, value: torch.Tensor) -> torch.Tensor:
    """The tensor with a wrong value, shape or type."""
    value = value.clone()
    with torch.no_grad():
        if value.numel() and value.is_floating_point() and rng.random() < 0.5:
            at = rng.randrange(value.numel())
            value.view(-1)[at] = rng.choice([math.nan, math.inf, -1., 0., 1e38, -1e-30])
            return value
        if rng.random() < 0.3:
            return value * rng.choice([0., -1., 1e20, 1e-40])
    return rng.choice([
        lambda: value.flatten(), lambda: value[None], lambda: value.flatten()[:-1], lambda: value.double(),
        lambda: value.to(torch.float8_e4m3fn) if value.is_floating_point() else value.float(),
        lambda: value.transpose(0, -1) if value.ndim else value, lambda: torch.cat([value.flatten()] * 2)])()


def places(value: Any, path: tuple = ()) -> list[tuple]:
    """The paths to everything in nested dicts, lists, tuples and Namespaces."""
    found = [path] if path else []
    if isinstance(value, dict):
        pairs = list(value.items())
    elif isinstance(value, list | tuple):
        pairs = list(enumerate(value))[:4]
    else:
        pairs = [('__dict__', vars(value))] if type(value).__name__ == 'Namespace' else []
    if len(path) > 8:  # within what another change has put there
        return found
    return found + [place for key, inner in pairs for place in places(inner, (*path, key))]


def put(value: Any, path: tuple, change: Any) -> Any:
    """A copy with `change(inner)` at the path; where that returns `put`, the entry is removed."""
    key, *rest = path
    if key == '__dict__':
        return type(value)(**put(vars(value), tuple(rest), change)) if rest else value
    inner = put(value[key], tuple(rest), change) if rest else change(value[key])
    if isinstance(value, dict):
        return {name: inner if name == key else item for name, item in value.items() if name != key or inner is not put}
    return type(value)([inner if at == key else item for at, item in enumerate(value) if at != key or inner is not put])


def mutated(rng: random.Random, value: Any, of: tuple = (), values: Any = any_value) -> tuple[Any, str]:
    """The value with an entry removed or replaced, by preference near the root; what was changed."""
    found = [place for place in places(value) if place[:len(of)] == of]
    if not found:  # gone by another change
        return value, 'nothing'
    chosen = rng.choice(found)
    chosen = chosen[:rng.randint(max(1, len(of)), len(chosen))]
    what = rng.random()

    def change(inner: Any) -> Any:
        if what < 0.15:
            return put
        if isinstance(inner, torch.Tensor) and what < 0.7 and inner.numel() < 10 ** 6 and not inner.is_sparse:
            return altered_tensor(rng, inner)
        if type(inner) in (int, float) and what < 0.5:
            return rng.choice(NUMBERS)
        return values(rng)

    try:
        return put(value, chosen, change), '/'.join(map(str, chosen))
    except (TypeError, ValueError):  # a Namespace takes no such name
        return value, 'nothing'


def altered_bytes(rng: random.Random, data: bytes) -> tuple[bytes, str]:
    """Cut, flipped, overwritten, repeated or moved bytes."""
    kind = rng.choice(['cut', 'flip', 'flip', 'flip', 'zeros', 'ones', 'insert', 'remove', 'append', 'front'])
    at = rng.randrange(len(data)) if rng.random() < 0.5 else min(len(data) - 1, int(rng.expovariate(1 / 300)))
    length = rng.choice([1, 4, 100])
    changed = {
        'cut': lambda: data[:at], 'flip': lambda: data[:at] + bytes([data[at] ^ 1 << rng.randrange(8)]) + data[at + 1:],
        'zeros': lambda: data[:at] + bytes(length) + data[at + length:],
        'ones': lambda: data[:at] + b'\xff' * length + data[at + length:],
        'insert': lambda: data[:at] + rng.randbytes(length) + data[at:],
        'remove': lambda: data[:at] + data[at + length:],
        'append': lambda: data + rng.randbytes(length), 'front': lambda: rng.randbytes(length) + data}[kind]()
    return changed, f'{kind} at {at} of {len(data)}'
