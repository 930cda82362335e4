//! Leader election by a Lease. Every write carries the resourceVersion that was read, so that of two replicas that reach
//! for the lease at once, one gets a conflict. Time is measured by this machine's clock alone, from the moment when the
//! lease was last seen to change, as client-go does. A replica that waits watches the lease, so that it hears at once when
//! its holder lets go.

use std::{
    future::pending,
    pin::pin,
    time::{Duration, Instant},
};

use futures::StreamExt;
use k8s_openapi::{
    api::coordination::v1::{Lease, LeaseSpec},
    apimachinery::pkg::apis::meta::v1::MicroTime,
    jiff::Timestamp,
};
use kube::{
    Api, Client,
    api::{ObjectMeta, PostParams},
    runtime::{
        WatchStreamExt,
        watcher::{self, watch_object},
    },
};
use tokio::time::{sleep, timeout};

/// A holder that has not renewed for so long has lost the lease.
const DURATION: Duration = Duration::from_secs(15);
/// The holder stops to act if it could not renew for so long: before anyone else can take over.
const RENEW_DEADLINE: Duration = Duration::from_secs(10);
/// Time between two renewals, and between two tries to take a lease that is free.
const PERIOD: Duration = Duration::from_secs(2);

/// Why the lease could not be taken or kept.
#[derive(Debug, thiserror::Error)]
pub enum LeaseError {
    /// The API server refuses to show the lease.
    #[error("cannot watch the leader lease: {0}")]
    Watch(#[source] Box<watcher::Error>),
    /// The API server refuses to take it.
    #[error("cannot write the leader lease: {0}")]
    Api(#[from] kube::Error),
    /// Another replica leads.
    #[error("the leader lease was lost to {0}")]
    Lost(String),
    /// It could not be renewed in time.
    #[error("the leader lease could not be renewed for {RENEW_DEADLINE:?}: {0}")]
    Expired(String),
}

/// A lease that one of several replicas holds.
pub struct LeaderLease {
    api: Api<Lease>,
    name: String,
    identity: String,
}

/// The lease as it was last seen to change; None where there is none.
struct Seen {
    lease: Option<Lease>,
    at: Instant,
}

impl LeaderLease {
    /// The lease of this name, for a replica of this identity.
    pub fn new(client: Client, namespace: &str, name: String, identity: String) -> Self {
        Self { api: Api::namespaced(client, namespace), name, identity }
    }

    /// Waits until this replica holds the lease, and returns it.
    ///
    /// # Errors
    /// If the API server refuses what can't be mended by trying again.
    pub async fn acquire(&self) -> Result<Lease, LeaseError> {
        let mut changes = pin!(watch_object(self.api.clone(), &self.name).default_backoff());
        let mut seen: Option<Seen> = None;
        let mut tried: Option<Instant> = None;
        loop {
            let free = async {
                let Some(seen) = &seen else { return pending().await };
                let since_try = tried.map_or(Duration::ZERO, |tried| PERIOD.saturating_sub(tried.elapsed()));
                sleep(self.held_for(seen).max(since_try)).await;
            };
            tokio::select! {
                change = changes.next() => match change {
                    Some(Ok(lease)) => note(&mut seen, lease),
                    Some(Err(error)) if is_refused(&error) => return Err(LeaseError::Watch(Box::new(error))),
                    Some(Err(error)) => tracing::warn!(%error, "cannot see the leader lease"),
                    None => {}
                },
                () = free => {
                    tried = Some(Instant::now());
                    match self.take(seen.as_ref().and_then(|seen| seen.lease.clone())).await {
                        Ok(Some(lease)) => return Ok(lease),
                        Ok(None) => tracing::debug!("another replica took the leader lease"),
                        Err(kube::Error::Api(status)) if status.is_forbidden() || status.is_not_found() => {
                            return Err(kube::Error::Api(status).into());
                        }
                        Err(error) => tracing::warn!(%error, "cannot take the leader lease"),
                    }
                }
            }
        }
    }

    /// Renews the lease until it is lost; says how. `held` is the lease as it was last written.
    pub async fn keep(&self, held: &mut Lease) -> LeaseError {
        let mut renewed = Instant::now();
        loop {
            sleep(PERIOD).await;
            let begun = Instant::now();
            let problem = match timeout(PERIOD, self.renew(held)).await {
                Ok(Ok(None)) => {
                    renewed = begun;
                    continue;
                }
                Ok(Ok(Some(holder))) => return LeaseError::Lost(holder),
                Ok(Err(error)) => error.to_string(),
                Err(elapsed) => elapsed.to_string(),
            };
            tracing::warn!(problem, "cannot renew the leader lease");
            if renewed.elapsed() > RENEW_DEADLINE {
                return LeaseError::Expired(problem);
            }
        }
    }

    /// Lets another replica take over at once.
    pub async fn release(&self, held: Lease) {
        let spec = LeaseSpec { holder_identity: None, ..held.spec.clone().unwrap_or_default() };
        let released = Lease { spec: Some(spec), ..held };
        // Whoever waits sees the lease expire, should this fail.
        let _ = timeout(PERIOD, self.api.replace(&self.name, &PostParams::default(), &released)).await;
    }

    /// How long another replica still holds the lease; nothing if it is free.
    fn held_for(&self, seen: &Seen) -> Duration {
        let Some(lease) = &seen.lease else { return Duration::ZERO };
        if holder(lease).is_none_or(|holder| *holder == self.identity) {
            return Duration::ZERO;
        }
        let seconds = lease.spec.as_ref().and_then(|spec| spec.lease_duration_seconds).unwrap_or_default();
        Duration::from_secs(u64::try_from(seconds).unwrap_or_default()).saturating_sub(seen.at.elapsed())
    }

    /// Takes the lease as it was seen; None if it is no longer so.
    async fn take(&self, seen: Option<Lease>) -> Result<Option<Lease>, kube::Error> {
        let next = self.next(seen.as_ref());
        let written = match seen {
            None => self.api.create(&PostParams::default(), &next).await,
            Some(_) => self.api.replace(&self.name, &PostParams::default(), &next).await,
        };
        match written {
            Ok(lease) => Ok(Some(lease)),
            // Of two replicas that reach for it at once, the other one was faster.
            Err(kube::Error::Api(status)) if status.is_conflict() || status.is_already_exists() => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// Renews the lease over what was written last, or over what is there; the holder's name if that is someone else.
    async fn renew(&self, held: &mut Lease) -> Result<Option<String>, kube::Error> {
        if let Some(lease) = self.take(Some(held.clone())).await? {
            *held = lease;
            return Ok(None);
        }
        // A renewal whose answer was lost, or another holder.
        let there = self.api.get(&self.name).await?;
        if let Some(other) = holder(&there).filter(|holder| **holder != self.identity) {
            return Ok(Some(other.clone()));
        }
        match self.take(Some(there)).await? {
            Some(lease) => {
                *held = lease;
                Ok(None)
            }
            None => Ok(Some("a faster replica".into())),
        }
    }

    /// The lease as this replica writes it, over `before` with its resourceVersion.
    fn next(&self, before: Option<&Lease>) -> Lease {
        let now = MicroTime(Timestamp::now());
        let metadata = before.map_or_else(
            || ObjectMeta { name: Some(self.name.clone()), ..Default::default() },
            |before| before.metadata.clone(),
        );
        let spec = before.and_then(|before| before.spec.clone()).unwrap_or_default();
        let stays = spec.holder_identity.as_ref() == Some(&self.identity);
        Lease {
            metadata,
            spec: Some(LeaseSpec {
                holder_identity: Some(self.identity.clone()),
                lease_duration_seconds: Some(DURATION.as_secs() as i32),
                acquire_time: if stays { spec.acquire_time } else { Some(now.clone()) },
                lease_transitions: Some(spec.lease_transitions.map_or(0, |times| times + i32::from(!stays))),
                renew_time: Some(now),
                ..spec
            }),
        }
    }
}

/// Notes what a watch shows. The same version may come again, after a watch has failed: it is as old as it was.
fn note(seen: &mut Option<Seen>, lease: Option<Lease>) {
    let version = |lease: &Option<Lease>| lease.as_ref().and_then(|lease| lease.metadata.resource_version.clone());
    if seen.as_ref().is_none_or(|seen| version(&seen.lease) != version(&lease)) {
        *seen = Some(Seen { lease, at: Instant::now() });
    }
}

/// Whether trying again is of no use.
fn is_refused(error: &watcher::Error) -> bool {
    match error {
        watcher::Error::InitialListFailed(kube::Error::Api(status))
        | watcher::Error::WatchStartFailed(kube::Error::Api(status)) => status.is_forbidden() || status.is_not_found(),
        _ => false,
    }
}

fn holder(lease: &Lease) -> Option<&String> {
    lease.spec.as_ref()?.holder_identity.as_ref().filter(|holder| !holder.is_empty())
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;
    use crate::mock::api_server;

    fn held_by(holder: &str, version: &str) -> Value {
        json!({
            "apiVersion": "coordination.k8s.io/v1",
            "kind": "Lease",
            "metadata": {"name": "l", "resourceVersion": version},
            "spec": {"holderIdentity": holder, "leaseDurationSeconds": 15, "leaseTransitions": 2},
        })
    }

    fn as_lease(value: Value) -> Lease {
        serde_json::from_value(value).unwrap()
    }

    fn lease(client: Client) -> LeaderLease {
        LeaderLease::new(client, "ns", "l".into(), "me".into())
    }

    #[tokio::test]
    async fn a_lease_that_is_not_there_is_created() {
        let (client, mut server) = api_server();
        let server = tokio::spawn(async move {
            let call = server.answer(201, held_by("me", "1")).await;
            assert!(call.line.starts_with("POST "), "{}", call.line);
            assert_eq!(call.body["spec"]["holderIdentity"], "me");
        });
        assert!(lease(client).take(None).await.unwrap().is_some());
        server.await.unwrap();
    }

    #[tokio::test]
    async fn a_renewal_is_one_write_over_the_one_before() {
        let (client, mut server) = api_server();
        let server = tokio::spawn(async move {
            for version in ["7", "8"] {
                let next = if version == "7" { "8" } else { "9" };
                let call = server.answer(200, held_by("me", next)).await;
                assert!(call.line.starts_with("PUT "), "{}", call.line);
                assert_eq!(call.body["metadata"]["resourceVersion"], version);
                assert_eq!(call.body["spec"]["leaseTransitions"], 2);
            }
        });
        let (lease, mut held) = (lease(client), as_lease(held_by("me", "7")));
        for _ in 0..2 {
            assert_eq!(lease.renew(&mut held).await.unwrap(), None);
        }
        server.await.unwrap();
    }

    #[tokio::test]
    async fn a_renewal_whose_answer_was_lost_is_followed_by_another() {
        let (client, mut server) = api_server();
        let server = tokio::spawn(async move {
            server.refuse(409, "Conflict", "the object has been modified").await;
            server.answer(200, held_by("me", "8")).await;
            let call = server.answer(200, held_by("me", "9")).await;
            assert_eq!(call.body["metadata"]["resourceVersion"], "8");
        });
        assert_eq!(lease(client).renew(&mut as_lease(held_by("me", "7"))).await.unwrap(), None);
        server.await.unwrap();
    }

    #[tokio::test]
    async fn a_holder_that_finds_another_name_in_its_lease_has_lost_it() {
        let (client, mut server) = api_server();
        let server = tokio::spawn(async move {
            server.refuse(409, "Conflict", "the object has been modified").await;
            server.answer(200, held_by("other", "9")).await;
        });
        let lost = lease(client).keep(&mut as_lease(held_by("me", "7"))).await;
        assert!(matches!(lost, LeaseError::Lost(holder) if holder == "other"));
        server.await.unwrap();
    }

    #[tokio::test]
    async fn of_two_replicas_that_reach_at_once_the_slower_one_waits() {
        let (client, mut server) = api_server();
        let server = tokio::spawn(async move { server.refuse(409, "Conflict", "the object has been modified").await });
        assert!(lease(client).take(Some(as_lease(held_by("", "7")))).await.unwrap().is_none());
        server.await.unwrap();
    }

    #[tokio::test]
    async fn another_replicas_lease_is_free_when_it_has_not_changed_for_its_whole_duration_or_was_let_go() {
        let lease = lease(api_server().0);
        let mut seen = None;
        note(&mut seen, Some(as_lease(held_by("other", "7"))));
        assert!(lease.held_for(seen.as_ref().unwrap()) > DURATION / 2);
        let long_ago = Instant::now().checked_sub(DURATION).unwrap();
        seen.as_mut().unwrap().at = long_ago;
        note(&mut seen, Some(as_lease(held_by("other", "7"))));
        assert_eq!(lease.held_for(seen.as_ref().unwrap()), Duration::ZERO, "the same version is no sign of life");
        note(&mut seen, Some(as_lease(held_by("other", "8"))));
        assert!(lease.held_for(seen.as_ref().unwrap()) > DURATION / 2);
        for free in [Some(as_lease(held_by("", "9"))), None] {
            note(&mut seen, free);
            assert_eq!(lease.held_for(seen.as_ref().unwrap()), Duration::ZERO);
        }
    }

    #[tokio::test]
    async fn a_lease_that_is_let_go_names_nobody() {
        let (client, mut server) = api_server();
        let server = tokio::spawn(async move {
            let call = server.answer(200, held_by("", "8")).await;
            assert_eq!(call.body["spec"]["holderIdentity"], Value::Null);
            assert_eq!(call.body["metadata"]["resourceVersion"], "7");
        });
        lease(client).release(as_lease(held_by("me", "7"))).await;
        server.await.unwrap();
    }
}
