import threading
from time import monotonic, sleep

import pytest

from sample.jobs import Jobs, Stopped


@pytest.fixture
def jobs():
    jobs = Jobs(seconds=30)
    yield jobs
    jobs.close()


def counting(tell):
    for number in range(3):
        tell(number)


def test_what_a_job_tells_comes_out_in_order_and_all_jobs_share_one_thread(jobs):
    def where(tell):
        tell(threading.get_ident())

    assert list(jobs.stream(counting)) == [0, 1, 2]
    threads = {*jobs.stream(where), *jobs.stream(where)}
    assert len(threads) == 1
    assert threading.get_ident() not in threads


def test_a_job_that_nobody_listens_to_ends_where_it_tells_next(jobs):
    told = []

    def endless(tell):
        try:
            while True:
                told.append(len(told))
                tell(told[-1])
                sleep(0.001)
        except Stopped:
            told.append("stopped")
            raise

    stream = jobs.stream(endless)
    assert next(stream) == 0
    stream.close()
    assert list(jobs.stream(counting)) == [0, 1, 2]  # the thread is free again
    assert told[-1] == "stopped"


def test_closing_ends_the_job_that_runs_and_begins_no_other():
    jobs, begun, refused = Jobs(seconds=30), [], []

    def endless(tell):
        while True:
            tell(None)
            sleep(0.001)

    def wait():
        with pytest.raises(Stopped):
            list(jobs.stream(begun.append))
        refused.append(True)

    running = jobs.stream(endless)
    next(running)
    waiting = threading.Thread(target=wait)
    waiting.start()
    sleep(0.05)
    jobs.close()
    waiting.join(30)
    assert refused
    assert not begun
    with pytest.raises(Stopped):
        list(running)


def test_a_job_has_its_time_and_what_it_raises_is_raised_here():
    jobs = Jobs(seconds=0.05)

    def slow(tell):
        while True:
            sleep(0.01)
            tell(monotonic())

    def broken(tell):
        tell(1)
        raise OSError("broken")

    with pytest.raises(ValueError, match=r"longer than 0\.05 seconds"):
        list(jobs.stream(slow))
    jobs.close()
    jobs = Jobs(seconds=30)
    with pytest.raises(OSError, match="broken"):
        list(jobs.stream(broken))
    jobs.close()
    with pytest.raises(ValueError, match="seconds: 0 leaves no time"):
        Jobs(seconds=0)
