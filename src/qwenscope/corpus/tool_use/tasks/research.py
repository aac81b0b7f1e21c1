"""Tasks of looking things up: the web, words, translations, books."""

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
    for _ in range(rng.choice((0, 0, 1, 2))):
        other = rng.choice(pools.TOPICS)
        page = f"https://www.example.net/{rng.randint(100, 999)}"
        hits.append({"title": f"{other.capitalize()} and {topic}", "url": page, "snippet": f"On {other} in {city}."})
    return Case({"query": query}, {"results": hits}, {"title": title, "url": url, "snippet": snippet})


_WORDS = (
    ("ephemeral", "adjective", "lasting for a very short time"),
    ("lucid", "adjective", "clear and easy to understand"),
    ("gossamer", "noun", "a fine, light film of spider silk"),
    ("candid", "adjective", "open and honest in speech"),
    ("meander", "verb", "to follow a winding course"),
    ("austere", "adjective", "plain and without comfort"),
    ("quell", "verb", "to put an end to something, often by force"),
    ("zenith", "noun", "the highest point reached"),
    ("brevity", "noun", "the quality of using few words"),
    ("placate", "verb", "to make someone less angry"),
    ("arduous", "adjective", "needing much effort"),
    ("mirth", "noun", "laughter and merriment"),
    ("obsolete", "adjective", "no longer in use"),
    ("ponder", "verb", "to think about something carefully"),
    ("resilient", "adjective", "able to recover quickly"),
    ("thwart", "verb", "to stop a plan from succeeding"),
    ("verdant", "adjective", "green with plants"),
    ("wary", "adjective", "careful because of possible danger"),
)


@task(
    tool("define_word", "Look up a word in the dictionary.|Definition of an English word.", word="string: The word"),
    clauses="""
        tell me what "{word}" means
        look up the word "{word}"
        define "{word}"
        give me the definition of "{word}"
        ---
        explain the meaning behind "{word}"
        consult the dictionary on "{word}"
    """,
    answers="""
        "{word}" ({kind}) means {meaning}.
        The word "{word}" is {a_kind}: {meaning}.
        According to the dictionary, "{word}" means {meaning}.
        ---
        In the dictionary "{word}" stands as {a_kind}: {meaning}.
        Meaning of "{word}": {meaning}.
    """,
    gap=(
        """
        look up a word for me
        define a word
        ---
        consult the dictionary for me
        """,
        """
        Which word?
        What is the word?
        ---
        What word puzzles you?
        """,
        "word",
    ),
    lookup=True,
)
def definition(rng: Random) -> Case:
    word, kind, meaning = rng.choice(_WORDS)
    article = "an adjective" if kind == "adjective" else f"a {kind}"
    return Case({"word": word}, {"word": word, "kind": kind, "meaning": meaning}, {"a_kind": article})


_PHRASES = {
    "good morning": ("bonjour", "buenos días", "guten Morgen", "buongiorno"),
    "thank you very much": ("merci beaucoup", "muchas gracias", "vielen Dank", "grazie mille"),
    "where is the station": ("où est la gare", "dónde está la estación", "wo ist der Bahnhof", "dov'è la stazione"),
    "see you tomorrow": ("à demain", "hasta mañana", "bis morgen", "a domani"),
    "the bill, please": (
        "l'addition, s'il vous plaît",
        "la cuenta, por favor",
        "die Rechnung, bitte",
        "il conto, per favore",
    ),
    "I do not understand": ("je ne comprends pas", "no entiendo", "ich verstehe nicht", "non capisco"),
    "how much is it": ("combien ça coûte", "cuánto cuesta", "wie viel kostet das", "quanto costa"),
    "the water is cold": ("l'eau est froide", "el agua está fría", "das Wasser ist kalt", "l'acqua è fredda"),
    "I am looking for a book": ("je cherche un livre", "busco un libro", "ich suche ein Buch", "cerco un libro"),
    "happy birthday": ("joyeux anniversaire", "feliz cumpleaños", "alles Gute zum Geburtstag", "buon compleanno"),
}


@task(
    tool(
        "translate_text",
        "Translate a text from English.|Translate English into another language.",
        text="string: English text",
        language="French/Spanish/German/Italian: Target language",
    ),
    clauses="""
        translate "{text}" into {language}
        tell me how to say "{text}" in {language}
        give me the {language} for "{text}"
        ---
        render "{text}" in {language}
        turn "{text}" into proper {language}
    """,
    answers="""
        In {language} you say "{translation}".
        "{text}" in {language} is "{translation}".
        The {language} translation is "{translation}".
        ---
        A {language} speaker would put it as "{translation}".
        "{translation}" is the {language} for it.
    """,
    gap=(
        """
        translate "{text}" for me
        ---
        render "{text}" in another tongue
        """,
        """
        Into which language?
        What language do you need?
        ---
        Which tongue shall it be?
        """,
        "language",
    ),
)
def translation(rng: Random) -> Case:
    text = rng.choice(tuple(_PHRASES))
    number = rng.randrange(4)
    language = ("French", "Spanish", "German", "Italian")[number]
    return Case({"text": text, "language": language}, {"translation": _PHRASES[text][number], "language": language})


@task(
    tool(
        "find_book",
        "Search the library catalogue by title.|Check whether the library has a book.",
        title="string: Title of the book",
    ),
    clauses="""
        check whether the library has "{title}"
        find "{title}" in the library catalogue
        see if I can borrow "{title}"
        ---
        look for a copy of "{title}" on the shelves
        query the catalogue for "{title}"
    """,
    answers="""
        "{title}" by {author} ({year}) is {status}; the shelf mark is {shelf}.
        The library lists "{title}" by {author} at {shelf}. It is {status}.
        Yes: "{title}", {author}, {year}. The copy is {status}.
        ---
        At {shelf} stands "{title}", written by {author}, currently {status}.
        {author} wrote it in {year}; the copy at {shelf} is {status}.
    """,
    gap=(
        """
        check whether the library has a certain book
        find a book in the library catalogue
        ---
        query the catalogue for me
        """,
        """
        What is the title?
        Which book are you looking for?
        ---
        Please name the book.
        """,
        "title",
    ),
    lookup=True,
)
def library(rng: Random) -> Case:
    title = pools.book(rng)
    result = {
        "title": title,
        "author": pools.person(rng),
        "year": rng.randint(1950, 2025),
        "shelf": f"{rng.choice('ABCDEFGH')}{rng.randint(1, 60)}",
        "status": rng.choice(("available", "on loan", "reserved", "available", "in repair")),
    }
    return Case({"title": title}, result)
