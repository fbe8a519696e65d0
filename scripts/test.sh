#!/usr/bin/env bash
# Sets up .venv and passes the tests. Arguments go to pytest, e.g. scripts/test.sh tests/test_quantizers.py
set -euo pipefail
cd "$(dirname "$0")/.."
. scripts/setup.sh
setup requirements-dev.txt
echo "== ruff"
.venv/bin/ruff check .
echo "== pytest"
exec .venv/bin/python -m pytest "$@"
