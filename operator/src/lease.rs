//! Leader election by a Lease. Every write carries the resourceVersion that was read, so that of two replicas that reach
//! for the lease at once, one gets a conflict. Time is measured by this machine's clock alone, from the moment when the
//! lease was last seen to change, as client-go does.

use std::time::{Duration, Instant};

use k8s_openapi::{
    api::coordination::v1::{Lease, LeaseSpec},
    apimachinery::pkg::apis::meta::v1::MicroTime,
    jiff::Timestamp,
};
use kube::{
    Api, Client,
    api::{ObjectMeta, PostParams},
};
use tokio::time::{sleep, timeout};

/// A holder that has not renewed for so long has lost the lease.
const DURATION: Duration = Duration::from_secs(15);
/// The holder stops to act if it could not renew for so long: before anyone else can take over.
const RENEW_DEADLINE: Duration = Duration::from_secs(10);
/// Time between two tries.
const PERIOD: Duration = Duration::from_secs(2);

/// Why the lease could not be taken or kept.
#[derive(Debug, thiserror::Error)]
pub enum LeaseError {
    /// The API server failed.
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

/// The lease as it was last seen to change.
struct Seen {
    resource_version: Option<String>,
    at: Instant,
}

impl LeaderLease {
    /// The lease of this name, for a replica of this identity.
    pub fn new(client: Client, namespace: &str, name: String, identity: String) -> Self {
        Self { api: Api::namespaced(client, namespace), name, identity }
    }

    /// Waits until this replica holds the lease. `reached` is called whenever the API server has answered.
    ///
    /// # Errors
    /// If the API server refuses what can't be mended by trying again.
    pub async fn acquire(&self, reached: impl Fn()) -> Result<(), LeaseError> {
        let mut seen = None;
        loop {
            match self.reach(&mut seen).await {
                Ok(None) => return Ok(()),
                Ok(Some(holder)) => {
                    reached();
                    tracing::debug!(holder, "waits for the leader lease");
                }
                Err(kube::Error::Api(status)) if status.is_forbidden() || status.is_not_found() => {
                    return Err(kube::Error::Api(status).into());
                }
                Err(error) => tracing::warn!(%error, "cannot reach for the leader lease"),
            }
            sleep(PERIOD).await;
        }
    }

    /// Renews the lease until it is lost; says how.
    pub async fn keep(&self) -> LeaseError {
        let mut renewed = Instant::now();
        let mut seen = None;
        loop {
            sleep(PERIOD).await;
            let begun = Instant::now();
            let problem = match timeout(PERIOD, self.reach(&mut seen)).await {
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
    pub async fn release(&self) {
        let Ok(Some(lease)) = self.api.get_opt(&self.name).await else { return };
        if holder(&lease) == Some(&self.identity) {
            let spec = LeaseSpec { holder_identity: None, ..lease.spec.clone().unwrap_or_default() };
            // Whoever waits sees the lease expire, should this fail.
            let _ = self.api.replace(&self.name, &PostParams::default(), &Lease { spec: Some(spec), ..lease }).await;
        }
    }

    /// Takes or renews the lease; the holder's name if that is someone else.
    async fn reach(&self, seen: &mut Option<Seen>) -> Result<Option<String>, kube::Error> {
        let Some(lease) = self.api.get_opt(&self.name).await? else {
            return won(self.api.create(&PostParams::default(), &self.next(None)).await);
        };
        if seen.as_ref().is_none_or(|seen| seen.resource_version != lease.metadata.resource_version) {
            *seen = Some(Seen { resource_version: lease.metadata.resource_version.clone(), at: Instant::now() });
        }
        let unchanged = seen.as_ref().map_or(Duration::ZERO, |seen| seen.at.elapsed());
        if let Some(other) = self.other_holder(&lease, unchanged) {
            return Ok(Some(other));
        }
        won(self.api.replace(&self.name, &PostParams::default(), &self.next(Some(lease))).await)
    }

    /// Who else holds the lease, if it is not free.
    fn other_holder(&self, lease: &Lease, unchanged: Duration) -> Option<String> {
        let holder = holder(lease).filter(|holder| **holder != self.identity)?;
        let seconds = lease.spec.as_ref().and_then(|spec| spec.lease_duration_seconds).unwrap_or_default();
        let duration = Duration::from_secs(u64::try_from(seconds).unwrap_or_default());
        (unchanged < duration).then(|| holder.clone())
    }

    /// The lease as this replica writes it, over `before` with its resourceVersion.
    fn next(&self, before: Option<Lease>) -> Lease {
        let now = MicroTime(Timestamp::now());
        let Lease { metadata, spec } = before.unwrap_or_else(|| Lease {
            metadata: ObjectMeta { name: Some(self.name.clone()), ..Default::default() },
            spec: None,
        });
        let spec = spec.unwrap_or_default();
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

fn holder(lease: &Lease) -> Option<&String> {
    lease.spec.as_ref()?.holder_identity.as_ref().filter(|holder| !holder.is_empty())
}

/// A conflict means that another replica was faster.
fn won(written: Result<Lease, kube::Error>) -> Result<Option<String>, kube::Error> {
    match written {
        Ok(_) => Ok(None),
        Err(kube::Error::Api(status)) if status.is_conflict() || status.is_already_exists() => {
            Ok(Some("a faster replica".into()))
        }
        Err(error) => Err(error),
    }
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

    fn lease(client: Client) -> LeaderLease {
        LeaderLease::new(client, "ns", "l".into(), "me".into())
    }

    #[tokio::test]
    async fn a_lease_that_is_not_there_is_created() {
        let (client, mut server) = api_server();
        let server = tokio::spawn(async move {
            server.refuse(404, "NotFound", "not found").await;
            let call = server.answer(201, held_by("me", "1")).await;
            assert!(call.line.starts_with("POST "), "{}", call.line);
            assert_eq!(call.body["spec"]["holderIdentity"], "me");
        });
        assert_eq!(lease(client).reach(&mut None).await.unwrap(), None);
        server.await.unwrap();
    }

    #[tokio::test]
    async fn a_renewal_carries_the_resource_version_that_was_read() {
        let (client, mut server) = api_server();
        let server = tokio::spawn(async move {
            server.answer(200, held_by("me", "7")).await;
            let call = server.answer(200, held_by("me", "8")).await;
            assert!(call.line.starts_with("PUT "), "{}", call.line);
            assert_eq!(call.body["metadata"]["resourceVersion"], "7");
            assert_eq!(call.body["spec"]["leaseTransitions"], 2);
        });
        assert_eq!(lease(client).reach(&mut None).await.unwrap(), None);
        server.await.unwrap();
    }

    #[tokio::test]
    async fn of_two_replicas_that_reach_at_once_the_slower_one_waits() {
        let (client, mut server) = api_server();
        let server = tokio::spawn(async move {
            server.answer(200, held_by("", "7")).await;
            server.refuse(409, "Conflict", "the object has been modified").await;
        });
        assert!(lease(client).reach(&mut None).await.unwrap().is_some());
        server.await.unwrap();
    }

    #[tokio::test]
    async fn another_replicas_lease_is_taken_only_after_it_has_not_changed_for_its_whole_duration() {
        let (client, mut server) = api_server();
        let server = tokio::spawn(async move {
            server.answer(200, held_by("other", "7")).await;
            server.answer(200, held_by("other", "7")).await;
            let call = server.answer(200, held_by("me", "8")).await;
            assert_eq!(call.body["spec"]["leaseTransitions"], 3);
        });
        let lease = lease(client);
        let mut seen = None;
        assert_eq!(lease.reach(&mut seen).await.unwrap().as_deref(), Some("other"));
        let long_ago = Instant::now().checked_sub(DURATION).unwrap();
        seen = Some(Seen { resource_version: Some("7".into()), at: long_ago });
        assert_eq!(lease.reach(&mut seen).await.unwrap(), None);
        server.await.unwrap();
    }

    #[tokio::test]
    async fn a_holder_that_finds_another_name_in_its_lease_has_lost_it() {
        let (client, mut server) = api_server();
        let server = tokio::spawn(async move { server.answer(200, held_by("other", "9")).await });
        assert!(matches!(lease(client).keep().await, LeaseError::Lost(holder) if holder == "other"));
        server.await.unwrap();
    }
}
