"""What Redis runs by itself, in one piece: each script is atomic, and its keys are of one layer, or of its index.

Of a layer that is changed, only the mark of its record is compared: it names the record among all that any server has
ever made, so that no change is made of a record which only looks like the one that it was computed from.
"""

from __future__ import annotations

from sharednorm_server.store.redis.layout import CHECK

# Keys of all: layer, sessions, turns, snapshots, taken, deleted; and last the stamp.

LOOK = """
local mark = redis.call('HGET', KEYS[1], 'mark')
if not mark then
  return {0, redis.call('SISMEMBER', KEYS[6], ARGV[3])}
end
local change = ''
if ARGV[2] ~= '' then
  change = redis.call('HGET', KEYS[2], ARGV[2]) or ''
end
local floor = redis.call('HGET', KEYS[1], 'floor') or '0'
if mark == ARGV[1] then
  return {1, change, floor}
end
return {2, change, floor, redis.call('HGETALL', KEYS[1])}
"""
"""mark of the copy, session or '', uid -> {0, deleted} | {1, change, floor} | {2, change, floor, fields}."""

# The floor is the highest number of a session that was forgotten; numbers are below 2^53, which Lua's hold.
SWAP = """
if redis.call('HGET', KEYS[1], 'mark') ~= ARGV[1] then
  return 0
end
local count = tonumber(ARGV[2])
redis.call('HSET', KEYS[1], unpack(ARGV, 8, 7 + count))
if #ARGV > 7 + count then
  redis.call('HDEL', KEYS[1], unpack(ARGV, 8 + count))
end
local session = ARGV[3]
if session ~= '' then
  redis.call('HSET', KEYS[2], session, ARGV[4])
  redis.call('ZADD', KEYS[3], redis.call('HINCRBY', KEYS[1], 'turn', 1), session)
  local more = redis.call('ZCARD', KEYS[3]) - tonumber(ARGV[5])
  if more > 0 then
    local gone = redis.call('ZPOPMIN', KEYS[3], more)
    local floor = tonumber(redis.call('HGET', KEYS[1], 'floor') or '0')
    for i = 1, #gone, 2 do
      redis.call('HDEL', KEYS[2], gone[i])
      local number = struct.unpack('>I8', gone[i])
      floor = math.max(floor, number)
    end
    redis.call('HSET', KEYS[1], 'floor', string.format('%.0f', floor))
  end
end
redis.call('PUBLISH', ARGV[6], ARGV[7])
return 1
"""
"""mark of before, number of values, session or '', its change, most sessions, channel, message, names and values...,
names of fields that go... -> whether that was done."""

TAKE_IN = """
if redis.call('EXISTS', KEYS[1]) == 1 then
  return 0
end
redis.call('DEL', KEYS[2], KEYS[3], KEYS[4], KEYS[5])
local at = 4
local function some(words, what)
  for i = 1, tonumber(ARGV[at]) do
    what(unpack(ARGV, at + 1 + (i - 1) * words, at + i * words))
  end
  at = at + 1 + tonumber(ARGV[at]) * words
end
some(2, function(name, value) redis.call('HSET', KEYS[1], name, value) end)
local turn = 0
some(2, function(session, change)
  turn = turn + 1
  redis.call('HSET', KEYS[2], session, change)
  redis.call('ZADD', KEYS[3], turn, session)
end)
some(3, function(version, about, state)
  redis.call('HSET', KEYS[5], version, about)
  redis.call('HSET', KEYS[4], version, state)
end)
redis.call('HSET', KEYS[1], 'turn', turn, 'floor', ARGV[3])
redis.call('ZADD', KEYS[7], 0, ARGV[1])
redis.call('SADD', KEYS[8], ARGV[2])
redis.call('HSETNX', KEYS[#KEYS], 'version', layout)
return 1
"""
"""Also keys: names of the namespace, namespaces. name, namespace, floor, then how many and what: names and values;
sessions and changes, the least recent first; versions, when and steps, states -> whether that was done."""

DELETE = """
local uid = redis.call('HGET', KEYS[1], 'uid')
if not uid or (ARGV[3] ~= '' and uid ~= ARGV[3]) then
  return 0
end
redis.call('DEL', KEYS[1], KEYS[2], KEYS[3], KEYS[4], KEYS[5])
redis.call('SADD', KEYS[6], uid)
redis.call('EXPIRE', KEYS[6], ARGV[4])
redis.call('ZREM', KEYS[7], ARGV[1])
if redis.call('ZCARD', KEYS[7]) == 0 then
  redis.call('SREM', KEYS[8], ARGV[2])
end
redis.call('PUBLISH', ARGV[5], ARGV[6])
return 1
"""
"""Also keys: names of the namespace, namespaces. name, namespace, uid or '', seconds for which it is known that the
layer was deleted, channel, message -> whether that was done."""

SNAPSHOT = """
if redis.call('HGET', KEYS[1], 'uid') ~= ARGV[1] then
  return 0
end
if redis.call('HSETNX', KEYS[5], ARGV[2], ARGV[3]) == 1 then
  redis.call('HSET', KEYS[4], ARGV[2], ARGV[4])
end
if #ARGV > 4 then
  redis.call('HDEL', KEYS[4], unpack(ARGV, 5))
  redis.call('HDEL', KEYS[5], unpack(ARGV, 5))
end
return 1
"""
"""uid, version, when and steps, the state, versions that go... -> whether the layer is there."""

SESSIONS = """
return redis.call('INCRBY', KEYS[1], ARGV[1])
"""
"""Keys: how many sessions were given, stamp. How many more -> how many then."""

ALL = {script: CHECK + script for script in (LOOK, SWAP, TAKE_IN, DELETE, SNAPSHOT, SESSIONS)}
"""What Redis is told to run for each: nothing, where the stamp is of another layout."""
