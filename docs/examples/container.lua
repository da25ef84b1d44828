-- The configuration of packaging/Containerfile: everything goes to one next hop, which the
-- environment names.
local next_hop = os.getenv('QRELAY_NEXT_HOP') or '192.0.2.25'

qmqp_listen('/run/cm4all/qrelay/qrelay.sock', function(m)
  return m:connect(next_hop)
end)
