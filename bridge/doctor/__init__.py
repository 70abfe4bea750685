"""``python -m bridge.doctor``, a process of its own: looks at the whole set-up, starts no worker, disturbs nothing.

In the order of its `findings`: `command`, `app_checks`, `broker_checks`, `cluster_checks`, which loads Ray last.
"""
