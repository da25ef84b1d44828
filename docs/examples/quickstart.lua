-- The configuration that ./quickstart runs. It relays everything to one next hop, but for mail to
-- example.invalid, which it refuses.
--
-- Sockets are in a directory of the caller's choice, so that no root is needed:
-- a real configuration would say '/run/cm4all/qrelay/qrelay.sock'.
local dir = assert(os.getenv('QRELAY_DIR'), 'QRELAY_DIR must name a directory for the sockets')

-- Everything here has a default (docs/configuration.md).
max_size = 4 * 1024 * 1024 -- bytes of a message
settings{
  workers = 2,             -- processes; each of them may die without the others noticing
  relay_timeout = 30,      -- seconds from a complete request to its answer
}

-- Runs once per mail, and decides about it. It may wait (sleep, connect), since others go on
-- meanwhile; it should not compute for long, since nobody else's handler runs then.
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
