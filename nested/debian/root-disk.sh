# Run by mmdebstrap when the packages are installed; $1 is the root file system. Leaves its disk image in /disk.img and the key to it in
# /id_ed25519.
set -eu
root=$1
work=$(mktemp -d "$root/../work.XXXXXX")

echo debian > "$root/etc/hostname"
printf '127.0.0.1 localhost\n127.0.1.1 debian\n' > "$root/etc/hosts"
echo 'LABEL=root / ext4 errors=remount-ro 0 1' > "$root/etc/fstab"
# The console logs root in without a password; sshd lets nobody in without the key.
chroot "$root" passwd --quiet --delete root

# Whatever card there is gets its address by DHCP.
cat > "$root/etc/systemd/network/80-dhcp.network" <<'END'
[Match]
Type=ether

[Network]
DHCP=yes
END
chroot "$root" systemctl --quiet enable systemd-networkd

# ssh over vsock, where there is no network (systemd.socket(5), ListenStream=vsock:CID:PORT).
echo vmw_vsock_virtio_transport > "$root/etc/modules-load.d/vsock.conf"
cat > "$root/etc/systemd/system/ssh-vsock.socket" <<'END'
[Unit]
Description=ssh over vsock
ConditionPathExists=/dev/vsock

[Socket]
ListenStream=vsock::22
Accept=yes

[Install]
WantedBy=sockets.target
END
cat > "$root/etc/systemd/system/ssh-vsock@.service" <<'END'
[Unit]
Description=One ssh connection over vsock

[Service]
ExecStart=-/usr/sbin/sshd -i
StandardInput=socket
END
chroot "$root" systemctl --quiet enable ssh-vsock.socket

# The key pair of this disk; its private half stays beside the image.
mkdir -p -m 700 "$root/root/.ssh"
ssh-keygen -q -t ed25519 -N '' -C root@debian -f "$work/key"
cp "$work/key.pub" "$root/root/.ssh/authorized_keys"

# One partition over the whole disk, of the type that says root file system for x86-64 (the Discoverable Partitions
# Specification), from the first MiB to the last.
size_mib=4096
truncate --size "${size_mib}M" "$work/disk.img"
printf 'label: gpt\nstart=1MiB, size=%dMiB, type=4F68BCE3-E8CD-4DB1-96E7-FBCAF984B709\n' $((size_mib - 2)) \
    | sfdisk --quiet "$work/disk.img"
# A bind mount shows the file system without /proc, /sys and /dev of the installation.
mkdir "$work/view"
mount --bind "$root" "$work/view"
mke2fs -q -t ext4 -L root -E offset=1048576 -d "$work/view" "$work/disk.img" $(((size_mib - 2) * 1024))
umount "$work/view"
mv "$work/disk.img" "$root/disk.img"
mv "$work/key" "$root/id_ed25519"
rm -r "$work"
