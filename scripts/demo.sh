#!/usr/bin/env bash
# Shows vmprobe at work: the built-in guest on this host's /dev/kvm, then a stock Debian kernel whose init does known
# work. Ends with exit code 0 only if the hits of both probes equal what the guest counted itself.
set -euo pipefail

vmprobe=$1
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

say() { printf '\n\033[1m%s\033[0m\n' "$*"; }

if [[ -r /dev/kvm && -w /dev/kvm ]]; then
    say '$ vmprobe run demo --probe tick --max-hits 5'
    "$vmprobe" run demo --probe tick --max-hits 5
else
    say 'No usable /dev/kvm here: everything runs in the emulated machine.'
fi

say '$ vmprobe prepare kernel; vmprobe prepare initrd'
kernel=$("$vmprobe" prepare kernel)
initrd=$("$vmprobe" prepare initrd)
echo "$kernel"
echo "$initrd"

say "\$ vmprobe run KERNEL --initrd INITRD --cmdline quiet --probe do_sys_openat2 --probe __x64_sys_getppid"
status=0
"$vmprobe" run "$kernel" --initrd "$initrd" --timeout 10m --serial "$work/console" --verbose \
    --cmdline quiet --probe do_sys_openat2 --probe __x64_sys_getppid >"$work/hits" || status=$?
awk 'NR <= 8 { print } END { if (NR > 8) printf "... and %d more hits\n", NR - 8 }' "$work/hits"
if ((status != 0)); then
    echo "demo: the run ended with exit code $status; the guest's console:" >&2
    tail -n 30 "$work/console" >&2
    exit "$status"
fi

say 'Counted by the host and by the guest'
verdict=0
while read -r symbol word; do
    hits=$(grep -c " $symbol+" "$work/hits" || true)
    counted=$(tr -d '\r' <"$work/console" | awk -v word="$word" '$1 == "count" && $2 == word { print $3 }')
    printf '%-22s %6s hits   guest counted %6s\n' "$symbol" "$hits" "${counted:-none}"
    [[ -n $counted && $hits == "$counted" ]] || verdict=1
done <<'PAIRS'
do_sys_openat2 openat
__x64_sys_getppid getppid
PAIRS
if ((verdict != 0)); then
    echo "demo: the counts differ" >&2
fi
exit "$verdict"
