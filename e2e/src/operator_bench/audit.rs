//! Every request of the operator, as the API server's audit log tells it. A replica is known by the credential that its
//! token carries.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{BufRead, BufReader, Seek, SeekFrom};
use std::path::PathBuf;

use anyhow::{Context, Result};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::MicroTime;
use k8s_openapi::jiff::Timestamp;
use serde::Deserialize;

use super::NAMESPACE;
use crate::control_plane::ExtraFlags;
use crate::site::Site;

/// In which an API server tells the id of the token that a request came with.
const CREDENTIAL: &str = "authentication.kubernetes.io/credential-id";

/// One request.
#[derive(Clone, Debug)]
pub(crate) struct Call {
    pub(crate) verb: String,
    /// Plural and subresource: `finetunejobs/status`.
    pub(crate) resource: String,
    pub(crate) namespace: String,
    pub(crate) name: String,
    pub(crate) code: i32,
    pub(crate) begun: Timestamp,
    pub(crate) ended: Timestamp,
    pub(crate) credential: String,
    uri: String,
}

impl Call {
    pub(crate) fn is_write(&self) -> bool {
        matches!(self.verb.as_str(), "create" | "update" | "patch" | "delete" | "deletecollection")
    }

    pub(crate) fn is_of_lease(&self) -> bool {
        self.resource == "leases"
    }

    /// A write that is not the lease's.
    pub(crate) fn is_work(&self) -> bool {
        self.is_write() && !self.is_of_lease()
    }

    pub(crate) fn is_accepted(&self) -> bool {
        self.code < 400
    }

    pub(crate) fn is_progress(&self) -> bool {
        self.uri.contains("fieldManager=tunesmith-progress")
    }

    /// Whether it is about an object that was made for this FineTuneJob: all their names begin with its name.
    pub(crate) fn is_about(&self, job: &str) -> bool {
        self.name.strip_prefix(job).is_some_and(|rest| rest.is_empty() || rest.starts_with(['-', '.']))
    }
}

/// The log, read as it grows.
pub(crate) struct Audit {
    path: PathBuf,
    read: u64,
    calls: Vec<Call>,
}

impl Audit {
    pub(crate) fn new(site: &Site) -> Self {
        Self { path: log(site), read: 0, calls: Vec::new() }
    }

    /// The flags that make the API server log what the operator's ServiceAccount does.
    pub(crate) fn flags(site: &Site) -> Result<ExtraFlags> {
        let policy = format!(
            "apiVersion: audit.k8s.io/v1\nkind: Policy\nomitStages: [RequestReceived]\nrules:\n\
             - level: Metadata\n  userGroups: ['system:serviceaccounts:{NAMESPACE}']\n- level: None\n"
        );
        let policy = site.write_config("audit-policy.yaml", &policy)?;
        let api_server = vec![
            format!("--audit-policy-file={}", policy.display()),
            format!("--audit-log-path={}", log(site).display()),
            "--audit-log-maxsize=0".into(),
        ];
        Ok(ExtraFlags { api_server, ..ExtraFlags::default() })
    }

    /// The calls that began since `start`, until now. A watch is one call, when it begins.
    pub(crate) fn since(&mut self, start: Timestamp) -> Result<Vec<Call>> {
        self.read()?;
        Ok(self.calls.iter().filter(|call| call.begun >= start).cloned().collect())
    }

    fn read(&mut self) -> Result<()> {
        let mut file = File::open(&self.path).with_context(|| format!("cannot open {}", self.path.display()))?;
        file.seek(SeekFrom::Start(self.read))?;
        let mut lines = BufReader::new(file);
        let mut line = String::new();
        while lines.read_line(&mut line)? > 0 {
            // The last one may not be whole yet.
            if !line.ends_with('\n') {
                break;
            }
            self.read += line.len() as u64;
            let event: Event = serde_json::from_str(&line).context("the audit log is damaged")?;
            self.calls.extend(event.call());
            line.clear();
        }
        Ok(())
    }
}

fn log(site: &Site) -> PathBuf {
    site.log("audit.log")
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Event {
    stage: String,
    verb: String,
    #[serde(rename = "requestURI")]
    request_uri: String,
    user: User,
    #[serde(default)]
    object_ref: ObjectRef,
    #[serde(default)]
    response_status: ResponseStatus,
    request_received_timestamp: MicroTime,
    stage_timestamp: MicroTime,
}

#[derive(Deserialize)]
struct User {
    #[serde(default)]
    extra: BTreeMap<String, Vec<String>>,
}

#[derive(Default, Deserialize)]
#[serde(default)]
struct ObjectRef {
    resource: String,
    subresource: String,
    namespace: String,
    name: String,
}

#[derive(Default, Deserialize)]
#[serde(default)]
struct ResponseStatus {
    code: i32,
}

impl Event {
    fn call(self) -> Option<Call> {
        let counts = match self.verb.as_str() {
            "watch" => "ResponseStarted",
            _ => "ResponseComplete",
        };
        let credential = self.user.extra.get(CREDENTIAL).and_then(|ids| ids.first());
        let ObjectRef { resource, subresource, namespace, name } = self.object_ref;
        (self.stage == counts).then(|| Call {
            verb: self.verb,
            resource: if subresource.is_empty() { resource } else { format!("{resource}/{subresource}") },
            namespace,
            name,
            code: self.response_status.code,
            begun: self.request_received_timestamp.0,
            ended: self.stage_timestamp.0,
            credential: credential.cloned().unwrap_or_default(),
            uri: self.request_uri,
        })
    }
}

/// The most of these calls that were under way at one time.
pub(crate) fn at_once<'a>(calls: impl IntoIterator<Item = &'a Call>) -> usize {
    let mut edges: Vec<(Timestamp, i64)> =
        calls.into_iter().flat_map(|call| [(call.begun, 1), (call.ended, -1)]).collect();
    // One that ends when another begins is not under way with it.
    edges.sort_unstable();
    let mut open = 0;
    edges
        .iter()
        .map(|(_, step)| {
            open += step;
            open
        })
        .max()
        .map_or(0, |most| most as usize)
}

/// How many of these calls there were of each verb and resource, the most frequent first.
pub(crate) fn census<'a>(calls: impl IntoIterator<Item = &'a Call>) -> String {
    let mut counts: BTreeMap<String, usize> = BTreeMap::new();
    for call in calls {
        let refused = if call.is_accepted() { String::new() } else { format!(" ({})", call.code) };
        *counts.entry(format!("{} {}{refused}", call.verb, call.resource)).or_default() += 1;
    }
    let mut counts: Vec<(String, usize)> = counts.into_iter().collect();
    counts.sort_by_key(|(_, count)| std::cmp::Reverse(*count));
    let counts: Vec<String> = counts.into_iter().map(|(what, count)| format!("{count} {what}")).collect();
    counts.join(", ")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn call(begun: i64, ended: i64) -> Call {
        let event = serde_json::json!({
            "stage": "ResponseComplete", "verb": "patch", "requestURI": "/x?fieldManager=tunesmith-progress",
            "user": {"extra": {CREDENTIAL: ["JTI=1"]}},
            "objectRef": {"resource": "finetunejobs", "subresource": "status", "namespace": "n", "name": "life-1"},
            "responseStatus": {"code": 200},
            "requestReceivedTimestamp": format!("2026-01-01T00:00:{begun:02}.000000Z"),
            "stageTimestamp": format!("2026-01-01T00:00:{ended:02}.000000Z"),
        });
        serde_json::from_value::<Event>(event).unwrap().call().unwrap()
    }

    #[test]
    fn an_event_of_the_audit_log_is_read() {
        let call = call(1, 2);
        assert_eq!((call.resource.as_str(), call.credential.as_str()), ("finetunejobs/status", "JTI=1"));
        assert!(call.is_work() && call.is_progress() && call.is_about("life-1") && !call.is_about("lif"));
    }

    #[test]
    fn a_name_that_only_begins_alike_is_another_job() {
        let other = Call { name: "life-12-1".into(), ..call(1, 2) };
        assert!(!other.is_about("life-1") && other.is_about("life-12"));
    }

    #[test]
    fn calls_that_touch_are_not_at_once() {
        assert_eq!(at_once(&[call(1, 3), call(2, 4), call(4, 5)]), 2);
        assert_eq!(at_once(&[]), 0);
    }
}
