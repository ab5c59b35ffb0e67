"""What is told of a job while it runs, and how it is told to stop."""

from comfy_xdit.mailbox import MAX_CANCELLED, Mailbox


def test_entries_come_once_in_order_and_to_their_job_alone():
    box = Mailbox()
    box.open("a")
    for number in range(3):
        box.post({"step": number})
    assert box.take("b") == []
    assert box.take("a") == [{"step": 0}, {"step": 1}, {"step": 2}]
    assert box.take("a") == []
    box.post({"step": 3})
    box.open("b")
    assert box.take("b") == box.take("a") == []


def test_what_is_not_ready_holds_up_what_follows_it():
    box, ready = Mailbox(), set()
    box.open("a")
    for number in range(3):
        box.post({"step": number}, lambda number=number: number in ready)
    ready |= {0, 2}
    assert box.take("a") == [{"step": 0}]
    ready.add(1)
    assert box.take("a") == [{"step": 1}, {"step": 2}]


def test_a_cancel_may_overtake_its_job_and_hits_no_other():
    box = Mailbox()
    box.cancel("a")
    box.open("a")
    assert box.is_cancelled("a") and not box.is_cancelled("b")
    for number in range(MAX_CANCELLED):
        box.cancel(str(number))
    assert not box.is_cancelled("a")


def test_an_abandoned_job_stops_also_when_it_had_not_begun():
    box = Mailbox()
    box.abandon()
    box.open("a")
    assert box.is_cancelled("a")
    box.renew()
    assert not box.is_cancelled("a")
