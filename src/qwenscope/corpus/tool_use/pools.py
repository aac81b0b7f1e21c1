"""Values that fill the slots. Persons and firms are invented; networks and domains are those kept for documentation."""

from __future__ import annotations

from random import Random


def _items(text: str) -> tuple[str, ...]:
    return tuple(item.strip() for item in text.replace("\n", ",").split(",") if item.strip())


CITIES = _items(
    """
    Lisbon, Oslo, Nairobi, Kyoto, Toronto, Lima, Hanoi, Dublin, Cairo, Denver, Porto, Accra, Seoul, Quito, Tunis
    Boston, Perth, Manila, Vienna, Zagreb, Bogota, Austin, Tallinn, Dakar, Osaka, Krakow, Bergen, Malmo, Lyon, Ghent
    Turin, Valencia, Leeds, Galway, Basel, Nagoya, Busan, Pune, Jaipur, Hobart, Auckland, Suva, Havana, Cusco, Salta
    Halifax, Calgary, Tucson, Omaha, Portland
    """
)
RAIL_CITIES = _items(
    """
    Vienna, Zagreb, Krakow, Basel, Lyon, Ghent, Turin, Valencia, Munich, Hamburg, Graz, Trieste, Brno, Lille, Nantes,
    Utrecht, Bruges, Geneva, Salzburg, Verona, Leipzig, Dijon, Bilbao, Seville, Warsaw, Prague
    """
)
FIRST_NAMES = _items(
    """
    Ada, Bruno, Clara, Dmitri, Elena, Farid, Greta, Hugo, Imani, Jonas, Kavya, Leo, Mina, Nadia, Omar, Priya
    Quentin, Rosa, Samir, Tara, Uma, Viktor, Wanda, Ximena, Yusuf, Zoe, Anders, Bianca, Cosmo, Delia, Emre, Freya
    Gideon, Hana, Ivo, Junko, Kofi, Lucia, Mateo, Noor
    """
)
LAST_NAMES = _items(
    """
    Alder, Birch, Corvane, Dellmoor, Estwick, Farrowby, Grenholm, Hartwell, Iversby, Jessamine, Kestrelle, Lindqvane
    Marlowe, Norwick, Oakhurst, Pemberly, Quillon, Ravensby, Silverlake, Thornbury, Umberfield, Valmont, Westerley
    Yarrowin, Zephyrine
    """
)
COMPANIES = _items(
    """
    Blue Heron Analytics, Copperleaf Foods, Driftwood Robotics, Ember & Oak, Fennel Systems, Glasswing Travel
    Harbor Nine, Ironbark Tools, Juniper Lane, Kitewind Energy, Lumen Orchard, Mossgate Media, Northfold Labs
    Opal Transit, Pinecrest Health, Quarry Street Books, Rookery Games, Saltmarsh Logistics, Tidewater Optics
    Umbra Studio
    """
)
TICKERS = _items(
    """
    BHAX, CLFD, DWRB, EMOK, FNLS, GWTR, HBNN, IRBK, JNPL, KTWE, LMNO, MSGT, NFLB, OPTR, PNHC, QSBK, RKGM, SMLG, TWOP
    UMBR
    """
)
CURRENCIES = _items(
    """
    USD, EUR, GBP, JPY, CHF, CAD, AUD, SEK, NOK, INR, BRL, MXN, ZAR, KRW, SGD
    """
)
DAYS = (
    "today",
    "tomorrow",
    "on Monday",
    "on Tuesday",
    "on Wednesday",
    "on Thursday",
    "on Friday",
    "on Saturday",
    "on Sunday",
)
MONTHS = _items(
    """
    January, February, March, April, May, June, July, August, September, October, November, December
    """
)
TOPICS = _items(
    """
    tidal power, urban beekeeping, sourdough starters, glacier retreat, open-source licences, coral bleaching
    bicycle lanes, battery recycling, medieval bridges, night trains, rainwater harvesting, vertical farms
    quantum error correction, seed banks, dark-sky parks, fermented tea, sign languages, paper making
    wind turbine noise, heat pumps, jazz harmony, volcano monitoring, public libraries, chess openings, kite design
    soil carbon, lighthouse automation, peat bogs, printing history, satellite debris, typography, cave art
    road salt, tea ceremonies, origami maths, compost toilets
    """
)
ROOMS = _items(
    """
    kitchen, living room, bedroom, hallway, office, bathroom, garage, guest room, studio, attic, nursery, porch
    """
)
CUISINES = _items(
    """
    Italian, Thai, Ethiopian, Mexican, Japanese, Lebanese, Indian, Greek, Vietnamese, Peruvian, Korean, Turkish
    """
)
DISHES = _items(
    """
    lentil soup, mushroom risotto, shakshuka, pad thai, vegetable curry, falafel, ratatouille, fish tacos, gnocchi
    bibimbap, minestrone, paella, dal makhani, spanakopita, pho, okonomiyaki, chili, tabbouleh, pierogi, jollof rice
    """
)
PRODUCTS = _items(
    """
    desk lamp, wool blanket, travel mug, trail backpack, mechanical keyboard, rain jacket, ceramic teapot
    camping stove, bluetooth speaker, yoga mat, bike light, cast-iron pan, webcam, foam roller
    notebook set, phone stand, water filter, board game, reading chair, standing desk
    """
)
BOOK_ADJECTIVES = _items(
    """
    Silent, Amber, Hollow, Distant, Paper, Winter, Crooked, Salt, Electric, Patient, Borrowed, Hidden, Green, Last
    """
)
BOOK_NOUNS = _items(
    """
    Harbor, Orchard, Clock, Bridge, Garden, Atlas, Lantern, River, Library, Engine, Meadow, Signal, Island, Map
    """
)
MEETINGS = _items(
    """
    budget review, design sync, standup, hiring panel, project kickoff, retrospective, dentist appointment
    yoga class, lunch with the team, parent evening, piano lesson, quarterly planning, code review, customer call
    book club, release check
    """
)
TODOS = _items(
    """
    water the plants, renew the passport, call the plumber, send the invoice, back up the laptop, book train tickets
    return the library books, buy a birthday card, update the slides, pay the electricity bill, clean the aquarium
    order printer paper, charge the camera, review the contract, pick up the parcel, take out the recycling
    """
)
FOLDERS = _items(
    """
    notes, reports, data, src, docs, logs, config, drafts, archive, exports, scripts, invoices
    """
)
STEMS = _items(
    """
    summary, budget, readme, inventory, meeting, settings, results, draft, schedule, changelog, recipes, contacts
    metrics, plan, survey, outline, backup, todo, sales, measurements
    """
)
LANGUAGES = _items(
    """
    French, Spanish, German, Italian, Portuguese, Dutch, Swedish, Turkish
    """
)
AIRLINES = _items(
    """
    Skylark Air, Meridian Wings, Polar Express Air, Coastline Airways, Juniper Jet
    """
)

SETTINGS = _items("timeout, retries, workers, port, cache_size, max_users, batch, interval, depth, volume, quota")
SERVICES = _items("checkout, search, billing, gateway, mailer, reports, uploads, scheduler, accounts")


def person(rng: Random) -> str:
    """An invented full name."""
    return f"{rng.choice(FIRST_NAMES)} {rng.choice(LAST_NAMES)}"


def email(name: str) -> str:
    """The example-domain address of an invented person."""
    return f"{name.lower().replace(' ', '.')}@example.com"


def phone(rng: Random) -> str:
    """A number from the range reserved for fiction."""
    return f"555-01{rng.randrange(100):02d}"


def ip(rng: Random) -> str:
    """An address from a documentation network."""
    return f"{rng.choice(('192.0.2', '198.51.100', '203.0.113'))}.{rng.randint(1, 254)}"


def date(rng: Random) -> str:
    """A day as YYYY-MM-DD."""
    return f"{rng.randint(2025, 2027)}-{rng.randint(1, 12):02d}-{rng.randint(1, 28):02d}"


def clock(rng: Random) -> str:
    """A time of day as HH:MM."""
    return f"{rng.randint(7, 21):02d}:{rng.choice((0, 15, 30, 45)):02d}"


def spoken(day: str) -> str:
    """A YYYY-MM-DD day as a person writes it."""
    year, month, number = day.split("-")
    return f"{MONTHS[int(month) - 1]} {int(number)}, {year}"


def path(rng: Random, *extensions: str) -> str:
    """A relative file path with one of the extensions."""
    folder, stem = rng.choice(FOLDERS), rng.choice(STEMS)
    suffix = rng.choice(
        ("", "", f"_{rng.randint(1, 40)}", f"-{rng.randint(2019, 2027)}", f"_{rng.choice(MONTHS).lower()}")
    )
    return f"{folder}/{stem}{suffix}.{rng.choice(extensions or ('txt', 'md'))}"


def code(rng: Random, prefix: str) -> str:
    """An identifier such as ORD-48213."""
    return f"{prefix}-{rng.randint(10000, 99999)}"


def money(rng: Random, low: int, high: int) -> float:
    """An amount between two whole numbers, with cents."""
    return round(rng.randint(low * 100, high * 100) / 100, 2)


def mistyped(rng: Random, value: str) -> str:
    """`value` with two neighbouring letters or digits swapped, as a hurried person types it."""
    spots = [i for i in range(1, len(value) - 1) if value[i : i + 2].isalnum() and value[i] != value[i + 1]]
    if not spots:
        return value + value[-1]
    spot = rng.choice(spots)
    return value[:spot] + value[spot + 1] + value[spot] + value[spot + 2 :]


def tidy(value: float) -> float:
    """`value` without a useless `.0`."""
    return int(value) if value == int(value) else value


def book(rng: Random) -> str:
    """An invented title."""
    return f"The {rng.choice(BOOK_ADJECTIVES)} {rng.choice(BOOK_NOUNS)}"


def listing(items: list[str]) -> str:
    """Items as a phrase: a, b and c."""
    return f"{', '.join(items[:-1])} and {items[-1]}" if len(items) > 1 else items[0]
