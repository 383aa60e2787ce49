-- Counts a process in, and compares what it knows of circuits and drains with what is stored.
local request = cjson.decode(ARGV[1])
local circuits, drains, processes, counts, timeline = KEYS[1], KEYS[2], KEYS[3], KEYS[4], KEYS[5]
local me = request.me
local time = redis.call('TIME')
local now_us = tonumber(time[1]) * 1000000 + tonumber(time[2])
local now = math.floor(now_us / 1000)
local refused, garbage = nil, 0

-- Where Redis is full or a replica, what is written fails, and what is read does not.
local function write(...)
  local done = redis.pcall(...)
  if type(done) == 'table' and done.err then
    refused = done.err
    return false
  end
  return true
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

local function between(value, least, most)
  value = tonumber(value)
  if value and value >= least and value <= most then return math.floor(value) end
end

local function read(key, field)
  local text = redis.pcall('HGET', key, field)
  if type(text) == 'table' then
    garbage = garbage + 1
    return nil
  end
  if not text then return nil end
  local good, record = pcall(cjson.decode, text)
  if good and type(record) == 'table' then
    -- One that is so large that adding to it changes nothing could never be outdone.
    record.v = between(record.v, 1, 4000000000000000)
    if record.v then return record end
  end
  garbage = garbage + 1
  return nil
end

local function store(key, field, record, seconds)
  local copy = {}
  for name, value in pairs(record) do copy[name] = value end
  -- cjson writes 14 digits of a number, and this one has 16.
  copy.v = string.format('%.0f', record.v)
  return write('HSET', key, field, cjson.encode(copy))
    and write('PEXPIRE', key, seconds * 1000)
end

local function note(field, state, why)
  local moment = cjson.encode({p = field, s = state, t = now, e = why})
  if write('RPUSH', timeline, moment) then
    write('LTRIM', timeline, -request.moments, -1)
    write('PEXPIRE', timeline, request.history * 1000)
  end
end

-- Adds up what all processes that were there lately have said.
local function fleet()
  -- What is ahead of the time was there before the clock was set back, and not since.
  local alive = redis.call('ZRANGEBYSCORE', processes, now - request.alive * 1000, now + 1000)
  local sums = {}
  for first = 1, #alive, 500 do
    local part = {}
    for i = first, math.min(first + 499, #alive) do part[#part + 1] = alive[i] end
    for _, text in ipairs(redis.call('HMGET', counts, unpack(part))) do
      local good, connections = pcall(cjson.decode, text or '')
      if good and type(connections) == 'table' then
        for field, held in pairs(connections) do
          if type(held) == 'number' then sums[field] = (sums[field] or 0) + held end
        end
      end
    end
  end
  return {processes = #alive, connections = sums, now = now,
          moments = redis.call('LRANGE', timeline, 0, -1)}
end

local reply = {circuits = {}, drains = {}}

for field, theirs in pairs(request.circuits) do
  local record = read(circuits, field)
  local known = tonumber(theirs.v)
  local version = record and record.v or 0
  local before = record
  local following = math.max(now_us, version + 1, known + 1)
  local is_open = record and record.s == 'open'
  local noted, changed, done, why = nil, false, false, ''
  if record then
    -- Redis's clock may have been set back since.
    record.due = between(record.due, 0, now + theirs.longest) or now
    record.out = between(record.out, 0, now) or now
    record.hu = between(record.hu, 0, now + 2 * theirs.lease) or 0
    record.c = between(record.c, 0, now) or 0
    if type(record.hosts) ~= 'table' then record.hosts = {} end
    if type(record.h) ~= 'string' then record.h = '' end
  end
  local function as_reported(version, by)
    return {v = version, s = 'open', due = now + theirs.due, out = now - theirs.out,
            err = theirs.err, fault = theirs.fault, q = theirs.q, by = by, h = '', hu = 0,
            hosts = {request.host}}
  end
  local function as_closed(version)
    return {v = version, s = 'closed', c = now, ch = request.host,
            hosts = record and record.hosts or {}}
  end
  if theirs.op == 'open' and version <= known then
    local fresh = as_reported(following, me)
    if is_open then
      fresh.out, fresh.h, fresh.hu = record.out, record.h, record.hu
      fresh.hosts = record.hosts
      -- Two have found the same.
      if record.by ~= me then fresh.by = '' end
    elseif record and now - record.c < theirs.longest then
      -- Closed not long ago. Who opened it before that, and once more now, may be the only
      -- ones that cannot reach it, if others can.
      local again = false
      for _, host in ipairs(record.hosts) do again = again or host == request.host end
      if again and record.ch ~= request.host then
        fresh = record
        fresh.c = now
      elseif not again and #record.hosts < 20 then
        fresh.hosts = record.hosts
        table.insert(fresh.hosts, request.host)
      end
    end
    if fresh.s == 'open' and not is_open then noted, why = 'open', theirs.err end
    record, done = fresh, true
  elseif theirs.op == 'close' and version <= known then
    if is_open then noted = 'closed' end
    record, done = as_closed(following), true
  elseif theirs.op == 'withdraw' and is_open and record.by == me then
    noted, why = 'closed', 'withdrawn'
    record, done = as_closed(following), true
  elseif version < known and (theirs.s == 'open' or record) then
    if theirs.s == 'open' then
      record = as_reported(known, '')
    else
      record = as_closed(known)
    end
    changed = true
  end
  changed = changed or done
  local leased = false
  if record and record.s == 'open' then
    local other = record.h ~= '' and record.h ~= me and record.hu > now
    if theirs.asks then
      if not other and (record.due <= now or theirs.by_hand) then
        record.h, record.hu, leased, changed = me, now + theirs.lease, true, true
      end
    elseif theirs.hold then
      if not other then
        record.h, record.hu, changed = me, now + theirs.lease, true
      end
    elseif record.h == me and not theirs.keep then
      record.h, record.hu, changed = '', 0, true
    end
  else
    leased = true
  end
  if changed then
    if store(circuits, field, record, request.history) then
      if noted then note(field, noted, why) end
    else
      -- No process can be kept from trying, and none knows of it.
      record, leased, done = before, true, false
    end
  end
  local held = 0
  if record and record.s == 'open' and record.h ~= '' and record.h ~= me then
    held = math.max(0, record.hu - now)
  end
  reply.circuits[field] = record and {
    v = string.format('%.0f', record.v), s = record.s, done = done, leased = leased,
    due = math.max(0, (record.due or now) - now), out = math.max(0, now - (record.out or now)),
    err = record.err, fault = record.fault, q = record.q, held = held,
  } or {v = '0', s = 'closed', done = done, leased = leased}
end

local stored = {}
for field, theirs in pairs(request.drains) do
  local record = read(drains, field)
  if record and type(record.on) ~= 'boolean' then record, garbage = nil, garbage + 1 end
  if record then record.at = between(record.at, 0, now) or 0 end
  local known = tonumber(theirs.v)
  if not theirs.asked and (record and record.v or 0) < known then
    record = {v = known, on = theirs.on, at = now - theirs.age}
    store(drains, field, record, request.keep_drains)
  end
  stored[field] = record
end

local function is_last(field)
  for other in pairs(request.drains) do
    if other ~= field and not (stored[other] and stored[other].on) then return false end
  end
  return true
end

for field, theirs in pairs(request.drains) do
  local record = stored[field]
  local version = record and record.v or 0
  local was = record and record.on or false
  local at = now - theirs.age
  local done, taken, denied = false, false, false
  if theirs.asked then
    if record and record.at > at and record.by ~= me then
      -- An operator has asked for something since.
      done = true
    elseif theirs.on and not was and not theirs.force and is_last(field) then
      done, denied = true, true
    else
      local asked = {v = math.max(now_us, version + 1, tonumber(theirs.v) + 1), on = theirs.on,
                     at = at, by = me}
      if store(drains, field, asked, request.keep_drains) then
        if was ~= theirs.on then note(field, theirs.on and 'drained' or 'undrained', '') end
        record, done, taken = asked, true, true
        stored[field] = record
      end
    end
  end
  if record or done then
    record = record or {v = 0, on = false, at = 0}
    reply.drains[field] = {v = string.format('%.0f', record.v), on = record.on, done = done,
                           taken = taken, refused = denied, age = now - record.at}
  end
end

heartbeat()
reply.refused, reply.garbage = refused, garbage
if request.fleet then
  local good, found = pcall(fleet)
  -- A sum that is no number of JSON's would take the whole answer along.
  if good and pcall(cjson.encode, found) then reply.fleet = found end
end
return cjson.encode(reply)
