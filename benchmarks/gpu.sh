#!/bin/sh
# usage: sh benchmarks/gpu.sh [--resume] [--output FOLDER] STAGE...
#
# The package on a machine with a GPU, in the environment of $PYTHON (python3). Stages, of which `build` comes first:
#   build       builds the package for this GPU and installs it
#   test        runs the tests that take a GPU
#   sanitize    runs every kernel under compute-sanitizer: memcheck, racecheck, synccheck
#   operators   times every operator
#   models      times whole models
#   search      times the step of the rate search
#   bars        of operators and models only those that have a bar to reach
#   tune        times all variants of the kernels that come in several
# Options:
#   --resume          operators, models, search: keep the records that are there, and go on
#   --output FOLDER   where results go, instead of benchmarks/results
# Needs no network, but Python >= 3.11, a CUDA build of torch, timm, pytest, hypothesis, setuptools, cmake, ninja,
# pybind11, and the CUDA toolkit.
set -eu
usage() { sed -n '2,/^set/s/^# \{0,1\}//p' "$0"; }
python=${PYTHON:-python3}
PATH=$PATH:/usr/local/cuda/bin
output=$(dirname "$0")/results
resume=
stages=
while [ $# -gt 0 ]; do
    case $1 in
    --resume) resume=$1 ;;
    --output) output=${2:?"--output needs a folder"} && shift ;;
    build | test | sanitize | operators | models | search | bars | tune) stages="$stages $1" ;;
    *) usage >&2 && exit 2 ;;
    esac
    shift
done
[ -n "$stages" ] || { usage && exit 2; }
mkdir -p "$output"
output=$(cd "$output" && pwd)
log=$(mktemp)
trap 'rm -f "$log"' EXIT
failed=0
cd "$(dirname "$0")/.."
where=$("$python" benchmarks/machine.py)

# -P: the checkout's own folder holds no compiled library, and must not stand in for the installed package
build() {
    architecture=$("$python" -c 'import torch; print("%d.%d" % torch.cuda.get_device_capability())')
    DIFFRATE_CUDA=ON TORCH_CUDA_ARCH_LIST=${TORCH_CUDA_ARCH_LIST:-$architecture} \
        "$python" -m pip install --no-build-isolation --no-deps --force-reinstall .
}

check_build() {
    "$python" -P -c 'import diffrate_ext
if not diffrate_ext.build_info()["cuda_architectures"]:
    raise SystemExit("diffrate_ext has no CUDA kernels: run the stage `build`")'
}

# A page of results: a line that sums up, and standard input.
page() { { echo "$2; $where" && echo && cat; } >"$output/$1.md" && head -n 1 "$output/$1.md"; }

run_tests() { # each that takes a device has it in its name
    "$python" -P -m pytest python_tests -k cuda -m "not slow" -q -p no:cacheprovider >"$log" 2>&1 ||
        { cat "$log" && return 1; }
    tail -n 1 "$log" | page cuda_test "all tests passed"
}

sanitize() {
    kernels=$("$python" benchmarks/sanitize_cases.py --kernels)
    for tool in memcheck racecheck synccheck; do
        # A gap after each tensor: else memcheck takes a neighbour's memory for one's own. Errors of the API are torch's,
        # which asks for things to see whether they are there.
        PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool "$tool" --kernel-name kns=diffrate --error-exitcode 1 \
            $([ "$tool" != memcheck ] || echo --padding 256) --report-api-errors no --print-limit 20 \
            --target-processes application-only "$python" benchmarks/sanitize_cases.py >"$log" 2>&1 ||
            { cat "$log" && return 1; }
        echo "$kernels" | sed 's/^/    /' | page "cuda_$tool" "nothing found in $(grep ' calls$' "$log")"
    done
}

tune() {
    for kernel in attention prune_merge; do
        "$python" "benchmarks/tune_$kernel.py" >"$log" 2>&1 || { cat "$log" && return 1; }
        sed 's/^/    /' "$log" | page "cuda_tune_$kernel" "every way to run $kernel, at each shape"
    done
}

# What fails is listed among the results, and the rest is measured all the same.
measure() { "$python" benchmarks/run.py --device cuda --output "$output" $resume --only "$@" || failed=1; }

for stage in $stages; do
    echo "--- $stage"
    [ "$stage" != build ] || build
    check_build
    case $stage in
    test) run_tests ;;
    sanitize) sanitize ;;
    operators) measure ops --dtype bfloat16; measure ops --operators masked_attention masked_prune_merge compression_rate ;;
    models) measure models --dtype bfloat16; measure models ;;
    search) measure search ;;
    bars) measure ops --dtype bfloat16 --bars; measure models --dtype bfloat16 --bars ;;
    tune) tune ;;
    esac
done
"$python" benchmarks/report.py "$output"
exit "$failed"
