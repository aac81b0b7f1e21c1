"""Multi-step requests: each step needs what an earlier one returned."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from random import Random
from typing import Any

from qwenscope.corpus.tool_use import pools
from qwenscope.corpus.tool_use.model import Case, Wording, wording

Steps = list[tuple[str, Case]]


@dataclass(frozen=True)
class Chain:
    """A request that takes several calls in a row; `sample` returns (tool, case) pairs and the sentences' slots."""

    name: str
    tools: tuple[str, ...]
    sample: Callable[[Random], tuple[Steps, dict[str, Any]]]
    clauses: Wording
    links: Wording
    answers: Wording


CHAINS: list[Chain] = []
"""Every chain, in the order of definition."""

Sampler = Callable[[Random], tuple[Steps, dict[str, Any]]]


def chain(*tools: str, clauses: str, links: str, answers: str) -> Callable[[Sampler], Sampler]:
    """Register the decorated sampler as a chain over `tools`; `links` is what the assistant says between two steps."""

    def register(sample: Sampler) -> Sampler:
        CHAINS.append(Chain(sample.__name__, tools, sample, wording(clauses), wording(links), wording(answers)))
        return sample

    return register


@chain(
    "find_contact",
    "send_email",
    clauses="""
        find the address of {name} and email them "{body}"
        look up {name} and send them this message: "{body}"
        get {name}'s email from my contacts, then write to them "{body}"
        ---
        reach out to {name}, whose address is in my book, with the words "{body}"
        contact {name} by mail and tell them "{body}" (look the address up first)
    """,
    links="""
        The address of {name} is {to}. Now I will send the message.
        Found {name}: {to}. Sending the email.
        ---
        {to} is what the book says, so the mail goes there.
    """,
    answers="""
        I found {name} at {to} and sent your message.
        Your message to {name} ({to}) is on its way.
        Done: "{body}" went to {to}.
        ---
        {name} has been told; I used {to}.
        The words went out to {to}, which belongs to {name}.
    """,
)
def contact_then_mail(rng: Random) -> tuple[Steps, dict[str, Any]]:
    name = pools.person(rng)
    to, body = (
        pools.email(name),
        rng.choice(("See you at {0}.", "Let us meet at {0}.", "The call is at {0}.")).format(pools.clock(rng)),
    )
    found = Case(
        {"name": name}, {"name": name, "company": rng.choice(pools.COMPANIES), "email": to, "phone": pools.phone(rng)}
    )
    sent = Case(
        {"to": to, "subject": "Message", "body": body}, {"status": "sent", "message_id": pools.code(rng, "MSG")}
    )
    return [("find_contact", found), ("send_email", sent)], {"name": name, "to": to, "body": body}


@chain(
    "file_read",
    "code_execute",
    "file_write",
    clauses="""
        read the numbers in {path}, add them up and save the total to {target}
        sum the values of {path} and write the result to {target}
        open {path}, compute the total of its numbers and store it in {target}
        ---
        take {path}, total its figures and leave the outcome in {target}
        produce {target} holding the grand total of {path}
    """,
    links="""
        Next step.
        I have what I need to continue.
        That worked, going on.
        ---
        On to the following part.
    """,
    answers="""
        The {count} numbers in {path} add up to {total}; the total is saved in {target}.
        I summed {path}: {total}. You will find it in {target}.
        Total: {total}, written to {target}.
        ---
        {target} now holds {total}, the grand total of {count} figures.
        {path} comes to {total}; the outcome sits in {target}.
    """,
)
def total_of_file(rng: Random) -> tuple[Steps, dict[str, Any]]:
    numbers = [rng.randint(1, 999) for _ in range(rng.randint(3, 6))]
    path, target, total = pools.path(rng, "csv", "txt"), pools.path(rng, "txt", "md"), sum(numbers)
    source = f"print({' + '.join(map(str, numbers))})"
    written = {"path": target, "content": f"total: {total}"}
    steps: Steps = [
        ("file_read", Case({"path": path}, "\n".join(map(str, numbers)))),
        ("code_execute", Case({"code": source}, str(total))),
        ("file_write", Case(written, {"status": "ok", "bytes": len(f"total: {total}")})),
    ]
    return steps, {"path": path, "target": target, "total": total, "count": len(numbers)}


@chain(
    "web_search",
    "file_write",
    clauses="""
        search for {topic} and save the best link to {path}
        research {topic} and note the most useful page in {path}
        find a good page about {topic}, then write its address to {path}
        ---
        collect one source on {topic} into {path}
        fill {path} with a reference concerning {topic}
    """,
    links="""
        "{title}" looks like the best match. I will save it.
        I will note {url} in the file.
        ---
        Worth keeping: {url}. Writing it down.
    """,
    answers="""
        I saved "{title}" ({url}) to {path}.
        The best page on {topic} is {url}; it is noted in {path}.
        Done, {path} contains the link to "{title}".
        ---
        {path} now refers to {url}.
        The reference "{title}" has been put into {path}.
    """,
)
def search_then_save(rng: Random) -> tuple[Steps, dict[str, Any]]:
    topic, path = rng.choice(pools.TOPICS), pools.path(rng, "md", "txt")
    title = f"{rng.choice(('Notes on', 'A guide to', 'Understanding'))} {topic} in {rng.choice(pools.CITIES)}"
    url = f"https://www.example.org/{topic.replace(' ', '-')}/{rng.randint(10, 999)}"
    steps: Steps = [
        ("web_search", Case({"query": topic}, {"results": [{"title": title, "url": url}]})),
        (
            "file_write",
            Case({"path": path, "content": f"{title}\n{url}"}, {"status": "ok", "bytes": len(title) + len(url) + 1}),
        ),
    ]
    return steps, {"topic": topic, "path": path, "title": title, "url": url}


@chain(
    "search_flights",
    "convert_currency",
    clauses="""
        find a flight from {origin} to {destination} on {day} and tell me the price in {currency}
        look for a flight from {origin} to {destination} on {day}, priced in {currency}
        see what flying from {origin} to {destination} on {day} costs in {currency}
        ---
        quote me {origin} to {destination} by air on {day}, expressed in {currency}
        get a {currency} fare out of {origin} into {destination} for {day}
    """,
    links="""
        The fare is {price} EUR. Let me convert that.
        {flight} costs {price} EUR; converting to {currency}.
        ---
        {price} EUR it is, now into {currency}.
    """,
    answers="""
        Flight {flight} with {airline} costs {price} EUR, which is {converted} {currency}.
        The best option is {flight} for {converted} {currency} ({price} EUR).
        You would pay about {converted} {currency} for {flight} on {day}.
        ---
        {airline} asks {converted} {currency} for {flight}, that is {price} EUR.
        In {currency} the fare comes to {converted}; the flight is {flight}.
    """,
)
def flight_in_currency(rng: Random) -> tuple[Steps, dict[str, Any]]:
    origin, destination = rng.sample(pools.CITIES, 2)
    date, airline, target = (
        pools.date(rng),
        rng.choice(pools.AIRLINES),
        rng.choice([c for c in pools.CURRENCIES if c != "EUR"]),
    )
    flight, price, rate = (
        f"{airline[0]}{rng.choice('ABX')}{rng.randint(100, 999)}",
        rng.randint(49, 890),
        rng.randint(20, 3000) / 1000,
    )
    offer = {"flight": flight, "airline": airline, "departure": pools.clock(rng), "price": price}
    converted = round(price * rate, 2)
    steps: Steps = [
        ("search_flights", Case({"origin": origin, "destination": destination, "date": date}, offer)),
        (
            "convert_currency",
            Case({"amount": price, "source": "EUR", "target": target}, {"rate": rate, "converted": converted}),
        ),
    ]
    slots = {
        "origin": origin,
        "destination": destination,
        "day": pools.spoken(date),
        "currency": target,
        "converted": converted,
    }
    return steps, {**slots, **offer}


@chain(
    "get_weather",
    "create_event",
    clauses="""
        check the weather in {city} on {day}, and if it stays dry schedule a {title} at {time}
        schedule a {title} in {city} on {day} at {time} unless it is going to rain
        ---
        provided {city} stays dry on {day}, enter a {title} at {time}
    """,
    links="""
        No rain is expected, so I will add the {title}.
        It stays {sky}. Creating the event.
        ---
        Dry enough: {sky}. Entering it.
    """,
    answers="""
        It will be {sky} in {city}, so the {title} is scheduled for {day} at {time}.
        {city} stays {sky}; I added the {title} at {time}.
        ---
        With {sky} skies over {city} the {title} now stands at {time} on {day}.
    """,
)
def weather_then_event(rng: Random) -> tuple[Steps, dict[str, Any]]:
    city, date, time = rng.choice(pools.CITIES), pools.date(rng), pools.clock(rng)
    title, sky = (
        rng.choice(("picnic", "garden party", "bike tour", "walk", "football match")),
        rng.choice(("sunny", "clear", "cloudy")),
    )
    low = rng.randint(5, 18)
    sighted = {
        "city": city,
        "sky": sky,
        "low": low,
        "high": low + rng.randint(3, 10),
        "rain_chance": rng.randint(0, 15),
    }
    entry = {"title": title, "date": date, "time": time, "location": city}
    steps: Steps = [
        ("get_weather", Case({"city": city, "day": date}, sighted)),
        ("create_event", Case(entry, {"status": "created", "event_id": pools.code(rng, "EV")})),
    ]
    return steps, {"city": city, "day": pools.spoken(date), "time": time, "title": title, "sky": sky}
