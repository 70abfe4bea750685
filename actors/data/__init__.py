"""Large data in messages, in every process: their forms, and the stores where they lie. Only `ray_store` loads ray.

Forms: `arrays` (from `lists`, `numbers`, `shapes`, `foreign`), `blobs`, `pictures`, `handles`. Stores: `stores`,
`redis_values` (in `shared_redis`; read early by `ahead`), `rooted_store` (with `roots`, `web`), `ray_store`. For users:
`bridge/data.py`.
"""
