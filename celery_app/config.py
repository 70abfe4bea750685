"""Every Celery setting this app uses, each with its reason. Times in seconds.

Knobs of the bridge itself are not here: they live in `bridge/settings.py` and come from ``BRIDGE_*``.
"""

import os

# Where tasks wait. From the environment, so that one image runs on a laptop and in a cluster.
broker_url = os.environ.get("CELERY_BROKER_URL", "redis://localhost:6379/0")
# Where results lie. Redis does both well, and one service less is one failure less.
result_backend = os.environ.get("CELERY_RESULT_BACKEND", broker_url)

# The worker starts before its broker does in many deployments: wait for it. Said aloud because Celery warns otherwise.
broker_connection_retry_on_startup = True
# Redis hands a killed worker's tasks to another one after this long. Workers of the bridge renew what they hold, so it
# may be far shorter; a plain Celery worker on the same queues needs it above its longest wait plus run.
broker_transport_options = {"visibility_timeout": 300}

# JSON only: a producer in any language can send, and a message can never run code by being decoded.
task_serializer = "json"
result_serializer = "json"
accept_content = ["json"]
result_accept_content = ["json"]

# Prefork for CPU tasks and the driver for GPU tasks in one worker. `python -m bridge.worker` uses it in any case;
# with this line a plain `celery worker` does too.
worker_pool = "bridge.pool:HybridPool"
# One CPU task in hand per child: what is prefetched cannot be taken by an idle worker. GPU tasks do not depend on it,
# they are bounded by BRIDGE_GPU_SLOTS.
worker_prefetch_multiplier = 1

# Acknowledge when a task has ended, so that tasks of a killed worker run again elsewhere. Every task of this app gives
# the same result when it runs twice.
task_acks_late = True
# STARTED tells waiting from running: with the bridge it means that the task's call has left for an actor.
task_track_started = True
# Nothing here should take longer: a body that hangs is interrupted, then its process is replaced.
task_soft_time_limit = 120
task_time_limit = 150
# Results are fetched within seconds of their end; pictures left behind would fill Redis.
result_expires = 3600

# GPU tasks wait in a queue of their own: workers without a GPU cluster need not take them, and its length says how
# much GPU work is waiting.
task_default_queue = "celery"
task_routes = {
    "celery_app.tasks.arrays.*": {"queue": "gpu"},
    "celery_app.tasks.linalg.*": {"queue": "gpu"},
    "celery_app.tasks.images.*": {"queue": "gpu"},
    "celery_app.tasks.vectors.*": {"queue": "gpu"},
    "celery_app.tasks.reports.*": {"queue": "celery"},
}
