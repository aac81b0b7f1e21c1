"""Tasks of a workspace: code, files, databases."""

from __future__ import annotations

import math
from random import Random

from qwenscope.corpus.tool_use import pools
from qwenscope.corpus.tool_use.model import Case, task, tool


def _fibonacci(position: int) -> int:
    before, here = 0, 1
    for _ in range(position):
        before, here = here, before + here
    return before


def _primes_below(limit: int) -> int:
    return sum(all(n % d for d in range(2, math.isqrt(n) + 1)) for n in range(2, limit))


_PROGRAMS = (
    ("sum of the numbers from 1 to {a}", "print(sum(range(1, {a} + 1)))", lambda a, b: a * (a + 1) // 2),
    ("product of {a} and {b}", "print({a} * {b})", lambda a, b: a * b),
    ("remainder of {a} divided by {b}", "print({a} % {b})", lambda a, b: a % b),
    ("number of digits of {a} to the power of {b}", "print(len(str({a} ** {b})))", lambda a, b: len(str(a**b))),
    ("square of {a}", "x = {a}\nprint(x * x)", lambda a, b: a * a),
    ("binary form of {a}", "print(bin({a})[2:])", lambda a, b: bin(a)[2:]),
    ("number of multiples of {b} up to {a}", "print(len(range({b}, {a} + 1, {b})))", lambda a, b: a // b),
    (
        "greatest common divisor of {a} and {b}",
        "import math\n\nprint(math.gcd({a}, {b}))",
        math.gcd,
    ),
    (
        "digit sum of {a} times {b}",
        "total = 0\nfor digit in str({a} * {b}):\n    total += int(digit)\nprint(total)",
        lambda a, b: sum(map(int, str(a * b))),
    ),
    (
        "number of primes below {a}",
        "def is_prime(n):\n    return n > 1 and all(n % d for d in range(2, int(n**0.5) + 1))\n\n"
        "print(sum(is_prime(n) for n in range({a})))",
        lambda a, b: _primes_below(a),
    ),
    (
        "list of the first {b} squares",
        "squares = [n * n for n in range(1, {b} + 1)]\nprint(squares)",
        lambda a, b: [n * n for n in range(1, b + 1)],
    ),
    (
        "Fibonacci number at position {b}",
        "a, b = 0, 1\nfor _ in range({b}):\n    a, b = b, a + b\nprint(a)",
        lambda a, b: _fibonacci(b),
    ),
    (
        "weekday {a} days after a Monday",
        'days = ["Mon", "Tue", "Wed", "Thu", "Fri", "Sat", "Sun"]\nprint(days[{a} % 7])',
        lambda a, b: ("Mon", "Tue", "Wed", "Thu", "Fri", "Sat", "Sun")[a % 7],
    ),
    (
        "average of {a} and {b}",
        "values = [{a}, {b}]\nprint(sum(values) / len(values))",
        lambda a, b: (a + b) / 2,
    ),
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
    number = rng.randint(2, 4)
    kind = rng.choice(("tasks", "settings", "amounts"))
    if kind == "tasks":
        path, lines = pools.path(rng), rng.sample(pools.TODOS, number)
    elif kind == "settings":
        path = pools.path(rng, "ini", "cfg")
        lines = [f"{key} = {rng.randint(1, 900)}" for key in rng.sample(pools.SETTINGS, number)]
    else:
        path = pools.path(rng, "csv")
        lines = [f"{stem},{pools.money(rng, 1, 900)}" for stem in rng.sample(pools.PRODUCTS, number)]
    return Case({"path": path}, "\n".join(lines), {"count": len(lines), "listing": "; ".join(lines)})


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
        "list_directory",
        "List the files in a folder.|Names of the files in a folder of the workspace.",
        folder="string: Folder",
    ),
    clauses="""
        list the files in {folder}
        show me what is in the {folder} folder
        tell me which files {folder} contains
        ---
        enumerate whatever sits in {folder}
        peek into the {folder} folder
    """,
    answers="""
        {folder} contains {count} files: {listing}.
        In {folder} I see {listing}.
        The folder {folder} holds {listing}.
        ---
        Sitting in {folder}: {listing}.
        {count} files turn up in {folder}, namely {listing}.
    """,
    gap=(
        """
        list the files in a folder
        ---
        peek into a folder for me
        """,
        """
        Which folder?
        What is the name of the folder?
        ---
        Into what folder?
        """,
        "folder",
    ),
    lookup=True,
)
def directory(rng: Random) -> Case:
    stems = rng.sample(pools.STEMS, rng.randint(2, 5))
    files = sorted(f"{stem}.{rng.choice(('txt', 'md', 'csv', 'py', 'json'))}" for stem in stems)
    folder = f"{rng.choice(pools.FOLDERS)}/{rng.randint(2015, 2027)}"
    return Case({"folder": folder}, {"files": files}, {"count": len(files), "listing": ", ".join(files)})


@task(
    tool(
        "query_database",
        "Run a read-only SQL query.|Query the sales database with SQL.",
        sql="string: SELECT statement",
    ),
    clauses="""
        [tell me|find out] how many {product} orders came from {city} in {year}
        query the database for the number of {product} orders from {city} in {year}
        count the orders of {product} from {city} in {year}
        ---
        ask the sales tables about {product} orders, {city}, {year}
        derive the order count for {product} in {city}, year {year}
    """,
    answers="""
        In {year} there were {count} {product} orders from {city}.
        The database counts {count} orders of {product} from {city} in {year}.
        {count} orders.
        ---
        {city} ordered {product} {count} times in {year}.
        According to the sales tables it was {count}.
    """,
)
def database(rng: Random) -> Case:
    product, city, year = rng.choice(pools.PRODUCTS), rng.choice(pools.CITIES), rng.randint(2018, 2026)
    count = rng.randint(0, 4000)
    sql = f"SELECT COUNT(*) AS n FROM orders WHERE product = '{product}' AND city = '{city}' AND year = {year}"
    return Case(
        {"sql": sql}, {"rows": [{"n": count}]}, {"product": product, "city": city, "year": year, "count": count}
    )


@task(
    tool("delete_file", "Delete a file for good.|Remove a file from the workspace.", path="string: Path of the file"),
    clauses="""
        delete {path}
        remove the file {path}
        get rid of {path}
        ---
        wipe {path} from the workspace
        make {path} disappear for good
    """,
    answers="""
        {path} has been deleted.
        I removed {path} and freed {bytes} bytes.
        Done, {path} is gone.
        ---
        {path} is no more; {bytes} bytes were freed.
        Wiped: {path}.
    """,
    careful=True,
)
def deletion(rng: Random) -> Case:
    return Case(
        {"path": pools.path(rng, "txt", "csv", "log", "bak")}, {"status": "deleted", "bytes": rng.randint(10, 90000)}
    )
