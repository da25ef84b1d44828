-- Compares docs/lua/qrelay.d.lua with what the process that runs this script has: names, which
-- attributes can be written, numbers of parameters, and options. Each difference is one line.

local definitions = ...
assert(load(definitions, '=qrelay.d.lua'))

-- What Lua 5.3 has itself, by its manual.
local STANDARD = {
  [''] = [[_G _VERSION assert collectgarbage dofile error getmetatable ipairs load loadfile next
    pairs pcall print rawequal rawget rawlen rawset require select setmetatable tonumber tostring
    type xpcall coroutine debug io math os package string table utf8]],
  math = [[abs acos asin atan ceil cos deg exp floor fmod huge log max maxinteger min mininteger
    modf pi rad random randomseed sin sqrt tan tointeger type ult]],
  table = 'concat insert move pack remove sort unpack',
  package = 'config cpath loaded loadlib path preload searchers searchpath',
  string = [[byte char dump find format gmatch gsub len lower match pack packsize rep reverse sub
    unpack upper]],
  coroutine = 'create isyieldable resume running status wrap yield',
  debug = [[debug gethook getinfo getlocal getmetatable getregistry getupvalue getuservalue
    setlocal setmetatable setupvalue setuservalue traceback upvalueid upvaluejoin]],
  io = 'close flush input lines open output popen read stderr stdin stdout tmpfile type write',
  os = 'clock date difftime execute exit getenv remove rename setlocale time tmpname',
  utf8 = 'char charpattern codepoint codes len offset',
}

-- Names that only raise an error with a hint: an editor should complain about them. And variables
-- that a script sets.
local UNDEFINED = 'setfenv getfenv module newproxy ffi jit'
local OWN = 'log_server reload'

local function set(text)
  local result = {}
  for word in text:gmatch('%S+') do result[word] = true end
  return result
end

-- What the definitions say: described[owner][name] is 'function', 'read', 'write' or 'option'. The
-- owner is a class, a table, or '' for global variables. parameters[owner .. '.' .. name] is the
-- number of a function's parameters, and absent if it takes any number.
local described, parameters = {[''] = {}}, {}

local function describe(owner, name, what)
  described[owner] = described[owner] or {}
  assert(not described[owner][name], owner .. '.' .. name .. ' is defined twice')
  described[owner][name] = what
end

local class, last_class
local class_of = {}
for line in definitions:gmatch('[^\n]*') do
  local name = line:match('^%-%-%-@class (%S+)$')
  local field, rest = line:match('^%-%-%-@field ([%w_]+)%f[^%w_](.*)')
  local owner, separator, method, list =
    line:match('^function ([%w_]*)([.:]?)([%w_]+)%((.-)%) end$')
  local variable = line:match('^([%w_.]+) = ')
  if name then
    class, last_class = name, name
    described[class] = described[class] or {}
  elseif field then
    local optional = rest:match('^%?')
    local what = optional and 'option' or rest:find('(read only)', 1, true) and 'read' or 'write'
    describe(class, field, what)
  elseif line:match('^local ') then
    class_of[line:match('^local ([%w_]+) = {}$')] = last_class
  elseif method then
    if separator == '' then owner, method = '', owner .. method end
    owner = class_of[owner] or owner
    describe(owner, method, 'function')
    if not list:find('...', 1, true) then
      parameters[owner .. '.' .. method] = select(2, list:gsub('[%w_]+', ''))
    end
  elseif variable then
    local owner, name = variable:match('^(.-)%.?([%w_]+)$')
    describe(owner, name, 'variable')
  end
end

local differences = {}

local function differ(...)
  differences[#differences + 1] = string.format(...)
end

-- Compares the names of an owner.
local function compare(owner, there)
  local defined = described[owner] or {}
  for name in pairs(there) do
    if not defined[name] then differ("%s: '%s' is there and not defined", owner, name) end
  end
  for name in pairs(defined) do
    if not there[name] then differ("%s: '%s' is defined and not there", owner, name) end
  end
end

-- Compares a number of parameters with what the function says when it gets too many.
local function compare_parameters(owner, name, f)
  local surplus = {}
  for i = 1, 30 do surplus[i] = true end
  local ok, message = pcall(f, nil, table.unpack(surplus))
  local count = not ok and (message:match('expected at most (%d+) argument') or
    message:find('expected no arguments', 1, true) and 0)
  local expected = parameters[owner .. '.' .. name]
  if tostring(tonumber(count)) ~= tostring(expected) and name ~= 'cancel_job' then
    differ('%s.%s: %s parameters defined: %s', owner, name, expected, message)
  end
end

-- Compares a table of functions with its definitions.
local function compare_table(owner, library)
  local standard, there = set(STANDARD[owner] or ''), {}
  for name, value in pairs(library) do
    if not standard[name] then there[name] = true end
    if type(value) == 'function' and not STANDARD[owner] and owner ~= 'bit' then
      compare_parameters(owner, name, value)
    end
  end
  compare(owner, there)
end

-- Returns a variable of the function that a kind of object has as a metamethod.
local function upvalue(object, event, wanted)
  local f = debug.getmetatable(object)[event]
  for i = 1, math.huge do
    local name, value = debug.getupvalue(f, i)
    if not name or name == wanted then return value end
  end
end

-- Compares a kind of object with its class.
local function compare_class(owner, object)
  local there = {}
  local setters = assert(upvalue(object, '__newindex', 'setters'), owner)
  for name, get in pairs(assert(upvalue(object, '__index', 'getters'), owner)) do
    there[name] = true
    local what = setters[name] and 'write' or 'read'
    local first, method = debug.getupvalue(get, 1)
    if first == 'method' then
      what = 'function'
      compare_parameters(owner, name, method)
    end
    local defined = described[owner] and described[owner][name]
    if defined and defined ~= what then differ('%s.%s: defined for %s', owner, name, defined) end
  end
  compare(owner, there)
end

-- Compares options with those that the error for a wrong key lists.
local function compare_options(owner, f, ...)
  local ok, message = pcall(f, ...)
  local list = not ok and message:match('; there is (.*)$')
  if list then
    compare(owner, set((list:gsub(',', ' '))))
  else
    differ('%s: no list of options: %s', owner, message)
  end
end

-- Whatever a script can reach without a mail.
local function compare_globals()
  local there = set(OWN)
  local standard, undefined = set(STANDARD['']), set(UNDEFINED)
  for name, value in pairs(_G) do
    if not standard[name] and not undefined[name] then there[name] = true end
    if STANDARD[name] or type(value) == 'table' and there[name] then compare_table(name, value) end
    if type(value) == 'function' and there[name] and described[''][name] == 'function' and
        name ~= 'gcinfo' then
      compare_parameters('', name, value)
    end
  end
  compare('', there)
end

-- Whatever a script needs a mail or a database for. `objects` are one of each kind by class.
local function compare_objects(objects)
  for owner, object in pairs(objects) do compare_class(owner, object) end
  compare_class('pg', pg)
end

-- The names of a control group can't be listed, so only what is defined is looked for.
local function compare_cgroup(group)
  for name in pairs(described['qrelay.Cgroup']) do
    if not group[name] then differ("qrelay.Cgroup: '%s' is defined and not there", name) end
  end
end

-- Every class has to be compared, and every option of every function.
local function compare_classes(objects)
  local compared = set([[qrelay.Cgroup qrelay.Systemd qrelay.ListenOptions qrelay.Settings
    qrelay.ConnectOptions qrelay.ExecOptions qrelay.SocketOptions qrelay.JsonOptions
    qrelay.DatabaseOptions]])
  for owner in pairs(described) do
    if owner:match('^qrelay%.') and not compared[owner] and not objects[owner] then
      differ('%s: not compared', owner)
    end
  end
end

compare_globals()
local wrong = {[1] = 1}
compare_options('qrelay.ListenOptions', qmqp_listen, '@x', print, wrong)
compare_options('qrelay.Settings', settings, wrong)
compare_options('qrelay.SocketOptions', socket.connect, socket, '@x', wrong)
compare_options('qrelay.JsonOptions', json.parse, '1', wrong)
compare_options('qrelay.DatabaseOptions', pg.new, pg, '', nil, wrong)

-- Returns all differences, for a handler with a mail and a database.
return function(m, db)
  compare_options('qrelay.ConnectOptions', m.connect, m, '@x', wrong)
  compare_options('qrelay.ExecOptions', m.exec, m, '/x', wrong)
  local client = control_client:new('@x')
  local objects = {
    ['qrelay.Mail'] = m,
    ['qrelay.Action'] = m:discard(),
    ['qrelay.Address'] = qmqp_resolve('@x'),
    ['qrelay.Dictionary'] = shared:new('x'),
    ['qrelay.Socket'] = assert(socket:connect('127.0.0.1:9', {type = 'dgram'})),
    ['qrelay.ControlClient'] = client,
    ['qrelay.ControlBuilder'] = client:build(),
    ['qrelay.Database'] = db,
    ['qrelay.Result'] = assert(db:execute('SELECT 1')),
  }
  assert(db:transaction(function(tx) objects['qrelay.Transaction'] = tx end))
  compare_objects(objects)
  compare_cgroup(m.cgroup)
  compare_classes(objects)
  table.sort(differences)
  return differences
end
