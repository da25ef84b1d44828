-- Tests the standard library of Lua 5.3 as scripts see it: all of the library, old names, wrapped
-- functions.

assert(_VERSION == 'Lua 5.3')
for _, name in ipairs{
  'coroutine', 'debug', 'io', 'math', 'os', 'package', 'string', 'table', 'utf8',
} do
  assert(type(_G[name]) == 'table', name)
end
assert(debug.sethook == nil)
assert(debug.traceback('x'):find('^x\nstack traceback:'))

local function raises(expected, f, ...)
  local ok, message = pcall(f, ...)
  assert(not ok, 'no error: ' .. expected)
  assert(message:find(expected, 1, true), message)
end

-- Names of Lua 5.1.
assert(select('#', unpack{1, 2, 3}) == 3)
assert(loadstring('return 5')() == 5)
assert(math.pow(2, 10) == 1024)
assert(math.log10(1000) > 2.999)
assert(table.maxn{1, 2, [10] = 3, x = 4} == 10 and table.maxn{} == 0)
assert(math.atan2(1, -1) == math.atan(1, -1) and math.atan2(1, -1) > 2)
local function near(a, b)
  assert(math.abs(a - b) <= 1e-12 * math.max(1, math.abs(b)), a .. ' is not ' .. b)
end
near(math.cosh(0), 1) near(math.cosh(-2), 3.7621956910836314)
near(math.sinh(2), 3.626860407847019) near(math.sinh(-2), -3.626860407847019)
near(math.sinh(1e-5) * 1e5, 1.0000000000166667) assert(math.sinh(0) == 0)
near(math.tanh(0.5), 0.46211715726000975) assert(math.tanh(800) == 1 and math.tanh(-800) == -1)
for _, case in ipairs{
  {8, 0.5, 4}, {-3, -0.75, 2}, {0.1, 0.8, -3}, {0, 0, 0}, {1, 0.5, 1},
  {2.0 ^ 1023, 0.5, 1024}, {2.0 ^ -1074, 0.5, -1073}, {math.huge, math.huge, 0},
} do
  local m, e = math.frexp(case[1])
  assert(m == case[2] and e == case[3], case[1] .. ' ' .. m .. ' ' .. e)
  assert(math.ldexp(m, e) == case[1])
end
local nan = math.frexp(0/0)
assert(nan ~= nan)
assert(math.ldexp(1, 1024) == math.huge and math.ldexp(1, -1080) == 0 and math.ldexp(3, -1) == 1.5)
assert(math.ldexp(1, 2.5) == 4 and math.ldexp(1, -2.5) == 0.25 and math.ldexp(1, '2') == 4)
assert(math.ldexp(1, math.huge) == math.huge and math.ldexp(1, -math.huge) == 0)
assert(table.getn{1, 2, 3} == 3)
assert(table.foreach({x = 7}, function(k, v) return k .. v end) == 'x7')
local order = {}
assert(table.foreachi({5, 6}, function(i, v) order[i] = v end) == nil and #order == 2)
assert(gcinfo() > 0 and package.loaders == package.searchers)
raises("newproxy is not available", newproxy, true)
raises("setfenv is not available in Lua 5.3; load() takes", setfenv, 1, {})
raises("getfenv is not available in Lua 5.3; use _ENV", getfenv)
raises("module is not available", module, 'x')
raises("ffi is not available", function() return ffi.cdef end)
raises("jit is not available", function() jit.off() end)
raises("ffi is not available", require, 'ffi')
-- The error has the position of the line in the script, also at the second attempt.
for _ = 1, 2 do
  local ok, message = pcall(function() local x = require 'ffi' return x end)
  assert(not ok and message:find('^[^ ]*config.lua:%d+: ffi is not'), message)
  ok, message = pcall(function() local x = jit.version return x end)
  assert(not ok and message:find('^[^ ]*config.lua:%d+: jit is not'), message)
end

assert(bit == require 'bit')
assert(bit.band(0xff, 0x0f, 0x3) == 3)
assert(bit.bor(1, 2, 4) == 7 and bit.bxor(0xff, 0x0f) == 0xf0)
assert(bit.bnot(0) == -1 and bit.tobit(0xffffffff) == -1)
assert(bit.lshift(1, 31) == -2147483648 and bit.lshift(1, 32) == 1)
assert(bit.rshift(-256, 8) == 0xffffff and bit.arshift(-256, 8) == -1)
assert(bit.rol(0x12345678, 12) == 0x45678123 and bit.ror(0x12345678, 12) == 0x67812345)
assert(bit.bswap(0x12345678) == 0x78563412)
assert(bit.tohex(255) == '000000ff' and bit.tohex(-1, 4) == 'ffff' and bit.tohex(255, -4) == '00FF')

-- Errors are values, and error messages keep their position.
local ok, e = pcall(error, {code = 1})
assert(not ok and e.code == 1)
ok, e = pcall(function() error('text') end)
assert(e:find('config.lua:%d+: text$'), e)
ok, e = pcall(function() qmqp_resolve({}) end)
assert(type(e) == 'string' and e:find('config.lua:%d+: bad argument'), e)
ok, e = xpcall(function() qmqp_resolve({}) end, function(x) return type(x) .. x end)
assert(e:find('^string.*bad argument'), e)
assert(select('#', pcall(function() end)) == 1)
assert(select('#', pcall(function() return nil, nil end)) == 3)

-- Coroutines.
local co = coroutine.create(function(a, b)
  local c = coroutine.yield(a + b)
  local d, e = coroutine.yield(c * 2)
  return d, e
end)
assert(coroutine.status(co) == 'suspended')
local function all(...) return table.concat({...}, ' ', 2) end
assert(all(coroutine.resume(co, 1, 2)) == '3')
assert(all(coroutine.resume(co, 5)) == '10')
assert(all(coroutine.resume(co, 'x', 'y')) == 'x y')
assert(coroutine.status(co) == 'dead')
ok, e = coroutine.resume(co)
assert(not ok and e == 'cannot resume dead coroutine')
assert(select('#', coroutine.resume(coroutine.create(function() end))) == 1)
co = coroutine.wrap(function() error({1}) end)
ok, e = pcall(co)
assert(not ok and e[1] == 1)
co = coroutine.wrap(function() error('inner') end)
ok, e = pcall(co)
assert(e:find('inner'), e)
co = coroutine.wrap(function() qmqp_resolve({}) end)
ok, e = pcall(co)
assert(type(e) == 'string' and e:find('bad argument'), e)
raises('bad argument', coroutine.resume, nil)
local t = {}
for i in coroutine.wrap(function() for i = 1, 3 do coroutine.yield(i) end end) do t[#t + 1] = i end
assert(#t == 3)
assert(select(2, coroutine.running()) == true)

qmqp_listen('/a', function(m)
  assert(select(2, coroutine.running()) == false and coroutine.isyieldable())
  -- Only the operation resumes a coroutine that waits in it.
  local other
  local inner = coroutine.create(function() sleep(0.01) return 'done' end)
  local spy = setmetatable({}, {__gc = function() end})
  other = coroutine.create(function()
    local ok, result = coroutine.resume(inner)
    assert(ok and result == 'done', result)
    assert(coroutine.status(inner) == 'dead')
    return 'outer'
  end)
  local ok, result = coroutine.resume(other)
  assert(ok and result == 'outer', result)
  return m:discard()
end)
