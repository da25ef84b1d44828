//! `m:exec(program, arg…, [options])` and `m:exec_raw(…)`: their arguments.
//!
//! Contract: as [`crate::delivery::action::Exec`] says. Arguments are texts without NUL; the last
//! one may be a table of options.
//!
//! # Failure
//! Wrong arguments raise. A missing program shows only when it is run.

use std::ffi::CString;
use std::sync::Arc;

use mlua::{MultiValue, Value};

use crate::delivery::action::{Action, Exec};
use crate::lua::binding::convert::{self, Argument, MAX_TIMEOUT, Options};
use crate::lua::binding::error::Raise;
use crate::lua::binding::function::Class;
use crate::lua::library::action_object::ActionObject;
use crate::lua::library::mail_object::{This, alive};

/// Most arguments, the program included.
const MAX_ARGUMENTS: usize = 2048;
/// Bytes of arguments and environment with their NULs; the kernel takes 2 MiB by default.
const MAX_BYTES: usize = 1 << 20;
/// Most environment variables.
const MAX_ENVIRONMENT: usize = 32;

/// Adds the methods to the class of mail objects.
///
/// # Errors
/// Lua is out of memory.
pub(super) fn methods(class: &mut Class<'_>) -> mlua::Result<()> {
    method(class, "exec", Action::Exec)?;
    method(class, "exec_raw", Action::ExecRaw)
}

fn method(
    class: &mut Class<'_>,
    name: &'static str,
    action: fn(Arc<Exec>) -> Action,
) -> mlua::Result<()> {
    class.method(name, move |_, (this, arguments): (This, MultiValue)| {
        alive(&this)?;
        Ok(ActionObject::new(action(Arc::new(exec(name, arguments)?))))
    })
}

fn exec(function: &str, mut values: MultiValue) -> Result<Exec, Raise> {
    if let [Value::Table(_)] = values.as_slices().0 {
        return Err(format!(
            "{function}: got a table, expected the program and its arguments one by one, as in \
             m:{function}('/usr/sbin/sendmail', '-t')"
        )
        .into());
    }
    let position = values.len();
    let options = match values.back() {
        Some(Value::Table(_)) => values.pop_back().unwrap_or(Value::Nil),
        _ => Value::Nil,
    };
    let options = Options::new(function, position, &options, &["env", "timeout"])?;
    let mut exec =
        Exec { arguments: arguments(function, &values)?, environment: Vec::new(), timeout: None };
    if let Some((key, value)) = options.get("timeout")? {
        exec.timeout = Some(key.duration(&value, MAX_TIMEOUT)?);
    }
    if let Some((key, value)) = options.get("env")? {
        exec.environment = environment(&key, &value)?;
    }
    let strings = exec.arguments.iter().chain(&exec.environment);
    let bytes: usize = strings.map(|text| text.as_bytes_with_nul().len()).sum();
    if bytes > MAX_BYTES {
        return Err(format!(
            "{function}: arguments and environment have {bytes} bytes, expected at most {MAX_BYTES}"
        )
        .into());
    }
    Ok(exec)
}

fn arguments(function: &str, values: &MultiValue) -> Result<Vec<CString>, Raise> {
    let program = Argument::new(function, 1, "program");
    let first = values.front().unwrap_or(&Value::Nil);
    if !program.text(first)?.contains(&b'/') {
        return Err(program.wrong("a path with a '/', such as '/usr/sbin/sendmail'", first));
    }
    if values.len() > MAX_ARGUMENTS {
        let got = values.len();
        return Err(
            format!("{function}: expected at most {MAX_ARGUMENTS} arguments, got {got}").into()
        );
    }
    let texts = values.iter().enumerate();
    texts.map(|(i, value)| c_string(&Argument::new(function, i + 1, "argument"), value)).collect()
}

fn c_string(argument: &Argument<'_>, value: &Value) -> Result<CString, Raise> {
    let text = argument.text(value)?;
    CString::new(&*text).map_err(|_| argument.wrong("text without NUL bytes", value))
}

fn environment(argument: &Argument<'_>, value: &Value) -> Result<Vec<CString>, Raise> {
    let mut variables = Vec::new();
    for pair in argument.table(value)?.pairs::<Value, Value>() {
        let (key, value) = pair?;
        let name = match &key {
            Value::String(name) if is_variable_name(&name.as_bytes()) => name.as_bytes(),
            _ => return Err(argument.wrong("names of letters, digits and '_'", &key)),
        };
        let Some(text) = convert::text(&value)? else {
            return Err(argument.wrong("string values", &value));
        };
        let variable = CString::new([&*name, b"=", &*text].concat());
        variables.push(variable.map_err(|_| argument.wrong("values without NUL bytes", &value))?);
    }
    if variables.len() > MAX_ENVIRONMENT {
        let got = variables.len();
        return Err(
            argument.invalid(&format!("expected at most {MAX_ENVIRONMENT} variables, got {got}"))
        );
    }
    variables.sort();
    Ok(variables)
}

/// POSIX 8.1: letters, digits and `_`, not starting with a digit.
fn is_variable_name(name: &[u8]) -> bool {
    name.first().is_some_and(|b| !b.is_ascii_digit())
        && name.iter().all(|&b| b.is_ascii_alphanumeric() || b == b'_')
}
