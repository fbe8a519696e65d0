"""What the documentation says of the code: snippets import what there is, and named files are there."""
import ast
import builtins
import importlib
import json
import re

import pytest
import timm
import torch
from helpers import ROOT

import quant_vision_transformer  # noqa: F401  registers the variants
from analysis.cost import countings, render, summary
from benchmarks.accuracy_protocol import read_results, table
from docs.draw_gallery import CODE, GALLERY, checksums

PAGES = [ROOT / 'README.md', *sorted((ROOT / 'docs').glob('*.md'))]
OWN = {path.stem for path in ROOT.glob('*.py')} | {path.parent.name for path in ROOT.glob('*/__init__.py')}


@pytest.mark.parametrize('page', PAGES, ids=lambda page: page.name)
def test_snippets_import_what_there_is(page):
    for snippet in re.findall(r'```python\n(.*?)```', page.read_text(encoding='utf-8'), re.DOTALL):
        for node in ast.walk(ast.parse(snippet)):
            if isinstance(node, ast.ImportFrom) and node.module.partition('.')[0] in OWN:
                module = importlib.import_module(node.module)
                missing = [alias.name for alias in node.names if not hasattr(module, alias.name)]
                assert not missing, f'{node.module} has no {missing}'
            elif isinstance(node, ast.Import):
                for alias in node.names:
                    if alias.name.partition('.')[0] in OWN:
                        importlib.import_module(alias.name)


@pytest.mark.parametrize('page', PAGES, ids=lambda page: page.name)
def test_snippets_define_what_they_use(page):
    for snippet in re.findall(r'```python\n(.*?)```', page.read_text(encoding='utf-8'), re.DOTALL):
        names = [node for node in ast.walk(ast.parse(snippet)) if isinstance(node, ast.Name)]
        known = {node.id for node in names if isinstance(node.ctx, ast.Store)} | set(dir(builtins))
        known |= {(alias.asname or alias.name).partition('.')[0] for node in ast.walk(ast.parse(snippet))
                  if isinstance(node, ast.Import | ast.ImportFrom) for alias in node.names}
        assert {node.id for node in names} <= known


@pytest.mark.parametrize('page', PAGES, ids=lambda page: page.name)
def test_named_files_are_there(page):
    """Python files of this project, named with or without their folder; those of the reader's own apart."""
    names = set(re.findall(r'`((?:[\w-]+/)*\w+\.(?:py|cpp|yaml|sh))', page.read_text(encoding='utf-8')))
    folders = [ROOT, ROOT / 'tests', ROOT / 'docs']
    missing = [name for name in names if not any((folder / name).exists() for folder in folders)]
    assert not missing, f'{page.name} names {sorted(missing)}'


# --- tables and pictures are those of their sources -------------------------------------------------------------------


def rows_of(page, first: str) -> list[str]:
    """The lines of the table that begins with a line that begins so."""
    lines = (ROOT / page).read_text(encoding='utf-8').splitlines()
    start = next(index for index, line in enumerate(lines) if line.startswith(first))
    return lines[start:next((index for index in range(start, len(lines)) if not lines[index].startswith('|')), None)]


def test_the_table_of_accuracy_is_that_of_its_results():
    results = read_results(ROOT / 'docs/accuracy.json')
    assert rows_of('docs/accuracy.md', '| row | bits |') == table(results).splitlines()


def test_what_readme_says_of_accuracy_is_in_the_table():
    cells = {line.split(' | ')[0].removeprefix('| '): line.rstrip(' |').split(' | ')
             for line in table(read_results(ROOT / 'docs/accuracy.json')).splitlines()[2:]}

    def measured(row: str, column: int) -> str:
        seeds = cells[row][-3]
        return cells[row][column] + (f' ({seeds} seeds)' if seeds != '1' else '')

    kinds = [('ImageNet photographs', '{}bit-baseline-irm-dgd', -2),
             ('and after 150 updates of 20 images of the published', '{}bit-baseline-irm-dgd', -1),
             ('`--calibration mse`', '{}bit', -2), ('and after 150 updates of 20 images (`configs', '{}bit', -1)]
    for begins, row, column in kinds:
        line, = [line for line in rows_of('README.md', '| DeiT-Tiny, top-1') if line.startswith(f'| {begins}')]
        said = [cell.strip() for cell in line.strip('|').split('|')[1:]]
        assert said == [measured(row.format(bits), column) for bits in (4, 3, 2)]


def test_tables_of_cost_are_those_of_the_code():
    small = timm.create_model('fourbits_deit_small_patch16_224')
    counted = [re.sub(' +', ' ', line) for line in render(countings(small), 'markdown').splitlines()]
    assert rows_of('docs/cost.md', '| counting |')[2:] == counted[2:]
    bits = {'2': 'two', '3': 'three', '4': 'four'}
    swin = {f'Swin-{size[0].upper()}': f'swin_{size}_patch4_window7_224' for size in ('tiny', 'small')}
    rows = rows_of('docs/cost.md', '| | params (M)')[2:]
    assert len(rows) == 9
    for row in rows:
        name, *cells = [cell.strip() for cell in row.strip('|').split('|')]
        size, number = re.fullmatch(r'([\w-]+), (\d) bits', name).groups()
        with torch.device('meta'):
            network = swin.get(size, f'deit_{size}_patch16_224')
            cost = summary(name, timm.create_model(f'{bits[number]}bits_{network}'))
        assert cells == [f'{cost["parameters"] / 1e6:.2f}', f'{cost["size_bytes"] / 1e6:.2f}',
                         f'{cost["full_precision_size_bytes"] / 1e6:.2f}', f'{cost["size_ratio"]:.2f}',
                         f'{cost["macs"] / 1e9:.3f}', f'{cost["bops"] / 1e9:.1f}', f'{cost["bops_ratio"]:.1f}',
                         f'{cost["ops"] / 1e9:.3f}', f'{cost["ops_ratio"]:.2f}'], name


def test_the_gallery_is_current():
    """Pictures of the code as it is: `python docs/draw_gallery.py` draws them anew."""
    drawn = json.loads((GALLERY / 'drawn_with.json').read_text())
    changed = [name for name, checksum in checksums().items() if drawn.get(name) != checksum]
    assert drawn.keys() == set(CODE) and not changed, f'{changed} changed: run python docs/draw_gallery.py'
    named = set(re.findall(r'gallery/(\w+\.png)', ''.join(page.read_text(encoding='utf-8') for page in PAGES)))
    assert named == {path.name for path in GALLERY.glob('*.png')}
