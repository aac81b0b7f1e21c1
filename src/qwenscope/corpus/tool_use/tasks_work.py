"""Tasks of work: search, files, code, mail and contacts, numbers, shops and orders."""

from __future__ import annotations

from random import Random

from qwenscope.corpus.tool_use import pools
from qwenscope.corpus.tool_use.model import Case, task, tool


@task(
    tool(
        "web_search",
        "Search the web.|Search the internet and return the best matches.|Find pages about a topic.",
        query="string: What to search for",
    ),
    clauses="""
        search the web for {query}
        [find|look up] [recent|good] articles about {query}
        find out what is new about {query}
        do some research on {query}
        ---
        hunt down a source on {query}
        see what the internet says concerning {query}
    """,
    answers="""
        The best match is "{title}" at {url}. It says that {snippet}.
        I found "{title}" ({url}): {snippet}.
        According to "{title}", {snippet}. You can read it at {url}.
        ---
        One source stands out, {url}, which reports that {snippet}.
        See "{title}" for details; in short, {snippet}.
    """,
    gap=(
        """
        search the web for something
        do some research for me
        ---
        hunt down a source for me
        """,
        """
        What topic are you interested in?
        What should I search for?
        ---
        Gladly. On which subject?
        """,
        "query",
    ),
)
def search(rng: Random) -> Case:
    topic = rng.choice(pools.TOPICS)
    city, year, share = rng.choice(pools.CITIES), rng.randint(2015, 2026), rng.randint(3, 70)
    query = rng.choice((topic, f"{topic} in {city}", f"{topic} {year}", f"history of {topic}"))
    snippet = rng.choice(
        (
            f"interest in {topic} has grown by {share} % since {year}",
            f"a project in {city} has studied {topic} since {year}",
            f"about {share} % of those asked in {city} had heard of {topic}",
            f"{topic} became a public question in {city} in {year}",
        )
    )
    title = rng.choice(
        (f"A short guide to {topic}", f"{topic.capitalize()} explained", f"What {city} learned about {topic}")
    )
    url = f"https://{rng.choice(('www', 'news', 'blog'))}.example.com/{topic.replace(' ', '-')}-{year}"
    hits = [{"title": title, "url": url, "snippet": f"{snippet[0].upper()}{snippet[1:]}."}]
    return Case({"query": query}, {"results": hits}, {"title": title, "url": url, "snippet": snippet})


_PROGRAMS = (
    ("sum of the numbers from 1 to {a}", "print(sum(range(1, {a} + 1)))", lambda a, b: a * (a + 1) // 2),
    ("product of {a} and {b}", "print({a} * {b})", lambda a, b: a * b),
    ("remainder of {a} divided by {b}", "print({a} % {b})", lambda a, b: a % b),
    ("number of digits of {a} to the power of {b}", "print(len(str({a} ** {b})))", lambda a, b: len(str(a**b))),
    ("square of {a}", "x = {a}\nprint(x * x)", lambda a, b: a * a),
    ("binary form of {a}", "print(bin({a})[2:])", lambda a, b: bin(a)[2:]),
    ("number of multiples of {b} up to {a}", "print(len(range({b}, {a} + 1, {b})))", lambda a, b: a // b),
)


@task(
    tool(
        "code_execute",
        "Run Python code and return what it prints.|Execute a Python snippet in a sandbox.",
        code="string: Python source code",
    ),
    clauses="""
        [compute|calculate] the {goal}
        run some Python to get the {goal}
        work out the {goal}
        [tell me|find] the {goal}
        ---
        determine the {goal} with a script
        have Python evaluate the {goal}
    """,
    answers="""
        The {goal} is {result}.
        Python says that the {goal} is {result}.
        I ran the code: the {goal} equals {result}.
        ---
        Result: {result}, which is the {goal}.
        The script printed {result}; that is the {goal}.
    """,
)
def program(rng: Random) -> Case:
    goal, source, value = rng.choice(_PROGRAMS)
    a, b = rng.randint(20, 999), rng.randint(2, 19)
    result = str(value(a, b))
    return Case({"code": source.format(a=a, b=b)}, result, {"goal": goal.format(a=a, b=b)})


@task(
    tool(
        "file_read",
        "Read a text file.|Return the content of a file in the workspace.",
        path="string: Path of the file",
    ),
    clauses="""
        [open|read] {path}
        show me what is in {path}
        read {path} and tell me what it says
        ---
        print the content of {path}
        have a look inside {path}
    """,
    answers="""
        {path} has {count} lines: {listing}.
        The file {path} says: {listing}.
        I read {path}. It lists {listing}.
        ---
        Inside {path} there are {count} lines, namely {listing}.
        Content of {path}: {listing}.
    """,
    gap=(
        """
        read the file for me
        open that file we talked about
        ---
        print the content of the file
        """,
        """
        Which file do you mean? Please give me its path.
        What is the path of the file?
        ---
        I need the file's path first.
        """,
        "path",
    ),
    lookup=True,
)
def read(rng: Random) -> Case:
    lines = rng.sample(pools.TODOS, rng.randint(2, 4))
    return Case({"path": pools.path(rng)}, "\n".join(lines), {"count": len(lines), "listing": "; ".join(lines)})


@task(
    tool(
        "file_write",
        "Write text to a file.|Create or replace a file in the workspace.",
        path="string: Path of the file",
        content="string: Text to write",
    ),
    clauses="""
        write "{content}" to {path}
        [save|store] the text "{content}" as {path}
        create {path} with the line "{content}"
        ---
        put "{content}" into a file called {path}
        persist the note "{content}" under {path}
    """,
    answers="""
        I wrote {bytes} bytes to {path}.
        {path} now holds your text ({bytes} bytes).
        Saved to {path}.
        ---
        The note sits in {path}, {bytes} bytes long.
        File {path} is in place.
    """,
    gap=(
        """
        save the text "{content}" to a file
        write "{content}" down somewhere
        ---
        persist the note "{content}"
        """,
        """
        What should the file be called?
        Where shall I save it?
        ---
        Under which path?
        """,
        "path",
    ),
)
def write(rng: Random) -> Case:
    text = rng.choice(
        (
            f"{rng.choice(pools.TODOS)} before {rng.choice(pools.MONTHS)} {rng.randint(1, 28)}",
            f"{rng.choice(pools.MEETINGS)} moved to {pools.clock(rng)}",
            f"ask {pools.person(rng)} about {rng.choice(pools.TOPICS)}",
        )
    )
    return Case({"path": pools.path(rng), "content": text}, {"status": "ok", "bytes": len(text)})


@task(
    tool(
        "send_email",
        "Send an email.|Send a message to one recipient by email.",
        to="string: Address of the recipient",
        subject="string: Subject line",
        body="string: Text of the message",
    ),
    clauses="""
        [email|write to] {to} about the {topic} and say "{body}"
        send {to} an email with the text "{body}" about the {topic}
        let {to} know by email: "{body}" (it is about the {topic})
        ---
        drop {to} a line on the {topic} that reads "{body}"
        mail "{body}" to {to}, subject {topic}
    """,
    answers="""
        The email to {to} has been sent (message {message_id}).
        Done, {to} will get your message about the {topic}.
        I sent your note on the {topic} to {to}.
        ---
        {to} has mail; the reference is {message_id}.
        Your line about the {topic} is on its way to {to}.
    """,
    gap=(
        """
        send an email about the {topic} that says "{body}"
        write a quick mail on the {topic}: "{body}"
        ---
        drop someone a line on the {topic} that reads "{body}"
        """,
        """
        What is the recipient's address?
        Who should receive it?
        ---
        To which address shall it go?
        """,
        "to",
    ),
)
def mail(rng: Random) -> Case:
    topic = rng.choice(pools.MEETINGS)
    body = rng.choice(
        ("See you at {0}.", "I will be late, around {0}.", "It starts at {0} now.", "Can we move it to {0}?")
    )
    arguments = {
        "to": pools.email(pools.person(rng)),
        "subject": topic.capitalize(),
        "body": body.format(pools.clock(rng)),
    }
    return Case(arguments, {"status": "sent", "message_id": pools.code(rng, "MSG")}, {"topic": topic})


@task(
    tool(
        "find_contact",
        "Look up a person in the address book.|Search contacts by name.",
        name="string: Full name",
    ),
    clauses="""
        look up {name} in my contacts
        find the [email address|phone number] of {name}
        get me the contact details of {name}
        ---
        pull {name} from the address book
        see how I can reach {name}
    """,
    answers="""
        {name} works at {company}; the email is {email} and the phone number is {phone}.
        You can reach {name} ({company}) at {email} or {phone}.
        The address book lists {name} with {email} and {phone}.
        ---
        For {name} of {company} I have {phone} and {email}.
        {email} or {phone} will get you to {name}.
    """,
    gap=(
        """
        look someone up in my contacts
        find a phone number for me
        ---
        pull an entry from the address book
        """,
        """
        Whose details do you need?
        What is the person's name?
        ---
        Whom are you looking for?
        """,
        "name",
    ),
    lookup=True,
)
def contact(rng: Random) -> Case:
    name = pools.person(rng)
    result = {
        "name": name,
        "company": rng.choice(pools.COMPANIES),
        "email": pools.email(name),
        "phone": pools.phone(rng),
    }
    return Case({"name": name}, result)


@task(
    tool(
        "convert_currency",
        "Convert an amount of money.|Convert between currencies at today's rate.",
        amount="number: Amount to convert",
        source="string: Currency code to convert from",
        target="string: Currency code to convert to",
    ),
    clauses="""
        convert {amount} {source} to {target}
        tell me how much {amount} {source} is in {target}
        work out what {amount} {source} are worth in {target}
        ---
        exchange {amount} {source} into {target} on paper
        express {amount} {source} in {target}
    """,
    answers="""
        {amount} {source} is {converted} {target} at a rate of {rate}.
        At today's rate of {rate}, {amount} {source} gives {converted} {target}.
        That would be {converted} {target}.
        ---
        Rate {rate}: {amount} {source} come to {converted} {target}.
        You would hold {converted} {target} in place of {amount} {source}.
    """,
    gap=(
        """
        convert {amount} {source}
        tell me what {amount} {source} is worth
        ---
        express {amount} {source} in another currency
        """,
        """
        Into which currency?
        Which currency do you need?
        ---
        What currency shall I express it in?
        """,
        "target",
    ),
)
def currency(rng: Random) -> Case:
    source, target = rng.sample(pools.CURRENCIES, 2)
    amount, rate = rng.choice((rng.randint(1, 5000), rng.randint(1, 100) * 50)), rng.randint(20, 3000) / 1000
    result = {"rate": rate, "converted": round(amount * rate, 2)}
    return Case({"amount": amount, "source": source, "target": target}, result)


@task(
    tool(
        "get_stock_price",
        "Get the latest price of a stock.|Quote for a ticker symbol.",
        symbol="string: Ticker symbol",
    ),
    clauses="""
        check the [stock|share] price of {symbol}
        tell me how {symbol} is doing today
        get a quote for {symbol}
        ---
        see where {symbol} trades right now
        pull the last price of {symbol}
    """,
    answers="""
        {symbol} is at {price} USD, {direction} {change} % today.
        The price of {symbol} is {price} USD ({direction} {change} %).
        {symbol} last traded at {price} USD.
        ---
        Shares of {symbol} change hands at {price} USD, {direction} {change} % on the day.
        Right now {symbol} costs {price} USD.
    """,
    gap=(
        """
        check a share price for me
        get a stock quote
        ---
        see where my stock trades right now
        """,
        """
        Which ticker symbol?
        What is the symbol of the stock?
        ---
        Which share do you mean?
        """,
        "symbol",
    ),
    lookup=True,
)
def stock(rng: Random) -> Case:
    symbol, change = rng.choice(pools.TICKERS), rng.randint(1, 79) / 10
    direction = rng.choice(("up", "down"))
    signed = change if direction == "up" else -change
    result = {"symbol": symbol, "price": pools.money(rng, 4, 900), "change_percent": signed}
    return Case({"symbol": symbol}, result, {"change": change, "direction": direction})


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
