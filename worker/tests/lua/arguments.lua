-- Tests that every function of qrelay raises an error when it gets more arguments than it takes.
local db = pg:new('host=/nowhere client_encoding=UTF8')
local client = control_client:new('@nobody')
local channel = socket:connect('@nobody', {type = 'dgram'})
local dictionary = shared:new('arguments')

-- Functions that take any number of arguments.
local ANY = {
  exec = true, exec_raw = true,
  fade_children = true, flush_filter_cache = true, discard_session = true, flush_http_cache = true,
  terminate_children = true, disconnect_database = true, reset_limiter = true,
  reject_client = true, tarpit_client = true, cancel_job = true,
}

local globals = {
  qmqp_listen = 3, settings = 1, every = 2, sleep = 1,
  qmqp_resolve = 1, log_resolve = 1, control_resolve = 1,
}

local libraries = {
  sodium = {
    bin2hex = 1, hex2bin = 1, randombytes = 1,
    crypto_box_keypair = 0, crypto_box_seal = 2, crypto_box_seal_open = 3,
    crypto_scalarmult_base = 1,
    crypto_sign_keypair = 0, crypto_sign_detached = 2, crypto_sign_verify_detached = 3,
  },
  json = {dump = 1, parse = 2},
  jwt = {sign = 3, verify = 2},
  log = {debug = 2, info = 2, warn = 2, error = 2},
}

-- Libraries whose functions are called with a colon.
local with_colon = {
  shared = {new = 1},
  socket = {connect = 2},
  control_client = {new = 1},
}

local function methods(m)
  return {
    {m, {connect = 2, discard = 1, reject = 1, defer = 1,
         header = 1, headers = 1, insert_header = 2, remove_header = 1}},
    {pg, {new = 3, encode_array = 1, decode_array = 1}},
    {db, {execute = 2, transaction = 1, listen = 2}},
    {dictionary, {get = 1, set = 3, add = 3, incr = 3, delete = 1, keys = 1}},
    {channel, {send = 3, close = 0}},
    {client, {build = 0, send = 1}},
    {client:build(), {}},
  }
end

local function expected(count)
  if count == 0 then
    return 'no arguments'
  end
  return 'at most ' .. count .. (count == 1 and ' argument' or ' arguments')
end

-- Checks one function, which takes `count` arguments. The further arguments of `check`, such as the
-- object of a method, are passed first in every call.
local function check(name, f, count, ...)
  local arguments = table.pack(...)
  local function call(more, value)
    local all = {table.unpack(arguments, 1, arguments.n)}
    for i = arguments.n + 1, arguments.n + more do
      all[i] = value
    end
    return pcall(f, table.unpack(all, 1, arguments.n + more))
  end
  for surplus = 1, 3 do
    local got = count + surplus
    local ok, message = call(got, true)
    local wanted = name .. ': expected ' .. expected(count) .. ', got ' .. got
    assert(not ok and message:find(wanted, 1, true), name .. ': ' .. tostring(message))
  end
  -- Nils at the end don't count, and `count` arguments are never too many.
  for _, more in ipairs({count, count + 1, count + 5}) do
    local _, message = call(more, nil)
    assert(not tostring(message):find('expected [%a ]*%d* ?arguments?, got %d'), message)
  end
end

-- Returns the names of an object's methods, which the error about an unknown name lists.
local function names_of(object)
  local ok, message = pcall(function() return object.zzzzzzzzzzzzzzzzzzzz end)
  assert(not ok)
  local names = {}
  for name in (message:match('there is (.*)$') or ''):gmatch('[%w_]+') do
    names[#names + 1] = name
  end
  return names
end

qmqp_listen('/a', function(m)
  for name, count in pairs(globals) do
    check(name, _G[name], count)
  end
  for library, functions in pairs(libraries) do
    for name, f in pairs(_G[library]) do
      if type(f) == 'function' then
        local shown = (library == 'json' or library == 'jwt') and library .. '.' .. name or name
        check(shown, f, (assert(functions[name], name)))
      end
    end
  end
  for library, functions in pairs(with_colon) do
    for name, f in pairs(_G[library]) do
      check(library .. ':' .. name, f, assert(functions[name], name), _G[library])
    end
  end
  for _, kind in ipairs(methods(m)) do
    local object, functions = kind[1], kind[2]
    local checked = 0
    for _, name in ipairs(names_of(object)) do
      local ok, f = pcall(function() return object[name] end)
      if ok and type(f) == 'function' and not ANY[name] then
        check(name, f, assert(functions[name], name), object)
        checked = checked + 1
      end
    end
    for _ in pairs(functions) do
      checked = checked - 1
    end
    assert(checked == 0, tostring(object))
  end
  -- The error has the position of the line in the script.
  local ok, message = pcall(function() m:discard('a', 'b') end)
  assert(message:find('config.lua:%d+: discard: expected at most 1 argument, got 2$'), message)
  -- A method of a builder that refuses its arguments adds nothing.
  ok, message = pcall(function() client:build():cancel_job('a', 'b', 'c') end)
  assert(not ok and message:find('got 3', 1, true), message)
  -- Lua's own functions ignore surplus arguments, as in standard Lua.
  assert(math.pow(2, 3, 4) == 8 and io.stdout:flush(1) == io.stdout)
  return m:discard()
end)
