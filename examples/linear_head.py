"""Trains a linear head on the frozen features of a quantized network.

    python examples/linear_head.py --resume out/best_checkpoint.pth --data-set CIFAR10 --data-path DIR
    python examples/linear_head.py --resume out/best_checkpoint.pth              the digits that ship with scikit-learn

The backbone is the network of a file as timm's `features_only=True` gives it, with its quantizers: the maps that
detection and segmentation frameworks take, (B, channels, rows, columns) of the blocks that are asked for. Here the head
reads the means of the last two. Features are computed once, so that all epochs together take seconds.
"""
import argparse
import sys
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from _quan_base import is_calibrated  # noqa: E402
from checkpoints.networks import open_features  # noqa: E402
from datasets import DATASETS, build_dataset, build_transform  # noqa: E402
from training.flags import positive, positive_int  # noqa: E402
from utils import UserError, entry_point  # noqa: E402


@torch.inference_mode()
def features(backbone: nn.Module, loader: DataLoader) -> tuple[Tensor, Tensor]:
    """(images, features) and (images,): the means of all maps over the image, one behind the other, and the labels."""
    def batches() -> Iterator[tuple[Tensor, Tensor]]:
        for images, labels in loader:
            yield torch.cat([feature.mean((2, 3)) for feature in backbone(images)], 1), labels
    found, labels = zip(*batches(), strict=True)
    return torch.cat(found), torch.cat(labels)


def train_head(x: Tensor, labels: Tensor, classes: int, epochs: int, lr: float) -> nn.Module:
    """A linear layer behind a standardization of the features, (images, features)."""
    head = nn.Sequential(nn.BatchNorm1d(x.shape[1], affine=False), nn.Linear(x.shape[1], classes)).train()
    optimizer = torch.optim.AdamW(head.parameters(), lr)
    for _ in range(epochs):
        for batch in torch.randperm(len(x)).split(256):
            if len(batch) > 1:  # a standardization needs two
                nn.functional.cross_entropy(head(x[batch]), labels[batch]).backward()
                optimizer.step()
                optimizer.zero_grad()
    return head.eval()


@entry_point
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--resume', required=True, metavar='FILE', help='checkpoint or packed file of the network')
    parser.add_argument('--model', help='its network, where the file does not say')
    parser.add_argument('--data-set', choices=DATASETS, default='DIGITS')
    parser.add_argument('--data-path', help='folder of the data set')
    parser.add_argument('--epochs', type=positive_int, default=50)
    parser.add_argument('--lr', type=positive, default=1e-2)
    args = parser.parse_args()
    torch.manual_seed(0)
    info, backbone, _ = open_features(args.resume, args.model, out_indices=2)
    if not is_calibrated(backbone):
        raise UserError(f'{args.resume} holds quantizers without steps: train it first')
    transform, found = build_transform(False, info.input_size, args.data_set), []
    for is_train in (True, False):
        dataset, classes = build_dataset(is_train, args.data_set, args.data_path, transform)
        found.append(features(backbone, DataLoader(dataset, batch_size=64)))
    (x, labels), (x_test, labels_test) = found
    print(f'{len(x)} images to learn from, {x.shape[1]} features of blocks with stride '
          f'{backbone.feature_info.reduction()[-1]}')
    head = train_head(x, labels, classes, args.epochs, args.lr)
    with torch.inference_mode():
        right = (head(x_test).argmax(1) == labels_test).float().mean().item()
    print(f'Accuracy of the linear head on the {len(x_test)} test images: {right:.1%}')


if __name__ == '__main__':
    sys.exit(main())
