-- print, io.write and the standard streams go to the log.
local line, is_stream, stdout, stderr = ...

local select, tostring, concat = select, tostring, table.concat
local io_output, io_type = io.output, io.type
local output = stdout

io.stdout, io.stderr = stdout, stderr

function print(...)
  local parts = {...}
  for i = 1, select('#', ...) do
    parts[i] = tostring(parts[i])
  end
  line(concat(parts, '\t', 1, select('#', ...)))
end

function io.output(file)
  if is_stream(file) then
    output = file
  elseif file ~= nil then
    output = io_output(file)
  end
  return output
end

function io.write(...)
  return output:write(...)
end

function io.close(file)
  return (file or output):close()
end

function io.type(value)
  return is_stream(value) and 'file' or io_type(value)
end
