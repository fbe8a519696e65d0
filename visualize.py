"""Pictures of what quantization does to a network: q and k, attention, attention distance, codes, training curves.

    python visualize.py COMMAND --help          qk, attention, distance, codes, curves

Networks come from checkpoints (`--resume`), images from files or from a data set's evaluation part. `analysis` computes
what is drawn, and draws it.
"""
import sys
from argparse import ArgumentParser, Namespace, RawDescriptionHelpFormatter
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

from torch import Tensor, nn

from _quan_base import is_calibrated
from analysis import inspection
from analysis.images import stacked, to_pictures
from checkpoints.descriptions import check_options, check_registered
from checkpoints.networks import ModelInfo, open_network
from console.parser import Parser, file_path, key_value, path_text
from datasets import ImageList, choose_data_set
from files.paths import check_file
from models import network_blocks
from training.data import build_eval_dataset, source_of
from training.flags import add_data_arguments, crop_ratio, image_size, positive_int
from training.networks import build_teacher
from utils import UserError, entry_point

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
        command.add_argument('--output', type=file_path, metavar='FILE', default=Path(f'{name}.png'),
                             help=f'the figure, .png or .pdf (default: {name}.png)')
        if images is None:
            command.add_argument('runs', nargs='+', type=file_path, metavar='RUN',
                                 help='log.txt of a run, or its folder')
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
    add('--resume', required=True, metavar='FILE', type=path_text, help='checkpoint of the network')
    add('--model', help='its network, where the file does not say')
    add('--model-kwargs', nargs='+', default=[], type=key_value, metavar='KEY=VALUE',
        help='its options, where the file does not say')
    add('--input-size', type=image_size, help='its image size, where the file does not say (224)')
    if has_teacher:
        add('--teacher-path', metavar='FILE', type=path_text, help='checkpoint of a network to draw beside it')
        add('--teacher-model', help="that network, where the file does not say; alone: timm's pretrained weights")
    else:
        parser.set_defaults(teacher_path=None, teacher_model=None)


def _add_image_flags(parser: ArgumentParser, images: int) -> None:
    add = parser.add_argument_group('images').add_argument
    add('--images', nargs='+', type=file_path, metavar='FILE', help='image files, instead of a data set')
    add_data_arguments(add, "the checkpoint's, unless given")
    add('--num-images', type=positive_int, default=images,
        help=f'evaluation images to take, at equal distances through the data set (default: {images})')
    add('--eval-crop-ratio', type=crop_ratio, default=0.875, help='0.875, unless given')


# --- networks and images ----------------------------------------------------------------------------------------------


def check_args(args: Namespace) -> None:
    """Refuses unknown names and missing files, before any file is read."""
    for flag, name in (('--model', args.model), ('--teacher-model', args.teacher_model)):
        if name is not None:
            check_registered(name, flag)
    check_options(dict(args.model_kwargs))
    if args.data_set and not args.images:
        choose_data_set(args.data_set, args.data_path)
    for flag, path in (('--resume', args.resume), ('--teacher-path', args.teacher_path)):
        if path and not path.startswith('https://'):
            check_file(path, f'{flag} {path}')


def load_networks(args: Namespace) -> tuple[dict[str, nn.Module], ModelInfo, str]:
    """Teacher, if any, and student, by what a figure calls them; the student's description; the data set's name."""
    info, student, _ = open_network(args.resume, args.model, model_kwargs=dict(args.model_kwargs),
                                    input_size=args.input_size)
    if not is_calibrated(student):
        raise UserError(f'{args.resume} holds quantizers without steps: train it first')
    if args.images:  # no data set is read, its name says how images are cropped
        data_set = args.data_set or info.data_set or 'IMNET'
    else:
        data_set = choose_data_set(args.data_set, args.data_path, info.data_set, args.resume)
    networks = {inspection.title(student): student}
    if args.teacher_path or args.teacher_model:
        teacher = build_teacher(args.teacher_model, args.teacher_path, info.num_classes, info.input_size, data_set,
                                info.normalization.in_chans).eval()
        depths = [len(network_blocks(model)) for model in (student, teacher)]
        if depths[0] != depths[1]:
            raise UserError(f'the network has {depths[0]} blocks, the teacher {depths[1]}: choose one of as many')
        networks = {f'teacher ({inspection.title(teacher)})': teacher, **networks}
    return networks, info, data_set


def load_images(args: Namespace, info: ModelInfo, data_set: str) -> Tensor:
    """(B, C, input_size, input_size), normalized as in evaluation, of --images or of the data set."""
    source = source_of(info, vars(args) | {'data_set': data_set})
    if args.images:
        return stacked(ImageList([(str(path), 0) for path in args.images], ['image'], source.evaluation_transform(),
                                 skip_unreadable=False, upright=True))
    return stacked(build_eval_dataset(source, info.num_classes), args.num_images)


def draw(args: Namespace, figures: ModuleType) -> Iterator[tuple[Path, Any]]:
    """The figures of the command, each with its path."""
    if args.command == 'curves':
        yield args.output, figures.curves_figure(inspection.read_logs(args.runs))
        return
    networks, info, data_set = load_networks(args)
    images = load_images(args, info, data_set)
    if args.command == 'qk':
        yield args.output, figures.qk_figure(inspection.compare_qk(networks, images, args.blocks, args.heads))
    elif args.command == 'attention':
        blocks = inspection.compare_maps(networks, images, args.blocks)
        for block, maps in blocks.items():
            path = args.output if len(blocks) == 1 else args.output.with_stem(f'{args.output.stem}_block{block}')
            yield path, figures.attention_figure(to_pictures(images, info.normalization), maps, args.per_head,
                                                 f'block {block}')
    elif args.command == 'distance':
        yield args.output, figures.distance_figure({
            name: inspection.attention_distances(model, images) for name, model in networks.items()})
    else:
        usage = inspection.code_usage(*networks.values(), images)
        print(inspection.usage_table(usage))
        yield args.output, figures.codes_figure(usage)


def import_figures() -> ModuleType:
    """`analysis.figures`, which needs matplotlib; nothing else here does."""
    try:
        from analysis import figures
    except ModuleNotFoundError as error:
        if (error.name or '').partition('.')[0] != 'matplotlib':
            raise
        raise UserError('figures need matplotlib: pip install matplotlib') from error
    return figures


@entry_point
def main(argv: Sequence[str] | None = None) -> None:
    """Runs the command line; returns its exit status."""
    args = get_args_parser().parse_args(argv)
    figures = import_figures()
    figures.check_output(args.output)
    if args.command != 'curves':
        check_args(args)
    for path, figure in draw(args, figures):
        figures.save(figure, path)
        print(f'-> {path}')


if __name__ == '__main__':
    sys.exit(main())
