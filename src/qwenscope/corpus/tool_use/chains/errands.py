"""Chains of daily life: trips, tables, shopping, appointments."""

from __future__ import annotations

from random import Random
from typing import Any

from qwenscope.corpus.tool_use import pools
from qwenscope.corpus.tool_use.model import Case, Steps, chain


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
        plan a {title} at {time} on {day} in {city}, but only without rain
        ---
        enter a {title} at {time} on {day}, provided {city} stays dry
        look at the sky over {city} for {day} and enter a {title} at {time} if it is dry
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
        No rain in sight: your {title} is planned for {time}.
        ---
        With {sky} skies over {city} the {title} now stands at {time} on {day}.
        Dry it is, and the {title} has its place at {time}.
    """,
    otherwise="""
        It will be {sky} in {city} on {day}, so I did not schedule the {title}.
        The forecast says {sky}, with rain at {rain} %. I left the {title} out of your calendar.
        Rain is likely ({rain} %), therefore nothing was scheduled.
        ---
        {rain} % chance of rain over {city}: no {title} was entered.
        A {sky} day awaits {city}; better choose another date for the {title}.
    """,
)
def weather_then_event(rng: Random) -> tuple[Steps, dict[str, Any]]:
    city, date, time = rng.choice(pools.CITIES), pools.date(rng), pools.clock(rng)
    title, wet = rng.choice(("picnic", "garden party", "bike tour", "walk", "football match")), rng.random() < 0.35
    sky = rng.choice(("rainy", "stormy") if wet else ("sunny", "clear", "cloudy"))
    low, rain = rng.randint(5, 18), rng.randint(60, 95) if wet else rng.randint(0, 15)
    sighted = {"city": city, "sky": sky, "low": low, "high": low + rng.randint(3, 10), "rain_chance": rain}
    slots = {"city": city, "day": pools.spoken(date), "time": time, "title": title, "sky": sky, "rain": rain}
    steps: Steps = [("get_weather", Case({"city": city, "day": date}, sighted))]
    if wet:
        return steps, {**slots, "stopped": True}
    entry = {"title": title, "date": date, "time": time, "location": city}
    steps.append(("create_event", Case(entry, {"status": "created", "event_id": pools.code(rng, "EV")})))
    return steps, slots


@chain(
    "find_restaurant",
    "book_table",
    clauses="""
        find a {cuisine} restaurant in {city} and book a table for {guests} on {day} at {time}
        book us a {cuisine} dinner in {city} for {guests} on {day}, {time}
        pick a {cuisine} place in {city} and reserve {guests} seats for {day} at {time}
        ---
        get {guests} of us into some {cuisine} restaurant around {city} on {day}, {time}
        choose {cuisine} cooking in {city}, then secure {guests} chairs at {time} on {day}
    """,
    links="""
        {name} looks good ({rating} stars). Booking it now.
        I will take {name} at {address}.
        ---
        My choice falls on {name}; now for the seats.
    """,
    answers="""
        I booked {name} at {address} for {guests} on {day}, {time}. The code is {code}.
        You have a table for {guests} at {name} (rated {rating}); please mention {code}.
        Dinner at {name} on {day} at {time} is confirmed under {code}.
        ---
        {code}: {guests} chairs at {name}, {address}.
        {name} will welcome the {guests} of you; the code reads {code}.
    """,
)
def dinner(rng: Random) -> tuple[Steps, dict[str, Any]]:
    cuisine, city, guests = rng.choice(pools.CUISINES), rng.choice(pools.CITIES), rng.randint(2, 9)
    date, time = pools.date(rng), pools.clock(rng)
    place = {
        "name": f"{rng.choice(pools.FIRST_NAMES)}'s {rng.choice(('Table', 'Kitchen', 'Corner', 'Garden', 'Oven'))}",
        "address": f"{rng.randint(1, 199)} {rng.choice(pools.LAST_NAMES)} Street",
        "rating": rng.randint(34, 50) / 10,
    }
    booking = {"restaurant": place["name"], "guests": guests, "date": date, "time": time}
    confirmed = {"status": "confirmed", "code": pools.code(rng, "T")}
    steps: Steps = [
        ("find_restaurant", Case({"cuisine": cuisine, "city": city}, place)),
        ("book_table", Case(booking, confirmed)),
    ]
    slots = {"cuisine": cuisine, "city": city, "guests": guests, "day": pools.spoken(date), "time": time}
    return steps, {**slots, **place, "code": confirmed["code"]}


@chain(
    "search_products",
    "check_stock",
    clauses="""
        find a {query} under {limit} euros and check if the store in {city} has it
        look for a {query} below {limit} euros, then see whether it is in stock in {city}
        search for a {query} up to {limit} euros that I can pick up in {city}
        ---
        hunt for a {query} capped at {limit} euros and ask the {city} branch about it
        locate a {query} for {limit} euros or less, then verify that {city} carries it
    """,
    links="""
        There is one by {brand} for {price} EUR. Checking {city}.
        The {brand} {query} fits your budget; now the stock.
        ---
        {brand} has one at {price} EUR; {city} comes next.
    """,
    answers="""
        The {brand} {query} costs {price} EUR, and {city} has {units} of them in aisle {aisle}.
        {city} has it: {brand} {query}, {price} EUR, {units} in stock.
        You can pick up the {brand} {query} for {price} EUR in {city}.
        ---
        Go to aisle {aisle} in {city}: {units} pieces of the {brand} {query} at {price} EUR.
        {units} remain in {city}, each {price} EUR, made by {brand}.
    """,
    otherwise="""
        The {brand} {query} costs {price} EUR, but it is sold out in {city}.
        I found one by {brand} for {price} EUR. Sadly the store in {city} has none left.
        ---
        {brand} sells it at {price} EUR; the {city} branch is out of them, though.
        No luck in {city}: zero left of the {brand} {query}.
    """,
)
def pick_up(rng: Random) -> tuple[Steps, dict[str, Any]]:
    query, limit, city = rng.choice(pools.PRODUCTS), rng.randint(2, 40) * 10, rng.choice(pools.CITIES)
    brand, price = rng.choice(pools.LAST_NAMES), pools.money(rng, limit // 2, limit - 1)
    offer = {"product": query, "brand": brand, "price": price, "rating": rng.randint(31, 50) / 10, "stock": 99}
    units, aisle = rng.choice((0, rng.randint(2, 60), rng.randint(2, 60))), rng.randint(1, 24)
    steps: Steps = [
        ("search_products", Case({"query": query, "max_price": limit}, offer)),
        ("check_stock", Case({"product": query, "city": city}, {"units": units, "aisle": aisle})),
    ]
    slots = {"query": query, "limit": limit, "city": city, "brand": brand, "price": price, "units": units}
    return steps, {**slots, "aisle": aisle} | ({} if units else {"stopped": True})


@chain(
    "search_hotels",
    "set_reminder",
    clauses="""
        find a hotel in {city} for {nights} nights from {day} and remind me on {early} at {time} to book it
        look for a place to stay in {city} from {day}, {nights} nights, and set a reminder to book it ({early}, {time})
        ---
        get a room offer for {city} on {day}, {nights} nights, and nudge me on {early} at {time} to take it
    """,
    links="""
        {hotel} has a room. Now the reminder.
        {hotel} costs {total} EUR in all; I will set the reminder.
        ---
        With {hotel} found, the nudge remains.
    """,
    answers="""
        {hotel} in {city} costs {total} EUR for {nights} nights. I will remind you to book it on {early} at {time}.
        I found {hotel} ({price} EUR a night) and set a reminder for {early}, {time}.
        ---
        {hotel} asks {total} EUR; your nudge comes on {early} at {time}.
        On {early} you will hear from me about {hotel}, {price} EUR per night.
    """,
)
def hotel_then_reminder(rng: Random) -> tuple[Steps, dict[str, Any]]:
    city, date, early, nights = rng.choice(pools.CITIES), pools.date(rng), pools.date(rng), rng.randint(2, 9)
    if early > date:
        date, early = early, date
    price, time = rng.randint(38, 260), pools.clock(rng)
    hotel = f"{rng.choice(('Hotel', 'Guesthouse', 'Hostel', 'Pension'))} {rng.choice(pools.LAST_NAMES)}"
    room = {"hotel": hotel, "rating": rng.randint(30, 49) / 10, "price": price, "total": price * nights}
    note = {"text": f"book {hotel}", "date": early, "time": time}
    steps: Steps = [
        ("search_hotels", Case({"city": city, "check_in": date, "nights": nights}, room)),
        ("set_reminder", Case(note, {"status": "ok", "id": pools.code(rng, "R")})),
    ]
    slots = {"city": city, "nights": nights, "day": pools.spoken(date), "early": pools.spoken(early), "time": time}
    return steps, {**slots, **room}
