-- Tests address objects.

local function raises(expected, f, ...)
  local ok, message = pcall(f, ...)
  assert(not ok, 'no error: ' .. expected)
  assert(message:find(expected, 1, true), message)
end

for text, shown in pairs{
  ['192.168.0.2'] = '192.168.0.2:628',
  ['[::1]:4321'] = '[::1]:4321',
  ['::1'] = '[::1]:628',
  ['/run/server5.sock'] = '/run/server5.sock',
  ['@server4'] = '@server4',
} do
  local address = qmqp_resolve(text)
  assert(type(address) == 'userdata')
  assert(tostring(address) == shown, tostring(address))
  assert(address == qmqp_resolve(text))
end

assert(tostring(log_resolve('127.0.0.1')) == '127.0.0.1:5479')
assert(tostring(control_resolve('127.0.0.1')) == '127.0.0.1:5478')
assert(qmqp_resolve('127.0.0.1') ~= qmqp_resolve('127.0.0.1:1'))
assert(qmqp_resolve('127.0.0.1') ~= 1)

-- An end-to-end test resolves names, because what they mean depends on the machine.
local function mistakes()
  raises("bad argument #1 to 'qmqp_resolve' (address: expected a string, got nil)", qmqp_resolve)
  raises("bad argument #1 to 'qmqp_resolve' (address: ''", qmqp_resolve, '')
  raises("bad argument #1 to 'log_resolve'", log_resolve, 'a b')
end

mistakes()

qmqp_listen('/a', function(m)
  mistakes()
  return m:connect(qmqp_resolve('127.0.0.1'))
end)
