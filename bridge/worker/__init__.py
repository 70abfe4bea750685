"""The worker process: Celery's own, plus what makes GPU tasks of its messages. Never loads ray nor cupy.

On a task's way: `redis_channel` (with `taking`, `visibility`, `redis_qos`, `redis_clock`), `intake`, `consumer`,
`drivers`, `supervisor`, `driver_process`. Start: `command`, `standalone`, `release`, `banner`. How it is: `readiness`,
`vitals`, `health_server`, `fence_events`, `control`. Celery's pool is `bridge/pool.py`, for users name it.
"""
