#!/usr/bin/env bash
# Makes .venv in the project's root: Python, every package that is pinned for it, ppvision.
#
#   bash scripts/setup.sh                                      a few minutes the first time, then at once
#   source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"           the same from another script; afterwards
#                                                              `python` and `ppvision` are those of .venv
#   REQUIREMENTS=requirements-gpu.txt bash scripts/setup.sh    see the head of that file
#   PYTHON=python3.12 bash scripts/setup.sh                    another Python than 3.11: 3.10, 3.12, 3.13
#   VENV=.venv-3.12 PYTHON=... bash scripts/setup.sh           another folder than .venv
#
# .venv/ppvision-setup has one line: the requirements file, and a hash of all inputs of the
# installation, or the word `unfinished` while it runs. An unfinished .venv is made again, because
# pip treats a half-copied package as installed.
set -euo pipefail

ppvision_setup() (
  root="$1"
  venv="$root/${VENV:-.venv}"
  state_file="$venv/ppvision-setup"

  fail() {
    printf 'setup: %s\n' "$@" >&2
    exit 1
  }

  read_state() { # sets: chosen requirements file, hash or `unfinished`
    chosen="" state=""
    if [[ -f "$state_file" ]]; then read -r chosen state <"$state_file" || true; fi
  }

  write_state() {
    printf '%s %s\n' "$requirements" "$1" >"$state_file.new"
    mv "$state_file.new" "$state_file"
  }

  # The root is part of it, because the `ppvision` command and the editable install name it.
  fingerprint() {
    { echo "$root $requirements" && cat "$root/$requirements" "$root/pyproject.toml"; } | sha256sum | cut -d ' ' -f 1
  }

  version_of() { # 3.11, or nothing where that is no Python which works
    "$1" -c 'import sys; print("{}.{}".format(*sys.version_info[:2]))' 2>/dev/null || true
  }

  python_of() { # the version that a requirements file is for
    case "$1" in
      requirements/python3.*) basename "$1" .txt | tr -d a-z ;;
      *) echo 3.11 ;;
    esac
  }

  pins_of() { # the requirements file of a version, or nothing
    case "$1" in
      3.11) echo requirements.txt ;;
      3.10 | 3.12 | 3.13) echo "requirements/python$1.txt" ;;
    esac
  }

  find_python() { # for $requirements, if that is chosen already
    local name version
    for name in ${PYTHON:-python3.11 python3 python3.12 python3.13 python3.10}; do
      version="$(version_of "$name")"
      [[ -n "$(pins_of "$version")" ]] || continue
      if [[ -z "$requirements" || "$version" == "$(python_of "$requirements")" ]]; then
        echo "$name"
        return
      fi
    done
    fail "expected Python $([[ -n "$requirements" ]] && python_of "$requirements" || echo "3.10 to 3.13") as" \
      "${PYTHON:-python3.11 or python3 on PATH}, got $("${PYTHON:-python3}" --version 2>&1 || echo 'none')." \
      "Install it (Debian, Ubuntu: apt-get install python3.11 python3.11-venv) and run this again," \
      "or name another one, 3.10 to 3.13: PYTHON=/path/to/python3.12 bash scripts/setup.sh"
  }

  show_progress() { # pip's output, one line for every 20 packages
    local line count=0
    while IFS= read -r line; do
      case "$line" in
        Collecting\ * | Processing\ * | Requirement\ already\ satisfied:*)
          count=$((count + 1))
          if ((count % 20 == 0)); then echo "  $count of $total packages fetched"; fi
          ;;
        Installing\ collected\ packages:*)
          if ((count > 0)); then echo "  copying them into .venv"; fi
          ;;
      esac
    done
  }

  pip_install() {
    "$venv/bin/python" -m pip install --disable-pip-version-check --no-input --progress-bar off \
      --no-deps "$@" 2>&1 | tee -a "$venv/setup.log" | show_progress ||
      fail "pip failed; the end of $venv/setup.log:" "$(tail -n 15 "$venv/setup.log")" \
        "Mend that (network, disk space; for a GPU see the head of requirements-gpu.txt)" \
        "and run this again."
  }

  read_state
  wanted="${PYTHON:+$(pins_of "$(version_of "$PYTHON")")}"
  requirements="${REQUIREMENTS:-${wanted:-$chosen}}"
  if [[ -z "$requirements" && -x "$venv/bin/python" ]]; then # made by the user
    requirements="$(pins_of "$(version_of "$venv/bin/python")")"
  fi
  if [[ -z "$requirements" ]]; then
    python="$(find_python)"
    requirements="$(pins_of "$(version_of "$python")")"
  fi
  [[ -f "$root/$requirements" ]] ||
    fail "expected REQUIREMENTS to name a file in $root, got '$requirements'."
  if [[ -x "$venv/bin/python" && "$state" == "$(fingerprint)" ]]; then exit 0; fi

  exec 9>"$root/.venv.lock"
  if ! flock --nonblock 9; then
    echo "setup: another set-up of $root is running; waiting for it" >&2
    flock 9
  fi
  read_state # the other one may have done it
  if [[ -x "$venv/bin/python" && "$state" == "$(fingerprint)" ]]; then exit 0; fi
  # Without dependencies, paddlepaddle and paddlepaddle-gpu would end up in one folder.
  [[ "${chosen:-$requirements}" == "$requirements" ]] ||
    fail "expected $requirements, got a .venv made from $chosen." "Delete $venv and run this again."

  if [[ "$state" == unfinished || ! -x "$venv/bin/python" ]]; then
    python="$(find_python)"
    if [[ "$state" == unfinished ]]; then echo "setup: the last set-up did not finish; starting again"; fi
    rm -rf "$venv"
    mkdir "$venv"
    write_state unfinished
    "$python" -m venv "$venv" ||
      fail "could not make $venv with $python (Debian, Ubuntu: apt-get install python3.11-venv)."
  fi
  [[ "$(version_of "$venv/bin/python")" == "$(python_of "$requirements")" ]] ||
    fail "expected Python $(python_of "$requirements") in $venv, got $("$venv/bin/python" --version 2>&1)." \
      "Delete $venv and run this again."
  write_state unfinished

  total="$(grep -c '^[a-z]' "$root/$requirements")"
  echo "setup: $total packages of $requirements into $venv"
  pip_install -r "$root/$requirements"
  pip_install --no-build-isolation -e "$root"
  write_state "$(fingerprint)"
  echo "setup: done; \`source .venv/bin/activate\` gives you the ppvision command"
)

ppvision_root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd -P)"
ppvision_setup "$ppvision_root"
export PATH="$ppvision_root/.venv/bin:$PATH"

# On AMD processors Paddle's MKL uses slow generic kernels unless this variable names the features of
# the processor (docs/design.md has the measurement). MKL reads it once, before Paddle starts.
if grep -q AuthenticAMD /proc/cpuinfo && [ -z "${MKL_DEBUG_CPU_TYPE:-}" ]; then
  MKL_DEBUG_CPU_TYPE="$(python -c "import os
from ppvision.environment import prefer_fast_mkl
prefer_fast_mkl()
print(os.environ['MKL_DEBUG_CPU_TYPE'])")"
  export MKL_DEBUG_CPU_TYPE
fi
