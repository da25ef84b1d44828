-- Tests the mail object: attributes, header, staleness.

local function raises(expected, f, ...)
  local ok, message = pcall(f, ...)
  assert(not ok, 'no error: ' .. expected)
  assert(type(message) == 'string', type(message))
  assert(message:find(expected, 1, true), message)
  return message
end

local kept

qmqp_listen('/attributes', function(m)
  assert(type(m) == 'userdata' and tostring(m):find('^mail'))
  assert(m.sender == 's@example.net')
  assert(#m.recipients == 2 and m.recipients[1] == 'r1@example.net')
  assert(m.pid == 42 and m.uid == 1000 and m.gid == 100)
  assert(m.peer == 'PID=42 UID=1000')
  assert(m.account == nil)
  assert(m.id == 'id-1' and m.listener == '/a')
  assert(m.size == #'Subject: one\r\nX-Spam: a\r\n b\r\nx-spam: c\r\n\r\nbody X-Spam: d\r\n')

  m.sender = ''
  assert(m.sender == '')
  m.sender = 'other@example.net'
  raises("bad value for 'sender' (expected a valid address or '', got 'nobody')",
    function() m.sender = 'nobody' end)
  raises("expected a string, got nil", function() m.sender = nil end)
  assert(m.sender == 'other@example.net')

  local list = m.recipients
  list[1] = 'changed@example.net'
  assert(m.recipients[1] == 'r1@example.net', 'a list of its own')
  m.recipients = list
  assert(m.recipients[1] == 'changed@example.net')
  raises("expected a list of 1 to 1024 addresses, got 0", function() m.recipients = {} end)
  raises("expected valid addresses, got ''", function() m.recipients = {''} end)
  raises("expected a list, got 'a@b'", function() m.recipients = 'a@b' end)
  raises("with other keys or holes", function() m.recipients = {'a@b.c', x = 1} end)

  m.account = 'alice'
  assert(m.account == 'alice')
  m.account = 42
  assert(m.account == '42')
  m.account = nil
  assert(m.account == nil)
  raises("1 to 255 bytes of printable text", function() m.account = '' end)
  raises("1 to 255 bytes of printable text", function() m.account = 'a\nb' end)
  raises("1 to 255 bytes of printable text", function() m.account = ('a'):rep(256) end)

  raises("mail has no attribute or method 'sendr'; did you mean 'sender'?",
    function() return m.sendr end)
  raises("mail has no attribute or method 1", function() return m[1] end)
  raises("mail has no writable attribute 'uid'", function() m.uid = 0 end)
  raises("mail has no writable attribute 'accont'; did you mean 'account'?",
    function() m.accont = 'x' end)

  local message = raises("expected a mail object, got nil; call its methods with a colon",
    function() local connect = m.connect; connect() end)
  assert(message:find('config.lua:%d+: '), message)
  raises("expected a mail object, got '/b'", function() m.connect('/b') end)

  kept = m
  return m:discard()
end)

qmqp_listen('/stale', function(m)
  assert(m ~= kept and kept == kept)
  assert(type(kept) == 'userdata' and tostring(kept))
  raises('Stale object', function() return kept.sender end)
  raises('Stale object', function() kept.sender = '' end)
  raises('Stale object', function() kept:connect('/a') end)
  raises('Stale object', function() kept:discard() end)
  raises('Stale object', function() kept:insert_header('A', 'b') end)
  raises('Stale object', function() kept:header('A') end)
  -- A cached result of connect doesn't hide that the mail is stale.
  m:connect('/cached')
  raises('Stale object', function() kept:connect('/cached') end)
  return m:discard()
end)

qmqp_listen('/header', function(m)
  assert(m:header('subject') == 'one')
  assert(m:header('X-SPAM') == 'a b')
  assert(m:header('missing') == nil)
  local all = m:headers('x-spam')
  assert(#all == 2 and all[1] == 'a b' and all[2] == 'c')
  assert(#m:headers('missing') == 0)
  raises("bad argument #1 to 'header' (name: expected a field name", m.header, m, 'a:b')
  raises("bad argument #1 to 'header' (name: expected a string, got nil)", m.header, m)

  m:insert_header('X-A', 'text')
  m:insert_header('X-B', 5)
  m:insert_header('X-C', 5.0)
  m:insert_header('X-D', setmetatable({}, {__tostring = function() return m.id end}))
  m:insert_header('X-E', qmqp_resolve('/run/x'))
  raises("got 'a?b'", m.insert_header, m, 'X', 'a\nb')
  raises("bad argument #2 to 'insert_header' (value: expected a string, got nil)",
    m.insert_header, m, 'X')
  raises("expected a string, got a table", m.insert_header, m, 'X', {})
  raises("expected a field name", m.insert_header, m, 'X Y', 'z')
  raises("the line has 999 bytes", m.insert_header, m, 'X', ('x'):rep(996))
  m:insert_header('X', ('x'):rep(995))
  for _ = 7, 16 do m:insert_header('Y', 'z') end
  raises('at most 16', m.insert_header, m, 'Y', 'z')

  assert(m:remove_header('x-spam') == 2)
  assert(m:remove_header('x-spam') == 2)
  assert(m:remove_header('missing') == 0)
  assert(#m:headers('x-spam') == 2, 'the message as it came in')
  return m:discard()
end)
