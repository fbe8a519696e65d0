"""Pictures of what quantization does to a network: q and k, attention, attention distance, codes, training curves.

    python visualize.py COMMAND --help          qk, attention, distance, codes, curves

Networks come from checkpoints (`--resume`), images from files or from a data set's evaluation part. `inspection.py`
computes what is drawn, `figures.py` draws it.
"""
import sys
from argparse import ArgumentParser, Namespace, RawDescriptionHelpFormatter
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch import Tensor, nn

import models  # noqa: F401  (registers the teachers)
import quant_vision_transformer  # noqa: F401  (registers the students)
import utils
from _quan_base import is_calibrated
from analysis import inspection
from checkpoints.files import read_checkpoint
from checkpoints.networks import load_quantized
from datasets import DATASETS, ImageList, build_dataset, build_transform
from main import check_args, parse_args, resolve
from training import networks
from utils import Parser, UserError

COMMANDS = {  # name: (summary, example, images of a data set unless said otherwise)
    'qk': ('histograms and entropies of queries and keys: before and after IRM, as codes, beside the teacher\'s',
           'python visualize.py qk --resume out/best_checkpoint.pth --teacher-path teacher.pth --output qk.pdf', 16),
    'attention': ('attention of the class token over the image, student beside teacher',
                  'python visualize.py attention --resume out/best_checkpoint.pth --images cat.jpg --per-head', 4),
    'distance': ('mean attention distance of every head and block, in pixels',
                 'python visualize.py distance --resume out/best_checkpoint.pth --num-images 128', 64),
    'codes': ('share of each code, entropy and share of clipped values, for all weights and activations; also as a '
              'table on standard output',
              'python visualize.py codes --resume best_checkpoint_2bit.pth --model twobits_deit_small_patch16_224 '
              '--data-path DIR', 16),
    'curves': ('training loss and accuracy by epoch, of one or several runs',
               'python visualize.py curves out/teacher out/student --output curves.pdf', None),
}


def get_args_parser() -> ArgumentParser:
    parser = Parser(description='Pictures of what quantization does to a network.', allow_abbrev=False,
                     formatter_class=RawDescriptionHelpFormatter,
                     epilog='examples:\n' + '\n'.join(f'  {example}' for _, example, _ in COMMANDS.values()))
    commands = parser.add_subparsers(dest='command', metavar='COMMAND', required=True)
    for name, (summary, example, images) in COMMANDS.items():
        command = commands.add_parser(name, help=summary, description=f'{summary[0].upper()}{summary[1:]}.',
                                      epilog=f'example:\n  {example}', allow_abbrev=False,
                                      formatter_class=RawDescriptionHelpFormatter)
        command.add_argument('--output', type=Path, metavar='FILE', default=Path(f'{name}.png'),
                             help=f'the figure, .png or .pdf (default: {name}.png)')
        if images is None:
            command.add_argument('runs', nargs='+', type=Path, metavar='RUN', help='log.txt of a run, or its folder')
        else:
            _add_network_flags(command, has_teacher=name != 'codes')
            _add_image_flags(command, images)
    for name in ('qk', 'attention'):
        command = commands.choices[name]
        command.add_argument('--blocks', nargs='+', type=int, metavar='N', default=[0, -1] if name == 'qk' else [-1],
                             help='blocks, from 0; -1 is the last (default: ' + ('first and last)' if name == 'qk' else
                                                                               'last; one figure for each)'))
    commands.choices['qk'].add_argument('--heads', nargs='+', type=int, metavar='N',
                                        help='heads, from 0, taken together (default: all)')
    commands.choices['attention'].add_argument('--per-head', action='store_true', help='also draw each head')
    return parser


def _add_network_flags(parser: ArgumentParser, has_teacher: bool) -> None:
    add = parser.add_argument_group('networks').add_argument
    add('--resume', required=True, metavar='FILE', help='checkpoint of the network')
    add('--model', help='its network, where the file does not say')
    add('--model-kwargs', nargs='+', metavar='KEY=VALUE', help='its options, where the file does not say')
    add('--input-size', help='its image size, where the file does not say (224)')
    if has_teacher:
        add('--teacher-path', metavar='FILE', help='checkpoint of a network to draw beside it')
        add('--teacher-model', help="that network, where the file does not say; alone: timm's pretrained weights")
    else:
        parser.set_defaults(teacher_path=None, teacher_model=None)


def _add_image_flags(parser: ArgumentParser, images: int) -> None:
    add = parser.add_argument_group('images').add_argument
    add('--images', nargs='+', type=Path, metavar='FILE', help='image files, instead of a data set')
    add('--data-set', metavar='NAME', help=f'{", ".join(DATASETS)}; the checkpoint\'s, unless given')
    add('--data-path', help='folder of the data set')
    add('--inat-category', help='name, unless given')
    add('--num-images', type=int, default=images,
        help=f'evaluation images to take, at equal distances through the data set (default: {images})')
    add('--eval-crop-ratio', help='0.875, unless given')


# --- networks and images ----------------------------------------------------------------------------------------------


def as_of_main(args: Namespace) -> Namespace:
    """The flags, with those that main.py has parsed and checked as there, and its defaults for all others.

    Raises:
        UserError: one of them is wrong.
    """
    if args.images:
        args.data_path = args.data_path or '.'  # main.py asks for one, and nothing is read from it
    flags = ['--eval', f'--resume={args.resume}']
    for name in ('model', 'input_size', 'teacher_path', 'teacher_model', 'data_set', 'data_path', 'inat_category',
                 'eval_crop_ratio'):
        if getattr(args, name) is not None:
            flags.append(f'--{name.replace("_", "-")}={getattr(args, name)}')
    known = parse_args([*flags, *(['--model-kwargs', *args.model_kwargs] if args.model_kwargs else [])])
    check_args(known)
    return Namespace(**(vars(args) | vars(known)))


def load_network(args: Namespace) -> nn.Module:
    """The network of the checkpoint `--resume`, in evaluation mode; settles model, input_size and data_set in args.

    Raises:
        UserError: the file is damaged, does not fit, or holds quantizers without steps.
    """
    checkpoint = read_checkpoint(args.resume)
    resolve(args, checkpoint)
    about, head = checkpoint.get('qvit', {}), checkpoint.get('model', checkpoint).get('head.weight')
    args.nb_classes = about.get('num_classes', 0 if head is None else len(head))
    model = networks.build_student(args, args.nb_classes)
    load_quantized(model, checkpoint)
    if not is_calibrated(model):
        raise UserError(f'{args.resume} holds quantizers without steps: train it first')
    return model.eval()


def load_teacher(args: Namespace) -> nn.Module | None:
    """The network that --teacher-path and --teacher-model name, None without either."""
    if not (args.teacher_path or args.teacher_model):
        return None
    args.distillation_type = 'hard'  # any that has a teacher
    return networks.build_teacher(args, args.nb_classes).eval()


def load_images(args: Namespace) -> Tensor:
    """(B, 3, input_size, input_size), normalized as in evaluation, of --images or of the data set.

    Raises:
        UserError: an unreadable file, or no data.
    """
    if args.images:
        samples = [(str(path), 0) for path in args.images]
        chosen = ImageList(samples, ['image'], build_transform(False, args), skip_unreadable=False)
        indices = range(len(chosen))
    else:
        if args.num_images < 1:
            raise UserError(f'--num-images {args.num_images}: choose a value of at least 1')
        chosen, _ = build_dataset(False, args)
        indices = np.linspace(0, len(chosen) - 1, min(args.num_images, len(chosen))).round().astype(int).tolist()
    return torch.stack([chosen[index][0] for index in indices])


def to_pictures(images: Tensor) -> np.ndarray:
    """Normalized images (B, 3, H, W) as pictures (B, H, W, 3) from 0 to 1."""
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD))
    return (images * std + mean).clamp(0, 1).permute(0, 2, 3, 1).numpy()


def _chosen(flag: str, chosen: Sequence[int], count: int) -> list[int]:
    """The chosen numbers counted from 0, negative ones from the end.

    Raises:
        UserError: one is out of range.
    """
    for number in chosen:
        if not -count <= number < count:
            raise UserError(f'{flag} {number}: there are {count}, from 0 to {count - 1}')
    return [number % count for number in chosen]


# --- the commands -----------------------------------------------------------------------------------------------------


def _networks(args: Namespace) -> dict[str, nn.Module]:
    """Teacher, if any, and student, by what a figure calls them."""
    student, teacher = load_network(args), load_teacher(args)
    if teacher is None:
        return {_title(student): student}
    depths = [len(getattr(model, 'blocks', [])) for model in (student, teacher)]
    if depths[0] != depths[1]:
        raise UserError(f'the network has {depths[0]} blocks, the teacher {depths[1]}: choose one of as many')
    return {f'teacher ({_title(teacher)})': teacher, _title(student): student}


def _title(model: nn.Module) -> str:
    """'4 bits', '2-bit weights, 4-bit activations', or 'full precision'."""
    quant = getattr(model, 'quant', None)
    if quant is None:
        return 'full precision'
    if quant.weight_bits == quant.act_bits:
        return f'{quant.act_bits} bits'
    return f'{quant.weight_bits}-bit weights, {quant.act_bits}-bit activations'


def _save(figures: ModuleType, figure: Any, path: Path) -> None:
    figures.save(figure, path)
    print(f'-> {path}')


def draw_qk(args: Namespace, figures: ModuleType) -> None:
    networks = _networks(args)
    images = load_images(args)
    *_, student = networks.values()
    blocks = _chosen('--blocks', args.blocks, len(student.blocks))
    rows: list[dict] = [{} for _ in range(2 * len(blocks))]
    for model in networks.values():
        heads_there = model.blocks[0].attn.num_heads
        heads = range(heads_there) if args.heads is None else _chosen('--heads', args.heads, heads_there)
        for row, found in zip(rows, inspection.qk_distributions(model, images, blocks, heads), strict=True):
            row.update({stage if model is student else f'teacher: {stage}': value for stage, value in found.items()})
    labels = [f'{name}, block {block}' for block in blocks for name in ('q', 'k')]
    _save(figures, figures.qk_figure(dict(zip(labels, rows, strict=True))), args.output)


def draw_attention(args: Namespace, figures: ModuleType) -> None:
    networks = _networks(args)
    images = load_images(args)
    *_, student = networks.values()
    blocks = _chosen('--blocks', args.blocks, len(student.blocks))
    for block in blocks:
        maps = {name: inspection.class_token_maps(model, images, block).numpy() for name, model in networks.items()}
        path = args.output if len(blocks) == 1 else args.output.with_stem(f'{args.output.stem}_block{block}')
        _save(figures, figures.attention_figure(to_pictures(images), maps, args.per_head), path)


def draw_distance(args: Namespace, figures: ModuleType) -> None:
    networks = _networks(args)
    images = load_images(args)
    distances = {name: inspection.attention_distances(model, images) for name, model in networks.items()}
    _save(figures, figures.distance_figure(distances), args.output)


def draw_codes(args: Namespace, figures: ModuleType) -> None:
    model = load_network(args)
    usage = inspection.code_usage(model, load_images(args))
    print(f'{"quantizer":<28} {"bits":>4} {"entropy":>7} {"of bits":>7} {"clipped":>7}')
    for name, item in usage.items():
        print(f'{name:<28} {item.distribution.bits:>4} {item.distribution.entropy:>7.2f} '
              f'{item.relative_entropy:>7.1%} {item.clipped:>7.2%}')
    _save(figures, figures.codes_figure(usage), args.output)


def draw_curves(args: Namespace, figures: ModuleType) -> None:
    logs = {path: inspection.read_log(path) for path in dict.fromkeys(args.runs)}
    names = [(path if path.suffix != '.txt' else path.parent).resolve().name for path in logs]
    if len(set(names)) < len(names):  # say more where the folders' own names do not tell the runs apart
        names = list(map(str, logs))
    _save(figures, figures.curves_figure(dict(zip(names, logs.values(), strict=True))), args.output)


def import_figures() -> ModuleType:
    """`figures.py`, which needs matplotlib; nothing else here does."""
    try:
        from analysis import figures
    except ModuleNotFoundError as error:
        if (error.name or '').partition('.')[0] != 'matplotlib':
            raise
        raise UserError('figures need matplotlib: pip install matplotlib') from error
    return figures


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line; returns its exit status."""
    try:
        args = get_args_parser().parse_args(argv)
        figures = import_figures()
        figures.check_output(args.output)
        draw = {'qk': draw_qk, 'attention': draw_attention, 'distance': draw_distance, 'codes': draw_codes,
                'curves': draw_curves}
        draw[args.command](args if args.command == 'curves' else as_of_main(args), figures)
    except UserError as error:
        utils.report(error)
        return 2
    return 0


if __name__ == '__main__':
    sys.exit(main())
