#!/usr/bin/env bash
# Rehearses a visit to a GPU machine (docs/gpu.md): its Python and versions, no network, no virtual environment of ours,
# pydantic only from the wheels that are carried, nothing but the files of the repository.
#
#     bash tools/rehearse_gpu.sh        PYTHON=python3.12 chooses the interpreter, PIP_FLAGS where packages come from
#
# The machine is imitated in build/rehearsal, which takes about 5 GB, once. Measures nothing.
set -euo pipefail
cd "$(dirname "$0")/.."
here=$PWD/build/rehearsal
machine=$here/machine
mkdir -p "$here"

say() { echo "rehearsal: $*"; }

find_python() {
    local found
    for found in python3.12 "$HOME"/.pyenv/versions/3.12*/bin/python3.12 python3; do
        if "$found" -c "" 2> /dev/null; then echo "$found"; return; fi
    done
}

pip_download() {  # FOLDER REQUIREMENT ...: wheels for the machine's Python
    local folder=$1 glibc platforms=()
    shift
    for glibc in 2_39 2_35 2_34 2_31 2_28 2_27 2_24 2_17; do platforms+=(--platform "manylinux_${glibc}_x86_64"); done
    # shellcheck disable=SC2086
    "$machine/bin/python3" -m pip download --quiet --no-deps --only-binary=:all: --implementation cp \
        --python-version "$version" "${platforms[@]}" --platform manylinux2014_x86_64 ${PIP_FLAGS:-} -d "$folder" "$@"
}

python=${PYTHON:-$(find_python)}
made=$machine/.made-$({ "$python" --version; cat tools/gpu_machine.txt; } | sha256sum | cut -c1-16)
if [ ! -f "$made" ]; then
    say "installing what the machine has (some minutes, once)"
    rm -rf "$machine"
    "$python" -m venv "$machine"
    # shellcheck disable=SC2086
    "$machine/bin/python3" -m pip install --quiet --no-deps ${PIP_FLAGS:-} -r tools/gpu_machine.txt
    touch "$made"
fi
version=$("$machine/bin/python3" -c "import sys; print('%d.%d' % sys.version_info[:2])")
[ "$version" = 3.12 ] || say "this is Python $version, not 3.12: no such Python was found"

say "wheels to carry"
rm -rf "$here/wheels" "$here/older" "$here/tree" "$here/home"
pip_download "$here/wheels" -r tools/carried.txt
# Triton 3.6's interpreter, which stands in for the GPU, cannot do with the machine's NumPy.
pip_download "$here/older" numpy==2.3.5
"$machine/bin/python3" -m pip install --quiet --no-index --no-deps --target "$here/older/site" "$here"/older/*.whl

mkdir "$here/tree" "$here/home"
git ls-files -z | xargs -0 cp --parents -t "$here/tree"
say "carried: $(du -cshL "$here/tree" "$here/wheels" | tail -1 | cut -f1) of files and wheels"

no_network=(unshare --net)
if ! "${no_network[@]}" true 2> /dev/null; then
    say "the network stays: cutting it off takes root"
    no_network=()
fi
on_machine() {
    (cd "$here/tree" && "${no_network[@]}" env -i PATH="$machine/bin:/usr/bin:/bin" HOME="$here/home" "$@")
}
bare() { on_machine bash tools/bare_machine.sh "$here/wheels" "$@"; }

say "nothing of ours is there before"
if on_machine sh -c 'cd / && python3 -c "import pydantic"' 2> /dev/null; then
    echo "rehearsal: the machine has pydantic: nothing would be shown" >&2
    exit 1
fi
say "the extension is built, and the package found"
bare python3 -c "
import sys; sys.path.remove('')
import pydantic, specengine, torch, transformers, triton
from specengine import _C, kernels
assert 'build/bare' in pydantic.__file__ and 'build/bare' in specengine.__file__, (pydantic, specengine)
print('rehearsal: Python %s, torch %s, triton %s, transformers %s, specengine %s' % (sys.version.split()[0],
    torch.__version__, triton.__version__, transformers.__version__, specengine.__version__))"
say "benchmarks/gpu.py"
bare python3 benchmarks/gpu.py --device cpu --tiny --out "$here/rows.jsonl"
say "tests of the GPU are found"
bare pytest -q -p no:cacheprovider -n 0 -m gpu --collect-only | tail -1
say "tests of kernels, in the interpreter, two at a time"
bare env PYTHONPATH="$here/older/site:build/bare" pytest -q -p no:cacheprovider -n 2 -m "triton and not slow and not gpu" \
    tests/kernels/test_plan_round.py tests/kernels/test_match_verify.py tests/test_last_arrivers.py
say "done"
