//! Loads the driver of virtio's network cards, gives the first card the address that `vmprobe run --net user` has for it, and exchanges
//! messages over TCP with a program of the host, behind the gateway.

use core::ffi::CStr;

use crate::text::{count, fail};
use crate::{Counts, load_drivers, messages, syscall};

/// Each behind those that it needs.
const MODULES: [&CStr; 6] = [
    c"/modules/virtio_ring.ko",
    c"/modules/virtio.ko",
    c"/modules/virtio_mmio.ko",
    c"/modules/failover.ko",
    c"/modules/net_failover.ko",
    c"/modules/virtio_net.ko",
];
const ADDRESS: [u8; 4] = [10, 0, 2, 15];
const MASK: [u8; 4] = [255, 255, 255, 0];
const GATEWAY: [u8; 4] = [10, 0, 2, 2];

/// Does the work and prints its counts. The program listens on `port`.
pub fn run(counts: &Counts, port: u64) {
    load_drivers(counts, &MODULES);
    let socket = syscall::tcp_socket();
    if socket < 0 {
        fail(b"socket");
    }
    let is_up = syscall::set_interface_address(socket, ADDRESS) == 0
        && syscall::set_interface_mask(socket, MASK) == 0
        && syscall::set_interface_up(socket) == 0;
    if !is_up {
        fail(b"the address of eth0");
    }
    if syscall::connect_ip(socket, GATEWAY, port as u16) != 0 {
        fail(b"connect over the network");
    }
    messages::ask(socket);
    messages::close_at_last(counts, socket);
    count(b"network_asked", messages::ASKED);
}
