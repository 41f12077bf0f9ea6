//! Machines, one after the other, until the campaign is done.

use std::collections::BTreeSet;
use std::io;
use std::sync::{Arc, Mutex, mpsc};
use std::thread;
use std::time::Duration;

use probe_core::{Gpa, PAGE_SIZE, VcpuState};
use vmm::boot::{Kernel, Protocol};
use vmm::{CreateError, Host, HostError, Machine, MachineConfig, RunEnd, RunError};

use crate::campaign::Campaign;
use crate::driver::{Driver, Shared, lock};
use crate::guest::Guest;
use crate::layout::{CODE_PAGES, KERNEL_CODE, MEMORY, USER_CODE};
use crate::outcome::End;

/// How long a run may take before it counts as hung.
const PATIENCE: Duration = Duration::from_secs(3);

/// Why a campaign could not be carried through.
#[derive(Debug, thiserror::Error)]
pub enum CampaignError {
    /// A stub cannot be assembled.
    #[error("The guest's code cannot be assembled; this is a bug, please report it")]
    Assemble(#[from] iced_x86::IcedError),
    /// No KVM.
    #[error(transparent)]
    Host(#[from] HostError),
    /// No machine.
    #[error("No machine could be made")]
    Create(#[from] CreateError),
    /// The host failed.
    #[error("The machine could not run")]
    Run(#[from] RunError),
    /// The guest does not come up.
    #[error("The guest ended before its first case: {0:?}; try --accel nested")]
    Boot(RunEnd),
}

/// Runs a campaign to its end on this host's /dev/kvm.
///
/// # Errors
/// [`CampaignError`] when the host cannot run it. Differences are in the campaign.
pub fn run(campaign: Campaign) -> Result<Campaign, CampaignError> {
    let shared: Shared = Arc::new(Mutex::new(campaign));
    let guest = Guest::new()?;
    while !lock(&shared).is_done() {
        let before = lock(&shared).runs;
        let (end, state) = one_machine(&shared, &guest)?;
        let mut campaign = lock(&shared);
        if campaign.runs == before {
            return Err(CampaignError::Boot(end));
        }
        match end {
            RunEnd::Finished { .. } => {}
            RunEnd::Halted => campaign.died(End::Halted, state),
            RunEnd::Stopped => campaign.died(End::Hung, None),
            RunEnd::Failed { reason, .. } => campaign.died(End::Died(reason), None),
            // Where the CPU stood is not part of it: a displaced instruction stands elsewhere.
            RunEnd::TripleFault { .. } => campaign.died(End::Died("triple fault".to_owned()), None),
            RunEnd::Reset | RunEnd::PowerOff => {
                campaign.died(End::Died("reset or power-off".to_owned()), None)
            }
        }
    }
    let mut campaign = lock(&shared);
    Ok(std::mem::replace(&mut campaign, Campaign::new(crate::campaign::Request::nothing())))
}

fn one_machine(shared: &Shared, guest: &Guest) -> Result<(RunEnd, Option<VcpuState>), CampaignError> {
    let code = [KERNEL_CODE, USER_CODE];
    let watched = code.iter().flat_map(|start| (0..CODE_PAGES).map(|page| start.offset(page * PAGE_SIZE)));
    let machine = Machine::new(MachineConfig {
        host: &Host::open()?,
        memory_bytes: MEMORY,
        vcpus: 1,
        kernel: Kernel {
            entry: Gpa(guest.stubs.reset),
            segments: guest.segments(),
            protocol: Protocol::BareMetal,
        },
        watched_pages: watched.collect::<BTreeSet<Gpa>>(),
        serial: Box::new(io::sink()),
        disks: Vec::new(),
        vsock: None,
        networks: Vec::new(),
    })?;
    let stop = machine.stop_handle();
    let driver = Driver::new(Arc::clone(shared), guest.clone());
    let (ended, is_over) = mpsc::channel::<()>();
    thread::scope(|scope| {
        scope.spawn(move || {
            let mut runs = 0;
            while is_over.recv_timeout(PATIENCE) == Err(mpsc::RecvTimeoutError::Timeout) {
                let now = lock(shared).runs;
                if now == runs {
                    stop.stop();
                }
                runs = now;
            }
        });
        let report = machine.run(vec![Box::new(driver)]);
        drop(ended);
        let report = report?;
        Ok((report.end, report.vcpus.first().map(|vcpu| vcpu.state)))
    })
}
