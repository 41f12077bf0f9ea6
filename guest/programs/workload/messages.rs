//! Messages over connections, one at a time, each of which is answered with itself.

use crate::syscall;
use crate::text::fail;
use crate::{Counts, close};

/// How many this side asks.
pub const ASKED: u64 = 50;
const MESSAGE_BYTES: usize = 1000;

/// Sends messages, and checks the answers.
pub fn ask(socket: i64) {
    for number in 0..ASKED {
        let message: [u8; MESSAGE_BYTES] = core::array::from_fn(|at| (number as usize * 31 + at * 7) as u8);
        send(socket, &message);
        let mut answer = [0; MESSAGE_BYTES];
        if !receive(socket, &mut answer) || answer != message {
            fail(b"the answer to a message");
        }
    }
}

/// Answers messages to their end. Returns how many.
pub fn answer(socket: i64) -> u64 {
    let mut answered = 0;
    let mut message = [0; MESSAGE_BYTES];
    while receive(socket, &mut message) {
        send(socket, &message);
        answered += 1;
    }
    answered
}

fn send(socket: i64, message: &[u8]) {
    if syscall::send(socket, message) != message.len() as i64 {
        fail(b"send of a message");
    }
}

/// Receives a message. False if there are no more.
fn receive(socket: i64, message: &mut [u8]) -> bool {
    let mut have = 0;
    while have < message.len() {
        match syscall::receive(socket, &mut message[have..]) {
            0 if have == 0 => return false,
            length if length > 0 => have += length as usize,
            _ => fail(b"receive of a message"),
        }
    }
    true
}

/// Closes a connection when the other side has agreed to that.
pub fn close_at_last(counts: &Counts, socket: i64) {
    if syscall::linger(socket) != 0 {
        fail(b"SO_LINGER");
    }
    close(counts, socket);
}
