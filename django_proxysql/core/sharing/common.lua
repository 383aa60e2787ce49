-- What the other scripts begin with.
local request = cjson.decode(ARGV[1])
local circuits, drains, processes, counts, timeline = KEYS[1], KEYS[2], KEYS[3], KEYS[4], KEYS[5]
local me = request.me
local time = redis.call('TIME')
local now_us = tonumber(time[1]) * 1000000 + tonumber(time[2])
local now = math.floor(now_us / 1000)
local refused, garbage = nil, 0
local DAY = 86400000
-- The field that says who wrote last, and which request of theirs it was: no peer's address.
local LAST = '*'

-- Where Redis is full or a replica, what is written fails, and what is read does not.
local function write(...)
  local done = redis.pcall(...)
  if type(done) == 'table' and done.err then
    refused = done.err
    return false
  end
  return true
end

-- Tells apart all that was ever stored; false where one of the keys is something else.
local function state_version()
  local one, other = redis.pcall('HGET', circuits, LAST), redis.pcall('HGET', drains, LAST)
  if type(one) == 'table' or type(other) == 'table' then return false end
  return (one or '') .. ' ' .. (other or '')
end

local function keep(key, seconds)
  local left = redis.call('PTTL', key)
  if left > -2 and left < seconds * 500 then write('PEXPIRE', key, seconds * 1000) end
end

local function heartbeat()
  write('ZADD', processes, now, me)
  write('HSET', counts, me, request.heartbeat)
  local gone = redis.pcall('ZRANGEBYSCORE', processes, '-inf', now - 60000, 'LIMIT', 0, 100)
  if type(gone) == 'table' and #gone > 0 then
    write('ZREM', processes, unpack(gone))
    write('HDEL', counts, unpack(gone))
  end
  keep(processes, 60)
  keep(counts, 60)
  keep(circuits, request.history)
  keep(drains, request.keep_drains)
end
