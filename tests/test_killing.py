"""Jobs that are killed at a moment: nothing of them stays; a moment that never comes is said."""

import sys
import time

import pytest

from drama.killing import Changes, Job, digests

COUNTING = """
import subprocess, sys, time, pathlib
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(300)"],
                         start_new_session=True)
for number in range(int(sys.argv[2])):
    pathlib.Path(sys.argv[1], str(number)).write_text("x")
    time.sleep(0.01)
child.kill()
"""


def command(folder, count):
    return [sys.executable, "-c", COUNTING, str(folder), str(count)]


def test_all_of_a_job_is_killed_wherever_it_is(tmp_path):
    place = tmp_path / "place"
    place.mkdir()
    changes = Changes(place)
    with Job(command(place, 10_000), tmp_path / "log") as job:
        job.wait_for(lambda: changes() >= 2)
        assert len(job.alive()) == 2  # one of them in a session of its own
        job.kill_at(lambda: changes() >= 5)
        assert job.alive() == []
    made = len(digests(place))
    assert 3 <= made < 10_000  # a file that is made and one that is filled are two changes
    time.sleep(0.1)
    assert len(digests(place)) == made
    assert set(digests(place, ("1*",))) < set(digests(place))


def test_a_job_that_ends_before_the_moment_is_an_error(tmp_path):
    with (
        Job(command(tmp_path, 1), tmp_path / "log") as job,
        pytest.raises(AssertionError, match="ended before the moment came"),
    ):
        job.kill_at(lambda: False)
