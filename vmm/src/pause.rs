//! Pausing the vCPUs of a running machine, so that memory slots can be changed and memory read at rest.
//!
//! A vCPU thread looks at one flag before each KVM_RUN. When it is set, the thread completes the port or MMIO access of its
//! last exit and parks until nobody wants the pause any more. Two kinds of threads ask:
//!
//! ```text
//! a thread that runs no vCPU   holds the pause together with others of its kind; has it when every vCPU is parked
//! a vCPU in the middle of a stop   has it alone among its kind, when every other vCPU is parked or waits for its own turn
//! ```
//!
//! A vCPU may keep its pause when the stop is over, and run on as the only one: it does not park meanwhile. The first kind waits for
//! that too, and kicks it; its handler gives the pause up when it is settled.
//!
//! A vCPU that asks never waits for the first kind: it finishes its stop and parks afterwards. So a pause cannot lock up as
//! long as nobody asks for one while holding a lock that a stop handler takes.

use std::collections::VecDeque;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::{self, ThreadId};
use std::time::{Duration, Instant};

use probe_core::machine::Alone;
use probe_core::{VcpuId, VcpuState};

use crate::kick::{self, KICK_REPEAT};
use crate::snapshot::SavedVcpu;
use crate::vcpu::VcpuError;

/// How long vCPUs run at least between two pauses of threads that run none: who asks again and again does not stop the guest for good.
/// Short against what a pause itself takes.
const MIN_RUN: Duration = Duration::from_micros(100);

/// What a vCPU thread does, as a pause sees it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Place {
    /// In its run loop, perhaps in the guest.
    Running,
    /// In a stop handler that waits for a pause, or with a pause, in a stop handler or in the guest.
    Asking,
    /// Out of the guest, at rest.
    Parked,
}

/// A vCPU at rest.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Rest {
    /// As its guest takes it to be.
    pub state: VcpuState,
    /// Breakpoints that its guest has enabled.
    pub guest_breakpoints: usize,
}

/// What a vCPU that is to be saved has become.
pub(crate) type SaveResult = Result<SavedVcpu, VcpuError>;

/// Whether a parked vCPU is asked for everything that KVM holds of it: only its own thread can get that.
#[derive(Debug, Default)]
enum Saving {
    #[default]
    NotAsked,
    Asked,
    Done(Box<SaveResult>),
}

#[derive(Debug)]
struct VcpuThread {
    id: ThreadId,
    vcpu: VcpuId,
    kick: kick::Target,
    place: Place,
    /// As it was when it last parked.
    rest: Rest,
    /// Its state has been changed since.
    changed: bool,
    saving: Saving,
}

impl VcpuThread {
    /// The state to run on from, if it has been changed.
    fn take_change(&mut self) -> Option<VcpuState> {
        std::mem::take(&mut self.changed).then_some(self.rest.state)
    }
}

#[derive(Debug, Default)]
struct State {
    /// Threads that will run a vCPU, and are not known yet.
    expected: usize,
    threads: Vec<VcpuThread>,
    /// Pauses wanted by threads that run no vCPU.
    holds: usize,
    /// Pauses among those that a vCPU's handler asked for, and that nobody has taken yet.
    requested: VecDeque<VcpuId>,
    /// The vCPU thread that has the pause, and how often it asked for it.
    owner: Option<(ThreadId, usize)>,
    /// When the last pause ended, and its vCPUs went.
    released: Option<Instant>,
}

impl State {
    fn thread(&mut self, id: ThreadId) -> Option<&mut VcpuThread> {
        self.threads.iter_mut().find(|thread| thread.id == id)
    }

    fn set(&mut self, id: ThreadId, place: Place) {
        if let Some(thread) = self.thread(id) {
            thread.place = place;
        }
    }

    fn wanted(&self) -> bool {
        self.holds > 0 || self.threads.iter().any(|thread| thread.place == Place::Asking)
    }

    /// Every vCPU but `me` is out of the guest and stays out of it; a thread that runs no vCPU also waits for stops to end.
    fn at_rest(&self, me: ThreadId, on_vcpu: bool) -> bool {
        self.expected == 0
            && self.threads.iter().all(|thread| {
                thread.id == me || thread.place == Place::Parked || on_vcpu && thread.place == Place::Asking
            })
    }

    /// A vCPU that is at rest.
    fn parked(&mut self, vcpu: VcpuId) -> Option<&mut VcpuThread> {
        self.threads.iter_mut().find(|thread| thread.vcpu == vcpu && thread.place == Place::Parked)
    }
}

/// The pause of one machine.
#[derive(Debug, Default)]
pub(crate) struct Pause {
    wanted: AtomicBool,
    state: Mutex<State>,
    changed: Condvar,
    /// Of who saves vCPUs: an answer is taken by who asked.
    saving: Mutex<()>,
}

impl Pause {
    /// Whether vCPUs are to park.
    pub fn wanted(&self) -> bool {
        self.wanted.load(Ordering::Acquire)
    }

    /// Whether the calling vCPU thread has the pause.
    pub fn is_mine(&self) -> bool {
        let me = thread::current().id();
        self.lock().owner.is_some_and(|(owner, _)| owner == me)
    }

    /// Has pauses wait for a thread that is about to run a vCPU.
    pub fn expect(self: &Arc<Self>, vcpu: VcpuId) -> Expected {
        self.lock().expected += 1;
        Expected { pause: Arc::clone(self), vcpu }
    }

    /// Parks the calling vCPU thread while a pause is wanted, or until `stop` is set and [`Pause::wake`] called. Returns the state to
    /// run on from, if it has been changed meanwhile. `save` saves the vCPU, after it has taken such a state over.
    pub fn park(
        &self,
        stop: &AtomicBool,
        rest: Rest,
        mut save: impl FnMut(Option<VcpuState>) -> SaveResult,
    ) -> Option<VcpuState> {
        let me = thread::current().id();
        let mut state = self.lock();
        if state.owner.is_some_and(|(owner, _)| owner == me) {
            return None;
        }
        if let Some(thread) = state.thread(me) {
            thread.place = Place::Parked;
            thread.rest = rest;
        }
        self.changed.notify_all();
        while state.wanted() && !stop.load(Ordering::Acquire) {
            if let Some(thread) = state.thread(me).filter(|thread| matches!(thread.saving, Saving::Asked)) {
                let change = thread.take_change();
                drop(state);
                let saved = save(change);
                state = self.lock();
                state.thread(me)?.saving = Saving::Done(Box::new(saved));
                self.changed.notify_all();
                continue;
            }
            state = self.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
        let thread = state.thread(me)?;
        thread.place = Place::Running;
        let changed = thread.take_change();
        // Its time begins now, however long it took to wake.
        state.released = Some(Instant::now());
        drop(state);
        self.changed.notify_all();
        changed
    }

    /// Pauses the machine; returns when that has come about. May be called again by who has it already.
    pub fn pause(self: &Arc<Self>) -> Paused {
        let me = thread::current().id();
        let mut state = self.lock();
        let on_vcpu = state.thread(me).is_some();
        let paused = Paused { pause: Arc::clone(self), owner: on_vcpu.then_some(me) };
        if let Some((owner, depth)) = &mut state.owner
            && *owner == me
        {
            *depth += 1;
            return paused;
        }
        if on_vcpu {
            state.set(me, Place::Asking);
        } else {
            state = self.let_run(state);
            state.holds += 1;
        }
        self.wanted.store(true, Ordering::Release);
        self.changed.notify_all();
        if on_vcpu {
            while state.owner.is_some() {
                state = self.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
            }
            state.owner = Some((me, 1));
        }
        self.wait_for_rest(state, me, on_vcpu);
        paused
    }

    /// Waits until vCPUs have had their time since the last pause, unless there is a pause already.
    fn let_run<'a>(&'a self, mut state: MutexGuard<'a, State>) -> MutexGuard<'a, State> {
        loop {
            let parked = state.threads.iter().any(|thread| thread.place == Place::Parked);
            let ran = state.released.map_or(MIN_RUN, |released| released.elapsed());
            if state.wanted() || !parked && ran >= MIN_RUN {
                return state;
            }
            // One that is parked says when it goes.
            let left = if parked { KICK_REPEAT } else { MIN_RUN - ran };
            state = self.changed.wait_timeout(state, left).unwrap_or_else(PoisonError::into_inner).0;
        }
    }

    /// Pauses the machine for whoever takes the pause. The calling vCPU thread has to park next.
    pub fn request(&self, vcpu: VcpuId) {
        let mut state = self.lock();
        state.holds += 1;
        state.requested.push_back(vcpu);
        self.wanted.store(true, Ordering::Release);
        self.changed.notify_all();
    }

    /// Takes the oldest pause that was requested, waiting for one as long as `timeout`.
    pub fn take_requested(self: &Arc<Self>, timeout: Duration) -> Option<(VcpuId, Paused)> {
        let deadline = Instant::now() + timeout;
        let mut state = self.lock();
        let vcpu = loop {
            if let Some(vcpu) = state.requested.pop_front() {
                break vcpu;
            }
            let left = deadline.checked_duration_since(Instant::now())?;
            state = self.changed.wait_timeout(state, left).unwrap_or_else(PoisonError::into_inner).0;
        };
        self.wait_for_rest(state, thread::current().id(), false);
        Some((vcpu, Paused { pause: Arc::clone(self), owner: None }))
    }

    /// Kicks threads until every vCPU but `me` is at rest.
    fn wait_for_rest(&self, mut state: MutexGuard<'_, State>, me: ThreadId, on_vcpu: bool) {
        while !state.at_rest(me, on_vcpu) {
            // One that has the pause may be in the guest with it.
            let owner = state.owner.map(|(owner, _)| owner).filter(|owner| *owner != me);
            for thread in &state.threads {
                if thread.id != me && thread.place == Place::Running || owner == Some(thread.id) {
                    thread.kick.send();
                }
            }
            let waited = self.changed.wait_timeout(state, KICK_REPEAT);
            state = waited.unwrap_or_else(PoisonError::into_inner).0;
        }
    }

    /// Makes parked threads look at their stop flag.
    pub fn wake(&self) {
        // With the lock taken, no thread is between its look at the flag and its wait.
        let _state = self.lock();
        self.changed.notify_all();
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// To be called after each change that may end a pause.
    fn update(&self, state: &mut State) {
        let wanted = state.wanted();
        if !wanted {
            state.released = Some(Instant::now());
        }
        self.wanted.store(wanted, Ordering::Release);
        self.changed.notify_all();
    }
}

/// A thread that is about to run a vCPU. Pauses wait until it has registered, or this is dropped.
#[derive(Debug)]
pub(crate) struct Expected {
    pause: Arc<Pause>,
    vcpu: VcpuId,
}

impl Expected {
    /// Makes the calling thread known as the one that runs the vCPU, until the result is dropped.
    pub fn register(self) -> Registration {
        let id = thread::current().id();
        let thread = VcpuThread {
            id,
            vcpu: self.vcpu,
            kick: kick::Target::this_thread(),
            place: Place::Running,
            rest: Rest::default(),
            changed: false,
            saving: Saving::NotAsked,
        };
        self.pause.lock().threads.push(thread);
        Registration { pause: Arc::clone(&self.pause), id }
    }
}

impl Drop for Expected {
    fn drop(&mut self) {
        self.pause.lock().expected -= 1;
        self.pause.changed.notify_all();
    }
}

/// A vCPU thread that takes part in pauses.
#[derive(Debug)]
pub(crate) struct Registration {
    pause: Arc<Pause>,
    id: ThreadId,
}

impl Drop for Registration {
    fn drop(&mut self) {
        let mut state = self.pause.lock();
        state.threads.retain(|thread| thread.id != self.id);
        if state.owner.is_some_and(|(owner, _)| owner == self.id) {
            state.owner = None;
        }
        self.pause.update(&mut state);
    }
}

/// A paused machine: no vCPU runs guest code and none changes guest memory. It goes on when the last of these is dropped. The vCPU
/// of a stop handler that keeps its own runs on when it returns, as the only one.
#[derive(Debug)]
pub struct Paused {
    pause: Arc<Pause>,
    /// The vCPU thread whose pause it is.
    owner: Option<ThreadId>,
}

impl Alone for Paused {}

impl Paused {
    /// The largest number of breakpoints that the guest has enabled in the debug registers of one vCPU. A vCPU whose own
    /// handler asks is counted as it was when it last parked.
    #[must_use]
    pub fn guest_breakpoints(&self) -> usize {
        let state = self.pause.lock();
        state.threads.iter().map(|thread| thread.rest.guest_breakpoints).max().unwrap_or(0)
    }

    /// The state of a vCPU as its guest takes it to be; its RIP is between two instructions. `None` if the machine's run has not begun
    /// or has ended, and for a vCPU that is in a stop handler.
    #[must_use]
    pub fn state(&self, vcpu: VcpuId) -> Option<VcpuState> {
        self.pause.lock().parked(vcpu).map(|thread| thread.rest.state)
    }

    /// Has a vCPU run on from another state. Returns whether there is such a vCPU, as for [`Paused::state`]. KVM has to accept the
    /// state, or the run fails.
    #[must_use]
    pub fn set_state(&self, vcpu: VcpuId, state: &VcpuState) -> bool {
        let mut paused = self.pause.lock();
        let Some(thread) = paused.parked(vcpu) else { return false };
        thread.rest.state = *state;
        thread.changed = true;
        true
    }

    /// Everything that KVM holds of each vCPU, by its number. `None` if fewer than `count` are at rest: the run has not begun, ends or
    /// has ended, or the caller is one of them.
    pub(crate) fn save_vcpus(&self, count: usize) -> Option<Vec<SaveResult>> {
        let _saving = self.pause.saving.lock().unwrap_or_else(PoisonError::into_inner);
        let mut state = self.pause.lock();
        let parked = |state: &State| {
            state.threads.len() == count && state.threads.iter().all(|thread| thread.place == Place::Parked)
        };
        if !parked(&state) {
            return None;
        }
        for thread in &mut state.threads {
            thread.saving = Saving::Asked;
        }
        self.pause.changed.notify_all();
        while state.threads.iter().any(|thread| matches!(thread.saving, Saving::Asked)) && parked(&state) {
            state = self.pause.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
        let mut saved: Vec<_> = state
            .threads
            .iter_mut()
            .filter_map(|thread| match std::mem::take(&mut thread.saving) {
                Saving::Done(saved) => Some((thread.vcpu, *saved)),
                Saving::NotAsked | Saving::Asked => None,
            })
            .collect();
        saved.sort_unstable_by_key(|(vcpu, _)| *vcpu);
        (saved.len() == count).then(|| saved.into_iter().map(|(_, saved)| saved).collect())
    }
}

impl Drop for Paused {
    fn drop(&mut self) {
        let mut state = self.pause.lock();
        match (self.owner, state.owner) {
            (None, _) => state.holds -= 1,
            (Some(me), Some((owner, depth))) if owner == me && depth > 1 => {
                state.owner = Some((me, depth - 1))
            }
            (Some(me), Some((owner, _))) if owner == me => {
                state.set(me, Place::Running);
                state.owner = None;
            }
            // The vCPU's thread has ended.
            (Some(_), _) => {}
        }
        self.pause.update(&mut state);
    }
}

#[cfg(test)]
mod tests {
    use std::cell::RefCell;
    use std::sync::atomic::AtomicU64;
    use std::sync::mpsc;
    use std::thread::JoinHandle;
    use std::time::Duration;

    use probe_core::Registers;

    use super::*;

    fn no_save(_: Option<VcpuState>) -> SaveResult {
        unreachable!("nobody saves these")
    }

    /// A machine whose vCPUs only count; `stop_work` is what each does in a round.
    struct Machine {
        pause: Arc<Pause>,
        stop: Arc<AtomicBool>,
        rounds: Arc<AtomicU64>,
        threads: Vec<JoinHandle<()>>,
    }

    impl Machine {
        fn new(vcpus: usize, work: impl Fn(&Arc<Pause>) + Clone + Send + 'static) -> Self {
            kick::install().unwrap();
            let pause = Arc::new(Pause::default());
            let stop = Arc::new(AtomicBool::new(false));
            let rounds = Arc::new(AtomicU64::new(0));
            let (ready, is_ready) = mpsc::channel();
            let threads = (0..vcpus)
                .map(|_| {
                    let (pause, stop, rounds) = (Arc::clone(&pause), Arc::clone(&stop), Arc::clone(&rounds));
                    let (ready, work) = (ready.clone(), work.clone());
                    thread::spawn(move || {
                        let _registration = pause.expect(VcpuId(0)).register();
                        ready.send(()).unwrap();
                        while !stop.load(Ordering::Acquire) {
                            if pause.wanted() && !pause.is_mine() {
                                pause.park(&stop, Rest::default(), no_save);
                                continue;
                            }
                            work(&pause);
                            rounds.fetch_add(1, Ordering::Relaxed);
                        }
                    })
                })
                .collect();
            for _ in 0..vcpus {
                is_ready.recv().unwrap();
            }
            Self { pause, stop, rounds, threads }
        }

        fn rounds(&self) -> u64 {
            self.rounds.load(Ordering::Relaxed)
        }

        fn end(self) -> Vec<thread::Result<()>> {
            self.stop.store(true, Ordering::Release);
            while !self.threads.iter().all(JoinHandle::is_finished) {
                self.pause.wake();
                thread::sleep(Duration::from_millis(1));
            }
            self.threads.into_iter().map(JoinHandle::join).collect()
        }
    }

    fn goes_on(machine: &Machine) {
        let before = machine.rounds();
        while machine.rounds() == before {
            thread::yield_now();
        }
    }

    #[test]
    fn nothing_runs_while_any_pause_is_held() {
        let machine = Machine::new(3, |_| ());
        let first = machine.pause.pause();
        let second = machine.pause.pause();
        let before = machine.rounds();
        drop(first);
        thread::sleep(Duration::from_millis(20));
        assert_eq!(machine.rounds(), before);
        drop(second);
        goes_on(&machine);
        assert!(machine.end().iter().all(Result::is_ok));
    }

    #[test]
    fn a_machine_without_vcpus_is_paused_at_once_and_one_that_starts_later_waits() {
        let machine = Machine::new(0, |_| ());
        let paused = machine.pause.pause();
        let (pause, stop) = (Arc::clone(&machine.pause), Arc::clone(&machine.stop));
        let late = thread::spawn(move || {
            let _registration = pause.expect(VcpuId(0)).register();
            assert!(pause.wanted());
            pause.park(&stop, Rest { guest_breakpoints: 3, ..Rest::default() }, no_save);
        });
        while machine.pause.lock().threads.iter().all(|thread| thread.place != Place::Parked) {
            thread::yield_now();
        }
        assert_eq!(paused.guest_breakpoints(), 3);
        assert!(!late.is_finished());
        drop(paused);
        late.join().unwrap();
        assert!(!machine.pause.wanted());
    }

    #[test]
    fn a_machine_that_is_paused_again_and_again_goes_on() {
        let machine = Machine::new(2, |_| ());
        let mut last = machine.rounds();
        for _ in 0..100 {
            drop(machine.pause.pause());
            let paused = machine.pause.pause();
            let now = machine.rounds();
            assert!(now > last, "nothing ran between two pauses");
            last = now;
            drop(paused);
        }
        assert!(machine.end().iter().all(Result::is_ok));
    }

    #[test]
    fn a_pause_waits_for_vcpus_that_are_about_to_run() {
        let machine = Machine::new(0, |_| ());
        let (pause, stop) = (Arc::clone(&machine.pause), Arc::clone(&machine.stop));
        let (expected, fails) = (pause.expect(VcpuId(0)), pause.expect(VcpuId(1)));
        let pausing = thread::spawn(move || {
            let paused = pause.pause();
            (paused.state(VcpuId(0)).is_some(), paused.state(VcpuId(1)).is_some())
        });
        while !machine.pause.wanted() {
            thread::yield_now();
        }
        // Its thread could not be had.
        drop(fails);
        let _registration = expected.register();
        machine.pause.park(&stop, Rest::default(), no_save);
        assert_eq!(pausing.join().unwrap(), (true, false));
    }

    #[test]
    fn a_vcpu_runs_on_from_the_state_that_it_was_given_at_rest() {
        let machine = Machine::new(0, |_| ());
        let (pause, stop) = (Arc::clone(&machine.pause), Arc::clone(&machine.stop));
        let paused = machine.pause.pause();
        let vcpu = thread::spawn(move || {
            let _registration = pause.expect(VcpuId(1)).register();
            let at =
                |rip| VcpuState { regs: Registers { rip, ..Registers::default() }, ..VcpuState::default() };
            let first = pause.park(&stop, Rest { state: at(1), guest_breakpoints: 0 }, no_save);
            let _again = pause.pause();
            (first, pause.park(&stop, Rest::default(), no_save))
        });
        let mut state = loop {
            match paused.state(VcpuId(1)) {
                Some(state) => break state,
                None => thread::yield_now(),
            }
        };
        assert_eq!(state.regs.rip, 1);
        state.regs.rip = 2;
        assert!(paused.set_state(VcpuId(1), &state));
        assert!(!paused.set_state(VcpuId(0), &state), "there is none");
        assert_eq!(paused.state(VcpuId(1)), Some(state), "what was set is what is read");
        drop(paused);
        let (first, second) = vcpu.join().unwrap();
        assert_eq!(first, Some(state));
        assert_eq!(second, None, "a change is made once");
    }

    #[test]
    fn vcpus_that_ask_at_once_have_the_pause_one_after_the_other() {
        let inside = Arc::new(AtomicU64::new(0));
        let machine = Machine::new(4, {
            let inside = Arc::clone(&inside);
            move |pause| {
                let _outer = pause.pause();
                let _inner = pause.pause();
                assert_eq!(inside.fetch_add(1, Ordering::SeqCst), 0);
                thread::yield_now();
                inside.fetch_sub(1, Ordering::SeqCst);
            }
        });
        for _ in 0..50 {
            let paused = machine.pause.pause();
            assert_eq!(inside.load(Ordering::SeqCst), 0, "no stop is under way");
            drop(paused);
            goes_on(&machine);
        }
        assert!(machine.end().iter().all(Result::is_ok));
    }

    #[test]
    fn vcpus_that_keep_the_pause_run_on_alone_one_after_the_other() {
        thread_local! {
            /// The pause, and for how many more rounds it is kept.
            static KEPT: RefCell<Option<(Paused, u32)>> = const { RefCell::new(None) };
        }
        let (alone, enough) = (Arc::new(AtomicU64::new(0)), Arc::new(AtomicBool::new(false)));
        let machine = Machine::new(3, {
            let (alone, enough) = (Arc::clone(&alone), Arc::clone(&enough));
            move |pause| match KEPT.take() {
                None => {
                    assert_eq!(alone.load(Ordering::SeqCst), 0, "another vCPU should be alone");
                    if !enough.load(Ordering::SeqCst) {
                        KEPT.set(Some((pause.pause(), 3)));
                        assert_eq!(alone.fetch_add(1, Ordering::SeqCst), 0);
                    }
                }
                Some((_paused, 0)) => assert_eq!(alone.fetch_sub(1, Ordering::SeqCst), 1),
                Some((paused, rounds)) => {
                    assert_eq!(alone.load(Ordering::SeqCst), 1);
                    assert!(pause.is_mine() && pause.wanted());
                    KEPT.set(Some((paused, rounds - 1)));
                }
            }
        });
        for _ in 0..50 {
            let paused = machine.pause.pause();
            assert_eq!(alone.load(Ordering::SeqCst), 0, "none is alone");
            drop(paused);
            goes_on(&machine);
        }
        enough.store(true, Ordering::SeqCst);
        while alone.load(Ordering::SeqCst) != 0 {
            thread::yield_now();
        }
        drop(machine.pause.pause());
        assert_eq!(alone.load(Ordering::SeqCst), 0);
        assert!(machine.end().iter().all(Result::is_ok));
    }

    #[test]
    fn a_pause_that_outlives_its_vcpu_ends_no_other_ones() {
        kick::install().unwrap();
        let pause = Arc::new(Pause::default());
        let left_behind = thread::spawn({
            let pause = Arc::clone(&pause);
            move || {
                let _registration = pause.expect(VcpuId(0)).register();
                pause.pause()
            }
        });
        let left_behind = left_behind.join().unwrap();
        let _registration = pause.expect(VcpuId(0)).register();
        let paused = pause.pause();
        drop(left_behind);
        assert!(pause.is_mine() && pause.wanted());
        drop(paused);
        assert!(!pause.is_mine() && !pause.wanted());
    }

    #[test]
    fn a_stop_ends_parked_threads_while_the_pause_is_held() {
        let machine = Machine::new(2, |_| ());
        let paused = machine.pause.pause();
        assert!(machine.end().iter().all(Result::is_ok));
        drop(paused);
    }

    #[test]
    fn a_vcpu_that_panics_with_the_pause_gives_it_back() {
        let first = Arc::new(AtomicBool::new(true));
        let machine = Machine::new(3, move |pause| {
            if first.swap(false, Ordering::SeqCst) {
                let _paused = pause.pause();
                panic!("as planned by the test");
            }
        });
        while !machine.threads.iter().any(JoinHandle::is_finished) {
            thread::yield_now();
        }
        goes_on(&machine);
        drop(machine.pause.pause());
        assert_eq!(machine.end().iter().filter(|result| result.is_err()).count(), 1);
    }
}
