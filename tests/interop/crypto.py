"""Tests the script's libraries sodium and jwt against PyNaCl, PyJWT and cryptography.

Usage: crypto.py QRELAY. The scripts are run by `qrelay check`: each side makes boxes, signatures
and tokens with fresh keys, and the other side reads them. The exit status is 1, with the error of
the script, if the two sides disagree.
"""

import base64
import os
import pathlib
import subprocess
import sys
import tempfile
import time

import jwt
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from nacl.public import PrivateKey, PublicKey, SealedBox
from nacl.signing import SigningKey, VerifyKey

MESSAGES = [b"", b"x", b"hello\0world\n", "ä€😀".encode(), os.urandom(1000), os.urandom(70000)]
LISTENER = "qmqp_listen('@qrelay-interop', function(m) return m:discard() end)\n"
HELPERS = """
local function read(name)
  local f = assert(io.open(name, 'rb')) local s = f:read('a') f:close() return s
end
local function write(name, s) local f = assert(io.open(name, 'wb')) f:write(s) f:close() end
"""


def load(qrelay: str, directory: pathlib.Path, script: str) -> None:
    """Runs a script, whose working directory is `directory`."""
    config = directory / "config.lua"
    config.write_text(HELPERS + script + LISTENER)
    command = [qrelay, "check", "--config", str(config)]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)


def exchange(qrelay: str, directory: pathlib.Path, message: bytes) -> None:
    """Exchanges one message and one set of claims in both directions."""
    box, sign = PrivateKey.generate(), SigningKey.generate()
    seed, claims = bytes(sign), {"sub": base64.b64encode(message).decode(), "n": [1, 2.5, None]}
    times = {"exp": int(time.time()) + 600, "nbf": int(time.time()) - 600}
    key = Ed25519PrivateKey.from_private_bytes(seed)
    token = jwt.encode(claims | times, key, algorithm="EdDSA", headers={"kid": "python"})
    files = {
        "message": message, "box_pk": bytes(box.public_key), "box_sk": bytes(box),
        "sealed": SealedBox(box.public_key).encrypt(message),
        "sign_pk": bytes(sign.verify_key), "sign_sk": seed + bytes(sign.verify_key),
        "signature": sign.sign(message).signature,
        "token": token.encode(), "sub": claims["sub"].encode(),
    }
    for name, content in files.items():
        (directory / name).write_bytes(content)
    load(qrelay, directory, """
        local message, pk, sk = read('message'), read('sign_pk'), read('sign_sk')
        assert(sodium.crypto_scalarmult_base(read('box_sk')) == read('box_pk'))
        local box_pk, box_sk = read('box_pk'), read('box_sk')
        assert(sodium.crypto_box_seal_open(read('sealed'), box_pk, box_sk) == message)
        assert(sodium.crypto_sign_verify_detached(read('signature'), message, pk))
        assert(sodium.crypto_sign_detached(message, sk) == read('signature'))
        local payload, header = assert(jwt.verify(read('token'), pk))
        assert(payload.sub == read('sub') and payload.n[2] == 2.5 and header.kid == 'python')
        write('sealed', sodium.crypto_box_seal(message, read('box_pk')))
        local claims = {sub = read('sub'), exp = os.time() + 600, n = {1, 2.5}}
        write('token', jwt.sign(sk, {kid = 'lua'}, claims))
        local pk, sk = sodium.crypto_sign_keypair()
        write('sign_pk', pk)
        write('signature', sodium.crypto_sign_detached(message, sk))
        local pk, sk = sodium.crypto_box_keypair()
        write('box_pk', pk)
        write('box_sk', sk)
    """)

    def read(name: str) -> bytes:
        return (directory / name).read_bytes()

    assert SealedBox(box).decrypt(read("sealed")) == message
    VerifyKey(read("sign_pk")).verify(message, read("signature"))
    assert bytes(PrivateKey(read("box_sk")).public_key) == bytes(PublicKey(read("box_pk")))
    public = Ed25519PrivateKey.from_private_bytes(seed).public_key()
    assert public.public_bytes(Encoding.Raw, PublicFormat.Raw) == bytes(sign.verify_key)
    payload = jwt.decode(read("token"), public, algorithms=["EdDSA"])
    assert payload["sub"] == claims["sub"] and payload["n"] == [1, 2.5]
    assert jwt.get_unverified_header(read("token")) == {"alg": "EdDSA", "kid": "lua", "typ": "JWT"}


def main() -> None:
    """Exchanges all messages."""
    qrelay = os.path.abspath(sys.argv[1])
    for message in MESSAGES:
        with tempfile.TemporaryDirectory() as directory:
            exchange(qrelay, pathlib.Path(directory), message)
    print(f"{len(MESSAGES)} messages were exchanged in both directions")


main()
