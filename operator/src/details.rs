//! Statuses that would change in details alone: what a pod waits for, what it does. What lasts for a moment is not written, so
//! that a run costs few writes, and ten thousand of them no API server.

use std::{
    collections::HashMap,
    sync::{Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

use kube::ResourceExt;

/// Details are written when they last for so long.
const LASTING: Duration = Duration::from_secs(5);

/// Objects whose status differs in details, and since when.
#[derive(Default)]
pub struct Details(Mutex<HashMap<String, Instant>>);

impl Details {
    /// How long an object's details have to last yet; None if they are to be written.
    pub fn wait(&self, object: &impl ResourceExt) -> Option<Duration> {
        let since = *self.lock().entry(object.uid().unwrap_or_default()).or_insert_with(Instant::now);
        let wait = LASTING.saturating_sub(since.elapsed());
        (!wait.is_zero()).then_some(wait)
    }

    /// An object's status is as it should be, or gone.
    pub fn forget(&self, object: &impl ResourceExt) {
        self.lock().remove(&object.uid().unwrap_or_default());
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<String, Instant>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fixtures::job;

    #[test]
    fn details_wait_from_when_they_were_first_seen() {
        let (details, job) = (Details::default(), job(serde_json::json!({})));
        assert!(details.wait(&job).is_some_and(|wait| wait > LASTING / 2));
        *details.lock().get_mut("uid-j").unwrap() = Instant::now().checked_sub(LASTING).unwrap();
        assert_eq!(details.wait(&job), None);
        details.forget(&job);
        assert!(details.wait(&job).is_some());
    }
}
