# Sourced by demo.sh and test.sh: makes .venv in the repository and installs the given requirements file, once.
PYTHON=${PYTHON:-python3}
"$PYTHON" -c 'import sys; sys.exit(sys.version_info < (3, 10))' || {
    echo "error: $PYTHON is $("$PYTHON" --version 2>&1), Q-ViT needs 3.10 or newer: name one with PYTHON=..." >&2
    exit 2
}

setup() {  # setup REQUIREMENTS
    local stamp=".venv/$1.installed"
    if [ ! -x .venv/bin/python ]; then
        echo "== creating .venv with $("$PYTHON" --version)"
        "$PYTHON" -m venv .venv
    fi
    if ! cat requirements.txt "$1" | cmp -s - "$stamp"; then
        echo "== installing $1 into .venv (a minute or more: PyTorch is large)"
        .venv/bin/python -m pip install --quiet --disable-pip-version-check -r "$1"
        cat requirements.txt "$1" > "$stamp"
    fi
}
