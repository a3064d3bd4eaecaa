#!/usr/bin/env bash
# What only a GPU can show, in two calls of nine minutes: benchmarks/gpu.sh, benchmarks/gpu.sh --second
# Needs no network, and no installed igrpo-lite: packages may lie in a folder on PYTHONPATH. See benchmarks/README.md.
set -euo pipefail

root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
if [ -z "${PYTHON:-}" ] && [ -x "$root/.venv/bin/python" ]; then
    PYTHON="$root/.venv/bin/python"
fi
PYTHON="${PYTHON:-python3}"
if ! command -v "$PYTHON" > /dev/null; then
    echo "gpu.sh: there is no $PYTHON here; name one: PYTHON=/path/to/python benchmarks/gpu.sh" >&2
    exit 2
fi
# The package of this checkout, whatever else is installed.
export PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}"
exec "$PYTHON" "$root/benchmarks/gpu.py" "$@"
