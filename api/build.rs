//! Compiles the contract. No protoc is needed.

use std::path::PathBuf;
use std::{env, error, fs};

use prost::Message;
use tonic_prost_build::manual::{Builder, Method, Service};

const FILES: [&str; 5] = ["machines", "probes", "events", "guest", "host"];

fn main() -> Result<(), Box<dyn error::Error>> {
    println!("cargo:rerun-if-changed=proto");
    let files = FILES.map(|name| format!("proto/vmprobe/v1/{name}.proto"));
    let set = protox::compile(files, ["proto"])?;
    let out = PathBuf::from(env::var("OUT_DIR")?);
    fs::write(out.join("vmprobe.v1.bin"), set.encode_to_vec())?;
    tonic_prost_build::configure().compile_fds(set)?;
    // Its responses are handed on as bytes (src/service/encoded.rs).
    let stream_events = Method::builder()
        .name("stream_events")
        .route_name("StreamEvents")
        .input_type("crate::contract::StreamEventsRequest")
        .output_type("prost::bytes::Bytes")
        .codec_path("crate::service::encoded::WireCodec")
        .server_streaming()
        .build();
    Builder::new().compile(&[Service::builder()
        .name("Events")
        .package("vmprobe.v1")
        .method(stream_events)
        .build()]);
    Ok(())
}
