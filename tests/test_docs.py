"""What the documentation says of the code: snippets import what there is, and named files are there."""
import ast
import importlib
import re

import pytest
from helpers import ROOT

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
def test_named_files_are_there(page):
    """Python files of this project, named with or without their folder; those of the reader's own apart."""
    names = set(re.findall(r'`((?:[\w-]+/)*\w+\.(?:py|cpp|yaml|sh))', page.read_text(encoding='utf-8')))
    folders = [ROOT, ROOT / 'tests', ROOT / 'docs']
    missing = [name for name in names if not any((folder / name).exists() for folder in folders)]
    assert not missing, f'{page.name} names {sorted(missing)}'
