-- The configuration that ./quickstart runs. It refuses mail to example.invalid, and relays all
-- other mail to one next hop.
--
-- The sockets are in a directory that the caller chooses, so that no root is needed. A real
-- configuration would say '/run/cm4all/qrelay/qrelay.sock'.
local dir = assert(os.getenv('QRELAY_DIR'), 'QRELAY_DIR must name a directory for the sockets')

-- Everything here has a default (docs/configuration.md).
max_size = 4 * 1024 * 1024 -- bytes of a message
settings{
  workers = 2,             -- processes; if one of them dies, the others go on
  relay_timeout = 30,      -- seconds from a complete request to its answer
}

-- Runs once per mail, and decides about the mail. The handler may wait (sleep, queries), because
-- other handlers run meanwhile. It should not compute for long, because no other handler of the
-- worker runs meanwhile.
local function handler(m)
  for _, recipient in ipairs(m.recipients) do
    if recipient:find('@example%.invalid$') then
      return m:reject('no such domain: ' .. recipient)
    end
  end
  m.account = 'uid-' .. tostring(m.uid)         -- for the log
  m:insert_header('X-Relayed-For', m.account)   -- becomes the first line of the mail
  return m:connect(dir .. '/next.sock', {timeout = 20})
end

qmqp_listen(dir .. '/qrelay.sock', handler)
