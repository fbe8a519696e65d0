"""From an image to a prediction, and a picture of where the network looked.

    python examples/predict_and_look.py cat.jpg --resume out/best_checkpoint.pth --output look.png
    python examples/predict_and_look.py cat.jpg --resume best_checkpoint_2bit.pth --model twobits_deit_small_patch16_224

Prints the five likeliest classes, by their names where the file or timm knows them, and draws the attention of the
class token in the last block over the image. Needs matplotlib.
"""
import argparse
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from analysis.images import to_pictures  # noqa: E402
from analysis.inspection import class_token_maps  # noqa: E402
from checkpoints.networks import open_network  # noqa: E402
from console.parser import Parser, file_path, path_text  # noqa: E402
from datasets import build_transform  # noqa: E402
from deployment.predictor import class_names, likeliest, read_picture  # noqa: E402
from utils import entry_point  # noqa: E402
from visualize import import_figures  # noqa: E402


def predict_and_look(image_file: str, network_file: str, model_name: str | None, output: Path) -> None:
    figures = import_figures()
    figures.check_output(output)
    info, model, _ = open_network(network_file, model_name)
    transform = build_transform(False, info.input_size, info.data_set or 'IMNET', normalization=info.normalization)
    image = transform(read_picture(image_file))                            # (C, H, W), normalized
    with torch.inference_mode():
        for probability, name in likeliest(model, image, class_names(info), top=5):
            print(f'{probability:6.1%}  {name}')
        maps = class_token_maps(model, image[None], block=-1).numpy()      # (1, heads, rows, columns)
    pictures = to_pictures(image[None], info.normalization)
    figures.save(figures.attention_figure(pictures, {'mean of the heads': maps}, False, 'last block'), output)
    print(f'-> {output}')


@entry_point
def main() -> None:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('image', metavar='IMAGE', type=path_text, help='an image file')
    parser.add_argument('--resume', required=True, metavar='FILE', type=path_text,
                        help='checkpoint or packed file of the network')
    parser.add_argument('--model', help='its network, where the file does not say')
    parser.add_argument('--output', type=file_path, default=Path('look.png'), help='the picture, .png or .pdf')
    args = parser.parse_args()
    predict_and_look(args.image, args.resume, args.model, args.output)


if __name__ == '__main__':
    sys.exit(main())
