//! What ends with a run of Lua: resources that a script holds and must not keep longer, such as a
//! database connection in a transaction.
//!
//! Contract: whoever makes such a resource for a script registers it with the scope of the run
//! ([`super::watch::Watch::scope`]); when the run ends, however it does, the resource is ended,
//! whether or not the garbage collector has come by.
//!
//! # Failure
//! None.

use std::sync::{Arc, OnceLock, Weak};

use parking_lot::Mutex;

/// Something that ends with the run in which it was made.
pub(crate) trait Resource: Send + Sync {
    /// Ends it, if it hasn't ended yet. Called without Lua; must not block.
    fn end(&self);
}

/// One run's resources.
#[derive(Default)]
pub(crate) struct Scope(Mutex<Vec<Weak<dyn Resource>>>);

impl std::fmt::Debug for Scope {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_tuple("Scope").field(&self.0.lock().len()).finish()
    }
}

impl Scope {
    /// The resource ends with this run.
    pub(crate) fn add<R: Resource + 'static>(&self, resource: &Arc<R>) {
        let resource: Arc<dyn Resource> = Arc::<R>::clone(resource);
        let mut resources = self.0.lock();
        resources.retain(|other| other.strong_count() > 0);
        resources.push(Arc::downgrade(&resource));
    }

    /// The run is over.
    pub(crate) fn end(&self) {
        let resources = std::mem::take(&mut *self.0.lock());
        resources.iter().filter_map(Weak::upgrade).for_each(|resource| resource.end());
    }
}

/// A run's scope, once it has been asked for; ended when this is dropped.
#[derive(Default, Debug)]
pub(crate) struct Ending(pub OnceLock<Arc<Scope>>);

impl Drop for Ending {
    fn drop(&mut self) {
        if let Some(scope) = self.0.get() {
            scope.end();
        }
    }
}
