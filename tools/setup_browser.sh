#!/usr/bin/env bash
# What tests/browser drives: Chromium, by the system's packages where it is not there, and Playwright in the environment.
# Leaves with 75 where they cannot be had.
#
# Environment: BIN (default .venv/bin).
set -euo pipefail
cd "$(dirname "$0")/.."
bin="${BIN:-.venv/bin}"

unavailable() { echo "browser: $1, so that no browser has opened a report" >&2; exit 75; }

if ! command -v chromium chromium-browser google-chrome > /dev/null; then
  [ "$(id -u)" = 0 ] && command -v apt-get > /dev/null || unavailable "there is no Chromium here (Debian: apt-get install chromium)"
  printf '\n== browser: Chromium\n'
  { apt-get -q update && DEBIAN_FRONTEND=noninteractive apt-get -q install -y chromium; } > /dev/null 2>&1 \
    || unavailable "Chromium cannot be installed"
fi
# The driver alone: no browser of its own is fetched.
"$bin/python" -c 'import playwright' 2> /dev/null || "$bin/python" -m pip --disable-pip-version-check install -q --group browser \
  || unavailable "Playwright cannot be installed"
