"""A producer inside the cluster, in a process of its own: it runs what it is sent and answers with `answer`.

A test's own process joins no cluster: Ray reads its token's mode once, and not every cluster of the tests asks for one.
"""

import contextlib
import json
import os
import subprocess
import sys

from tests.support.services import ROOT


class Joined:
    """``joined("answer = data.get(ref).tolist()", ref=...)``; in scope are `data`, `numpy`, `ray`, `app` and `store`.

    What an error of the code's is arrives as RuntimeError, which begins with its type's name.
    """

    def __init__(self, address, namespace, app, env=None):
        command = [sys.executable, "-m", "tests.support.joined", address, namespace, app]
        self.popen = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT,
            env={**os.environ, **(env or {}), "BRIDGE_NAMESPACE": namespace},
        )  # fmt: skip

    def __call__(self, code, **values):
        self.popen.stdin.write(json.dumps([code, values]) + "\n")
        self.popen.stdin.flush()
        answer, error = json.loads(self.popen.stdout.readline())
        if error:
            raise RuntimeError(error)
        return answer

    def end(self):
        """As a producer does: it returns."""
        self.popen.stdin.close()
        self.popen.stdout.close()
        assert self.popen.wait(60) == 0


def main(address, namespace, app_path):
    import numpy

    from bridge import data
    from bridge.auth import use_token

    use_token()
    from bridge.driver.cluster import connect

    connect(address, namespace, 60.0)
    import ray

    from actors.contract import StoreConfig
    from actors.data.ray_store import RayStore

    module, _, name = app_path.partition(":")
    app = getattr(__import__(module, fromlist=[name]), name)
    app.set_current()
    scope = {"numpy": numpy, "data": data, "ray": ray, "app": app, "RayStore": RayStore, "StoreConfig": StoreConfig}
    scope["store"] = RayStore(namespace, StoreConfig())
    answers = os.fdopen(os.dup(1), "w")
    with contextlib.redirect_stdout(sys.stderr):
        for line in sys.stdin:
            code, values = json.loads(line)
            answer, error = None, ""
            try:
                scope |= values
                exec(code, scope)  # in one scope, or comprehensions would not see names
                answer = scope.pop("answer", None)
            except Exception as raised:
                error = f"{type(raised).__name__}: {raised}"
            answers.write(json.dumps([answer, error]) + "\n")
            answers.flush()


if __name__ == "__main__":
    main(*sys.argv[1:])
