#!/usr/bin/env bash
# setup.sh EXTRA: makes .venv and installs popmesh with one of its extras (gguf, dev) into it.
# Versions come from constraints.txt. Run again, it brings an existing .venv up to date.
set -euo pipefail
cd "$(dirname "$0")/.."
extra=${1:?usage: scripts/setup.sh EXTRA}
venv=.venv

fail() { echo "setup: $*" >&2; exit 1; }

usable() { "$1" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; }

find_python() {
    local candidate
    for candidate in ${PYTHON:-} python3.11 python3.12 python3.13 python3; do
        if command -v "$candidate" >/dev/null && usable "$candidate"; then
            echo "$candidate"
            return
        fi
    done
    fail "needs Python 3.11 or newer; install it, or name it: make PYTHON=/path/to/python3"
}

make_venv() {
    local python=$1
    if "$python" -m venv "$venv" >/dev/null 2>&1; then return; fi
    rm -rf "$venv"
    local package
    package="$("$python" -c 'import sys; print("python%d.%d-venv" % sys.version_info[:2])')"
    if [ "$(id -u)" -eq 0 ] && command -v apt-get >/dev/null; then
        echo "setup: $python has no venv module; installing $package"
        apt-get update -qq || true # an old package list may still do
        DEBIAN_FRONTEND=noninteractive apt-get install -y -qq "$package" >/dev/null ||
            DEBIAN_FRONTEND=noninteractive apt-get install -y -qq python3-venv >/dev/null
    else
        fail "$python cannot make virtual environments; as root: apt-get install $package"
    fi
    "$python" -m venv "$venv" || fail "$python still cannot make virtual environments"
}

if ! [ -x "$venv/bin/python" ] || ! usable "$venv/bin/python"; then
    python=$(find_python)
    echo "setup: making $venv with $("$python" --version)"
    rm -rf "$venv"
    make_venv "$python"
fi
echo "setup: installing popmesh[$extra] and what it needs (a few minutes the first time)"
"$venv/bin/python" -m pip install -qq --disable-pip-version-check \
    --constraint constraints.txt --editable ".[$extra]"
