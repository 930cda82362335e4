//! Objects that a watch has seen, found by keys: whose they are, and which adapter they belong to.

use std::{
    collections::{HashMap, HashSet},
    sync::{Arc, PoisonError, RwLock},
};

use kube::{Resource, ResourceExt, runtime::watcher::Event};
use tokio::sync::watch;

/// Namespace and name.
type Place = (Option<String>, String);

/// What a watch has seen, and the keys of each object.
pub struct Index<K> {
    keys: fn(&K) -> Vec<String>,
    seen: RwLock<Seen<K>>,
    listed: watch::Sender<bool>,
}

struct Seen<K> {
    objects: HashMap<Place, Arc<K>>,
    by_key: HashMap<String, HashSet<Place>>,
    /// Those of a list that is under way.
    relisted: HashSet<Place>,
}

impl<K: Resource<DynamicType = ()>> Index<K> {
    /// An empty one, for objects with these keys.
    pub fn new(keys: fn(&K) -> Vec<String>) -> Self {
        let seen = Seen { objects: HashMap::new(), by_key: HashMap::new(), relisted: HashSet::new() };
        Self { keys, seen: RwLock::new(seen), listed: watch::Sender::new(false) }
    }

    /// Takes in what the watch says; the objects that are new, changed or gone.
    pub fn take(&self, event: Event<K>) -> Vec<Arc<K>> {
        let mut seen = self.seen.write().unwrap_or_else(PoisonError::into_inner);
        match event {
            Event::Init => {
                seen.relisted.clear();
                Vec::new()
            }
            Event::InitApply(object) => {
                let object = seen.put(object, self.keys);
                seen.relisted.insert(place(&*object));
                vec![object]
            }
            Event::InitDone => {
                let relisted = std::mem::take(&mut seen.relisted);
                let gone: Vec<Place> =
                    seen.objects.keys().filter(|place| !relisted.contains(*place)).cloned().collect();
                let gone = gone.iter().filter_map(|place| seen.remove(place, self.keys)).collect();
                drop(seen);
                self.listed.send_replace(true);
                gone
            }
            Event::Apply(object) => vec![seen.put(object, self.keys)],
            Event::Delete(object) => {
                let last = seen.remove(&place(&object), self.keys);
                vec![last.unwrap_or_else(|| Arc::new(object))]
            }
        }
    }

    /// The objects that have this key.
    pub fn with_key(&self, key: &str) -> Vec<Arc<K>> {
        let seen = self.seen.read().unwrap_or_else(PoisonError::into_inner);
        let places = seen.by_key.get(key).into_iter().flatten();
        places.filter_map(|place| seen.objects.get(place).cloned()).collect()
    }

    /// The object of this name.
    pub fn named(&self, namespace: &str, name: &str) -> Option<Arc<K>> {
        let seen = self.seen.read().unwrap_or_else(PoisonError::into_inner);
        seen.objects.get(&(Some(namespace.to_owned()), name.to_owned())).cloned()
    }

    /// All of them.
    pub fn all(&self) -> Vec<Arc<K>> {
        let seen = self.seen.read().unwrap_or_else(PoisonError::into_inner);
        seen.objects.values().cloned().collect()
    }

    /// Resolves when the watch has listed once.
    pub async fn listed(&self) {
        // The sender lives as long as this.
        let _ = self.listed.subscribe().wait_for(|listed| *listed).await;
    }
}

impl<K: Resource<DynamicType = ()>> Seen<K> {
    fn put(&mut self, object: K, keys: fn(&K) -> Vec<String>) -> Arc<K> {
        let place = place(&object);
        self.remove(&place, keys);
        for key in keys(&object) {
            self.by_key.entry(key).or_default().insert(place.clone());
        }
        let object = Arc::new(object);
        self.objects.insert(place, object.clone());
        object
    }

    fn remove(&mut self, place: &Place, keys: fn(&K) -> Vec<String>) -> Option<Arc<K>> {
        let object = self.objects.remove(place)?;
        for key in keys(&object) {
            if let Some(places) = self.by_key.get_mut(&key) {
                places.remove(place);
                if places.is_empty() {
                    self.by_key.remove(&key);
                }
            }
        }
        Some(object)
    }
}

fn place(object: &impl ResourceExt) -> Place {
    (object.namespace(), object.name_any())
}

#[cfg(test)]
mod tests {
    use k8s_openapi::api::core::v1::Pod;
    use serde_json::json;

    use super::*;

    fn pod(name: &str, owner: &str) -> Pod {
        let owner = json!({"apiVersion": "batch/v1", "kind": "Job", "name": "j", "uid": owner});
        serde_json::from_value(json!({"metadata": {"namespace": "n", "name": name, "ownerReferences": [owner]}}))
            .unwrap()
    }

    fn owners(pod: &Pod) -> Vec<String> {
        pod.owner_references().iter().map(|owner| owner.uid.clone()).collect()
    }

    fn names(pods: &[Arc<Pod>]) -> Vec<String> {
        let mut names: Vec<String> = pods.iter().map(|pod| pod.name_any()).collect();
        names.sort();
        names
    }

    #[test]
    fn objects_are_found_by_their_keys_until_they_are_gone() {
        let index = Index::new(owners);
        index.take(Event::Apply(pod("a", "1")));
        index.take(Event::Apply(pod("b", "1")));
        index.take(Event::Apply(pod("a", "2")));
        assert_eq!((names(&index.with_key("1")), names(&index.with_key("2"))), (vec!["b".into()], vec!["a".into()]));
        index.take(Event::Delete(pod("b", "1")));
        assert_eq!(index.with_key("1"), []);
        assert_eq!(index.all().len(), 1);
    }

    #[tokio::test]
    async fn a_new_list_drops_what_it_lacks_and_tells_of_it() {
        let index = Index::new(owners);
        index.take(Event::Apply(pod("a", "1")));
        index.take(Event::Init);
        assert_eq!(names(&index.take(Event::InitApply(pod("b", "1")))), ["b"]);
        assert_eq!(names(&index.with_key("1")), ["a", "b"], "the old list counts until the new one is whole");
        assert_eq!(names(&index.take(Event::InitDone)), ["a"]);
        assert_eq!(names(&index.with_key("1")), ["b"]);
        index.listed().await;
    }
}
