"""Tasks of home and table: heating, lights, music, recipes, restaurants."""

from __future__ import annotations

from random import Random
from typing import Any

from qwenscope.corpus.tool_use import pools
from qwenscope.corpus.tool_use.model import Case, task, tool


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
        The thermostat in the {room} was at {current} °C and will reach {temperature} °C in {minutes} minutes.
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
    room, target = rng.choice(pools.ROOMS), pools.tidy(rng.randint(32, 48) / 2)
    current = pools.tidy(target + rng.choice((-1, 1)) * rng.randint(1, 9) / 2)
    result = {"room": room, "current": current, "target": target, "minutes": int(abs(target - current) * 14)}
    return Case({"room": room, "temperature": target}, result)


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


@task(
    tool(
        "control_light",
        "Switch or dim the light of a room.|Control the lamps of one room.",
        optional=("brightness",),
        room="string: Room of the house",
        state="on/off: Whether the light is on",
        brightness="integer: Brightness in percent",
    ),
    clauses="""
        turn {state} the light in the {room}{level}
        switch the {room} light {state}{level}
        ---
        have the lamps of the {room} go {state}{level}
    """,
    answers="""
        The light in the {room} is now {state}.
        I switched the {room} light {state}.
        Done, {room} light {state}.
        ---
        Lamps {state} in the {room}.
        The {room} is taken care of: {state}.
    """,
    gap=(
        """
        turn {state} the light{level}
        ---
        have the lamps go {state}{level}
        """,
        """
        In which room?
        Which light do you mean?
        ---
        Of what room?
        """,
        "room",
    ),
)
def light(rng: Random) -> Case:
    state = rng.choice(("on", "off"))
    arguments: dict[str, Any] = {"room": rng.choice(pools.ROOMS), "state": state}
    level = rng.randint(2, 10) * 10 if state == "on" and rng.random() < 0.3 else 0
    if level:
        arguments["brightness"] = level
    result = {"ok": True, "state": state, "watts": rng.randint(4, 60) if state == "on" else 0}
    return Case(arguments, result, {"level": f" at {level} percent" if level else ""})


@task(
    tool(
        "play_music",
        "Play music in a room.|Start a playlist on a speaker.",
        genre="string: Genre or mood",
        room="string: Room of the speaker",
    ),
    clauses="""
        play some {genre} music in the {room}
        put on {genre} music in the {room}
        start a {genre} playlist in the {room}
        ---
        fill the {room} with {genre} tunes
        get the {room} speaker to play {genre}
    """,
    answers="""
        Playing "{track}" by {artist} in the {room}.
        The {room} speaker plays {genre} now, starting with "{track}".
        Enjoy: {artist}, "{track}".
        ---
        First up in the {room}: "{track}" ({artist}).
        {genre} it is; {artist} opens with "{track}".
    """,
    gap=(
        """
        play some music in the {room}
        put on music in the {room}
        ---
        fill the {room} with tunes
        """,
        """
        What kind of music would you like?
        Any genre in mind?
        ---
        Which style suits you?
        """,
        "genre",
    ),
)
def music(rng: Random) -> Case:
    genre = rng.choice(("jazz", "folk", "classical", "ambient", "rock", "soul", "electronic", "calm piano", "samba"))
    result = {"status": "playing", "track": pools.book(rng).removeprefix("The "), "artist": pools.person(rng)}
    return Case({"genre": genre, "room": rng.choice(pools.ROOMS)}, result)


@task(
    tool(
        "find_restaurant",
        "Find restaurants by cuisine and city.|Recommend a place to eat.",
        cuisine="string: Kind of cuisine",
        city="string: City to search in",
    ),
    clauses="""
        find [a good|an affordable] {cuisine} restaurant in {city}
        recommend a {cuisine} place in {city}
        look for {cuisine} food in {city}
        ---
        name somewhere to eat {cuisine} dishes in {city}
        locate {cuisine} cooking around {city}
    """,
    answers="""
        {name} in {city} serves {cuisine} food and is rated {rating} of 5.
        Try {name} at {address}: {cuisine} food, {rating} stars.
        I recommend {name} ({address}).
        ---
        {rating} stars go to {name}, {address}.
        For {cuisine} dishes people like {name}, found at {address}.
    """,
    gap=(
        """
        find a good {cuisine} restaurant
        look for {cuisine} food
        ---
        name somewhere to eat {cuisine} dishes
        """,
        """
        In which city?
        Where would you like to eat?
        ---
        Around what town?
        """,
        "city",
    ),
    lookup=True,
)
def restaurant(rng: Random) -> Case:
    name = f"{rng.choice(pools.FIRST_NAMES)}'s {rng.choice(('Table', 'Kitchen', 'Corner', 'Garden', 'Oven'))}"
    address = f"{rng.randint(1, 199)} {rng.choice(pools.LAST_NAMES)} Street"
    result = {"name": name, "address": address, "rating": rng.randint(34, 50) / 10}
    return Case({"cuisine": rng.choice(pools.CUISINES), "city": rng.choice(pools.CITIES)}, result)


@task(
    tool(
        "book_table",
        "Book a table at a restaurant.|Reserve seats for a meal.",
        restaurant="string: Name of the restaurant",
        guests="integer: Number of people",
        date="string: Date as YYYY-MM-DD",
        time="string: Time as HH:MM",
    ),
    clauses="""
        book a table for {guests} at {restaurant} on {day} at {time}
        reserve {guests} seats at {restaurant}, {day}, {time}
        ---
        secure us a table of {guests} with {restaurant} on {day}, {time}
    """,
    answers="""
        Your table for {guests} at {restaurant} is booked for {day}, {time}. The code is {code}.
        {restaurant} expects {guests} guests on {day} at {time} (code {code}).
        Booked! Please mention {code} when you arrive.
        ---
        {code} is your reservation with {restaurant}.
        {restaurant} holds {guests} seats for you until {time}.
    """,
    gap=(
        """
        book a table for {guests} at {restaurant} on {day}
        ---
        secure us a table of {guests} with {restaurant} on {day}
        """,
        """
        At what time?
        What time would you like to eat?
        ---
        When will you arrive?
        """,
        "time",
    ),
)
def table(rng: Random) -> Case:
    name = f"{rng.choice(pools.FIRST_NAMES)}'s {rng.choice(('Table', 'Kitchen', 'Corner', 'Garden', 'Oven'))}"
    date = pools.date(rng)
    arguments = {"restaurant": name, "guests": rng.randint(2, 9), "date": date, "time": pools.clock(rng)}
    return Case(arguments, {"status": "confirmed", "code": pools.code(rng, "T")}, {"day": pools.spoken(date)})
