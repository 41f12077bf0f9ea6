//! Responses with events as the bytes of the contract. A machine's process writes them once; the service hands them on as they are.
//!
//! The generated types own their strings and lists, which takes a dozen allocations an event, and a service of them reads and writes
//! every event again on its way.

use std::marker::PhantomData;

use prost::Message;
use prost::bytes::{Buf, BufMut, Bytes};
use prost::encoding::{WireType, encode_key, encode_varint, uint64};
use tonic::Status;
use tonic::codec::{Codec, DecodeBuf, Decoder, EncodeBuf, Encoder};

use crate::contract::{Event, StreamEventsRequest, StreamEventsResponse};
use crate::output::{arguments, duration_ns};
use crate::vm::Hit;

// The service Events of the contract, written by the generator.
mod generated {
    #![allow(missing_docs, clippy::all, clippy::pedantic, unused_qualifications)]
    include!(concat!(env!("OUT_DIR"), "/vmprobe.v1.Events.rs"));
}

pub use generated::events_client::EventsClient;
pub use generated::events_server::{Events, EventsServer};

/// Bytes after which a response takes no further event: well below the 4 MiB that clients take.
const FULL: usize = 64 << 10;

/// Numbers of fields in the contract.
const RESPONSE_EVENTS: u32 = 1;
const EVENT_PLACE: u32 = 6;
const EVENT_VALUES: u32 = 7;
const VALUE_NAME: u32 = 1;
const VALUE_VALUE: u32 = 2;

/// Appends a field of bytes, a string or a message (protobuf encoding, "Length-Delimited Records").
fn put(field: u32, content: &[u8], to: &mut Vec<u8>) {
    encode_key(field, WireType::LengthDelimited, to);
    encode_varint(content.len() as u64, to);
    to.put_slice(content);
}

/// Appends a hit as an `Event`. Its strings are borrowed; the fields of a message may come in any order.
pub fn encode(sequence: u64, hit: &Hit, without_registers: bool, to: &mut Vec<u8>) {
    let Hit { event, label } = hit;
    let duration_ns = duration_ns(event);
    let numbers = Event {
        sequence,
        time_ns: event.ts_ns,
        probe: event.probe,
        vcpu: event.vcpu.0,
        ip: event.regs.rip,
        place: String::new(),
        values: Vec::new(),
        duration_ns,
        return_value: duration_ns.map(|_| event.regs.rax),
        registers: (!without_registers).then(|| event.regs.into()),
    };
    numbers.encode_raw(to);
    if !label.place.is_empty() {
        put(EVENT_PLACE, label.place.as_bytes(), to);
    }
    for (name, value) in arguments(event, label).into_iter().flatten() {
        let name_bytes =
            if name.is_empty() { 0 } else { prost::length_delimiter_len(name.len()) + 1 + name.len() };
        let bytes = name_bytes + value.map_or(0, |value| uint64::encoded_len(VALUE_VALUE, &value));
        encode_key(EVENT_VALUES, WireType::LengthDelimited, to);
        encode_varint(bytes as u64, to);
        if !name.is_empty() {
            put(VALUE_NAME, name.as_bytes(), to);
        }
        if let Some(value) = value {
            uint64::encode(VALUE_VALUE, &value, to);
        }
    }
}

/// A `StreamEventsResponse` that is being written.
#[derive(Debug, Default)]
pub struct Response {
    bytes: Vec<u8>,
    events: u64,
}

impl Response {
    /// Adds an event that is written by `write`; `scratch` is room for it.
    pub fn add(&mut self, scratch: &mut Vec<u8>, write: impl FnOnce(&mut Vec<u8>)) {
        scratch.clear();
        write(scratch);
        put(RESPONSE_EVENTS, scratch, &mut self.bytes);
        self.events += 1;
    }

    /// How many events it has.
    pub fn events(&self) -> u64 {
        self.events
    }

    /// No event is to be added any more.
    pub fn is_full(&self) -> bool {
        self.bytes.len() >= FULL
    }

    /// With the account, in which there are no events.
    pub fn finish(mut self, account: &StreamEventsResponse) -> Bytes {
        account.encode_raw(&mut self.bytes);
        self.bytes.into()
    }
}

/// What a call of the service takes or gives: a message, or the bytes of one.
pub trait Wire: Sized {
    fn write(self, to: &mut EncodeBuf<'_>) -> Result<(), Status>;
    fn read(from: &mut DecodeBuf<'_>) -> Result<Self, Status>;
}

impl Wire for StreamEventsRequest {
    fn write(self, to: &mut EncodeBuf<'_>) -> Result<(), Status> {
        self.encode(to).map_err(|error| Status::internal(error.to_string()))
    }

    fn read(from: &mut DecodeBuf<'_>) -> Result<Self, Status> {
        Self::decode(from).map_err(|error| Status::internal(error.to_string()))
    }
}

impl Wire for Bytes {
    fn write(self, to: &mut EncodeBuf<'_>) -> Result<(), Status> {
        to.reserve(self.len());
        to.put(self);
        Ok(())
    }

    fn read(from: &mut DecodeBuf<'_>) -> Result<Self, Status> {
        Ok(from.copy_to_bytes(from.remaining()))
    }
}

/// The codec of the service Events.
#[derive(Debug)]
pub struct WireCodec<E, D>(PhantomData<fn(E) -> D>);

/// One direction of it.
#[derive(Debug)]
pub struct Coder<T>(PhantomData<fn(T) -> T>);

impl<E, D> Default for WireCodec<E, D> {
    fn default() -> Self {
        Self(PhantomData)
    }
}

impl<E: Wire + Send + 'static, D: Wire + Send + 'static> Codec for WireCodec<E, D> {
    type Encode = E;
    type Decode = D;
    type Encoder = Coder<E>;
    type Decoder = Coder<D>;

    fn encoder(&mut self) -> Self::Encoder {
        Coder(PhantomData)
    }

    fn decoder(&mut self) -> Self::Decoder {
        Coder(PhantomData)
    }
}

impl<T: Wire> Encoder for Coder<T> {
    type Item = T;
    type Error = Status;

    fn encode(&mut self, item: T, to: &mut EncodeBuf<'_>) -> Result<(), Status> {
        item.write(to)
    }
}

impl<T: Wire> Decoder for Coder<T> {
    type Item = T;
    type Error = Status;

    fn decode(&mut self, from: &mut DecodeBuf<'_>) -> Result<Option<T>, Status> {
        T::read(from).map(Some)
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use probe_core::{Registers, VcpuId};
    use proptest::prelude::*;

    use super::*;
    use crate::contract::Value;
    use crate::events;
    use crate::output::Label;

    fn label(place: &str, at_entry: bool, values: &[&str]) -> Label {
        Label {
            spec: "asked".to_owned(),
            place: place.to_owned(),
            event: None,
            at_entry,
            values: values.iter().map(|&name| name.to_owned()).collect(),
            registers: true,
        }
    }

    fn hit(event: events::Event, label: Label) -> Hit {
        Hit { event, label: Arc::new(label) }
    }

    fn decoded(sequence: u64, hit: &Hit, without_registers: bool) -> Event {
        let mut bytes = Vec::new();
        encode(sequence, hit, without_registers, &mut bytes);
        Event::decode(&bytes[..]).unwrap()
    }

    fn value(name: &str, value: Option<u64>) -> Value {
        Value { name: name.to_owned(), value }
    }

    fn event(entered_ns: Option<u64>, regs: Registers, values: Vec<Option<u64>>) -> events::Event {
        events::Event { ts_ns: 900, entered_ns, vcpu: VcpuId(3), probe: 7, regs, values }
    }

    #[test]
    fn an_entry_without_fetches_has_its_six_arguments() {
        let regs = Registers {
            rdi: 1,
            rsi: 2,
            rdx: 3,
            rcx: 4,
            r8: 5,
            r9: u64::MAX,
            rip: 0x1000,
            ..Registers::default()
        };
        let hit = hit(event(None, regs, Vec::new()), label("tick", true, &[]));
        let arguments = [1, 2, 3, 4, 5, u64::MAX].map(Some);
        let expected = Event {
            sequence: 5,
            time_ns: 900,
            probe: 7,
            vcpu: 3,
            ip: 0x1000,
            place: "tick".to_owned(),
            values: ["arg1", "arg2", "arg3", "arg4", "arg5", "arg6"]
                .into_iter()
                .zip(arguments)
                .map(|(name, one)| value(name, one))
                .collect(),
            duration_ns: None,
            return_value: None,
            registers: Some(regs.into()),
        };
        assert_eq!(decoded(5, &hit, false), expected);
        assert_eq!(decoded(5, &hit, true), Event { registers: None, ..expected });
    }

    #[test]
    fn a_return_has_its_duration_and_its_value() {
        let regs = Registers { rax: 42, ..Registers::default() };
        let hit = hit(event(Some(100), regs, vec![None, Some(0)]), label("", false, &["", "zero"]));
        let event = decoded(0, &hit, true);
        assert_eq!((event.duration_ns, event.return_value), (Some(800), Some(42)));
        assert_eq!(event.values, [value("", None), value("zero", Some(0))]);
    }

    #[test]
    fn a_response_has_its_events_in_order_and_the_account() {
        let (mut response, mut scratch) = (Response::default(), Vec::new());
        let hit = hit(event(None, Registers::default(), Vec::new()), label("tick", false, &[]));
        let mut sequence = 0;
        while !response.is_full() {
            response.add(&mut scratch, |to| encode(sequence, &hit, false, to));
            sequence += 1;
        }
        assert_eq!(response.events(), sequence);
        let account = StreamEventsResponse {
            next_sequence: 9,
            lost: 2,
            durable_sequence: Some(0),
            ..Default::default()
        };
        let response = StreamEventsResponse::decode(response.finish(&account)).unwrap();
        assert!(response.events.iter().map(|event| event.sequence).eq(0..sequence));
        assert_eq!(StreamEventsResponse { events: Vec::new(), ..response }, account);
    }

    proptest! {
        #[test]
        fn what_is_written_is_read_again(
            (sequence, probe, rip) in any::<(u64, u32, u64)>(),
            place in ".{0,300}",
            values in proptest::collection::vec((".{0,200}", any::<Option<u64>>()), 1..10),
        ) {
            let names: Vec<&str> = values.iter().map(|(name, _)| name.as_str()).collect();
            let regs = Registers { rip, ..Registers::default() };
            let fetched = values.iter().map(|(_, value)| *value).collect();
            let event = events::Event { probe, ..event(None, regs, fetched) };
            let event = decoded(sequence, &hit(event, label(&place, false, &names)), false);
            prop_assert_eq!((event.sequence, event.probe, event.ip), (sequence, probe, rip));
            prop_assert_eq!(event.place, place);
            prop_assert_eq!(event.values, values.iter().map(|(name, one)| value(name, *one)).collect::<Vec<_>>());
        }
    }
}
