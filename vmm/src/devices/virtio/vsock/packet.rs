//! Packet headers (Virtio 1.2, 5.10.6). Pure.
//!
//! The crate virtio-vsock reads packets of two descriptors at most, header and data; a driver may cut its buffers anywhere (2.7.4), and
//! Linux does since 6.7 (MSG_ZEROCOPY). So the header is read here, through the same reader as every other request.

/// The host's context id.
pub(super) const HOST_CID: u64 = 2;

/// The only type of socket that this device has (5.10.6: VIRTIO_VSOCK_TYPE_STREAM).
pub(super) const STREAM: u16 = 1;

/// Operations (5.10.6: VIRTIO_VSOCK_OP_*).
pub(super) mod op {
    pub const REQUEST: u16 = 1;
    pub const RESPONSE: u16 = 2;
    pub const RST: u16 = 3;
    pub const SHUTDOWN: u16 = 4;
    pub const RW: u16 = 5;
    pub const CREDIT_UPDATE: u16 = 6;
    pub const CREDIT_REQUEST: u16 = 7;
}

/// Flags of SHUTDOWN (5.10.6.6): the sender will receive no more.
pub(super) const RECEIVES_NO_MORE: u32 = 1;
/// The sender will send no more.
pub(super) const SENDS_NO_MORE: u32 = 2;
/// Neither.
pub(super) const BOTH: u32 = RECEIVES_NO_MORE | SENDS_NO_MORE;

/// `struct virtio_vsock_hdr`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Header {
    pub src_cid: u64,
    pub dst_cid: u64,
    pub src_port: u32,
    pub dst_port: u32,
    /// Bytes of data behind the header.
    pub len: u32,
    pub kind: u16,
    pub op: u16,
    pub flags: u32,
    /// The sender's room for data of this connection.
    pub buf_alloc: u32,
    /// How many bytes of data it has taken out of there, modulo 2^32.
    pub fwd_cnt: u32,
}

impl Header {
    pub const BYTES: usize = 44;

    pub fn parse(bytes: &[u8; Self::BYTES]) -> Self {
        let mut rest = bytes.as_slice();
        Self {
            src_cid: u64::from_le_bytes(take(&mut rest)),
            dst_cid: u64::from_le_bytes(take(&mut rest)),
            src_port: u32::from_le_bytes(take(&mut rest)),
            dst_port: u32::from_le_bytes(take(&mut rest)),
            len: u32::from_le_bytes(take(&mut rest)),
            kind: u16::from_le_bytes(take(&mut rest)),
            op: u16::from_le_bytes(take(&mut rest)),
            flags: u32::from_le_bytes(take(&mut rest)),
            buf_alloc: u32::from_le_bytes(take(&mut rest)),
            fwd_cnt: u32::from_le_bytes(take(&mut rest)),
        }
    }

    pub fn bytes(&self) -> Vec<u8> {
        [
            &self.src_cid.to_le_bytes()[..],
            &self.dst_cid.to_le_bytes(),
            &self.src_port.to_le_bytes(),
            &self.dst_port.to_le_bytes(),
            &self.len.to_le_bytes(),
            &self.kind.to_le_bytes(),
            &self.op.to_le_bytes(),
            &self.flags.to_le_bytes(),
            &self.buf_alloc.to_le_bytes(),
            &self.fwd_cnt.to_le_bytes(),
        ]
        .concat()
    }

    /// The answer to a packet of no connection.
    pub fn reset(&self) -> Self {
        Self {
            src_cid: self.dst_cid,
            dst_cid: self.src_cid,
            src_port: self.dst_port,
            dst_port: self.src_port,
            kind: self.kind,
            op: op::RST,
            ..Self::default()
        }
    }
}

fn take<const N: usize>(bytes: &mut &[u8]) -> [u8; N] {
    bytes.split_off(..N).and_then(|first| first.first_chunk().copied()).unwrap_or([0; N])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_field_has_its_place() {
        let header = Header {
            src_cid: 3,
            dst_cid: 2,
            src_port: 0x1_0001,
            dst_port: 22,
            len: 5,
            kind: STREAM,
            op: op::RW,
            flags: 6,
            buf_alloc: 7,
            fwd_cnt: u32::MAX,
        };
        let bytes: [u8; Header::BYTES] = header.bytes().try_into().unwrap();
        assert_eq!(bytes[..9], [3, 0, 0, 0, 0, 0, 0, 0, 2]);
        assert_eq!(bytes[16..20], [1, 0, 1, 0]);
        assert_eq!(bytes[28..32], [1, 0, 5, 0]);
        assert_eq!(bytes[40..], [0xff; 4]);
        assert_eq!(Header::parse(&bytes), header);
    }
}
