"""Tasks of numbers and health: units, statistics, body measures, workouts."""

from __future__ import annotations

import statistics
from random import Random

from qwenscope.corpus.tool_use import pools
from qwenscope.corpus.tool_use.model import Case, task, tool

_UNITS = (
    ("kilometers", "miles", 0.621371),
    ("miles", "kilometers", 1.609344),
    ("kilograms", "pounds", 2.204623),
    ("pounds", "kilograms", 0.453592),
    ("meters", "feet", 3.28084),
    ("liters", "gallons", 0.264172),
    ("inches", "centimeters", 2.54),
    ("hours", "minutes", 60.0),
)


@task(
    tool(
        "convert_units",
        "Convert a quantity between units.|Unit conversion for length, mass, volume and time.",
        value="number: Quantity to convert",
        source="string: Unit to convert from",
        target="string: Unit to convert to",
    ),
    clauses="""
        convert {value} {source} to {target}
        tell me how many {target} are in {value} {source}
        change {value} {source} into {target}
        ---
        restate {value} {source} as {target}
        give {value} {source} in terms of {target}
    """,
    answers="""
        {value} {source} are {converted} {target}.
        That is {converted} {target}.
        {value} {source} make {converted} {target}.
        ---
        It equals {converted} {target}.
        In {target} we get {converted}.
    """,
    gap=(
        """
        convert {value} {source}
        ---
        restate {value} {source} in another unit
        """,
        """
        To which unit?
        What unit do you need?
        ---
        Which unit shall I use?
        """,
        "target",
    ),
)
def units(rng: Random) -> Case:
    source, target, factor = rng.choice(_UNITS)
    value = rng.choice((rng.randint(2, 900), pools.tidy(rng.randint(20, 999) / 10)))
    return Case(
        {"value": value, "source": source, "target": target}, {"converted": pools.tidy(round(value * factor, 2))}
    )


@task(
    tool(
        "describe_numbers",
        "Mean, median and range of a list of numbers.|Summary statistics.",
        numbers="numbers: The values",
    ),
    clauses="""
        summarise the numbers {listing}
        compute mean and median of {listing}
        give me the statistics of {listing}
        ---
        characterise the series {listing}
        boil {listing} down to mean and median
    """,
    answers="""
        The mean is {mean} and the median {median}; the values run from {low} to {high}.
        Mean {mean}, median {median}, smallest {low}, largest {high}.
        These {count} numbers average {mean}, with a median of {median}.
        ---
        {count} values between {low} and {high}: mean {mean}, median {median}.
        Their median is {median} while the mean comes to {mean}.
    """,
)
def describe(rng: Random) -> Case:
    values = [rng.randint(1, 200) for _ in range(rng.randint(3, 7))]
    result = {
        "count": len(values),
        "mean": pools.tidy(round(sum(values) / len(values), 2)),
        "median": pools.tidy(statistics.median(values)),
        "low": min(values),
        "high": max(values),
    }
    return Case({"numbers": values}, result, {"listing": ", ".join(map(str, values))})


@task(
    tool(
        "calculate_bmi",
        "Body mass index from weight and height.|Compute the BMI.",
        weight="number: Weight in kilograms",
        height="number: Height in meters",
    ),
    clauses="""
        calculate my BMI: {weight} kg, {height} m
        work out the body mass index of someone who weighs {weight} kg at {height} m
        ---
        put {weight} kg and {height} m into a body mass index
    """,
    answers="""
        With {weight} kg and {height} m the BMI is {bmi}.
        The body mass index is {bmi}, in the range called {category}.
        Your BMI is {bmi} ({category}).
        ---
        {bmi} is the index, which counts as {category}.
        Index: {bmi}. Category: {category}.
    """,
    gap=(
        """
        calculate my BMI, I weigh {weight} kg
        ---
        put {weight} kg into a body mass index
        """,
        """
        How tall are you, in meters?
        What is your height?
        ---
        And the height in meters?
        """,
        "height",
    ),
)
def body_mass(rng: Random) -> Case:
    weight, height = rng.randint(45, 120), rng.randint(150, 200) / 100
    bmi = round(weight / height**2, 1)
    category = "underweight" if bmi < 18.5 else "normal" if bmi < 25 else "overweight" if bmi < 30 else "obese"
    return Case({"weight": weight, "height": height}, {"bmi": bmi, "category": category})


@task(
    tool(
        "log_workout",
        "Record a workout.|Save a training session and estimate the energy used.",
        activity="string: Kind of exercise",
        minutes="integer: Duration in minutes",
        date="string: Date as YYYY-MM-DD",
    ),
    clauses="""
        log {minutes} minutes of {activity} on {day}
        record my {activity} session of {minutes} minutes on {day}
        save that I did {minutes} minutes of {activity} on {day}
        ---
        enter {activity}, {minutes} minutes, into my diary of {day}
        count {minutes} minutes of {activity} for {day}
    """,
    answers="""
        Logged: {minutes} minutes of {activity} on {day}, about {calories} kcal.
        Well done! {minutes} minutes of {activity} burn about {calories} kcal.
        Your {activity} on {day} is saved; you have trained {week_total} minutes this week.
        ---
        The diary of {day} has {activity} in it, {calories} kcal.
        That brings the week to {week_total} minutes.
    """,
    gap=(
        """
        log my {activity} session on {day}
        ---
        enter {activity} into my diary of {day}
        """,
        """
        How many minutes did you train?
        How long was it, in minutes?
        ---
        What was its length in minutes?
        """,
        "minutes",
    ),
)
def workout(rng: Random) -> Case:
    activity, burn = rng.choice(
        (("running", 11), ("cycling", 8), ("swimming", 9), ("yoga", 3), ("rowing", 8), ("walking", 4))
    )
    minutes, date = rng.randint(2, 24) * 5, pools.date(rng)
    result = {"calories": minutes * burn, "week_total": minutes + rng.randint(0, 40) * 5}
    return Case({"activity": activity, "minutes": minutes, "date": date}, result, {"day": pools.spoken(date)})
