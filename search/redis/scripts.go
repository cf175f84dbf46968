package redis

import goredis "github.com/redis/go-redis/v9"

// What a document is made of, in the order in which its sum is taken, and the sum. A sum tells what was changed by hand. k has the names of those fields, a line each, that only the
// Query Engine reads. A script begins with this.
const common = `
local function sum(d)
  local parts = {}
  for n, v in ipairs(d) do parts[n] = #v .. ':' .. v end
  return redis.sha1hex(table.concat(parts))
end
local function entries(i)
  local ok, list = pcall(cjson.decode, i or '[]')
  if ok and type(list) == 'table' then return list end
  return {}
end
local function unindex(prefix, i)
  for _, e in ipairs(entries(i)) do redis.call('ZREM', prefix .. e[1], e[3]) end
end
local function newer(old, epoch, version)
  local e, v = tonumber(old[1] or ''), tonumber(old[2] or '')
  if not e or not v then return false end
  epoch, version = tonumber(epoch), tonumber(version)
  return e > epoch or e == epoch and v > version
end
local function more(k)
  local names = {}
  for name in string.gmatch(k, '[^\n]+') do table.insert(names, name) end
  return names
end
`

// upsert writes one document. KEYS: lease, document, all names. ARGV: lease (empty: without one), prefix, name, force, then the fields t u e v s f a b c d j i k and those that k names.
// i is a JSON list of the document's places in the indexes: [key, score, member].
var upsert = goredis.NewScript(common + `
if ARGV[1] ~= '' and redis.call('GET', KEYS[1]) ~= ARGV[1] then return redis.error_reply('LEASELOST the lease is not in force') end
local old = redis.call('HMGET', KEYS[2], 'e', 'v', 'i')
if ARGV[4] ~= '1' and newer(old, ARGV[7], ARGV[8]) then return 0 end
unindex(ARGV[2], old[3])
local d = {}
for n = 5, #ARGV do d[n - 4] = ARGV[n] end
local set = {'t', d[1], 'u', d[2], 'e', d[3], 'v', d[4], 's', d[5], 'f', d[6], 'a', d[7], 'b', d[8], 'c', d[9], 'd', d[10], 'j', d[11], 'i', d[12], 'k', d[13], 'sum', sum(d)}
for n, name in ipairs(more(d[13])) do
  table.insert(set, name)
  table.insert(set, d[13 + n])
end
redis.call('DEL', KEYS[2])
redis.call('HSET', KEYS[2], unpack(set))
redis.call('ZADD', KEYS[3], 0, ARGV[3])
for _, e in ipairs(entries(d[12])) do redis.call('ZADD', ARGV[2] .. e[1], e[2], e[3]) end
return 1`)

// remove deletes one document. KEYS: as upsert. ARGV: lease, prefix, name, force, epoch, version.
var remove = goredis.NewScript(common + `
if ARGV[1] ~= '' and redis.call('GET', KEYS[1]) ~= ARGV[1] then return redis.error_reply('LEASELOST the lease is not in force') end
local old = redis.call('HMGET', KEYS[2], 'e', 'v', 'i')
if ARGV[4] ~= '1' and newer(old, ARGV[5], ARGV[6]) then return 0 end
unindex(ARGV[2], old[3])
redis.call('DEL', KEYS[2])
redis.call('ZREM', KEYS[3], ARGV[3])
return 1`)

// step takes a lease one batch further. KEYS: lease, leases. ARGV: lease, next lease, shards, entry of the shards (empty: unchanged).
var step = goredis.NewScript(`
if redis.call('GET', KEYS[1]) ~= ARGV[1] then return redis.error_reply('LEASELOST the lease is not in force') end
redis.call('SET', KEYS[1], ARGV[2])
if ARGV[4] ~= '' then redis.call('HSET', KEYS[2], ARGV[3], ARGV[4]) end
return 1`)

// inspect tells of documents what a comparison needs: type, uuid, epoch, version, shard and fingerprint of each, whether it is whole and in its indexes, a sum of what it is, and whether it
// is among all names. KEYS: all names. ARGV: prefix, names.
var inspect = goredis.NewScript(common + `
local out = {}
for n = 2, #ARGV do
  local d = redis.call('HMGET', ARGV[1] .. 'd:' .. ARGV[n], 't', 'u', 'e', 'v', 's', 'f', 'a', 'b', 'c', 'd', 'j', 'i', 'k', 'sum')
  local whole = true
  for m = 1, 14 do
    if not d[m] then whole, d[m] = false, '' end
  end
  local want = table.remove(d)
  local names = more(d[13])
  if #names == 0 or #names > 1000 then
    whole = false
  else
    for m, value in ipairs(redis.call('HMGET', ARGV[1] .. 'd:' .. ARGV[n], unpack(names))) do
      d[13 + m] = value or ''
    end
  end
  local is = redis.sha1hex(table.concat(d, '\0') .. '\0' .. want)
  whole = whole and sum(d) == want and redis.call('HLEN', ARGV[1] .. 'd:' .. ARGV[n]) == 14 + #names
  if whole then
    for _, e in ipairs(entries(d[12])) do
      local score = redis.call('ZSCORE', ARGV[1] .. e[1], e[3])
      if not score or tonumber(score) ~= tonumber(e[2]) then whole = false end
    end
  end
  local named = redis.call('ZSCORE', KEYS[1], ARGV[n])
  out[n - 1] = {d[1], d[2], d[3], d[4], d[5], d[6], whole and 1 or 0, is, named and 1 or 0}
end
return out`)
