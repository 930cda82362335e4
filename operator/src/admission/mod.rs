//! Who lets a run begin, and why it may not: quotas and admission, in words that say what is short. Training Jobs are created
//! suspended; here, the operator itself lets them begin at once.

use k8s_openapi::{
    api::core::v1::{Event, ResourceQuota},
    apimachinery::pkg::api::resource::Quantity,
    jiff::Timestamp,
};
use kube::{Api, Client, ResourceExt, api::ListParams, core::Status};
use tunesmith_crds::conditions::reason;

use crate::workload::{JobState, Pods, TrainerJob};

/// A Job or a pod that was not created.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Refusal {
    /// Reason of the condition.
    pub reason: &'static str,
    /// For the user.
    pub message: String,
    /// The API server will never take it.
    pub is_final: bool,
}

impl Refusal {
    /// The refusal in an API server's answer to a creation; None if it is another kind of error.
    pub fn of_creation(what: &str, status: &Status) -> Option<Self> {
        let webhook = status.message.contains("admission webhook") || status.message.contains("failed calling webhook");
        // What the schema forbids is forbidden for good; a webhook or a policy may think otherwise later.
        let is_final = !webhook && status.code == 422 && status.message.contains(" is invalid: ");
        let refused = webhook || matches!(status.code, 403 | 422);
        refused.then(|| Self {
            reason: if is_final { reason::INVALID } else { reason_of(&status.message) },
            message: format!("{what} was refused: {}", status.message),
            is_final,
        })
    }

    /// The refusal in a Job's FailedCreate event. `quotas` are those of the namespace now.
    pub fn of_pod(event: &str, quotas: &[ResourceQuota]) -> Self {
        let quota = quota_name(event).and_then(|name| quotas.iter().find(|quota| quota.name_any() == name));
        let shortage = quota.and_then(|quota| shortage(quota, &requested(event)));
        let message = shortage.unwrap_or_else(|| event.strip_prefix("Error creating: ").unwrap_or(event).into());
        Self { reason: reason_of(event), message, is_final: false }
    }
}

/// Why an active Job has no pod, if so: the Job controller's event, explained by the namespace's quotas.
///
/// # Errors
/// If the API server fails.
pub async fn of_job(client: &Client, namespace: &str, job: &TrainerJob) -> Result<Option<Refusal>, kube::Error> {
    if !matches!(job.state, JobState::Active { pods: Pods::Missing, .. }) {
        return Ok(None);
    }
    let selector = format!("involvedObject.uid={},reason=FailedCreate", job.uid);
    let events = Api::<Event>::namespaced(client.clone(), namespace);
    let events = events.list(&ListParams::default().fields(&selector)).await?.items;
    let Some(event) = events.into_iter().max_by_key(event_time) else { return Ok(None) };
    let quotas = Api::<ResourceQuota>::namespaced(client.clone(), namespace);
    let quotas = quotas.list(&ListParams::default()).await?.items;
    Ok(Some(Refusal::of_pod(event.message.as_deref().unwrap_or_default(), &quotas)))
}

fn event_time(event: &Event) -> Option<Timestamp> {
    let last = event.last_timestamp.as_ref().map(|time| time.0);
    last.or(event.event_time.as_ref().map(|time| time.0)).or(event.creation_timestamp().map(|time| time.0))
}

fn reason_of(message: &str) -> &'static str {
    if message.contains("exceeded quota") { reason::QUOTA_EXCEEDED } else { reason::ADMISSION_REFUSED }
}

/// `team` in `… exceeded quota: team, requested: …`.
fn quota_name(event: &str) -> Option<&str> {
    event.split_once("exceeded quota: ")?.1.split(',').next()
}

/// The pairs in `requested: pods=1,requests.cpu=2, used: …`.
fn requested(event: &str) -> Vec<(&str, &str)> {
    let Some((_, rest)) = event.split_once("requested: ") else { return Vec::new() };
    let list = rest.split(", used:").next().unwrap_or_default();
    list.split(',').filter_map(|pair| pair.trim().split_once('=')).collect()
}

/// "needs 1 nvidia.com/gpu, 0 of 1 free in ResourceQuota team": the first of what is requested that has no room.
fn shortage(quota: &ResourceQuota, requested: &[(&str, &str)]) -> Option<String> {
    let status = quota.status.as_ref()?;
    requested.iter().find_map(|&(resource, wanted)| {
        let hard = status.hard.as_ref()?.get(resource)?;
        let zero = Quantity("0".into());
        let used = status.used.as_ref().and_then(|used| used.get(resource)).unwrap_or(&zero);
        let (wanted_value, hard_value, used_value) = (value(wanted)?, value(&hard.0)?, value(&used.0)?);
        let free = (hard_value - used_value).max(0.0);
        (wanted_value > free).then(|| {
            let unit = unit(&hard.0);
            let name = resource.strip_prefix("requests.").unwrap_or(resource);
            let free = format_value(free / unit.1);
            format!("needs {wanted} {name}, {free}{} of {} free in ResourceQuota {}", unit.0, hard.0, quota.name_any())
        })
    })
}

/// A quantity as a number.
fn value(quantity: &str) -> Option<f64> {
    let (suffix, factor) = unit(quantity);
    Some(quantity.strip_suffix(suffix)?.parse::<f64>().ok()? * factor)
}

/// The suffix of a quantity, and what it stands for.
fn unit(quantity: &str) -> (&'static str, f64) {
    const UNITS: [(&str, f64); 10] = [
        ("Ki", 1024.0),
        ("Mi", 1_048_576.0),
        ("Gi", 1_073_741_824.0),
        ("Ti", 1_099_511_627_776.0),
        ("m", 0.001),
        ("k", 1e3),
        ("M", 1e6),
        ("G", 1e9),
        ("T", 1e12),
        ("", 1.0),
    ];
    UNITS.into_iter().find(|(suffix, _)| quantity.ends_with(suffix)).unwrap_or(("", 1.0))
}

/// At most one decimal.
fn format_value(value: f64) -> String {
    let text = format!("{value:.1}");
    text.strip_suffix(".0").map_or(text.clone(), Into::into)
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    const EXCEEDED: &str = "Error creating: pods \"j-1-1-abcde\" is forbidden: exceeded quota: team-gpus, \
        requested: requests.nvidia.com/gpu=4, used: requests.nvidia.com/gpu=7, limited: requests.nvidia.com/gpu=8";

    fn quota(resource: &str, hard: &str, used: &str) -> ResourceQuota {
        serde_json::from_value(json!({
            "metadata": {"name": "team-gpus"},
            "status": {"hard": {resource: hard}, "used": {resource: used}},
        }))
        .unwrap()
    }

    #[test]
    fn a_full_quota_is_named_with_what_is_free_now() {
        let refusal = Refusal::of_pod(EXCEEDED, &[quota("requests.nvidia.com/gpu", "8", "7")]);
        assert_eq!(refusal.reason, reason::QUOTA_EXCEEDED);
        assert_eq!(refusal.message, "needs 4 nvidia.com/gpu, 1 of 8 free in ResourceQuota team-gpus");
    }

    #[test]
    fn memory_is_told_in_the_quotas_own_unit() {
        let event = "Error creating: pods \"p\" is forbidden: exceeded quota: team-gpus, requested: requests.memory=2Gi, \
            used: requests.memory=512Mi, limited: requests.memory=2Gi";
        let refusal = Refusal::of_pod(event, &[quota("requests.memory", "2Gi", "512Mi")]);
        assert_eq!(refusal.message, "needs 2Gi memory, 1.5Gi of 2Gi free in ResourceQuota team-gpus");
    }

    #[test]
    fn without_the_quota_the_event_speaks() {
        let refusal = Refusal::of_pod(EXCEEDED, &[]);
        assert!(refusal.message.starts_with("pods \"j-1-1-abcde\" is forbidden"), "{}", refusal.message);
    }

    #[test]
    fn a_pod_refused_by_policy_is_no_quota() {
        let refusal = Refusal::of_pod("Error creating: admission webhook \"policy\" denied the request: no", &[]);
        assert_eq!(refusal.reason, reason::ADMISSION_REFUSED);
        assert_eq!(refusal.message, "admission webhook \"policy\" denied the request: no");
    }

    #[test]
    fn refused_creations_are_told_from_other_errors() {
        let status = |code, message: &str| Status { code, message: message.into(), ..Status::default() };
        let refused = Refusal::of_creation("Job a", &status(403, "exceeded quota: jobs")).unwrap();
        assert_eq!(refused.reason, reason::QUOTA_EXCEEDED);
        let webhook_down = status(500, "Internal error occurred: failed calling webhook \"mjob.kb.io\": no endpoints");
        assert_eq!(Refusal::of_creation("Job a", &webhook_down).unwrap().reason, reason::ADMISSION_REFUSED);
        assert_eq!(Refusal::of_creation("Job a", &status(500, "etcdserver: request timed out")), None);
        let invalid =
            Refusal::of_creation("Job a", &status(422, "Job.batch \"a\" is invalid: cpu: must be at least 0")).unwrap();
        assert_eq!((invalid.reason, invalid.is_final), (reason::INVALID, true));
        let policy = status(422, "jobs.batch \"a\" is forbidden: ValidatingAdmissionPolicy 'p' denied request: no");
        assert!(!Refusal::of_creation("Job a", &policy).unwrap().is_final);
        assert_eq!(Refusal::of_creation("Job a", &status(404, "namespaces \"x\" not found")), None);
    }
}
