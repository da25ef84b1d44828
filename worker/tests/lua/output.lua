-- Writes with print and io; the test in Rust checks the log.

print('loading', 1, nil, true)
io.write('no line end')

assert(io.type(io.stdout) == 'file' and io.type(io.stderr) == 'file')
assert(io.type(42) == nil)
assert(io.output() == io.stdout)
assert(io.stdout:write('a', 1, '\n') == io.stdout)
assert(io.stderr:setvbuf('no'))
assert(select(2, io.stdout:close()) == 'cannot close standard file')

local path = os.tmpname()
local file = assert(io.open(path, 'w'))
io.output(file)
io.write('to the file')
io.close()
io.output(io.stdout)
assert(io.open(path):read('a') == 'to the file')
os.remove(path)

qmqp_listen('/a', function(m)
  print('in the handler\nsecond line')
  io.stderr:write('warning\n')
  print('evil \27[31m control')
  io.write('unfinished')
  return m:discard()
end)
