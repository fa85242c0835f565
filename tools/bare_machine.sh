#!/usr/bin/env bash
# Runs a command with specengine on a machine that has PyTorch, but no network, no virtual environment and not all that
# specengine needs:
#
#     bash tools/bare_machine.sh WHEELS COMMAND ...
#
# WHEELS is a folder of wheels (tools/carried.txt). They are unpacked into build/bare, the C++ extension is built with
# the machine's Python (PYTHON=python3), and the package is linked beside them; COMMAND finds all of it by PYTHONPATH.
set -euo pipefail
wheels=$(realpath "$1")
shift
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
site=$PWD/build/bare
mkdir -p "$site"
"$python" -m pip install --quiet --no-index --no-deps --no-compile --upgrade --target "$site" "$wheels"/*.whl
# egg_info: the version of a package is asked of its metadata.
"$python" setup.py egg_info --egg-base "$site" build_ext --inplace > build/bare.log 2>&1 || { cat build/bare.log >&2; exit 1; }
rm -rf "$site/specengine"
mkdir "$site/specengine"
ln -s "$PWD"/specengine/* "$PWD/kernels" "$site/specengine/"
export PYTHONPATH=$site${PYTHONPATH:+:$PYTHONPATH}
exec "$@"
