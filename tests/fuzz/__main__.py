"""The command: python -m tests.fuzz --count N --seed S."""
import argparse
import collections
import os
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT)]

from tests.fuzz import networks, pictures, texts  # noqa: E402
from tests.fuzz.harness import ACCEPTED, KINDS, REFUSED, run_campaign  # noqa: E402

CAMPAIGNS = networks.CAMPAIGNS | texts.CAMPAIGNS | pictures.CAMPAIGNS


def main() -> int:
    parser = argparse.ArgumentParser(description='Mutation campaigns against everything that reads files or flags.')
    parser.add_argument('--count', type=int, default=200, help='inputs of each campaign')
    parser.add_argument('--seed', type=int, default=0)
    parser.add_argument('--only', nargs='+', choices=CAMPAIGNS, default=list(CAMPAIGNS))
    parser.add_argument('--show', action='store_true', help='print what failed, and the end of its traceback')
    args = parser.parse_args()
    networks.warm_up()
    texts.network()
    print(f'{"campaign":<26}{"inputs":>8}' + ''.join(f'{kind:>12}' for kind in KINDS), flush=True)
    failed, total, here = [], collections.Counter(), os.getcwd()
    for name in args.only:
        with tempfile.TemporaryDirectory() as folder:
            os.chdir(folder)  # what a command writes by its defaults ends here
            counts, failures = run_campaign(name, CAMPAIGNS[name], args.count, args.seed)
            os.chdir(here)
        print(f'{name:<26}{args.count:>8}' + ''.join(f'{counts[kind]:>12}' for kind in KINDS), flush=True)
        total += counts
        failed += [(name, failure) for failure in failures]
    print(f'{"all":<26}{sum(total.values()):>8}' + ''.join(f'{total[kind]:>12}' for kind in KINDS))
    for name, failure in failed if args.show else ():
        print(f'\n--- {name} {failure.number}: {failure.kind}, {failure.about!r}\n{failure.detail.rstrip()}')
    return any(total[kind] for kind in KINDS if kind not in (ACCEPTED, REFUSED))


if __name__ == '__main__':
    sys.exit(main())
