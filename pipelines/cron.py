"""Cron expressions as Kubeflow Pipelines' scheduler reads them, with errors that name the field; times are UTC.

The scheduler is robfig/cron 1.2: seconds first, Sunday is 0 and never 7, names such as MON or jan, `?` as `*`, `N/S` for
N to the end. A day must fit both day fields if either is `*`, else one of them. Five fields would be read as seconds
first with no day of the week, so that 03:00 on Mondays became 00:03 each first day: they are always sent as six.
"""

from __future__ import annotations

import datetime as dt
import re
from collections.abc import Iterator
from dataclasses import dataclass

from trainer.errors import ConfigError

_MONTHS = {name: i + 1 for i, name in enumerate(("jan", "feb", "mar", "apr", "may", "jun",
                                                 "jul", "aug", "sep", "oct", "nov", "dec"))}  # fmt: skip
_DAYS = {name: i for i, name in enumerate(["sun", "mon", "tue", "wed", "thu", "fri", "sat"])}
# Name, least and greatest value, words that stand for values.
_FIELDS: tuple[tuple[str, int, int, dict[str, int]], ...] = (
    ("second", 0, 59, {}), ("minute", 0, 59, {}), ("hour", 0, 23, {}),
    ("day of month", 1, 31, {}), ("month", 1, 12, _MONTHS), ("day of week", 0, 6, _DAYS),
)  # fmt: skip
_NICKNAMES = {
    "@yearly": "0 0 0 1 1 *", "@annually": "0 0 0 1 1 *", "@monthly": "0 0 0 1 * *", "@weekly": "0 0 0 * * 0",
    "@daily": "0 0 0 * * *", "@midnight": "0 0 0 * * *", "@hourly": "0 0 * * * *",
}  # fmt: skip
_HINT = 'five fields: minute hour day-of-month month day-of-week, such as "0 3 * * 1" (Mondays 03:00 UTC)'
_YEARS = 8  # 29 February can be this far away; what does not come by then never comes.


@dataclass(frozen=True)
class Cron:
    """A parsed expression.

    Attributes:
        text: the six fields as they are sent.
        values: for each field, the values at which it is due.
        any_day: whether one of the two day fields is a wildcard.
    """

    text: str
    values: tuple[frozenset[int], ...]
    any_day: bool

    def next(self, after: dt.datetime) -> dt.datetime | None:
        """The first time later than `after` (UTC) at which it is due; None if there is none in eight years."""
        return next(self.times(after), None)

    def times(self, after: dt.datetime) -> Iterator[dt.datetime]:
        """Every such time, in order."""
        after = after.astimezone(dt.UTC)
        seconds, minutes, hours = (sorted(values) for values in self.values[:3])
        day = after.date()
        for _ in range(366 * _YEARS):
            if self._is_due(day):
                for hour in hours:
                    for minute in minutes:
                        for second in seconds:
                            found = dt.datetime(day.year, day.month, day.day, hour, minute, second, tzinfo=dt.UTC)
                            if found > after:
                                yield found
            day += dt.timedelta(days=1)

    def _is_due(self, day: dt.date) -> bool:
        _, _, _, days, months, weekdays = self.values
        if day.month not in months:
            return False
        fits = (day.day in days, day.isoweekday() % 7 in weekdays)
        return all(fits) if self.any_day else any(fits)


def parse(text: str) -> Cron:
    """Read five fields (minute first), six (second first) or a nickname such as @daily.

    Raises:
        ConfigError: it is none; the message names the field.
    """
    words = text.split()
    if words and words[0].upper().startswith(("TZ=", "CRON_TZ=")):
        raise ConfigError(f"--cron {text!r}: {words[0]}: schedules have no time zone", "give the time in UTC")
    if len(words) == 1 and words[0].startswith("@"):
        if words[0].lower() not in _NICKNAMES:
            raise ConfigError(f"--cron {text!r}: unknown nickname", f"one of {', '.join(_NICKNAMES)}, or {_HINT}")
        words = _NICKNAMES[words[0].lower()].split()
    if len(words) == 5:
        words = ["0", *words]
    if len(words) != 6:
        raise ConfigError(f"--cron {text!r}: {len(words)} fields, not 5 or 6", _HINT)
    values = []
    for word, (name, low, high, names) in zip(words, _FIELDS, strict=True):
        try:
            values.append(frozenset(value for part in word.split(",") for value in _range(part, low, high, names)))
        except ValueError as error:
            raise ConfigError(f"--cron {text!r}: {name} {word!r}: {error}", _HINT) from None
    any_day = any(part[0] in "*?" for word in (words[3], words[5]) for part in word.split(","))
    cron = Cron(" ".join(words), tuple(values), any_day)
    if cron.next(dt.datetime.now(dt.UTC)) is None:
        raise ConfigError(f"--cron {text!r}: never due: no month of it has such a day", _HINT)
    return cron


def _range(part: str, low: int, high: int, names: dict[str, int]) -> range:
    """The values of one of a field's parts: `*`, `2`, `1-5`, `*/10`, `1-5/2` or `3/10`."""
    found = re.fullmatch(r"(?P<first>\*|\?|\w+)(?:-(?P<last>\w+))?(?:/(?P<step>\d+))?", part, re.ASCII)
    if not found or (found["first"] in "*?" and found["last"]):
        raise ValueError("not a value, a range, a step or a list of them")
    step = int(found["step"] or 1)
    if step < 1:
        raise ValueError("the step must be above 0")
    if found["first"] in "*?":
        return range(low, high + 1, step)
    first = _value(found["first"], low, high, names)
    last = _value(found["last"], low, high, names) if found["last"] else high if found["step"] else first
    if last < first:
        raise ValueError(f"the range ends before it begins ({first} to {last})")
    return range(first, last + 1, step)


def _value(word: str, low: int, high: int, names: dict[str, int]) -> int:
    if word.lower() in names:
        return names[word.lower()]
    if not word.isdigit():
        raise ValueError(f"{word!r} is not a number{' or a name such as ' + next(iter(names)) if names else ''}")
    if not low <= int(word) <= high:
        sunday = "; Sunday is 0" if (low, high, word) == (0, 6, "7") else ""
        raise ValueError(f"{word} is not from {low} to {high}{sunday}")
    return int(word)
