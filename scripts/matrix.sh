#!/usr/bin/env bash
# Runs `scripts/wheel_check.sh` in a fresh environment for each supported version whose Python this
# machine has (`python3.X` on PATH, or in pyenv). Prints the table of docs/install.md; errors go to
# stderr. Each line takes 2 to 5 minutes.
#
#   bash scripts/test.sh --matrix                      all
#   bash scripts/test.sh --matrix 3.12 3.10:3.3.1      these: a Python, a Python with a Paddle
set -uo pipefail

scripts="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd -P)"
readonly pythons=(3.10 3.11 3.12 3.13) paddles=(3.2.2 3.3.1)

find_python() { # VERSION: the first that works and is of this version
  local candidate
  for candidate in "python$1" "${PYENV_ROOT:-$HOME/.pyenv}/versions/$1".*/bin/python; do
    if [[ "$("$candidate" -c 'import sys; print("{}.{}".format(*sys.version_info[:2]))' 2>/dev/null)" == "$1" ]]; then
      echo "$candidate"
      return
    fi
  done
  return 1
}

is_wanted() { # PYTHON PADDLE ARGUMENTS...
  local python="$1" paddle="$2" argument
  shift 2
  [[ $# -gt 0 ]] || return 0
  for argument in "$@"; do
    if [[ "$argument" == "$python" || "$argument" == "$python:$paddle" ]]; then return 0; fi
  done
  return 1
}

known=()
for python in "${pythons[@]}"; do
  known+=("$python")
  for paddle in "${paddles[@]}"; do known+=("$python:$paddle"); done
done
for argument in "$@"; do
  if [[ " ${known[*]} " != *" $argument "* ]]; then
    echo "matrix: expected one of ${known[*]}, got '$argument'" >&2
    exit 2
  fi
done

failed=0
echo "| Python | Paddle | NumPy | the wheel alone | engine of the zoo's model |"
echo "|---|---|---|---|---|"
for python in "${pythons[@]}"; do
  for paddle in "${paddles[@]}"; do
    is_wanted "$python" "$paddle" "$@" || continue
    if ! program="$(find_python "$python")"; then
      echo "| $python | $paddle | | not run: no such Python here | |"
      continue
    fi
    if said="$(PYTHON="$program" PADDLE="$paddle" bash "$scripts/wheel_check.sh" 2>&1)"; then
      # wheel: Python 3.12.1, paddlepaddle 3.3.1, numpy 2.5.5: trained, ...; zoo in native
      sed -n 's/^wheel: Python \([^,]*\), paddlepaddle \([^,]*\), numpy \([^:]*\): .*; zoo in \(.*\)/| \1 | \2 | \3 | runs | \4 |/p' <<<"$said"
    else
      echo "| $python | $paddle | | fails | |"
      echo "matrix: Python $python, Paddle $paddle: $(tail -n 20 <<<"$said")" >&2
      failed=1
    fi
  done
done
exit "$failed"
