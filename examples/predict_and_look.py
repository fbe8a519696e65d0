"""From an image to a prediction, and a picture of where the network looked.

    python examples/predict_and_look.py cat.jpg --resume out/best_checkpoint.pth --output look.png
    python examples/predict_and_look.py cat.jpg --resume best_checkpoint_2bit.pth --model twobits_deit_small_patch16_224

Prints the five likeliest classes, by their names in the checkpoint (else by number), and draws the attention of the
class token in the last block over the image. Needs matplotlib.
"""
import argparse
import sys
from pathlib import Path

import timm
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import models  # noqa: E402, F401  registers the full-precision networks
import quant_vision_transformer  # noqa: E402, F401  registers the quantized ones
from analysis.inspection import class_token_maps  # noqa: E402
from checkpoints.files import read_checkpoint  # noqa: E402
from checkpoints.networks import create_from_checkpoint, load_quantized  # noqa: E402
from datasets import ImageList, build_transform  # noqa: E402
from utils import UserError, report  # noqa: E402
from visualize import import_figures, to_pictures  # noqa: E402


def predict_and_look(image_file: str, checkpoint_file: str, model_name: str | None, output: Path) -> None:
    figures = import_figures()
    figures.check_output(output)
    checkpoint = read_checkpoint(checkpoint_file)
    about = checkpoint.get('qvit', {})      # a released file has none: it holds 1000 classes at 224 px
    if model_name and not about:
        model = timm.create_model(model_name)
        load_quantized(model, checkpoint)
    else:
        model = create_from_checkpoint(checkpoint)
    model.eval()

    settings = argparse.Namespace(data_set=about.get('data_set', 'IMNET'), input_size=about.get('input_size', 224))
    files = ImageList([(image_file, 0)], ['unknown'], build_transform(False, settings), skip_unreadable=False)
    image = files[0][0][None]                                  # (1, 3, H, W), normalized
    with torch.inference_mode():
        shares, labels = model(image)[0].softmax(0).topk(min(5, model.num_classes))
    for share, label in zip(shares.tolist(), labels.tolist(), strict=True):
        print(f'{share:6.1%}  {about["classes"][label] if about.get("classes") else f"class {label}"}')

    maps = class_token_maps(model, image, block=-1).numpy()    # (1, heads, rows, columns)
    figures.save(figures.attention_figure(to_pictures(image), {'attention': maps}, per_head=False), output)
    print(f'-> {output}')


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('image', metavar='IMAGE', help='an image file')
    parser.add_argument('--resume', required=True, metavar='FILE', help='checkpoint of the network')
    parser.add_argument('--model', help='its network, where the file does not say')
    parser.add_argument('--output', type=Path, default=Path('look.png'), help='the picture, .png or .pdf')
    args = parser.parse_args()
    try:
        predict_and_look(args.image, args.resume, args.model, args.output)
    except UserError as error:
        report(error)
        return 2
    return 0


if __name__ == '__main__':
    sys.exit(main())
