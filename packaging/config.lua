-- The configuration of qrelay. qrelay-config(5) describes everything that can stand here, and
-- /usr/share/doc/cm4all-qrelay/docs/cookbook.md has whole scripts. After a change:
--
--   qrelay check && systemctl reload cm4all-qrelay

-- systemd listens on /run/cm4all/qrelay/qrelay.sock (cm4all-qrelay.socket) and passes the socket.
qmqp_listen(systemd, function(m)
  -- Clients keep their mail and try again later, until a next hop stands here, such as:
  -- return m:connect('192.0.2.25')
  return m:defer('no next hop is configured yet: see /etc/cm4all/qrelay/config.lua')
end)
