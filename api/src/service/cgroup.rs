//! A cgroup for each machine's process (cgroups(7), version 2), below the service's own, where that is the service's alone: systemd's
//! `Delegate=yes`, a container, or any group that holds nothing but the service.
//!
//! ```text
//! vmprobe.service          the service's own when it starts; holds no process afterwards, as cgroup2 wants it
//!   ├── service            vmprobe serve
//!   ├── vm-one             vmprobe worker: memory.max, pids.max
//!   └── vm-two
//! ```
//!
//! The files of controllers that the host does not hand down are not there, and their limits are not set.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

/// The group of the service itself. systemd puts it there where it knows `DelegateSubgroup=`.
const SERVICE: &str = "service";
/// In front of a machine's name.
const MACHINE: &str = "vm-";

/// Controllers that are handed down to the machines' groups, where the service has them.
const CONTROLLERS: [&str; 3] = ["cpu", "memory", "pids"];

/// What a machine's process may use besides guest memory, bytes: the unpacked image with its symbols (a stock Debian kernel: 71 MiB at
/// most, of which 14 MiB are the file), the events and the console that it keeps (some 30 MiB), requests under way.
const OWN_MEMORY: u64 = 512 << 20;
/// Page tables and KVM's account of the guest's pages: this part of guest memory.
const PAGE_TABLES: u64 = 32;
/// Threads of a machine's process at most: a vCPU's each, tokio's, and its 512 for work that waits.
const THREADS: u64 = 1024;

/// How long a process that has ended may keep its group, and how often it is looked at.
const EMPTY_TRIES: u32 = 100;
const EMPTY_INTERVAL: Duration = Duration::from_millis(20);

/// Where cgroup2 is mounted.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Mount {
    /// The group that is seen there.
    root: PathBuf,
    point: PathBuf,
}

impl Mount {
    /// Out of /proc/self/mountinfo (proc_pid_mountinfo(5)).
    fn find(mountinfo: &str) -> Option<Self> {
        mountinfo.lines().find_map(|line| {
            let (mount, kind) = line.split_once(" - ")?;
            if kind.split(' ').next() != Some("cgroup2") {
                return None;
            }
            let mut fields = mount.split(' ').skip(3);
            Some(Self { root: fields.next()?.into(), point: fields.next()?.into() })
        })
    }

    /// The directory of a group.
    fn directory(&self, group: &Path) -> Option<PathBuf> {
        Some(self.point.join(group.strip_prefix(&self.root).ok()?))
    }
}

/// The process's group of version 2, out of /proc/self/cgroup (cgroups(7)).
fn own_group(text: &str) -> Option<&str> {
    text.lines().find_map(|line| line.strip_prefix("0::"))
}

/// The most memory that a machine's process may use, bytes.
fn memory_limit(guest: u64, initrd: u64) -> u64 {
    [guest, guest / PAGE_TABLES, initrd, OWN_MEMORY].into_iter().fold(0, u64::saturating_add)
}

/// Whether a group was emptied because it had used up its memory, out of its memory.events.
fn had_no_memory_left(events: &str) -> bool {
    events.lines().filter_map(|line| line.strip_prefix("oom_kill ")).any(|count| count.trim() != "0")
}

/// The groups of a service's machines.
#[derive(Debug)]
pub struct Cgroups {
    mount: Mount,
    /// The directory that they are in.
    base: PathBuf,
}

impl Cgroups {
    /// Moves this process into a group of its own within its group, so that there can be others beside it.
    ///
    /// # Errors
    /// Why there can be none, for people.
    pub fn claim() -> Result<Self, String> {
        let read = |path: &Path| {
            fs::read_to_string(path).map_err(|error| format!("{}: cannot be read: {error}", path.display()))
        };
        let mountinfo = read(Path::new("/proc/self/mountinfo"))?;
        let mount = Mount::find(&mountinfo).ok_or("cgroup2 is not mounted")?;
        let text = read(Path::new("/proc/self/cgroup"))?;
        let group = own_group(&text).ok_or("the service is in no cgroup of version 2")?;
        let own = mount
            .directory(Path::new(group))
            .ok_or_else(|| format!("the service's cgroup {group} is not below {}", mount.point.display()))?;
        let base = match own.parent().filter(|_| own.ends_with(SERVICE)) {
            Some(base) => base.to_owned(),
            None => {
                let processes = read(&own.join("cgroup.procs"))?;
                let this = std::process::id().to_string();
                if processes.lines().any(|process| process != this) {
                    return Err(format!("the service's cgroup {group} holds other processes too"));
                }
                let new = own.join(SERVICE);
                make(&new)?;
                write(&new.join("cgroup.procs"), &this)?;
                own
            }
        };
        let available = read(&base.join("cgroup.controllers"))?;
        for controller in
            CONTROLLERS.into_iter().filter(|one| available.split_whitespace().any(|it| it == *one))
        {
            write(&base.join("cgroup.subtree_control"), &format!("+{controller}"))?;
        }
        let groups = Self { mount, base };
        groups.remove_empty();
        Ok(groups)
    }

    /// Takes away what earlier services have left behind; the kernel keeps groups that hold processes.
    fn remove_empty(&self) {
        for entry in fs::read_dir(&self.base).into_iter().flatten().flatten() {
            if entry.file_name().to_string_lossy().starts_with(MACHINE) {
                fs::remove_dir(entry.path()).ok();
            }
        }
    }

    /// Makes the group of a machine with so much guest memory and so large an initial RAM disk, bytes. Returns its directory.
    ///
    /// # Errors
    /// What the host says.
    pub fn make(&self, machine: &str, guest: u64, initrd: u64) -> Result<PathBuf, String> {
        let group = self.base.join(format!("{MACHINE}{machine}"));
        make(&group)?;
        for (limit, value) in [("memory.max", memory_limit(guest, initrd)), ("pids.max", THREADS)] {
            let file = group.join(limit);
            if file.exists() {
                write(&file, &value.to_string())?;
            }
        }
        Ok(group)
    }

    /// The directory of a group that a machine's process says it is in.
    pub fn directory(&self, group: &str) -> Option<PathBuf> {
        self.mount.directory(Path::new(group)).filter(|directory| directory.parent() == Some(&self.base))
    }
}

fn make(group: &Path) -> Result<(), String> {
    match fs::create_dir(group) {
        Err(error) if error.kind() != io::ErrorKind::AlreadyExists => {
            Err(format!("{}: cannot be made: {error}", group.display()))
        }
        _ => Ok(()),
    }
}

fn write(file: &Path, value: &str) -> Result<(), String> {
    fs::write(file, value).map_err(|error| format!("{}: cannot be written: {error}", file.display()))
}

/// Takes a machine's group away as soon as its process has left it.
pub async fn remove(group: &Path) {
    for _ in 0..EMPTY_TRIES {
        match fs::remove_dir(group) {
            Err(error) if error.kind() == io::ErrorKind::ResourceBusy => {
                tokio::time::sleep(EMPTY_INTERVAL).await
            }
            Err(error) => return tracing::warn!("{}: cannot be removed: {error}", group.display()),
            Ok(()) => return,
        }
    }
    tracing::warn!("{}: still holds processes", group.display());
}

/// Whether the kernel ended a group's process because it had used up its memory.
pub fn ran_out_of_memory(group: &Path) -> bool {
    fs::read_to_string(group.join("memory.events")).is_ok_and(|events| had_no_memory_left(&events))
}

/// Moves this process into a group. Returns its path and how much memory it may use, bytes, 0 where that is not limited; nothing, and
/// says so, where it stays where it is.
pub fn join(group: &Path) -> Option<(String, u64)> {
    let joined = write(&group.join("cgroup.procs"), &std::process::id().to_string());
    joined.inspect_err(|error| tracing::warn!("{error}")).ok()?;
    let text = fs::read_to_string("/proc/self/cgroup").ok()?;
    let limit = fs::read_to_string(group.join("memory.max")).ok().and_then(|limit| limit.trim().parse().ok());
    Some((own_group(&text)?.to_owned(), limit.unwrap_or(0)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_mount_of_version_2_is_found_beside_those_of_version_1() {
        let mountinfo = "25 1 0:22 / /sys rw,nosuid - sysfs sysfs rw\n\
             31 25 0:27 / /sys/fs/cgroup/memory rw shared:5 - cgroup cgroup rw,memory\n\
             32 25 0:28 /docker/1 /sys/fs/cgroup/unified rw shared:6 - cgroup2 cgroup2 rw\n";
        let mount = Mount::find(mountinfo).unwrap();
        let expected = Mount { root: "/docker/1".into(), point: "/sys/fs/cgroup/unified".into() };
        assert_eq!(mount, expected);
        let directory = |group: &str| mount.directory(Path::new(group));
        assert_eq!(directory("/docker/1/a/b"), Some("/sys/fs/cgroup/unified/a/b".into()));
        assert_eq!(directory("/docker/10"), None);
        assert_eq!(Mount::find("31 25 0:27 / /sys/fs/cgroup rw - cgroup cgroup rw,memory\n"), None);
    }

    #[test]
    fn the_group_of_version_2_is_the_one_without_controllers() {
        assert_eq!(
            own_group("4:memory:/a\n0::/system.slice/vmprobe.service\n"),
            Some("/system.slice/vmprobe.service")
        );
        assert_eq!(own_group("4:memory:/a\n"), None);
    }

    #[test]
    fn the_limit_leaves_room_for_what_is_not_guest_memory_and_does_not_wrap() {
        assert_eq!(memory_limit(512 << 20, 10 << 20), (512 + 16 + 10 + 512) << 20);
        assert_eq!(memory_limit(u64::MAX, 1), u64::MAX);
    }

    #[test]
    fn limits_are_set_where_the_host_hands_their_controllers_down_and_a_group_elsewhere_is_not_ours() {
        let directory = tempfile::tempdir().unwrap();
        let base = directory.path().join("own");
        fs::create_dir_all(base.join("vm-t")).unwrap();
        fs::write(base.join("vm-t/memory.max"), "max").unwrap();
        let mount = Mount { root: "/".into(), point: directory.path().into() };
        let groups = Cgroups { mount, base: base.clone() };
        assert_eq!(groups.make("t", 64 << 20, 0), Ok(base.join("vm-t")));
        let limit = fs::read_to_string(base.join("vm-t/memory.max")).unwrap();
        assert_eq!(limit, memory_limit(64 << 20, 0).to_string());
        assert!(!base.join("vm-t/pids.max").exists());

        assert_eq!(groups.directory("/own/vm-t"), Some(base.join("vm-t")));
        for other in ["/other/vm-t", "/own", "", "/own/../other/vm-t"] {
            assert_eq!(groups.directory(other), None, "{other}");
        }
    }

    #[test]
    fn a_group_that_ran_out_of_memory_is_told_from_one_that_came_near() {
        assert!(had_no_memory_left("low 0\nhigh 0\nmax 14\noom 1\noom_kill 1\noom_group_kill 0\n"));
        assert!(!had_no_memory_left("low 0\nhigh 0\nmax 14\noom 1\noom_kill 0\noom_group_kill 0\n"));
        assert!(!had_no_memory_left(""));
    }
}
