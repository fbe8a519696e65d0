"""Draws the gallery of docs/visualize.md anew: two runs on the digits that ship with scikit-learn, then the pictures.

    python docs/draw_gallery.py            minutes on a CPU; needs matplotlib

docs/gallery/drawn_with.json keeps the checksums of the code that the pictures follow from. A test compares them, and
says when this command is to be run again.
"""
import hashlib
import json
import re
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

GALLERY = ROOT / 'docs/gallery'
# What decides how the pictures look: the drawing, and what the student starts from.
CODE = ('analysis/figures.py', 'analysis/inspection.py', 'analysis/codes.py', 'analysis/images.py', 'visualize.py',
        'calibration/closed_form.py', 'calibration/scales.py', 'calibration/irm.py')
NETWORK = ('--input-size', '32', '--model-kwargs', 'patch_size=4', 'depth=4', '--no-repeated-aug', '--drop-path', '0',
           '--batch-size', '32', '--num_workers', '0', '--print-freq', '15', '--device', 'cpu')


def checksums() -> dict[str, str]:
    """Of each file of CODE without its comments and empty lines, which change no picture."""
    found = {}
    for name in CODE:
        lines = [line for line in (ROOT / name).read_text(encoding='utf-8').splitlines()
                 if line.strip() and not line.lstrip().startswith('#')]
        found[name] = hashlib.sha256('\n'.join(re.sub(r'  # .*', '', line) for line in lines).encode()).hexdigest()
    return found


def draw(folder: Path) -> None:
    """Trains both networks into the folder and draws the pictures into GALLERY."""
    import torch

    import main
    import visualize

    torch.set_num_threads(1)
    teacher, student = folder / 'teacher', folder / 'student'
    weights, trained = str(teacher / 'best_checkpoint.pth'), str(student / 'best_checkpoint.pth')
    runs = [
        [*NETWORK, '--model', 'deit_tiny_distilled_patch16_224', '--epochs', '12', '--warmup-epochs', '1', '--lr',
         '1.6e-2', '--output_dir', str(teacher)],
        [*NETWORK, '--model', 'fourbits_deit_tiny_patch16_224', '--epochs', '5', '--warmup-epochs', '0',
         '--weight-decay', '0.', '--lr', '8e-3', '--opt', 'fusedlamb', '--distillation-type', 'hard', '--finetune',
         weights, '--teacher-path', weights, '--output_dir', str(student)]]
    networks = ['--resume', trained, '--teacher-path', weights]
    pictures = {'qk': [*networks, '--num-images', '64'], 'attention': [*networks, '--num-images', '2', '--per-head'],
                'distance': [*networks, '--num-images', '128'], 'codes': ['--resume', trained, '--num-images', '64'],
                'curves': [str(teacher), str(student)]}
    for flags in runs:
        if status := main.main(flags):
            raise SystemExit(status)
    for name, flags in pictures.items():
        if status := visualize.main([name, *flags, '--output', str(GALLERY / f'{name}.png')]):
            raise SystemExit(status)


if __name__ == '__main__':
    with tempfile.TemporaryDirectory() as temporary:
        draw(Path(temporary))
    (GALLERY / 'drawn_with.json').write_text(json.dumps(checksums(), indent=2) + '\n', encoding='utf-8')
