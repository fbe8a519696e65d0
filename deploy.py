"""Deploys a trained Q-ViT: packs it, evaluates and uses the packed file, exports it, measures its speed.

    python deploy.py pack out/best_checkpoint.pth            a packed file, out/best_checkpoint.qvit.safetensors
    python deploy.py inspect FILE                            what is in it
    python deploy.py eval FILE --data-path DIR               its accuracy, in integer arithmetic
    python deploy.py predict photo.jpg --packed FILE         what is in a picture
    python deploy.py onnx FILE --output model.onnx           the same network for other runtimes
    python deploy.py bench FILE                              its speed here, beside full precision
    python deploy.py push FILE OWNER/NAME                    to the Hugging Face hub; pull OWNER/NAME fetches it

FILE is a packed file; all but inspect take a checkpoint that says which network it holds in its place.
`python deploy.py COMMAND --help` explains each; docs/deploy.md explains the rest.
"""

import argparse
import json
import os
import sys
from argparse import Namespace
from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch.utils.data import DataLoader

import models  # noqa: F401  (registers full-precision networks)
import quant_vision_transformer  # noqa: F401  (registers the quantized ones)
from benchmarks import inference
from checkpoints.networks import ModelInfo, open_network
from console.parser import Parser, file_path, path_text
from datasets import build_transform, choose_data_set
from deployment import evaluation, packing, predictor
from engine import evaluate
from models import is_quantized
from training.data import Loading, build_eval_dataset, build_eval_loader, source_of
from training.flags import add_data_arguments, crop_ratio, positive_int, workers
from utils import Ranks, UserError, entry_point, pick, printable


def run_pack(args: Namespace) -> None:
    print(packing.pack(args.checkpoint, args.model, args.output))


def run_inspect(args: Namespace) -> None:
    found = packing.inspect(args.file)
    print(json.dumps(found, indent=2) if args.json else packing.inspection_text(found))


def build_loader(args: Namespace, info: ModelInfo) -> DataLoader:
    """The evaluation images of the flags, labelled as main.py labels them; evenly spread ones with --limit."""
    data_set = choose_data_set(args.data_set, args.data_path, info.data_set, args.file)
    source = source_of(info, vars(args) | {'data_set': data_set})
    dataset = build_eval_dataset(source, info.num_classes)
    evaluation.check_classes(args.file, info, args.data_path or data_set, dataset.classes)
    loading = Loading(args.batch_size, args.num_workers, pin_mem=False)
    return build_eval_loader(evaluation.evenly_spread(dataset, args.limit), loading, Ranks(), torch.device('cpu'))


def run_eval(args: Namespace) -> None:
    info, model, _ = open_network(args.file, args.model)
    loader = build_loader(args, info)
    predict = predictor.build_predictor(model, args.arithmetic, args.backend, args.device)
    measure = partial(evaluate, loader=loader, device=torch.device(args.device), print_freq=args.print_freq)
    ours = evaluation.evaluate_classes(measure, predict)
    arithmetic = args.arithmetic if is_quantized(model) else 'float32'
    print(f'Accuracy of the network in {arithmetic} on the {ours.stats["n"]} test images: '
          f'{ours.stats["acc1"]:.1f}%')
    if args.checkpoint is None:
        return
    other, checkpoint, _ = open_network(args.checkpoint, args.model)
    evaluation.check_comparable(args.file, info, args.checkpoint, other)
    theirs = evaluation.evaluate_classes(partial(measure, header='Checkpoint:'), checkpoint.to(args.device))
    print(f'Accuracy of the checkpoint, simulated in float32: {theirs.stats["acc1"]:.1f}%')
    print(evaluation.agreement(ours, theirs))


def run_predict(args: Namespace) -> None:
    info, model, _ = open_network(args.packed, args.model)
    transform = build_transform(False, info.input_size, info.data_set or 'IMNET', normalization=info.normalization)
    names = predictor.class_names(info)
    predict = predictor.build_predictor(model, args.arithmetic, args.backend, args.device)
    for file in args.image:
        image = transform(predictor.read_picture(file)).to(args.device)
        print(printable(file))
        for probability, name in predictor.likeliest(predict, image, names, args.top):
            print(f'  {100 * probability:5.1f} %  {name}')


def run_onnx(args: Namespace) -> None:
    from deployment.onnx_export import export_onnx  # no other command needs onnx

    info, model, _ = open_network(args.file, args.model)
    if is_quantized(model):
        export_onnx(predictor.integer_network(model), args.output, weights=args.weights or 'int8', quantized=model,
                    info=info)
    elif args.weights is not None:
        raise UserError(f'--weights {args.weights}: {args.file} is of full precision, which has no codes: leave it out')
    else:
        export_onnx(model, args.output, info=info)
    print(f'{args.output}: {os.path.getsize(args.output) / 1e6:.2f} MB, {info.model}')


def run_bench(args: Namespace) -> None:
    conditions = pick(inference.Conditions, vars(args))
    inference.check_folders(args.markdown, args.json)
    opened = inference.random_network(args.model or inference.DEFAULT_MODEL) if args.file is None else (
        predictor.open_quantized(args.file, args.model))
    found = inference.measure_network(opened.info, opened.model, args.file or 'random weights', conditions)
    inference.write(found, conditions.batch_sizes, args.markdown, args.json)


def run_push(args: Namespace) -> None:
    from deployment import hub  # no other command needs it, nor the package

    print(f'{args.file} -> {hub.push(args.file, args.repo, args.private, args.model)}')


def run_pull(args: Namespace) -> None:
    from deployment import hub

    print(f'{args.repo} -> {hub.pull(args.repo, args.output, args.revision)}')


NAMED = {'metavar': 'NAME', 'help': 'the network, where the file does not say it, as released ones and DeiT\'s'}


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

    add = command(run_pack, 'write a checkpoint as a packed file', '''\
Weight codes take as many bits as they have; nothing that evaluation does not need is kept.

  python deploy.py pack out/best_checkpoint.pth
  python deploy.py pack best_checkpoint_4bit.pth --model fourbits_deit_tiny_patch16_224    a released file''')
    add('checkpoint', metavar='CHECKPOINT', type=path_text, help='of a quantized network')
    add('--model', **NAMED)
    add('--output', type=file_path, metavar='FILE',
        help=f'a name in {packing.SUFFIX}; the checkpoint\'s in .qvit{packing.SUFFIX} unless given')

    add = command(run_inspect, 'say what is in a packed file', '''\
Of every tensor its bits, shape, bytes, share of the file and range; then the bytes by kind.

  python deploy.py inspect out/best_checkpoint.qvit.safetensors''')
    add('file', metavar='FILE', type=path_text, help='packed file')
    add('--json', action='store_true', help='as JSON')

    add = command(run_eval, 'measure the accuracy of a packed file', '''\
Images, crop and labels are those of main.py --eval.

  python deploy.py eval FILE --data-path DIR
  python deploy.py eval FILE --data-path DIR --checkpoint out/best_checkpoint.pth    agreement with the checkpoint
  python deploy.py eval FILE --data-path DIR --arithmetic float                      exactly the checkpoint's logits''')
    add('file', metavar='FILE', type=path_text, help='packed file, or a checkpoint')
    add('--checkpoint', metavar='FILE', type=path_text, help='also evaluate this one, and say how often the two agree')
    add('--model', **NAMED)
    predictor.add_arguments(add)
    add('--limit', type=positive_int, metavar='N', help='N images, evenly spread')
    add('--batch-size', default=64, type=positive_int,
        help='as for main.py, which evaluates 1.5 times as many (default: 64)')
    add_data_arguments(add, 'that of the file unless given')
    add('--eval-crop-ratio', default=0.875, type=crop_ratio, help='(default: %(default)s)')
    add('--num_workers', default=min(10, os.cpu_count() or 1), type=workers,
        help='(here: %(default)s)')
    add('--print-freq', default=10, type=positive_int, help='batches between log lines (default: %(default)s)')

    add = command(run_predict, 'say what is in pictures', '''\
The likeliest classes of each picture, with their probabilities.

  python deploy.py predict photo.jpg other.png --packed FILE --top 3''')
    add('image', nargs='+', metavar='IMAGE', type=path_text, help='picture file')
    add('--packed', required=True, metavar='FILE', type=path_text, help='packed file, or a checkpoint')
    add('--top', default=5, type=positive_int, metavar='K', help='how many classes to name (default: %(default)s)')
    add('--model', **NAMED)
    predictor.add_arguments(add)

    add = command(run_onnx, 'export a packed file to ONNX', '''\
Integer weights with QuantizeLinear and DequantizeLinear, which ONNX runtimes turn into integer products. A checkpoint
of a full-precision DeiT is exported as it is.

  python deploy.py onnx FILE --output model.onnx''')
    add('file', metavar='FILE', type=path_text, help='packed file, or a checkpoint')
    add('--output', required=True, metavar='FILE', type=path_text)
    add('--model', **NAMED)
    add('--weights', choices=('int8', 'int4'), help='how weights of a quantized network are stored (default: int8)')

    add = command(run_push, 'upload a checkpoint or a packed file to the Hugging Face hub', '''\
As safetensors, with config.json as timm writes it and the model card as README.md.

  python deploy.py push out/best_checkpoint.pth me/flowers-4bit''')
    add('file', metavar='FILE', type=file_path, help='checkpoint, or packed file')
    add('repo', metavar='OWNER/NAME')
    add('--model', **NAMED)
    add('--private', action='store_true', help='a new repository is not shown to others')

    add = command(run_pull, 'download what push uploaded', '''\
  python deploy.py pull me/flowers-4bit --output flowers.pth''')
    add('repo', metavar='OWNER/NAME')
    add('--output', type=file_path, metavar='FILE',
        help="the repository's name in .pth or .qvit.safetensors unless given")
    add('--revision', metavar='NAME', help='branch, tag or commit')

    inference.add_arguments(command(run_bench, inference.SUMMARY, inference.HELP))
    return parser


@entry_point
def main(argv: Sequence[str] | None = None) -> None:
    """Runs the command line; returns its exit status."""
    args = get_args_parser().parse_args(argv)
    args.run(args)


if __name__ == '__main__':
    sys.exit(main())
