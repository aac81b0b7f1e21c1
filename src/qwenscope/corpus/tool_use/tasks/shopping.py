"""Tasks of shopping: products, orders, returns."""

from __future__ import annotations

from random import Random

from qwenscope.corpus.tool_use import pools
from qwenscope.corpus.tool_use.model import Case, task, tool


@task(
    tool(
        "track_order",
        "Get the status of an order.|Track a shipment by order number.",
        order_id="string: Order number such as ORD-12345",
    ),
    clauses="""
        check the status of order {order_id}
        find out where my order {order_id} is
        track {order_id} for me
        ---
        locate the parcel of order {order_id}
        see how far {order_id} has come
    """,
    answers="""
        Order {order_id} ({item}) is {status} and should arrive on {day}.
        Your {item} is {status}; delivery is expected on {day}.
        {order_id} is {status}. Expected arrival: {day}.
        ---
        The parcel with the {item} is {status}, due {day}.
        As of now {order_id} is {status}; count on {day}.
    """,
    gap=(
        """
        check the status of my order
        find out where my parcel is
        ---
        locate my parcel
        """,
        """
        What is the order number?
        Could you give me the order number?
        ---
        Which order number is on the receipt?
        """,
        "order_id",
    ),
    lookup=True,
)
def order(rng: Random) -> Case:
    order_id, day = pools.code(rng, "ORD"), pools.date(rng)
    status = rng.choice(("packed", "in transit", "out for delivery", "held at customs", "ready for pickup"))
    result = {"order_id": order_id, "item": rng.choice(pools.PRODUCTS), "status": status, "expected": day}
    return Case({"order_id": order_id}, result, {"day": pools.spoken(day)})


@task(
    tool(
        "search_products",
        "Search the shop's catalogue.|Find products below a price.",
        query="string: What to look for",
        max_price="number: Highest price in euros",
    ),
    clauses="""
        find a {query} for less than {max_price} euros
        look for a {query} under {max_price} euros
        show me a {query} that costs at most {max_price} euros
        ---
        hunt for a {query}, {max_price} euros being my limit
        get offers on a {query} capped at {max_price} euros
    """,
    answers="""
        The {brand} {query} costs {price} EUR and is rated {rating} of 5.
        I found a {query} by {brand} for {price} EUR.
        There is one for {price} EUR from {brand} ({rating} stars).
        ---
        {brand} sells it at {price} EUR, rated {rating}.
        Within your limit: {brand} {query}, {price} EUR.
    """,
    gap=(
        """
        find a cheap {query}
        look for a {query}
        ---
        get offers on a {query}
        """,
        """
        What is your budget in euros?
        How much would you like to spend at most?
        ---
        Where is your price limit?
        """,
        "max_price",
    ),
)
def products(rng: Random) -> Case:
    query, limit = rng.choice(pools.PRODUCTS), rng.randint(2, 40) * 10
    result = {
        "product": query,
        "brand": rng.choice(pools.LAST_NAMES),
        "price": pools.money(rng, limit // 2, limit - 1),
        "rating": rng.randint(31, 50) / 10,
        "stock": rng.randint(1, 80),
    }
    return Case({"query": query, "max_price": limit}, result)


@task(
    tool(
        "start_return",
        "Start the return of an order.|Send an ordered item back for a refund.",
        order_id="string: Order number such as ORD-12345",
        reason="damaged/wrong item/too late/changed mind: Reason",
    ),
    clauses="""
        return order {order_id} ({reason})
        send back order {order_id}, reason: {reason}
        start a return for {order_id} because of "{reason}"
        ---
        hand back {order_id}, the reason being {reason}
        refund me for {order_id} ({reason})
    """,
    answers="""
        The return of {order_id} has been started; you get {refund} EUR back.
        Return {label} is ready. The refund for {order_id} is {refund} EUR.
        I registered the return of {order_id}. Please use label {label}.
        ---
        {refund} EUR will come back to you for {order_id}; print label {label}.
        Label {label} belongs to {order_id}.
    """,
    careful=True,
)
def returns(rng: Random) -> Case:
    arguments = {
        "order_id": pools.code(rng, "ORD"),
        "reason": rng.choice(("damaged", "wrong item", "too late", "changed mind")),
    }
    return Case(arguments, {"label": pools.code(rng, "RET"), "refund": pools.money(rng, 5, 300)})


@task(
    tool(
        "check_stock",
        "Units of a product in a store.|Is a product in stock in a city?",
        product="string: Product",
        city="string: Store city",
    ),
    clauses="""
        check if the {product} is in stock in {city}
        see whether the store in {city} has the {product}
        find out how many of the {product} are left in {city}
        ---
        ask the {city} branch about the {product}
        verify that {city} still carries the {product}
    """,
    answers="""
        The store in {city} has {units} of the {product}, in aisle {aisle}.
        Yes, {units} left in {city}: look in aisle {aisle}.
        {city} has {units} in stock.
        ---
        In {city}, aisle {aisle} keeps {units} of them.
        {units} pieces of the {product} remain with the {city} branch.
    """,
    gap=(
        """
        check if the {product} is in stock
        ---
        verify that you still carry the {product}
        """,
        """
        In which city is your store?
        For which city?
        ---
        At which branch?
        """,
        "city",
    ),
    lookup=True,
)
def stock_level(rng: Random) -> Case:
    arguments = {"product": rng.choice(pools.PRODUCTS), "city": rng.choice(pools.CITIES)}
    return Case(arguments, {"units": rng.randint(2, 60), "aisle": rng.randint(1, 24)})
