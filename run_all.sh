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
#   ./run_all.sh bench scan cpu       time and memory of the scan on this machine
#   ./run_all.sh train --data DIR     a network for your own scans; or --dataset NAME
#   ./run_all.sh evaluate CHECKPOINT  its metrics on the cases that were held out
#   ./run_all.sh predict CHECKPOINT SCAN... --out DIR
#                                     masks on the scans' own grids
#   ./run_all.sh info | data | grid | claims | export | nnunet
#                                     the other commands of "python -m srlib"; each has -h
#
# Results go to results/<profile>/<dataset>/, index.html there is the front page. It uses the active Python
# environment when everything in pyproject.toml is installed there; otherwise it makes .venv from requirements.lock, once.
set -euo pipefail
unset CDPATH # with it "cd" may go elsewhere, and says where

# The checkout is where this file is, symbolic links to it resolved.
file=${BASH_SOURCE[0]}
while [ -L "$file" ]; do
  folder=$(cd -P -- "$(dirname -- "$file")" && pwd)
  file=$(readlink -- "$file")
  [ "${file#/}" != "$file" ] || file=$folder/$file
done
root=$(cd -P -- "$(dirname -- "$file")" && pwd)
lock=$root/requirements.lock
venv=$root/.venv
mark=$venv/made-by-run_all # in a .venv that is this script's; when that is complete, a copy of the lock

fail() {
  echo "run_all.sh: $*" >&2
  exit 2
}

if [ ! -f "$root/srlib/__main__.py" ] || [ ! -f "$lock" ]; then
  fail "$root is no checkout of srlib (copied? link to the checkout's run_all.sh instead)"
fi
case $root in *:*) fail "$root: Python's path cannot hold a folder with ':' in its name; rename it" ;; esac

# Only what is installed and this checkout can be imported, not files beside somebody's data: in here, and in all
# that is started from here. Of PYTHONPATH that leaves absolute entries; an empty one is the working directory.
export PYTHONSAFEPATH=1
# Threads that wait for the others give way soon. As OpenMP has it they spin for milliseconds: a step of a training by
# two threads beside the test suite took 6.9 s in place of 1.9; alone on the machine it is 7 % slower so.
export GOMP_SPINCOUNT="${GOMP_SPINCOUNT:-10000}"
path=""
IFS=: read -r -a entries <<<"${PYTHONPATH:-}"
for entry in ${entries[@]+"${entries[@]}"}; do
  case $entry in /*) path=$path:$entry ;; esac
done
export PYTHONPATH=$root$path

usage() { sed -n '2,/^set /{/^set /d;s/^# \{0,1\}//;p;}' "$root/run_all.sh"; }

# Succeeds when a Python has every dependency that pyproject.toml lists, in its range.
complete() {
  "$1" - "$root/pyproject.toml" >/dev/null 2>&1 <<'PYTHON'
import sys

assert sys.version_info >= (3, 11)  # older ones know no safe path, so that nothing else is imported before

import tomllib
from importlib.metadata import version

from packaging.requirements import Requirement

with open(sys.argv[1], "rb") as file:
    for line in tomllib.load(file)["project"]["dependencies"]:
        requirement = Requirement(line)
        assert requirement.specifier.contains(version(requirement.name), prereleases=True)
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
  fail 'needs Python 3.11 to 3.14, found none; see docs/troubleshooting.md'
}

# Waits for its turn, at most an hour. The system takes the lock, on an open file, back when this process ends.
take_turn() {
  "$1" -c '
import fcntl, sys, time
for second in range(3600):
    try:
        sys.exit(fcntl.flock(9, fcntl.LOCK_EX | fcntl.LOCK_NB))
    except BlockingIOError:
        second or print("run_all.sh: another run_all.sh makes .venv; waiting for it", flush=True)
        time.sleep(1)
sys.exit(1)' || fail "another run_all.sh has been making $venv for an hour; end it, then try again"
}

make_venv() {
  local base
  base=$(base_python)
  exec 9>>"$lock" # nothing is written to it
  take_turn "$base"
  if ! cmp -s "$lock" "$mark"; then
    fill_venv "$base"
  fi
  exec 9>&-
}

fill_venv() {
  if [ ! -e "$mark" ] && { [ -e "$venv" ] || [ -L "$venv" ]; }; then
    fail "$venv was not made by this script: move it away, or activate it with everything in pyproject.toml installed"
  fi
  echo "run_all.sh: the active environment lacks packages; making .venv from requirements.lock"
  echo "run_all.sh: (several minutes, once; a GPU build of torch is a download of some gigabytes)"
  SECONDS=0
  mkdir -p "$venv"
  : >"$mark"
  find "$venv/" -mindepth 1 -maxdepth 1 ! -name "${mark##*/}" -exec rm -rf {} +
  if ! "$1" -m venv "$venv"; then
    fail "\"$1 -m venv\" failed; on Debian and Ubuntu install python3-venv"
  fi
  # Isolated: what PYTHONPATH leads to is not in .venv.
  local pip=("$venv/bin/python" -I -m pip install --quiet --disable-pip-version-check)
  "${pip[@]}" --no-deps --require-hashes -r "$lock"
  "${pip[@]}" --no-warn-conflicts -r "$root/requirements-torch.lock" # the lock leaves out what is not used
  "${pip[@]}" --no-deps -e "$root"
  cp "$lock" "$mark"
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
  cmp -s "$lock" "$mark" || make_venv
  python=$venv/bin/python
fi

exec "$python" -m srlib "$@"
