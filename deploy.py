"""Deploys a trained Q-ViT: packs it, evaluates and uses the packed file, exports it, measures its speed.

    python deploy.py pack out/best_checkpoint.pth            a packed file, out/best_checkpoint.qvit.safetensors
    python deploy.py inspect FILE                            what is in it
    python deploy.py eval FILE --data-path DIR               its accuracy, in integer arithmetic
    python deploy.py predict photo.jpg --packed FILE         what is in a picture
    python deploy.py onnx FILE --output model.onnx           the same network for other runtimes
    python deploy.py bench FILE                              its speed here, beside full precision

FILE is a packed file; all but inspect take a checkpoint that says which network it holds in its place.
`python deploy.py COMMAND --help` explains each; docs/deploy.md explains the rest.
"""

import argparse
import json
import os
import sys
import traceback
from argparse import Namespace
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import timm
import torch
from timm.data import ImageNetInfo
from torch import Tensor, nn
from torch.utils.data import DataLoader, Subset
from torchvision.datasets.folder import pil_loader

import models  # noqa: F401  (registers full-precision networks)
import quant_vision_transformer  # noqa: F401  (registers the quantized ones)
from benchmarks import inference as deploy_bench
from checkpoints.files import read_checkpoint
from checkpoints.networks import create_from_checkpoint, model_info
from checkpoints.packed import PackedFile, is_packed, read_packed, unpack_codes, write_packed
from datasets import DATASETS, build_dataset, build_transform
from deployment.integer import IntegerViT
from engine import evaluate
from quant_vision_transformer import QVisionTransformer
from training.data import build_eval_loader
from utils import Parser, UserError, closest, report

SUFFIX = '.safetensors'
TERMS = {'int8': 1, 'int8x2': 2}  # of a folded weight, by the name of the arithmetic
PARTS = ('weight codes', 'steps and zero points', 'biases', 'norms', 'embeddings', 'header')


# --- networks from files ----------------------------------------------------------------------------------------------


def load(path: str, model: str | None = None) -> tuple[dict[str, Any], nn.Module]:
    """The description and the network, simulated in float32 and in evaluation mode, of a packed file or a checkpoint.

    Args:
        path: of the file.
        model: name of the network in a checkpoint that does not say it itself, as the released ones.

    Raises:
        UserError: it cannot be read, or what it holds is unknown or contradicts `model`.
    """
    if path.endswith(SUFFIX) or is_packed(path):
        packed = read_packed(path)
        if model not in (None, packed.about['model']):
            raise UserError(f'model is {packed.about["model"]} in {path}: leave --model out')
        return packed.about, packed.network()
    checkpoint = read_checkpoint(path)
    about = checkpoint.get('qvit')
    if about is None and model is None:
        raise UserError(f'{path} does not say which network it holds: pack it first, deploy.py pack --model NAME')
    if about is None:
        about = _describe(checkpoint, model)
    elif model not in (None, about['model']):
        raise UserError(f'model is {about["model"]} in {path}: leave --model out')
    return about, create_from_checkpoint({**checkpoint, 'qvit': about}).eval()


def _describe(checkpoint: dict, model: str) -> dict[str, Any]:
    """The description of a checkpoint without one: its tensors tell class count and image size."""
    if not timm.is_model(model):
        raise UserError(f'--model {model} is unknown: {closest(model, timm.list_models())}')
    state = checkpoint.get('model', checkpoint)
    head, positions, filters = (state.get(name) for name in ('head.weight', 'pos_embed', 'patch_embed.proj.weight'))
    if head is None or positions is None or filters is None:
        raise UserError('the checkpoint holds no vision transformer: head, position or patch embedding is missing')
    side = round((positions.shape[1] - 2) ** 0.5)  # 2: the class and the distillation token
    return model_info(model, {}, len(head), side * filters.shape[-1])


def load_quantized_network(path: str, model: str | None = None) -> tuple[dict[str, Any], QVisionTransformer]:
    """`load`, of a quantized network only."""
    about, network = load(path, model)
    if not isinstance(network, QVisionTransformer):
        raise UserError(f'{path} holds {about["model"]}, which is not quantized: give a quantized checkpoint')
    return about, network


def build_predictor(model: QVisionTransformer, args: Namespace) -> Callable[[Tensor], Tensor]:
    """Images (B, 3, H, W) -> logits (B, classes), in the arithmetic, on the backend and the device of the flags."""
    arithmetic, backend = args.arithmetic, args.backend
    try:
        model = model.to(args.device)
    except (AssertionError, RuntimeError) as error:
        raise UserError(f'--device {args.device} cannot be used ({" ".join(str(error).split())[:100]})') from error
    if backend == 'native' and (arithmetic == 'float' or args.device != 'cpu'):
        raise UserError('--backend native is for integers on the CPU: choose --arithmetic int8 or int8x2, no --device')
    if arithmetic == 'float':
        return model
    network = IntegerViT(model, TERMS[arithmetic])
    if backend == 'torch':
        return network
    from deployment import native  # needs a compiler, and nothing else here does

    if backend == 'auto':
        return native.fastest(network)
    try:
        return native.NativeViT(network)
    except native.NativeUnavailable as error:
        raise UserError(f'--backend native: {error}') from error


# --- pack and inspect -------------------------------------------------------------------------------------------------


def part_of(name: str, coded: bool) -> str:
    """Which of `PARTS` a tensor belongs to."""
    *path, leaf = name.split('.')
    if coded:
        return 'weight codes'
    if leaf in ('alpha', 'zero_point'):
        return 'steps and zero points'
    if any(module.startswith('norm') for module in path):
        return 'norms'
    return 'biases' if leaf == 'bias' else 'embeddings'


def bytes_by_part(packed: PackedFile, path: str | Path) -> dict[str, int]:
    """Bytes of each of `PARTS`; they add up to the file's size."""
    parts = dict.fromkeys(PARTS, 0)
    for stored in packed.stored():
        parts[part_of(stored.name, stored.name in packed.about['weights'])] += stored.bytes
    parts['header'] = os.path.getsize(path) - sum(parts.values())
    return parts


def print_parts(parts: dict[str, int]) -> None:
    total = sum(parts.values())
    for name, size in parts.items():
        print(f'  {name:22}{size:12,} bytes {100 * size / total:5.1f} %')


def run_pack(args: Namespace) -> None:
    if is_packed(args.checkpoint):
        raise UserError(f'{args.checkpoint} is packed already')
    output = args.output or Path(args.checkpoint).with_suffix(f'.qvit{SUFFIX}')
    if output.suffix != SUFFIX:
        raise UserError(f'--output {output}: choose a name that ends in {SUFFIX}')
    about, model = load_quantized_network(args.checkpoint, args.model)
    packed = write_packed(model, about, output)
    # As float32 all of the checkpoint's `model` entry, the steps included, which the packed file has, too.
    full, size = sum(4 * value.numel() for value in model.state_dict().values()), os.path.getsize(output)
    print(f'{output}: {size / 1e6:.2f} MB, {full / size:.2f} times smaller than the {full / 1e6:.2f} MB of float32 in '
          f'{args.checkpoint}')
    print_parts(bytes_by_part(packed, output))


def tensor_rows(packed: PackedFile, size: int) -> list[dict[str, Any]]:
    """Of every tensor its name, part, bits, shape, bytes, share of the file's `size`, and smallest and largest value:
    integer codes where it is coded."""
    rows = []
    for stored in packed.stored():
        values, coded = packed.tensors[stored.name], stored.name in packed.about['weights']
        if coded:
            values = unpack_codes(values, stored.bits, torch.Size(stored.shape).numel())
        low, high = (values.min().item(), values.max().item()) if values.numel() else (None, None)
        rows.append({'name': stored.name, 'part': part_of(stored.name, coded), 'bits': stored.bits,
                     'shape': list(stored.shape), 'bytes': stored.bytes, 'share': stored.bytes / size,
                     'min': low, 'max': high})
    return rows


def run_inspect(args: Namespace) -> None:
    packed, size = read_packed(args.file), os.path.getsize(args.file)
    parts, rows = bytes_by_part(packed, args.file), tensor_rows(packed, size)
    about = {key: value for key, value in packed.about.items() if key not in ('weights', 'activations')}
    if args.json:
        print(json.dumps({'file': args.file, 'bytes': size, 'description': about, 'parts': parts,
                          'activations': packed.about['activations'], 'tensors': rows}, indent=2))
        return
    options = ', '.join(f'{key}={value}' for key, value in about['kwargs'].items())
    print(f'{args.file}: {size:,} bytes\n{about["model"]}' + (f' with {options}' if options else '')
          + f', {about["num_classes"]} classes, {about["input_size"]} px, '
          f'data set {about.get("data_set") or "not named"}\n')
    width = max(len(row['name']) for row in rows)
    print(f'{"tensor":{width}}  bits  {"shape":>18}  {"bytes":>9}  share  range of values, or of codes')
    for row in rows:
        ends = 'empty' if row['min'] is None else f'{row["min"]:.4g} to {row["max"]:.4g}'
        print(f'{row["name"]:{width}}  {row["bits"]:4}  {" x ".join(map(str, row["shape"])):>18}  {row["bytes"]:9,}  '
              f'{100 * row["share"]:4.1f}%  {ends}')
    print()
    print_parts(parts)


# --- eval -------------------------------------------------------------------------------------------------------------


def build_data(args: Namespace, about: dict[str, Any]) -> DataLoader:
    """The evaluation images of the flags, labelled as main.py labels them; evenly spread ones with --limit."""
    args.data_set = args.data_set or about.get('data_set') or ('DIGITS' if args.data_path is None else 'IMNET')
    if args.data_set != 'DIGITS' and args.data_path is None:
        raise UserError(f'{args.file} is of {args.data_set}: pass its --data-path')
    args.input_size, args.nb_classes = about['input_size'], about['num_classes']
    dataset, num_classes = build_dataset(False, args)
    if num_classes != about['num_classes']:
        raise UserError(f'{args.file} has {about["num_classes"]} classes, {args.data_set} has {num_classes}: choose '
                        'the data set of its classes')
    if about.get('classes') not in (None, list(dataset.classes)):
        print('warning: the classes of the data set have other names than those that the network was trained on')
    if args.limit is not None and args.limit < len(dataset):
        dataset = Subset(dataset, [index * len(dataset) // args.limit for index in range(args.limit)])
    return build_eval_loader(args, dataset)


def evaluate_labels(predict: Callable[[Tensor], Tensor], loader: Iterable, args: Namespace, header: str,
                    ) -> tuple[dict[str, float], Tensor]:
    """`engine.evaluate`'s statistics, and the class predicted for every image, (n,)."""
    labels = []

    def predict_and_note(images: Tensor) -> Tensor:
        logits = predict(images)
        labels.append(logits.argmax(1))
        return logits

    return evaluate(predict_and_note, loader, torch.device(args.device), args, header=header), torch.cat(labels)


def run_eval(args: Namespace) -> None:
    for name in ('batch_size', 'limit', 'print_freq'):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            raise UserError(f'--{name.replace("_", "-")} {getattr(args, name)}: choose a value of at least 1')
    # One process, in float32 where not in integers: what build.py and engine.py ask of main.py's flags.
    vars(args).update(seed=0, pin_mem=False, dist_eval=False, world_size=1, rank=0, amp='none')
    about, model = load_quantized_network(args.file)
    loader = build_data(args, about)
    stats, labels = evaluate_labels(build_predictor(model, args), loader, args, 'Test:')
    print(f'Accuracy of the network in {args.arithmetic} on the {stats["n"]} test images: {stats["acc1"]:.1f}%')
    if args.checkpoint is None:
        return
    theirs, checkpoint = load_quantized_network(args.checkpoint)
    if theirs['num_classes'] != about['num_classes'] or theirs['input_size'] != about['input_size']:
        raise UserError(f'--checkpoint {args.checkpoint} has other classes or another image size than {args.file}')
    stats, reference = evaluate_labels(checkpoint.to(args.device), loader, args, 'Checkpoint:')
    print(f'Accuracy of the checkpoint, simulated in float32: {stats["acc1"]:.1f}%')
    same = int((labels == reference).sum())
    print(f'Both predict the same class for {same} of {len(labels)} images: {100 * same / len(labels):.1f}%')


# --- predict and onnx -------------------------------------------------------------------------------------------------


def class_names(about: dict[str, Any]) -> list[str]:
    """A readable name of each class: those of ImageNet's are in timm, others in the file, or else their numbers."""
    info, classes = ImageNetInfo(), about.get('classes')
    if classes is None and about['num_classes'] == info.num_classes():
        classes = info.label_names()
    classes = classes or [f'class {index}' for index in range(about['num_classes'])]
    known = set(info.label_names())
    return [f'{info.label_name_to_description(name)} ({name})' if name in known else name for name in classes]


def run_predict(args: Namespace) -> None:
    if args.top < 1:
        raise UserError(f'--top {args.top}: choose a value of at least 1')
    about, model = load_quantized_network(args.packed)
    transform = build_transform(False, Namespace(data_set=about.get('data_set') or 'IMNET',
                                                 input_size=about['input_size']))
    names, predict = class_names(about), build_predictor(model, args)
    for path in args.image:
        try:
            image = pil_loader(path)
        except Exception as error:  # decoders raise nearly anything on a damaged file
            raise UserError(f'{path} is not a readable image ({type(error).__name__})') from error
        with torch.no_grad():
            shares = predict(transform(image)[None].to(args.device))[0].softmax(-1).cpu()
        print(path)
        for share, label in zip(*shares.topk(min(args.top, len(names))), strict=True):
            print(f'  {100 * share:5.1f} %  {names[label]}')


def run_onnx(args: Namespace) -> None:
    from deployment.onnx_export import export_onnx  # needs onnx, and nothing else here does

    about, model = load(args.file)
    if isinstance(model, QVisionTransformer):
        export_onnx(IntegerViT(model), args.output, weights=args.weights, quantized=model, about=about)
    else:
        export_onnx(model, args.output, about=about)
    print(f'{args.output}: {os.path.getsize(args.output) / 1e6:.2f} MB, {about["model"]}')


def run_bench(args: Namespace) -> None:
    about, model = (None, None) if args.file is None else load_quantized_network(args.file)
    deploy_bench.run(args, about, model)


# --- the command line -------------------------------------------------------------------------------------------------


def get_args_parser() -> argparse.ArgumentParser:
    parser = Parser(prog='deploy.py', description=__doc__, allow_abbrev=False,
                     formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest='command', required=True, metavar='COMMAND')

    def command(run: Callable[[Namespace], None], summary: str, text: str) -> Callable[..., argparse.Action]:
        sub = commands.add_parser(run.__name__.removeprefix('run_'), help=summary, allow_abbrev=False,
                                  description=f'{summary[0].upper()}{summary[1:]}.\n\n{text}',
                                  formatter_class=argparse.RawDescriptionHelpFormatter)
        sub.set_defaults(run=run)
        return sub.add_argument

    def add_arithmetic(add: Callable[..., argparse.Action]) -> None:
        add('--arithmetic', default='int8', choices=(*TERMS, 'float'),
            help='int8: integer products, steps per channel folded into 8-bit weights; int8x2: into two 8-bit terms, '
                 'twice the work, nearly exact; float: simulated in float32, exact (default: %(default)s)')
        add('--backend', default='auto', choices=('auto', 'native', 'torch'),
            help='native: compiled kernels, torch: plain PyTorch, auto: the former where they can be compiled '
                 '(default: %(default)s)')
        add('--device', default='cpu', help='cuda: plain PyTorch there (default: %(default)s)')

    add = command(run_pack, 'write a checkpoint as a packed file', '''\
Weight codes take as many bits as they have; nothing that evaluation does not need is kept.

  python deploy.py pack out/best_checkpoint.pth
  python deploy.py pack best_checkpoint_4bit.pth --model fourbits_deit_tiny_patch16_224    a released file''')
    add('checkpoint', metavar='CHECKPOINT', help='of a quantized network')
    add('--model', metavar='NAME', help='the network, where the checkpoint does not say it, as the released ones')
    add('--output', type=Path, metavar='FILE',
        help=f'a name in {SUFFIX}; the checkpoint\'s in .qvit{SUFFIX} unless given')

    add = command(run_inspect, 'say what is in a packed file', '''\
Of every tensor its bits, shape, bytes, share of the file and range; then the bytes by kind.

  python deploy.py inspect out/best_checkpoint.qvit.safetensors''')
    add('file', metavar='FILE', help='packed file')
    add('--json', action='store_true', help='as JSON')

    add = command(run_eval, 'measure the accuracy of a packed file', '''\
Images, crop and labels are those of main.py --eval.

  python deploy.py eval FILE --data-path DIR
  python deploy.py eval FILE --data-path DIR --checkpoint out/best_checkpoint.pth    agreement with the checkpoint
  python deploy.py eval FILE --data-path DIR --arithmetic float                      exactly the checkpoint's logits''')
    add('file', metavar='FILE', help='packed file, or a checkpoint')
    add('--checkpoint', metavar='FILE', help='also evaluate this one, and say how often the two agree')
    add_arithmetic(add)
    add('--limit', type=int, metavar='N', help='N images, evenly spread')
    add('--batch-size', default=64, type=int, help='as for main.py, which evaluates 1.5 times as many (default: 64)')
    add('--data-path', help='folder of the data set')
    add('--data-set', choices=DATASETS, help='that of the file unless given')
    add('--inat-category', default='name', help='(default: %(default)s)')
    add('--eval-crop-ratio', default=0.875, type=float, help='(default: %(default)s)')
    add('--num_workers', '--num-workers', default=min(10, os.cpu_count() or 1), type=int, help='(here: %(default)s)')
    add('--print-freq', default=10, type=int, help='batches between log lines (default: %(default)s)')

    add = command(run_predict, 'say what is in pictures', '''\
The likeliest classes of each picture, with their probabilities.

  python deploy.py predict photo.jpg other.png --packed FILE --top 3''')
    add('image', nargs='+', metavar='IMAGE', help='picture file')
    add('--packed', required=True, metavar='FILE', help='packed file, or a checkpoint')
    add('--top', default=5, type=int, metavar='K', help='how many classes to name (default: %(default)s)')
    add_arithmetic(add)

    add = command(run_onnx, 'export a packed file to ONNX', '''\
Integer weights with QuantizeLinear and DequantizeLinear, which ONNX runtimes turn into integer products. A checkpoint
of a full-precision DeiT is exported as it is.

  python deploy.py onnx FILE --output model.onnx''')
    add('file', metavar='FILE', help='packed file, or a checkpoint')
    add('--output', required=True, metavar='FILE')
    add('--weights', default='int8', choices=('int8', 'int4'), help='how weights are stored (default: %(default)s)')

    deploy_bench.add_arguments(command(run_bench, deploy_bench.SUMMARY, deploy_bench.HELP))
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line; returns its exit status."""
    try:
        args = get_args_parser().parse_args(argv)
        args.run(args)
    except UserError as error:
        report(error)
        traceback.clear_frames(error.__traceback__)  # lets go of data loaders, which end their workers
        return 2
    return 0


if __name__ == '__main__':
    sys.exit(main())
