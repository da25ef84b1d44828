-- Tests sodium: published vectors, boxes made by PyNaCl, and misuse.
local hex, bin = sodium.bin2hex, sodium.hex2bin

local function raises(expected, f, ...)
  local ok, message = pcall(f, ...)
  assert(not ok and message:find(expected, 1, true), tostring(message))
end

-- Hexadecimal.
assert(hex('A\0\xff') == '4100ff' and hex('') == '' and hex(5) == '35')
assert(bin('deadbeef') == '\xde\xad\xbe\xef' and bin('DEADbeef') == bin('deadbeef'))
assert(bin('') == '')
for _, text in ipairs{'abc', 'xy', 'a', ' 00', '00 ', '0x00', '00:00', 'a\0'} do
  assert(select('#', bin(text)) == 1 and bin(text) == nil, text)
end
raises('expected a string, got nil', bin)
raises('expected a string, got a table', hex, {})

-- Random bytes.
assert(#sodium.randombytes(1) == 1 and #sodium.randombytes('1048576') == 1048576)
assert(sodium.randombytes(32) ~= sodium.randombytes(32))
raises('from 1 to 1048576', sodium.randombytes, 0)
raises('from 1 to 1048576', sodium.randombytes, 1048577)
raises('an integer', sodium.randombytes, 1.5)
raises('from 1 to 1048576', sodium.randombytes)

-- The key pair of Alice in RFC 7748 6.1.
local sk = bin('77076d0a7318a57d3c16c17251b26645df4c2f87ebc0992ab177fba51db92c2a')
local pk = sodium.crypto_scalarmult_base(sk)
assert(hex(pk) == '8520f0098930a754748b7ddcb43ef75a0dbf3a0d26381af4eba4a98eaa9b4e6a')

-- Boxes that PyNaCl 1.6.2 has sealed for this key.
local open = sodium.crypto_box_seal_open
assert(open(bin('cc3641a99523961f73f253965dc06676b1cf703d1a2bebb5966d1723ab417f1a'
  .. 'c16c618f42056f88fcead61a879228c766d2f2dc60ca34dfcbde22'), pk, sk) == 'hello world')
assert(open(bin('d4d83d4b31d6e3647e39042bd581f72ad851c121febc9d43a6261ccf75d41400'
  .. 'f32cc4ff96ca6243c89ebc6ebb3acce2'), pk, sk) == '')

-- Boxes made by this library.
local pk2, sk2 = sodium.crypto_box_keypair()
assert(#pk2 == 32 and #sk2 == 32 and sodium.crypto_scalarmult_base(sk2) == pk2)
for _, message in ipairs{'', 'x', 'hello\0world', ('y'):rep(100000)} do
  local box = sodium.crypto_box_seal(message, pk2)
  assert(#box == #message + 48 and box ~= sodium.crypto_box_seal(message, pk2))
  assert(open(box, pk2, sk2) == message)
  assert(open(box, pk, sk) == nil and select('#', open(box, pk, sk)) == 1)
  assert(open(box .. 'x', pk2, sk2) == nil and open(box:sub(1, -2), pk2, sk2) == nil)
end
assert(open('', pk2, sk2) == nil)
assert(open(sodium.crypto_box_seal(12.0, pk2), pk2, sk2) == '12')

raises('expected a key of 32 bytes, got 31', sodium.crypto_box_seal, 'x', pk2:sub(2))
raises('expected a key of 32 bytes, got 33', open, '', pk2 .. 'x', sk2)
raises("bad argument #3 to 'crypto_box_seal_open' (sk: expected a key of 32 bytes, got 0)",
  open, '', pk2, '')
raises('expected a string, got nil', open, '', pk2)
raises('expected a key of 32 bytes, got 64', sodium.crypto_scalarmult_base, sk2 .. sk2)
-- No error message repeats a key.
local _, message = pcall(sodium.crypto_scalarmult_base, 'secret')
assert(not message:find('secret', 1, true))
-- Points of small order are refused, because everybody could open a box that is sealed for them.
raises('not a public key', sodium.crypto_box_seal, 'x', ('\0'):rep(32))
raises('not a public key', sodium.crypto_box_seal, 'x', '\1' .. ('\0'):rep(31))

-- Tests 1 and 2 of RFC 8032 7.1.
local sign, verify = sodium.crypto_sign_detached, sodium.crypto_sign_verify_detached
for _, vector in ipairs{
  {
    seed = '9d61b19deffd5a60ba844af492ec2cc44449c5697b326919703bac031cae7f60',
    pk = 'd75a980182b10ab7d54bfed3c964073a0ee172f3daa62325af021a68f707511a',
    message = '',
    signature = 'e5564300c360ac729086e2cc806e828a84877f1eb8e5d974d873e065224901555'
      .. 'fb8821590a33bacc61e39701cf9b46bd25bf5f0595bbe24655141438e7a100b',
  },
  {
    seed = '4ccd089b28ff96da9db6c346ec114e0f5b8a319f35aba624da8cf6ed4fb8a6fb',
    pk = '3d4017c3e843895a92b70aa74d1b7ebc9c982ccf2ec4968cc0cd55f12af4660c',
    message = '\x72',
    signature = '92a009a9f0d4cab8720e820b5f642540a2b27b5416503f8fb3762223ebdb69da'
      .. '085ac1e43e15996e458f3613d0f11d8c387b2eaeb4302aeeb00d291612bb0c00',
  },
} do
  local key = bin(vector.pk)
  local signature = sign(vector.message, bin(vector.seed) .. key)
  assert(hex(signature) == vector.signature)
  assert(verify(signature, vector.message, key) == true)
  assert(verify(signature, vector.message .. 'x', key) == false)
end
local public, secret = sodium.crypto_sign_keypair()
assert(#public == 32 and #secret == 64 and secret:sub(33) == public)
local signature = sign('text', secret)
assert(verify(signature, 'text', public) and not verify(signature, 'text', pk2))
assert(verify('', 'text', public) == false and verify(signature .. 'x', 'text', public) == false)
raises('expected a key of 64 bytes, got 32', sign, 'text', public)
raises('expected a key of 32 bytes, got 64', verify, signature, 'text', secret)
