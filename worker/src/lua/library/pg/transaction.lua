-- db:transaction(f): what f does by its argument happens as a whole or not at all.
local check, begin, commit, rollback = ...
local error, pcall, select = error, pcall, select

local function finish(tx, ok, ...)
  if not ok then
    rollback(tx)
    error((...), 0)
  end
  local committed, message = commit(tx)
  if not committed then
    return nil, message
  end
  if select('#', ...) == 0 then
    return true
  end
  return ...
end

return function(db, f, ...)
  local problem = check(db, f, ...)
  if problem then
    error(problem, 2)
  end
  local tx, message = begin(db)
  if not tx then
    return nil, message
  end
  return finish(tx, pcall(f, tx))
end
