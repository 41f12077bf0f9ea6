//! Unpacking of a bzImage's payload.
//!
//! The kernel's build compresses `vmlinux.bin` and makes sure that the last four bytes of the result are the unpacked
//! size, little-endian: gzip's own trailer already is that, for every other format it is appended (the kernel's
//! scripts/Makefile.lib, `size_append`). The size bounds every decoder here, so a decompression bomb ends at the size
//! that the payload itself declares, and that size is held against a limit before anything is allocated.

use std::fmt;
use std::io::{self, Read};

use crate::bytes::u32_at;

/// The most that a payload may unpack to. The largest distribution kernels are well under 200 MiB.
pub const MAX_UNPACKED: usize = 1 << 30;

/// What a decoder may use for its window and tables, in bytes: xz as the kernel calls it has a 32 MiB (later 128 MiB)
/// dictionary, zstd's ultra levels a 128 MiB window.
const DECODER_MEMORY: u64 = 256 << 20;

/// Size of a block of the legacy LZ4 frame when unpacked.
const LZ4_BLOCK: usize = 8 << 20;

const LZ4_LEGACY_MAGIC: [u8; 4] = [0x02, 0x21, 0x4c, 0x18];

/// How a kernel image's payload is compressed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Compression {
    /// CONFIG_KERNEL_GZIP.
    Gzip,
    /// CONFIG_KERNEL_XZ, with the x86 branch filter.
    Xz,
    /// CONFIG_KERNEL_LZMA: the format of the old lzma tool, without a container.
    Lzma,
    /// CONFIG_KERNEL_BZIP2.
    Bzip2,
    /// CONFIG_KERNEL_LZ4: LZ4's legacy frame.
    Lz4,
    /// CONFIG_KERNEL_ZSTD.
    Zstd,
}

impl fmt::Display for Compression {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Compression::Gzip => "gzip",
            Compression::Xz => "xz",
            Compression::Lzma => "lzma",
            Compression::Bzip2 => "bzip2",
            Compression::Lz4 => "lz4",
            Compression::Zstd => "zstd",
        })
    }
}

/// Why a payload could not be unpacked.
#[derive(Debug, thiserror::Error)]
pub enum DecompressError {
    /// No known format begins like this.
    #[error(
        "Its payload begins with the bytes {magic:02x?}, which is none of gzip, xz, lzma, bzip2, lz4 (legacy) and \
         zstd; build the kernel with one of these"
    )]
    UnknownFormat {
        /// The first bytes of the payload.
        magic: [u8; 4],
    },
    /// LZO, which no distribution uses.
    #[error(
        "Its payload is LZO-compressed, which vmprobe does not read; build the kernel with another compression"
    )]
    Lzo,
    /// Too short to hold even the size.
    #[error("Its payload of {len:#x} bytes is too short to be a compressed kernel")]
    Short {
        /// Length of the payload in bytes.
        len: usize,
    },
    /// The declared size is beyond the limit.
    #[error(
        "Its payload declares an unpacked size of {declared:#x} bytes; no more than {limit:#x} are accepted"
    )]
    TooLarge {
        /// What the payload says.
        declared: usize,
        /// [`MAX_UNPACKED`], or less.
        limit: usize,
    },
    /// No memory for it.
    #[error("There is no memory to unpack {declared:#x} bytes into")]
    Memory {
        /// What the payload says.
        declared: usize,
    },
    /// The payload is not what it says.
    #[error(
        "Its {compression} payload unpacks to {relation} than the {declared:#x} bytes it declares; the file is damaged"
    )]
    WrongSize {
        /// The format found.
        compression: Compression,
        /// "more" or "less".
        relation: &'static str,
        /// What the payload says.
        declared: usize,
    },
    /// The decoder found an error.
    #[error("Its {compression} payload is damaged")]
    Corrupt {
        /// The format found.
        compression: Compression,
        /// The decoder's own words.
        #[source]
        source: Box<dyn std::error::Error + Send + Sync>,
    },
}

/// Recognises the format by the first bytes.
pub(super) fn detect(payload: &[u8]) -> Result<Compression, DecompressError> {
    const LZO: &[u8] = &[0x89, b'L', b'Z', b'O'];
    const MAGICS: [(&[u8], Compression); 6] = [
        (&[0x1f, 0x8b], Compression::Gzip),
        (&[0xfd, b'7', b'z', b'X', b'Z', 0], Compression::Xz),
        (&[0x5d, 0, 0], Compression::Lzma),
        (b"BZh", Compression::Bzip2),
        (&LZ4_LEGACY_MAGIC, Compression::Lz4),
        (&[0x28, 0xb5, 0x2f, 0xfd], Compression::Zstd),
    ];
    if payload.starts_with(LZO) {
        return Err(DecompressError::Lzo);
    }
    if let Some((_, compression)) = MAGICS.iter().find(|(magic, _)| payload.starts_with(magic)) {
        return Ok(*compression);
    }
    let mut magic = [0; 4];
    for (to, from) in magic.iter_mut().zip(payload) {
        *to = *from;
    }
    Err(DecompressError::UnknownFormat { magic })
}

/// Unpacks `payload`, with its trailing size, into at most `limit` bytes.
///
/// # Errors
/// See [`DecompressError`].
pub fn decompress(payload: &[u8], limit: usize) -> Result<(Compression, Vec<u8>), DecompressError> {
    let compression = detect(payload)?;
    let short = DecompressError::Short { len: payload.len() };
    let Some(packed_len) = payload.len().checked_sub(4) else { return Err(short) };
    let Some(declared) = u32_at(payload, packed_len).and_then(|size| usize::try_from(size).ok()) else {
        return Err(short);
    };
    if declared > limit {
        return Err(DecompressError::TooLarge { declared, limit });
    }
    // Gzip's trailer is part of the format; every other decoder must not see the size.
    let packed = if compression == Compression::Gzip { payload } else { &payload[..packed_len] };

    let mut out = Vec::new();
    out.try_reserve_exact(declared).map_err(|_| DecompressError::Memory { declared })?;
    unpack(compression, packed, declared, &mut out)
        .map_err(|source| DecompressError::Corrupt { compression, source })?;
    let relation = match out.len().cmp(&declared) {
        std::cmp::Ordering::Less => "less",
        std::cmp::Ordering::Equal => return Ok((compression, out)),
        std::cmp::Ordering::Greater => "more",
    };
    Err(DecompressError::WrongSize { compression, relation, declared })
}

/// Runs the decoder until its end or until it has given one byte more than `declared`.
fn unpack(
    compression: Compression,
    packed: &[u8],
    declared: usize,
    out: &mut Vec<u8>,
) -> Result<(), Box<dyn std::error::Error + Send + Sync>> {
    use liblzma::bufread::XzDecoder;
    use liblzma::stream::Stream;

    match compression {
        Compression::Gzip => read_bounded(flate2::bufread::GzDecoder::new(packed), declared, out)?,
        Compression::Xz => {
            let stream = Stream::new_stream_decoder(DECODER_MEMORY, 0)?;
            read_bounded(XzDecoder::new_stream(packed, stream), declared, out)?;
        }
        Compression::Lzma => {
            let stream = Stream::new_lzma_decoder(DECODER_MEMORY)?;
            read_bounded(XzDecoder::new_stream(packed, stream), declared, out)?;
        }
        Compression::Bzip2 => read_bounded(bzip2::bufread::BzDecoder::new(packed), declared, out)?,
        Compression::Lz4 => lz4_legacy(packed, declared, out)?,
        Compression::Zstd => {
            let mut decoder =
                ruzstd::decoding::StreamingDecoder::new_with_max_window_size(packed, DECODER_MEMORY)?;
            read_bounded(&mut decoder, declared, out)?;
            // The decoder leaves it to its user to compare.
            let frame = &decoder.decoder;
            let stored = frame.get_checksum_from_data();
            if stored.is_some() && out.len() == declared && stored != frame.get_calculated_checksum() {
                return Err("The checksum is wrong".into());
            }
        }
    }
    Ok(())
}

fn read_bounded(reader: impl Read, declared: usize, out: &mut Vec<u8>) -> io::Result<()> {
    let bound = u64::try_from(declared).unwrap_or(u64::MAX).saturating_add(1);
    reader.take(bound).read_to_end(out)?;
    Ok(())
}

/// What can be wrong in a legacy LZ4 frame.
#[derive(Debug, thiserror::Error)]
enum Lz4Error {
    #[error("The block at payload offset {at:#x} says it is {size:#x} bytes long, beyond the payload's end")]
    BlockBeyondEnd { at: usize, size: usize },
    #[error("The block at payload offset {at:#x} cannot be decoded")]
    Block { at: usize, source: lz4_flex::block::DecompressError },
}

/// Decodes LZ4's legacy frame: the magic, then blocks of at most 8 MiB unpacked, each after its packed size
/// (lz4's doc/lz4_Frame_format.md, "Legacy frame"). Frames may follow each other; there is no end mark.
fn lz4_legacy(packed: &[u8], declared: usize, out: &mut Vec<u8>) -> Result<(), Lz4Error> {
    let mut at = LZ4_LEGACY_MAGIC.len();
    while at < packed.len() {
        let size = u32_at(packed, at).and_then(|size| usize::try_from(size).ok());
        let size = size.ok_or(Lz4Error::BlockBeyondEnd { at, size: 4 })?;
        at += 4;
        if size == u32::from_le_bytes(LZ4_LEGACY_MAGIC) as usize {
            continue;
        }
        let end = at.checked_add(size).filter(|end| *end <= packed.len());
        let block = &packed[at..end.ok_or(Lz4Error::BlockBeyondEnd { at, size })?];
        let have = out.len();
        // One byte more than declared, so that a payload that is too long is seen as such.
        out.resize(have + LZ4_BLOCK.min(declared + 1 - have.min(declared)), 0);
        let written = lz4_flex::block::decompress_into(block, &mut out[have..])
            .map_err(|source| Lz4Error::Block { at, source })?;
        out.truncate(have + written);
        if out.len() > declared {
            break;
        }
        at += size;
    }
    Ok(())
}
