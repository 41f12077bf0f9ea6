//! Loads the driver of virtio's sockets and exchanges messages with programs of the host, one at a time: some over a connection that is
//! made here, and as many as come over one that the host makes.

use core::ffi::CStr;

use crate::messages;
use crate::syscall;
use crate::text::{count, fail};
use crate::{Counts, close, load_drivers};

/// Each behind those that it needs.
const MODULES: [&CStr; 6] = [
    c"/modules/virtio_ring.ko",
    c"/modules/virtio.ko",
    c"/modules/virtio_mmio.ko",
    c"/modules/vsock.ko",
    c"/modules/vmw_vsock_virtio_transport_common.ko",
    c"/modules/vmw_vsock_virtio_transport.ko",
];
/// The host's address (vsock(7), VMADDR_CID_HOST), and every address of this guest's (VMADDR_CID_ANY).
const HOST: u32 = 2;
const ANY: u32 = u32::MAX;
/// Where the host listens, and where this program does.
const HOST_PORT: u32 = 7000;
const PORT: u32 = 7001;

/// Does the work and prints its counts.
pub fn run(counts: &Counts) {
    load_drivers(counts, &MODULES);
    // The host connects when it has been connected to.
    let listener = socket();
    if syscall::bind_vsock(listener, ANY, PORT) != 0 || syscall::listen(listener) != 0 {
        fail(b"listen on vsock");
    }
    let connection = socket();
    if syscall::connect_vsock(connection, HOST, HOST_PORT) != 0 {
        fail(b"connect over vsock");
    }
    messages::ask(connection);
    messages::close_at_last(counts, connection);

    let connection = syscall::accept(listener);
    if connection < 0 {
        fail(b"accept over vsock");
    }
    let answered = messages::answer(connection);
    messages::close_at_last(counts, connection);
    close(counts, listener);
    count(b"vsock_asked", messages::ASKED);
    count(b"vsock_answered", answered);
}

fn socket() -> i64 {
    let socket = syscall::vsock_socket();
    if socket < 0 {
        fail(b"socket of vsock");
    }
    socket
}
