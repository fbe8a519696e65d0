"""The order in which the parts of this project import one another, and where a command line's flags may be known."""
import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
# Each part imports only from those of earlier lines, or within its own line.
ORDER = [
    ['console'],
    ['utils', 'files', 'samplers', 'models', 'ops'],
    ['_quan_base'],
    ['datasets', 'losses'],
    ['checkpoints', 'quant_swin_transformer', 'quant_vision_transformer'],
    ['calibration', 'analysis'],
    ['training', 'deployment'],
    ['engine'],
    ['main'],
    ['deploy', 'cost', 'visualize', 'soft_labels', 'model_card', 'hubconf', 'run_with_submitit', 'benchmarks',
     'examples', 'scripts'],
]
LEVEL = {part: level for level, parts in enumerate(ORDER) for part in parts}
# Flags end in the commands and in the checks of main.py's; checkpoints contain them, which their reader has to allow.
MAY_KNOW_FLAGS = {'training.checks', 'checkpoints.files'}
COMMANDS = {'main', *ORDER[-1]}
LARGEST = 400  # lines of a file, main.py's parser apart: it is a list


def files() -> dict[str, Path]:
    """Every file of the project by its module's name, tests apart."""
    found = {}
    for path in sorted(ROOT.rglob('*.py')):
        parts = path.relative_to(ROOT).with_suffix('').parts
        if parts[0] in LEVEL:
            found['.'.join(parts[:-1] if parts[-1] == '__init__' else parts)] = path
    return found


FILES = files()


def imports(name: str) -> set[str]:
    """The project's modules that a module imports, also within functions."""
    found = set()
    for node in ast.walk(ast.parse(FILES[name].read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f'{name} has a relative import: name the module'
            found |= {node.module, *(f'{node.module}.{alias.name}' for alias in node.names)}
    if name == 'benchmarks' or name.startswith('benchmarks.'):  # scripts that find their neighbours by themselves
        found = {f'benchmarks.{other}' if f'benchmarks.{other}' in FILES else other for other in found}
    return {other for other in found if other in FILES and other != name}


def test_every_module_has_its_place():
    top = {path.stem for path in ROOT.glob('*.py')} | {path.parent.name for path in ROOT.glob('*/__init__.py')}
    assert top - {'tests'} <= set(LEVEL) and len(FILES) > 50


@pytest.mark.parametrize('name', FILES)
def test_imports_go_one_way(name):
    level = LEVEL[name.partition('.')[0]]
    upwards = sorted(other for other in imports(name) if LEVEL[other.partition('.')[0]] > level)
    assert not upwards, f'{name} imports {", ".join(upwards)}, which are above it'


def test_no_circle():
    graph, order, visiting = {name: sorted(imports(name)) for name in FILES}, [], []

    def visit(name: str) -> None:
        if name in order:
            return
        assert name not in visiting, f'a circle: {" -> ".join([*visiting[visiting.index(name):], name])}'
        visiting.append(name)
        for other in graph[name]:
            if not (other == name.rpartition('.')[0]):  # a package's face may import its own files
                visit(other)
        order.append(visiting.pop())

    for name in FILES:
        visit(name)
    assert len(order) == len(FILES)


@pytest.mark.parametrize('name', FILES)
def test_flags_stay_in_the_commands(name):
    if name.partition('.')[0] in COMMANDS or name in MAY_KNOW_FLAGS:
        return
    names = {node.id for node in ast.walk(ast.parse(FILES[name].read_text())) if isinstance(node, ast.Name)}
    names |= {node.attr for node in ast.walk(ast.parse(FILES[name].read_text())) if isinstance(node, ast.Attribute)}
    assert 'Namespace' not in names, f'{name} takes a command line apart: give it values'


@pytest.mark.parametrize('name', FILES)
def test_files_are_read_in_one_go(name):
    source = FILES[name].read_text()
    parsers = [node for node in ast.parse(source).body if getattr(node, 'name', '') == 'get_args_parser']
    lines = len(source.splitlines()) - sum(node.end_lineno - node.lineno for node in parsers)
    assert lines <= LARGEST, f'{name} has {lines} lines: split it'
