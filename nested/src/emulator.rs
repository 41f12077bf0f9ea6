//! The emulator: its command line and its process.

use std::ffi::OsString;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::os::unix::process::CommandExt;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use disk::Access;
use rustix::process::Signal;

use crate::control::port;
use crate::prepare::Rig;
use crate::process::die_with_parent;
use crate::run::{Clock, NestedDisk};
use crate::{init, request};

/// The emulator's ends of what connects it with vmprobe. Their numbers are the same in both processes.
pub(crate) struct Wiring {
    /// The machine's file system, a memory file.
    pub(crate) initramfs: OwnedFd,
    /// Where the machine's console goes, a memory file.
    pub(crate) console: OwnedFd,
    /// The emulator's own messages, a memory file.
    pub(crate) messages: OwnedFd,
    /// The sockets of the machine's ports.
    pub(crate) control: OwnedFd,
    pub(crate) stdin: Option<OwnedFd>,
    pub(crate) stdout: OwnedFd,
    pub(crate) stderr: OwnedFd,
    pub(crate) vsock: Option<OwnedFd>,
    pub(crate) networks: Vec<OwnedFd>,
}

/// A path that opens the same file in the emulator.
fn file_of(fd: &OwnedFd) -> String {
    format!("/proc/self/fd/{}", fd.as_raw_fd())
}

/// The kernel's command line: its console, an end instead of a hang when it panics, and nothing that costs time and is of no
/// use in this machine, five-level page tables of its own among them: guests have them all the same. A variable on it becomes part of process 1's environment (Linux: kernel-parameters).
const KERNEL_OPTIONS: &str = "console=ttyS0 panic=-1 nokaslr no5lvl mitigations=off quiet cryptomgr.notests";

/// The emulator's command line for a machine with `memory` bytes and `cpus` virtual CPUs.
fn arguments(
    rig: &Rig,
    wiring: &Wiring,
    memory: u64,
    cpus: u32,
    clock: Clock,
    disks: &[NestedDisk],
) -> Vec<OsString> {
    let mut arguments: Vec<OsString> = [
        "-nodefaults",
        "-no-user-config",
        "-display",
        "none",
        // A machine that resets or panics has ended.
        "-no-reboot",
        "-machine",
        "pc",
        "-cpu",
        "EPYC,+svm,+npt,+la57",
    ]
    .map(OsString::from)
    .into();
    let mut option = |name: &str, value: OsString| arguments.extend([name.into(), value]);
    match clock {
        Clock::Real => option("-accel", "tcg,thread=multi".into()),
        // One thread is all that this clock can be read from (QEMU: docs/devel/tcg-icount.rst).
        Clock::Instructions => {
            option("-accel", "tcg,thread=single".into());
            option("-icount", "shift=0".into());
        }
    }
    option("-smp", cpus.max(1).to_string().into());
    option("-m", format!("{}M", memory.div_ceil(1 << 20)).into());
    option("-L", rig.qemu.firmware().into());
    option("-kernel", rig.kernel.vmlinux().into());
    option("-initrd", file_of(&wiring.initramfs).into());
    let init = format!(
        "{KERNEL_OPTIONS} {}=1 LD_LIBRARY_PATH={} rdinit={}",
        init::MARKER,
        request::LIBRARIES,
        request::PROGRAM
    );
    option("-append", init.into());
    option("-chardev", format!("file,id=console,path={}", file_of(&wiring.console)).into());
    option("-serial", "chardev:console".into());
    option("-device", "virtio-serial-pci".into());
    let ports =
        [(port::CONTROL, &wiring.control), (port::STDOUT, &wiring.stdout), (port::STDERR, &wiring.stderr)];
    let stdin = wiring.stdin.iter().map(|socket| (port::STDIN, socket));
    let vsock = wiring.vsock.iter().map(|socket| (port::VSOCK, socket));
    let named = ports.into_iter().chain(stdin).chain(vsock).map(|(name, socket)| (name.to_owned(), socket));
    let networks = wiring.networks.iter().enumerate().map(|(index, socket)| (port::network(index), socket));
    for (name, socket) in named.chain(networks) {
        option("-chardev", format!("socket,id={name},fd={}", socket.as_raw_fd()).into());
        option("-device", format!("virtserialport,chardev={name},name={name}").into());
    }
    for (index, disk) in disks.iter().enumerate() {
        option("-drive", drive(index, disk));
        option("-device", format!("virtio-blk-pci,drive=disk{index}").into());
    }
    arguments
}

/// A disk as QEMU opens it: nothing but the files that are named here, in the formats that are named here.
fn drive(index: usize, disk: &NestedDisk) -> OsString {
    let access = match disk.access {
        Access::ReadOnly => "readonly=on",
        // Its overlay is a file without a name in TMPDIR or /var/tmp.
        Access::Overlay => "snapshot=on",
        Access::Write => "readonly=off",
    };
    // An error is the guest's to see, and no reason to stop the machine.
    let mut drive =
        OsString::from(format!("id=disk{index},if=none,{access},werror=report,rerror=report,discard=unmap"));
    // Each image is the backing of the one before it.
    let mut node = String::new();
    for (format, path) in &disk.images {
        let option = if node.is_empty() { "format" } else { "driver" };
        drive.push(format!(",{node}{option}={format},{node}file.driver=file,{node}file.filename="));
        // Two commas are one that is part of a value.
        let parts = path.as_os_str().as_bytes().split(|byte| *byte == b',');
        drive.push(OsString::from_vec(parts.collect::<Vec<_>>().join(&b",,"[..])));
        node.push_str("backing.");
    }
    drive
}

/// The running emulator. Dropped, it is killed: what it computes has been fetched before, or is not wanted any more.
pub(crate) struct Machine(Child);

impl Machine {
    /// Starts the emulator. It dies with the calling thread.
    pub(crate) fn start(
        rig: &Rig,
        wiring: Wiring,
        memory: u64,
        cpus: u32,
        clock: Clock,
        disks: &[NestedDisk],
    ) -> io::Result<Self> {
        let mut command = Command::new(rig.qemu.binary());
        command.args(arguments(rig, &wiring, memory, cpus, clock, disks));
        // Only the emulator gets them: they are closed here when it has been started, so that its end is seen.
        let fds = [&wiring.initramfs, &wiring.console, &wiring.control, &wiring.stdout, &wiring.stderr];
        for fd in fds.into_iter().chain(&wiring.stdin).chain(&wiring.vsock).chain(&wiring.networks) {
            rustix::io::fcntl_setfd(fd, rustix::io::FdFlags::empty())?;
        }
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(wiring.messages.try_clone()?);
        // A terminal sends its Ctrl-C to the whole process group; the emulator must not get it.
        command.process_group(0);
        die_with_parent(&mut command, Signal::KILL);
        command.spawn().map(Self)
    }
}

impl Machine {
    /// How the emulator has ended. To be asked when its sockets are closed, which is shortly before.
    pub(crate) fn ended(&mut self) -> String {
        for _ in 0..100 {
            match self.0.try_wait() {
                Ok(Some(status)) => return status.to_string(),
                Ok(None) => std::thread::sleep(Duration::from_millis(10)),
                Err(error) => return error.to_string(),
            }
        }
        "it still runs but has closed its connection".into()
    }
}

impl Drop for Machine {
    fn drop(&mut self) {
        // Both fail only if it has ended and been waited for.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

#[cfg(test)]
mod tests {
    use disk::Format;

    use super::*;

    #[test]
    fn a_disk_names_every_file_that_it_is_made_of() {
        let disk = NestedDisk {
            access: Access::Overlay,
            images: vec![
                (Format::Qcow2, "/a,b".into()),
                (Format::Qcow2, "/c".into()),
                (Format::Raw, "/e".into()),
            ],
        };
        let drive = drive(3, &disk).into_string().unwrap();
        let (options, files) = drive.split_once(",format=").unwrap();
        assert_eq!(options, "id=disk3,if=none,snapshot=on,werror=report,rerror=report,discard=unmap");
        assert_eq!(
            files,
            "qcow2,file.driver=file,file.filename=/a,,b\
             ,backing.driver=qcow2,backing.file.driver=file,backing.file.filename=/c\
             ,backing.backing.driver=raw,backing.backing.file.driver=file,backing.backing.file.filename=/e"
        );
    }
}
