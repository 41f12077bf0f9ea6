#!/usr/bin/env bash
# Installs what building needs and says what cannot be installed from here. Quick when there is nothing to do.
set -euo pipefail

if ! command -v cargo >/dev/null; then
    echo "setup: cargo is missing: install Rust 1.88 or newer (rustup.rs), then run make again" >&2
    exit 3
fi

missing=()
# gdb is for the test of core files, ip and passt are for those of networks.
for tool in cc gdb ip make passt xz; do
    command -v "$tool" >/dev/null || case $tool in
        cc) missing+=(gcc libc6-dev) ;;
        ip) missing+=(iproute2) ;;
        xz) missing+=(xz-utils) ;;
        *) missing+=("$tool") ;;
    esac
done
# For tests of disk images, which no tool has to mount.
for tool in mkfs.ext4 mkfs.vfat mcopy; do
    PATH=$PATH:/usr/sbin:/sbin command -v "$tool" >/dev/null || case $tool in
        mkfs.ext4) missing+=(e2fsprogs) ;;
        mkfs.vfat) missing+=(dosfstools) ;;
        mcopy) missing+=(mtools) ;;
    esac
done
# For the test of the Python client.
python3 -c 'import venv, ensurepip' 2>/dev/null || missing+=(python3-venv)
if ((${#missing[@]})); then
    if [[ $(id -u) == 0 ]]; then
        apt-get update -qq
        apt-get install -qq -y --no-install-recommends "${missing[@]}" >/dev/null
    else
        echo "setup: run: sudo apt-get install ${missing[*]}" >&2
        exit 3
    fi
fi
