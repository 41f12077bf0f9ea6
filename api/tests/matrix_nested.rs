//! `vmprobe matrix` over stock kernels, in the emulated machine.

#![allow(clippy::tests_outside_test_module)]

mod common;

use std::fs;
use std::os::unix::fs::PermissionsExt;

use common::debian::Debian;
use common::{assert_code, local_kvm, stdout, vmprobe};

/// vmprobe's own matrix, as far as there is time for it: the rest is for `make matrix`. So is its watchpoint, which in one boot of some
/// counts nothing in the emulated machine (docs/matrix.md).
#[test]
fn a_slice_of_the_self_matrix_passes() {
    let Some(_debian) = Debian::new() else { return };
    let text = fs::read_to_string(concat!(env!("CARGO_MANIFEST_DIR"), "/../matrix/self.toml")).unwrap();
    let (before, watchpoint) = text.split_once("# A watchpoint:").expect("the watchpoint");
    let (_, after) = watchpoint.split_once("[console]").expect("what follows it");
    let place = tempfile::tempdir().expect("a temporary directory");
    let file = place.path().join("self.toml");
    fs::write(&file, format!("{before}[console]{after}")).unwrap();
    let file = file.to_str().expect("a plain name");
    let mut arguments = vec!["matrix", file, "--only", "vcpus=2"];
    arguments.extend(["--only", "kernel=debian:bookworm/cloud"]);
    let kvm = local_kvm();
    if kvm {
        arguments.extend(["--only", "kernel=demo"]);
    }
    let mut output = vmprobe(&arguments).output().expect("vmprobe starts");
    if stdout(&output).contains(": unavailable: ") {
        // On a host that is busy with other things the emulated machine may not come up in time.
        arguments.push("--failed");
        output = vmprobe(&arguments).output().expect("vmprobe starts");
    }
    assert_code(&output, 0);
    // With KASLR and without, with KPTI and without.
    let passed = if kvm { "5 passed, " } else { "4 passed, " };
    assert!(stdout(&output).contains(passed), "{}", stdout(&output));
}

#[test]
fn a_command_runs_on_files_of_the_host_and_its_exit_code_is_part_of_the_result() {
    let Some(debian) = Debian::new() else { return };
    let place = tempfile::tempdir().expect("a temporary directory");
    let path = |name: &str| place.path().join(name);
    fs::create_dir_all(path("files/usr/bin")).unwrap();
    fs::write(path("files/hello"), "from the host").unwrap();
    let tool = path("files/usr/bin/tool");
    fs::write(&tool, "#!/vmprobe/sh\necho \"the tool says $1\"\n").unwrap();
    fs::set_permissions(&tool, fs::Permissions::from_mode(0o755)).unwrap();
    // The command is a script; words of the kernel's command line are its variables. What the ramdisk had below stays.
    let text = format!(
        "[axes]\nkernel = ['{}']\ncmdline = ['want=0', 'want=3', 'want=signal', 'want=reboot']\n\
         [workload]\ninitrd = 'workload'\nfiles = 'files'\ncmdline = 'quiet'\ncommand = '''\n\
         set -e\n\
         tool \"$(cat /hello)\"\n\
         test -f /known.txt\n\
         grep -q '^devtmpfs /dev ' /proc/mounts\n\
         case $want in\n\
         signal) kill -9 $$ ;;\n\
         reboot) reboot -f ;;\n\
         *) echo -n 'no end of line'; exit $want ;;\n\
         esac\n'''\n\
         [console]\nmust = ['^the tool says from the host$']\n\
         [[probes.entry]]\nspec = 'do_sys_openat2'\ncount = {{ min = 3 }}\n",
        debian.kernel
    );
    fs::write(path("m.toml"), text).unwrap();
    let output = vmprobe(&["matrix", "m.toml"]).current_dir(place.path()).output().expect("vmprobe starts");
    assert_code(&output, 1);
    let said = stdout(&output);
    for line in [
        "cmdline=want=3: failed: the command ended with exit code 3",
        "cmdline=want=signal: failed: the command was killed by signal 9",
        "cmdline=want=reboot: failed: the guest ended before the command did",
    ] {
        assert!(said.lines().any(|said| said == line), "{line} in {said}");
    }
    assert!(said.contains("1 passed, 3 failed"), "{said}");
}
