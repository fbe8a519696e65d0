"""What `deploy.py bench` compares: networks and runtimes, each in a process of its own that answers on a pipe.

    python -m benchmarks.contenders SPEC      SPEC: a `Spec` as JSON; inference.py starts it

This module imports no torch at its head, because the processes of ONNX Runtime do without, and their memory shows it.
"""
from __future__ import annotations

import ctypes
import gc
import importlib
import json
import os
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

__all__ = ['CONTENDERS', 'ON_CPU_ONLY', 'Contender', 'Forward', 'Spec', 'one_line', 'random_images']

Forward = Callable[[np.ndarray], Any]  # float32 images (B, C, H, W) -> logits (B, classes), array or tensor
WARM_UP = 3            # forwards before any measurement, of each batch size


class Spec(NamedTuple):
    """What a contender's process is told; it travels as JSON.

    Attributes:
        threads, device, batch_sizes: the same for all contenders.
        input_size, num_classes: of all networks.
        terms: 8-bit terms of a folded weight in the integer network.
        full_model, full_kwargs: the full-precision network in timm, and its options.
        contender: one of `CONTENDERS`.
        file: what it loads.
    """
    threads: int
    device: str
    batch_sizes: Sequence[int]
    input_size: int
    num_classes: int
    terms: int
    full_model: str
    full_kwargs: dict[str, Any]
    contender: str = ''
    file: str = ''


# --- the contenders, each built in a process of its own ---------------------------------------------------------------


def _on_device(spec: Spec) -> Callable[[np.ndarray], Any]:
    """A function from images to their tensor on the device. It stays there, so that moving it is not measured."""
    import torch

    tensors = {}

    def tensor(images: np.ndarray) -> Any:
        if id(images) not in tensors:
            tensors[id(images)] = images, torch.from_numpy(images).to(spec.device)
        return tensors[id(images)][1]

    return tensor


def _quantized(spec: Spec, kind: str) -> tuple[Forward, str]:
    import torch

    from checkpoints.networks import open_network
    from deployment.integer import IntegerViT
    from deployment.native import NativeViT

    network, images_of, note = open_network(spec.file).model.to(spec.device), _on_device(spec), ''
    if kind != 'simulated':
        network = IntegerViT(network, spec.terms)
    if kind == 'native':
        network = NativeViT(network, spec.threads)
        note = network.instructions
    if kind == 'compiled':
        network = torch.compile(network, dynamic=False)
    return torch.inference_mode()(lambda images: network(images_of(images))), note


def _full_precision(spec: Spec) -> Any:
    import safetensors.torch
    import timm

    model = timm.create_model(spec.full_model, img_size=spec.input_size, num_classes=spec.num_classes,
                              **spec.full_kwargs)
    model.load_state_dict(safetensors.torch.load_file(spec.file))
    return model.eval().to(spec.device)


def _torch(spec: Spec, half: bool, compiled: bool) -> tuple[Forward, str]:
    import torch

    model, images_of = _full_precision(spec), _on_device(spec)

    def in_float32(images: np.ndarray) -> Any:
        return model(images_of(images))

    def in_autocast(images: np.ndarray) -> Any:
        with torch.autocast(spec.device, torch.bfloat16):
            return model(images_of(images))

    def in_bf16(images: np.ndarray) -> Any:
        return model(images_of(images).bfloat16())

    forward, note = in_float32, ''
    if half:
        images = random_images(max(spec.batch_sizes), spec)
        with torch.inference_mode():
            by_autocast = _best_of(in_autocast, images)
            model.bfloat16()
            by_bf16 = _best_of(in_bf16, images)
        forward, note = (in_bf16, '.bfloat16(), faster than autocast') if by_bf16 <= by_autocast else (
            in_autocast, 'autocast, faster than .bfloat16()')
        if forward is in_autocast:
            model = _full_precision(spec)
    if compiled:
        model = torch.compile(model, dynamic=False)
    return torch.inference_mode()(forward), note


def _best_of(forward: Forward, images: np.ndarray) -> float:
    """The seconds of the fastest of some forwards, after one that is not timed."""
    forward(images)
    return min(_timed(forward, images) for _ in range(WARM_UP))


def _onnx(spec: Spec) -> tuple[Forward, str]:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = spec.threads, 1
    session = onnxruntime.InferenceSession(spec.file, options, providers=['CPUExecutionProvider'])
    name = session.get_inputs()[0].name
    return lambda images: session.run(None, {name: images})[0], ''


def _openvino(spec: Spec, hint: str) -> tuple[Forward, str]:
    """hint: 'f32', 'bf16', or '' for OpenVINO's own choice; bf16 is emulated where the processor does not have it."""
    import openvino

    options = {'INFERENCE_NUM_THREADS': spec.threads, 'NUM_STREAMS': 1, 'PERFORMANCE_HINT': 'LATENCY'}
    network = openvino.Core().compile_model(spec.file, 'CPU', options | (
        {'INFERENCE_PRECISION_HINT': hint} if hint else {}))
    request = network.create_infer_request()
    executed = Counter(str(node.get_rt_info()['runtimePrecision'].value) for node in
                       network.get_runtime_model().get_ops()
                       if node.get_rt_info()['layerType'].value in ('FullyConnected', 'MatMul', 'Convolution'))
    note = 'products executed in ' + ', '.join(f'{name} ({count})' for name, count in executed.most_common())
    return lambda images: next(iter(request.infer([images]).values())), note


class Contender(NamedTuple):
    """A row of the table; `file` is the key of the prepared file that it loads, `libraries` what it imports first."""
    label: str
    file: str
    libraries: tuple[str, ...]
    build: Callable[[Spec], tuple[Forward, str]]


QUANTIZED = ('torch', 'deployment.native', 'checkpoints.networks', 'quant_vision_transformer')  # its registration
TORCH = ('torch', 'timm', 'safetensors.torch')
CONTENDERS = {
    'native': Contender('this network, integers, native kernels', 'packed', QUANTIZED,
                        partial(_quantized, kind='native')),
    'torch-int': Contender('this network, integers, plain torch', 'packed', QUANTIZED,
                           partial(_quantized, kind='integers')),
    'torch-int-compiled': Contender('this network, integers, torch compiled', 'packed', QUANTIZED,
                                    partial(_quantized, kind='compiled')),
    'ort-int8': Contender('this network, ONNX Runtime int8 (QDQ)', 'onnx_int8', ('onnxruntime',), _onnx),
    'ov-int8': Contender('this network, OpenVINO int8 (QDQ)', 'onnx_int8', ('openvino',),
                         partial(_openvino, hint='')),
    'simulated': Contender('this network, simulated in float32', 'packed', QUANTIZED,
                           partial(_quantized, kind='simulated')),
    'float32': Contender('full precision, torch float32', 'float32', TORCH,
                         partial(_torch, half=False, compiled=False)),
    'float32-compiled': Contender('full precision, torch float32, compiled', 'float32', TORCH,
                                  partial(_torch, half=False, compiled=True)),
    'bf16': Contender('full precision, torch bf16', 'float32', TORCH, partial(_torch, half=True, compiled=False)),
    'bf16-compiled': Contender('full precision, torch bf16, compiled', 'float32', TORCH,
                               partial(_torch, half=True, compiled=True)),
    'ort-float32': Contender('full precision, ONNX Runtime float32', 'onnx_float32', ('onnxruntime',), _onnx),
    'ort-dynamic': Contender('full precision, ONNX Runtime dynamic int8', 'onnx_dynamic', ('onnxruntime',), _onnx),
    'ov-float32': Contender('full precision, OpenVINO float32', 'onnx_float32', ('openvino',),
                            partial(_openvino, hint='f32')),
    'ov-bf16': Contender('full precision, OpenVINO bf16', 'onnx_float32', ('openvino',),
                         partial(_openvino, hint='bf16')),
    'ov-nncf': Contender('full precision, OpenVINO, int8 by NNCF', 'openvino_int8', ('openvino',),
                         partial(_openvino, hint='')),
}
ON_CPU_ONLY = ('native', 'ort-int8', 'ort-float32', 'ort-dynamic', 'ov-int8', 'ov-float32', 'ov-bf16', 'ov-nncf')


# --- a contender's process --------------------------------------------------------------------------------------------


def random_images(count: int, spec: Spec) -> np.ndarray:
    return np.random.default_rng(0).standard_normal((count, 3, spec.input_size, spec.input_size), np.float32)


def _timed(forward: Forward, images: np.ndarray) -> float:
    """Seconds until the logits are computed; a GPU is waited for before and after."""
    _synchronize()
    start = time.perf_counter()
    forward(images)
    _synchronize()
    return time.perf_counter() - start


def _synchronize() -> None:
    torch = sys.modules.get('torch')
    if torch is not None and torch.cuda.is_initialized():
        torch.cuda.synchronize()


def peak_resident() -> int:
    """The most bytes of this process that were in physical memory so far, or since `_reset_peak`."""
    with suppress(OSError):
        fields = dict(line.split(':', 1) for line in Path('/proc/self/status').read_text().splitlines())
        return int(fields['VmHWM'].removesuffix('kB')) * 1024
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == 'darwin' else 1024)


def _reset_peak() -> bool:
    """Lets `peak_resident` begin anew; whether the system does that."""
    gc.collect()
    with suppress(AttributeError, TypeError):  # of other systems
        ctypes.CDLL(None).malloc_trim(0)  # glibc keeps freed memory otherwise
    with suppress(OSError):
        Path('/proc/self/clear_refs').write_text('5')
        return True
    return False


def _worker(spec: Spec) -> None:
    """Answers in JSON lines: first with the contender's state, then to each line of stdin, which asks for forwards."""
    answers = os.fdopen(os.dup(1), 'w')
    os.dup2(2, 1)  # what libraries print must not get between the answers

    def answer(**message: Any) -> None:
        print(json.dumps(message), file=answers, flush=True)

    try:
        contender = CONTENDERS[spec.contender]
        for library in contender.libraries:
            importlib.import_module(library)
        if 'torch' in sys.modules:
            sys.modules['torch'].set_num_threads(spec.threads)
        libraries = peak_resident()
        forward, note = contender.build(spec)
        images = {count: random_images(count, spec) for count in spec.batch_sizes}
        for batch in images.values():
            for _ in range(WARM_UP):
                logits = forward(batch)
    except Exception as error:  # missing package, no compiler, unsupported operation: the table says which
        answer(error=one_line(error))
        return
    before, can_reset = peak_resident(), _reset_peak()
    logits = (logits if isinstance(logits, np.ndarray) else logits.float().cpu().numpy())[:1]
    answer(note=note, logits=logits.tolist(), library_bytes=libraries)
    for line in sys.stdin:
        count, runs = json.loads(line)
        forward(images[count])
        seconds = [_timed(forward, images[count]) for _ in range(runs)]
        now = peak_resident()
        answer(seconds=seconds, peak_bytes=max(before, now), running_bytes=now if can_reset else None)


def one_line(error: Exception, most: int = 160) -> str:
    text = ' '.join(str(error).split()) or 'no message'
    return f'{type(error).__name__}: {text[:most]}{"..." if len(text) > most else ""}'


if __name__ == '__main__':
    _worker(Spec(**json.loads(sys.argv[1])))
