//! `m.cgroup`: the client's control group, its attributes and those above it.
//!
//! Contract: an object is a path and a mail. The group's directory is closed when the handler ends,
//! and the descriptor of the client's process with the mail. Two objects of the same path are
//! equal.
//!
//! # Failure
//! The group of a client that has exited raises, and so does an error of the system. A missing
//! attribute is nil. A stale object raises `Stale object`.

use std::sync::Arc;

use mlua::{
    Function, IntoLua, Lua, MetaMethod, UserDataFields as _, UserDataMethods as _, UserDataRef,
    UserDataRegistry, Value,
};
use nix::unistd::Pid;
use qrelay_shared::ipc::message::Peer;

use crate::client::cache::clients;
use crate::client::cgroup::{Cgroup, CgroupError, hierarchy, parent};
use crate::client::process::Client;
use crate::lua::binding::convert;
use crate::lua::binding::error::Raise;
use crate::lua::binding::function::{self, Class};
use crate::lua::binding::strings::Strings;
use crate::lua::engine::slot::Slot;
use crate::lua::library::mail_object::MailObject;
use crate::mail::{Assumed, Mail};

/// A group as a mail's script sees it.
#[derive(Clone)]
struct Handle {
    slot: Arc<Slot>,
    path: Arc<[u8]>,
}

/// The userdata of a group.
struct CgroupObject(Handle);

/// The userdata of its attributes.
struct XattrObject(Handle);

impl IntoLua for CgroupObject {
    fn into_lua(self, lua: &Lua) -> mlua::Result<Value> {
        lua.create_any_userdata(self).map(Value::UserData)
    }
}

impl IntoLua for XattrObject {
    fn into_lua(self, lua: &Lua) -> mlua::Result<Value> {
        lua.create_any_userdata(self).map(Value::UserData)
    }
}

impl From<CgroupError> for Raise {
    fn from(error: CgroupError) -> Self {
        Self::Text(error.to_string())
    }
}

impl Handle {
    /// Works on the group, if its mail is still there.
    fn with<R>(&self, f: impl FnOnce(&Cgroup) -> Result<R, Raise>) -> Result<R, Raise> {
        self.slot.with(|_, cgroups| {
            let own = cgroups.iter().find(|cgroup| **cgroup.path() == *self.path);
            f(own.ok_or("Stale object")?)
        })
    }

    /// Returns the parent group.
    fn parent(&self) -> Result<Option<Self>, Raise> {
        self.slot.with(|mail, cgroups| {
            let Some(path) = parent(&self.path) else { return Ok(None) };
            if !cgroups.iter().any(|cgroup| &**cgroup.path() == path) {
                cgroups.push(match mail.assumed() {
                    Some(Assumed::Group(_)) => hierarchy().assumed(path)?,
                    Some(Assumed::Process) | None => hierarchy().group(path)?,
                });
            }
            Ok(Some(Self { slot: Arc::clone(&self.slot), path: path.into() }))
        })
    }
}

/// Adds the attribute to the class of mail objects.
///
/// # Errors
/// Lua is out of memory.
pub(crate) fn attribute(class: &mut Class<'_>) -> mlua::Result<()> {
    class.getter("cgroup", |lua, this: &MailObject| {
        let Some(path) = this.slot().with(client)? else { return Ok(None) };
        if let Some(object) = this.cgroup.get() {
            return Ok(Some(object.clone()));
        }
        let object = CgroupObject(Handle { slot: Arc::clone(this.slot()), path });
        let object = lua.create_any_userdata(object)?;
        Ok(Some(this.cgroup.get_or_init(|| object).clone()))
    })
}

/// Returns the path of the client's group and adds the group to the list.
fn client(mail: &mut Mail, cgroups: &mut Vec<Cgroup>) -> Result<Option<Arc<[u8]>>, Raise> {
    if cgroups.is_empty() {
        let Peer::Local { pid: Some(pid), .. } = *mail.peer() else { return Ok(None) };
        let pid = Pid::from_raw(pid);
        let group = match mail.assumed() {
            Some(Assumed::Group(path)) => Some(hierarchy().assumed(path)?),
            Some(Assumed::Process) => {
                let client = Client::by_number(pid, u64::MAX).map_err(CgroupError::from)?;
                let id = client.check().map_err(CgroupError::from)?;
                hierarchy().of_client(&client, id)?
            }
            None => {
                let (client, id) = clients().of(mail.socket(), pid).map_err(CgroupError::from)?;
                hierarchy().of_client(mail.keep_client(client), id)?
            }
        };
        cgroups.extend(group);
    }
    Ok(cgroups.first().map(|cgroup| Arc::clone(cgroup.path())))
}

/// Makes the classes of groups and of their attributes.
///
/// # Errors
/// Lua is out of memory.
pub(crate) fn register(lua: &Lua) -> mlua::Result<()> {
    let paths = Strings::default();
    let class = move |lua: &Lua, (this, key): (UserDataRef<CgroupObject>, Value)| {
        group_attribute(lua, &this.0, &key, &paths)
    };
    let index = function::internal(lua, class)?;
    let newindex = read_only(lua, "a cgroup")?;
    lua.register_userdata_type::<CgroupObject>(|registry| {
        fields(registry, "cgroup", index, newindex);
        registry
            .add_meta_method(MetaMethod::ToString, |lua, this, ()| lua.create_string(&this.0.path));
        registry.add_meta_function(MetaMethod::Eq, |_, (a, b): (Value, Value)| {
            Ok(path_of::<CgroupObject>(&a, |object| &object.0)
                == path_of::<CgroupObject>(&b, |object| &object.0))
        });
    })?;
    let index = function::internal(lua, |lua, (this, key): (UserDataRef<XattrObject>, Value)| {
        xattr(lua, &this.0, &key)
    })?;
    let newindex = read_only(lua, "a cgroup's attributes")?;
    let pairs = pairs(lua)?;
    lua.register_userdata_type::<XattrObject>(|registry| {
        fields(registry, "xattr", index, newindex);
        registry.add_meta_field(MetaMethod::Pairs, pairs);
        registry.add_meta_function(MetaMethod::Eq, |_, (a, b): (Value, Value)| {
            Ok(path_of::<XattrObject>(&a, |object| &object.0)
                == path_of::<XattrObject>(&b, |object| &object.0))
        });
    })
}

fn fields<T: 'static>(
    registry: &mut UserDataRegistry<T>,
    name: &'static str,
    index: Function,
    newindex: Function,
) {
    registry.add_meta_field("__name", name);
    registry.add_meta_field(MetaMethod::Index, index);
    registry.add_meta_field(MetaMethod::NewIndex, newindex);
}

fn read_only(lua: &Lua, what: &'static str) -> mlua::Result<Function> {
    function::internal(lua, move |_, _: (Value, Value, Value)| -> Result<(), Raise> {
        Err(format!("{what} can't be changed").into())
    })
}

/// Returns the path, by which two objects are equal; `None` for an object of another kind.
fn path_of<T: 'static>(value: &Value, handle: fn(&T) -> &Handle) -> Option<Arc<[u8]>> {
    let object = value.as_userdata()?.borrow::<T>().ok()?;
    Some(Arc::clone(&handle(&object).path))
}

fn group_attribute(
    lua: &Lua,
    handle: &Handle,
    key: &Value,
    paths: &Strings,
) -> Result<Value, Raise> {
    handle.with(|_| Ok(()))?;
    let Value::String(key) = key else { return Ok(Value::Nil) };
    let value = match &*key.as_bytes() {
        b"path" => paths.get(lua, &handle.path)?.into_lua(lua)?,
        b"xattr" => XattrObject(handle.clone()).into_lua(lua)?,
        b"parent" => handle.parent()?.map(CgroupObject).into_lua(lua)?,
        _ => Value::Nil,
    };
    Ok(value)
}

fn xattr(lua: &Lua, handle: &Handle, key: &Value) -> Result<Value, Raise> {
    let name = convert::text(key)?;
    let value = handle.with(|cgroup| match &name {
        Some(name) => Ok(cgroup.attribute(name)?),
        None => Ok(None),
    })?;
    Ok(value.map(|value| lua.create_string(value)).transpose()?.into_lua(lua)?)
}

/// Makes `pairs()` over the attributes' full names; it iterates over a copy.
fn pairs(lua: &Lua) -> mlua::Result<Function> {
    let next: Function = lua.globals().get("next")?;
    function::internal(lua, move |lua, this: UserDataRef<XattrObject>| {
        let all = this.0.with(|cgroup| Ok(cgroup.attributes()?))?;
        let table = lua.create_table_with_capacity(0, all.len())?;
        for (name, value) in all {
            table.raw_set(lua.create_string(name)?, lua.create_string(value)?)?;
        }
        Ok((next.clone(), table))
    })
}
