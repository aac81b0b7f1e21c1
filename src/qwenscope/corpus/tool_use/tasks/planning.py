"""Tasks of planning: calendar, reminders, lists."""

from __future__ import annotations

import datetime
from random import Random

from qwenscope.corpus.tool_use import pools
from qwenscope.corpus.tool_use.model import Case, task, tool


@task(
    tool(
        "create_event",
        "Create a calendar event.|Add an entry to the user's calendar.|Schedule something in the calendar.",
        optional=("location",),
        title="string: Title of the event",
        date="string: Date as YYYY-MM-DD",
        time="string: Start time as HH:MM",
        location="string: Where it takes place",
    ),
    clauses="""
        [schedule|add] a {title} on {day} at {time}{place}
        put the {title} in my calendar for {day}, {time}{place}
        create a calendar entry called {title} for {time} on {day}{place}
        block time for the {title} at {time} on {day}{place}
        ---
        book a slot named {title}, {day} from {time}{place}
        enter the {title} into my agenda ({day}, {time}){place}
    """,
    answers="""
        Your {title} is [scheduled|booked] for {day} at {time}.
        Done: {title} is in your calendar on {day}, starting at {time}.
        I have added the {title} for {time} on {day}. The event id is {event_id}.
        ---
        {title} now stands in your agenda: {day}, {time} (reference {event_id}).
        All set, the slot for {title} on {day} is taken.
    """,
    gap=(
        """
        schedule a {title} on {day}{place}
        put the {title} in my calendar for {day}{place}
        ---
        book a slot named {title} on {day}{place}
        """,
        """
        What time should it start?
        At what time on {day}?
        ---
        From which hour shall I book it?
        """,
        "time",
    ),
)
def event(rng: Random) -> Case:
    title, date, time = rng.choice(pools.MEETINGS), pools.date(rng), pools.clock(rng)
    arguments = {"title": title, "date": date, "time": time}
    place = rng.choice(("Room 1", "Room 4", "Cafe Meridian", "Town hall", "Online")) if rng.random() < 0.3 else ""
    if place:
        arguments["location"] = place
    extra = {"day": pools.spoken(date), "place": f", {place}" if place else ""}
    return Case(arguments, {"status": "created", "event_id": pools.code(rng, "EV")}, extra)


@task(
    tool(
        "list_events",
        "List the calendar events of one day.|Show what is in the user's calendar on a date.",
        date="string: Date as YYYY-MM-DD",
    ),
    clauses="""
        [show me|list] my [events|appointments] on {day}
        tell me what is in my calendar on {day}
        check how busy I am on {day}
        ---
        go through my agenda for {day}
        read out my commitments of {day}
    """,
    answers="""
        On {day} you have {count} events: {listing}.
        Your calendar for {day} shows {listing}.
        There are {count} entries on {day}: {listing}.
        ---
        Agenda of {day}: {listing}.
        I count {count} commitments on {day}, namely {listing}.
    """,
    gap=(
        """
        show me my appointments
        tell me what is in my calendar
        ---
        go through my agenda
        """,
        """
        For which day?
        Which date should I look at?
        ---
        What day shall I read out?
        """,
        "day",
    ),
)
def events(rng: Random) -> Case:
    date, titles = pools.date(rng), rng.sample(pools.MEETINGS, rng.randint(2, 4))
    hours = sorted(rng.sample(range(7, 21), len(titles)))
    rows = [
        {"time": f"{hour:02d}:{rng.choice((0, 15, 30)):02d}", "title": title}
        for hour, title in zip(hours, titles, strict=True)
    ]
    listing = ", ".join(f"{row['title']} at {row['time']}" for row in rows)
    extra = {"day": pools.spoken(date), "count": len(rows), "listing": listing}
    return Case({"date": date}, {"date": date, "events": rows}, extra)


@task(
    tool(
        "set_reminder",
        "Set a reminder.|Remind the user of something at a given time.",
        text="string: What to remember",
        date="string: Date as YYYY-MM-DD",
        time="string: Time as HH:MM",
    ),
    clauses="""
        remind me to {text} on {day} at {time}
        set a reminder for {day}, {time}: {text}
        make sure I {text} on {day}, around {time}
        ---
        nudge me at {time} on {day} so that I {text}
        keep me from forgetting to {text} on {day} at {time}
    """,
    answers="""
        I will remind you to {text} on {day} at {time}.
        The reminder to {text} is set for {time} on {day}.
        Reminder saved. You will hear from me on {day} at {time}.
        ---
        Consider it noted: {text}, {day}, {time}.
        A nudge for {day} at {time} is in place.
    """,
    gap=(
        """
        remind me to {text} on {day}
        set a reminder for {day}: {text}
        ---
        nudge me on {day} so that I {text}
        """,
        """
        At what time would you like the reminder?
        What time suits you?
        ---
        When during the day shall I nudge you?
        """,
        "time",
    ),
)
def reminder(rng: Random) -> Case:
    date = pools.date(rng)
    arguments = {"text": rng.choice(pools.TODOS), "date": date, "time": pools.clock(rng)}
    return Case(arguments, {"status": "ok", "id": pools.code(rng, "R")}, {"day": pools.spoken(date)})


@task(
    tool(
        "add_todo",
        "Add an item to a to-do list.|Put a task on one of the user's lists.",
        optional=("priority",),
        item="string: The task",
        list="string: Name of the list",
        priority="low/normal/high: Priority",
    ),
    clauses="""
        add "{item}" to my {list} list{urgency}
        put "{item}" on the {list} list{urgency}
        [note|write] "{item}" on my {list} list{urgency}
        ---
        extend the {list} list by "{item}"{urgency}
        append "{item}" to whatever is on my {list} list{urgency}
    """,
    answers="""
        I added "{item}" to your {list} list; it now has {count} items.
        "{item}" is on the {list} list.
        Done. There are {count} items on your {list} list.
        ---
        The {list} list grew to {count} entries, "{item}" being the newest.
        Appended. Your {list} list counts {count} entries.
    """,
    gap=(
        """
        add "{item}" to a list{urgency}
        put "{item}" on one of my lists{urgency}
        ---
        append "{item}" to a list of mine{urgency}
        """,
        """
        Which list should it go on?
        To which list?
        ---
        What list do you have in mind?
        """,
        "list",
    ),
)
def todo(rng: Random) -> Case:
    arguments = {
        "item": rng.choice(pools.TODOS),
        "list": rng.choice(("home", "work", "weekend", "errands", "garden", "trip")),
    }
    priority = rng.choice(("low", "normal", "high")) if rng.random() < 0.3 else ""
    if priority:
        arguments["priority"] = priority
    extra = {"urgency": f" with {priority} priority" if priority else ""}
    return Case(arguments, {"status": "added", "count": rng.randint(1, 19)}, extra)


@task(
    tool(
        "days_between",
        "Count the days between two dates.|Date arithmetic: the difference of two dates in days.",
        start="string: First date as YYYY-MM-DD",
        end="string: Second date as YYYY-MM-DD",
    ),
    clauses="""
        count the days from {first_day} to {last_day}
        tell me how many days lie between {first_day} and {last_day}
        work out how long it is from {first_day} until {last_day}
        ---
        measure the gap in days, {first_day} to {last_day}
        figure out the number of days separating {first_day} from {last_day}
    """,
    answers="""
        There are {days} days between {first_day} and {last_day}.
        From {first_day} to {last_day} it is {days} days.
        That is {days} days.
        ---
        The gap amounts to {days} days.
        {days} days separate the two dates.
    """,
)
def days_between(rng: Random) -> Case:
    start = datetime.date(2025, 1, 1) + datetime.timedelta(days=rng.randint(0, 600))
    days = rng.randint(2, 500)
    arguments = {"start": start.isoformat(), "end": (start + datetime.timedelta(days=days)).isoformat()}
    extra = {"first_day": pools.spoken(arguments["start"]), "last_day": pools.spoken(arguments["end"])}
    return Case(arguments, {"days": days}, extra)
