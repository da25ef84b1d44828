//! The library `jwt`: JSON Web Tokens (RFC 7519) signed with Ed25519 (RFC 8037).
//!
//! Contract: `EdDSA` is the only algorithm, in both directions; a token's header can't choose
//! another. No part of a token is used before its signature has been verified. A header with
//! critical extensions is refused, because no extension of RFC 7519 is supported.
//!
//! # Failure
//! Misuse raises. A token that isn't valid is `nil, message`.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use mlua::{Lua, MultiValue, Table, Value};
use sodiumoxide::base64::{self, Variant::UrlSafeNoPadding};
use sodiumoxide::crypto::sign::{self, PublicKey, SecretKey};

use crate::lua::binding::convert::Argument;
use crate::lua::binding::error::Raise;
use crate::lua::binding::function::function;
use crate::lua::library::json;
use crate::lua::library::sodium;

/// The name of the algorithm (RFC 8037 3.1).
const ALGORITHM: &str = "EdDSA";

/// Makes the global `jwt`.
///
/// # Errors
/// Lua is out of memory.
pub(crate) fn register(lua: &Lua) -> mlua::Result<()> {
    let jwt = lua.create_table()?;
    jwt.raw_set("sign", function(lua, "jwt.sign", sign)?)?;
    jwt.raw_set("verify", function(lua, "jwt.verify", verify)?)?;
    lua.globals().set("jwt", jwt)
}

fn sign(lua: &Lua, (sk, header, payload): (Value, Value, Value)) -> Result<String, Raise> {
    let sk = sodium::signing_key(&Argument::new("jwt.sign", 1, "sk"), &sk)?;
    let header = signed_header(lua, &header)?;
    Argument::new("jwt.sign", 3, "payload").table(&payload)?;
    let header = json::dump(&Value::Table(header)).map_err(|e| e.into_raise("jwt.sign"))?;
    let payload = json::dump(&payload).map_err(|e| e.into_raise("jwt.sign"))?;
    if payload.first() != Some(&b'{') {
        return Err("jwt.sign: the payload is a sequence, expected names and values".into());
    }
    sodium::ready()?;
    Ok(compact(&sk, &header, &payload))
}

/// Returns a copy of the script's header with the algorithm, and with the type if it has none.
fn signed_header(lua: &Lua, value: &Value) -> Result<Table, Raise> {
    let argument = Argument::new("jwt.sign", 2, "header");
    let header = lua.create_table()?;
    if !value.is_nil() {
        for pair in argument.table(value)?.pairs::<Value, Value>() {
            let (key, value) = pair?;
            header.raw_set(key, value)?;
        }
    }
    let algorithm: Value = header.raw_get("alg")?;
    if !algorithm.is_nil() && !is_algorithm(&algorithm) {
        return Err(argument.invalid("alg can only be EdDSA"));
    }
    if header.contains_key("crit")? {
        return Err(argument.invalid("crit is not supported"));
    }
    header.raw_set("alg", ALGORITHM)?;
    if !header.contains_key("typ")? {
        header.raw_set("typ", "JWT")?;
    }
    Ok(header)
}

fn is_algorithm(value: &Value) -> bool {
    matches!(value, Value::String(text) if *text.as_bytes() == *ALGORITHM.as_bytes())
}

/// The compact serialization (RFC 7515 7.1).
fn compact(sk: &SecretKey, header: &[u8], payload: &[u8]) -> String {
    let mut token = base64::encode(header, UrlSafeNoPadding);
    token.push('.');
    token.push_str(&base64::encode(payload, UrlSafeNoPadding));
    let signature = sign::sign_detached(token.as_bytes(), sk);
    token.push('.');
    token.push_str(&base64::encode(signature, UrlSafeNoPadding));
    token
}

fn verify(lua: &Lua, (token, pk): (Value, Value)) -> Result<MultiValue, Raise> {
    let token = Argument::new("jwt.verify", 1, "token").text(&token)?;
    let pk = sodium::verification_key(&Argument::new("jwt.verify", 2, "pk"), &pk)?;
    sodium::ready()?;
    let parts = match genuine(&token, &pk) {
        Ok(parts) => parts,
        Err(message) => return failure(lua, message),
    };
    // The first pass keeps every null, because an `exp` of null must not pass for a missing one.
    for (bytes, check) in [
        (&parts.header, header_flaw as fn(&Table) -> mlua::Result<Option<&'static str>>),
        (&parts.payload, claims_flaw),
    ] {
        let flaw = match json::parse(lua, bytes, true)? {
            Ok(Value::Table(table)) if bytes.trim_ascii_start().first() == Some(&b'{') => {
                check(&table)?
            }
            _ => Some("malformed token"),
        };
        if let Some(flaw) = flaw {
            return failure(lua, flaw);
        }
    }
    let mut results = MultiValue::new();
    for bytes in [&parts.payload, &parts.header] {
        results.push_back(json::parse(lua, bytes, false)?.unwrap_or(Value::Nil));
    }
    Ok(results)
}

fn failure(lua: &Lua, message: &str) -> Result<MultiValue, Raise> {
    let message = Value::String(lua.create_string(message)?);
    Ok(MultiValue::from_iter([Value::Nil, message]))
}

/// The parts of a token with a valid signature.
#[derive(Debug)]
struct Parts {
    header: Vec<u8>,
    payload: Vec<u8>,
}

/// Takes a token apart, if the key has signed it.
fn genuine(token: &[u8], pk: &PublicKey) -> Result<Parts, &'static str> {
    const MALFORMED: &str = "malformed token";
    let dots: Vec<usize> = memchr::memchr_iter(b'.', token).take(3).collect();
    let [first, second] = dots[..] else { return Err(MALFORMED) };
    let decode = |part: &[u8]| base64::decode(part, UrlSafeNoPadding).map_err(|()| MALFORMED);
    let signature = decode(&token[second + 1..])?;
    let parts =
        Parts { header: decode(&token[..first])?, payload: decode(&token[first + 1..second])? };
    if sodium::verify(&signature, &token[..second], pk) {
        Ok(parts)
    } else {
        Err("the signature is not the key's")
    }
}

fn header_flaw(header: &Table) -> mlua::Result<Option<&'static str>> {
    if !is_algorithm(&header.raw_get("alg")?) {
        return Ok(Some("the algorithm is not EdDSA"));
    }
    let crit: Value = header.raw_get("crit")?;
    Ok((!crit.is_nil()).then_some("the header demands extensions that are not supported"))
}

fn claims_flaw(claims: &Table) -> mlua::Result<Option<&'static str>> {
    let now = now();
    Ok(match (time(&claims.raw_get("exp")?), time(&claims.raw_get("nbf")?)) {
        (Err(()), _) => Some("exp is not a number"),
        (_, Err(())) => Some("nbf is not a number"),
        (Ok(Some(exp)), _) if now >= exp => Some("the token has expired"),
        (_, Ok(Some(nbf))) if now < nbf => Some("the token is not valid yet"),
        _ => None,
    })
}

/// Seconds since the epoch, as in a claim.
fn now() -> f64 {
    SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or(Duration::ZERO).as_secs_f64()
}

/// Returns the number of a claim, if the claim exists.
fn time(claim: &Value) -> Result<Option<f64>, ()> {
    match claim {
        Value::Nil => Ok(None),
        Value::Integer(n) => Ok(Some(*n as f64)),
        Value::Number(n) => Ok(Some(*n)),
        _ => Err(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use sodiumoxide::crypto::sign::{Seed, keypair_from_seed};

    /// RFC 8037, appendix A: `d` and `x` of the key, header, payload and token.
    const D: &str = "nWGxne_9WmC6hEr0kuwsxERJxWl7MmkZcDusAxyuf2A";
    const X: &str = "11qYAYKxCrfVS_7TyWQHOg7hcvPapiMlrwIaaPcHURo";
    const HEADER: &str = r#"{"alg":"EdDSA"}"#;
    const PAYLOAD: &str = "Example of Ed25519 signing";
    const TOKEN: &str = "eyJhbGciOiJFZERTQSJ9.RXhhbXBsZSBvZiBFZDI1NTE5IHNpZ25pbmc.\
                         hgyY0il_MGCjP0JzlnLWG1PPOt7-09PGcvMg3AIbQR6dWbhijcNR4ki4iylGjg5BhVsPt\
                         9g7sVvpAr_MuM0KAg";

    fn key() -> (PublicKey, SecretKey) {
        sodiumoxide::init().expect("libsodium");
        let seed = base64::decode(D, UrlSafeNoPadding).expect("base64");
        keypair_from_seed(&Seed::from_slice(&seed).expect("32 bytes"))
    }

    #[test]
    fn the_example_of_rfc_8037() {
        let (pk, sk) = key();
        assert_eq!(base64::encode(pk, UrlSafeNoPadding), X);
        assert_eq!(compact(&sk, HEADER.as_bytes(), PAYLOAD.as_bytes()), TOKEN);
        let parts = genuine(TOKEN.as_bytes(), &pk).expect("genuine");
        assert_eq!(parts.header, HEADER.as_bytes());
        assert_eq!(parts.payload, PAYLOAD.as_bytes());
    }

    #[test]
    fn every_changed_byte_is_noticed() {
        let (pk, _) = key();
        for index in 0..TOKEN.len() {
            let mut token = TOKEN.as_bytes().to_vec();
            token[index] ^= 1;
            assert!(genuine(&token, &pk).is_err(), "{index}");
        }
    }

    #[test]
    fn malformed_tokens() {
        let (pk, _) = key();
        let padded = format!("{TOKEN}==");
        // The last character has two bits that belong to no byte.
        let loose = format!("{}h", &TOKEN[..TOKEN.len() - 1]);
        let four = format!("{TOKEN}.");
        for token in ["", ".", "..", "...", "a.b", &padded, &loose, &four, &TOKEN[..40]] {
            assert!(genuine(token.as_bytes(), &pk).is_err(), "{token}");
        }
    }
}
