//! Objects that a watch has seen, found by keys: whose they are, and which adapter they belong to.

use std::{
    collections::{HashMap, HashSet},
    marker::PhantomData,
    sync::{Arc, PoisonError, RwLock},
};

use kube::{Resource, ResourceExt, runtime::watcher::Event};
use serde::de::DeserializeOwned;
use tokio::sync::watch;

use super::{
    Guarded,
    packed::{Packed, Packer},
    raw::{Raw, read},
};

/// Namespace and name.
type Place = (Option<String>, String);

/// A kind of object that an index can hold.
pub trait Indexed: Resource<DynamicType = ()> + DeserializeOwned + Sized + 'static {
    /// What of an object is at hand without unpacking it.
    type Note: Clone + Send + Sync + 'static;

    /// Whether all of it is kept; else the note alone counts.
    const IS_KEPT: bool = true;

    /// What it is found by, besides its name.
    fn keys(object: &Raw<Self>) -> Vec<String>;

    /// What is at hand.
    fn note(object: &Raw<Self>) -> Self::Note;
}

/// What a watch has seen, and the keys of each object.
pub struct Index<K: Indexed> {
    seen: RwLock<Seen<K>>,
    packer: Packer,
    listed: watch::Sender<bool>,
}

struct Seen<K: Indexed> {
    objects: HashMap<Arc<Place>, Entry<K>>,
    by_key: HashMap<Arc<str>, Vec<Arc<Place>>>,
    /// Those of a list that is under way.
    relisted: HashSet<Arc<Place>>,
}

struct Entry<K: Indexed> {
    keys: Vec<Arc<str>>,
    note: K::Note,
    packed: Packed,
    kind: PhantomData<fn() -> K>,
}

impl<K: Indexed> Default for Index<K> {
    fn default() -> Self {
        let seen = Seen { objects: HashMap::new(), by_key: HashMap::new(), relisted: HashSet::new() };
        Self { seen: RwLock::new(seen), packer: Packer::default(), listed: watch::Sender::new(false) }
    }
}

impl<K: Indexed> Index<K> {
    /// Takes in what the watch says; the objects that are new, changed or gone.
    pub fn take(&self, event: Event<Raw<K>>) -> Vec<Raw<K>> {
        // Packed before anybody has to wait.
        let entry = match &event {
            Event::Apply(object) | Event::InitApply(object) => Some(Entry::of(object, &self.packer)),
            _ => None,
        };
        let mut seen = self.seen.write().unwrap_or_else(PoisonError::into_inner);
        match (event, entry) {
            (Event::InitApply(object), Some(entry)) => {
                let place = seen.put(&object, entry);
                seen.relisted.insert(place);
                vec![object]
            }
            (Event::Apply(object), Some(entry)) => {
                seen.put(&object, entry);
                vec![object]
            }
            (Event::Delete(object), _) => {
                seen.remove(&place(&object));
                vec![object]
            }
            (Event::InitDone, _) => {
                let relisted = std::mem::take(&mut seen.relisted);
                let gone: Vec<Arc<Place>> =
                    seen.objects.keys().filter(|place| !relisted.contains(*place)).cloned().collect();
                let gone = gone.iter().filter_map(|place| seen.remove(place)?.raw(&self.packer)).collect();
                drop(seen);
                self.listed.send_replace(true);
                gone
            }
            _ => {
                seen.relisted.clear();
                Vec::new()
            }
        }
    }

    /// The objects that have this key.
    pub fn with_key(&self, key: &str) -> Vec<Guarded<K>> {
        self.entries_with_key(key, |entry| entry.read(&self.packer))
    }

    /// What is at hand of the objects that have this key.
    pub fn notes_with_key(&self, key: &str) -> Vec<K::Note> {
        self.entries_with_key(key, |entry| entry.note.clone())
    }

    /// Namespace and name of the objects that have this key.
    pub fn places_with_key(&self, key: &str) -> Vec<Arc<Place>> {
        let seen = self.seen.read().unwrap_or_else(PoisonError::into_inner);
        seen.by_key.get(key).cloned().unwrap_or_default()
    }

    /// The object of this name.
    pub fn named(&self, namespace: &str, name: &str) -> Option<Guarded<K>> {
        let seen = self.seen.read().unwrap_or_else(PoisonError::into_inner);
        seen.objects.get(&(Some(namespace.to_owned()), name.to_owned())).map(|entry| entry.read(&self.packer))
    }

    /// Whether there is an object of this name.
    pub fn has(&self, namespace: &str, name: &str) -> bool {
        let seen = self.seen.read().unwrap_or_else(PoisonError::into_inner);
        seen.objects.contains_key(&(Some(namespace.to_owned()), name.to_owned()))
    }

    /// Namespace, name, and what is at hand of all objects.
    pub fn notes(&self) -> Vec<(Arc<Place>, K::Note)> {
        let seen = self.seen.read().unwrap_or_else(PoisonError::into_inner);
        seen.objects.iter().map(|(place, entry)| (place.clone(), entry.note.clone())).collect()
    }

    /// Resolves when the watch has listed once.
    pub async fn listed(&self) {
        // The sender lives as long as this.
        let _ = self.listed.subscribe().wait_for(|listed| *listed).await;
    }

    fn entries_with_key<T>(&self, key: &str, of: impl Fn(&Entry<K>) -> T) -> Vec<T> {
        let seen = self.seen.read().unwrap_or_else(PoisonError::into_inner);
        let places = seen.by_key.get(key).into_iter().flatten();
        places.filter_map(|place| seen.objects.get(place).map(&of)).collect()
    }
}

impl<K: Indexed> Seen<K> {
    fn put(&mut self, object: &Raw<K>, entry: Entry<K>) -> Arc<Place> {
        let place = Arc::new(place(object));
        self.remove(&place);
        let mut entry = entry;
        for key in &mut entry.keys {
            // One text for all that have this key.
            if let Some((known, _)) = self.by_key.get_key_value(key) {
                *key = known.clone();
            }
            self.by_key.entry(key.clone()).or_default().push(place.clone());
        }
        self.objects.insert(place.clone(), entry);
        place
    }

    fn remove(&mut self, place: &Place) -> Option<Entry<K>> {
        let entry = self.objects.remove(place)?;
        for key in &entry.keys {
            if let Some(places) = self.by_key.get_mut(key) {
                places.retain(|known| **known != *place);
                if places.is_empty() {
                    self.by_key.remove(key);
                }
            }
        }
        Some(entry)
    }
}

impl<K: Indexed> Entry<K> {
    fn of(object: &Raw<K>, packer: &Packer) -> Self {
        let keys = K::keys(object).into_iter().map(Arc::from).collect();
        let json = if K::IS_KEPT { object.json() } else { object.json_of_metadata() };
        Self { keys, note: K::note(object), packed: packer.pack(&json), kind: PhantomData }
    }

    fn read(&self, packer: &Packer) -> Guarded<K> {
        read(&packer.unpack(&self.packed))
    }

    fn raw(&self, packer: &Packer) -> Option<Raw<K>> {
        serde_json::from_slice(&packer.unpack(&self.packed)).ok()
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

    fn pod(name: &str, owner: &str) -> Raw<Pod> {
        let owner = json!({"apiVersion": "batch/v1", "kind": "Job", "name": "j", "uid": owner});
        let pod = json!({"metadata": {"namespace": "n", "name": name, "ownerReferences": [owner]}, "spec": {"containers": []}});
        serde_json::from_str(&pod.to_string()).unwrap()
    }

    fn names(pods: &[Raw<Pod>]) -> Vec<String> {
        let mut names: Vec<String> = pods.iter().map(|pod| pod.name_any()).collect();
        names.sort();
        names
    }

    fn owned_by(index: &Index<Pod>, owner: &str) -> Vec<String> {
        let mut names: Vec<String> = index.with_key(owner).into_iter().map(|pod| pod.0.unwrap().name_any()).collect();
        names.sort();
        names
    }

    #[test]
    fn objects_are_found_by_their_keys_until_they_are_gone() {
        let index = Index::default();
        index.take(Event::Apply(pod("a", "1")));
        index.take(Event::Apply(pod("b", "1")));
        index.take(Event::Apply(pod("a", "2")));
        assert_eq!((owned_by(&index, "1"), owned_by(&index, "2")), (vec!["b".into()], vec!["a".into()]));
        index.take(Event::Delete(pod("b", "1")));
        assert!(owned_by(&index, "1").is_empty());
        assert_eq!(index.notes().len(), 1);
        assert!(index.named("n", "a").unwrap().0.is_ok());
    }

    #[tokio::test]
    async fn a_new_list_drops_what_it_lacks_and_tells_of_it() {
        let index = Index::default();
        index.take(Event::Apply(pod("a", "1")));
        index.take(Event::Init);
        assert_eq!(names(&index.take(Event::InitApply(pod("b", "1")))), ["b"]);
        assert_eq!(owned_by(&index, "1"), ["a", "b"], "the old list counts until the new one is whole");
        assert_eq!(names(&index.take(Event::InitDone)), ["a"]);
        assert_eq!(owned_by(&index, "1"), ["b"]);
        index.listed().await;
    }
}
