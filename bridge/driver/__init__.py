"""The driver process: Celery's tracer around each GPU task, and which actor gets it. Never runs a body or uses CUDA.

On a task's way: `loop`, `in_hand`, `waiting` (with `holders`, `errands`), `scheduler` (`orders`, `lines`), `calls`,
`tracing`, `fleet` (`news`); then `finishing` (`verdicts`, `blame`, `ledger`, `dead_letters`), `outcomes`, `results`
(`backends`, `unstored`, `chord_words`, `trouble`), `discards`. The cluster: `cluster`, `head`, `roster`,
`known_actors`. Only `cluster`, `fleet` and `known_actors` load ray.
"""
