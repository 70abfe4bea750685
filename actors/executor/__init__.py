"""The executor process, child of the actor: owns the CUDA context and runs bodies. Never loads ray.

On a task's way: `loop`, `runner` (`items`), `reading`, `opening`, `admission`, `interrupt`, `outcomes`, `logs`,
`surroundings`, `leaks`. The app: `release`, `errands`, `signals`. The device: `device` (alone with cupy), `device_api`,
`pinned`, `residents`, `device_results`. Where a task is called without a bridge, its process uses `device` on NumPy.
"""
