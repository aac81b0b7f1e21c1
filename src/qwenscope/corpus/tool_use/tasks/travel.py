"""Tasks of travel: weather, flights, hotels, trains, time zones."""

from __future__ import annotations

from random import Random
from typing import Any

from qwenscope.corpus.tool_use import pools
from qwenscope.corpus.tool_use.model import Case, task, tool


@task(
    tool(
        "get_weather",
        "Get the weather forecast for a city.|Forecast for one city and day.|Look up temperature and sky conditions.",
        optional=("unit",),
        city="string: Name of the city",
        day="string: Day of the forecast",
        unit="celsius/fahrenheit: Temperature unit",
    ),
    clauses="""
        check the weather in {city} {when}{scale}
        [find out|tell me] what the weather will be like in {city} {when}{scale}
        get the forecast for {city} {when}{scale}
        see how warm it will be in {city} {when}{scale}
        ---
        look up how warm it gets in {city} {when}{scale}
        report the [sky conditions|outlook] over {city} {when}{scale}
    """,
    answers="""
        The forecast for {city} {when} is {sky} with a high of {high} {symbol} and a low of {low} {symbol}.
        {city} will be {sky} {when}: between {low} and {high} {symbol}, and the chance of rain is {rain_chance} %.
        Expect {sky} weather in {city} {when}, around {high} {symbol} at the warmest, and rain at {rain_chance} %.
        ---
        {when_capital} {city} sees {sky} skies, {low} to {high} {symbol}; rain is at {rain_chance} %.
        Outlook for {city}: {sky}, peaking at {high} {symbol}.
    """,
    gap=(
        """
        check the weather {when}{scale}
        get me a forecast {when}{scale}
        ---
        look up how warm it gets {when}{scale}
        """,
        """
        Sure, for which city?
        Which city should I check?
        ---
        Happy to look. What place do you mean?
        """,
        "city",
    ),
    lookup=True,
)
def weather(rng: Random) -> Case:
    city, when = rng.choice(pools.CITIES), rng.choice(pools.DAYS)
    arguments = {"city": city, "day": when.removeprefix("on ")}
    low, symbol, scale = rng.randint(-8, 24), "°C", ""
    if rng.random() < 0.3:
        arguments["unit"], scale = "fahrenheit", ", in Fahrenheit"
        low, symbol = rng.randint(15, 80), "°F"
    high = low + rng.randint(3, 14)
    sky = rng.choice(("sunny", "cloudy", "rainy", "windy", "foggy", "partly cloudy", "stormy", "clear"))
    wet = rng.randint(60, 95) if sky in ("rainy", "stormy") else rng.randint(0, 40)
    result = {"city": city, "sky": sky, "low": low, "high": high, "rain_chance": wet}
    return Case(arguments, result, {"when": when, "when_capital": when.capitalize(), "symbol": symbol, "scale": scale})


@task(
    tool(
        "search_flights",
        "Search flights between two cities.|Find the cheapest flight on a date.",
        optional=("passengers",),
        origin="string: City of departure",
        destination="string: City of arrival",
        date="string: Date as YYYY-MM-DD",
        passengers="integer: Number of travellers",
    ),
    clauses="""
        find a flight from {origin} to {destination} on {day}{party}
        search for flights from {origin} to {destination} on {day}{party}
        see what it costs to fly from {origin} to {destination} on {day}{party}
        ---
        get me on a plane out of {origin} into {destination} on {day}{party}
        compare fares {origin} to {destination} for {day}{party}
    """,
    answers="""
        The cheapest flight on {day} is {flight} with {airline}, leaving {origin} at {departure}, for {price} EUR.
        {airline} flies from {origin} to {destination} on {day} at {departure}; flight {flight} costs {price} EUR.
        I found {flight} ({airline}), leaving {origin} at {departure} on {day}, for {price} EUR.
        ---
        Best fare to {destination}: {price} EUR on {airline} {flight}, wheels up at {departure}.
        For {day} I would take {flight}: {airline}, {departure}, {price} EUR.
    """,
    gap=(
        """
        find a flight to {destination} on {day}{party}
        see what it costs to fly to {destination} on {day}{party}
        ---
        get me on a plane into {destination} on {day}{party}
        """,
        """
        Where will you be flying from?
        From which city do you want to leave?
        ---
        What is your departure city?
        """,
        "origin",
    ),
)
def flights(rng: Random) -> Case:
    origin, destination = rng.sample(pools.CITIES, 2)
    date = pools.date(rng)
    arguments: dict[str, Any] = {"origin": origin, "destination": destination, "date": date}
    party = rng.choice((1, 1, 1, 2, 3, 4))
    if party > 1:
        arguments["passengers"] = party
    airline = rng.choice(pools.AIRLINES)
    flight = f"{airline[0]}{airline.split()[1][0]}{rng.randint(100, 999)}"
    result = {"flight": flight, "airline": airline, "departure": pools.clock(rng), "price": rng.randint(49, 890)}
    return Case(arguments, result, {"day": pools.spoken(date), "party": f" for {party} people" if party > 1 else ""})


@task(
    tool(
        "search_hotels",
        "Search hotels in a city.|Find a place to stay for a number of nights.",
        city="string: City of the stay",
        check_in="string: First night as YYYY-MM-DD",
        nights="integer: Number of nights",
    ),
    clauses="""
        find a hotel in {city} for {nights} nights from {day}
        look for a place to stay in {city}, {nights} nights starting on {day}
        see what {nights} nights in {city} cost from {day}
        ---
        get me a room in {city} on {day}, {nights} nights
        compare lodgings in {city} for {nights} nights as of {day}
    """,
    answers="""
        {hotel} in {city} has a room for {price} EUR per night, {total} EUR in all.
        I found {hotel} ({rating} of 5): {nights} nights cost {total} EUR.
        For {nights} nights {hotel} asks {total} EUR, that is {price} EUR a night.
        ---
        {total} EUR buys {nights} nights at {hotel}, rated {rating}.
        My pick in {city} would be {hotel} at {price} EUR per night.
    """,
    gap=(
        """
        find me a hotel for {nights} nights from {day}
        ---
        get me a room on {day}, {nights} nights
        """,
        """
        In which city would you like to stay?
        Where are you going?
        ---
        What is your destination?
        """,
        "city",
    ),
    lookup=True,
)
def hotels(rng: Random) -> Case:
    date, nights, price = pools.date(rng), rng.randint(2, 9), rng.randint(38, 260)
    hotel = f"{rng.choice(('Hotel', 'Guesthouse', 'Hostel', 'Pension'))} {rng.choice(pools.LAST_NAMES)}"
    result = {"hotel": hotel, "rating": rng.randint(30, 49) / 10, "price": price, "total": price * nights}
    arguments = {"city": rng.choice(pools.CITIES), "check_in": date, "nights": nights}
    return Case(arguments, result, {"day": pools.spoken(date)})


@task(
    tool(
        "get_train_times",
        "Next trains between two cities.|Look up the railway timetable.",
        origin="string: City of departure",
        destination="string: City of arrival",
        after="string: Earliest departure as HH:MM",
    ),
    clauses="""
        find the next train from {origin} to {destination} after {after}
        check which trains leave {origin} for {destination} after {after}
        look up a train to {destination} from {origin}, leaving after {after}
        ---
        consult the timetable {origin} to {destination} from {after} on
        pick a rail connection out of {origin} to {destination} past {after}
    """,
    answers="""
        The next train leaves {origin} at {departure} from platform {platform} and takes {minutes} minutes.
        Take the {departure} from {origin}, platform {platform}; the ride lasts {minutes} minutes.
        There is a train at {departure} (platform {platform}).
        ---
        Platform {platform}, {departure}: {minutes} minutes to {destination}.
        The timetable offers {departure}, reaching {destination} after {minutes} minutes.
    """,
    gap=(
        """
        find the next train to {destination} after {after}
        ---
        pick a rail connection to {destination} past {after}
        """,
        """
        From which station do you leave?
        Where do you start?
        ---
        What is your point of departure?
        """,
        "origin",
    ),
)
def trains(rng: Random) -> Case:
    origin, destination = rng.sample(pools.RAIL_CITIES, 2)
    hour, minute = rng.randint(6, 21), rng.randint(0, 29)
    result = {
        "departure": f"{hour:02d}:{minute + rng.randint(1, 30):02d}",
        "platform": rng.randint(1, 14),
        "minutes": rng.randint(35, 400),
    }
    return Case({"origin": origin, "destination": destination, "after": f"{hour:02d}:{minute:02d}"}, result)


_OFFSETS = (
    ("Lisbon", 0),
    ("Oslo", 1),
    ("Cairo", 2),
    ("Nairobi", 3),
    ("Kyoto", 9),
    ("Seoul", 9),
    ("Lima", -5),
    ("Hanoi", 7),
)


@task(
    tool(
        "get_local_time",
        "Convert a UTC time to the local time of a city.|Time in a city, given the time in UTC.",
        city="string: Name of the city",
        utc="string: Time in UTC as HH:MM",
    ),
    clauses="""
        tell me what time it is in {city} when it is {utc} UTC
        convert {utc} UTC to the time in {city}
        ---
        translate {utc} UTC into {city} time
    """,
    answers="""
        At {utc} UTC it is {local} in {city}.
        {utc} UTC is {local} in {city}.
        In {city} the clock then shows {local}.
        ---
        {city} reads {local} at {utc} UTC.
        The time over there would be {local}.
    """,
)
def local_time(rng: Random) -> Case:
    city, offset = rng.choice(_OFFSETS)
    hour, minute = rng.randint(0, 23), rng.randint(0, 59)
    result = {"city": city, "local": f"{(hour + offset) % 24:02d}:{minute:02d}", "offset_hours": offset}
    return Case({"city": city, "utc": f"{hour:02d}:{minute:02d}"}, result)
