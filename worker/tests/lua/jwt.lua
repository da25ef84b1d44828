-- Tests jwt: tokens made by PyJWT, and tokens that must be refused although their signature is
-- right.
local seed = '9d61b19deffd5a60ba844af492ec2cc44449c5697b326919703bac031cae7f60'
local pk = sodium.hex2bin('d75a980182b10ab7d54bfed3c964073a0ee172f3daa62325af021a68f707511a')
local sk = sodium.hex2bin(seed) .. pk
local json_head = '{"alg":"EdDSA"}'

local function raises(expected, f, ...)
  local ok, message = pcall(f, ...)
  assert(not ok and message:find(expected, 1, true), tostring(message))
end

local function refused(expected, token, key)
  local payload, message = jwt.verify(token, key or pk)
  assert(payload == nil and message == expected, tostring(message))
end

-- A token made by PyJWT 2.15.1 with the key above.
local foreign = 'eyJhbGciOiJFZERTQSIsImtpZCI6IjEiLCJ0eXAiOiJKV1QifQ.'
  .. 'eyJzdWIiOiJhbGljZSIsImV4cCI6NDEwMjQ0NDgwMCwibmJmIjoxLjUsImxpc3QiOlsxLDIuMCwieCJd'
  .. 'LCJub25lIjpudWxsfQ.'
  .. 'wHXQ1IU9nS-uXOdZsGNTkP-Iec8ASSYJkgrU5adrFzJ_ISUAoNMQ4dtyBYezUBzwaQy_L-wNL_UYp6Nf7itrBg'
local payload, header = jwt.verify(foreign, pk)
assert(payload.sub == 'alice' and payload.exp == 4102444800 and payload.nbf == 1.5)
assert(#payload.list == 3 and payload.none == nil)
assert(header.alg == 'EdDSA' and header.kid == '1' and header.typ == 'JWT')

-- Tokens made by this library. Ed25519 is deterministic, so equal claims give equal tokens.
local token = jwt.sign(sk, {kid = '7'}, {sub = 'bob', exp = 4102444800, nbf = 0})
assert(token == jwt.sign(sk, {kid = '7'}, {nbf = 0, exp = 4102444800, sub = 'bob'}))
payload, header = assert(jwt.verify(token, pk))
assert(payload.sub == 'bob' and header.kid == '7' and header.alg == 'EdDSA')
-- The header's type is JWT unless it is given.
local typed = '{"alg":"EdDSA","typ":"JWT"}'
local function head_of(header)
  local _, told = assert(jwt.verify(jwt.sign(sk, header, {}), pk))
  return json.dump(told)
end
assert(head_of(nil) == typed and head_of{} == typed and head_of{typ = 'JWT'} == typed)
assert(head_of{typ = 'at+jwt'} == '{"alg":"EdDSA","typ":"at+jwt"}')
assert(jwt.sign(sk, nil, {}):find('%.e30%.') == #head_of(nil) // 3 * 4 + 1)
assert(jwt.sign(sk, {alg = 'EdDSA'}, {}) == jwt.sign(sk, {}, {}))

-- Tokens of another key, and damaged tokens.
local other = sodium.crypto_sign_keypair()
refused("the signature is not the key's", token, other)
refused("the signature is not the key's", (token:gsub('^(.*%.)(.*)(%..*)$', '%1e30%3')))
for _, text in ipairs{'', '.', 'a.b', 'a..', token .. '.', token .. '=', '!' .. token, 42} do
  refused('malformed token', text)
end

refused("the signature is not the key's", '..')

-- Tokens without a signature, or with a signature of another kind.
refused("the signature is not the key's", 'eyJhbGciOiJub25lIiwidHlwIjoiSldUIn0.eyJzdWIiOiJhIn0.')
refused("the signature is not the key's", 'eyJhbGciOiJIUzI1NiIsInR5cCI6IkpXVCJ9.eyJzdWIiOiJhIn0.'
  .. 'nm20pCE2JBZ9MMAXsCdloEvFHdeOKHE1Xi00oeXbFB4')

-- Tokens that are signed by the right key but break other rules.
local digits = 'ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_'
local function base64url(bytes)
  local result = {}
  for i = 1, #bytes, 3 do
    local a, b, c = bytes:byte(i, i + 2)
    local n = a << 16 | (b or 0) << 8 | (c or 0)
    for place = 0, c and 3 or b and 2 or 1 do
      local digit = n >> (18 - 6 * place) & 63
      result[#result + 1] = digits:sub(digit + 1, digit + 1)
    end
  end
  return table.concat(result)
end

local function signed(header, payload)
  local text = base64url(header) .. '.' .. base64url(payload)
  return text .. '.' .. base64url(sodium.crypto_sign_detached(text, sk))
end

assert(signed(typed, '{"sub":"x"}') == jwt.sign(sk, nil, {sub = 'x'}))
assert(jwt.verify(signed(json_head, ' {"exp":4102444800.5}'), pk))
for _, header in ipairs{
  '{}', '{"alg":"none"}', '{"alg":"eddsa"}', '{"alg":null}', '{"alg":["EdDSA"]}',
} do
  refused('the algorithm is not EdDSA', signed(header, '{}'))
end
local demands = 'the header demands extensions that are not supported'
refused(demands, signed('{"alg":"EdDSA","crit":["exp"]}', '{}'))
refused(demands, signed('{"alg":"EdDSA","crit":null}', '{}'))
refused(demands, signed('{"alg":"EdDSA","crit":[]}', '{}'))
for _, text in ipairs{'', 'x', '[1]', '["EdDSA"]', '"x"', 'null', '{', '\xff'} do
  refused('malformed token', signed(text, '{}'))
  refused('malformed token', signed(json_head, text))
end
for _, value in ipairs{'null', '"4102444800"', 'true', '{}', '[]'} do
  refused('exp is not a number', signed(json_head, '{"exp":' .. value .. '}'))
  refused('nbf is not a number', signed(json_head, '{"nbf":' .. value .. '}'))
end
local now = os.time()
refused('the token has expired', jwt.sign(sk, nil, {exp = now}))
refused('the token has expired', jwt.sign(sk, nil, {exp = -1e300}))
refused('the token is not valid yet', jwt.sign(sk, nil, {nbf = now + 3600}))
assert(jwt.verify(jwt.sign(sk, nil, {exp = now + 3600, nbf = now}), pk))
-- The last of several equal names counts, both for the check and for the script.
refused('the token has expired', signed(json_head, '{"exp":4102444800,"exp":1}'))

raises('expected a key of 64 bytes, got 32', jwt.sign, pk, nil, {})
raises('expected a key of 32 bytes, got 64', jwt.verify, token, sk)
raises('alg can only be EdDSA', jwt.sign, sk, {alg = 'none'}, {})
raises('crit is not supported', jwt.sign, sk, {crit = {'exp'}}, {})
raises('expected a table, got nil', jwt.sign, sk, {})
raises('the payload is a sequence', jwt.sign, sk, nil, {1})
raises('jwt.sign: not JSON', jwt.sign, sk, nil, {f = print})
raises('expected a string, got nil', jwt.verify, nil, pk)
