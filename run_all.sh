#!/usr/bin/env bash
# Executes the collection: every notebook, figure and table, by one command, from any directory.
#
#   ./run_all.sh                      the default profile on the embedded data
#   ./run_all.sh --profile NAME       smoke (minutes), default (a laptop) or full (a GPU)
#   ./run_all.sh --dataset NAME       mni152 (embedded) or hippocampus; "data list" says more
#   ./run_all.sh --only 03            one notebook; may be repeated
#   ./run_all.sh --force              compute what is there and unchanged again
#   ./run_all.sh --seed 1             another seed of every training; its results go apart
#   ./run_all.sh --list               the notebooks and whether they are done
#   ./run_all.sh test                 the tests, and the notebooks in the smoke profile
#   ./run_all.sh verify               compare the last run's tables with the repository's
#   ./run_all.sh lab                  JupyterLab at 00_start_here, with the explorers
#   ./run_all.sh bench scan           time and memory of the scan on this machine
#   ./run_all.sh train --data DIR     a network for your own scans; or --dataset NAME
#   ./run_all.sh evaluate CHECKPOINT  its metrics on the cases that were held out
#   ./run_all.sh predict CHECKPOINT SCAN... --out DIR
#                                     masks on the scans' own grids
#   ./run_all.sh info | data          the other commands of "python -m srlib"; each has -h
#
# Results go to results/<profile>/<dataset>/, index.html there is the front page. It uses the active Python
# environment when everything in pyproject.toml is installed there; otherwise it makes .venv from requirements.lock, once.
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd -P)
lock=$root/requirements.lock
venv=$root/.venv

usage() { sed -n '2,/^set /{/^set /d;s/^# \{0,1\}//;p;}' "$root/run_all.sh"; }

# Whether a Python has every dependency that pyproject.toml lists (their names; pip holds the versions).
complete() {
  "$1" - "$root/pyproject.toml" >/dev/null 2>&1 <<'PYTHON'
import sys
import tomllib
from importlib.metadata import distribution
from re import match

with open(sys.argv[1], "rb") as file:
    for requirement in tomllib.load(file)["project"]["dependencies"]:
        distribution(match("[A-Za-z0-9_.-]+", requirement)[0])
PYTHON
}

# A Python that the lock is for.
base_python() {
  for name in python3 python3.13 python3.12 python3.11 python3.14 python; do
    if "$name" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 15))' 2>/dev/null; then
      command -v "$name"
      return
    fi
  done
  echo "run_all.sh: needs Python 3.11 to 3.14, found none; see docs/troubleshooting.md" >&2
  return 1
}

make_venv() {
  local base
  base=$(base_python)
  echo "run_all.sh: the active environment lacks packages; making .venv from requirements.lock"
  echo "run_all.sh: (several minutes, once; a GPU build of torch is a download of some gigabytes)"
  SECONDS=0
  rm -rf "$venv"
  if ! "$base" -m venv "$venv"; then
    echo "run_all.sh: \"$base -m venv\" failed; on Debian and Ubuntu install python3-venv" >&2
    return 1
  fi
  "$venv/bin/python" -m pip install --quiet --disable-pip-version-check -r "$lock"
  "$venv/bin/python" -m pip install --quiet --disable-pip-version-check --no-deps \
    -r "$root/requirements-nodeps.lock" -e "$root"
  cp "$lock" "$venv/requirements.lock" # last: says that .venv is complete, and of which lock
  echo "run_all.sh: .venv is ready after ${SECONDS} s"
}

case "${1:-}" in
  -h | --help)
    usage
    exit
    ;;
  "" | -*) set -- collection "$@" ;;
esac

python=""
for name in python python3; do
  if [ -z "$python" ] && complete "$name"; then python=$name; fi
done
if [ -z "$python" ]; then
  cmp -s "$lock" "$venv/requirements.lock" || make_venv
  python=$venv/bin/python
fi

export PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}" # this checkout, whichever else is installed
exec "$python" -m srlib "$@"
