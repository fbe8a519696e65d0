"""Networks on the Hugging Face hub: a checkpoint or a packed file there, in the form of timm's, and back.

A repository holds `model.safetensors` (the tensors of a checkpoint, which `timm.create_model('hf-hub:OWNER/NAME',
pretrained=True)` reads, too, once `quant_vision_transformer` is imported) or `model.qvit.safetensors` (a packed file),
`config.json` as timm writes it, with our description of the network as its entry `qvit`, and the model card as
`README.md`.
"""
from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import safetensors
import safetensors.torch
from timm.models import save_for_hf

from checkpoints.files import write_checkpoint
from checkpoints.networks import OpenedNetwork, open_checkpoint, open_network
from checkpoints.packed import is_packed, read_packed
from files.paths import parse_json, read_text
from utils import UserError, write_whole

__all__ = ['pull', 'push']

PLAIN, PACKED, CONFIG = 'model.safetensors', 'model.qvit.safetensors', 'config.json'


def push(path: Path, repo_id: str, private: bool = False, model: str | None = None) -> str:
    """Uploads the network of a checkpoint or a packed file, with its card; returns the address.

    Args:
        private: a new repository is not shown to others.
        model: the network, where the file does not say it.

    Raises:
        UserError: the file is none, the package huggingface_hub is missing, or the hub refuses or cannot be reached.
    """
    opened = open_network(path, model)
    with TemporaryDirectory() as folder:
        _write_folder(Path(folder), path, opened)
        with _the_hub(repo_id) as hub:
            api = hub.HfApi()
            repo = api.create_repo(repo_id, private=private, exist_ok=True)
            api.upload_folder(repo_id=repo_id, folder_path=folder, commit_message=f'Upload {opened.info.model}')
    return str(repo)


def pull(repo_id: str, output: Path | None = None, revision: str | None = None) -> Path:
    """Downloads what `push` uploaded; returns the path of a packed file, or of a checkpoint that describes itself.

    Args:
        output: unless given, the repository's name in .pth or .qvit.safetensors, in the working folder.
        revision: branch, tag or commit.

    Raises:
        UserError: nothing of this kind is there, it is damaged, or the hub refuses or cannot be reached.
    """
    with _the_hub(repo_id) as hub:
        names = hub.HfApi().list_repo_files(repo_id, revision=revision)
        found = next((name for name in (PACKED, PLAIN) if name in names), None)
        wanted = [found] if found == PACKED else [PLAIN, CONFIG] if found and CONFIG in names else []
        files = [Path(hub.hf_hub_download(repo_id, name, revision=revision)) for name in wanted]
    if not files:
        raise UserError(f'{repo_id} on the hub has neither {PACKED} nor {PLAIN} with {CONFIG}: it was not pushed from '
                        'here')
    stem = repo_id.rpartition('/')[2]
    if found == PACKED:
        read_packed(files[0])  # its checksum
        output = output or Path(f'{stem}.qvit.safetensors')
        write_whole(output, lambda beside: shutil.copyfile(files[0], beside))
        return output
    checkpoint = _checkpoint(repo_id, *files)
    open_checkpoint(repo_id, checkpoint)  # refuses tensors of another network than is described
    output = output or Path(f'{stem}.pth')
    write_checkpoint(checkpoint, output)
    return output


def _write_folder(folder: Path, path: Path, opened: OpenedNetwork) -> None:
    info, by = opened.info, opened.info.normalization
    size = (by.in_chans, info.input_size, info.input_size)
    images = {'input_size': size, 'mean': by.mean, 'std': by.std, 'interpolation': 'bicubic', 'crop_pct': 0.875}
    described: dict[str, Any] = {'pretrained_cfg': images | {'num_classes': info.num_classes}, 'qvit': info.to_dict()}
    if info.classes:
        described['label_names'] = list(info.classes)
    save_for_hf(opened.model, str(folder), described, {**info.kwargs, 'img_size': info.input_size},
                safe_serialization=True)
    if is_packed(path):
        (folder / PLAIN).unlink()
        shutil.copyfile(path, folder / PACKED)
    (folder / 'README.md').write_text(_card(path, opened), encoding='utf-8')


def _card(path: Path, opened: OpenedNetwork) -> str:
    """The card beside the file, else what the file says of itself; the hub reads what stands before it."""
    beside = path.parent / 'model_card.md'
    info = opened.info
    text = read_text(beside) if beside.is_file() else (
        f'# {info.model}\n\nA network for images of {info.input_size} x {info.input_size} pixels and '
        f'{info.num_classes} classes.\n')
    return f'---\ntags:\n- image-classification\n- timm\n- quantization\nlibrary_name: timm\n---\n\n{text}'


def _checkpoint(repo_id: str, weights: Path, config: Path) -> dict[str, Any]:
    try:
        described = parse_json(read_text(config))
        tensors = safetensors.torch.load_file(weights)
    except (OSError, ValueError, safetensors.SafetensorError) as error:
        raise UserError(f'{repo_id}: {PLAIN} or {CONFIG} is damaged ({" ".join(str(error).split())[:100]})') from error
    if not isinstance(described, dict) or 'qvit' not in described:
        raise UserError(f'{repo_id}: {CONFIG} does not describe a network of this project: name it to '
                        f"timm.create_model('hf-hub:{repo_id}')")
    return {'model': tensors, 'qvit': described['qvit']}


@contextmanager
def _the_hub(repo_id: str) -> Iterator[Any]:
    """The package huggingface_hub; one line of whatever it raises within."""
    try:
        import huggingface_hub
    except ImportError as error:
        raise UserError('the hub is reached by the package huggingface_hub: pip install huggingface_hub') from error
    try:
        yield huggingface_hub
    except UserError:
        raise
    except Exception as error:  # its own, and those of the library below, which differ by release
        reason = ' '.join(f'{type(error).__name__}: {error}'.split())[:200]
        raise UserError(f'{repo_id} on the hub: {reason}: see to the name, the connection, hf auth login') from error
