#!/bin/sh
# One stage of the work on a machine with a GPU. Each ends within eight minutes; run it again and it goes on.
#
#   sh benchmarks/gpu.sh build       builds and installs the package
#   sh benchmarks/gpu.sh test        the tests that take a GPU
#   sh benchmarks/gpu.sh sanitize    every kernel under compute-sanitizer: memcheck, racecheck, synccheck
#   sh benchmarks/gpu.sh operators   every operator's time
#   sh benchmarks/gpu.sh models      whole models' times
#   sh benchmarks/gpu.sh search      the rate search's step
#
# Needs no network: Python >= 3.11 with a CUDA build of torch, timm, pytest, hypothesis, setuptools, cmake, ninja,
# pybind11, and nvcc. Every stage builds first if it must. What is measured goes to benchmarks/results, everything else to
# build/gpu; where $OUT is set, all of it goes there instead, as it comes.
#
# Where every call finds a bare machine, bring back what $OUT holds: cuda_* to benchmarks/results (then run
# `python benchmarks/report.py`), the rest to build/gpu, and take both along. The next call finds there the results it
# need not repeat, the wheel it need not build, the tests that passed and the tools that found nothing: all that
# belongs to the same sources, by a digest of them.
set -eu
usage="usage: sh benchmarks/gpu.sh build|test|sanitize|operators|models|search"
stage=${1:?"$usage"}
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
begin=$(date +%s)
kept=build/gpu
out=${OUT:-$kept}
results=${OUT:-benchmarks/results}

# Seconds. At least one: to timeout 0 means for ever.
left() {
    seconds=$((470 - $(date +%s) + begin))
    echo $((seconds > 0 ? seconds : 1))
}

# Copies files to $OUT, where that is set: what an earlier call left in them is gone on with.
bring() {
    if [ -n "${OUT:-}" ]; then
        for file in "$@"; do
            if [ -f "$file" ]; then cp "$file" "$OUT"/; fi
        done
    fi
}

# A name for the contents of files and folders, and for what they are run by.
digest_of() {
    {
        find "$@" -type f ! -name '*.so' ! -name '*.pyc' | LC_ALL=C sort | xargs cat
        "$python" -P -c 'import sys, torch; print(sys.version, torch.__version__, torch.cuda.get_device_capability())'
    } | sha256sum | cut -c1-12
}

build() {
    # -P: the checkout's own folder, which holds no compiled library, must not stand in for the installed package
    "$python" -P -c 'import sys, torch
sys.exit(None if torch.cuda.is_available() else "torch sees no CUDA device")'
    mkdir -p "$kept" "$out"
    sources="setup.py pyproject.toml CMakeLists.txt csrc diffrate_ext"
    # shellcheck disable=SC2086
    package=$(digest_of $sources)
    wheels=$kept/wheel-$package
    # shellcheck disable=SC2086
    digest=$(digest_of $sources python_tests benchmarks/sanitize_cases.py)
    if ! ls "$wheels"/*.whl >/dev/null 2>&1; then
        architecture=$("$python" -P -c 'import torch; print("%d.%d" % torch.cuda.get_device_capability())')
        DIFFRATE_CUDA=ON TORCH_CUDA_ARCH_LIST=${TORCH_CUDA_ARCH_LIST:-$architecture} timeout "$(left)" "$python" -m pip \
            wheel --no-build-isolation --no-deps --no-index -w "$wheels" . >"$out/build.log" 2>&1 || {
            tail -n 60 "$out/build.log"
            exit 1
        }
        echo "built in $(($(date +%s) - begin)) s"
    fi
    if [ "$out" != "$kept" ]; then cp -r "$wheels" "$out"/; fi
    "$python" -m pip install -q --no-deps --no-index --force-reinstall "$wheels"/*.whl
    "$python" -P -c 'import diffrate_ext, torch
info = diffrate_ext.build_info()
print(info)
assert info["cuda_architectures"], "built without CUDA kernels"'
}

# A page of results that says when, where and what, the last from standard input.
page() {
    mkdir -p "$results"
    { "$python" -P -c 'import datetime, torch
now = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="minutes")
print(f"{torch.cuda.get_device_name()}, {now}, torch {torch.__version__}, sources '"$digest"'")'
        echo
        cat
    } >"$results/$1.md"
    cat "$results/$1.md"
}

# Results are written as they come. Status 124: out of time, the next call goes on from the records that are there.
benchmark() {
    mkdir -p "$results"
    timeout "$(left)" "$python" benchmarks/run.py --device cuda --resume --sources "$package" --output "$results" --only "$@"
}

case $stage in
build) build ;;
test)
    build
    passed=passed-$digest.txt
    bring "$kept/$passed"
    workers=
    if "$python" -c 'import xdist' 2>/dev/null; then workers="-n 8"; fi
    status=0
    # every test that takes a device has it in its name
    # shellcheck disable=SC2086
    PYTHONPATH=python_tests timeout "$(left)" "$python" -P -m pytest python_tests -k cuda -m "not slow" -q $workers \
        -p no:cacheprovider -p passed_tests --passed "$out/$passed" >"$out/test.log" 2>&1 || status=$?
    tail -n 40 "$out/test.log"
    count=$(cat "$out/$passed" 2>/dev/null | wc -l)
    echo "$count tests passed so far"
    # 5: none was left to run
    if [ "$count" -gt 0 ] && { [ "$status" -eq 0 ] || [ "$status" -eq 5 ]; }; then
        { echo "$count tests passed on the GPU. The last run:"; echo; tail -n 1 "$out/test.log"; } | page cuda_test
        exit 0
    fi
    exit $((status > 0 ? status : 1))
    ;;
sanitize)
    build
    sanitizer=$(command -v compute-sanitizer || ls /usr/local/cuda*/bin/compute-sanitizer 2>/dev/null | head -n 1)
    if [ -z "$sanitizer" ]; then
        echo "compute-sanitizer is missing: nothing was checked" >&2
        exit 1
    fi
    "$python" -P benchmarks/sanitize_cases.py --kernels >"$out/kernels.txt"
    for tool in memcheck racecheck synccheck; do
        log=$tool-$digest.log
        bring "$kept/$log"
        if [ -f "$out/$log" ] && grep -q "^$tool found nothing" "$out/$log"; then continue; fi
        # one allocation for each tensor, and a gap after it: else memcheck takes a neighbour's memory for one's own.
        # Errors of the API are torch's, which asks for things to see whether they are there.
        PYTORCH_NO_CUDA_MEMORY_CACHING=1 timeout -k 10 "$(left)" "$sanitizer" --tool "$tool" --kernel-name kns=diffrate \
            --error-exitcode 1 --report-api-errors no --target-processes application-only --print-limit 20 \
            $([ "$tool" != memcheck ] || echo --padding 256) \
            "$python" -P benchmarks/sanitize_cases.py >"$out/$log" 2>&1 || {
            status=$?
            tail -n 60 "$out/$log"
            echo "$tool: status $status (124: out of time)" >&2
            exit "$status"
        }
        echo "$tool found nothing: $(grep ' calls$' "$out/$log")" >>"$out/$log"
        tail -n 2 "$out/$log"
    done
    {
        for tool in memcheck racecheck synccheck; do echo "- $(tail -n 1 "$out/$tool-$digest.log")"; done
        echo
        echo "Kernels:"
        echo
        sed 's/^/    /' "$out/kernels.txt"
    } | page cuda_sanitize
    ;;
operators)
    build
    bring benchmarks/results/cuda_ops*
    status=0
    benchmark ops --dtype bfloat16 || status=$?
    benchmark ops --operators masked_attention masked_prune_merge compression_rate || status=$?
    exit "$status"
    ;;
models)
    build
    bring benchmarks/results/cuda_models*
    status=0
    benchmark models --dtype bfloat16 || status=$?
    benchmark models || status=$?
    exit "$status"
    ;;
search)
    build
    bring benchmarks/results/cuda_search*
    benchmark search
    ;;
*)
    echo "unknown stage '$stage'; $usage" >&2
    exit 2
    ;;
esac
