#!/usr/bin/env bash
# The browser tests drive the system's Chromium. Installs it where apt-get and the right to use it exist.
set -euo pipefail

for name in chromium chromium-browser google-chrome; do
    if command -v "$name" >/dev/null; then exit 0; fi
done

as_root=()
if [ "$(id -u)" -ne 0 ]; then as_root=(sudo -n); fi

if ! command -v apt-get >/dev/null || ! "${as_root[@]}" true 2>/dev/null; then
    echo "Chromium is not installed and cannot be installed from here: the browser tests will be skipped." >&2
    echo "Install Chromium (Debian: apt-get install chromium) and run the tests again." >&2
    exit 0
fi

export DEBIAN_FRONTEND=noninteractive
"${as_root[@]}" apt-get update -qq
"${as_root[@]}" apt-get install -y -qq --no-install-recommends chromium fonts-dejavu-core >/dev/null
