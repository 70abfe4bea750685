"""What a seed means: which tasks are sent when, and which faults strike when. Pure; the same seed, the same plan."""

import random
import uuid
from typing import NamedTuple

#: Units of work the producer sends per second; a chain or a chord is one unit. Below what two actors can do.
UNITS_PER_S = 20
#: Kind of work -> its share of all units. Each kind that a run sends at all, it sends at least twice.
SHARES = {
    "noop_late": 20, "noop_early": 14, "batch_late": 16, "batch_early": 8, "nap_late": 8, "nap_early": 4,
    "long_late": 0.6, "long_early": 0.3, "retry_late": 4, "retry_early": 2, "chain": 4, "group": 1.5, "chord": 1.5,
    "poison": 0.15, "once": 0.3, "invalid": 3, "revoked": 2, "expired": 2, "eta": 2, "large": 1, "cpu": 4,
}  # fmt: skip
#: Kind of fault -> its share of all faults.
WEIGHTS = {
    "kill executor": 5, "kill actor": 3, "kill driver": 3, "kill worker": 2, "term worker": 2, "kill node": 1,
    "restart redis": 1.5, "stop executor": 1, "stop actor": 1, "stop driver": 1, "stop worker": 1, "stop node": 0.7,
    "stop redis": 1, "reset all": 2, "reset one": 2,
}  # fmt: skip
#: Pause between two faults in seconds: at least, and on average beyond that.
PAUSE_S = (1.0, 2.5)
#: How long a stopped process rests, in seconds; Redis at most a third of it.
STOP_S = (0.5, 4.0)


class Fault(NamedTuple):
    """`pick` chooses the victim among those alive then; `seconds` is how long it rests, or stays away."""

    at: float
    kind: str
    pick: float
    seconds: float


class Unit(NamedTuple):
    """Something the producer sends `at` seconds after the start: tasks with these ids."""

    at: float
    kind: str
    ids: list[str]
    number: float  # in [0, 1): how long a nap is, how often a retry is tried, ...


#: Kinds that are several tasks.
TASKS_OF = {"chain": 3, "group": 6, "chord": 5}


def appendonly(seed):
    """Whether this run's Redis writes everything to disk, and may therefore be killed."""
    return seed % 2 == 1


def faults(seed, seconds):
    """The faults of a run, in order."""
    chance = random.Random(f"faults of {seed}")
    kinds, weights = list(WEIGHTS), list(WEIGHTS.values())
    found, at = [], 1.0
    while at < seconds:
        kind = chance.choices(kinds, weights)[0]
        rest = chance.uniform(*STOP_S) / (3 if kind == "stop redis" else 1)
        found.append(Fault(round(at, 2), kind, chance.random(), round(rest, 2)))
        at += PAUSE_S[0] + chance.expovariate(1 / PAUSE_S[1])
    return found


def units(seed, seconds):
    """What is sent in a run, in order."""
    chance = random.Random(f"tasks of {seed}")
    count, total = int(seconds * UNITS_PER_S), sum(SHARES.values())
    kinds = [kind for kind, share in SHARES.items() for _ in range(max(2, round(count * share / total)))]
    chance.shuffle(kinds)
    gap = seconds / len(kinds)
    return [
        Unit(round(n * gap, 3), kind, [_id(chance) for _ in range(TASKS_OF.get(kind, 1))], round(chance.random(), 3))
        for n, kind in enumerate(kinds)
    ]


def _id(chance):
    return str(uuid.UUID(int=chance.getrandbits(128), version=4))
