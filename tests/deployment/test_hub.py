"""Networks on the Hugging Face hub, by a stand-in for its client: what is uploaded, and that the same comes back."""
import json
import shutil
import sys
from pathlib import Path

import pytest
import timm
import torch
from helpers import assert_same, require

import deploy
from calibration.first_batch import calibrate
from checkpoints.files import read_checkpoint
from checkpoints.networks import ModelInfo, open_network
from checkpoints.packed import write_packed

huggingface_hub = require('huggingface_hub')
pytestmark = pytest.mark.usefixtures('one_thread')
NAME, KWARGS = 'twobits_deit_tiny_patch16_224', {'depth': 1, 'embed_dim': 24, 'num_heads': 2, 'patch_size': 8}
INFO = ModelInfo(NAME, KWARGS, 3, 16, ['ant', 'bee', 'cat'], 'IMNET', (0.5,), (0.25,))


@pytest.fixture
def hub(tmp_path, monkeypatch) -> Path:
    """The folder in which the stand-in keeps its repositories."""
    root = tmp_path / 'hub'

    class Api:
        def create_repo(self, repo_id, private, exist_ok):
            (root / repo_id).mkdir(parents=True, exist_ok=exist_ok)
            return f'https://hub/{repo_id}'

        def upload_folder(self, repo_id, folder_path, commit_message):
            shutil.copytree(folder_path, root / repo_id, dirs_exist_ok=True)

        def list_repo_files(self, repo_id, revision=None):
            if not (root / repo_id).is_dir():
                raise ConnectionError(f'no\nroute to {repo_id}')
            return [path.name for path in (root / repo_id).iterdir()]

    def download(repo_id, filename, revision=None, **_):
        return str(root / repo_id / filename)

    monkeypatch.setattr(huggingface_hub, 'HfApi', Api)
    monkeypatch.setattr(huggingface_hub, 'hf_hub_download', download)
    monkeypatch.setattr('timm.models._hub.hf_hub_download', download)
    monkeypatch.chdir(tmp_path)
    return root


@pytest.fixture
def model() -> torch.nn.Module:
    torch.manual_seed(0)
    model = timm.create_model(NAME, num_classes=3, img_size=16, **KWARGS)
    calibrate(model, torch.randn(4, 3, 16, 16))
    return model.eval()


def run(*flags: object) -> int:
    return deploy.main([str(flag) for flag in flags])


def test_a_checkpoint_comes_back(hub, model, tmp_path, capsys):
    torch.save({'model': model.state_dict(), 'qvit': INFO.to_dict()}, tmp_path / 'best.pth')
    (tmp_path / 'model_card.md').write_text('# Its card\n')
    assert run('push', 'best.pth', 'me/insects') == 0
    assert capsys.readouterr().out == 'best.pth -> https://hub/me/insects\n'
    assert {path.name for path in (hub / 'me/insects').iterdir()} == {'model.safetensors', 'config.json', 'README.md'}
    card = (hub / 'me/insects/README.md').read_text()
    assert card.startswith('---\ntags:') and card.endswith('# Its card\n')
    config = json.loads((hub / 'me/insects/config.json').read_text())
    assert (config['architecture'], config['num_classes'], config['label_names']) == (NAME, 3, INFO.classes)
    assert config['pretrained_cfg']['mean'] == [0.5] * 3 and config['pretrained_cfg']['input_size'] == [3, 16, 16]

    assert run('pull', 'me/insects') == 0
    assert capsys.readouterr().out == 'me/insects -> insects.pth\n'
    assert ModelInfo.from_dict(read_checkpoint('insects.pth')['qvit'], '') == INFO
    assert_same(dict(open_network('insects.pth').model.state_dict()), dict(model.state_dict()))
    by_timm = timm.create_model('hf-hub:me/insects', pretrained=True).eval()
    images = torch.randn(2, 3, 16, 16)
    assert torch.equal(by_timm(images), model(images))


def test_a_packed_file_comes_back(hub, model, tmp_path):
    write_packed(model, INFO, tmp_path / 'x.qvit.safetensors')
    assert run('push', 'x.qvit.safetensors', 'me/insects') == 0
    assert {path.name for path in (hub / 'me/insects').iterdir()} == {
        'model.qvit.safetensors', 'config.json', 'README.md'}
    assert NAME in (hub / 'me/insects/README.md').read_text()
    assert run('pull', 'me/insects', '--output', 'back.qvit.safetensors') == 0
    assert (tmp_path / 'back.qvit.safetensors').read_bytes() == (tmp_path / 'x.qvit.safetensors').read_bytes()


@pytest.mark.parametrize(('name', 'contents', 'line'), [
    ('none', None, 'me/x on the hub: ConnectionError: no route to me/x: see to the name, the connection'),
    ('other.bin', b'x', 'me/x on the hub has neither model.qvit.safetensors nor model.safetensors with config.json'),
    ('model.qvit.safetensors', b'x', 'truncated or damaged'),
    ('config.json', b'{', 'me/x: model.safetensors or config.json is damaged'),
    ('config.json', b'{}', 'me/x: config.json does not describe a network of this project'),
    ('config.json', b'{"qvit": {"model": "/etc/passwd"}}', 'me/x: its description lacks')])
def test_what_cannot_be_pulled(name, contents, line, hub, capsys, tmp_path):
    if contents is not None:
        (hub / 'me/x').mkdir(parents=True)
        (hub / 'me/x' / name).write_bytes(contents)
        if name == 'config.json':
            import safetensors.torch
            safetensors.torch.save_file({'a': torch.ones(1)}, hub / 'me/x/model.safetensors')
    before = set(tmp_path.iterdir())
    assert run('pull', 'me/x') == 2
    said = capsys.readouterr().err
    assert line in said and said.count('\n') == 1 and set(tmp_path.iterdir()) == before


def test_a_missing_package_is_named(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, 'huggingface_hub', None)
    assert run('pull', 'me/x') == 2
    assert 'pip install huggingface_hub' in capsys.readouterr().err
