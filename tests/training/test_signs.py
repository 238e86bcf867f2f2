"""Who is named from the signs of life that were heard, and when."""

from llm.training.signs import Heard, Sign, describe, find_dead, find_hanging, hear


def sign(moves=9, *, time=0.0, waits=True, done=False, place="`train_step`"):
    return Sign("host", 40, time, moves, moves // 2, place, waits, done)


def heard(*signs):
    return {index: Heard(one, 100.0) for index, one in enumerate(signs)}


def test_an_old_sign_is_not_news():
    signs = {}
    hear(signs, 1, sign(time=1.0), 10.0)
    hear(signs, 1, sign(time=1.0), 11.0)
    assert signs[1].at == 10.0
    hear(signs, 1, sign(time=2.0), 12.0)
    assert signs[1].at == 12.0


def test_the_silent_are_dead():
    signs = heard(sign(), sign(), sign())
    assert find_dead(signs, 0, 105.0, 10.0) == ""
    signs[1] = Heard(sign(), 90.0)
    assert find_dead(signs, 0, 105.0, 10.0) == (
        "process 1 (host host, pid 40) at step 4, `train_step`: no sign of life for 15 s, dead or "
        "stopped"
    )
    signs[2] = Heard(sign(), 80.0)
    found = find_dead(signs, 0, 105.0, 10.0)
    assert "process 1" in found and "process 2" in found and "process 0" not in found


def test_who_has_left_in_good_order_is_not_dead():
    signs = heard(sign(), sign(done=True))
    assert find_dead(signs, 0, 900.0, 10.0) == ""


def test_silence_of_the_store_is_not_that_of_its_authors():
    signs = heard(sign(), sign())
    assert find_dead(signs, 0, 101.0, 10.0) == ""  # whatever the time is now


def test_whoever_is_furthest_behind_hangs():
    found = find_hanging(heard(sign(9), sign(7, place="`next(batches)`"), sign(9)), 3, 600.0)
    culprit, _, others = found.partition(": no progress for 600 s, while others wait: ")
    assert culprit == "process 1 (host host, pid 40) at step 3, `next(batches)`"
    assert "process 0" in others and "process 2" in others


def test_of_those_equally_far_whoever_does_not_wait_hangs():
    found = find_hanging(heard(sign(), sign(waits=False)), 2, 600.0)
    assert found.startswith("process 1 (") and "others wait: process 0" in found
    found = find_hanging(heard(sign(), sign()), 2, 600.0)
    assert "no process is behind the others" in found


def test_nobody_hangs_before_all_have_come():
    assert find_hanging(heard(sign(), sign(7)), 3, 600.0) == ""


def test_a_thousand_processes_fit_a_line():
    found = find_hanging(heard(*(sign() for _ in range(1000)), sign(7)), 1001, 600.0)
    assert found.startswith("process 1000 (") and "and 996 more" in found and len(found) < 600


def test_an_unheard_process_has_a_name_too():
    assert describe({}, 3) == "process 3"
