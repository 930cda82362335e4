//! Objects as the API server sent them: their metadata are read, without what nobody needs; spec and status lie there as text
//! until somebody asks. Reading ten thousand objects takes a tenth of the time this way, and one that can't be read stops
//! nobody else.

use std::{borrow::Cow, collections::BTreeMap, marker::PhantomData};

use k8s_openapi::apimachinery::pkg::apis::meta::v1::{OwnerReference, Time};
use kube::{
    Resource,
    api::ObjectMeta,
    core::{DeserializeGuard, error_boundary::InvalidObject},
};
use serde::{Deserialize, Deserializer, Serialize, de::DeserializeOwned};
use serde_json::value::RawValue;

use super::Guarded;

/// The annotation in which kubectl keeps a whole object a second time.
const LAST_APPLIED: &str = "kubectl.kubernetes.io/last-applied-configuration";

/// An object of kind `K` as it was sent.
#[derive(Clone, Debug)]
pub struct Raw<K> {
    /// Its metadata, without managed fields.
    pub metadata: ObjectMeta,
    body: Body,
    kind: PhantomData<fn() -> K>,
}

#[derive(Clone, Debug, Default, Serialize, Deserialize)]
struct Body {
    #[serde(skip_serializing_if = "Option::is_none")]
    spec: Option<Box<RawValue>>,
    #[serde(skip_serializing_if = "Option::is_none")]
    status: Option<Box<RawValue>>,
}

/// What of the metadata somebody reads.
#[derive(Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
struct Metadata {
    name: Option<String>,
    namespace: Option<String>,
    uid: Option<String>,
    resource_version: Option<String>,
    generation: Option<i64>,
    creation_timestamp: Option<Time>,
    deletion_timestamp: Option<Time>,
    labels: Option<BTreeMap<String, String>>,
    annotations: Option<BTreeMap<String, String>>,
    owner_references: Option<Vec<OwnerReference>>,
}

/// What is packed: all of it, in the form that a typed object is read from.
#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct Whole<'a> {
    api_version: Cow<'a, str>,
    kind: Cow<'a, str>,
    metadata: &'a ObjectMeta,
    #[serde(flatten)]
    body: &'a Body,
}

impl<K: Resource<DynamicType = ()>> Raw<K> {
    /// The object as JSON.
    pub fn json(&self) -> Vec<u8> {
        let Self { metadata, body, .. } = self;
        let whole = Whole { api_version: K::api_version(&()), kind: K::kind(&()), metadata, body };
        // What was read as JSON can be written so.
        serde_json::to_vec(&whole).unwrap_or_default()
    }

    /// Its metadata as JSON.
    pub fn json_of_metadata(&self) -> Vec<u8> {
        Self { metadata: self.metadata.clone(), body: Body::default(), kind: PhantomData }.json()
    }

    /// A part of the spec, by serde's rules; None if it doesn't look so.
    pub fn spec<T: DeserializeOwned>(&self) -> Option<T> {
        serde_json::from_str(self.body.spec.as_ref()?.get()).ok()
    }

    /// A part of the status; None if it doesn't look so.
    pub fn status<T: DeserializeOwned>(&self) -> Option<T> {
        serde_json::from_str(self.body.status.as_ref()?.get()).ok()
    }
}

impl<K: Resource<DynamicType = ()> + DeserializeOwned> Raw<K> {
    /// All of it, or why it can't be read.
    pub fn read(&self) -> Guarded<K> {
        read(&self.json())
    }
}

/// An object from its JSON, or why it can't be read.
pub fn read<K: Resource<DynamicType = ()> + DeserializeOwned>(json: &[u8]) -> Guarded<K> {
    let unreadable = |error: serde_json::Error| {
        let invalid = InvalidObject { error: error.to_string(), metadata: ObjectMeta::default() };
        DeserializeGuard(Err(invalid))
    };
    match serde_json::from_slice(json) {
        Ok(object) => DeserializeGuard(Ok(object)),
        // It takes longer, and says what is wrong without a column of this JSON.
        Err(_) => serde_json::from_slice(json).unwrap_or_else(unreadable),
    }
}

impl<'de, K> Deserialize<'de> for Raw<K> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        #[derive(Deserialize)]
        struct Sent {
            #[serde(default)]
            metadata: Metadata,
            spec: Option<Box<RawValue>>,
            status: Option<Box<RawValue>>,
        }
        let Sent { metadata, spec, status } = Sent::deserialize(deserializer)?;
        let annotations = metadata.annotations.map(|mut annotations| {
            annotations.remove(LAST_APPLIED);
            annotations
        });
        let metadata = ObjectMeta {
            name: metadata.name,
            namespace: metadata.namespace,
            uid: metadata.uid,
            resource_version: metadata.resource_version,
            generation: metadata.generation,
            creation_timestamp: metadata.creation_timestamp,
            deletion_timestamp: metadata.deletion_timestamp,
            labels: metadata.labels,
            annotations: annotations.filter(|annotations| !annotations.is_empty()),
            owner_references: metadata.owner_references,
            ..Default::default()
        };
        Ok(Self { metadata, body: Body { spec, status }, kind: PhantomData })
    }
}

impl<K: Resource<DynamicType = ()>> Resource for Raw<K> {
    type DynamicType = ();
    type Scope = K::Scope;

    fn kind(_: &()) -> Cow<'_, str> {
        K::kind(&())
    }

    fn group(_: &()) -> Cow<'_, str> {
        K::group(&())
    }

    fn version(_: &()) -> Cow<'_, str> {
        K::version(&())
    }

    fn plural(_: &()) -> Cow<'_, str> {
        K::plural(&())
    }

    fn meta(&self) -> &ObjectMeta {
        &self.metadata
    }

    fn meta_mut(&mut self) -> &mut ObjectMeta {
        &mut self.metadata
    }
}

#[cfg(test)]
mod tests {
    use kube::{ResourceExt, core::WatchEvent};
    use serde_json::{Value, json};
    use tunesmith_crds::FineTuneJob;

    use super::*;
    use crate::fixtures::job;

    fn sent(spec: Value) -> Value {
        let mut object = serde_json::to_value(job(spec)).unwrap();
        object["metadata"]["managedFields"] = json!([{"manager": "kubectl", "fieldsV1": {"f:spec": {}}}]);
        object["metadata"]["annotations"] = json!({LAST_APPLIED: "{}", "tunesmith.dev/retry-at": "now"});
        object
    }

    fn raw(object: &Value) -> Raw<FineTuneJob> {
        serde_json::from_str(&object.to_string()).unwrap()
    }

    #[test]
    fn an_object_is_read_as_it_was_sent_without_what_nobody_reads() {
        let mut object = sent(json!({}));
        object["status"] = json!({"phase": "Running", "message": "trains"});
        let read = raw(&object).read().0.unwrap();
        assert_eq!(read.annotations().keys().collect::<Vec<_>>(), ["tunesmith.dev/retry-at"]);
        assert_eq!(read.metadata.managed_fields, None);
        let typed: FineTuneJob = serde_json::from_value(object).unwrap();
        assert_eq!((read.spec, read.status, read.metadata.uid), (typed.spec, typed.status, typed.metadata.uid));
    }

    #[test]
    fn one_that_can_not_be_read_says_why_and_whose_it_is() {
        let mut object = sent(json!({}));
        object["spec"]["output"]["uri"] = json!("file:///");
        let invalid = raw(&object).read().0.unwrap_err();
        assert!(invalid.error.contains("file:///") && !invalid.error.contains("column"), "{invalid}");
        assert_eq!(invalid.metadata.name.as_deref(), Some("j"));
    }

    #[test]
    fn a_watch_brings_them() {
        let event = json!({"type": "MODIFIED", "object": sent(json!({}))}).to_string();
        let event: WatchEvent<Raw<FineTuneJob>> = serde_json::from_str(&event).unwrap();
        let WatchEvent::Modified(object) = event else { panic!() };
        assert!(object.read().0.is_ok());
    }
}
