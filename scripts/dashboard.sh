#!/usr/bin/env bash
# Show runs in a browser:  bash scripts/dashboard.sh RUN_FOLDER...
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"

[ $# -ge 1 ] || { sed -n '2s/^# //p' "${BASH_SOURCE[0]}" >&2; exit 2; }
exec python -m ppvision.dashboard "$@"
