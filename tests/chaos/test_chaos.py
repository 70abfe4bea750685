"""A short chaos run; a longer one is `make chaos SEED=n MINUTES=m`."""

import json

import psutil
import pytest

from tests.chaos import reaper
from tests.chaos.run import Run, table

SECONDS = 40


@pytest.mark.timeout(500)
@pytest.mark.acceptance
def test_nothing_is_lost_while_everything_is_killed(tmp_path):
    before = running()  # the session's own services, when other tests have used them
    run = Run(seed=7, seconds=SECONDS, keep=tmp_path / "kept")
    summary = run.go()
    assert summary["violations"] == [], table(summary)
    assert summary["sent"] > 800 and len(summary["faults"]) >= 6, table(summary)
    json.dumps(summary)
    assert not run.cluster.folder.exists() and reaper.members(run.cluster.folder) == []
    assert not running() - before


def running():
    """Processes below this one."""
    return {each for each in psutil.Process().children(recursive=True) if each.status() != psutil.STATUS_ZOMBIE}
