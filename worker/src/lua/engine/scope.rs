//! Resources that end with a run of Lua, because a script must not keep them longer, such as a
//! database connection in a transaction.
//!
//! Contract: a library that makes such a resource for a script registers it with the scope of the
//! run ([`super::watch::Watch::scope`]). The end of the run, of whatever kind, ends the resource.
//! The garbage collector may come later.
//!
//! # Failure
//! None.

use std::sync::{Arc, OnceLock, Weak};

use parking_lot::Mutex;

/// Something that ends with the run in which it was made.
pub(crate) trait Resource: Send + Sync {
    /// Ends the resource, if it hasn't ended yet. Called without Lua; must not block.
    fn end(&self);
}

/// The resources of a run.
#[derive(Default)]
pub(crate) struct Scope(Mutex<Vec<Weak<dyn Resource>>>);

impl std::fmt::Debug for Scope {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_tuple("Scope").field(&self.0.lock().len()).finish()
    }
}

impl Scope {
    /// Adds a resource, which then ends with the run.
    pub(crate) fn add<R: Resource + 'static>(&self, resource: &Arc<R>) {
        let resource: Arc<dyn Resource> = Arc::<R>::clone(resource);
        let mut resources = self.0.lock();
        resources.retain(|other| other.strong_count() > 0);
        resources.push(Arc::downgrade(&resource));
    }

    /// Ends all resources, because the run is over.
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
