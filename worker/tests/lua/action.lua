-- Tests actions, and the arguments that they refuse.

local function raises(expected, f, ...)
  local ok, message = pcall(f, ...)
  assert(not ok, 'no error: ' .. expected)
  assert(message:find(expected, 1, true), message)
end

local kept

qmqp_listen('/connect', function(m)
  for _, to in ipairs{
    '127.0.0.1', '127.0.0.1:1', '::1', '[::1]', '[::1]:2', '/run/next.sock', '@next',
    qmqp_resolve('192.0.2.1'), {'/a', '@b', qmqp_resolve('::1')},
  } do
    local action = m:connect(to)
    assert(type(action) == 'userdata' and tostring(action) == 'connect')
  end
  m:connect({'/a', '/b'}, {timeout = 1.5, connect_timeout = '2', order = 'random'})

  -- A host name is looked up when the mail is relayed.
  assert(tostring(m:connect('mail.example.net')) == 'connect')
  m:connect({'mail.example.net:6280', '/a', 'other'}, {order = 'random'})
  raises("bad argument #1 to 'connect' (address: 'mail_1!.example'", m.connect, m, 'mail_1!.example')
  raises("bad argument #1 to 'connect' (address: expected a string or an address object, got nil)",
    m.connect, m)
  raises("expected a string or an address object, got a table", m.connect, m, {{}})
  raises('an empty list', m.connect, m, {})
  raises("the port must be a number from 1 to 65535", m.connect, m, '127.0.0.1:99999')
  raises("connect has no option 'timeot'; did you mean 'timeout'?",
    m.connect, m, '/a', {timeot = 1})
  raises("bad option 'timeout' of 'connect' (expected seconds, more than 0 and at most 3600, " ..
    "got 0)", m.connect, m, '/a', {timeout = 0})
  raises("got 3601", m.connect, m, '/a', {timeout = 3601})
  raises("bad option 'order' of 'connect' (expected 'random', got 'sorted')",
    m.connect, m, '/a', {order = 'sorted'})
  raises("bad argument #2 to 'connect' (options: expected a table, got 5)", m.connect, m, '/a', 5)

  assert(m:connect('/same') == m:connect('/same'))
  local list = {'/a'}
  local first = m:connect(list)
  list[1] = '/b'
  assert(m:connect(list) ~= first)
  for i = 1, 1000 do m:connect('/run/' .. i) end

  kept = m:connect('/kept')
  return kept
end)

qmqp_listen('/another', function(m)
  return kept
end)

qmqp_listen('/reply', function(m)
  assert(tostring(m:discard()) == 'discard')
  assert(tostring(m:reject('text')) == 'reject')
  assert(tostring(m:defer(42)) == 'defer')
  raises("bad argument #1 to 'reject' (text: expected a string, got a table)", m.reject, m, {})
  raises("bad argument #1 to 'defer' (text: expected a string, got true)", m.defer, m, true)
  return m:discard()
end)

qmqp_listen('/exec', function(m)
  m:exec('/bin/true')
  m:exec('/bin/true', 'a', 1, 2.0, {env = {A = 'b', C = 3}, timeout = 0.5})
  m:exec_raw('./relative', {})
  raises("expected a path with a '/'", m.exec, m, 'true')
  raises("bad argument #1 to 'exec' (program: expected a string, got nil)", m.exec, m)
  raises("bad argument #3 to 'exec_raw' (argument: expected a string, got nil)",
    m.exec_raw, m, '/bin/true', 'a', nil, 'b')
  raises("expected text without NUL bytes", m.exec, m, '/bin/true', 'a\0b')
  raises("exec has no option 'environ'", m.exec, m, '/bin/true', {environ = {}})
  raises("bad option 'env' of 'exec' (expected a table, got 'x')",
    m.exec, m, '/bin/true', {env = 'x'})
  raises("names of letters, digits and '_', got 'A-B'",
    m.exec, m, '/bin/true', {env = {['A-B'] = ''}})
  raises("names of letters, digits and '_', got 1", m.exec, m, '/bin/true', {env = {'x'}})
  raises("string values, got true", m.exec, m, '/bin/true', {env = {A = true}})
  local many = {}
  for i = 1, 33 do many['V' .. i] = '' end
  raises("at most 32 variables, got 33", m.exec, m, '/bin/true', {env = many})
  raises("at most 2048 arguments", m.exec, m, '/bin/true', table.unpack(
    (function() local t = {} for i = 1, 2048 do t[i] = 'x' end return t end)()))
  raises("bytes, expected at most 1048576", m.exec, m, '/bin/true', ('x'):rep(1 << 20))
  return m:discard()
end)

raises("'sleep' (seconds: expected a number from 0 to 3600, got -1", sleep, -1)
raises("'sleep' (seconds: expected a number from 0 to 3600, got 'x'", sleep, 'x')
sleep('0')
