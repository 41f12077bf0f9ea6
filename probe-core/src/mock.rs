//! In-memory guest RAM and vCPU state for tests: pages in a map, an ordered log, and faults on request.

use std::collections::BTreeMap;
use std::sync::{Mutex, MutexGuard, PoisonError};

use crate::paging::entry;
use crate::{
    Gpa, Gva, InterruptShadow, MemoryError, PAGE_SIZE, PhysicalMemory, Registers, SystemRegisters, VcpuState,
    control, rflags,
};

/// One operation that reached the memory, in the order in which it came.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Operation {
    /// [`PhysicalMemory::read`].
    Read {
        /// First byte.
        gpa: Gpa,
        /// Number of bytes.
        len: usize,
    },
    /// [`PhysicalMemory::write`].
    Write {
        /// First byte.
        gpa: Gpa,
        /// The bytes.
        data: Vec<u8>,
    },
    /// [`PhysicalMemory::compare_exchange`].
    CompareExchange {
        /// First byte.
        gpa: Gpa,
        /// Number of bytes.
        width: usize,
        /// The value expected.
        current: u64,
        /// The value to store.
        new: u64,
    },
}

/// A kind of operation, to be counted and made to fail.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum OperationKind {
    /// [`PhysicalMemory::read`].
    Read,
    /// [`PhysicalMemory::write`].
    Write,
    /// [`PhysicalMemory::compare_exchange`].
    CompareExchange,
}

#[derive(Debug, Default)]
struct Inner {
    pages: BTreeMap<u64, Box<[u8]>>,
    log: Vec<Operation>,
    calls: BTreeMap<OperationKind, usize>,
    failures: Vec<(OperationKind, usize)>,
}

impl Inner {
    /// Counts a call and tells whether it has been asked to fail.
    fn begin(&mut self, kind: OperationKind, operation: Operation) -> bool {
        self.log.push(operation);
        let calls = self.calls.entry(kind).or_default();
        *calls += 1;
        let this = (kind, *calls);
        let before = self.failures.len();
        self.failures.retain(|failure| *failure != this);
        self.failures.len() != before
    }

    fn check(&self, gpa: Gpa, len: usize) -> Result<(), MemoryError> {
        for at in 0..len as u64 {
            if !self.pages.contains_key(&gpa.offset(at).page().0) {
                return Err(MemoryError::NotRam(gpa));
            }
        }
        Ok(())
    }

    fn load(&self, gpa: Gpa, buf: &mut [u8]) -> Result<(), MemoryError> {
        self.check(gpa, buf.len())?;
        for (at, byte) in (0..).zip(buf) {
            let gpa = gpa.offset(at);
            let page = self.pages.get(&gpa.page().0).ok_or(MemoryError::NotRam(gpa))?;
            *byte = page[index(gpa)];
        }
        Ok(())
    }

    fn store(&mut self, gpa: Gpa, data: &[u8]) -> Result<(), MemoryError> {
        self.check(gpa, data.len())?;
        for (at, byte) in (0..).zip(data) {
            let gpa = gpa.offset(at);
            let page = self.pages.get_mut(&gpa.page().0).ok_or(MemoryError::NotRam(gpa))?;
            page[index(gpa)] = *byte;
        }
        Ok(())
    }
}

fn index(gpa: Gpa) -> usize {
    // Less than 4096.
    #[allow(clippy::cast_possible_truncation)]
    let index = gpa.page_offset() as usize;
    index
}

/// Guest RAM in a map of pages. What has not been added is not RAM.
#[derive(Debug, Default)]
pub struct MockMemory {
    inner: Mutex<Inner>,
}

impl MockMemory {
    /// Memory with no RAM at all.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Memory with `bytes` of zeroed RAM from address 0 on.
    #[must_use]
    pub fn with_ram(bytes: u64) -> Self {
        let memory = Self::new();
        memory.add_ram(Gpa(0), bytes);
        memory
    }

    /// Adds zeroed RAM that covers `bytes` from `start` on; pages already there keep their content.
    pub fn add_ram(&self, start: Gpa, bytes: u64) {
        let mut inner = self.lock();
        let mut page = start.page();
        while page.0 < start.0 + bytes {
            inner.pages.entry(page.0).or_insert_with(|| vec![0; 4096].into_boxed_slice());
            page = page.offset(PAGE_SIZE);
        }
    }

    /// Stores bytes without logging, adding RAM where there is none.
    pub fn load(&self, gpa: Gpa, bytes: &[u8]) {
        self.add_ram(gpa, bytes.len() as u64);
        let stored = self.lock().store(gpa, bytes);
        debug_assert!(stored.is_ok());
    }

    /// Reads bytes without logging; bytes that are not RAM read as 0xff, as an empty bus does.
    #[must_use]
    pub fn bytes(&self, gpa: Gpa, len: usize) -> Vec<u8> {
        let inner = self.lock();
        let mut bytes = vec![0xff; len];
        for (at, byte) in (0..).zip(&mut bytes) {
            let gpa = gpa.offset(at);
            if let Some(page) = inner.pages.get(&gpa.page().0) {
                *byte = page[index(gpa)];
            }
        }
        bytes
    }

    /// Reads a 64-bit word without logging.
    #[must_use]
    pub fn word(&self, gpa: Gpa) -> u64 {
        self.bytes(gpa, 8).iter().rev().fold(0, |word, byte| word << 8 | u64::from(*byte))
    }

    /// Makes the `nth` call of this kind from the beginning (1 is the first) fail with [`MemoryError::NotRam`], once.
    pub fn fail(&self, kind: OperationKind, nth: usize) {
        self.lock().failures.push((kind, nth));
    }

    /// The failures asked for that have not happened yet.
    #[must_use]
    pub fn pending_failures(&self) -> usize {
        self.lock().failures.len()
    }

    /// The operations so far, oldest first.
    #[must_use]
    pub fn log(&self) -> Vec<Operation> {
        self.lock().log.clone()
    }

    /// The operations so far that could change memory, oldest first.
    #[must_use]
    pub fn writes(&self) -> Vec<Operation> {
        let mut log = self.log();
        log.retain(|operation| !matches!(operation, Operation::Read { .. }));
        log
    }

    /// Forgets the log and the call counts.
    pub fn clear_log(&self) {
        let mut inner = self.lock();
        inner.log.clear();
        inner.calls.clear();
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        // A test that panicked while it held the lock has failed already.
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl PhysicalMemory for MockMemory {
    fn read(&self, gpa: Gpa, buf: &mut [u8]) -> Result<(), MemoryError> {
        let mut inner = self.lock();
        if inner.begin(OperationKind::Read, Operation::Read { gpa, len: buf.len() }) {
            return Err(MemoryError::NotRam(gpa));
        }
        inner.load(gpa, buf)
    }

    fn write(&self, gpa: Gpa, data: &[u8]) -> Result<(), MemoryError> {
        let mut inner = self.lock();
        if inner.begin(OperationKind::Write, Operation::Write { gpa, data: data.to_vec() }) {
            return Err(MemoryError::NotRam(gpa));
        }
        inner.store(gpa, data)
    }

    fn compare_exchange(&self, gpa: Gpa, width: usize, current: u64, new: u64) -> Result<u64, MemoryError> {
        let mut inner = self.lock();
        let operation = Operation::CompareExchange { gpa, width, current, new };
        if inner.begin(OperationKind::CompareExchange, operation) {
            return Err(MemoryError::NotRam(gpa));
        }
        let aligned = matches!(width, 1 | 2 | 4 | 8) && gpa.0.is_multiple_of(width as u64);
        if !aligned {
            return Err(MemoryError::NotRam(gpa));
        }
        let mut word = [0; 8];
        inner.load(gpa, &mut word[..width])?;
        let found = u64::from_le_bytes(word);
        if found == current {
            inner.store(gpa, &new.to_le_bytes()[..width])?;
        }
        Ok(found)
    }
}

/// Page tables built in a [`MockMemory`].
#[derive(Debug)]
pub struct MockPageTables<'m> {
    memory: &'m MockMemory,
    root: Gpa,
    levels: u8,
    next: Gpa,
}

impl<'m> MockPageTables<'m> {
    /// Tables of 4 or 5 levels with the root at `root`; further tables follow it page by page.
    #[must_use]
    pub fn new(memory: &'m MockMemory, root: Gpa, levels: u8) -> Self {
        memory.add_ram(root, PAGE_SIZE);
        Self { memory, root, levels, next: root.offset(PAGE_SIZE) }
    }

    /// The value for CR3.
    #[must_use]
    pub fn root(&self) -> Gpa {
        self.root
    }

    /// Maps one page of `size` bytes (4 KiB, 2 MiB or 1 GiB) with the leaf bits `flags`; the tables above it allow
    /// everything. Returns where the leaf entry lies.
    pub fn map(&mut self, gva: Gva, gpa: Gpa, size: u64, flags: u64) -> Gpa {
        let leaf_level = match size {
            0x4000_0000 => 3,
            0x20_0000 => 2,
            _ => 1,
        };
        let mut table = self.root;
        for level in (leaf_level + 1..=self.levels).rev() {
            let at = entry_address(table, gva, level);
            let mut value = self.memory.word(at);
            if value & entry::PRESENT == 0 {
                self.memory.add_ram(self.next, PAGE_SIZE);
                value = self.next.0 | entry::PRESENT | entry::WRITABLE | entry::USER;
                self.memory.load(at, &value.to_le_bytes());
                self.next = self.next.offset(PAGE_SIZE);
            }
            table = Gpa(value & entry::ADDRESS);
        }
        let at = entry_address(table, gva, leaf_level);
        let large = if leaf_level > 1 { entry::LARGE } else { 0 };
        self.memory.load(at, &(gpa.0 | flags | large).to_le_bytes());
        at
    }

    /// Maps `bytes` from address 0 on to themselves in 4 KiB pages.
    pub fn map_identity(&mut self, bytes: u64, flags: u64) {
        for page in (0..bytes).step_by(4096) {
            self.map(Gva(page), Gpa(page), PAGE_SIZE, flags);
        }
    }
}

fn entry_address(table: Gpa, gva: Gva, level: u8) -> Gpa {
    table.offset((gva.0 >> (12 + 9 * u32::from(level - 1)) & 511) * 8)
}

/// Builds the [`VcpuState`] of a vCPU in 64-bit mode at CPL 0, interrupts off.
#[derive(Clone, Copy, Debug)]
pub struct MockVcpu {
    state: VcpuState,
}

impl MockVcpu {
    /// A vCPU whose page tables have 4 levels and start at `root`.
    #[must_use]
    pub fn new(root: Gpa) -> Self {
        let sys = SystemRegisters {
            cr0: control::CR0_PE | control::CR0_WP | control::CR0_PG,
            cr3: root.0,
            cr4: control::CR4_PAE,
            efer: control::EFER_LMA | control::EFER_NXE,
            long_code: true,
            ..SystemRegisters::default()
        };
        let regs = Registers { rflags: rflags::FIXED, ..Registers::default() };
        Self { state: VcpuState { regs, sys, shadow: InterruptShadow::default() } }
    }

    /// Sets RIP.
    #[must_use]
    pub fn rip(mut self, rip: Gva) -> Self {
        self.state.regs.rip = rip.0;
        self
    }

    /// Sets RSP.
    #[must_use]
    pub fn rsp(mut self, rsp: Gva) -> Self {
        self.state.regs.rsp = rsp.0;
        self
    }

    /// Sets the current privilege level.
    #[must_use]
    pub fn cpl(mut self, cpl: u8) -> Self {
        self.state.sys.cpl = cpl;
        self
    }

    /// Sets further bits of CR4.
    #[must_use]
    pub fn cr4(mut self, bits: u64) -> Self {
        self.state.sys.cr4 |= bits;
        self
    }

    /// Sets further bits of RFLAGS.
    #[must_use]
    pub fn flags(mut self, bits: u64) -> Self {
        self.state.regs.rflags |= bits;
        self
    }

    /// Sets the general-purpose registers that `set` changes.
    #[must_use]
    pub fn regs(mut self, set: impl FnOnce(&mut Registers)) -> Self {
        set(&mut self.state.regs);
        self
    }

    /// The state.
    #[must_use]
    pub fn build(self) -> VcpuState {
        self.state
    }
}
