#!/usr/bin/env bash
# Checks the systemd unit: it parses, and it exposes little.
set -euo pipefail
cd "$(dirname "$0")/.."

scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
# The program of the unit is not installed here, and systemd insists that it is there.
sed 's|^ExecStart=[^ ]*|ExecStart=/bin/true|' hsm-config/lacre.service >"$scratch/lacre.service"

# systemd-analyze says what it dislikes on stderr and exits 0 on most of it; units of the machine
# it happens to load are not ours.
complaints=$(systemd-analyze verify "$scratch/lacre.service" 2>&1 | grep -F lacre.service || true)
if [ -n "$complaints" ]; then
  printf '%s\n' "$complaints"
  exit 1
fi
# The threshold is in tenths: 20 is an exposure of 2.0.
systemd-analyze security --offline=true --threshold=20 --no-pager "$scratch/lacre.service" | tail -n 1
