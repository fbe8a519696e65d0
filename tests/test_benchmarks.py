"""What the benchmarks compute, on the smallest data."""

import json
import sys
from dataclasses import replace

import pytest
import timm
import torch
import torch.multiprocessing as mp
import yaml
from helpers import ROOT
from torchvision.transforms import Normalize

from calibration.first_batch import calibrate
from losses import distribution_guided_distillation
from models import Teacher

sys.path.insert(0, str(ROOT / 'benchmarks'))

import accuracy_protocol  # noqa: E402
import data_loading  # noqa: E402
import gpu  # noqa: E402
import scaling  # noqa: E402
import training_step  # noqa: E402

SMALL = {'embed_dim': 24, 'depth': 2, 'num_heads': 2, 'patch_size': 8, 'img_size': 32, 'num_classes': 4}


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


@pytest.mark.processes
def test_two_processes_all_reduce_every_gradient_once_an_update(tmp_path):
    settings = scaling.parse_args('--batch-size 1 --input-size 32 --repeats 1'.split())
    # Forks are spared the imports.
    mp.start_processes(scaling.measure, (2, str(tmp_path), settings, 'torch'), nprocs=2, start_method='fork')
    rows = json.loads((tmp_path / '2.json').read_text())
    assert [(row['batches'], row['all_reduce']) for row in rows] == [(1, True), (2, True), (1, False)]
    network = timm.create_model(settings.model, img_size=32)
    gradients = sum(parameter.nbytes for parameter in network.parameters())
    assert [row['all_reduced_bytes'] for row in rows] == [gradients, gradients, 0]
    assert all(len(row['all_ms']) == len(row['all_cpu_ms']) == 1 for row in rows)
    results = {'rows': rows, 'estimate': scaling.estimate(gradients, 10., None)}
    assert f'| 2 | 2 | yes | {rows[1]["median_ms"]:.0f} |' in scaling.table(results)


# A training step


@pytest.fixture
def settings():
    return training_step.parse_args('--batch-size 2 --input-size 32 --repeats 2 --device cpu --threads 1'.split())


@pytest.mark.slow
@pytest.mark.usefixtures('one_thread')
def test_the_parts_of_a_training_step(settings):
    batch = training_step.build_batch(settings)
    nets = {name: training_step.build_network(name, settings, batch[0]) for name in training_step.NETWORKS}
    memory = {mode: dict.fromkeys(training_step.NETWORKS) for mode in training_step.MODES}
    rows, parts = training_step.all_rows(nets, settings, batch, memory)
    assert list(rows) == ['training step', 'student', 'evaluation']
    assert set(parts) == {'student forward', 'teacher', 'losses', 'backward', 'optimizer'}
    for name in training_step.NETWORKS:
        whole, student = (rows[row]['all_ms'][name] for row in ('training step', 'student'))
        assert len(whole) == 2 and all(0 < of_student < ms for ms, of_student in zip(whole, student, strict=True))
        assert all(parts[part][name] > 0 for part in parts)
    dgd = training_step.dgd_times(settings)
    lines = training_step.table({'rows': rows, 'parts_ms': parts, 'dgd_ms': dgd}).splitlines()
    assert [line.split('|')[1].strip() for line in lines if 'by itself' in line] == [
        'DGD by d x d products, by itself', 'DGD by N x N products, by itself']


def test_the_two_forms_of_dgd_that_are_timed_are_equal():
    torch.manual_seed(0)
    student, teacher = ([tuple(torch.randn(2, 3, 6, 4, dtype=torch.float64) for _ in range(2)) for _ in range(2)]
                        for _ in range(2))
    torch.testing.assert_close(training_step.plain_dgd(student, teacher),
                               distribution_guided_distillation(student, teacher, 2, 2))


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != 'linux', reason='peak memory is read from /proc')
def test_memory_holds_the_network_and_its_peak(settings):
    weights = sum(parameter.nbytes for parameter in timm.create_model(settings.model, img_size=32).parameters()) / 1e6
    evaluation, training = (training_step.measure_memory('quantized', mode, settings)
                            for mode in ('evaluation', 'training step'))
    if evaluation is None:
        pytest.skip('the system refuses to reset the peak')
    assert evaluation > weights  # about 22 MB
    assert training > evaluation + 2 * weights  # teacher, gradients, two averages of the optimizer


@pytest.mark.parametrize('flags', ['--input-size 30', '--batch-size 0', '--native-kernels --device cuda'])
def test_training_step_refuses(flags, capsys):
    with pytest.raises(SystemExit) as caught:
        training_step.parse_args(flags.split())
    assert caught.value.code == 2 and 'error: ' in capsys.readouterr().err


# The accuracy protocol


@pytest.fixture
def small():
    """40 images, and a full-precision network with the answers it gives for them."""
    torch.manual_seed(0)
    images = accuracy_protocol.Images(
        [(torch.randint(0, 256, (3, 32, 32), dtype=torch.uint8), i % 4) for i in range(40)],
        Normalize((0.5,) * 3, (0.25,) * 3))
    network = timm.create_model('deit_tiny_patch16_224', **SMALL)
    return images, accuracy_protocol.StoredTeacher(network, 40)


def test_images_are_normalized_and_mirrored(small):
    images, _ = small
    plain, mirrored = images(torch.tensor([7, 7]), torch.tensor([False, True]))
    torch.testing.assert_close(plain, (images.images[7] / 255. - 0.5) / 0.25)
    assert torch.equal(mirrored, plain.flip(2))


def test_the_teacher_is_asked_once_for_every_image(small):
    images, stored = small
    asked = []
    stored.model.register_forward_hook(lambda module, inputs, output: asked.append(len(output)))
    for index, flip, new in (([3, 5], [False, False], 2), ([5, 3], [False, True], 1), ([3, 5], [True, False], 0)):
        batch = images(torch.tensor(index), torch.tensor(flip))
        stored.index = torch.tensor(index) + 40 * torch.tensor(flip)
        before = sum(asked)
        logits, blocks = stored(batch)
        assert sum(asked) - before == new
        expected, of_blocks = Teacher(stored.model, return_tokens=True)(batch)
        torch.testing.assert_close(logits, expected)
        for block, of_block in zip(blocks, of_blocks, strict=True):
            torch.testing.assert_close(block.tokens.float(), of_block.tokens, rtol=1e-2, atol=1e-2)  # kept as bfloat16


@pytest.mark.slow
@pytest.mark.usefixtures('one_thread')
@pytest.mark.parametrize('name', ['4bit', '4bit-dgd-1', '4bit-hard', '4bit-stored', '4bit-dampening', '2bit-freezing'])
def test_a_row_learns(name, small):
    images, stored = small
    row = replace(accuracy_protocol.ROWS[name], updates=30, lr=1e-3)
    if row.stored_classes:
        row = replace(row, stored_classes=3)
    weights, everything = {'model': stored.model.state_dict()}, images(slice(None))
    student = accuracy_protocol.start_from(
        weights, f'{accuracy_protocol.BITS[row.bits]}_deit_tiny_patch16_224', **SMALL).train()
    calibrate(student, everything)
    teacher = stored
    if row.dgd_weight:
        teacher = accuracy_protocol.start_from(weights, 'deit_tiny_patch16_224', **SMALL)
        teacher = Teacher(teacher, return_qk=True, return_tokens=row.token_weight > 0)
    # What is learned, stored labels too, is to be more like the teacher.
    criterion = accuracy_protocol.build_criterion(replace(row, stored_classes=None), student, teacher)

    @torch.no_grad()
    def loss() -> float:
        stored.index = torch.arange(40)
        outputs, blocks = student(everything, return_blocks=True)
        return criterion(everything, outputs, images.labels, blocks)['loss'].item()

    before = loss()
    accuracy_protocol.fit(row, student, stored, teacher, images, torch.Generator().manual_seed(0), False)
    assert loss() < 0.95 * before


def test_results_continue_and_become_a_table(tmp_path):
    path, row = tmp_path / 'results.json', accuracy_protocol.ROWS['3bit-descent']
    assert accuracy_protocol.read_results(path) == []
    results = [{'row': '3bit-descent', 'seed': seed, 'calibrated': 40. + seed, 'trained': 50.,
                'settings': row.__dict__ | {'of_a_removed_method': 1}} for seed in (0, 2)]
    accuracy_protocol.write_results(results, path)
    *_, line = accuracy_protocol.table(accuracy_protocol.read_results(path)).splitlines()
    assert line == '| 3bit-descent | 3 | mse | both | 0 | 0.5 | 0.0001 | 300 |  | 2 | 41.0 ± 1.4 | 50.0 ± 0.0 |'
    path.write_text('no JSON')
    with pytest.raises(accuracy_protocol.UserError, match='is not a file of results'):
        accuracy_protocol.read_results(path)


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


# --- what waits for a GPU ---------------------------------------------------------------------------------------------


@pytest.mark.processes
def test_the_report_of_a_gpu_is_made_without_one(tmp_path):
    output = tmp_path / 'report'
    assert gpu.main(['--output', str(output), '--dry-run', '--parts', 'products', 'apex']) == 0
    parts = json.loads(output.with_suffix('.json').read_text())['parts']
    assert set(parts) == {'products', 'apex'} and 'apex' in parts['apex']['not measured']
    found = parts['products']['result']
    assert found['triton'].startswith('not measured')
    values = [figure for name in ('reference', 'torch') for figures in found[name].values()
              for figure in figures.values()]
    assert len(values) > 40 and all(0 <= value < 1e-5 for value in values)  # of float32 against float64
    assert sum(value > 1e-9 for value in values) > 40
    text = output.with_suffix('.md').read_text()
    assert '| products | measured in' in text and '| apex | not measured: apex' in text and 'A dry run' in text


def test_a_report_needs_a_gpu_or_a_dry_run(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: False)
    assert gpu.main(['--output', str(tmp_path / 'report')]) == 2
    error = 'error: PyTorch finds no GPU here: pass --dry-run to try this command on the CPU\n'
    assert capsys.readouterr().err == error
    assert not list(tmp_path.iterdir())
