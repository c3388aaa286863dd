-- One batch, applied exactly once. A script is atomic in Redis, and is logged as one transaction.
--
-- KEYS: counters (hash: name to value), names (sorted set, for pages), epoch, the client's record, then the
--       idempotency keys of the operations that have one, in their order.
-- ARGV: the epoch that the client knows or '', a fresh epoch, the batch's sequence, seconds that a client and that a key
--       are remembered, and the operations (MessagePack).
-- The answer: a status and its details. Numbers travel as decimal strings, as Lua's numbers have 53 bits.

local counters, names, epoch_key, record_key = KEYS[1], KEYS[2], KEYS[3], KEYS[4]
local known, fresh, sequence = ARGV[1], ARGV[2], tonumber(ARGV[3])

-- The counters and the names hold the epoch too, under a name that no counter has. So the loss of a single key, by
-- deletion or eviction, is noticed.
local mark = ''
local epoch = redis.call('HGET', counters, mark)
local witness = redis.call('GET', epoch_key)
if witness and witness ~= epoch then
    redis.call('HSET', counters, mark, fresh)
    redis.call('SET', epoch_key, fresh)
    redis.call('DEL', names)
    return {'lost', fresh}
end
if known ~= '' and known ~= epoch then
    return {'lost', epoch or ''}
end
if epoch and not redis.call('ZSCORE', names, mark) then
    for _, name in ipairs(redis.call('HKEYS', counters)) do
        redis.call('ZADD', names, 0, name)
    end
end
if sequence > 0 then
    local record = redis.call('GET', record_key)
    local last = 0
    if record then
        local colon = string.find(record, ':', 1, true)
        last = tonumber(string.sub(record, 1, colon - 1))
        if sequence == last then
            return {'done', epoch, string.sub(record, colon + 1)}
        end
    end
    if sequence ~= last + 1 then
        return {'refused', tostring(last)}
    end
    if not epoch then
        epoch = fresh
        redis.call('HSET', counters, mark, epoch)
        redis.call('ZADD', names, 0, mark)
    end
    if not witness then
        redis.call('SET', epoch_key, epoch)
    end
end

-- Return whether the integer a is less than b; both are decimal, without leading zeros.
local function less(a, b)
    local below, above = string.sub(a, 1, 1) == '-', string.sub(b, 1, 1) == '-'
    if below ~= above then
        return below
    end
    if below then
        a, b = string.sub(b, 2), string.sub(a, 2)
    end
    if #a ~= #b then
        return #a < #b
    end
    return a < b
end

local exact = 2 ^ 53
local there = {} -- names of counters that exist

local function note(name)
    if not there[name] then
        there[name] = true
        redis.call('ZADD', names, 0, name)
    end
end

-- Add to a counter; return the result, or nothing if it would not fit 64 bits.
local function add(name, by)
    local number = redis.pcall('HINCRBY', counters, name, by)
    if type(number) == 'table' then
        if string.find(number.err, 'overflow', 1, true) then
            return nil
        end
        error(number)
    end
    if number > -exact and number < exact then
        return string.format('%.0f', number)
    end
    return redis.call('HGET', counters, name)
end

local next_key = 5

local function increment(name, by, minimum, maximum, fingerprint)
    local key
    if fingerprint ~= '' then
        key = KEYS[next_key]
        next_key = next_key + 1
        local used = redis.call('GET', key)
        if used then
            if string.sub(used, 1, 32) == fingerprint then
                return 'r' .. string.sub(used, 33)
            end
            return 'k'
        end
    end
    local before
    if minimum ~= '' or maximum ~= '' or not there[name] then
        before = redis.call('HGET', counters, name)
    end
    local value = add(name, by)
    if not value then
        return 'l' .. (before or redis.call('HGET', counters, name) or '0')
    end
    if (minimum ~= '' and less(value, minimum)) or (maximum ~= '' and less(maximum, value)) then
        if before then
            redis.call('HSET', counters, name, before)
        else
            redis.call('HDEL', counters, name)
        end
        return 'l' .. (before or '0')
    end
    if before then
        there[name] = true
    else
        note(name)
    end
    if key then
        redis.call('SET', key, fingerprint .. value, 'EX', ARGV[5])
    end
    return 'i' .. value
end

local function keep(record, overwrite)
    local key = KEYS[next_key]
    next_key = next_key + 1
    local used = redis.call('GET', key)
    if used and used ~= record and not overwrite then
        return 'k'
    end
    if used ~= record then
        redis.call('SET', key, record, 'EX', ARGV[5])
    end
    return 'i' .. string.sub(record, 33)
end

local function page(after, limit)
    local found = redis.call('ZRANGEBYLEX', names, '(' .. after, '+', 'LIMIT', 0, limit + 1)
    local answer = {#found > limit and 'more' or 'last'}
    if #found > limit then
        found[#found] = nil
    end
    if #found > 0 then
        local values = redis.call('HMGET', counters, unpack(found))
        for i, name in ipairs(found) do
            answer[2 * i] = name
            answer[2 * i + 1] = values[i]
        end
    end
    return answer
end

local results = {}
for i, operation in ipairs(cmsgpack.unpack(ARGV[6])) do
    local result
    if type(operation) == 'string' then
        result = increment(operation, '1', '', '', '')
    else
        local kind, name = operation[1], operation[2]
        if kind == 'increment' then
            result = increment(name, operation[3], operation[4], operation[5], operation[6])
        elseif kind == 'get' then
            local value = redis.call('HGET', counters, name)
            result = value and 'i' .. value or 'n'
        elseif kind == 'set' then
            note(name)
            redis.call('HSET', counters, name, operation[3])
            result = 'i' .. operation[3]
        elseif kind == 'keep' then
            result = keep(name, operation[3] ~= '')
        elseif kind == 'delete' then
            there[name] = nil
            redis.call('ZREM', names, name)
            result = redis.call('HDEL', counters, name) == 1 and 't' or 'f'
        elseif kind == 'scan' then
            result = page(name, operation[3])
        else
            result = 'u'
        end
    end
    results[i] = result
end

local packed = cmsgpack.pack(results)
if sequence > 0 then
    redis.call('SET', record_key, sequence .. ':' .. packed, 'EX', ARGV[4])
end
return {'done', epoch or '', packed}
