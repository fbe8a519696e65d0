"""Calibration and training on two processes with different data: one set of scales, one set of weights."""
import copy
from datetime import timedelta

import pytest
import timm
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from torch.nn.parallel import DistributedDataParallel

import quant_vision_transformer  # noqa: F401  registers the variants
from _quan_base import clamp_steps_, is_calibrated
from calibration.first_batch import calibrate
from training.methods.oscillation import OscillationConfig, Oscillations


def worker(rank: int, folder: str, explicitly: bool) -> None:
    torch.set_num_threads(1)
    dist.init_process_group('gloo', init_method=f'file://{folder}/store', rank=rank, world_size=2,
                            timeout=timedelta(seconds=60))
    torch.manual_seed(rank)  # other weights and other data on each rank
    model = timm.create_model('fourbits_deit_tiny_patch16_224', img_size=32, patch_size=8, embed_dim=24, depth=2,
                              num_heads=2, num_classes=5)
    images, labels = torch.randn(6, 3, 32, 32) * (rank + 1), torch.randint(5, (6,))
    if explicitly:
        calibrate(model, images)
    parallel = DistributedDataParallel(model)
    calibrated = None
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    oscillations = Oscillations(model, OscillationConfig(1., [0.015])) if explicitly else None
    for _ in range(5):
        optimizer.zero_grad()
        logits, dist_logits = parallel(images)
        calibrated = calibrated or copy.deepcopy(model.state_dict())
        loss = F.cross_entropy(logits, labels) + F.cross_entropy(dist_logits, labels)
        (loss + oscillations.dampening(1.) if explicitly else loss).backward()
        optimizer.step()
        clamp_steps_(model)
        if explicitly:
            oscillations.after_update(1.)
    assert is_calibrated(model)
    torch.save({'calibrated': calibrated, 'trained': model.state_dict(),
                'frozen': {name: state['frozen'] for name, state in oscillations.states.items()} if explicitly else {}},
               f'{folder}/{rank}.pth')
    dist.destroy_process_group()


@pytest.mark.processes
@pytest.mark.parametrize('explicitly', [True, False], ids=['calibrate()', 'first forward'])
def test_ranks_with_different_data_hold_identical_parameters(tmp_path, explicitly):
    mp.spawn(worker, (str(tmp_path), explicitly), nprocs=2)
    first, second = (torch.load(tmp_path / f'{rank}.pth', weights_only=True) for rank in range(2))
    for moment in ('calibrated', 'trained', 'frozen'):
        for name, value in first[moment].items():
            assert torch.equal(value, second[moment][name]), (moment, name)
    scales = [name for name in first['trained'] if name.endswith('.alpha')]
    assert any(not torch.equal(first['calibrated'][name], first['trained'][name]) for name in scales)
    assert not explicitly or any(frozen.any() for frozen in first['frozen'].values())
