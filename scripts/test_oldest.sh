#!/usr/bin/env bash
# Passes the fast tests with the oldest versions that requirements.txt allows, in .venv-oldest.
set -euo pipefail
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-python3}
[ -x .venv-oldest/bin/python ] || "$PYTHON" -m venv .venv-oldest
echo "== installing $(sed -n 's/>=/==/p' requirements.txt | tr '\n' ' ')into .venv-oldest"
.venv-oldest/bin/python -m pip install --quiet --disable-pip-version-check -r <(sed 's/>=/==/' requirements.txt) pytest
echo "== pytest"
exec .venv-oldest/bin/python -m pytest -m 'not (slow or whole_run or processes)' "$@"
