//! What both controllers share: the client, what trainer pods have in common, metrics, events, and how long to wait after errors.

use std::{
    any::Any,
    collections::HashMap,
    sync::{Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use futures::future::{BoxFuture, Shared};
use k8s_openapi::jiff::SignedDuration;
use kube::{
    Client, Resource, ResourceExt,
    runtime::{
        controller,
        events::{Event, EventType, Recorder},
    },
};

use crate::{labels::OPERATOR, metrics::Metrics, options::Options, plan::Devices, workload::TrainerDefaults};

/// Reconciles of a controller at once, in all scopes together.
const AT_ONCE: u16 = 16;
/// Longest note of an event, in bytes.
const MAX_NOTE: usize = 1024;
/// Wait after the first error of an object; it doubles with each in a row.
const FIRST_WAIT: Duration = Duration::from_secs(1);
/// Longest wait after an error.
const LONGEST_WAIT: Duration = Duration::from_secs(120);

/// Resolves when the operator is to stop.
pub type Stop = Shared<BoxFuture<'static, ()>>;

/// An error as the label of a metric.
pub trait Outcome {
    /// One of few words.
    fn label(&self) -> &'static str;
}

/// What both controllers share.
pub struct Context {
    /// The API server.
    pub client: Client,
    /// Reconciles of a controller at once.
    pub at_once: u16,
    /// What all trainer pods have in common.
    pub trainer: TrainerDefaults,
    /// What happens, in numbers.
    pub metrics: Metrics,
    /// How long to wait after errors.
    pub backoff: Backoff,
    /// What the trainer's image computes on.
    pub devices: Devices,
    /// How often the files of Available versions are looked up, if they are.
    pub inspect_every: Option<SignedDuration>,
    recorder: Recorder,
}

impl Context {
    /// A context for each of the options' scopes.
    pub fn new(client: Client, options: &Options, metrics: Metrics) -> Self {
        let scopes = u16::try_from(options.scopes().len()).unwrap_or(u16::MAX);
        let at_once = (AT_ONCE / scopes).max(1);
        let recorder = Recorder::new(client.clone(), OPERATOR.into());
        let (trainer, devices) = (options.trainer(), options.devices());
        let inspect_every = options.inspect_every;
        Self { client, at_once, trainer, metrics, backoff: Backoff::default(), devices, inspect_every, recorder }
    }

    /// Publishes an event about an object. One that is lost is logged, nothing else: the status says the same.
    pub async fn announce<K>(&self, object: &K, warning: bool, reason: &str, action: &str, note: &str)
    where
        K: Resource<DynamicType = ()>,
    {
        let event = Event {
            type_: if warning { EventType::Warning } else { EventType::Normal },
            reason: reason.into(),
            note: Some(shorten(note)),
            action: action.into(),
            secondary: None,
        };
        if let Err(error) = self.recorder.publish(&event, &object.object_ref(&())).await {
            tracing::warn!(%error, reason, "cannot publish an event");
        }
    }
}

/// Logs a reconcile or a watch that failed. An object that is gone when its turn comes is no failure.
pub async fn log_failure<T, E, Q>(controller: &'static str, result: Result<T, controller::Error<E, Q>>)
where
    E: std::error::Error + 'static,
    Q: std::error::Error + 'static,
{
    match result {
        Ok(_) | Err(controller::Error::ObjectNotFound(_)) => {}
        Err(error) => tracing::warn!(controller, %error, "reconcile failed"),
    }
}

/// What a panic said.
pub fn words_of(panic: &(dyn Any + Send)) -> String {
    let text = panic.downcast_ref::<String>().map(String::as_str).or_else(|| panic.downcast_ref::<&str>().copied());
    text.unwrap_or("a panic without words").to_owned()
}

fn shorten(note: &str) -> String {
    let mut end = note.len().min(MAX_NOTE);
    while !note.is_char_boundary(end) {
        end -= 1;
    }
    note[..end].into()
}

/// Counts the errors of each object, to wait longer after each.
#[derive(Default)]
pub struct Backoff {
    errors: Mutex<HashMap<String, u32>>,
}

impl Backoff {
    /// Counts an error; how long to wait now.
    pub fn next(&self, object: &impl ResourceExt) -> Duration {
        let mut errors = self.lock();
        let count = errors.entry(object.uid().unwrap_or_default()).or_insert(0);
        let wait = FIRST_WAIT.saturating_mul(1 << (*count).min(16)).min(LONGEST_WAIT);
        *count += 1;
        wait
    }

    /// Forgets an object's errors.
    pub fn forget(&self, object: &impl ResourceExt) {
        self.lock().remove(&object.uid().unwrap_or_default());
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<String, u32>> {
        self.errors.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use k8s_openapi::api::core::v1::Pod;

    use super::*;

    #[test]
    fn waits_double_up_to_a_limit_and_start_over_after_success() {
        let (backoff, pod) = (Backoff::default(), Pod::default());
        let waits: Vec<u64> = (0..9).map(|_| backoff.next(&pod).as_secs()).collect();
        assert_eq!(waits, [1, 2, 4, 8, 16, 32, 64, 120, 120]);
        backoff.forget(&pod);
        assert_eq!(backoff.next(&pod), FIRST_WAIT);
    }

    #[test]
    fn a_long_note_is_cut_between_characters() {
        assert_eq!(shorten(&"é".repeat(600)).len(), 1024);
        assert_eq!(shorten(&format!("x{}", "é".repeat(600))).len(), 1023);
    }
}
