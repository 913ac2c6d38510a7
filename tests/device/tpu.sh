#!/usr/bin/env bash
# Checks this project on a TPU VM within eight minutes: every kernel against its definition, each
# timed beside its XLA form and its floor, and ten steps of training.
#
#   tests/device/tpu.sh OUT                figures go to OUT/report.json and OUT/report.txt
#   tests/device/tpu.sh OUT --interpret    without a TPU: the kernels interpreted on a CPU, untimed
#
# PYTHON names the interpreter (.venv-tpu/bin/python, which `make .venv-tpu/.installed` makes).
# Exit status: 0 all holds, 1 a check failed, 2 it could not begin.
set -uo pipefail
if [ $# -lt 1 ] || [ "${1#-}" != "$1" ]; then
    echo "usage: tests/device/tpu.sh OUT [--interpret]" >&2
    exit 2
fi
out=$(realpath -m "$1")
shift
cd "$(dirname "${BASH_SOURCE[0]}")/../.." || exit 2
python=${PYTHON:-.venv-tpu/bin/python}
if ! command -v "$python" > /dev/null; then
    echo "tpu.sh: PYTHON=$python does not run; make .venv-tpu/.installed, or name another" >&2
    exit 2
fi
mkdir -p "$out" || exit 2
case " $* " in
    *" --interpret "*) limit=0 ;; # a busy CPU takes as long as it takes
    *) limit=480 ;;
esac
exec timeout "$limit" "$python" -m tests.device.tpu --output="$out" "$@"
