"""Cron expressions: what is accepted, what is sent, when it is due, and errors that name the field."""

from __future__ import annotations

import datetime as dt
from collections.abc import Iterator
from itertools import islice

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from pipelines import cron
from trainer.errors import ConfigError

START = dt.datetime(2026, 11, 21, 6, 30, tzinfo=dt.UTC)  # a Saturday


def due(text: str, count: int = 3, after: dt.datetime = START) -> list[str]:
    return [f"{time:%a %Y-%m-%d %H:%M:%S}" for time in islice(cron.parse(text).times(after), count)]


DUE = {
    "0 3 * * 1": ["Mon 2026-11-23 03:00:00", "Mon 2026-11-30 03:00:00", "Mon 2026-12-07 03:00:00"],
    "15 30 3 * * MON": ["Mon 2026-11-23 03:30:15", "Mon 2026-11-30 03:30:15", "Mon 2026-12-07 03:30:15"],
    "0 0 29 2 *": ["Tue 2028-02-29 00:00:00", "Sun 2032-02-29 00:00:00"],
    "*/20 6 * * ?": ["Sat 2026-11-21 06:40:00", "Sun 2026-11-22 06:00:00", "Sun 2026-11-22 06:20:00"],
    "0 22/1 21 nov *": ["Sat 2026-11-21 22:00:00", "Sat 2026-11-21 23:00:00", "Sun 2027-11-21 22:00:00"],
    "0 9-17/4 * * sat,sun": ["Sat 2026-11-21 09:00:00", "Sat 2026-11-21 13:00:00", "Sat 2026-11-21 17:00:00"],
    # Both days are given: either is enough.
    "0 0 1 * 1": ["Mon 2026-11-23 00:00:00", "Mon 2026-11-30 00:00:00", "Tue 2026-12-01 00:00:00"],
    "@weekly": ["Sun 2026-11-22 00:00:00", "Sun 2026-11-29 00:00:00", "Sun 2026-12-06 00:00:00"],
    "@hourly": ["Sat 2026-11-21 07:00:00", "Sat 2026-11-21 08:00:00", "Sat 2026-11-21 09:00:00"],
    "30 6 * * *": ["Sun 2026-11-22 06:30:00", "Mon 2026-11-23 06:30:00", "Tue 2026-11-24 06:30:00"],
}


@pytest.mark.parametrize("text", DUE)
def test_it_is_due_when_it_says(text: str) -> None:
    assert due(text)[: len(DUE[text])] == DUE[text]


@pytest.mark.parametrize(
    ("given", "sent"),
    [
        ("0 3 * * 1", "0 0 3 * * 1"),
        ("  5  0 3 * *  1 ", "5 0 3 * * 1"),
        ("@Daily", "0 0 0 * * *"),
        ("@monthly", "0 0 0 1 * *"),
    ],
)
def test_six_fields_are_sent(given: str, sent: str) -> None:
    assert cron.parse(given).text == sent


@pytest.mark.parametrize(
    ("text", "field"),
    [
        ("60 3 * * 1", "minute '60'"), ("0 24 * * 1", "hour '24'"), ("0 3 0 * 1", "day of month '0'"),
        ("0 3 * 13 1", "month '13'"), ("0 3 * * 7", "Sunday is 0"), ("0 3 * * fun", "day of week 'fun'"),
        ("61 0 3 * * 1", "second '61'"), ("0 3 * * 5-1", "ends before"), ("*/0 3 * * 1", "step"),
        ("0 3 1,,2 * *", "day of month"), ("0 3 *-2 * *", "day of month"), ("0 3 1-2-3 * *", "day of month"),
        ("0 3 -1 * *", "day of month"), ("0 \uff13 * * *", "hour"), ("", "0 fields"), ("* * * *", "4 fields"),
        ("0 0 3 * * 1 2026", "7 fields"), ("@every 1h", "2 fields"), ("@noon", "nickname"),
        ("TZ=Europe/Berlin 0 3 * * 1", "time zone"), ("0 3 31 2 *", "never due"), ("0 3 * * 1; rm -rf /", "8 fields"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_named(text: str, field: str) -> None:
    with pytest.raises(ConfigError) as caught:
        cron.parse(text)
    assert field in caught.value.message
    assert repr(text) in caught.value.message
    assert caught.value.hint


def test_times_are_utc_whatever_the_clock_says() -> None:
    berlin = dt.timezone(dt.timedelta(hours=1))
    assert due("0 3 * * *", 1, dt.datetime(2026, 11, 21, 3, 30, tzinfo=berlin)) == ["Sat 2026-11-21 03:00:00"]


_FIELD = [(0, 59), (0, 59), (0, 23), (1, 31), (1, 12), (0, 6)]


_WORDS = st.tuples(*[st.one_of(st.just("*"), st.integers(low, high).map(str)) for low, high in _FIELD])


@settings(max_examples=60, deadline=None)
@given(_WORDS, st.datetimes(dt.datetime(2000, 1, 1), dt.datetime(2090, 1, 1)))
def test_the_next_time_is_the_first_that_fits(words: tuple[str, ...], after: dt.datetime) -> None:
    """Against a search by days, then hours, minutes and seconds."""
    assume(int(words[3].replace("*", "1")) < 29)  # so that there is such a day in each month

    def fits(field: int, value: int) -> bool:
        return words[field] in ("*", str(value))

    start = after.replace(tzinfo=dt.UTC)
    found = cron.parse(" ".join(words)).next(start)
    assert found is not None
    days = (start.replace(hour=0, minute=0, second=0, microsecond=0) + dt.timedelta(days=i) for i in range(6 * 366))
    either = all if "*" in (words[3], words[5]) else any
    due_days = (day for day in days if fits(4, day.month) and either((fits(3, day.day), fits(5, day.isoweekday() % 7))))

    def times(day: dt.datetime) -> Iterator[dt.datetime]:
        for hour in range(start.hour if day.date() == start.date() else 0, 24):
            for minute in range(60):
                if fits(2, hour) and fits(1, minute):
                    yield from (day.replace(hour=hour, minute=minute, second=i) for i in range(60) if fits(0, i))

    expected = next(time for day in due_days for time in times(day) if time > start)
    assert found == expected
