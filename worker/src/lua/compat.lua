-- Names of Lua 5.1 and LuaJIT that scripts still use.
unpack = unpack or table.unpack
loadstring = loadstring or load

function math.pow(x, y)
  return x ^ y
end

function math.log10(x)
  return math.log(x, 10)
end

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
  package.preload[name] = raise
  return setmetatable({}, {__index = raise, __newindex = raise, __call = raise})
end

jit = absent('jit', 'there is no just-in-time compiler')
ffi = absent('ffi', 'there is no foreign function interface')
