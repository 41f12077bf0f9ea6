//! The command line: what can be asked for, and the help texts.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::Duration;

use clap::{Args, Parser, Subcommand, ValueEnum};
use disk::DiskOptions;

use crate::network::NetworkWanted;
use crate::service::Limits;
use crate::vsock::VsockWanted;

const EXAMPLES: &str = "\
Examples:
  vmprobe run demo --probe tick --max-hits 5
  vmprobe run vmlinuz --initrd initrd.img --probe do_sys_openat2 --output json
  vmprobe run vmlinuz --initrd initrd.img --probe 'vfs_read%return ret=$retval file=$arg1'
  vmprobe run vmlinuz --initrd initrd.img --probe 'vfs_*' --count
  vmprobe run ticker --probe tick --count --snapshot saved --snapshot-at 1000 --max-hits 2000
  vmprobe run --restore saved --count --max-hits 1000
  vmprobe run vmlinuz --initrd initrd.img --disk root.qcow2 --cmdline root=/dev/vda1 --probe submit_bio
  vmprobe symbols vmlinuz 'vfs_*'
  vmprobe explain vmlinuz vfs_read+0x1b
  vmprobe image pack --kernel vmlinuz --initrd initrd.img --cmdline quiet
  vmprobe doctor
  vmprobe bench

Hits go to stdout, everything else to stderr.

Exit codes: 0 done (the guest ended in order, or --max-hits was reached), 2 bad usage, 3 this host cannot,
4 image, 5 probe refused, 6 guest crashed, 124 timeout, 130 interrupted.";

const BENCH: &str = "\
A small guest calls functions that differ in what happens in them: nothing, a write to a port without a device (a bare exit),
or a hit that vmprobe takes as `run` does, registers into the ring that a reader empties. They take turns in short batches of
one run, so what else the host does falls on all of them.

  plain     the loop and the call alone; ns is the time of one round
  port      a bare exit; ns, here and below, is the time of one round less the plain one of the same turn
  emulated  a hit of `push %rbp`, which the host carries out
  filtered  the same, with a handler that does not want it reported
  stepped   a hit of `rdtsc`, which runs out of line
  returned  a call with a return probe: a hit at its entry and one behind it
  idle      no probe armed, the machine's own engine against none: ns is a round with a port write, x is the ratio of the two
  idle loop the same for the plain loop

x is the number of bare exits that take the same time. ns and x are medians over all turns, with the bounds of the middle half.
Exits and ioctls (besides KVM_RUN) are counted per round.";

const MATRIX: &str = "\
The file says which cells there are, what each runs and what must come out (docs/matrix.md). Each cell is a machine in a process of its own;
as many run at once as the host has CPUs and memory for. Results are kept as they come: after an interrupt, or on another day, the same
command runs the cells that are missing. The directory holds report.html, report.json, junit.xml and report.tap, and each cell's console.

Exit codes: 0 every cell passed or cannot run on this host, 1 a cell failed or was flaky, 2 bad usage, 3 this host cannot, 130 interrupted.";

const VSOCK: &str = "\
In the guest a program has to listen on that vsock port: sshd does under systemd 256 and newer, elsewhere
`socat VSOCK-LISTEN:22,fork TCP:localhost:22` does for it. Then
  ssh -o ProxyCommand='vmprobe vsock PATH 22' root@guest

Exit codes: 0 the connection has ended, 3 there was none.";

const BISECT: &str = "\
Runs the first and the last kernel and, if they differ, one in the middle again and again, for each combination of values on the other axes.
What the results have already is not run; an interrupted search goes on with the same command. Cells that are flaky, or that this host cannot
run, are passed over.

Exit codes: 0 found, 1 the ends are alike or cannot be told, 2 bad usage, 3 this host cannot, 130 interrupted.";

const SERVE: &str = "\
The contract is vmprobe.v1 (docs/api.md); reflection (grpc.reflection.v1) and health (grpc.health.v1) are served too. Only the user
that runs the service, and root, can reach it, and those to whom the access file gives a role (docs/service.md); it and the
certificates are read again at SIGHUP. Each machine runs in a process of its own. SIGTERM stops every machine, takes its
probes out and ends the service; after SIGKILL the machines run on, and the next service on the same socket finds them. With --journal
the events are on disk too (docs/journal.md), and machines whose process is gone are listed with theirs until they are removed.";

/// Stops a guest kernel at any instruction, from outside.
#[derive(Debug, Parser)]
#[command(name = "vmprobe", version, about, after_help = EXAMPLES, max_term_width = 110)]
pub struct Cli {
    #[command(subcommand)]
    pub command: Command,
}

#[derive(Debug, Subcommand)]
pub enum Command {
    /// Boots a guest and reports every hit of the probes.
    Run(RunArgs),
    /// Measures what this host can do, and says what each missing feature costs.
    Doctor(DoctorArgs),
    /// Measures what a hit costs, next to a bare exit in the same run.
    #[command(after_help = BENCH)]
    Bench(BenchArgs),
    /// Lists what can be probed in an image, at the addresses where it was linked (--kaslr moves them).
    Symbols(SymbolsArgs),
    /// Tells where a probe lands in an image as it was linked (--kaslr moves it), the instruction there, and how it would run, or why
    /// not.
    Explain(ExplainArgs),
    /// Tells what an image is, and makes one file of a kernel and what it is booted with.
    Image(ImageArgs),
    /// Reads all of a snapshot and tells whether it is as it was saved; restoring it reads only what the guest touches.
    Verify {
        /// The snapshot's directory
        directory: PathBuf,
    },
    /// Runs the same probes, workload and checks over kernels and options, and gives one table.
    #[command(args_conflicts_with_subcommands = true, subcommand_negates_reqs = true, after_help = MATRIX)]
    Matrix(MatrixArgs),
    /// Prepares, and caches, what later runs need; prints where it is.
    Prepare(PrepareArgs),
    /// Runs and watches machines for several clients at once, over gRPC.
    #[command(after_help = SERVE)]
    Serve(ServeArgs),
    /// Prints what makes a shell complete vmprobe's commands and options.
    Completions { shell: clap_complete::Shell },
    /// Writes the manual pages, one for each command.
    Man {
        /// Where to; it is made if it is not there
        directory: PathBuf,
    },
    /// Runs one machine for the service that starts it.
    #[command(hide = true)]
    Worker(WorkerArgs),
    /// The machines of a service.
    Vm(VmArgs),
    /// The probes of a service's machine.
    Probe(ProbeArgs),
    /// Registers, memory and symbols of a machine's guest.
    Guest(GuestCommandArgs),
    /// The hits of a machine's probes, until its run ends.
    Events(EventsArgs),
    /// What a machine's guest writes to its serial line, until its run ends.
    Console(ConsoleArgs),
    /// Connects standard input and output with a port of a guest that runs with --vsock.
    #[command(after_help = VSOCK)]
    Vsock(VsockArgs),
}

#[derive(Debug, Args)]
pub struct VsockArgs {
    /// The Unix socket of the machine's --vsock
    pub path: PathBuf,
    /// The guest's port
    pub port: u32,
    /// Try again for this long while there is no machine yet, or no program of its guest listens (30s, 5m)
    #[arg(long, value_name = "TIME", default_value = "0s", value_parser = humantime::parse_duration)]
    pub wait: Duration,
}

/// How a stream of records is written.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Output {
    /// For people.
    Text,
    /// One JSON object a line.
    Json,
}

/// Where the virtual machine runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Accel {
    /// kvm where this host can run the image on it, otherwise nested.
    Auto,
    /// /dev/kvm of this host.
    Kvm,
    /// An emulated AMD-V machine with a Debian kernel, prepared at first use.
    Nested,
    /// The same with a clock of one nanosecond an emulated instruction: slower, but the guest's time does not outrun probes that
    /// are hit all the time.
    NestedIcount,
}

/// Where the guest's console goes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Serial {
    Stderr,
    Stdout,
    None,
    /// As stderr, and what comes on stdin is the guest's to read.
    Tty,
    File(PathBuf),
}

impl std::str::FromStr for Serial {
    type Err = std::convert::Infallible;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        Ok(match text {
            "stderr" => Serial::Stderr,
            "stdout" => Serial::Stdout,
            "none" => Serial::None,
            "tty" => Serial::Tty,
            file => Serial::File(PathBuf::from(file)),
        })
    }
}

/// What a guest is given.
#[derive(Debug, Args)]
pub struct GuestArgs {
    /// Initial RAM disk of a Linux guest, instead of the image's own
    #[arg(long, value_name = "FILE")]
    pub initrd: Option<PathBuf>,
    /// Words for the command line, behind vmprobe's own and the image's
    #[arg(long, value_name = "WORDS", allow_hyphen_values = true)]
    pub cmdline: Option<String>,
    /// Guest memory (binary units: K, M, G)
    #[arg(long, value_name = "SIZE", default_value = "512M", value_parser = parse_size)]
    pub memory: u64,
    /// Number of vCPUs [default: 2 for a built-in guest, 1 otherwise]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=64))]
    pub cpus: Option<u32>,
    /// Boot a bzImage through its own decompressor, which chooses the kernel's addresses (KASLR); probes go where it lands, and an
    /// address in a SPEC of `run` is the one that `explain IMAGE` shows
    #[arg(long)]
    pub kaslr: bool,
    /// A virtio disk of the guest, /dev/vda and so on: a raw or qcow2 image, which stays as it is, because writes go to a temporary
    /// overlay (in TMPDIR, or /var/tmp). With `write` they go to the image, with `readonly` there are none. A qcow2 image that is
    /// stacked on others needs their names. A machine with disks cannot be saved yet (may be given several times)
    #[arg(
        long = "disk",
        value_name = "FILE[,format=raw|qcow2][,readonly|,overlay|,write][,backing=FILE]..."
    )]
    pub disks: Vec<DiskOptions>,
}

#[derive(Debug, Args)]
pub struct RunArgs {
    /// bzImage, ELF vmlinux, unified kernel image, disk image, bare-metal ELF, or a built-in guest: `demo` ends by itself, `ticker` goes on
    #[arg(required_unless_present = "restore", default_value = "", hide_default_value = true)]
    pub image: String,
    /// Go on where a machine was saved, with its probes: a snapshot's directory, in the place of an image
    #[arg(
        long,
        value_name = "DIRECTORY",
        conflicts_with_all = ["image", "initrd", "cmdline", "memory", "cpus", "kaslr", "disks", "vsock", "networks"]
    )]
    pub restore: Option<PathBuf>,
    /// Save the machine to a new directory once, see --snapshot-at; it goes on then
    #[arg(long, value_name = "DIRECTORY", requires = "snapshot_at", conflicts_with_all = ["disks", "vsock", "networks"])]
    pub snapshot: Option<PathBuf>,
    /// When to save it: as soon as so many hits have been reported
    #[arg(long, value_name = "HITS", requires = "snapshot", value_parser = clap::value_parser!(u64).range(1..))]
    pub snapshot_at: Option<u64>,
    /// Where to stop and what to fetch there: SYMBOL, SYMBOL+OFFSET, 0xADDRESS, SYMBOL%return, a pattern as `vfs_*`, or a
    /// definition as in the kernel's kprobe_events (may be given several times)
    #[arg(long = "probe", value_name = "SPEC")]
    pub probes: Vec<String>,
    /// A file with a SPEC on each line; `#` begins a comment line, `-` is standard input
    #[arg(long = "probes", value_name = "FILE")]
    pub probe_files: Vec<PathBuf>,
    /// Write no line for a hit; how often each probe was hit is said at the end (with --output json on stdout)
    #[arg(long)]
    pub count: bool,
    #[command(flatten)]
    pub guest: GuestArgs,
    /// Sockets between the guest and this host (virtio-vsock): a program here connects to the Unix socket PATH and writes `CONNECT PORT`
    /// and a newline to reach a port of the guest (`vmprobe vsock` does that), and listens on PATH_PORT for connections that the guest
    /// makes to port PORT of host 2. The guest's address is N, 3 unless given. A machine with vsock cannot be saved yet
    #[arg(long, value_name = "uds=PATH[,cid=N]")]
    pub vsock: Option<VsockWanted>,
    /// A network card of the guest (virtio-net): on a tap that there is (`ip tuntap add mode tap user USER name NAME`), or `user`, which
    /// needs no rights: passt connects the guest as if it were a program of this user, and `forward=tcp:HOST:GUEST` has port HOST of this
    /// host lead to port GUEST of the guest's. Its address is a new one each time unless MAC says it. A machine with a network
    /// cannot be saved yet (may be given several times)
    #[arg(long = "net", value_name = "tap=NAME|user[,forward=tcp|udp:HOST:GUEST]...[,mac=MAC]")]
    pub networks: Vec<NetworkWanted>,
    /// End the run after this many hits
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u64).range(1..))]
    pub max_hits: Option<u64>,
    /// End the run after this time, with exit code 124 (30s, 5m, 1h)
    #[arg(long, value_name = "TIME", value_parser = humantime::parse_duration)]
    pub timeout: Option<Duration>,
    /// At --timeout, SIGINT or SIGTERM press the guest's power button first, and let it end by itself for this long (30s, 5m)
    #[arg(long, value_name = "TIME", default_value = "0s", value_parser = humantime::parse_duration)]
    pub grace: Duration,
    /// Write the guest's registers and memory to a core file for gdb, drgn and crash: where its kernel panics, otherwise at the end of
    /// the run (with --max-hits: at the last hit)
    #[arg(long, value_name = "FILE")]
    pub dump: Option<PathBuf>,
    /// How hits are written to stdout
    #[arg(long, value_enum, default_value_t = Output::Text)]
    pub output: Output,
    /// Write what came of the run to FILE, one JSON object: how it ended, how long it took, each probe's account
    #[arg(long, value_name = "FILE")]
    pub report: Option<PathBuf>,
    /// Where the guest's serial console goes: stderr, stdout, none, a file, or `tty`: stderr, and what is typed goes to the guest;
    /// Ctrl-] ends the run (may be given several times)
    #[arg(long, value_name = "WHERE", default_value = "stderr")]
    pub serial: Vec<Serial>,
    /// Where the virtual machine runs
    #[arg(long, value_enum, default_value_t = Accel::Auto)]
    pub accel: Accel,
    /// Say what is going on: chosen host, memory layout, time to init, exits by reason
    #[arg(long, short)]
    pub verbose: bool,
}

#[derive(Debug, Args)]
pub struct DoctorArgs {
    #[arg(long, value_enum, default_value_t = Output::Text)]
    pub output: Output,
}

#[derive(Debug, Args)]
pub struct BenchArgs {
    /// How many turns each function gets
    #[arg(long, value_name = "N", default_value_t = 1000, value_parser = clap::value_parser!(u32).range(1..=1300))]
    pub turns: u32,
    #[arg(long, value_enum, default_value_t = Output::Text)]
    pub output: Output,
    /// Where the virtual machine runs
    #[arg(long, value_enum, default_value_t = Accel::Auto)]
    pub accel: Accel,
}

#[derive(Debug, Args)]
pub struct SymbolsArgs {
    /// The image, or a built-in guest: `demo`, `ticker`
    pub image: String,
    #[command(flatten)]
    pub which: WhichSymbols,
    #[arg(long, value_enum, default_value_t = Output::Text)]
    pub output: Output,
}

/// What is listed of a guest's symbols, and how.
#[derive(Debug, Args)]
pub struct WhichSymbols {
    /// Which symbols: `*`, `?` and `[a-z]` as in a shell
    pub glob: Option<String>,
    /// Only those that can be probed
    #[arg(long)]
    pub probeable: bool,
    /// Only those that can be probed, each place once, as lines for `run --probes`
    #[arg(long, conflicts_with = "output")]
    pub specs: bool,
}

#[derive(Debug, Args)]
pub struct ExplainArgs {
    /// The image, or a built-in guest: `demo`, `ticker`
    pub image: String,
    #[command(flatten)]
    pub what: Explained,
    #[arg(long, value_enum, default_value_t = Output::Text)]
    pub output: Output,
}

/// What is explained.
#[derive(Debug, Args)]
pub struct Explained {
    /// As for `run --probe`; a pattern lists the place in every function
    pub spec: String,
    /// List every instruction of the function, and how each would run
    #[arg(long)]
    pub all: bool,
}

#[derive(Debug, Args)]
pub struct ImageArgs {
    #[command(subcommand)]
    pub command: ImageCommand,
}

/// What can be done with images.
#[derive(Debug, Subcommand)]
pub enum ImageCommand {
    /// Tells what a file is, what is known of its kernel, and what would be booted.
    Info {
        /// As for `run`
        image: String,
        #[arg(long, value_enum, default_value_t = Output::Text)]
        output: Output,
    },
    /// Makes one file of a kernel, its initial RAM disk and its command line: a unified kernel image, for `run` and every other
    /// command that takes an image. The same input gives the same bytes.
    Pack(PackArgs),
}

#[derive(Debug, Args)]
pub struct PackArgs {
    /// A bzImage (vmlinuz) or an ELF vmlinux
    #[arg(long, value_name = "FILE")]
    pub kernel: PathBuf,
    /// Initial RAM disk
    #[arg(long, value_name = "FILE")]
    pub initrd: Option<PathBuf>,
    /// The command line; `run` has vmprobe's own words before it
    #[arg(long, value_name = "WORDS", allow_hyphen_values = true)]
    pub cmdline: Option<String>,
    /// An os-release file that tells which system this is
    #[arg(long, value_name = "FILE")]
    pub os_release: Option<PathBuf>,
    /// An EFI stub, for an image that boots on UEFI firmware too (systemd's linuxx64.efi.stub)
    #[arg(long, value_name = "FILE")]
    pub stub: Option<PathBuf>,
    /// Where the image goes
    #[arg(long, value_name = "FILE", default_value = "guest.img")]
    pub output: PathBuf,
}

#[derive(Debug, Args)]
pub struct MatrixArgs {
    #[command(subcommand)]
    pub command: Option<MatrixCommand>,
    #[command(flatten)]
    pub run: Option<MatrixRunArgs>,
}

#[derive(Debug, Subcommand)]
pub enum MatrixCommand {
    /// Makes one report of the results of several shards
    Report(MatrixReportArgs),
    /// Finds the first kernel, in the order of the file, whose cell is unlike that of the first one
    #[command(after_help = BISECT)]
    Bisect(MatrixBisectArgs),
}

#[derive(Debug, Args)]
pub struct MatrixRunArgs {
    /// The matrix file (TOML, docs/matrix.md)
    pub file: PathBuf,
    /// Where the results go [default: FILE with the ending .results]
    #[arg(long, value_name = "DIR")]
    pub results: Option<PathBuf>,
    /// Forget the results that are there
    #[arg(long)]
    pub fresh: bool,
    /// Run the cells again that failed, were flaky or could not be run on this host
    #[arg(long)]
    pub failed: bool,
    /// Run only a part of the cells, as 2/8 the second of eight; `matrix report` makes one report of all
    #[arg(long, value_name = "K/N")]
    pub shard: Option<matrix::schedule::Shard>,
    /// Run only cells with this value on an axis, as kernel=demo or vcpus=2 (may be given several times: values of one axis are
    /// alternatives)
    #[arg(long, value_name = "AXIS=VALUE")]
    pub only: Vec<matrix::Only>,
    /// How many CPUs the cells may use together [default: all]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    pub jobs: Option<u32>,
    /// How much memory the cells may use together [default: what is available]
    #[arg(long, value_name = "SIZE", value_parser = parse_size)]
    pub memory: Option<u64>,
    /// List the cells, and run none
    #[arg(long)]
    pub list: bool,
    /// Run more than a thousand cells without being asked
    #[arg(long)]
    pub yes: bool,
}

#[derive(Debug, Args)]
pub struct MatrixBisectArgs {
    /// The matrix file, with the kernels in order
    pub file: PathBuf,
    /// Where the results go, and known ones are [default: FILE with the ending .results]
    #[arg(long, value_name = "DIR")]
    pub results: Option<PathBuf>,
    /// Compare how often the probe with this spec is hit, in place of whether the cell passes
    #[arg(long, value_name = "SPEC")]
    pub count: Option<String>,
    /// Search only among cells with this value on an axis, as vcpus=2 (may be given several times: values of one axis are alternatives)
    #[arg(long, value_name = "AXIS=VALUE")]
    pub only: Vec<matrix::Only>,
    /// How many CPUs the cells may use together [default: all]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    pub jobs: Option<u32>,
    /// How much memory the cells may use together [default: what is available]
    #[arg(long, value_name = "SIZE", value_parser = parse_size)]
    pub memory: Option<u64>,
}

#[derive(Debug, Args)]
pub struct MatrixReportArgs {
    /// The matrix file
    pub file: PathBuf,
    /// Directories with results of its shards
    #[arg(required = true, value_name = "DIR")]
    pub from: Vec<PathBuf>,
    /// Where the report goes; results that are there already are a part of it
    #[arg(long, value_name = "DIR")]
    pub results: PathBuf,
}

/// What can be prepared.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Preparation {
    /// The emulated AMD-V machine of --accel nested
    Nested,
    /// A stock Debian kernel, as a guest
    Kernel,
    /// A small initramfs whose init does known work and prints how often
    Initrd,
    /// A root disk with Debian on it, systemd and ssh, to be used as a guest's disk
    Disk,
}

#[derive(Debug, Args)]
pub struct PrepareArgs {
    #[arg(value_enum)]
    pub what: Preparation,
}

/// Where the service's socket is if nothing is said: in the user's runtime directory, or for root's in the system's.
fn default_socket() -> PathBuf {
    let runtime = std::env::var_os("XDG_RUNTIME_DIR").map_or_else(|| PathBuf::from("/run"), PathBuf::from);
    runtime.join("vmprobe.sock")
}

/// Where the service is if nothing is said.
fn default_service() -> PathBuf {
    std::env::var_os("VMPROBE_SOCKET").map_or_else(default_socket, PathBuf::from)
}

/// Where the service is, for its clients.
#[derive(Debug, Args)]
pub struct ServiceArgs {
    /// The service: its Unix socket, or https://HOST:PORT
    #[arg(
        long,
        visible_alias = "socket",
        global = true,
        value_name = "WHERE",
        env = "VMPROBE_SERVICE",
        default_value_os_t = default_service()
    )]
    pub service: PathBuf,
    /// For https: this client's certificate, with those between it and its CA (PEM)
    #[arg(long, global = true, value_name = "FILE", env = "VMPROBE_TLS_CERT")]
    pub tls_cert: Option<PathBuf>,
    /// For https: the certificate's private key (PEM)
    #[arg(long, global = true, value_name = "FILE", env = "VMPROBE_TLS_KEY")]
    pub tls_key: Option<PathBuf>,
    /// For https: the CA that has signed the service's certificate (PEM)
    #[arg(long, global = true, value_name = "FILE", env = "VMPROBE_TLS_CA")]
    pub tls_ca: Option<PathBuf>,
}

/// Where the service is to be.
macro_rules! socket_argument {
    ($(#[$doc:meta])* $name:ident { $($(#[$meta:meta])* $field:ident: $kind:ty,)* }) => {
        $(#[$doc])*
        #[derive(Clone, Debug, Args)]
        pub struct $name {
            /// The service's Unix socket
            #[arg(
                long,
                global = true,
                value_name = "PATH",
                env = "VMPROBE_SOCKET",
                default_value_os_t = default_socket()
            )]
            pub socket: PathBuf,
            $($(#[$meta])* pub $field: $kind,)*
        }
    };
}

/// The journal of a machine's events. For the service the directory of all, for a machine's process that of the one.
#[derive(Args, Clone, Debug)]
pub struct JournalArgs {
    /// Keep the events on disk too, those of each machine in a directory of its own in this one
    #[arg(long, value_name = "DIR")]
    pub journal: Option<PathBuf>,
    /// Bytes of a machine's journal at most, at least 1M; the oldest events go
    #[arg(long, value_name = "SIZE", default_value = "256M", value_parser = parse_journal_size, requires = "journal")]
    pub journal_size: u64,
    /// How long an event is kept in the journal, at least 1s
    #[arg(long, value_name = "TIME", default_value = "24h", value_parser = parse_journal_age, requires = "journal")]
    pub journal_age: Duration,
}

impl JournalArgs {
    pub fn limits(&self) -> Limits {
        Limits { size: self.journal_size, age: self.journal_age }
    }
}

fn parse_journal_size(text: &str) -> Result<u64, String> {
    parse_size(text)
        .and_then(|size| if size < 1 << 20 { Err("1M is the least".to_owned()) } else { Ok(size) })
}

fn parse_journal_age(text: &str) -> Result<Duration, String> {
    let age = humantime::parse_duration(text).map_err(|error| error.to_string())?;
    if age < Duration::from_secs(1) { Err("1s is the least".to_owned()) } else { Ok(age) }
}

socket_argument! {
    ServeArgs {
        #[command(flatten)]
        journal: JournalArgs,
        /// Append every change that a client asks for, and every refusal, to this file, a JSON object a line
        #[arg(long, value_name = "FILE")]
        audit_log: Option<PathBuf>,
        /// Serve metrics for Prometheus, over plain HTTP on this TCP address: 127.0.0.1:9464 for this host only. They name machines
        /// and places of probes; restrict who can reach them
        #[arg(long, value_name = "ADDRESS:PORT")]
        metrics: Option<SocketAddr>,
        /// Leave the machines running at the end; the next service on the same socket finds them
        #[arg(long)]
        leave_machines: bool,
        /// Who else may do what: a file that gives roles to users and to holders of certificates
        #[arg(long, value_name = "FILE")]
        access: Option<PathBuf>,
        /// Serve on TCP too (ADDRESS:PORT), with TLS, to clients that have a certificate
        #[arg(long, value_name = "ADDRESS", requires = "access", requires = "TlsArgs")]
        listen: Option<SocketAddr>,
        #[command(flatten)]
        tls: Option<TlsArgs>,
    }
}

/// The service's side of mutual TLS.
#[derive(Clone, Debug, Args)]
pub struct TlsArgs {
    /// The service's certificate, with those between it and its CA (PEM)
    #[arg(long, value_name = "FILE", required = false, requires_all = ["listen", "tls_key", "tls_client_ca"])]
    pub tls_cert: PathBuf,
    /// Its private key (PEM)
    #[arg(long, value_name = "FILE", required = false, requires = "tls_cert")]
    pub tls_key: PathBuf,
    /// The CA, or several, that sign the clients' certificates (PEM)
    #[arg(long, value_name = "FILE", required = false, requires = "tls_cert")]
    pub tls_client_ca: PathBuf,
}

socket_argument! {
    WorkerArgs {
        /// As for `vm create`
        #[arg(long, required_unless_present = "restore", default_value = "", hide_default_value = true)]
        image: String,
        /// As for `vm restore`
        #[arg(long, value_name = "DIRECTORY")]
        restore: Option<PathBuf>,
        /// As for `vm create`
        #[arg(long, value_name = "FILE")]
        initrd: Option<PathBuf>,
        /// As for `vm create`
        #[arg(long = "disk", value_name = "FILE[,...]")]
        disks: Vec<DiskOptions>,
        /// Where it is put, below the mount point of cgroup2
        #[arg(long, value_name = "DIRECTORY")]
        cgroup: Option<PathBuf>,
        #[command(flatten)]
        journal: JournalArgs,
    }
}

#[derive(Debug, Args)]
pub struct VmArgs {
    #[command(flatten)]
    pub service: ServiceArgs,
    #[arg(long, value_enum, global = true, default_value_t = Output::Text)]
    pub output: Output,
    #[command(subcommand)]
    pub command: VmCommand,
}

/// What can be done with machines.
#[derive(Debug, Subcommand)]
pub enum VmCommand {
    /// Makes a machine; probes that are added before it is started see the guest's first instruction.
    Create(VmCreateArgs),
    /// Lists all machines.
    Ls,
    /// Shows one machine.
    Show { vm: String },
    /// Lets a new machine run.
    Start { vm: String },
    /// Stops its vCPUs between two instructions.
    Pause { vm: String },
    /// Lets a paused machine run on.
    Resume { vm: String },
    /// Ends the run; counts, events and console stay.
    Stop {
        vm: String,
        /// Press the guest's power button first, and let it end by itself for this long (30s, 5m)
        #[arg(long, value_name = "TIME", default_value = "0s", value_parser = humantime::parse_duration)]
        grace: Duration,
    },
    /// Saves a machine that runs or is paused to a new directory here; it goes on then.
    Snapshot { vm: String, directory: PathBuf },
    /// Writes a machine's registers and memory to a core file here, for gdb, drgn and crash; it stands still meanwhile.
    Dump { vm: String, file: PathBuf },
    /// Makes machines that go on where one was saved, with its probes, and lets them run.
    Restore(VmRestoreArgs),
    /// Ends the run and forgets the machine.
    Rm {
        #[arg(required = true)]
        vms: Vec<String>,
    },
}

#[derive(Debug, Args)]
pub struct VmRestoreArgs {
    /// The snapshot's directory, on the service's host
    pub directory: PathBuf,
    /// A name; with --count the beginning of each, as NAME-1 [default: vm-1, vm-2, ...]
    #[arg(long)]
    pub name: Option<String>,
    /// How many machines, each with a memory of its own
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=1000))]
    pub count: u32,
    /// Leave them as they were made, so that `vm start` lets them run
    #[arg(long)]
    pub stopped: bool,
}

#[derive(Debug, Args)]
pub struct VmCreateArgs {
    /// bzImage, ELF vmlinux, unified kernel image, disk image, bare-metal ELF, or a built-in guest: `demo` ends by itself, `ticker` goes on
    pub image: String,
    /// A name [default: vm-1, vm-2, ...]
    #[arg(long)]
    pub name: Option<String>,
    #[command(flatten)]
    pub guest: GuestArgs,
    /// Start it too
    #[arg(long)]
    pub start: bool,
}

#[derive(Debug, Args)]
pub struct ProbeArgs {
    #[command(flatten)]
    pub service: ServiceArgs,
    #[arg(long, value_enum, global = true, default_value_t = Output::Text)]
    pub output: Output,
    #[command(subcommand)]
    pub command: ProbeCommand,
}

/// What can be done with probes.
#[derive(Debug, Subcommand)]
pub enum ProbeCommand {
    /// Arms all of the probes, or none.
    Add {
        vm: String,
        /// As for `run --probe`
        #[arg(required = true)]
        specs: Vec<String>,
    },
    /// Lists the machine's probes with their counts.
    Ls { vm: String },
    /// Lets probes take hits again.
    Enable {
        vm: String,
        #[arg(required = true)]
        numbers: Vec<u32>,
    },
    /// Keeps probes from taking hits.
    Disable {
        vm: String,
        #[arg(required = true)]
        numbers: Vec<u32>,
    },
    /// Takes probes out.
    Rm {
        vm: String,
        #[arg(required = true)]
        numbers: Vec<u32>,
    },
    /// Tells where a probe would land, the instruction there, and how it would run, or why not; arms nothing.
    Explain {
        vm: String,
        #[command(flatten)]
        what: Explained,
    },
}

#[derive(Debug, Args)]
pub struct GuestCommandArgs {
    #[command(flatten)]
    pub service: ServiceArgs,
    #[arg(long, value_enum, global = true, default_value_t = Output::Text)]
    pub output: Output,
    #[command(subcommand)]
    pub command: GuestCommand,
}

/// What can be seen and changed of a machine's guest.
#[derive(Debug, Subcommand)]
pub enum GuestCommand {
    /// Lists what can be probed.
    Symbols {
        vm: String,
        #[command(flatten)]
        which: WhichSymbols,
    },
    /// Shows the registers of the vCPUs.
    Registers {
        vm: String,
        /// Only this vCPU
        #[arg(long, value_name = "NUMBER")]
        vcpu: Option<u32>,
    },
    /// Changes registers of a vCPU of a new or paused machine.
    Set {
        vm: String,
        /// The vCPU
        #[arg(long, value_name = "NUMBER", default_value_t = 0)]
        vcpu: u32,
        /// As rax=0x10: general-purpose registers, rip, rflags
        #[arg(required = true, value_name = "REGISTER=VALUE")]
        values: Vec<String>,
    },
    /// Walks the page tables to an address.
    Translate {
        #[command(flatten)]
        place: GuestPlace,
    },
    /// Shows memory, without breakpoints of vmprobe's.
    Read {
        #[command(flatten)]
        place: GuestPlace,
        /// Bytes
        #[arg(value_parser = parse_size)]
        length: u64,
        #[command(flatten)]
        kind: AddressKind,
        /// Write the bytes themselves
        #[arg(long, conflicts_with = "output")]
        raw: bool,
    },
    /// Changes memory.
    Write {
        #[command(flatten)]
        place: GuestPlace,
        /// The bytes as hexadecimal digits, `-` for the bytes of standard input
        bytes: String,
        #[command(flatten)]
        kind: AddressKind,
    },
}

/// A place in a machine's guest.
#[derive(Debug, Args)]
pub struct GuestPlace {
    pub vm: String,
    /// A linear address (0xffffffff81000000), or a symbol, with a distance from it (jiffies, init_task+8)
    pub address: String,
    /// Whose page tables count
    #[arg(long, value_name = "NUMBER", default_value_t = 0)]
    pub vcpu: u32,
}

#[derive(Debug, Args)]
pub struct AddressKind {
    /// The address is a guest-physical one
    #[arg(long)]
    pub physical: bool,
}

#[derive(Debug, Args)]
pub struct EventsArgs {
    #[command(flatten)]
    pub service: ServiceArgs,
    /// The machine
    pub vm: String,
    /// Only events of this probe (may be given several times)
    #[arg(long = "probe", value_name = "NUMBER")]
    pub probes: Vec<u32>,
    /// Begin with the event of this sequence number, or the oldest that is kept [default: the next event]
    #[arg(long, value_name = "SEQUENCE")]
    pub from: Option<u64>,
    /// End after this many events
    #[arg(long, value_name = "N")]
    pub max: Option<u64>,
    #[arg(long, value_enum, default_value_t = Output::Text)]
    pub output: Output,
}

#[derive(Debug, Args)]
pub struct ConsoleArgs {
    #[command(flatten)]
    pub service: ServiceArgs,
    /// The machine
    pub vm: String,
    /// Send the guest what is typed, or comes on stdin; Ctrl-] leaves the machine alone again
    #[arg(long, short)]
    pub interactive: bool,
}

fn parse_size(text: &str) -> Result<u64, String> {
    parse_size::Config::new().with_binary().parse_size(text).map_err(|error| error.to_string())
}
