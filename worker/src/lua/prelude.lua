-- What the libraries are made with, and what makes waiting possible everywhere.
-- RAISE and WAIT are marks that a Rust function returns before an error message
-- or before an operation; no script can have these values.
local RAISE, WAIT, native = ...

local error, setmetatable, type = error, setmetatable, type
local create, resume, yield = coroutine.create, coroutine.resume, coroutine.yield
local isyieldable, status = coroutine.isyieldable, coroutine.status
local block, results, stop, flags = native.block, native.results, native.stop, native.flags

-- Ends every call of a Rust function. It is called as a tail call, so level 2
-- is the script's line that called the function.
local function finish(...)
  if (...) == RAISE then
    local _, message = ...
    error(message, 2)
  end
  return ...
end

-- The same for functions that may have to wait.
local function await(...)
  if (...) ~= WAIT then
    return finish(...)
  end
  local _, operation = ...
  if isyieldable() then
    yield(WAIT, operation)
  else
    block(operation)
  end
  return finish(results(operation))
end

local prelude = {}

function prelude.checked(f)
  return function(...)
    return finish(f(...))
  end
end

function prelude.awaiting(f)
  return function(...)
    return await(f(...))
  end
end

-- __index and __newindex of a kind of object.
function prelude.class(methods, getters, setters, unknown)
  local function index(self, key)
    local method = methods[key]
    if method then
      return method
    end
    local get = getters[key]
    if get then
      return finish(get(self))
    end
    return finish(unknown(key, false))
  end

  local function newindex(self, key, value)
    local set = setters[key]
    if set then
      return finish(set(self, value))
    end
    return finish(unknown(key, true))
  end

  return index, newindex
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
    return ...
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
  local message = ...
  error(message, type(message) == 'string' and 2 or 0)
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
