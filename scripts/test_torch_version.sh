#!/usr/bin/env bash
# Runs the tests of an installed diffrate_ext, not built again, under another torch:
#   scripts/test_torch_version.sh 2.10.0 VENV_WITH_DIFFRATE NEW_VENV [pytest arguments]
# For every release the library supports: see scripts/test_torch_versions.sh.
set -euo pipefail
version=$1 built=$2 new=$3
shift 3
cd "$(dirname "$0")/.."
site() { "$1/bin/python" -c 'import sysconfig; print(sysconfig.get_path("platlib"))'; }

"$built/bin/python" -m venv "$new"
"$built/bin/python" scripts/requirements.py dependencies test | grep -v '^torch' >"$new/requirements.txt"
"$new/bin/pip" install -q "torch==$version" torchvision -r "$new/requirements.txt"
cp -r "$(site "$built")"/diffrate_ext "$(site "$built")"/diffrate_ext-*.dist-info "$(site "$new")"/
cp "$built/bin/diffrate" "$new/bin/diffrate" && sed -i "1s|.*|#!$new/bin/python|" "$new/bin/diffrate"
(cd / && "$new/bin/diffrate" info)
# not python -m pytest: it would put the checkout, which holds no compiled library, before the installed package
"$new/bin/pytest" -q -m "not slow" --ignore python_tests/benchmarks "$@"
