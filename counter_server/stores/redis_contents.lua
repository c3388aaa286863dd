-- Everything that is counted and remembered, at one moment.
--
-- KEYS: counters (hash: name to value), names, epoch; as in redis_batch.lua.
-- ARGV: the pattern of the idempotency keys.
-- The answer: both copies of the epoch, the counters, and the keys; names and values take turns.

local found = {}
local cursor = '0'
repeat
    local page = redis.call('SCAN', cursor, 'MATCH', ARGV[1], 'COUNT', 1000)
    cursor = page[1]
    for _, key in ipairs(page[2]) do
        local record = redis.call('GET', key)
        if record then
            found[#found + 1] = key
            found[#found + 1] = record
        end
    end
until cursor == '0'
return {redis.call('HGET', KEYS[1], ''), redis.call('GET', KEYS[3]), redis.call('HGETALL', KEYS[1]), found}
