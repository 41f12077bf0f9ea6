//! Where a run takes place: this host's KVM, or the emulated machine.

use guest::image::{Container, Extras};
use nested::Clock;
use vmm::doctor::{Verdict, judge};

use crate::cli::{Accel, BenchArgs, RunArgs};
use crate::exit::{Code, Failure};
use crate::images::Opened;
use crate::snapshot::Saved;
use crate::{bench, elsewhere, images, probes, run, serial};

/// `vmprobe run`: here or in the emulated machine.
pub fn run(args: &RunArgs) -> Result<Code, Failure> {
    if serial::has_input(&args.serial) && args.probe_files.iter().any(|file| file == "-") {
        let why = "--serial tty and --probes - both read standard input; put the probes into a file";
        return Err(Failure::Usage(why.to_owned()));
    }
    let mut saved = args.restore.as_deref().map(Saved::open).transpose()?;
    let Opened { guest, extras } = match &mut saved {
        Some(saved) => Opened { guest: saved.guest()?, extras: Extras::default() },
        None => images::open(&args.image)?,
    };
    let disks = images::attached(
        &args.image,
        matches!(extras.container, Some(Container::Disk(_))),
        &args.guest.disks,
    );
    if args.snapshot.is_some() && !disks.is_empty() {
        return Err(Failure::Usage(format!(
            "{}: a machine with disks cannot be saved yet; --snapshot takes a kernel, or `vmprobe image pack` makes one file of kernel and initrd",
            args.image
        )));
    }
    // What is wrong with a probe is said before a machine is prepared for it.
    let stdin = probes::read_stdin(args)?;
    let specs = saved.as_ref().map(Saved::specs).unwrap_or_default();
    let probes = probes::resolve(args, &guest, &specs, stdin.as_deref().unwrap_or_default())?;
    match place(args.accel, guest.linux.is_some(), args.verbose) {
        Place::Kvm => run::run(args, &disks, guest, extras, probes, saved.as_ref()),
        Place::Nested(_) if args.restore.is_some() || args.snapshot.is_some() => Err(Failure::Host(
            "No snapshot leaves or enters the emulated machine of --accel nested; use a host with hardware virtualization".into(),
        )),
        Place::Nested(clock) => elsewhere::run(args, &disks, &extras, stdin.as_deref(), clock),
    }
}

/// `vmprobe bench`: here or in the emulated machine.
pub fn bench(args: &BenchArgs) -> Result<Code, Failure> {
    match place(args.accel, false, false) {
        Place::Kvm => bench::bench(args),
        Place::Nested(clock) => elsewhere::bench(clock),
    }
}

/// Chooses the place, and says so where the user may wonder.
fn place(asked: Accel, linux: bool, verbose: bool) -> Place {
    let host = if asked == Accel::Auto { measure() } else { Host::default() };
    let (place, why) = choose(asked, host, linux);
    if verbose || (asked == Accel::Auto && place != Place::Kvm) {
        let name = match place {
            Place::Kvm => "kvm",
            Place::Nested(Clock::Real) => "nested",
            Place::Nested(Clock::Instructions) => "nested-icount",
        };
        eprintln!("vmprobe: --accel {name}: {why}");
    }
    place
}

/// Whether a host's KVM itself runs a guest.
///
/// # Errors
/// It does not, and why.
pub fn check_kvm(host: Host, linux: bool) -> Result<(), Failure> {
    match choose(Accel::Auto, host, linux) {
        (Place::Kvm, _) => Ok(()),
        (Place::Nested(_), why) => {
            Err(Failure::Host(format!("{why}; 'vmprobe run' has --accel nested for it")))
        }
    }
}

/// Tries this host's KVM.
pub fn measure() -> Host {
    Host::of(judge())
}

/// The chosen place.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Place {
    Kvm,
    Nested(Clock),
}

const NESTED: Place = Place::Nested(Clock::Real);

/// What the choice depends on.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Host {
    /// /dev/kvm can be opened and speaks the KVM API.
    pub kvm: bool,
    /// Guest kernel code runs on the CPU itself, not in KVM's instruction emulator.
    pub hardware_virtualization: bool,
}

impl Host {
    /// What a verdict on this host's KVM comes to.
    pub fn of(verdict: Verdict) -> Self {
        Self { kvm: verdict != Verdict::Unusable, hardware_virtualization: verdict == Verdict::Full }
    }
}

/// Chooses, and says why.
pub fn choose(asked: Accel, host: Host, linux: bool) -> (Place, &'static str) {
    match (asked, host) {
        (Accel::Kvm, _) => (Place::Kvm, "asked for"),
        (Accel::Nested, _) => (NESTED, "asked for"),
        (Accel::NestedIcount, _) => (Place::Nested(Clock::Instructions), "asked for"),
        (Accel::Auto, Host { kvm: false, .. }) => (NESTED, "this host has no usable /dev/kvm"),
        (Accel::Auto, Host { hardware_virtualization: true, .. }) => {
            (Place::Kvm, "this host has hardware virtualization")
        }
        (Accel::Auto, _) if linux => {
            (NESTED, "this host's KVM emulates kernel code, which a Linux guest does not survive")
        }
        (Accel::Auto, _) => {
            (Place::Kvm, "this host's KVM emulates kernel code, which is enough for a bare-metal guest")
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const NONE: Host = Host { kvm: false, hardware_virtualization: false };
    const EMULATING: Host = Host { kvm: true, hardware_virtualization: false };
    const REAL: Host = Host { kvm: true, hardware_virtualization: true };

    #[test]
    fn what_is_asked_for_is_done() {
        for host in [NONE, EMULATING, REAL] {
            assert_eq!(choose(Accel::Kvm, host, true).0, Place::Kvm);
            assert_eq!(choose(Accel::Nested, host, false).0, NESTED);
            assert_eq!(choose(Accel::NestedIcount, host, true).0, Place::Nested(Clock::Instructions));
        }
    }

    #[test]
    fn auto_takes_kvm_where_it_will_do_for_the_image() {
        assert_eq!(choose(Accel::Auto, REAL, true).0, Place::Kvm);
        assert_eq!(choose(Accel::Auto, REAL, false).0, Place::Kvm);
        assert_eq!(choose(Accel::Auto, EMULATING, false).0, Place::Kvm);
        assert_eq!(choose(Accel::Auto, EMULATING, true).0, NESTED);
        assert_eq!(choose(Accel::Auto, NONE, false).0, NESTED);
    }
}
