"""Tasks of daily life: weather, calendar, lists, home, travel, food."""

from __future__ import annotations

from random import Random

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
        check the weather in {city} {when}
        [find out|tell me] what the weather will be like in {city} {when}
        get the forecast for {city} {when}
        see whether I need an umbrella in {city} {when}
        ---
        look up how warm it gets in {city} {when}
        report the [sky conditions|outlook] over {city} {when}
    """,
    answers="""
        The forecast for {city} {when} is {sky} with a high of {high} {symbol} and a low of {low} {symbol}.
        {city} will be {sky} {when}: between {low} and {high} {symbol}, with a {rain_chance} % chance of rain.
        Expect {sky} weather in {city} {when}, around {high} {symbol} at the warmest. The chance of rain is {rain_chance} %.
        ---
        {when_capital} {city} sees {sky} skies, {low} to {high} {symbol}; rain is at {rain_chance} %.
        Outlook for {city}: {sky}, peaking at {high} {symbol}.
    """,
    gap=(
        """
        check the weather {when}
        get me a forecast {when}
        ---
        look up how warm it gets {when}
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
    low, symbol = rng.randint(-8, 24), "°C"
    if rng.random() < 0.4:
        unit = rng.choice(("celsius", "fahrenheit"))
        arguments["unit"] = unit
        if unit == "fahrenheit":
            low, symbol = rng.randint(15, 80), "°F"
    high = low + rng.randint(3, 14)
    sky = rng.choice(("sunny", "cloudy", "rainy", "windy", "foggy", "partly cloudy", "stormy", "clear"))
    wet = rng.randint(60, 95) if sky in ("rainy", "stormy") else rng.randint(0, 40)
    result = {"city": city, "sky": sky, "low": low, "high": high, "rain_chance": wet}
    return Case(arguments, result, {"when": when, "when_capital": when.capitalize(), "symbol": symbol})


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
        [schedule|add] a {title} on {day} at {time}
        put the {title} in my calendar for {day}, {time}
        create a calendar entry called {title} for {time} on {day}
        block time for the {title} at {time} on {day}
        ---
        book a slot named {title}, {day} from {time}
        enter the {title} into my agenda ({day}, {time})
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
        schedule a {title} on {day}
        put the {title} in my calendar for {day}
        ---
        book a slot named {title} on {day}
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
    if rng.random() < 0.3:
        arguments["location"] = rng.choice(("Room 1", "Room 4", "Cafe Meridian", "Town hall", "Online"))
    return Case(arguments, {"status": "created", "event_id": pools.code(rng, "EV")}, {"day": pools.spoken(date)})


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
        "set_thermostat",
        "Set the target temperature of a room.|Control the heating of one room.",
        room="string: Room of the house",
        temperature="number: Target in degrees Celsius",
    ),
    clauses="""
        set the {room} to {temperature} degrees
        [heat|bring] the {room} to {temperature} degrees
        change the thermostat in the {room} to {temperature} degrees
        ---
        make the {room} a steady {temperature} degrees
        adjust the {room} heating until it reads {temperature}
    """,
    answers="""
        The {room} is now set to {temperature} °C; it is {current} °C at the moment.
        Done. The thermostat in the {room} was at {current} °C and will reach {temperature} °C in about {minutes} minutes.
        I changed the {room} to {temperature} degrees.
        ---
        Heating adjusted: {room} from {current} to {temperature} °C, ready in {minutes} minutes.
        Give the {room} {minutes} minutes to get from {current} to {temperature} °C.
    """,
    gap=(
        """
        set the thermostat to {temperature} degrees
        make it {temperature} degrees
        ---
        adjust the heating until it reads {temperature}
        """,
        """
        In which room?
        Which room do you mean?
        ---
        Where in the house?
        """,
        "room",
    ),
)
def thermostat(rng: Random) -> Case:
    room, target = rng.choice(pools.ROOMS), rng.randint(32, 48) / 2
    current = target + rng.choice((-1, 1)) * rng.randint(1, 9) / 2
    result = {"room": room, "current": current, "target": target, "minutes": int(abs(target - current) * 14)}
    return Case({"room": room, "temperature": target}, result)


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
        find a flight from {origin} to {destination} on {day}
        search for flights from {origin} to {destination} on {day}
        see what it costs to fly from {origin} to {destination} on {day}
        ---
        get me on a plane out of {origin} into {destination} on {day}
        compare fares {origin} to {destination} for {day}
    """,
    answers="""
        The cheapest flight from {origin} to {destination} on {day} is {flight} with {airline} at {departure} for {price} EUR.
        {airline} flies from {origin} to {destination} on {day} at {departure}; flight {flight} costs {price} EUR.
        I found {flight} ({airline}), leaving {origin} at {departure} on {day}, for {price} EUR.
        ---
        Best fare to {destination}: {price} EUR on {airline} {flight}, wheels up at {departure}.
        For {day} I would take {flight}: {airline}, {departure}, {price} EUR.
    """,
    gap=(
        """
        find a flight to {destination} on {day}
        see what it costs to fly to {destination} on {day}
        ---
        get me on a plane into {destination} on {day}
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
    arguments = {"origin": origin, "destination": destination, "date": date}
    if rng.random() < 0.3:
        arguments["passengers"] = 1
    airline = rng.choice(pools.AIRLINES)
    flight = f"{airline[0]}{airline.split()[1][0]}{rng.randint(100, 999)}"
    result = {"flight": flight, "airline": airline, "departure": pools.clock(rng), "price": rng.randint(49, 890)}
    return Case(arguments, result, {"day": pools.spoken(date)})


@task(
    tool(
        "find_recipe",
        "Find a recipe for a dish.|Search the recipe collection.",
        optional=("servings",),
        dish="string: Name of the dish",
        servings="integer: Number of people",
    ),
    clauses="""
        find a recipe for {dish} for {people}
        look up how to cook {dish} for {people}
        [get|give] me a {dish} recipe that serves {people}
        ---
        dig out instructions for {dish}, enough for {people}
        suggest a way to prepare {dish} for {people}
    """,
    answers="""
        Here is {dish} for {people}: you need {listing}. It takes {minutes} minutes.
        For {dish} buy {listing}. Cooking time is about {minutes} minutes.
        The recipe for {dish} calls for {listing} and is ready in {minutes} minutes.
        ---
        {minutes} minutes are enough for {dish}; have {listing} at hand.
        Ingredients of the {dish}: {listing}. Plan {minutes} minutes.
    """,
)
def recipe(rng: Random) -> Case:
    dish, servings = rng.choice(pools.DISHES), rng.randint(2, 8)
    items = rng.sample(
        ("onions", "garlic", "olive oil", "salt", "pepper", "tomatoes", "ginger", "lemon", "stock", "herbs"), 4
    )
    result = {"dish": dish, "servings": servings, "ingredients": items, "minutes": rng.randint(3, 18) * 5}
    extra = {"people": f"{servings} people", "listing": ", ".join(items[:-1]) + f" and {items[-1]}"}
    return Case({"dish": dish, "servings": servings}, result, extra)
