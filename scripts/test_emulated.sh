#!/usr/bin/env bash
# Runs the operators' tests on the CUDA kernels without a GPU: the kernels compiled for the emulated device
# (csrc/testing/emulation), behind operators that take CPU tensors. Needs an environment whose python3 has diffrate_ext
# and its test requirements installed; the installed library is not touched.
#   scripts/test_emulated.sh [BUILD_FOLDER [pytest arguments]]
# BUILD_FOLDER is kept and used again; without one a temporary folder serves. The environment chooses more:
#   DIFFRATE_SANITIZE=ON   the address and undefined-behaviour sanitizers, which also find accesses out of bounds
#   DIFFRATE_EMULATION_ORDER, DIFFRATE_EMULATION_SEED   the order of threads: see csrc/testing/emulation/schedule.h
set -euo pipefail
cd "$(dirname "$0")/.."
if [ $# -gt 0 ]; then
  folder=$1
  shift
else
  folder=$(mktemp -d)
  trap 'rm -rf "$folder"' EXIT
fi
python3 -c 'import hypothesis, pytest, timm'  # before minutes of building
sanitize=${DIFFRATE_SANITIZE:-OFF}
cmake -S . -B "$folder" -GNinja -DDIFFRATE_EMULATE=ON -DDIFFRATE_SANITIZE="$sanitize" -DBUILD_TESTING=OFF \
  -DPython_EXECUTABLE="$(command -v python3)" >/dev/null
cmake --build "$folder"

# the package: the checkout's Python files and this build's libraries
package=$(cd "$folder" && pwd)/package
rm -rf "$package" && mkdir -p "$package/diffrate_ext"
for file in diffrate_ext/*; do
  case $file in *.so) ;; *) ln -s "$PWD/$file" "$package/$file" ;; esac
done
cmake --install "$folder" --prefix "$package/diffrate_ext" >/dev/null

export PYTHONPATH=$package${PYTHONPATH:+:$PYTHONPATH}
export CUDA_VISIBLE_DEVICES= DIFFRATE_EMULATED_TESTS=1
if [ "$sanitize" = ON ]; then
  export ASAN_OPTIONS=detect_leaks=0  # Python's own
  LD_PRELOAD="$(g++ -print-file-name=libasan.so) $(g++ -print-file-name=libubsan.so)"
  export LD_PRELOAD
fi
(cd "$package" && python3 -) <<'CHECK'
import diffrate_ext

if diffrate_ext.build_info()["cuda_architectures"] != ["emulated"]:
    raise SystemExit(f"the tests would not run on the emulated device: {diffrate_ext.__file__} is another build")
CHECK
# Left out: threads and memory of the CPU kernels. Not python3 -m pytest: it would put the checkout before the package.
python3 -c 'import sys; sys.path.pop(0); import pytest; sys.exit(pytest.main(sys.argv[1:]))' -q -rfE -m "not slow" -p no:cacheprovider python_tests/ops \
  --ignore python_tests/ops/test_threads_and_memory.py "$@"
