"""Checkpoints at https:// addresses: each address is a file of its own, of any kind that a path may be of."""

import shutil
import urllib.error

import pytest
import safetensors.torch
import timm
import torch

from calibration.first_batch import calibrate
from checkpoints.files import read_checkpoint, write_checkpoint
from checkpoints.networks import ModelInfo
from checkpoints.packed import write_packed
from deployment.predictor import open_quantized
from utils import UserError


@pytest.fixture
def served(monkeypatch, tmp_path):
    """Files that are served by address; `served.asked` lists what was downloaded."""
    class Served(dict):
        def __init__(self) -> None:
            super().__init__()
            self.asked: list[str] = []

    files = Served()

    def download(address, copy, **_):
        files.asked.append(address)
        if address not in files:
            raise urllib.error.HTTPError(address, 404, 'Not Found', None, None)
        shutil.copy(files[address], copy)

    monkeypatch.setattr(torch.hub, 'download_url_to_file', download)
    monkeypatch.setattr(torch.hub, 'get_dir', lambda: str(tmp_path / 'hub'))
    return files


def test_files_of_one_name_at_two_addresses_are_two_files(served, tmp_path):
    for run, value in (('one', 1.), ('two', 2.)):
        write_checkpoint({'model': {'weight': torch.tensor([value])}}, tmp_path / f'{run}.pth')
        served[f'https://example.org/{run}/best_checkpoint.pth'] = tmp_path / f'{run}.pth'
    read = [read_checkpoint(address)['model']['weight'].item() for address in (*served, *served)]
    assert read == [1., 2., 1., 2.]
    assert served.asked == list(served)  # each once


def test_what_follows_the_path_is_part_of_the_address(served, tmp_path):
    for version in (1., 2.):
        safetensors.torch.save_file({'weight': torch.tensor([version])}, tmp_path / f'{version}.safetensors')
        served[f'https://example.org/model.safetensors?version={version}'] = tmp_path / f'{version}.safetensors'
    assert [read_checkpoint(address)['weight'].item() for address in served] == [1., 2.]


def test_a_packed_file_is_opened_by_its_address(served, tmp_path):
    info = ModelInfo('twobits_deit_tiny_patch16_224', {'embed_dim': 48, 'depth': 1, 'num_heads': 3}, 10, 32)
    model = timm.create_model(info.model, num_classes=10, img_size=32, **info.kwargs)
    images = torch.randn(2, 3, 32, 32)
    calibrate(model, images)
    write_packed(model.eval(), info, tmp_path / 'packed.safetensors')
    write_checkpoint({'model': model.state_dict(), 'qvit': info.to_dict()}, tmp_path / 'checkpoint.pth')
    served['https://example.org/a.pth'] = tmp_path / 'checkpoint.pth'
    served['https://example.org/a.qvit.safetensors'] = tmp_path / 'packed.safetensors'
    expected = model(images)
    assert all(torch.equal(open_quantized(address).model(images), expected) for address in served)


@pytest.mark.parametrize('address', ['https://example.org/none.pth', 'https://example.org/none.safetensors'])
def test_an_address_of_nothing_is_one_line(served, address):
    with pytest.raises(UserError, match=f'^{address} cannot be downloaded .*404.*: give a file$'):
        read_checkpoint(address)
