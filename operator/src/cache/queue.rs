//! Which objects a controller looks at. Caches are kept by every replica, controllers run where the lease is: one that begins
//! looks at everything once, and from then on at what changes.

use std::sync::{Mutex, PoisonError};

use futures::stream::{pending, poll_fn};
use kube::{
    Resource, ResourceExt,
    api::{ObjectMeta, PartialObjectMeta, PartialObjectMetaExt},
    runtime::{
        Controller,
        reflector::{self, ObjectRef, Store, store::Writer},
        watcher::Event,
    },
};
use serde::de::DeserializeOwned;
use tokio::sync::mpsc::{UnboundedSender, unbounded_channel};

use super::raw::Raw;

/// Namespace, name and UID of an object.
pub type Name<K> = PartialObjectMeta<K>;

/// The objects of a kind, by name, and the controller that hears of their changes.
pub struct Queue<K: Resource<DynamicType = ()> + Clone + 'static> {
    names: Store<Name<K>>,
    listener: Mutex<Option<UnboundedSender<ObjectRef<Name<K>>>>>,
}

/// What a watch tells a queue.
pub struct Names<K: Resource<DynamicType = ()> + Clone + 'static>(Writer<Name<K>>);

impl<K> Queue<K>
where
    K: Resource<DynamicType = ()> + Clone + DeserializeOwned + std::fmt::Debug + Send + Sync + 'static,
{
    /// An empty one, and what fills it.
    pub fn new() -> (Self, Names<K>) {
        let (names, writer) = reflector::store();
        (Self { names, listener: Mutex::new(None) }, Names(writer))
    }

    /// An object is to be looked at. While no controller runs, nobody hears of it.
    pub fn wake(&self, namespace: &str, name: &str) {
        let listener = self.listener.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(listener) = &*listener {
            // One that has ended hears nothing.
            let _ = listener.send(ObjectRef::new(name).within(namespace));
        }
    }

    /// A controller that hears of changes from now on, in place of the one before.
    pub fn controller(&self) -> Controller<Name<K>> {
        let (sender, mut receiver) = unbounded_channel();
        *self.listener.lock().unwrap_or_else(PoisonError::into_inner) = Some(sender);
        Controller::for_stream(pending(), self.names.clone())
            .reconcile_on(poll_fn(move |context| receiver.poll_recv(context)))
    }
}

impl<K: Resource<DynamicType = ()> + Clone + 'static> Names<K> {
    /// Takes in what the watch says.
    pub fn take(&mut self, event: &Event<Raw<K>>) {
        let event = match event {
            Event::Init => Event::Init,
            Event::InitDone => Event::InitDone,
            Event::InitApply(object) => Event::InitApply(name_of(object)),
            Event::Apply(object) => Event::Apply(name_of(object)),
            Event::Delete(object) => Event::Delete(name_of(object)),
        };
        self.0.apply_watcher_event(&event);
    }
}

fn name_of<K: Resource<DynamicType = ()>>(object: &Raw<K>) -> Name<K> {
    let metadata = ObjectMeta {
        name: object.metadata.name.clone(),
        namespace: object.namespace(),
        uid: object.uid(),
        ..Default::default()
    };
    metadata.into_request_partial()
}
