-- Tests json: values written and parsed again, and values and texts that are refused.
local function raises(expected, ...)
  local ok, message = pcall(json.dump, ...)
  assert(not ok and message:find(expected, 1, true), tostring(message))
end

local function refused(expected, text)
  local value, message = json.parse(text)
  assert(value == nil and message:find('not JSON: ', 1, true) == 1, tostring(message))
  assert(message:find(expected, 1, true), message)
end

-- Values with exactly one text.
for text, value in pairs{
  ['1'] = 1, ['-9223372036854775808'] = math.mininteger, ['9223372036854775807'] = math.maxinteger,
  ['1.0'] = 1.0, ['0.1'] = 0.1, ['-0.0'] = -0.0, ['true'] = true, ['false'] = false,
  ['""'] = '', ['"ä€😀"'] = 'ä€😀', ['"\\"\\\\\\n\\u0000"'] = '"\\\n\0',
} do
  assert(json.dump(value) == text, json.dump(value))
  local parsed = json.parse(text)
  assert(parsed == value and math.type(parsed) == math.type(value), text)
end
assert(1 / json.parse('-0.0') < 0)
for _, value in ipairs{1e300, 5e-324, 2^53, 1 / 3} do
  assert(json.parse(json.dump(value)) == value)
end

-- Texts and values with several spellings.
assert(json.parse('"\\u00e4\\ud83d\\ude00\\/"') == 'ä😀/')
assert(json.parse(' [ 1 , 2 ] \n')[2] == 2)
assert(json.parse('1E2') == 100.0 and json.parse(7) == 7)
assert(math.type(json.parse('9223372036854775808')) == 'float')
assert(json.dump('/\u{7f}') == '"/\u{7f}"')

-- Tables.
assert(json.dump{} == '{}')
assert(json.dump{1, 'a', {true}} == '[1,"a",[true]]')
assert(json.dump{b = 1, a = {x = {}}, ['\u{e4}'] = 2} == '{"a":{"x":{}},"b":1,"ä":2}')
assert(json.dump(setmetatable({1}, {__index = error, __len = error, __pairs = error})) == '[1]')
local shared = {1}
assert(json.dump{shared, shared} == '[[1],[1]]')
local t = assert(json.parse('{"a":[1,{"b":[]}],"a ":0,"":1}'))
assert(t.a[2].b and #t.a == 2 and t['a '] == 0 and t[''] == 1)
assert(json.parse('{"a":1,"a":2}').a == 2)
assert(next(json.parse('[]')) == nil and next(json.parse('{}')) == nil)

-- null.
assert(json.dump(nil) == 'null' and json.dump(json.null) == 'null')
assert(json.dump{json.null, {a = json.null}} == '[null,{"a":null}]')
assert(tostring(json.null) == 'null' and json.null ~= nil)
assert(select('#', json.parse('null')) == 1 and json.parse('null') == nil)
assert(json.parse('null', {null = true}) == json.null)
t = json.parse('{"a":null,"b":[null,2,null]}')
assert(t.a == nil and t.b[1] == nil and t.b[2] == 2 and t.b[3] == nil)
t = json.parse('{"a":null,"b":[null,2,null]}', {null = true})
assert(t.a == json.null and t.b[1] == json.null and #t.b == 3)
assert(json.parse('[null]', {null = false})[1] == nil)

-- Values that JSON has no form for.
raises('a function', print)
raises("a function, at value[1]['f']", {{f = print}})
raises('a thread', coroutine.create(print))
raises('a stream', io.stdout)
raises('not finite', 1 / 0)
raises('not finite', -1 / 0)
raises('not finite', 0 / 0)
raises('is not UTF-8', 'a\xff')
raises('is not UTF-8', {['\xc3'] = 1})
raises('is not UTF-8', '\xed\xa0\x80') -- a surrogate
raises('neither a sequence', {1, a = 2})
raises('neither a sequence', {1, nil, 3})
raises('neither a sequence', {1, [1.5] = 2})
raises('neither a sequence', {1, [0] = 2})
raises('neither a sequence', {1, [-1] = 2})
raises('the key 5', {[5] = 1})
raises('the key true', {[true] = 1})
local cycle = {}
cycle[1] = {a = cycle}
raises('contains itself', cycle)
-- A small table whose text would have 2^40 elements.
local wide = {1}
for _ = 1, 40 do wide = {wide, wide} end
raises('more than 1048576 values', wide)
raises('longer than 16 MiB', {('x'):rep(1 << 24), 1, 2})

-- Depth.
local function nested(n)
  local value = {}
  for _ = 2, n do value = {value} end
  return value
end
assert(json.dump(nested(128)) == ('['):rep(127) .. '{}' .. (']'):rep(127))
raises('nested deeper than 128', nested(129))
raises('nested deeper than 128', nested(100000))
assert(json.parse(('['):rep(128) .. (']'):rep(128)))
refused('nested deeper than 128', ('['):rep(129) .. (']'):rep(129))
refused('nested deeper than 128', ('['):rep(1000000))
refused('nested deeper than 128', ('{"a":'):rep(1000000))

-- Texts that are not JSON.
for _, text in ipairs{
  '', ' ', '{', '[', '[1', '[1,]', '{"a"}', '{"a":}', '{a:1}', "{'a':1}", '{1:2}', '01', '+1',
  '.5', '1.', 'NaN', 'Infinity', 'nul', 'True', '"', '"\\x"', '"\\ud800"', '"\n"', '1 2', '[]]',
  '//', '1e999', 'undefined', '\xef\xbb\xbf1',
} do
  refused('', text)
end
refused('', '"\xff"')
refused('line 2 column', '[\n1 x')

-- Misuse.
assert(not pcall(json.parse))
assert(not pcall(json.parse, {}))
assert(not pcall(json.parse, '1', {nul = true}))
assert(not pcall(json.parse, '1', {null = 1}))

-- The limit of 16 MiB holds before the text is made: the refusal takes no memory to speak of, and
-- what just fits is accepted.
local limit = 16 << 20
assert(#json.dump(('x'):rep(limit - 64)) == limit - 62)
for _, large in ipairs{('x'):rep(limit), ('\1'):rep(limit // 6 + 1), ('"'):rep(limit // 2)} do
  local held = {large, ('y'):rep(100)}
  for _, value in ipairs{large, {large}, {k = large}, {[large] = 1}, held} do
    local ok, message = pcall(json.dump, value)
    assert(not ok and message:find('longer than 16 MiB', 1, true), tostring(message):sub(1, 200))
  end
end
