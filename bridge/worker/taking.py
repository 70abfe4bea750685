"""In the worker: the question that takes messages out of Redis, and the watch that waits for some without taking any.

A blocking command that takes, such as BRPOP, gives a message to a process that may be dead already. Here a connection
looks at its lists (EXISTS) and has Redis say when one of them changes (CLIENT TRACKING): what waits is in the list, and
what is taken is noted in the same step. Never decides when to ask; redis_channel.py does.
"""

import json
import math
import time
from collections.abc import Iterable
from hashlib import sha1
from typing import Any

from redis.exceptions import NoPermissionError, ResponseError

from bridge.errors import as_text

#: One script takes at most this many messages, and no further one when it has this many bytes.
MOST_MESSAGES, MOST_BYTES = 100, 1 << 20
#: Of a larger message the script reads only what is around its body, and of that no more: it keeps Redis from others.
READ_BYTES = 1 << 16
#: A larger message is left to BRPOP: the script would need five times as much memory. Redis takes none above 1 << 29.
LARGEST_BYTES = 1 << 27

#: What lets a worker wait without taking, where something does not.
REMEDY = (
    "let this user run HELLO, CLIENT TRACKING, CLIENT CACHING, SCRIPT LOAD, EVALSHA, TIME and what kombu needs, "
    "on Redis 6 or newer without a proxy that refuses them; or use RabbitMQ"
)
#: What a trial writes goes away by itself after this, in seconds.
TRIAL_S = 10

#: In the answer of a server that does not know a command, or not this form of it.
_NEVER = ("unknown", "syntax", "wrong number of arguments")

# Removes what is acknowledged, notes the message of BRPOP if there is one, then takes further ones as a series of
# BRPOPs would: most urgent list first, queues in turn. Only half of what waits, rounded up: other workers want theirs.
# cjson reads a message, whose tag must be plain ASCII; what is stored is its text, untouched. The ZREM needs no memory,
# and after a first write Redis lets a script finish: a full server would refuse to note what it gave away.
# Answers 1 if it has left the first one, for it cannot read that or its list is none, else 0; then with which time of
# its own clock it has noted, and what it took.
TAKE = """
local clock = redis.call('TIME')
local now, queues, rotates = string.format('%d.%06d', clock[1], clock[2]), tonumber(ARGV[1]), ARGV[2] == '1'
local count, bytes, readable, largest = tonumber(ARGV[3]), tonumber(ARGV[4]), tonumber(ARGV[5]), tonumber(ARGV[6])

local function note(tag, text)
  redis.call('ZREM', KEYS[1], tag)
  redis.call('ZADD', KEYS[1], now, tag)
  redis.call('HSET', KEYS[2], tag, text)
end

local function without_body(raw)
  local _, first = raw:find('"body"%s*:%s*"')
  local last = first and raw:find('"', first + 1, true)
  if not last or raw:sub(last - 1, last - 1) == '\\\\' then return nil end
  if first + #raw - last >= readable then return nil end
  return raw:sub(1, first) .. raw:sub(last)
end

local function read(raw)
  local text = raw
  if #raw > readable then text = #raw <= largest and without_body(raw) end
  local ok, message = pcall(cjson.decode, text)
  local properties = ok and type(message) == 'table' and message.properties
  local info = type(properties) == 'table' and properties.delivery_info
  if type(info) ~= 'table' then return nil end
  local tag, exchange, key = properties.delivery_tag, info.exchange, info.routing_key
  if type(tag) ~= 'string' or type(exchange) ~= 'string' or type(key) ~= 'string' then return nil end
  if tag:find('[^ -~]') then return nil end
  return tag, '[' .. raw .. ', ' .. cjson.encode(exchange) .. ', ' .. cjson.encode(key) .. ']'
end

if #ARGV > 8 then
  redis.call('ZREM', KEYS[1], unpack(ARGV, 9))
  redis.call('HDEL', KEYS[2], unpack(ARGV, 9))
end
if ARGV[8] ~= '' then note(ARGV[7], ARGV[8]) end
local order, is_empty, waiting, taken = {}, {}, 0, {0, now}
for queue = 1, queues do order[queue] = queue end
for k = 3, #KEYS do
  local length = redis.pcall('LLEN', KEYS[k])
  if type(length) == 'number' then
    waiting = waiting + length
  else
    is_empty[KEYS[k]], taken[1] = true, 1
  end
end

local function most_urgent()
  for first = 2, #KEYS - 1, queues do
    for place, queue in ipairs(order) do
      local key = KEYS[first + queue]
      local raw = not is_empty[key] and redis.call('LINDEX', key, -1)
      if raw then return key, raw, place end
      is_empty[key] = true
    end
  end
end

for number = 1, math.min(count, math.ceil(waiting / 2)) do
  local key, raw, place = most_urgent()
  if not key or (number > 1 and #raw > bytes) then break end
  local tag, text = read(raw)
  if not tag then
    if number == 1 then taken[1] = 1 end
    break
  end
  taken[1] = 0
  redis.call('LTRIM', key, 0, -2)
  note(tag, text)
  bytes = bytes - #raw
  taken[#taken + 1] = order[place]
  taken[#taken + 1] = tag
  taken[#taken + 1] = raw
  if rotates then table.insert(order, table.remove(order, place)) end
end
return taken
"""


class Watch:
    """On one connection, Redis says once when a list changes that it was last seen to hold.

    What it says makes the connection readable, and is read together with the next answer.
    """

    def __init__(self) -> None:
        self._socket: Any = None  # where Redis has been told to say so; a new one knows nothing
        self._refused_until = 0.0

    def may(self, connection: Any) -> bool:
        """Whether Redis can say so here: only in its protocol 3, from Redis 6 on."""
        return time.monotonic() >= self._refused_until and speaks_3(connection)

    def is_on(self, connection: Any) -> bool:
        """Whether this connection, which has not been made anew since, has been used to look."""
        return self._socket is not None and getattr(connection, "_sock", None) is self._socket

    def before(self, connection: Any) -> list[tuple[str, ...]]:
        """Commands to be sent before the first look."""
        return [] if self.is_on(connection) else [("CLIENT", "TRACKING", "ON", "OPTIN", "NOLOOP")]

    def look(self, keys: Iterable[str]) -> list[tuple[str, ...]]:
        """Commands that say how many of the lists are not empty, and have Redis say when that may have changed."""
        return [("CLIENT", "CACHING", "YES"), ("EXISTS", *keys)]

    def begin(self, connection: Any) -> None:
        """It was answered."""
        self._socket = connection._sock

    def hear(self, connection: Any) -> None:
        """Read what Redis has said, while no answer is due.

        Raises:
            RedisError, OSError: the connection is gone.
        """
        try:
            while connection.can_read(0):
                connection.read_response(push_request=True)
        except BaseException:
            connection.disconnect()
            raise

    def refuse(self, error: ResponseError, pause_s: float) -> None:
        """Redis does not do it: for good where a proxy or an ACL forbids it, else (busy, in a failover) for a while."""
        self._refused_until = math.inf if lasts(error) else time.monotonic() + pause_s

    def end(self, connection: Any) -> None:
        """Nothing is said from now on, so that what comes is the answer to a question.

        Raises:
            RedisError, OSError: the connection is gone.
        """
        if self.is_on(connection):
            self._socket = None
            connection.send_command("CLIENT", "TRACKING", "OFF", check_health=False)  # might connect anew, unseen
            read_reply(connection)


def speaks_3(connection: Any) -> bool:
    """Whether a connection of redis-py speaks Redis' protocol 3."""
    return str(getattr(connection, "protocol", 2)) == "3"


def lasts(error: ResponseError) -> bool:
    """Whether Redis, a proxy or an ACL refuses for good; else it is busy, full or in a failover."""
    return isinstance(error, NoPermissionError) or any(each in str(error).lower() for each in _NEVER)


def trial(connection: Any, key: str) -> str:
    """Why messages cannot be waited for on a connection without taking any; empty if they can.

    Takes a message of its own out of a list. What it writes begins with `key`, and is removed.

    Raises:
        RedisError, OSError: the connection is gone.
    """
    if not speaks_3(connection):
        return "the connection speaks Redis' protocol 2"
    keys = [f"{key}.{name}" for name in ("index", "unacked", "queue")]
    queue = keys[-1]
    raw = json.dumps({"properties": {"delivery_tag": "trial", "delivery_info": {"exchange": "", "routing_key": queue}}})
    question = (1, 0, 1, MOST_BYTES, READ_BYTES, LARGEST_BYTES, "", "")
    watch = Watch()
    commands: list[tuple[Any, ...]] = [
        ("RPUSH", queue, raw),
        ("SCRIPT", "LOAD", TAKE),
        *watch.before(connection),
        ("EVALSHA", sha1(TAKE.encode()).hexdigest(), 3, *keys, *question),
        *watch.look([queue]),
        *(("EXPIRE", each, TRIAL_S) for each in keys),  # should it be killed before the next
        ("DEL", *keys),
    ]
    connection.send_packed_command(connection.pack_commands(commands))
    replies = [read_reply(connection) for _ in commands]
    refused = [reply for reply in replies if isinstance(reply, ResponseError)]
    if refused:
        return as_text(refused[0])
    return "" if replies[3][2:] == [1, b"trial", raw.encode()] else "the script takes no message"


def read_reply(connection: Any) -> Any:
    """The answer to one command, or the error that Redis gives in its place; changes said before it are passed over.

    Raises:
        RedisError, OSError: the connection is gone.
    """
    while True:
        try:
            reply = connection.read_response(push_request=True)
        except ResponseError as error:
            return error
        if reply is not None:  # what a change is read as; no command here answers so
            return reply
