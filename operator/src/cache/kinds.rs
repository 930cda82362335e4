//! What the operator watches: how each kind is found, and what of it is at hand without reading all of it.

use std::sync::Arc;

use k8s_openapi::{
    api::{
        batch::v1::Job,
        core::v1::{Node, NodeStatus, Pod},
    },
    apimachinery::pkg::apis::meta::v1::Time,
};
use kube::ResourceExt;
use serde::Deserialize;
use tunesmith_crds::{
    AdapterVersion, AdapterVersionPhase, FineTuneJob, FineTuneJobPhase as Phase, FineTuneRun, GpuClass,
    fine_tune_run::RunStage, names::ADAPTER_LABEL,
};

use super::{index::Indexed, raw::Raw};

/// What of a FineTuneJob is at hand.
#[derive(Clone, Debug, PartialEq)]
pub struct JobNote {
    /// Its phase; Failed for one that can't be read.
    pub phase: Phase,
    /// Whether its spec was served to the end.
    pub is_over: bool,
    /// The GpuClass that it asks for by name.
    pub class: Option<Box<str>>,
}

/// What of a FineTuneRun is at hand.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct RunNote {
    /// UID of its job.
    pub job_uid: Box<str>,
    /// The highest version that it has settled on, 0 if none.
    pub version: u32,
    /// The GpuClass that it is planned onto, until it is over.
    pub class: Option<Box<str>>,
}

impl Indexed for FineTuneJob {
    type Note = JobNote;

    /// Its adapter: jobs may reuse each other's versions.
    fn keys(object: &Raw<Self>) -> Vec<String> {
        #[derive(Deserialize)]
        struct Spec {
            output: Output,
        }
        #[derive(Deserialize)]
        #[serde(rename_all = "camelCase")]
        struct Output {
            adapter_name: String,
        }
        let spec = object.spec::<Spec>();
        spec.map(|spec| adapter_key(object, &spec.output.adapter_name)).into_iter().collect()
    }

    fn note(object: &Raw<Self>) -> JobNote {
        #[derive(Default, Deserialize)]
        #[serde(rename_all = "camelCase", default)]
        struct Status {
            phase: Option<Phase>,
            observed_generation: Option<i64>,
        }
        #[derive(Default, Deserialize)]
        #[serde(default)]
        struct Spec {
            resources: Option<Class>,
        }
        let status = object.status::<Status>().unwrap_or_default();
        let phase = status.phase.unwrap_or(Phase::Pending);
        JobNote {
            phase,
            is_over: matches!(phase, Phase::Succeeded | Phase::Failed)
                && status.observed_generation == object.metadata.generation,
            class: object.spec::<Spec>().and_then(|spec| spec.resources?.gpu_class),
        }
    }
}

impl Indexed for FineTuneRun {
    type Note = RunNote;

    /// The job that it belongs to, and its adapter.
    fn keys(object: &Raw<Self>) -> Vec<String> {
        let adapter = object.labels().get(ADAPTER_LABEL).map(|adapter| adapter_key(object, adapter));
        owners(object).into_iter().chain(adapter).collect()
    }

    fn note(object: &Raw<Self>) -> RunNote {
        #[derive(Deserialize)]
        struct Spec {
            job: Of,
        }
        #[derive(Deserialize)]
        struct Of {
            uid: Box<str>,
        }
        #[derive(Default, Deserialize)]
        #[serde(default)]
        struct Status {
            stage: Option<RunStage>,
            settled: Option<Version>,
            published: Option<Version>,
            plan: Option<Class>,
        }
        #[derive(Deserialize)]
        struct Version {
            version: u32,
        }
        let Status { stage, settled, published, plan } = object.status().unwrap_or_default();
        RunNote {
            job_uid: object.spec::<Spec>().map(|spec| spec.job.uid).unwrap_or_default(),
            version: settled.into_iter().chain(published).map(|version| version.version).max().unwrap_or(0),
            class: plan.and_then(|plan| plan.gpu_class).filter(|_| stage != Some(RunStage::Done)),
        }
    }
}

/// A part of resources and plans.
#[derive(Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
struct Class {
    gpu_class: Option<Box<str>>,
}

/// What of an AdapterVersion is at hand.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct VersionNote {
    /// When its files were last looked at, in seconds; None if it is not Available.
    pub inspected: Option<i64>,
}

impl Indexed for AdapterVersion {
    type Note = VersionNote;

    /// Its adapter.
    fn keys(object: &Raw<Self>) -> Vec<String> {
        #[derive(Deserialize)]
        #[serde(rename_all = "camelCase")]
        struct Spec {
            adapter_name: String,
        }
        let spec = object.spec::<Spec>();
        spec.map(|spec| adapter_key(object, &spec.adapter_name)).into_iter().collect()
    }

    fn note(object: &Raw<Self>) -> VersionNote {
        #[derive(Default, Deserialize)]
        #[serde(rename_all = "camelCase", default)]
        struct Status {
            phase: Option<AdapterVersionPhase>,
            verified_time: Option<Time>,
            inspected_time: Option<Time>,
        }
        let Status { phase, verified_time, inspected_time } = object.status().unwrap_or_default();
        let last = verified_time.into_iter().chain(inspected_time).map(|time| time.0.as_second()).max();
        VersionNote { inspected: (phase == Some(AdapterVersionPhase::Available)).then_some(last.unwrap_or(0)) }
    }
}

impl Indexed for Job {
    type Note = ();

    fn keys(object: &Raw<Self>) -> Vec<String> {
        owners(object)
    }

    fn note(_: &Raw<Self>) {}
}

impl Indexed for Pod {
    type Note = ();

    fn keys(object: &Raw<Self>) -> Vec<String> {
        owners(object)
    }

    fn note(_: &Raw<Self>) {}
}

impl Indexed for GpuClass {
    /// None if it can't be read.
    type Note = Option<Arc<GpuClass>>;

    const IS_KEPT: bool = false;

    fn keys(_: &Raw<Self>) -> Vec<String> {
        Vec::new()
    }

    fn note(object: &Raw<Self>) -> Self::Note {
        object.read().0.ok().map(Arc::new)
    }
}

impl Indexed for Node {
    /// Its labels, and what it can allocate.
    type Note = Option<Arc<Node>>;

    const IS_KEPT: bool = false;

    fn keys(_: &Raw<Self>) -> Vec<String> {
        Vec::new()
    }

    fn note(object: &Raw<Self>) -> Self::Note {
        let mut node = object.read().0.ok()?;
        node.spec = None;
        node.metadata.annotations = None;
        let allocatable = node.status.take().and_then(|status| status.allocatable);
        node.status = Some(NodeStatus { allocatable, ..Default::default() });
        Some(Arc::new(node))
    }
}

/// The UIDs of an object's owners.
fn owners(object: &impl ResourceExt) -> Vec<String> {
    object.owner_references().iter().map(|owner| owner.uid.clone()).collect()
}

/// What all of an adapter in a namespace are found by.
pub fn adapter_key(object: &impl ResourceExt, adapter: &str) -> String {
    format!("{}/{adapter}", object.namespace().unwrap_or_default())
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;
    use crate::fixtures::job;

    fn raw<K>(object: &Value) -> Raw<K> {
        serde_json::from_str(&object.to_string()).unwrap()
    }

    #[test]
    fn a_job_is_over_when_its_present_spec_was_served() {
        let mut object = serde_json::to_value(job(json!({"resources": {"gpuClass": "a100"}}))).unwrap();
        object["metadata"]["generation"] = json!(2);
        for (status, phase, is_over) in [
            (json!(null), Phase::Pending, false),
            (json!({"phase": "Running", "observedGeneration": 2}), Phase::Running, false),
            (json!({"phase": "Succeeded", "observedGeneration": 1}), Phase::Succeeded, false),
            (json!({"phase": "Succeeded", "observedGeneration": 2}), Phase::Succeeded, true),
        ] {
            object["status"] = status;
            let note = FineTuneJob::note(&raw(&object));
            assert_eq!(note, JobNote { phase, is_over, class: Some("a100".into()) });
            assert_eq!(FineTuneJob::keys(&raw(&object)), ["team/support"]);
        }
    }

    #[test]
    fn a_run_holds_its_class_until_it_is_over_and_its_version_for_good() {
        let mut object = json!({
            "metadata": {"namespace": "n", "name": "j-1", "labels": {ADAPTER_LABEL: "a"}},
            "spec": {"job": {"uid": "u"}},
        });
        assert_eq!(FineTuneRun::note(&raw(&object)), RunNote { job_uid: "u".into(), ..RunNote::default() });
        object["status"] = json!({"stage": "Training", "settled": {"version": 3}, "plan": {"gpuClass": "a100"}});
        let note = RunNote { job_uid: "u".into(), version: 3, class: Some("a100".into()) };
        assert_eq!(FineTuneRun::note(&raw(&object)), note);
        object["status"] = json!({"stage": "Done", "settled": {"version": 3}, "published": {"version": 4}});
        assert_eq!(FineTuneRun::note(&raw(&object)), RunNote { version: 4, class: None, ..note });
        assert_eq!(FineTuneRun::keys(&raw(&object)), ["n/a"]);
    }

    #[test]
    fn a_version_that_is_served_was_last_looked_at_when_either_way_was_taken_last() {
        for (status, inspected) in [
            (json!(null), None),
            (json!({"phase": "Rejected", "verifiedTime": "1970-01-01T00:01:00Z"}), None),
            (json!({"phase": "Available"}), Some(0)),
            (json!({"phase": "Available", "verifiedTime": "1970-01-01T00:01:00Z"}), Some(60)),
            (
                json!({
                    "phase": "Available",
                    "verifiedTime": "1970-01-01T00:01:00Z",
                    "inspectedTime": "1970-01-01T00:02:00Z",
                }),
                Some(120),
            ),
        ] {
            let object = json!({"metadata": {"namespace": "n", "name": "a-v1"}, "status": status});
            assert_eq!(AdapterVersion::note(&raw(&object)), VersionNote { inspected }, "{object}");
        }
    }
}
