"""``python -m bridge.dead``, a process of its own: poisoned tasks for people. Never loads ray nor cupy.

`command` reads what drivers have kept (`bridge/driver/dead_letters.py`), `replay` sends it again.
"""
