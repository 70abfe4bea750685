"""Run both chains on a worker that is there, and print their times and what crossed Redis.

python -m examples.resident_chain.compare [MEGABYTES] [ROUNDS]
"""

import statistics
import sys
import time

import redis

from examples.resident_chain.tasks import CHAINS, URL, app


def crossed(client):
    """Bytes that Redis has read and written so far."""
    stats = client.info("stats")
    return stats["total_net_input_bytes"] + stats["total_net_output_bytes"]


def compare(megabytes, rounds):
    """Per chain: the result, the median time in seconds and bytes over Redis per chain."""
    client, count = redis.Redis.from_url(URL), int(megabytes * 1e6 / 8)
    for chained in CHAINS.values():
        chained(100).apply_async().get(timeout=120)  # everybody is connected, and the names are known
    found = {name: ([], [], []) for name in CHAINS}
    for _ in range(rounds):
        for name, chained in CHAINS.items():
            before, started = crossed(client), time.monotonic()
            value = chained(count).apply_async().get(timeout=120)
            times, sizes, values = found[name]
            times.append(time.monotonic() - started), sizes.append(crossed(client) - before), values.append(value)
    client.close()
    return {
        name: (values[0], statistics.median(times), statistics.median(sizes))
        for name, (times, sizes, values) in found.items()
    }


def main(megabytes=8.0, rounds=5):
    print(f"a chain of four GPU tasks on {megabytes:g} MB; medians of {rounds} rounds")
    for name, (value, seconds, size) in compare(megabytes, rounds).items():
        print(f"{name:12} {1000 * seconds:8.1f} ms {size / 1e6:9.3f} MB over Redis   mean {value:.12f}")
    app.close()


if __name__ == "__main__":
    main(*(kind(text) for kind, text in zip((float, int), sys.argv[1:], strict=False)))
