//! A bounded log with many readers: what a machine's clients read its events and its console from.
//!
//! Items have sequence numbers, from 0 without a gap. The log keeps the newest; a reader says where it wants to go on, and is
//! told how many items are gone. Writers never wait for readers.

use std::collections::VecDeque;
use std::sync::{Mutex, MutexGuard, PoisonError};

use tokio::sync::watch;

#[derive(Debug)]
struct State<T> {
    items: VecDeque<T>,
    /// The sequence number of the oldest item that is kept.
    first: u64,
    closed: bool,
}

impl<T> State<T> {
    fn next(&self) -> u64 {
        self.first + self.items.len() as u64
    }
}

/// A log of at most so many items.
#[derive(Debug)]
pub struct Log<T> {
    state: Mutex<State<T>>,
    capacity: usize,
    /// Changes with each append, and when the log is closed.
    changed: watch::Sender<()>,
}

/// What a reader gets.
#[derive(Debug, PartialEq, Eq)]
pub struct Page<T> {
    /// The sequence number of the first item.
    pub from: u64,
    pub items: Vec<T>,
    /// How many items there were before the first one that the reader wanted and that are gone.
    pub lost: u64,
    /// No item will come any more.
    pub closed: bool,
}

impl<T: Clone> Log<T> {
    pub fn new(capacity: usize) -> Self {
        let state = State { items: VecDeque::new(), first: 0, closed: false };
        Self { state: Mutex::new(state), capacity, changed: watch::Sender::new(()) }
    }

    fn lock(&self) -> MutexGuard<'_, State<T>> {
        // Each change is made at once.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub fn append(&self, items: impl IntoIterator<Item = T>) {
        let mut state = self.lock();
        for item in items {
            // Before there is one more, for which the queue would double its room.
            if state.items.len() == self.capacity {
                state.items.pop_front();
                state.first += 1;
            }
            state.items.push_back(item);
        }
        drop(state);
        self.changed.send_replace(());
    }

    /// Nothing will be appended any more.
    pub fn close(&self) {
        self.lock().closed = true;
        self.changed.send_replace(());
    }

    /// The sequence number of the next item.
    pub fn next(&self) -> u64 {
        self.lock().next()
    }

    /// At most `most` items from `from` on, as far as they are there.
    pub fn page(&self, from: u64, most: usize) -> Page<T> {
        let state = self.lock();
        let start = from.max(state.first);
        let skip = usize::try_from(start - state.first).unwrap_or(usize::MAX);
        let items: Vec<T> = state.items.iter().skip(skip).take(most).cloned().collect();
        let closed = state.closed && start + items.len() as u64 >= state.next();
        Page { from: start, items, lost: start - from.min(start), closed }
    }

    /// The same, once there is an item or the log is closed.
    pub async fn wait(&self, from: u64, most: usize) -> Page<T> {
        let mut changed = self.changed.subscribe();
        loop {
            // In this order: what is appended after the look is waited for.
            changed.borrow_and_update();
            let page = self.page(from, most);
            if !page.items.is_empty() || page.closed || changed.changed().await.is_err() {
                return page;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn readers_go_on_where_they_were_and_hear_what_they_missed() {
        let log = Log::new(4);
        log.append(0..3);
        assert_eq!(log.page(0, 2), Page { from: 0, items: vec![0, 1], lost: 0, closed: false });
        assert_eq!(log.page(2, 9), Page { from: 2, items: vec![2], lost: 0, closed: false });
        log.append(3..10);
        assert_eq!(log.page(3, 9), Page { from: 6, items: vec![6, 7, 8, 9], lost: 3, closed: false });
        assert_eq!(log.page(10, 9), Page { from: 10, items: vec![], lost: 0, closed: false });
        assert_eq!(log.next(), 10);
    }

    #[test]
    fn a_closed_log_ends_behind_its_last_item() {
        let log = Log::new(4);
        log.append([1]);
        log.close();
        assert!(!Log::<u8>::new(1).page(0, 1).closed);
        assert!(log.page(0, 1).closed && log.page(1, 1).closed);
        log.append([2]);
        assert!(!log.page(0, 1).closed && log.page(0, 2).closed);
    }

    #[tokio::test]
    async fn a_reader_waits_for_the_next_item_and_for_the_end() {
        let log = std::sync::Arc::new(Log::new(4));
        let writer = std::sync::Arc::clone(&log);
        let thread = std::thread::spawn(move || {
            writer.append([7]);
            writer.close();
        });
        let page = log.wait(0, 9).await;
        assert_eq!((page.items, page.lost), (vec![7], 0));
        assert!(log.wait(1, 9).await.closed);
        thread.join().unwrap();
    }
}
