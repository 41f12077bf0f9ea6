# The only devices that the emulated machine has: the PC board with what it cannot do without (PCI, serial port, ACPI)
# and the virtio console whose ports carry vmprobe's output.
CONFIG_I440FX=y
CONFIG_VIRTIO_PCI=y
CONFIG_VIRTIO_SERIAL=y
