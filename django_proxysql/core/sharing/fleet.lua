-- Adds up what all processes that were there lately have said.
local request = cjson.decode(ARGV[1])
local time = redis.call('TIME')
local now = tonumber(time[1]) * 1000 + math.floor(tonumber(time[2]) / 1000)
-- What is ahead of the time was there before the clock was set back, and not since.
local alive = redis.call('ZRANGEBYSCORE', KEYS[3], now - request.alive * 1000, now + 1000)
local sums = {}
for first = 1, #alive, 500 do
  local part = {}
  for i = first, math.min(first + 499, #alive) do part[#part + 1] = alive[i] end
  for _, text in ipairs(redis.call('HMGET', KEYS[4], unpack(part))) do
    local good, connections = pcall(cjson.decode, text or '')
    if good and type(connections) == 'table' then
      for field, held in pairs(connections) do
        if type(held) == 'number' then sums[field] = (sums[field] or 0) + held end
      end
    end
  end
end
return {tostring(#alive), cjson.encode(sums), tostring(now),
        unpack(redis.call('LRANGE', KEYS[5], 0, -1))}
