//! The library `sodium`: hexadecimal, random bytes, sealed boxes, signatures, by libsodium.
//!
//! Contract: keys, ciphertexts and signatures are binary strings. libsodium is initialised by the
//! first function that needs it; it starts no thread and keeps no state that a fork would
//! duplicate, since its random bytes are the kernel's. No error message shows a key.
//!
//! # Failure
//! Misuse raises, and so does a key of the wrong length. A text that can't be decoded or opened is
//! nil, without a message, as scripts of the original expect.

use std::sync::OnceLock;

use mlua::{Lua, LuaString, Table, Value};
use sodiumoxide::crypto::box_::{self, PublicKey, SecretKey};
use sodiumoxide::crypto::scalarmult::{self, GroupElement, Scalar};
use sodiumoxide::crypto::{sealedbox, sign};
use sodiumoxide::{hex, randombytes};

use crate::lua::binding::convert::Argument;
use crate::lua::binding::error::Raise;
use crate::lua::binding::function::function;

/// Most random bytes of one call: 1 MiB.
const MAX_RANDOM: u64 = 1 << 20;

/// Makes libsodium ready; cheap after the first time.
///
/// # Errors
/// libsodium can't be initialised: the system has no random numbers.
pub(super) fn ready() -> Result<(), Raise> {
    static READY: OnceLock<bool> = OnceLock::new();
    if *READY.get_or_init(|| sodiumoxide::init().is_ok()) {
        Ok(())
    } else {
        Err("libsodium can't be initialised".into())
    }
}

/// A key: text of exactly the length that its type has.
///
/// # Errors
/// The value is no text, or has another length; the message doesn't show the key.
pub(super) fn key<K>(
    argument: &Argument<'_>,
    value: &Value,
    length: usize,
    from_slice: fn(&[u8]) -> Option<K>,
) -> Result<K, Raise> {
    let text = argument.text(value)?;
    from_slice(&text).ok_or_else(|| {
        argument.invalid(&format!("expected a key of {length} bytes, got {}", text.len()))
    })
}

/// Makes the global `sodium`.
///
/// # Errors
/// Lua is out of memory.
pub(crate) fn register(lua: &Lua) -> mlua::Result<()> {
    let sodium = lua.create_table()?;
    bytes(lua, &sodium)?;
    boxes(lua, &sodium)?;
    signatures(lua, &sodium)?;
    lua.globals().set("sodium", sodium)
}

fn bytes(lua: &Lua, sodium: &Table) -> mlua::Result<()> {
    let bin2hex = function(lua, "bin2hex", |_, value: Value| {
        Ok(hex::encode(&*Argument::new("bin2hex", 1, "bytes").text(&value)?))
    })?;
    sodium.raw_set("bin2hex", bin2hex)?;
    let hex2bin = function(lua, "hex2bin", |lua, value: Value| {
        let text = Argument::new("hex2bin", 1, "hex").text(&value)?;
        optional(lua, hex::decode(&*text))
    })?;
    sodium.raw_set("hex2bin", hex2bin)?;
    let random = function(lua, "randombytes", |lua, value: Value| {
        let n = Argument::new("randombytes", 1, "n").integer(&value, 1, MAX_RANDOM)?;
        ready()?;
        // At most 1 MiB.
        Ok(lua.create_string(randombytes::randombytes(n as usize))?)
    })?;
    sodium.raw_set("randombytes", random)
}

/// Returns the bytes, or nil for an error.
fn optional(lua: &Lua, bytes: Result<Vec<u8>, ()>) -> Result<Option<LuaString>, Raise> {
    Ok(bytes.ok().map(|bytes| lua.create_string(bytes)).transpose()?)
}

fn boxes(lua: &Lua, sodium: &Table) -> mlua::Result<()> {
    let keypair = function(lua, "crypto_box_keypair", |lua, (): ()| {
        ready()?;
        let (pk, sk) = box_::gen_keypair();
        Ok((lua.create_string(pk)?, lua.create_string(&sk)?))
    })?;
    sodium.raw_set("crypto_box_keypair", keypair)?;
    sodium.raw_set("crypto_box_seal", function(lua, "crypto_box_seal", seal)?)?;
    sodium.raw_set("crypto_box_seal_open", function(lua, "crypto_box_seal_open", seal_open)?)?;
    let base = function(lua, "crypto_scalarmult_base", |lua, sk: Value| {
        let argument = Argument::new("crypto_scalarmult_base", 1, "sk");
        let scalar = key(&argument, &sk, scalarmult::SCALARBYTES, Scalar::from_slice)?;
        ready()?;
        Ok(lua.create_string(scalarmult::scalarmult_base(&scalar))?)
    })?;
    sodium.raw_set("crypto_scalarmult_base", base)
}

fn seal(lua: &Lua, (message, pk): (Value, Value)) -> Result<LuaString, Raise> {
    let message = Argument::new("crypto_box_seal", 1, "message").text(&message)?;
    let argument = Argument::new("crypto_box_seal", 2, "pk");
    let pk = key(&argument, &pk, box_::PUBLICKEYBYTES, PublicKey::from_slice)?;
    ready()?;
    if is_degenerate(&pk) {
        return Err(argument.invalid("this is not a public key"));
    }
    Ok(lua.create_string(sealedbox::seal(&message, &pk))?)
}

/// Whether the key is one of the few points to which nothing can be sealed. The binding doesn't
/// report that sealing failed, and its result would be zeros.
fn is_degenerate(pk: &PublicKey) -> bool {
    scalarmult::scalarmult(&Scalar([1; scalarmult::SCALARBYTES]), &GroupElement(pk.0)).is_err()
}

fn seal_open(
    lua: &Lua,
    (ciphertext, pk, sk): (Value, Value, Value),
) -> Result<Option<LuaString>, Raise> {
    let argument = |position, name| Argument::new("crypto_box_seal_open", position, name);
    let ciphertext = argument(1, "ciphertext").text(&ciphertext)?;
    let pk = key(&argument(2, "pk"), &pk, box_::PUBLICKEYBYTES, PublicKey::from_slice)?;
    let sk = key(&argument(3, "sk"), &sk, box_::SECRETKEYBYTES, SecretKey::from_slice)?;
    ready()?;
    optional(lua, sealedbox::open(&ciphertext, &pk, &sk))
}

fn signatures(lua: &Lua, sodium: &Table) -> mlua::Result<()> {
    let keypair = function(lua, "crypto_sign_keypair", |lua, (): ()| {
        ready()?;
        let (pk, sk) = sign::gen_keypair();
        Ok((lua.create_string(pk)?, lua.create_string(&sk)?))
    })?;
    sodium.raw_set("crypto_sign_keypair", keypair)?;
    let detached = function(lua, "crypto_sign_detached", |lua, (message, sk): (Value, Value)| {
        let argument = |position, name| Argument::new("crypto_sign_detached", position, name);
        let message = argument(1, "message").text(&message)?;
        let sk = signing_key(&argument(2, "sk"), &sk)?;
        ready()?;
        Ok(lua.create_string(sign::sign_detached(&message, &sk))?)
    })?;
    sodium.raw_set("crypto_sign_detached", detached)?;
    let verify = function(
        lua,
        "crypto_sign_verify_detached",
        |_, (signature, message, pk): (Value, Value, Value)| {
            let argument =
                |position, name| Argument::new("crypto_sign_verify_detached", position, name);
            let signature = argument(1, "signature").text(&signature)?;
            let message = argument(2, "message").text(&message)?;
            let pk = verification_key(&argument(3, "pk"), &pk)?;
            ready()?;
            Ok(verify(&signature, &message, &pk))
        },
    )?;
    sodium.raw_set("crypto_sign_verify_detached", verify)
}

/// The secret key of an Ed25519 pair: seed and public key, 64 bytes.
pub(super) fn signing_key(
    argument: &Argument<'_>,
    value: &Value,
) -> Result<sign::SecretKey, Raise> {
    key(argument, value, sign::SECRETKEYBYTES, sign::SecretKey::from_slice)
}

/// The public key of an Ed25519 pair, 32 bytes.
pub(super) fn verification_key(
    argument: &Argument<'_>,
    value: &Value,
) -> Result<sign::PublicKey, Raise> {
    key(argument, value, sign::PUBLICKEYBYTES, sign::PublicKey::from_slice)
}

/// Whether the bytes are a signature made with the key.
pub(super) fn verify(signature: &[u8], message: &[u8], pk: &sign::PublicKey) -> bool {
    sign::Signature::from_bytes(signature)
        .is_ok_and(|signature| sign::verify_detached(&signature, message, pk))
}
