# The only devices that the emulated machine has: the PC board with what it cannot do without (PCI, serial port, ACPI)
# and virtio: the console whose ports carry vmprobe's output, disks.
CONFIG_I440FX=y
CONFIG_VIRTIO_BLK=y
CONFIG_VIRTIO_PCI=y
CONFIG_VIRTIO_SERIAL=y
