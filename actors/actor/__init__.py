"""The actor process, one per GPU: queue, limits and blame for all workers. Never opens CUDA, never runs user code.

On a task's way: `gpu_actor` (Ray's face, and alone here with ray), `shell`, `entries`, `children`, `active`, `child`.
Beside it: `leases`, `breaker`, `account`, `waker`; `trial` for the doctor.
"""
