#!/bin/sh
# One stage of the work on a machine with a GPU: build, test, operators or models.
#
#   sh benchmarks/gpu.sh STAGE
#
# Needs no network: Python 3.12 with a CUDA build of torch, timm, pytest, hypothesis, setuptools, cmake, ninja, pybind11,
# and nvcc. Every stage ends within eight minutes; run it again and it goes on where it stopped: the build is skipped
# where the installed one is of these sources, the benchmarks keep the records they have. A stage builds first if it must,
# as a lent machine comes bare. What is to be kept is copied to $OUT where that is set.
set -eu
stage=${1:?"usage: sh benchmarks/gpu.sh build|test|operators|models"}
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
limit=470
stamp=build/gpu/built_from
mkdir -p build/gpu

sources() {
    # -P: the checkout's own folder, which holds no compiled library, must not stand in for the installed package
    { cat setup.py pyproject.toml CMakeLists.txt; find csrc diffrate_ext -type f ! -name '*.so' ! -name '*.pyc' |
        LC_ALL=C sort | xargs cat; "$python" -P -c 'import sys, torch; print(sys.executable, torch.__version__)'; } |
        sha256sum
}

build() {
    wanted=$(sources)
    if [ -f "$stamp" ] && [ "$(cat "$stamp")" = "$wanted" ] && "$python" -P -c 'import diffrate_ext' 2>/dev/null; then
        echo "already built from these sources"
    else
        DIFFRATE_CUDA=ON timeout "$limit" "$python" -m pip install --no-build-isolation --no-deps --no-index . \
            >build/gpu/build.log 2>&1 || { tail -n 60 build/gpu/build.log; exit 1; }
        echo "$wanted" >"$stamp"
    fi
    "$python" -P -c 'import diffrate_ext, torch
print(diffrate_ext.build_info())
assert torch.cuda.is_available(), "torch sees no CUDA device"
print(torch.cuda.get_device_name(), torch.__version__)'
}

keep() {
    for file in "$@"; do
        if [ -n "${OUT:-}" ] && [ -f "$file" ]; then
            cp "$file" "$OUT"/
        fi
    done
}

# Ends with status 124 when out of time: the next call goes on from the records that are there.
benchmark() {
    started=$(date +%s)
    build
    status=0
    timeout $((limit - $(date +%s) + started)) "$python" benchmarks/run.py --device cuda --dtype bfloat16 --resume \
        --only "$1" || status=$?
    keep benchmarks/results/cuda_"$1"_bfloat16.*
    [ "$status" -ne 124 ] || echo "out of time: copy the results back into benchmarks/results and run this stage again"
    return "$status"
}

case $stage in
build)
    build
    keep build/gpu/build.log
    ;;
test)
    started=$(date +%s)
    build
    status=0
    # --ff: what failed, or was not reached, comes first when the stage is run again
    timeout $((limit - $(date +%s) + started)) "$python" -P -m pytest python_tests -m "not slow" -q --ff \
        -o cache_dir=build/gpu/pytest_cache >build/gpu/test.log 2>&1 || status=$?
    tail -n 40 build/gpu/test.log
    keep build/gpu/test.log
    exit "$status"
    ;;
operators) benchmark ops ;;
models) benchmark models ;;
*)
    echo "unknown stage '$stage': build, test, operators or models" >&2
    exit 2
    ;;
esac
