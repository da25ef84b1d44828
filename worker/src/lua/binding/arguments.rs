//! How many arguments a function of qrelay takes.
//!
//! Contract: the parameters of a Rust function limit the number of its arguments. A missing
//! argument is nil, and the function itself checks it. Surplus nils at the end don't count, so that
//! a wrapper can pass its own optional arguments on. The check costs a comparison and allocates
//! nothing unless there is a surplus.
//!
//! # Failure
//! Surplus arguments raise an error with the function's name and both numbers.

use mlua::{AnyUserData, Either, FromLua, FromLuaMulti, MultiValue, UserDataRef, Value};

use crate::lua::binding::error::Raise;

/// The name of a function in error messages.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Name {
    /// A function. One whose name has a colon is called on its library, as in `pg:new(…)`.
    Function(&'static str),
    /// A method; the object isn't counted.
    Method(&'static str),
}

impl Name {
    /// Returns the name, and how many leading parameters the documentation doesn't count.
    fn shown(self) -> (&'static str, usize) {
        match self {
            Self::Function(name) => (name, usize::from(name.contains(':'))),
            Self::Method(name) => (name, 1),
        }
    }
}

/// The parameters of a function.
pub(crate) trait Arguments: Sized {
    /// The parameters, and all arguments after them.
    type Raw: FromLuaMulti + 'static;
    /// The number of parameters.
    const COUNT: usize;
    /// Separates the parameters from the surplus arguments.
    fn split(raw: Self::Raw) -> (Self, MultiValue);
}

/// A single parameter.
pub(crate) trait Single: FromLua + 'static {}

impl Single for Value {}
impl Single for AnyUserData {}
impl<T: 'static> Single for UserDataRef<T> {}
impl<T: 'static> Single for Either<UserDataRef<T>, Value> {}

impl Arguments for () {
    type Raw = MultiValue;
    const COUNT: usize = 0;

    fn split(raw: MultiValue) -> (Self, MultiValue) {
        ((), raw)
    }
}

/// Any number.
impl Arguments for MultiValue {
    type Raw = Self;
    const COUNT: usize = usize::MAX;

    fn split(raw: Self) -> (Self, MultiValue) {
        (raw, Self::new())
    }
}

/// An object, and any number.
impl<A: Single> Arguments for (A, MultiValue) {
    type Raw = Self;
    const COUNT: usize = usize::MAX;

    fn split(raw: Self) -> (Self, MultiValue) {
        (raw, MultiValue::new())
    }
}

impl<A: Single> Arguments for A {
    type Raw = (A, MultiValue);
    const COUNT: usize = 1;

    fn split(raw: Self::Raw) -> (Self, MultiValue) {
        raw
    }
}

macro_rules! several {
    ($count:literal: $($name:ident)*) => {
        impl<$($name: Single),*> Arguments for ($($name,)*) {
            type Raw = ($($name,)* MultiValue,);
            const COUNT: usize = $count;

            #[allow(non_snake_case, reason = "the names of types are those of the values, too")]
            fn split(raw: Self::Raw) -> (Self, MultiValue) {
                let ($($name,)* surplus,) = raw;
                (($($name,)*), surplus)
            }
        }
    };
}

several!(2: A B);
several!(3: A B C);
several!(4: A B C D);

/// Returns the arguments of a call.
///
/// # Errors
/// There are too many arguments.
pub(crate) fn checked<A: Arguments>(name: Name, raw: A::Raw) -> Result<A, Raise> {
    let (arguments, surplus) = A::split(raw);
    match surplus.iter().rposition(|value| !value.is_nil()) {
        None => Ok(arguments),
        Some(last) => Err(too_many(name, A::COUNT, A::COUNT + last + 1)),
    }
}

/// Returns the error for a function of `count` parameters that got `got` arguments.
fn too_many(name: Name, count: usize, got: usize) -> Raise {
    let (name, uncounted) = name.shown();
    let expected = match count.saturating_sub(uncounted) {
        0 => "no arguments".to_owned(),
        1 => "at most 1 argument".to_owned(),
        count => format!("at most {count} arguments"),
    };
    format!("{name}: expected {expected}, got {}", got.saturating_sub(uncounted)).into()
}
