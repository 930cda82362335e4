//! What keeps a status from being written again and again, so that a run costs few writes, and ten thousand of them no API
//! server: details that last for a moment (what a pod waits for, what it does), and what was just written but has not come
//! back into the cache.

use std::{
    collections::HashMap,
    sync::{Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

use kube::ResourceExt;

/// Details are written when they last for so long.
const LASTING: Duration = Duration::from_secs(10);

/// A cache is not waited for longer: what is decided from an older status is only told twice.
const LAG: Duration = Duration::from_secs(1);

/// Objects whose status differs in details, and since when.
#[derive(Default)]
pub struct Details(Mutex<HashMap<String, Instant>>);

/// Objects whose status was written, and the version that they had then.
#[derive(Default)]
pub struct Written(Mutex<HashMap<String, (u64, Instant)>>);

impl Written {
    /// An object's status was written, which made this version of it.
    pub fn note(&self, object: &impl ResourceExt, version: Option<String>) {
        if let Some(version) = version.and_then(|version| version.parse().ok()) {
            let mut all = self.0.lock().unwrap_or_else(PoisonError::into_inner);
            all.insert(object.uid().unwrap_or_default(), (version, Instant::now()));
        }
    }

    /// How long to wait for the cache, which still has the object as it was before its status was written; None if it is
    /// up to date. Versions of one object grow, by the rules of Kubernetes.
    pub fn lag(&self, object: &impl ResourceExt) -> Option<Duration> {
        let mut all = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let uid = object.uid().unwrap_or_default();
        let (version, at) = all.get(&uid)?;
        let wait = LAG.saturating_sub(at.elapsed());
        let cached: Option<u64> = object.resource_version().and_then(|version| version.parse().ok());
        if cached.is_some_and(|cached| cached < *version) && !wait.is_zero() {
            return Some(wait);
        }
        all.remove(&uid);
        None
    }
}

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
    fn a_cache_lags_until_it_has_what_was_written_but_not_for_long() {
        let (written, mut job) = (Written::default(), job(serde_json::json!({})));
        job.metadata.resource_version = Some("7".into());
        assert_eq!(written.lag(&job), None);
        written.note(&job, Some("9".into()));
        assert!(written.lag(&job).is_some());
        job.metadata.resource_version = Some("8".into());
        assert!(written.lag(&job).is_some(), "somebody else's write came in between");
        job.metadata.resource_version = Some("9".into());
        assert_eq!(written.lag(&job), None);
        written.note(&job, Some("10".into()));
        written.0.lock().unwrap().get_mut("uid-j").unwrap().1 = Instant::now().checked_sub(LAG).unwrap();
        assert_eq!(written.lag(&job), None, "it missed nothing");
    }

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
