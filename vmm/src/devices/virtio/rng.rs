//! The entropy device (Virtio 1.2, 5.4): the host's random bytes.

use std::io::Write;

use rustix::rand::{GetRandomFlags, getrandom};
use virtio_bindings::virtio_ids::VIRTIO_ID_RNG;

use super::{Device, DriverError, Request, outside, written};

/// The most that one request gets; a driver asks again for more (5.4.6).
const MAX_BYTES: usize = 4096;

/// The device.
pub(crate) struct Rng;

impl Device for Rng {
    fn name(&self) -> &str {
        "rng"
    }

    fn id(&self) -> u32 {
        VIRTIO_ID_RNG
    }

    fn features(&self) -> u64 {
        0
    }

    fn queue_sizes(&self) -> &'static [u16] {
        &[64]
    }

    fn config(&self) -> Vec<u8> {
        Vec::new()
    }

    fn can_be_saved(&self) -> bool {
        true
    }

    fn serve(&mut self, _: usize, mut request: Request<'_>) -> Result<u32, DriverError> {
        let mut bytes = [0; MAX_BYTES];
        let wanted = request.writer.available_bytes().min(MAX_BYTES);
        if wanted == 0 {
            return Err(DriverError::Lacks("room for random bytes"));
        }
        // With these flags there is nothing that it could wait for or fail at, once the host has started.
        let given = getrandom(&mut bytes[..wanted], GetRandomFlags::empty()).unwrap_or(0);
        request.writer.write_all(&bytes[..given]).map_err(outside)?;
        Ok(written(&request.writer))
    }
}
