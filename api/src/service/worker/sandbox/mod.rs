//! What a machine's process gives up before it looks at a guest's image: whoever takes it over through a hole in vmprobe or KVM gets
//! the guest's memory, the one connection to the service, and nothing else of the host.
//!
//! What it needs is opened before: /dev/kvm, the image, its socket. Then, in this order, all for good and for every thread that it
//! makes later:
//!
//! 1. limits: no core file, [`MAX_FILES`] file descriptors, no other process of the same user may look into its memory (prctl(2),
//!    PR_SET_DUMPABLE);
//! 2. no new privileges (prctl(2), PR_SET_NO_NEW_PRIVS), no capability in any set (capabilities(7));
//! 3. Landlock (landlock(7)): no file outside [`Sandbox::write`], no TCP, no signal to others, as far as the kernel's ABI goes;
//! 4. seccomp (seccomp(2)): the system calls of [`seccomp`], and death for any other.
//!
//! A kernel without seccomp runs no machine. Landlock takes away what seccomp has taken away already, as long as the process writes
//! no files, so a kernel without it does.

mod seccomp;

use std::path::PathBuf;

use landlock::{
    ABI, Access, AccessFs, AccessNet, LandlockStatus, PathBeneath, PathFd, PathFdError, Ruleset, RulesetAttr,
    RulesetCreatedAttr, RulesetError, RulesetStatus, Scope, make_bitflags,
};
use rustix::io::Errno;
use rustix::process::{DumpableBehavior, Resource, Rlimit, getrlimit, set_dumpable_behavior, setrlimit};
use rustix::thread::{CapabilitySet, CapabilitySets};
use seccomp::Files;
use seccompiler::apply_filter_all_threads;

use crate::contract::Isolation;
use crate::images::chain;

/// The newest ABI of Landlock that is asked for; of an older one the kernel gives what it has.
const LANDLOCK: ABI = ABI::V10;

/// File descriptors at most. A machine of 64 vCPUs has 81, three or four for each virtio device, and a few more
/// for each service that has come to find it.
const MAX_FILES: u64 = 256;

/// Why a process cannot be isolated. It must not go on then.
#[derive(Debug, thiserror::Error)]
pub enum SandboxError {
    /// The limits.
    #[error("Its limits cannot be lowered")]
    Limits(#[source] Errno),
    /// The capabilities.
    #[error("Its privileges cannot be dropped")]
    Privileges(#[source] Errno),
    /// A directory of [`Sandbox::write`].
    #[error("{path}: Cannot be opened", path = .0.display())]
    Directory(PathBuf, #[source] PathFdError),
    /// Landlock is there, and fails.
    #[error("Landlock fails")]
    Landlock(#[from] RulesetError),
    /// No seccomp.
    #[error(
        "This host's kernel has no seccomp filters (CONFIG_SECCOMP_FILTER); use one that has, or 'vmprobe run'"
    )]
    NoSeccomp,
    /// Seccomp is there, and fails.
    #[error("Seccomp fails")]
    Seccomp(#[from] seccompiler::Error),
}

/// What a process keeps.
#[derive(Debug, Default)]
pub struct Sandbox {
    /// Directories in which it may make, read, write, rename and remove files.
    pub write: Vec<PathBuf>,
    /// It has disks, opened before.
    pub disks: bool,
}

impl Sandbox {
    /// Gives up everything else. The process must not have any other thread yet: Landlock and capabilities are a thread's own, and
    /// threads inherit them.
    ///
    /// # Errors
    /// The process is not isolated, or only in part.
    pub fn enter(&self) -> Result<Isolation, SandboxError> {
        limit().map_err(SandboxError::Limits)?;
        drop_capabilities().map_err(SandboxError::Privileges)?;
        // After the change of capabilities, which may reset it.
        set_dumpable_behavior(DumpableBehavior::NotDumpable).map_err(SandboxError::Limits)?;
        let landlock_abi = self.restrict_paths()?;
        if landlock_abi == 0 {
            tracing::warn!(
                "This host's kernel has no Landlock, which would keep the machine's process from files"
            );
        }
        for filter in seccomp::filters(Files { opened: self.disks, below: !self.write.is_empty() })
            .map_err(seccompiler::Error::from)?
        {
            // EINVAL: filters are not in the kernel, ENOSYS: the call is not.
            let absent = [Errno::INVAL, Errno::NOSYS].map(Errno::raw_os_error);
            apply_filter_all_threads(&filter).map_err(|error| match error {
                seccompiler::Error::Seccomp(source)
                    if source.raw_os_error().is_some_and(|errno| absent.contains(&errno)) =>
                {
                    SandboxError::NoSeccomp
                }
                error => error.into(),
            })?;
        }
        Ok(Isolation { seccomp: true, no_capabilities: true, landlock_abi, ..Isolation::default() })
    }

    /// Returns the ABI that is in force, 0 for none.
    fn restrict_paths(&self) -> Result<u32, SandboxError> {
        let kept = make_bitflags!(AccessFs::{
            ReadFile | ReadDir | WriteFile | Truncate | MakeReg | RemoveFile
        });
        let mut ruleset = Ruleset::default()
            .handle_access(AccessFs::from_all(LANDLOCK))?
            .handle_access(AccessNet::from_all(LANDLOCK))?
            .scope(Scope::from_all(LANDLOCK))?
            .create()?;
        for path in &self.write {
            let opened = PathFd::new(path).map_err(|error| SandboxError::Directory(path.clone(), error))?;
            ruleset = ruleset.add_rule(PathBeneath::new(opened, kept))?;
        }
        let status = ruleset.restrict_self()?;
        Ok(match status.landlock {
            LandlockStatus::Available { effective_abi, .. }
                if status.ruleset != RulesetStatus::NotEnforced =>
            {
                effective_abi as u32
            }
            _ => 0,
        })
    }
}

fn limit() -> Result<(), Errno> {
    for (resource, most) in [(Resource::Core, 0), (Resource::Nofile, MAX_FILES)] {
        let most = getrlimit(resource).maximum.map_or(most, |known| known.min(most));
        setrlimit(resource, Rlimit { current: Some(most), maximum: Some(most) })?;
    }
    Ok(())
}

fn drop_capabilities() -> Result<(), Errno> {
    rustix::thread::set_no_new_privs(true)?;
    rustix::thread::clear_ambient_capability_set()?;
    // Whoever may not change the bounding set gains nothing by what is in it, without new privileges.
    for number in 0..u64::BITS {
        match rustix::thread::remove_capability_from_bounding_set(CapabilitySet::from_bits_retain(
            1 << number,
        )) {
            Ok(()) => {}
            // EINVAL: the kernel knows no more of them.
            Err(Errno::INVAL | Errno::PERM) => break,
            Err(error) => return Err(error),
        }
    }
    let none = CapabilitySet::empty();
    rustix::thread::set_capabilities(
        None,
        CapabilitySets { effective: none, permitted: none, inheritable: none },
    )
}

impl From<SandboxError> for crate::exit::Failure {
    fn from(error: SandboxError) -> Self {
        Self::Host(format!("The machine's process cannot be isolated: {}", chain(&error)))
    }
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::io;
    use std::os::unix::process::{CommandExt, ExitStatusExt};
    use std::process::{Command, Output};

    use rustix::process::Signal;

    use super::*;

    /// What a process tries when it is isolated; the variable is in the environment of a process that this test starts.
    const TRY: &str = "VMPROBE_TEST_TRY";
    /// A directory that it may write.
    const WRITE: &str = "VMPROBE_TEST_WRITE";
    /// A disk that it has.
    const DISK: &str = "VMPROBE_TEST_DISK";

    /// Runs this test's own program again, isolated, and has it try something.
    fn tried(what: &str, write: Option<&std::path::Path>) -> Output {
        tried_with_disk(what, write, None)
    }

    fn tried_with_disk(
        what: &str,
        write: Option<&std::path::Path>,
        disk: Option<&disk::DiskOptions>,
    ) -> Output {
        let mut command = Command::new(std::env::current_exe().unwrap());
        command.args(["--exact", "--ignored", "--nocapture"]);
        command.arg("service::worker::sandbox::tests::an_isolated_process_tries_something");
        command.env(TRY, what).env("RUST_BACKTRACE", "1");
        if let Some(directory) = write {
            command.env(WRITE, directory);
        }
        if let Some(disk) = disk {
            command.env(DISK, disk.to_string());
        }
        command.output().unwrap()
    }

    /// All that a guest's driver can have a disk do.
    fn use_disk(disk: &mut disk::Disk) -> io::Result<()> {
        let (mut read, data) = ([0; 4096], [0xa5; 4096]);
        disk.read(&mut read, 0)?;
        assert_eq!(read, [1; 4096]);
        disk.write(&data, 8192)?;
        disk.write_zeros(65536, 65536)?;
        disk.discard(131_072, 65536)?;
        disk.flush()?;
        disk.read(&mut read, 8192)?;
        assert_eq!(read, data);
        disk.read(&mut read, 65536)?;
        assert_eq!(read, [0; 4096]);
        Ok(())
    }

    fn attempt(what: &str, write: Option<PathBuf>, disk: Option<disk::Disk>) -> String {
        let text =
            |result: io::Result<()>| result.map_or_else(|error| error.to_string(), |()| "done".to_owned());
        let inside = write.unwrap_or_default();
        match what {
            "disk" => text(use_disk(&mut disk.unwrap())),
            "open" => text(fs::File::open("/etc/passwd").map(drop)),
            "write elsewhere" => text(fs::write("/tmp/vmprobe-sandbox-test", "x")),
            "write" => text(
                fs::write(inside.join("a"), "x")
                    .and_then(|()| fs::rename(inside.join("a"), inside.join("b"))),
            ),
            "leave" => text(fs::rename(inside.join("b"), "/tmp/vmprobe-sandbox-test")),
            "socket" => text(std::net::TcpStream::connect("127.0.0.1:1").map(drop)),
            "unix" => text(std::os::unix::net::UnixStream::connect("/run/x").map(drop)),
            "spawn" => text(Command::new("/bin/true").status().map(drop)),
            "exec" => Command::new("/bin/true").exec().to_string(),
            "kill" => text(
                rustix::process::kill_process(rustix::process::getppid().unwrap(), Signal::CONT)
                    .map_err(Into::into),
            ),
            "unlink" => text(fs::remove_file("/tmp/vmprobe-sandbox-test")),
            "dump" => text(set_dumpable_behavior(DumpableBehavior::Dumpable).map_err(Into::into)),
            "thread" => text(std::thread::spawn(|| fs::File::open("/etc/passwd").map(drop)).join().unwrap()),
            "panic" => text(
                std::thread::spawn(|| panic!("on purpose")).join().map_err(|_| io::Error::other("panicked")),
            ),
            other => panic!("{other}"),
        }
    }

    #[test]
    #[ignore = "the other tests start it in processes of their own"]
    fn an_isolated_process_tries_something() {
        let Ok(what) = std::env::var(TRY) else { return };
        let write = std::env::var_os(WRITE).map(PathBuf::from);
        let disk = std::env::var(DISK).ok().map(|disk| disk::Disk::open(&disk.parse().unwrap()).unwrap());
        let isolation =
            Sandbox { write: write.iter().cloned().collect(), disks: disk.is_some() }.enter().unwrap();
        assert!(isolation.seccomp && isolation.no_capabilities);
        eprintln!("landlock: {}", isolation.landlock_abi);
        eprintln!("outcome: {}", attempt(&what, write, disk));
        std::process::exit(0);
    }

    fn outcome(output: &Output) -> String {
        let text = String::from_utf8_lossy(&output.stderr);
        let found = text.lines().find_map(|line| line.strip_prefix("outcome: "));
        found.unwrap_or_else(|| panic!("{text}")).to_owned()
    }

    #[test]
    fn files_cannot_be_found_and_the_process_lives_on() {
        for what in ["open", "write elsewhere", "thread"] {
            let output = tried(what, None);
            assert!(outcome(&output).contains("not implemented"), "{what}: {}", outcome(&output));
            assert!(output.status.success(), "{what}");
        }
    }

    #[test]
    fn connections_programs_signals_and_removal_end_the_process() {
        for what in ["socket", "unix", "spawn", "exec", "kill", "unlink", "dump"] {
            let status = tried(what, None).status;
            assert_eq!(status.signal(), Some(Signal::SYS.as_raw()), "{what}: {status}");
        }
    }

    #[test]
    fn a_panic_with_its_backtrace_does_not_end_the_process() {
        let output = tried("panic", None);
        assert_eq!(outcome(&output), "panicked");
        assert!(output.status.success());
    }

    #[test]
    fn a_disk_that_is_open_is_read_and_written_and_no_other_file_is_found() {
        let directory = tempfile::tempdir().unwrap();
        let image = directory.path().join("disk,1.img");
        fs::write(&image, [1; 256 << 10]).unwrap();
        for access in [disk::Access::Overlay, disk::Access::Write] {
            let options = disk::DiskOptions { access, ..disk::DiskOptions::new(image.clone()) };
            assert_eq!(outcome(&tried_with_disk("disk", None, Some(&options))), "done", "{access:?}");
            let changed = fs::read(&image).unwrap()[8192] == 0xa5;
            assert_eq!(changed, access == disk::Access::Write);
            let output = tried_with_disk("open", None, Some(&options));
            assert!(outcome(&output).contains("not implemented"), "{}", outcome(&output));
        }
        let options = disk::DiskOptions::new(image);
        let status = tried_with_disk("unlink", None, Some(&options)).status;
        assert_eq!(status.signal(), Some(Signal::SYS.as_raw()), "{status}");
    }

    #[test]
    fn a_directory_that_may_be_written_is_the_only_one() {
        let directory = tempfile::tempdir().unwrap();
        assert_eq!(outcome(&tried("write", Some(directory.path()))), "done");
        assert!(directory.path().join("b").exists());
        // A kernel without Landlock cannot tell directories apart.
        if String::from_utf8_lossy(&tried("open", None).stderr).contains("landlock: 0") {
            println!("skipped: this kernel has no Landlock");
            return;
        }
        for what in ["open", "write elsewhere", "leave"] {
            let outcome = outcome(&tried(what, Some(directory.path())));
            assert!(outcome.contains("denied") || outcome.contains("cross-device"), "{what}: {outcome}");
        }
        assert!(directory.path().join("b").exists());
    }
}
