//! The service Guest, for the one machine.

use std::sync::Arc;

use probe_core::paging::Walk;
use probe_core::{Gpa, Gva, VcpuState};
use tonic::{Request, Response, Status};

use super::super::{Responses, status};
use super::{Member, Worker, blocking, in_responses};
use crate::contract::guest_address::Where;
use crate::contract::guest_server::Guest;
use crate::contract::{
    GetRegistersRequest, GetRegistersResponse, GuestAddress, ListSymbolsRequest, ListSymbolsResponse,
    PageTableEntry, ReadMemoryRequest, ReadMemoryResponse, SetRegistersRequest, SetRegistersResponse, Symbol,
    SystemRegisters, TranslateRequest, TranslateResponse, Vcpu, WriteMemoryRequest, WriteMemoryResponse,
};
use crate::exit::Failure;
use crate::symbols;
use crate::vm::{Address, MAX_BYTES};

fn address(address: Option<GuestAddress>) -> Result<Address, Status> {
    match address.and_then(|address| address.r#where) {
        Some(Where::Linear(gva)) => Ok(Address::Linear(Gva(gva))),
        Some(Where::Physical(gpa)) => Ok(Address::Physical(Gpa(gpa))),
        Some(Where::Symbol(text)) => Ok(Address::Symbol(text)),
        None => Err(status::invalid("The request has no address")),
    }
}

/// How many bytes to read or write.
fn length(bytes: u64) -> Result<usize, Status> {
    let bytes = usize::try_from(bytes).ok().filter(|bytes| (1..=MAX_BYTES).contains(bytes));
    bytes.ok_or_else(|| status::invalid(format!("Read or write 1 to {MAX_BYTES} bytes at once")))
}

impl Member {
    fn vcpu(&self, number: u32, state: &VcpuState) -> Vcpu {
        let sys = &state.sys;
        Vcpu {
            number,
            registers: Some(state.regs.into()),
            system: Some(SystemRegisters {
                cr0: sys.cr0,
                cr2: sys.cr2,
                cr3: sys.cr3,
                cr4: sys.cr4,
                efer: sys.efer,
                fs_base: sys.fs_base,
                gs_base: sys.gs_base,
                idt_base: sys.idt_base,
                idt_limit: u32::from(sys.idt_limit),
                cpl: u32::from(sys.cpl),
                long_code: sys.long_code,
            }),
            place: self.vm.guest().spot(Gva(state.regs.rip)).name.unwrap_or_default(),
        }
    }
}

fn translation(linear: Gva, walk: &Walk) -> TranslateResponse {
    let entry = |entry: &probe_core::paging::Entry| PageTableEntry {
        level: u32::from(entry.level),
        physical: entry.gpa.0,
        value: entry.value,
    };
    let found = walk.translation(linear);
    TranslateResponse {
        linear: linear.0,
        physical: found.map(|found| found.gpa.0),
        page_bytes: found.filter(|_| walk.last().is_some()).map_or(0, |found| found.page_size),
        writable: found.is_some_and(|found| found.writable),
        user: found.is_some_and(|found| found.user),
        executable: found.is_some() && walk.is_executable(),
        entries: walk.entries().iter().map(entry).collect(),
    }
}

#[tonic::async_trait]
impl Guest for Arc<Worker> {
    type ListSymbolsStream = Responses<ListSymbolsResponse>;

    async fn list_symbols(
        &self,
        request: Request<ListSymbolsRequest>,
    ) -> Result<Response<Self::ListSymbolsStream>, Status> {
        let ListSymbolsRequest { machine, pattern } = request.into_inner();
        let member = self.get(&machine)?;
        let responses = blocking(move || {
            let pattern = Some(pattern.as_str()).filter(|pattern| !pattern.is_empty());
            let symbols: Vec<Symbol> = symbols::list(member.vm.guest(), pattern)?.collect();
            Ok::<_, Failure>(in_responses(&symbols, |symbols| ListSymbolsResponse { symbols }))
        });
        Ok(Response::new(responses.await?))
    }

    async fn get_registers(
        &self,
        request: Request<GetRegistersRequest>,
    ) -> Result<Response<GetRegistersResponse>, Status> {
        let GetRegistersRequest { machine, vcpu } = request.into_inner();
        let member = self.get(&machine)?;
        let vcpus = blocking(move || {
            let states = member.vm.states(vcpu)?;
            Ok::<_, Status>(states.iter().map(|(number, state)| member.vcpu(*number, state)).collect())
        });
        Ok(Response::new(GetRegistersResponse { vcpus: vcpus.await? }))
    }

    async fn set_registers(
        &self,
        request: Request<SetRegistersRequest>,
    ) -> Result<Response<SetRegistersResponse>, Status> {
        let SetRegistersRequest { machine, vcpu, registers } = request.into_inner();
        let member = self.get(&machine)?;
        let registers = registers.ok_or_else(|| status::invalid("The request has no registers"))?;
        let set = blocking(move || {
            let state = member.vm.set_registers(vcpu, registers.into())?;
            Ok::<_, Status>(member.vcpu(vcpu, &state))
        });
        Ok(Response::new(SetRegistersResponse { vcpu: Some(set.await?) }))
    }

    async fn translate(
        &self,
        request: Request<TranslateRequest>,
    ) -> Result<Response<TranslateResponse>, Status> {
        let TranslateRequest { machine, address: at, vcpu } = request.into_inner();
        let (member, at) = (self.get(&machine)?, address(at)?);
        let (linear, walk) = blocking(move || member.vm.walk(vcpu, &at)).await?;
        Ok(Response::new(translation(linear, &walk)))
    }

    async fn read_memory(
        &self,
        request: Request<ReadMemoryRequest>,
    ) -> Result<Response<ReadMemoryResponse>, Status> {
        let ReadMemoryRequest { machine, address: at, vcpu, length: bytes } = request.into_inner();
        let (member, at, bytes) = (self.get(&machine)?, address(at)?, length(bytes)?);
        let data = blocking(move || member.vm.read(vcpu, &at, bytes)).await?;
        Ok(Response::new(ReadMemoryResponse { data }))
    }

    async fn write_memory(
        &self,
        request: Request<WriteMemoryRequest>,
    ) -> Result<Response<WriteMemoryResponse>, Status> {
        let WriteMemoryRequest { machine, address: at, vcpu, data } = request.into_inner();
        let (member, at) = (self.get(&machine)?, address(at)?);
        length(data.len() as u64)?;
        blocking(move || member.vm.write(vcpu, &at, &data)).await?;
        Ok(Response::new(WriteMemoryResponse {}))
    }
}
