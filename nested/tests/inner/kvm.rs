//! A guest of a few instructions that shows that debug events reach KVM's user as on hardware: the corrections made to
//! QEMU's emulated AMD-V.

use std::io::Write;

use kvm_bindings::{
    KVM_GUESTDBG_ENABLE, KVM_GUESTDBG_USE_HW_BP, KVM_GUESTDBG_USE_SW_BP, KVM_MAX_CPUID_ENTRIES,
    kvm_guest_debug, kvm_userspace_memory_region,
};
use kvm_ioctls::{Kvm, VcpuExit, VcpuFd};
use rustix::mm::{MapFlags, ProtFlags};
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryMmap};

/// Where the guest's code is, guest-physical and linear. A process of the machine's own kernel may map the same address: it
/// has CAP_SYS_RAWIO and so is not held to vm.mmap_min_addr.
const CODE: u64 = 0x8000;
const RAM: usize = 0x1_0000;

/// Real mode, CS base 0: with another base QEMU compares breakpoints with the offset instead of the linear address.
const PROGRAM: [u8; 14] = [
    0x90, // 0: nop
    0xcc, // 1: int3
    0x90, // 2: nop
    0x90, // 3: nop, the hardware breakpoint
    0xcd, 0x03, // 4: int 3, two bytes long: a software interrupt
    0xf4, // 6: hlt
    0xf4, // 7: hlt, the handler of vector 3
    0xf4, 0xf4, //
    0x0f, 0x01, 0xd1, // 10: xsetbv
    0xf4, // 13: hlt
];
/// Offset of the xsetbv.
const XSETBV: u64 = 10;
const HANDLER: u16 = 0x8007;

/// What [`report`] writes where everything is right.
pub const ANSWER: &str = "\
/dev/kvm is there
int3: vector 3 at 0x8001
DR0: vector 1 at 0x8003, DR6.B0 1
int n: not intercepted, handler at 0x8007
the host's own code at the breakpoint's address ran
xsetbv: the guest has 0x3, the host has 0x7
";

/// CR4.OSXSAVE: XSETBV is enabled (Intel SDM volume 3A, 2.5).
const CR4_OSXSAVE: u64 = 1 << 18;

type Error = Box<dyn std::error::Error>;

/// Runs the guest and says what happened.
pub fn report(out: &mut impl Write) -> Result<(), Error> {
    let kvm = Kvm::new()?;
    writeln!(out, "/dev/kvm is there")?;
    let vm = kvm.create_vm()?;
    let ram = GuestMemoryMmap::<()>::from_ranges(&[(GuestAddress(0), RAM)])?;
    ram.write_slice(&PROGRAM, GuestAddress(CODE))?;
    // Vector 3 of the real-mode interrupt table: offset, segment.
    ram.write_obj(HANDLER, GuestAddress(3 * 4))?;
    ram.write_obj(0u16, GuestAddress(3 * 4 + 2))?;
    let region = kvm_userspace_memory_region {
        slot: 0,
        flags: 0,
        guest_phys_addr: 0,
        memory_size: RAM as u64,
        userspace_addr: ram.get_host_address(GuestAddress(0))? as u64,
    };
    // SAFETY: the region is the whole of `ram`'s mapping, which outlives the VM: both end with this function, the VM first.
    unsafe { vm.set_user_memory_region(region)? };
    let mut vcpu = vm.create_vcpu(0)?;
    // KVM takes no other CPUID once the vCPU has run.
    vcpu.set_cpuid2(&kvm.get_supported_cpuid(KVM_MAX_CPUID_ENTRIES)?)?;
    let mut sregs = vcpu.get_sregs()?;
    sregs.cs.base = 0;
    sregs.cs.selector = 0;
    vcpu.set_sregs(&sregs)?;
    let mut regs = vcpu.get_regs()?;
    regs.rip = CODE;
    regs.rsp = 0x1000;
    vcpu.set_regs(&regs)?;

    debug(&vcpu, KVM_GUESTDBG_USE_SW_BP, 0, 0)?;
    let (vector, pc, _) = run_to_debug(&mut vcpu)?;
    writeln!(out, "int3: vector {vector} at {pc:#x}")?;

    let mut regs = vcpu.get_regs()?;
    regs.rip = CODE + 2;
    vcpu.set_regs(&regs)?;
    // L0, with the bit that is always set (AMD APM volume 2, 13.1.1.4).
    debug(&vcpu, KVM_GUESTDBG_USE_HW_BP, CODE + 3, 0x401)?;
    let (vector, pc, dr6) = run_to_debug(&mut vcpu)?;
    writeln!(out, "DR0: vector {vector} at {pc:#x}, DR6.B0 {}", dr6 & 1)?;

    debug(&vcpu, KVM_GUESTDBG_USE_SW_BP, 0, 0)?;
    match vcpu.run()? {
        // RIP is behind the handler's hlt.
        VcpuExit::Hlt => {}
        other => return Err(format!("int n: {other:?}").into()),
    }
    let handler = vcpu.get_regs()?.rip - 1;
    writeln!(out, "int n: not intercepted, handler at {handler:#x}")?;

    debug(&vcpu, KVM_GUESTDBG_USE_HW_BP, CODE, 0x401)?;
    let mut regs = vcpu.get_regs()?;
    regs.rip = CODE;
    vcpu.set_regs(&regs)?;
    run_to_debug(&mut vcpu)?;
    return_from(CODE)?;
    writeln!(out, "the host's own code at the breakpoint's address ran")?;

    debug(&vcpu, 0, 0, 0)?;
    let mut sregs = vcpu.get_sregs()?;
    sregs.cr4 |= CR4_OSXSAVE;
    vcpu.set_sregs(&sregs)?;
    let mut regs = vcpu.get_regs()?;
    // x87 and SSE, and not AVX.
    (regs.rcx, regs.rdx, regs.rax, regs.rip) = (0, 0, 3, CODE + XSETBV);
    vcpu.set_regs(&regs)?;
    match vcpu.run()? {
        VcpuExit::Hlt => {}
        other => return Err(format!("xsetbv: {other:?}").into()),
    }
    let guest = vcpu.get_xcrs()?.xcrs[0].value;
    writeln!(out, "xsetbv: the guest has {guest:#x}, the host has {:#x}", host_xcr0())?;
    Ok(())
}

/// XCR0 of this process's CPU.
fn host_xcr0() -> u64 {
    let (low, high): (u32, u32);
    // SAFETY: XGETBV reads a register; the machine's kernel has XSAVE enabled, or KVM would not have given it to the guest.
    unsafe {
        std::arch::asm!("xgetbv", in("ecx") 0, out("eax") low, out("edx") high, options(nomem, nostack))
    };
    u64::from(high) << 32 | u64::from(low)
}

fn debug(vcpu: &VcpuFd, kind: u32, dr0: u64, dr7: u64) -> Result<(), Error> {
    let mut debug = kvm_guest_debug { control: KVM_GUESTDBG_ENABLE | kind, ..Default::default() };
    debug.arch.debugreg[0] = dr0;
    debug.arch.debugreg[7] = dr7;
    Ok(vcpu.set_guest_debug(&debug)?)
}

fn run_to_debug(vcpu: &mut VcpuFd) -> Result<(u32, u64, u64), Error> {
    match vcpu.run()? {
        VcpuExit::Debug(debug) => Ok((debug.exception, debug.pc, debug.dr6)),
        other => Err(format!("no debug exit: {other:?}").into()),
    }
}

/// Calls a function of one instruction at `address`, where a breakpoint of the guest is: #VMEXIT must have disarmed it.
fn return_from(address: u64) -> Result<(), Error> {
    const PAGE: usize = 4096;
    // SAFETY: nothing is mapped there: MAP_FIXED_NOREPLACE makes sure. The mapping is never removed.
    let page = unsafe {
        rustix::mm::mmap_anonymous(
            address as *mut _,
            PAGE,
            ProtFlags::READ | ProtFlags::WRITE,
            MapFlags::PRIVATE | MapFlags::FIXED_NOREPLACE,
        )?
    };
    // SAFETY: the page is ours alone, writable, and a byte has no alignment.
    unsafe { page.cast::<u8>().write_volatile(0xc3) };
    // SAFETY: it is our own mapping, and nothing else refers to it.
    unsafe {
        rustix::mm::mprotect(page, PAGE, rustix::mm::MprotectFlags::READ | rustix::mm::MprotectFlags::EXEC)?
    };
    // SAFETY: the page is executable and holds a near return, a whole function that keeps every rule of the C calling
    // convention.
    let function: extern "C" fn() = unsafe { std::mem::transmute(page) };
    function();
    Ok(())
}
