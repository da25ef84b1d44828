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
