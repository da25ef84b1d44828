-- Names of Lua 5.1 and LuaJIT that scripts still use.
unpack = unpack or table.unpack
loadstring = loadstring or load

function math.pow(x, y)
  return x ^ y
end

function math.log10(x)
  return math.log(x, 10)
end

math.atan2 = math.atan

function math.cosh(x)
  return (math.exp(x) + math.exp(-x)) / 2
end

function math.sinh(x)
  if math.abs(x) < 1e-4 then
    return x + x ^ 3 / 6 -- the difference below would have few digits
  end
  return (math.exp(x) - math.exp(-x)) / 2
end

function math.tanh(x)
  if math.abs(x) > 20 then
    return x > 0 and 1.0 or -1.0 -- as near as a float comes
  end
  return math.sinh(x) / math.cosh(x)
end

-- x = m * 2^e with 0.5 <= |m| < 1, from the bits of the float.
function math.frexp(x)
  x = x + 0.0
  if x == 0 or x ~= x or x == math.huge or x == -math.huge then
    return x, 0
  end
  local bits = string.unpack('<i8', string.pack('<d', x))
  local exponent = bits >> 52 & 0x7ff
  if exponent == 0 then -- subnormal
    local m, e = math.frexp(x * 2.0 ^ 54)
    return m, e - 54
  end
  local mantissa = bits & ~(0x7ff << 52) | 1022 << 52
  return string.unpack('<d', string.pack('<i8', mantissa)), exponent - 1022
end

-- 2^e itself may be no float where m * 2^e is one. A fraction of e doesn't count.
function math.ldexp(m, e)
  e = math.max(-2200, math.min(2200, (math.modf(e))))
  while e > 1000 do
    m, e = m * 2.0 ^ 1000, e - 1000
  end
  while e < -1000 do
    m, e = m * 2.0 ^ -1000, e + 1000
  end
  return m * 2.0 ^ e
end

function table.getn(t)
  return #t
end

function table.foreach(t, f)
  for key, value in pairs(t) do
    local result = f(key, value)
    if result ~= nil then
      return result
    end
  end
end

function table.foreachi(t, f)
  for i = 1, #t do
    local result = f(i, t[i])
    if result ~= nil then
      return result
    end
  end
end

function gcinfo()
  return math.floor(collectgarbage('count'))
end

package.loaders = package.searchers

function table.maxn(t)
  local max = 0
  for key in pairs(t) do
    if math.type(key) and key > max then
      max = key
    end
  end
  return max
end

-- bit: the library of LuaJIT, whose results are signed 32-bit integers.
local function signed(n)
  n = n & 0xffffffff
  return n >= 0x80000000 and n - 0x100000000 or n
end

-- Numbers beyond 32 bits wrap around, fractions are rounded.
local function integer(n)
  return math.tointeger(n) or math.tointeger(math.floor(n + 0.5)) or 0
end

local function fold(operation)
  return function(first, ...)
    local result = integer(first)
    for _, n in ipairs({...}) do
      result = operation(result, integer(n))
    end
    return signed(result)
  end
end

local bit = {
  band = fold(function(a, b) return a & b end),
  bor = fold(function(a, b) return a | b end),
  bxor = fold(function(a, b) return a ~ b end),
}

function bit.tobit(n) return signed(integer(n)) end
function bit.bnot(n) return signed(~integer(n)) end
function bit.lshift(n, by) return signed((integer(n) & 0xffffffff) << (integer(by) & 31)) end
function bit.rshift(n, by) return signed((integer(n) & 0xffffffff) >> (integer(by) & 31)) end
function bit.arshift(n, by) return signed(signed(integer(n)) // (1 << (integer(by) & 31))) end

function bit.rol(n, by)
  n, by = integer(n) & 0xffffffff, integer(by) & 31
  return signed(n << by | n >> (32 - by))
end

function bit.ror(n, by)
  return bit.rol(n, -integer(by))
end

function bit.bswap(n)
  return signed((string.unpack('>I4', string.pack('<I4', integer(n) & 0xffffffff))))
end

function bit.tohex(n, digits)
  digits = integer(digits or 8)
  local format = digits < 0 and '%0' .. -digits .. 'X' or '%0' .. digits .. 'x'
  local width = math.min(math.abs(digits), 8)
  local mask = width == 8 and 0xffffffff or (1 << 4 * width) - 1
  return (string.format(format, integer(n) & mask):sub(-width))
end

package.preload.bit = function() return bit end
_G.bit = bit -- LuaJIT has it without require

-- What can't be had says what to use instead.
local function missing(name, hint)
  return name .. ' is not available in Lua 5.3; ' .. hint
end

local hints = {
  setfenv = 'load() takes the environment as its fourth argument',
  getfenv = 'use _ENV',
  module = 'return a table from the file that require() loads',
  newproxy = 'give a table a metatable',
}

for name, hint in pairs(hints) do
  _G[name] = function()
    error(missing(name, hint), 2)
  end
end

local function absent(name, hint)
  local function raise()
    error(missing(name, hint), 2)
  end
  -- Between it and the script is require.
  package.preload[name] = function()
    error(missing(name, hint), 3)
  end
  return setmetatable({}, {__index = raise, __newindex = raise, __call = raise})
end

jit = absent('jit', 'there is no just-in-time compiler')
ffi = absent('ffi', 'there is no foreign function interface')
