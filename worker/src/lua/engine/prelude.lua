-- What the libraries are made with, and what makes waiting possible everywhere.
-- WAIT is a mark that a Rust function returns before an operation; no script can
-- have this value.
local WAIT, native = ...

local assert, error, pairs = assert, error, pairs
local setmetatable, type = setmetatable, type
local create, resume, yield = coroutine.create, coroutine.resume, coroutine.yield
local isyieldable, status = coroutine.isyieldable, coroutine.status
local block, message, results = native.block, native.message, native.results
local stop, flags = native.stop, native.flags

local prelude = {}

-- Ends every call of a function that may have to wait.
local function await(...)
  if (...) ~= WAIT then
    return ...
  end
  local _, operation = ...
  if isyieldable() then
    yield(WAIT, operation)
  else
    block(operation)
  end
  return results(operation)
end

function prelude.awaiting(f)
  return function(...)
    return await(f(...))
  end
end

-- A getter of the list of what another one returns.
function prelude.list(get)
  return function(self)
    return {get(self)}
  end
end

-- __index and __newindex of a kind of object. Reading attributes is what a script does
-- most, so a method is one, too: a function that returns it.
function prelude.class(methods, getters, setters, unknown)
  for name, method in pairs(methods) do
    assert(not getters[name], name)
    getters[name] = function() return method end
  end
  setmetatable(getters, {__index = function(_, key) return unknown(key, false) end})

  local function index(self, key)
    return getters[key](self)
  end

  local function newindex(self, key, value)
    local set = setters[key]
    if set then
      return set(self, value)
    end
    return unknown(key, true)
  end

  return index, newindex
end

-- Errors raised by Rust are objects; scripts get them as strings with a
-- position, like those of Lua's own libraries.
local function caught(ok, ...)
  if ok then
    return ok, ...
  end
  local reason = ...
  if type(reason) == 'userdata' then
    reason = message(reason)
  end
  return ok, reason
end

-- The table that was raised last, so that a message can show its fields.
local raised
local raise, tostring = error, tostring
local concat, format, sort = table.concat, string.format, table.sort

function _G.error(value, level)
  if type(value) == 'table' then
    raised = value
  end
  level = level or 1
  raise(value, level == 0 and 0 or level + 1)
end

local FIELDS, LENGTH = 16, 80

local function shown(value)
  if type(value) == 'string' then
    return format('%q', #value > LENGTH and value:sub(1, LENGTH) .. '…' or value)
  elseif type(value) == 'number' or type(value) == 'boolean' then
    return tostring(value)
  end
  return type(value)
end

-- Lua's text for a raised table, with the table's fields.
function prelude.raised(text)
  local value = raised
  raised = nil
  local meta = type(value) == 'table' and debug.getmetatable(value)
  if not value or meta and rawget(meta, '__tostring') or tostring(value) ~= text then
    return text
  end
  local fields = {}
  for key, field in next, value do
    if #fields == FIELDS then
      fields[FIELDS + 1] = '…'
      break
    end
    local name = type(key) == 'string' and #key <= LENGTH and key or '[' .. shown(key) .. ']'
    fields[#fields + 1] = name .. ' = ' .. shown(field)
  end
  if #fields == 0 then
    return text
  end
  sort(fields)
  return text .. ' {' .. concat(fields, ', ') .. '}'
end

-- A traceback without qrelay's own frames.
local traceback, frames = debug.traceback, native.frames

function debug.traceback(first, message, level)
  if type(first) == 'thread' then
    local text = traceback(first, message, level)
    return type(text) == 'string' and frames(text) or text
  end
  local text = traceback(first, (message or 1) + 1)
  return type(text) == 'string' and frames(text) or text
end

local protected, protected_with = pcall, xpcall

function pcall(f, ...)
  return caught(protected(f, ...))
end

function xpcall(f, handler, ...)
  return protected_with(f, function(reason)
    if type(reason) == 'userdata' then
      reason = message(reason)
    end
    return handler(reason)
  end, ...)
end

-- Coroutines of the script: an operation is passed outward until it reaches the
-- thread that runs the handler, and the coroutine inward is resumed after it.
-- Meanwhile nobody else may resume it.
local waiting = setmetatable({}, {__mode = 'k'})

local function outward(co, ...)
  if flags.expired then
    stop()
  end
  local ok, mark, operation = ...
  if not ok or mark ~= WAIT then
    return caught(...)
  end
  if isyieldable() then
    waiting[co] = true
    yield(WAIT, operation)
    waiting[co] = nil
  else
    block(operation)
  end
  return outward(co, resume(co))
end

function coroutine.resume(co, ...)
  if waiting[co] then
    return false, 'cannot resume non-suspended coroutine'
  end
  return outward(co, resume(co, ...))
end

local function unwrap(ok, ...)
  if ok then
    return ...
  end
  local reason = ...
  error(reason, type(reason) == 'string' and 2 or 0)
end

function coroutine.wrap(f)
  local co = create(f)
  return function(...)
    if waiting[co] then
      error('cannot resume non-suspended coroutine', 2)
    end
    return unwrap(outward(co, resume(co, ...)))
  end
end

function coroutine.status(co)
  return waiting[co] and 'normal' or status(co)
end

-- Without a hook of its own a script can't disturb the one that limits it.
debug.sethook = nil

return prelude
