#!/usr/bin/env bash
# Builds diffrate_ext once, under the newest torch, and runs its operator tests under every torch release it supports.
# Downloads several GB and takes about five minutes a release:
#   scripts/test_torch_versions.sh [VERSION ...]
set -euo pipefail
cd "$(dirname "$0")/.."
versions=("$@")
[ ${#versions[@]} -gt 0 ] || versions=(2.10.0 2.11.0 2.12.1 2.13.0 2.14.1 2.15.0)
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/newest"
"$work/newest/bin/pip" install -q '.[test]'
for version in "${versions[@]}"; do
  scripts/test_torch_version.sh "$version" "$work/newest" "$work/$version" python_tests/ops python_tests/test_abi.py
  rm -rf "${work:?}/$version"
done
