"""What the benchmarks compute, on the smallest data."""

import json
import sys

import pytest
import yaml
from helpers import ROOT

sys.path.insert(0, str(ROOT / 'benchmarks'))

import accuracy_protocol  # noqa: E402
import data_loading  # noqa: E402
import scaling  # noqa: E402


@pytest.mark.usefixtures('one_thread')
def test_data_loading(tmp_path, capsys):
    command = ('--workers 0 --batches 2 --repeats 3 --image-size 100 80 --step-images-per-second 10 --batch-size 2 '
               f'--input-size 48 --json {tmp_path / "loading.json"}')
    assert data_loading.main(command.split()) == 0
    said = capsys.readouterr().out
    results = json.loads((tmp_path / 'loading.json').read_text())
    assert results['images'].startswith('0.008 megapixels')
    row, = results['rows']
    assert (row['workers'], len(row['all'])) == (0, 3)
    assert row['of_the_step'] == pytest.approx(row['images_per_second'] / 10)
    assert f'| 0 | {row["images_per_second"]:.1f} |' in said


@pytest.mark.parametrize(('flags', 'line'), [
    ('--data-set DIGITS', 'choose one of IMNET'),
    ('--batches 500 --image-size 64 48 --batch-size 1 --data-path {}', 'has 256, 2 of them to warm up'),
])
def test_data_loading_refuses(flags, line, tmp_path, capsys):
    data_loading.write_jpegs(tmp_path, [64, 48], 300)
    assert data_loading.main(flags.format(tmp_path).split()) == 2
    error = capsys.readouterr().err
    assert line in error and error.count('\n') == 1


def test_ring_all_reduce():
    # 20 MB at 10 GB/s are 2 ms, of which a ring of 8 sends 2 x 7/8, and one of 64 sends 2 x 63/64.
    alone, both = scaling.estimate(20_000_000, 10., None), scaling.estimate(20_000_000, 10., 96.5)
    assert [row['all_reduce_ms'] for row in alone] == pytest.approx([3.5, 3.9375])
    assert [row['efficiency'] for row in alone] == [None, None]
    assert both[0]['efficiency'] == pytest.approx(0.965)


@pytest.mark.parametrize('bits', [3, 4])
def test_the_recipes_that_measured_best_are_those_measured(bits):
    config = yaml.safe_load((ROOT / 'configs' / f'best_tiny_{bits}bit.yaml').read_text())
    row = accuracy_protocol.ROWS[f'{bits}bit']
    assert float(config['lr']) * config['batch-size'] / 512 == pytest.approx(row.lr)
    assert (config['batch-size'], config['epochs'] * 1000 // config['batch-size']) == (
        accuracy_protocol.BATCH, row.updates)
    measured = {'calibration': row.calibration, 'distillation-type': row.distillation, 'distillation-alpha': row.alpha,
                'dgd-weight': row.dgd_weight, 'token-weight': row.token_weight, 'step-lr-scale': row.step_lr_scale}
    assert {name: config[name] for name in measured} == measured
    # The protocol's cosine falls to 0 by the update, and its products are in float32.
    assert (config['sched'], config['sched-on-updates'], config['min-lr'], config['amp']) == ('cosine', True, 0, 'none')
