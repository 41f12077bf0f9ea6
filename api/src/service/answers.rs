//! What requests with an idempotency key were answered.

use std::collections::VecDeque;
use std::sync::{Mutex, MutexGuard, PoisonError};

use tonic::Status;

use super::status;

/// Requests that are remembered.
const REMEMBERED: usize = 1000;

struct Remembered<T> {
    key: String,
    /// The request itself, encoded.
    request: Vec<u8>,
    answer: T,
}

/// The newest answers to requests of one kind.
pub struct Answers<T> {
    known: Mutex<VecDeque<Remembered<T>>>,
    /// Held while something is made, so that the same request at the same time waits for its answer.
    making: tokio::sync::Mutex<()>,
}

impl<T: Clone> Answers<T> {
    pub fn new() -> Self {
        Self { known: Mutex::default(), making: tokio::sync::Mutex::new(()) }
    }

    fn lock(&self) -> MutexGuard<'_, VecDeque<Remembered<T>>> {
        self.known.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The answer to this request, which is made only if the key is new; without a key, each time.
    ///
    /// # Errors
    /// The key was used for another request, or what making says, which is not remembered.
    pub async fn once(
        &self,
        key: &str,
        request: Vec<u8>,
        make: impl Future<Output = Result<T, Status>>,
    ) -> Result<T, Status> {
        if key.is_empty() {
            return make.await;
        }
        let _making = self.making.lock().await;
        if let Some(known) = self.lock().iter().find(|known| known.key == key) {
            return if known.request == request {
                Ok(known.answer.clone())
            } else {
                Err(status::key_reused())
            };
        }
        let answer = make.await?;
        let mut known = self.lock();
        known.push_back(Remembered { key: key.to_owned(), request, answer: answer.clone() });
        if known.len() > REMEMBERED {
            known.pop_front();
        }
        drop(known);
        Ok(answer)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_key_is_for_one_request_which_is_carried_out_once() {
        let answers = Answers::new();
        let made = std::cell::Cell::new(0);
        let make = || async {
            made.set(made.get() + 1);
            Ok(made.get())
        };
        assert_eq!(answers.once("a", vec![1], make()).await.unwrap(), 1);
        assert_eq!(answers.once("a", vec![1], make()).await.unwrap(), 1);
        assert_eq!(
            answers.once("a", vec![2], make()).await.unwrap_err().code(),
            tonic::Code::InvalidArgument
        );
        assert_eq!(answers.once("b", vec![1], make()).await.unwrap(), 2);
        // What failed may be tried again.
        let fails = async { Err::<i32, _>(status::invalid("no")) };
        answers.once("c", vec![1], fails).await.unwrap_err();
        assert_eq!(answers.once("c", vec![1], make()).await.unwrap(), 3);
        // Without a key each is another.
        assert_eq!(answers.once("", vec![1], make()).await.unwrap(), 4);
        assert_eq!(answers.once("", vec![1], make()).await.unwrap(), 5);
    }

    #[tokio::test]
    async fn the_oldest_answers_are_forgotten() {
        let answers = Answers::new();
        for key in 0..=REMEMBERED {
            answers.once(&key.to_string(), Vec::new(), async { Ok(key) }).await.unwrap();
        }
        assert_eq!(answers.once("1", Vec::new(), async { Ok(0) }).await.unwrap(), 1);
        assert_eq!(answers.once("0", Vec::new(), async { Ok(7) }).await.unwrap(), 7);
    }
}
